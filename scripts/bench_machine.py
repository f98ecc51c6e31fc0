"""What the bench reads off the machine: CPU time and memory of a server's process tree, and two yardsticks.

The yardsticks tell machines and hours apart: a fixed piece of work in plain Python, and the disk's own synced write.
Linux only (/proc).
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import time
from pathlib import Path

MIB = 2**20
BLOB_BYTES = 8 * MIB
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Meter:
    """The process tree below `pid`. Without a pid every reading is NaN."""

    def __init__(self, pid: int | None) -> None:
        self.pid = pid

    def cpu_s(self) -> float:
        """User and system time so far; the kernel counts in steps of 10 ms."""
        if self.pid is None:
            return float("nan")
        ticks = 0
        for pid in self._tree():
            fields = _stat(pid)
            if fields is not None:
                # utime and stime; those of children that ended stand with the parent (cutime, cstime)
                ticks += sum(int(field) for field in fields[11:15])
        return ticks / _TICKS_PER_SECOND

    def memory_mb(self) -> float:
        if self.pid is None:
            return float("nan")
        pages = 0
        for pid in self._tree():
            try:
                pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            except OSError:
                continue
        return pages * _PAGE_BYTES / MIB

    def _tree(self) -> list[int]:
        children: dict[int, list[int]] = {}
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                fields = _stat(int(entry))
                if fields is not None:
                    children.setdefault(int(fields[1]), []).append(int(entry))
        found, to_do = [], [self.pid or 0]
        while to_do:
            pid = to_do.pop()
            found.append(pid)
            to_do += children.get(pid, [])
        return found


def _stat(pid: int) -> list[str] | None:
    """The fields after the command's name, which may hold spaces and brackets."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None


def python_us() -> float:
    """Microseconds for a fixed piece of work: an event encoded, hashed and decoded in plain Python. The best of several."""
    event = {
        "type": "m.room.encrypted", "depth": 1234, "room_id": "!abcdefgh:example.org", "sender": "@a:example.org",
        "prev_events": ["$" + "x" * 43] * 2, "auth_events": ["$" + "y" * 43] * 4, "content": {"ciphertext": "z" * 400},
    }  # fmt: skip
    repeats, best = 2000, float("inf")
    for _ in range(5):
        begun = time.process_time()
        for _ in range(repeats):
            raw = json.dumps(event, sort_keys=True, separators=(",", ":")).encode()
            hashlib.sha256(raw).digest()
            json.loads(raw)
        best = min(best, (time.process_time() - begun) / repeats * 1e6)
    return best


def disk_mb_per_s(folder: Path, rounds: int = 7) -> float:
    """What the disk gives a single writer of 8 MiB who syncs file and folder each time: what an upload is held against."""
    blob = os.urandom(BLOB_BYTES)
    took = []
    for number in range(rounds):
        path = folder / f"yardstick-{number}"
        begun = time.perf_counter()
        with path.open("wb") as file:
            file.write(blob)
            file.flush()
            os.fsync(file.fileno())
        directory = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        took.append(time.perf_counter() - begun)
        path.unlink()
    return BLOB_BYTES / 1e6 / statistics.median(took)
