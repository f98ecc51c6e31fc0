"""Draupnir's commands, played with the SDK that it is made of, at `privacy.seal: standard`: its management room is readable
and stands in `privacy.clear_rooms`, its policy list is a room of its own, and no reporter is ever named.

The packages are installed by `npm ci` from the lock into `.cache/js` (ignored by git), once for each state of the lock.
Skipped where Node 20, npm or the packages can't be had.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from relay.moderation.reports import CATEGORY_KEY
from tests.js.conftest import workshop_of
from tests.moderation.test_actions import SAFETY
from tests.people import Person, path, until
from tests.town import Town

HERE = Path(__file__).parent
LIFE_SECONDS = 90

STEPS = [
    "sign in and listen",
    "management room",
    "policy list",
    "protect a room",
    "ban by policy list",
    "poll the reports",
    "suspend and shadow",
    "redact, deactivate and shut wait",
    "look at rooms",
]


@pytest.fixture(scope="module")
def workshop() -> Path:
    return workshop_of(HERE, "*.cjs")


async def test_draupnirs_commands(town: Town, workshop: Path) -> None:
    house = await town.relay("one")
    admin, bot, alice, mallory, reporter = await town.users(
        "admin@one", "draupnir@one", "alice@one", "mallory@one", "reporter@one"
    )
    for name in ("admin", "draupnir"):
        await house.command("user.admin", user=name, admin=True)
    management = (await house.command("rooms.management", user="admin"))["room_id"]
    state: Any = await admin.calls("GET", f"{path('rooms', management)}/state")
    assert "m.room.encryption" not in {event["type"] for event in state}, "a bot that can't decrypt can read there"
    refused = await admin.is_refused(admin.sends(management, {"msgtype": "m.text", "body": "x"}, type="m.room.message"))
    assert refused.errcode == "M_FORBIDDEN", "until the operator lists the room, it is sealed like every other"
    file = house.folder / "relay.yaml"
    file.write_text(file.read_text() + f"privacy: {{clear_rooms: ['{management}']}}\n")
    await house.restart()

    # Draupnir does not start without power in its management room, where it keeps the settings of its protections.
    levels: Any = await admin.calls("GET", path("rooms", management, "state", "m.room.power_levels", ""))
    levels["users"] = {**levels.get("users", {}), bot.id: 100}
    await admin.calls("PUT", path("rooms", management, "state", "m.room.power_levels", ""), levels)

    room = await alice.creates_room(with_=[mallory, reporter])
    reported, secret, message = [await mallory.sends(room) for _ in range(3)]
    bad = await mallory.creates_room()
    await admin.invites_to(management, bot)
    words = f"she wrote to {reporter.id}"
    for event_id, category in ((secret, "ncii"), (reported, "harassment")):
        body = {"reason": words, CATEGORY_KEY: category}
        await reporter.calls("POST", path("rooms", room, "report", event_id), body)
    given = {
        "bot": bot.id, "server": house.name, "management": management, "room": room, "mallory": mallory.id,
        "reporter": reporter.id, "reported": reported, "secret": secret, "message": message, "bad": bad,
    }  # fmt: skip
    process = await asyncio.create_subprocess_exec(
        "node", "commands.cjs", house.url, bot.token, cwd=workshop,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "NODE_ENV": "test"},
    )  # fmt: skip
    reading = asyncio.create_task(process.communicate(json.dumps(given).encode() + b"\n"))
    try:
        joined = await until(lambda: is_in(admin, management, bot.id), 30)
        if joined:
            command = {"msgtype": "m.text", "body": "!draupnir status"}
            await admin.sends(management, command, type="m.room.message")
        await asyncio.wait_for(asyncio.shield(reading), LIFE_SECONDS)
    except TimeoutError:
        process.kill()
    said, complained = await reading
    steps = [json.loads(line) for line in said.splitlines() if line.startswith(b"{")]
    for step in steps:
        assert step["ok"], f"Draupnir stumbled over “{step['step']}”: {step.get('error')}"
    got = [step["step"] for step in steps]
    assert got == STEPS, f"every step was taken; the last was {got[-1:]}, and then: {complained.decode()[-2000:]}"

    history = json.dumps(await admin.history(management))
    assert "sealed: open case" in history, "the bot told its moderators"
    assert reporter.id not in history and words not in history, "and nobody learns there who reported"
    waiting = [one["measure"] for one in (await admin.calls("GET", f"{SAFETY}/acts"))["acts"]]
    assert waiting == ["redact_all", "deactivate", "shut_room", "shut_room"], "what can't be undone waits for a person"
    audit = await house.command("audit")
    assert not audit["findings"], "every row has its rule"
    assert audit["counts"]["events: readable in a room of privacy.clear_rooms"] >= 3, "counted apart"
    refused = await alice.is_refused(alice.sends(room, {"msgtype": "m.text", "body": "x"}, type="m.room.message"))
    assert refused.errcode == "M_FORBIDDEN", "every other room stays sealed"
    warned = [one for one in await house.command("check") if "readable room" in one["what"]]
    assert not warned, "the management room has nobody elsewhere"


async def is_in(person: Person, room: str, user_id: str) -> bool:
    return (await person.members(room)).get(user_id) == "join"
