"""A disk that is full, in the two ways that a test can make one: a small tmpfs where it may be mounted, else a limit on
the size of each file that the relay's process writes."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import pytest

from tests.town import Apart

DISK_BYTES = 32 * 2**20
LEFT_BYTES = 3 * 2**20


class Disk(Protocol):
    def fills_up(self, house: Apart) -> None: ...
    def has_room_again(self, house: Apart) -> None: ...


class SmallDisk:
    """A tmpfs, and a file on it that takes nearly all the room."""

    def __init__(self, folder: Path) -> None:
        self._ballast = folder / "ballast"

    def fills_up(self, house: Apart) -> None:
        disk = os.statvfs(house.folder)
        self._ballast.write_bytes(b"\0" * max(0, disk.f_bavail * disk.f_frsize - LEFT_BYTES))

    def has_room_again(self, house: Apart) -> None:
        self._ballast.unlink()


class FileLimit:
    """What the kernel refuses for the size of one file stands for a disk without room."""

    def __init__(self) -> None:
        self._before = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)

    def fills_up(self, house: Apart) -> None:
        assert house.process is not None
        self._before = resource.prlimit(house.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(house.process.pid, resource.RLIMIT_FSIZE, (LEFT_BYTES, self._before[1]))

    def has_room_again(self, house: Apart) -> None:
        assert house.process is not None
        resource.prlimit(house.process.pid, resource.RLIMIT_FSIZE, self._before)


@contextmanager
def small_disk(folder: Path) -> Iterator[SmallDisk]:
    """Skips the test where nothing may be mounted."""
    folder.mkdir(mode=0o700)
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=700", "none", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("no small disk can be mounted here; the limit on files stands for it")
    try:
        yield SmallDisk(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], capture_output=True, check=False)


@contextmanager
def file_limit(folder: Path) -> Iterator[FileLimit]:
    if not hasattr(resource, "prlimit"):
        pytest.skip("only Linux limits the files of another process")
    yield FileLimit()
