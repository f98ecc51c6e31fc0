"""What every scenario of the bench stands on: how much of each, the server under measurement, and the stopwatch."""

from __future__ import annotations

import time
from collections.abc import Awaitable
from dataclasses import dataclass

from scripts.bench_client import Homeserver
from scripts.bench_machine import Meter

Figures = dict[str, float]


@dataclass(frozen=True)
class Size:
    """How much of each. `quick` proves that everything still works; its figures are no measurement."""

    seconds: float = 8.0
    warm_up_seconds: float = 2.0
    pair_messages: int = 200
    viewers: int = 100
    viewers_messages: int = 30
    crowd: int = 500
    crowd_messages: int = 10
    rooms: int = 100
    messages_a_room: int = 10
    initial_syncs: int = 5
    empty_syncs: int = 1000
    sliding_rooms: int = 500
    sliding_busy_rooms: int = 20
    sliding_windows: int = 10
    sliding_changes: int = 200
    devices: int = 100
    to_device_requests: int = 30
    key_requests: int = 20
    uploads: int = 7
    people_in_all: int = 700
    remote_pair_messages: int = 200
    remote_rooms: int = 10
    remote_members: int = 1000
    remote_bans: int = 50_000
    reports: int = 1000
    timed_reports: int = 40
    desk_pages: int = 60


FULL = Size()
QUICK = Size(
    seconds=0.3, warm_up_seconds=0.1, pair_messages=5, viewers=3, viewers_messages=2, crowd=4, crowd_messages=2, rooms=3,
    messages_a_room=2, initial_syncs=2, empty_syncs=5, sliding_rooms=4,
    sliding_busy_rooms=2, sliding_windows=2, sliding_changes=3, devices=3, to_device_requests=2, key_requests=2, uploads=2,
    people_in_all=40, remote_pair_messages=5, remote_rooms=2, remote_members=4, remote_bans=60, reports=3, timed_reports=2, desk_pages=2,
)  # fmt: skip


@dataclass(frozen=True)
class Bench:
    homeserver: Homeserver
    meter: Meter
    size: Size


def spread(seconds: list[float]) -> Figures:
    """p50, p95 and p99 in milliseconds."""
    ordered = sorted(seconds)
    return {f"p{share}_ms": ordered[min(len(ordered) - 1, len(ordered) * share // 100)] * 1e3 for share in (50, 95, 99)}


class Stopwatch:
    """Clock and CPU time of operations one after the other."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self.took: list[float] = []
        self._cpu = meter.cpu_s()

    async def time(self, operation: Awaitable[object]) -> None:
        begun = time.perf_counter()
        await operation
        self.took.append(time.perf_counter() - begun)

    def cpu_ms(self) -> float:
        return (self._meter.cpu_s() - self._cpu) / len(self.took) * 1e3


def named(what: str, took: list[float]) -> Figures:
    return {f"{what}_{name}": value for name, value in spread(took).items()}
