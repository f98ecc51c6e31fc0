"""The rows of the speed budget for simplified sliding sync: somebody in many rooms opens the app, and then one thing happens.

What is asked is what deployed apps ask: a window of twenty rooms with the latest message of each, their names and members as
far as they are shown, and every extension.
"""

from __future__ import annotations

from typing import Any

import orjson

from scripts.bench_client import BenchError, Person
from scripts.bench_ground import Bench, Figures, Stopwatch, named

SLIDING = "/_matrix/client/unstable/org.matrix.simplified_msc3575/sync"
WINDOW = 20

_STATE = [
    ["m.room.create", ""], ["m.room.name", ""], ["m.room.avatar", ""], ["m.room.topic", ""], ["m.room.encryption", ""],
    ["m.room.canonical_alias", ""], ["m.room.tombstone", ""], ["m.room.join_rules", ""], ["m.room.power_levels", ""],
    ["m.room.member", "$ME"], ["m.room.member", "$LAZY"],
]  # fmt: skip


def _asked(connection: str) -> dict[str, Any]:
    window = {"ranges": [[0, WINDOW - 1]], "timeline_limit": 1, "required_state": _STATE}
    names = ("to_device", "e2ee", "account_data", "receipts", "typing")
    return {"conn_id": connection, "lists": {"all": window}, "extensions": {name: {"enabled": True} for name in names}}


async def _step(person: Person, body: bytes, pos: str | None) -> bytes:
    """The answer unparsed: only the server's part is to be seen."""
    where = f"{SLIDING}?timeout=0" + ("" if pos is None else f"&pos={pos}")
    status, answer = await person.polls.request("POST", where, person.token, body)
    if status != 200:
        raise BenchError(f"a step of sliding sync was answered {status}: {answer[:300].decode(errors='replace')}")
    return answer


async def sliding(bench: Bench) -> Figures:
    person, other = await bench.homeserver.people(2)
    for _ in range(bench.size.sliding_rooms - bench.size.sliding_busy_rooms):
        await person.sends(await person.creates_room())
    # Where something happens, and where somebody else is too.
    rooms = [await person.creates_room([other]) for _ in range(bench.size.sliding_busy_rooms)]

    first = Stopwatch(bench.meter)
    answer = b""

    async def opens(number: int) -> None:
        nonlocal answer
        answer = await _step(person, orjson.dumps(_asked(f"c{number}")), None)

    for number in range(bench.size.sliding_windows):
        await first.time(opens(number))
    size, cpu = len(answer), first.cpu_ms()
    whole = orjson.loads(answer)
    if whole["lists"]["all"]["count"] != bench.size.sliding_rooms or len(whole["rooms"]) < min(
        WINDOW, bench.size.sliding_rooms
    ):
        raise BenchError("the window does not hold the rooms that were made")

    pos, body = whole["pos"], orjson.dumps(_asked(f"c{bench.size.sliding_windows - 1}"))
    changes: list[float] = []
    spent = 0.0

    async def steps() -> None:
        nonlocal answer
        answer = await _step(person, body, pos)

    for number in range(bench.size.sliding_changes):
        event_id = await other.sends(rooms[number % len(rooms)])
        step = Stopwatch(bench.meter)
        await step.time(steps())
        changes += step.took
        spent += step.cpu_ms()
        if event_id.encode() not in answer:
            raise BenchError("a step of sliding sync did not bring what had just been sent")
        pos = orjson.loads(answer)["pos"]
    return {
        "window_first_ms": first.took[0] * 1e3,
        "window_cpu_ms": cpu,
        "answer_mb": size / 1e6,
        **named("window", first.took),
        "change_cpu_ms": spent / len(changes),
        **named("change", changes),
    }
