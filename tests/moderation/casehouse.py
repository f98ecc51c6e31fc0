"""A relay with moderators who have keys, and people who report: what stories about cases begin with."""

from __future__ import annotations

import re
from typing import Any

import orjson

from relay.moderation import envelope, key_list
from relay.moderation.casework import Casework
from relay.moderation.envelope import Envelope
from relay.moderation.moderator_secret import ModeratorSecret
from tests.people import Person, path
from tests.town import Town, Within

SAFETY = "/_relay/safety/v1"
FACTS = "Sent threats to another person in this room on two days."


class Desk:
    """A moderator with her key and the recovery key."""

    def __init__(self, house: Within, person: Person) -> None:
        self.house = house
        self.person = person
        self.secret, self.recovery = ModeratorSecret.make(), ModeratorSecret.make()

    async def opens(self) -> None:
        await self.house.command("user.admin", user=self.person.name, admin=True)
        keys: Any = [
            (self.person.id, "moderator", self.secret.public),
            (self.person.id, "recovery", self.recovery.public),
        ]
        made = key_list.first(self.house.name, keys, self.recovery, self.house.town.clock.now())
        await self.house.command("moderator.change", statement=dict(made.statement))

    async def asks(self, method: str, where: str, body: Any = None, **headers: str) -> Any:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.person.calls(method, f"{SAFETY}/{where}", body, headers=named)

    async def queue(self, **query: Any) -> list[dict[str, Any]]:
        return list((await self.person.calls("GET", f"{SAFETY}/reports", **query))["reports"])

    async def decides(self, case_id: str, *measures: dict[str, Any], **more: Any) -> Any:
        body = {"measures": list(measures), "reason_code": "harassment", "tos_clause": "4.2", "facts": FACTS, **more}
        return await self.asks("POST", f"reports/{case_id}/decision", body)

    async def reads(self, case_id: str) -> dict[str, list[Any]]:
        """What lies in the envelopes of a case, by kind, opened with her key."""
        found: dict[str, list[Any]] = {}
        for sealed in (await self.asks("GET", f"reports/{case_id}/envelopes"))["envelopes"]:
            opened = envelope.open_with(self.secret, Envelope.read(sealed), case_id=case_id, version=sealed["version"])
            found.setdefault(sealed["kind"], []).append(orjson.loads(opened))
        return found


async def desk(town: Town, name: str = "mod", nickname: str = "one") -> Desk:
    house = await town.relay(nickname)
    made = Desk(house, await town.user(f"{name}@{nickname}"))
    await made.opens()
    return made


def casework(house: Within) -> Casework:
    assert house.server is not None
    return house.server.moderation.casework


async def reports(who: Person, room: str, event_id: str, reason: str = "", **more: Any) -> None:
    await who.calls("POST", f"rooms/{path(room)}/report/{path(event_id)}", {"reason": reason, **more})


def notices_of(who: Person) -> list[str]:
    """What the relay itself has told her."""
    return [
        event["content"]["body"]
        for events in who.timeline.values()
        for event in events
        if event["type"] == "m.room.message" and event["sender"].startswith("@notices:")
    ]


async def hears(who: Person, words: str) -> str:
    """The notice with these words, as soon as a sync brings it."""
    assert await who.notices(lambda: any(words in one for one in notices_of(who))), (
        f"{who.name} hears: {words}; {notices_of(who)}"
    )
    return next(one for one in reversed(notices_of(who)) if words in one)


def token_in(notice: str) -> str:
    found = re.search(r"/_relay/(?:report|appeal)/([A-Za-z0-9_-]+)", notice)
    assert found is not None, notice
    return found[1]
