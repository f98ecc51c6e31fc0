"""The rows of the speed budget that need two homeservers: a message crosses, many messages cross, a large room is joined.

Seen through the client API of both sides alone; their process trees are measured apart.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import orjson

from scripts.bench_client import BenchError, Homeserver, Person
from scripts.bench_ground import Figures, Size, named, spread
from scripts.bench_machine import Meter

CROSSING_TIMEOUT_S = 30.0
CATCH_UP_TIMEOUT_S = 120.0
CATCH_UP_LOOK_S = 0.02
MESSAGES_BEFORE_JOIN = 50
JOIN_ROUNDS = 3
ASK_MEANWHILE_S = 0.05


@dataclass(frozen=True)
class TwoSides:
    """Messages go from `here` to `there`."""

    here: Homeserver
    there: Homeserver
    meter_here: Meter
    meter_there: Meter
    size: Size


class _Costs:
    def __init__(self, sides: TwoSides) -> None:
        self._meters = (sides.meter_here, sides.meter_there)
        self._before = [meter.cpu_s() for meter in self._meters]

    def cpu_ms(self, operations: int) -> Figures:
        spent = [meter.cpu_s() - before for meter, before in zip(self._meters, self._before, strict=True)]
        return {"here_cpu_ms": spent[0] / operations * 1e3, "there_cpu_ms": spent[1] / operations * 1e3}


def _server_of(person: Person) -> str:
    return person.id.split(":", 1)[1]


async def _watches(person: Person, seen: dict[str, float], filtered: str | None = None) -> None:
    while True:
        answer = await person.sync(timeout_ms=5000, filtered=filtered)
        now = time.perf_counter()
        for room in answer.get("rooms", {}).get("join", {}).values():
            for event in room.get("timeline", {}).get("events", ()):
                seen.setdefault(event["event_id"], now)


async def remote_pair(sides: TwoSides) -> Figures:
    (sender,), (reader,) = await sides.here.people(1), await sides.there.people(1)
    room_id = await sender.creates_room()
    await reader.joins(room_id, _server_of(sender))
    await reader.sync()
    seen: dict[str, float] = {}
    async with asyncio.TaskGroup() as group:
        watching = group.create_task(_watches(reader, seen))
        await asyncio.sleep(1.0)
        took, costs = [], _Costs(sides)
        for _ in range(sides.size.remote_pair_messages):
            begun = time.perf_counter()
            event_id = await sender.sends(room_id)
            while event_id not in seen:
                if time.perf_counter() > begun + CROSSING_TIMEOUT_S:
                    raise BenchError(f"a message did not cross in {CROSSING_TIMEOUT_S:.0f} s")
                await asyncio.sleep(0.0005)
            took.append(seen[event_id] - begun)
        figures = {**spread(took), **costs.cpu_ms(len(took))}
        watching.cancel()
    return figures


async def remote_flow(sides: TwoSides) -> Figures:
    """Two senders a room on one side, one reader of all rooms on the other."""
    senders = await sides.here.people(2 * sides.size.remote_rooms)
    (reader,) = await sides.there.people(1)
    seats: list[tuple[Person, str]] = []
    for first, second in zip(senders[::2], senders[1::2], strict=True):
        room_id = await first.creates_room([second])
        await reader.joins(room_id, _server_of(first))
        seats += [(first, room_id), (second, room_id)]
    only = {"room": {"timeline": {"limit": 1000, "types": ["m.room.encrypted"]}, "state": {"types": []}}}
    filtered = orjson.dumps(only).decode()
    await reader.sync(filtered=filtered)
    seen: dict[str, float] = {}
    sent: set[str] = set()
    async with asyncio.TaskGroup() as group:
        watching = group.create_task(_watches(reader, seen, filtered))
        costs, begun = _Costs(sides), time.perf_counter()

        async def sends(person: Person, room_id: str) -> None:
            while time.perf_counter() < begun + sides.size.seconds:
                sent.add(await person.sends(room_id))

        await asyncio.gather(*(sends(*seat) for seat in seats))
        ended = time.perf_counter()
        for _ in range(int(CATCH_UP_TIMEOUT_S / CATCH_UP_LOOK_S)):
            if sent <= seen.keys():
                break
            await asyncio.sleep(CATCH_UP_LOOK_S)
        spent = costs.cpu_ms(len(sent))
        watching.cancel()
    if missing := len(sent - seen.keys()):
        raise BenchError(f"{missing} of {len(sent)} messages did not cross, or the reader's /sync cut them off")
    last = max(seen[event_id] for event_id in sent)
    return {
        "sent_per_s": len(sent) / (ended - begun),
        "arrived_per_s": len(sent) / (last - begun),
        "lag_ms": max(0.0, last - ended) * 1e3,
        **spent,
    }


async def remote_join(sides: TwoSides) -> Figures:
    """Somebody there joins a large room; each round is another large room, since a server joins a room only once."""
    residents = await sides.here.people(sides.size.remote_members)
    answered, known, first_sends = [], [], []
    costs = _Costs(sides)
    spent: list[Figures] = []
    for _ in range(JOIN_ROUNDS):
        room_id = await residents[0].creates_room(residents[1:])
        for number in range(MESSAGES_BEFORE_JOIN):
            await residents[number % len(residents)].sends(room_id)
        (newcomer,) = await sides.there.people(1)
        costs, begun = _Costs(sides), time.perf_counter()
        await newcomer.joins(room_id, _server_of(residents[0]))
        answered.append(time.perf_counter() - begun)
        members = 0
        while members <= len(residents):
            if time.perf_counter() > begun + CATCH_UP_TIMEOUT_S:
                raise BenchError(f"{members} of {len(residents) + 1} members were known after the join")
            members = len((await newcomer.call("GET", f"/v3/rooms/{room_id}/joined_members"))["joined"])
        known.append(time.perf_counter() - begun)
        spent.append(costs.cpu_ms(1))
        begun = time.perf_counter()
        await newcomer.sends(room_id)
        first_sends.append(time.perf_counter() - begun)
    return {
        "answer_ms": statistics.median(answered) * 1e3,
        "all_members_ms": statistics.median(known) * 1e3,
        "first_send_ms": statistics.median(first_sends) * 1e3,
        **{name: statistics.median(one[name] for one in spent) for name in ("here_cpu_ms", "there_cpu_ms")},
    }


async def remote_large(sides: TwoSides) -> Figures:
    """Somebody there joins a room of so many state events that the members come after the answer: bans of names that nobody
    has, which is how such a room is made through the client API alone."""
    (host,), (newcomer, other) = await sides.here.people(1), await sides.there.people(2)
    room_id, server = await host.creates_room(), _server_of(host)
    for number in range(sides.size.remote_bans):
        await host.call("POST", f"/v3/rooms/{room_id}/ban", {"user_id": f"@nobody{number}:{server}"})
    costs, begun = _Costs(sides), time.perf_counter()
    await newcomer.joins(room_id, server)
    answered = time.perf_counter()
    await newcomer.sends(room_id)
    sent = time.perf_counter()
    memory_mb, waits = 0.0, []
    async with asyncio.TaskGroup() as group:
        # The answer to this one waits until all members are known.
        members = group.create_task(newcomer.call("GET", f"/v3/rooms/{room_id}/members?membership=ban"))
        while not members.done():
            asked = time.perf_counter()
            await other.call("GET", "/v3/account/whoami")
            waits.append(time.perf_counter() - asked)
            memory_mb = max(memory_mb, sides.meter_there.memory_mb())
            await asyncio.sleep(ASK_MEANWHILE_S)
    known = time.perf_counter()
    if (found := len(members.result()["chunk"])) != sides.size.remote_bans:
        raise BenchError(f"{found} of {sides.size.remote_bans} members were known after the join")
    return {
        "answer_ms": (answered - begun) * 1e3,
        "first_send_ms": (sent - answered) * 1e3,
        "all_members_s": known - begun,
        **named("meanwhile", waits),
        "there_memory_mb": memory_mb,
        **costs.cpu_ms(1),
    }


SCENARIOS: dict[str, Callable[[TwoSides], Awaitable[Figures]]] = {
    "remote_pair": remote_pair,
    "remote_flow": remote_flow,
    "remote_join": remote_join,
    "remote_large": remote_large,
}
