"""Whoever pages through a room with gaps, forks and history that came late gets each event once, from wherever she begins."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from relay.protocol import event as events
from relay.protocol.auth import auth_keys
from relay.rooms import timeline
from relay.rooms.room import Room
from relay.rooms.store import AFTER_GAP
from tests.rooms.ground import V3, Ground, Person, ciphertext, said


@dataclass(frozen=True, order=True)
class Said:
    depth: int
    pos: int
    text: str
    late: bool


async def happens(ground: Ground, room: Room, alice: Person, text: str, depth: int, marks: int | None) -> Said:
    """An event at this depth; it is history that was missing where it has no `marks`."""
    keys = auth_keys("m.room.encrypted", alice.id, None, {}, room.version)
    event = events.build(
        room.version, room_id=room.room_id, type="m.room.encrypted", sender=alice.id, content=ciphertext(text),
        prev_events=list(room.extremities), auth_events=[room.state[key] for key in keys], depth=depth, origin_server_ts=1,
        server_name="one.example", key=ground.key,
    )  # fmt: skip
    assert room.state_nid is not None
    async with room.lock:
        with ground.db.write(chain=room.room_id) as tx:
            if marks is None:
                one = ground.appender.history(tx, room, event, nid=tx.pos(), state_after=room.state_nid)
            else:
                one = ground.appender.append(tx, room, event, marks=marks)
        await tx
    return Said(depth, one.pos or 0, text, marks is None)


async def some_life(ground: Ground, room: Room, alice: Person, chance: random.Random, count: int) -> list[Said]:
    """Talk that goes on, leaves gaps behind, has them filled now and then, and forks."""
    found: list[Said] = []
    missing: list[int] = []
    depth = 10
    for number in range(count):
        kind = chance.choice(["on", "on", "gap", "fork", "late", "late"])
        if kind == "late" and missing:
            at = missing.pop(chance.randrange(len(missing)))
            found.append(await happens(ground, room, alice, str(number), at, None))
            continue
        if kind == "gap":
            missing += range(depth + 1, depth + 4)
            depth += 3
        depth += 1
        at = max(8, depth - chance.randrange(1, 6)) if kind == "fork" else depth
        found.append(await happens(ground, room, alice, str(number), at, AFTER_GAP if kind == "gap" else 0))
    return found


@pytest.mark.parametrize("seed", range(3))
async def test_each_event_comes_once_from_wherever_paging_begins(ground: Ground, seed: int) -> None:
    chance = random.Random(seed)
    alice = ground.person("alice")
    room_id = await alice.creates()
    room = await ground.room(room_id)
    life = await some_life(ground, room, alice, chance, 30)
    for pos in chance.sample([one.pos for one in life], 8):
        live = [one for one in life if not one.late and one.pos <= pos]
        following = min((one for one in life if not one.late and one.pos > pos), key=lambda one: one.pos, default=None)
        latest = max([*live, *([following] if following else [])])
        back = sorted([*live, *(one for one in life if one.late and one < latest)], reverse=True)
        forth = sorted(one for one in life if not one.late and one.pos > pos)
        for limit in (1, 4):
            token = {"from": f"s{ground.db.epoch}_{pos}_0123abcd-0"}
            assert await alice.reads(room_id, "b", limit, **token) == [one.text for one in back]
            assert await alice.reads(room_id, "f", limit, **token) == [one.text for one in forth]
    whole = [one.text for one in sorted(life)]
    assert await alice.reads(room_id, "f", 4) == whole
    assert await alice.reads(room_id, "b", 4) == whole[::-1]

    # It goes on while she pages back: nothing that was there is left out, and nothing comes twice.
    token, seen = "", []
    for _ in range(60):
        answer = await alice.gets(
            f"{V3}/rooms/{room_id}/messages", dir="b", limit=2, **({"from": token} if token else {})
        )
        seen += [said(event) for event in answer["chunk"] if event["type"] == "m.room.encrypted"]
        if "end" not in answer:
            break
        token = answer["end"]
        depth = chance.randrange(10, max(life).depth + 4)
        marks = chance.choice([None, 0])
        await happens(ground, room, alice, f"meanwhile {token}", depth, marks)
    else:
        raise AssertionError("paging never comes to an end")
    assert len(seen) == len(set(seen)), "each once"
    assert [text for text in seen if not text.startswith("meanwhile")] == whole[::-1], (
        "all that was there, in its order"
    )


async def test_the_latest_is_found_however_much_came_late_after_it(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timeline, "ARRIVAL_WINDOW", 2)
    alice = ground.person("alice")
    room_id = await alice.creates()
    room = await ground.room(room_id)
    await happens(ground, room, alice, "latest", 50, 0)
    late = [await happens(ground, room, alice, f"late {depth}", depth, 0) for depth in range(20, 26)]
    wanted = ["latest", *(one.text for one in reversed(late))]
    assert await alice.reads(room_id, "b", 2) == wanted
    token = f"s{ground.db.epoch}_{late[-1].pos}_0123abcd-0"
    assert await alice.reads(room_id, "b", 2, **{"from": token}) == wanted, "from where her sync stands, too"
