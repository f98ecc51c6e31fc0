"""A report from one end to the other, with an unmodified client: harassment in an encrypted room on two relays, a proof from the
client's own key export, webhook and moderators' room, the decision, what it cuts off, notices, objection, reversal, the log.
"""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import nio
import pytest
from standardwebhooks import Webhook

from relay.errors import ApiError
from relay.moderation import proof_tool
from relay.moderation.disclosure_form import parse_code
from tests.moderation.casehouse import SAFETY, Desk, casework, hears, notices_of, token_in
from tests.moderation.tools import SECRET, Tool
from tests.nio_people import Nio, good
from tests.people import Person, Refused, path, until
from tests.town import Town

THREAT = "I know where you live, xylophone-marmalade"
WORDS = "he does this every evening, periwinkle-bassoon"
PASSPHRASE = "only for this file"
HOOKS = """
hooks:
  webhooks:
    - {{name: desk, url: "{url}/told", secrets: ["{secret}"], allow_private_addresses: true}}
"""


class Scene:
    """Two relays. Alice, who performs, and Bob, who harasses her, on one; Carol, who is in the room too, on the other."""

    def __init__(self, town: Town, tool: Tool) -> None:
        self.town, self.tool = town, tool
        self.devices: list[Nio] = []

    async def begins(self) -> None:
        house = await self.town.relay("one", HOOKS.format(url=self.tool.url, secret=SECRET))
        self.desk = Desk(house, await self.town.user("mod@one"))
        await self.desk.opens()
        self.alice, self.bob = await self.device("alice@one", "ALICEPHONE"), await self.device("bob@one", "BOBPHONE")
        self.carol = await self.device("carol@two", "CAROLPHONE")
        made = await self.alice.client.room_create(
            invite=[self.bob.id, self.carol.id], preset=nio.RoomPreset.private_chat
        )
        self.room = good(made, nio.RoomCreateResponse).room_id
        for one in (self.bob, self.carol):
            assert await one.notices(lambda one=one: self.room in one.client.invited_rooms)
            good(await one.client.join(self.room), nio.JoinResponse)
            assert await one.notices(lambda one=one: self.room in one.client.rooms)
        people = {self.alice.id, self.bob.id, self.carol.id}
        for one in self.devices:
            assert await one.notices(lambda one=one: people <= set(getattr(one.room(self.room), "users", ())))

    async def device(self, address: str, name: str) -> Nio:
        one = Nio(await self.town.user(address), self.town.folder / "nio" / name, name)
        self.devices.append(one)
        await one.signs_in()
        return one

    async def proves(self, who: Nio, event_id: str) -> str:
        """What `relay report-proof` does: from the key export of her client, and the event as her client shows it."""
        file = self.town.folder / "keys.txt"
        await who.client.export_keys(str(file), PASSPHRASE)
        sessions = proof_tool.read_export(file.read_text(), PASSPHRASE)
        file.unlink()
        [link] = [token_in(one) for one in notices_of(who.person) if "Your report has the number" in one]
        work = casework(self.desk.house)
        [card] = await work.reports.card(await work.links.look(link), who.id)
        assert card["event_id"] == event_id, "the page shows the reported message's ciphertext"
        made = proof_tool.prove(card, sessions)
        assert json.loads(made.plaintext)["content"]["body"] == THREAT, "she sees what she is about to disclose"
        return proof_tool.code([made])

    def told(self) -> list[dict[str, Any]]:
        """What the operator's program was told, each with its signature checked."""
        return [
            Webhook(SECRET).verify(raw, {name.lower(): value for name, value in headers.items()})
            for raw, (_, _, headers) in zip(self.tool.raw, self.tool.heard, strict=True)
        ]


@pytest.fixture
async def scene(town: Town) -> AsyncIterator[Scene]:
    async with Tool() as tool:
        tool.usual = (200, {})
        scene = Scene(town, tool)
        try:
            await scene.begins()
            yield scene
        finally:
            for one in scene.devices:
                await one.closes()


async def test_from_the_threat_to_the_last_word(scene: Scene) -> None:
    alice, bob, carol, room, desk = scene.alice, scene.bob, scene.carol, scene.room, scene.desk
    assert await _both_hear(scene, "hello")
    threat = await bob.says(room, THREAT)
    assert await alice.hears(THREAT), "she reads it, and nobody else but Carol can"

    # Her client offers "report"; the answer tells nothing, and within a moment two places know.
    await alice.person.calls("POST", f"rooms/{path(room)}/report/{path(threat)}", {"reason": WORDS})
    await hears(desk.person, "Report 1 has come (other)")
    thanks = await hears(alice.person, "Your report has the number 1")
    assert await until(lambda: any(one["type"] == "report.created" for one in scene.told()))

    # The proof, over the one-time link, for the account that got it.
    code = await scene.proves(alice, threat)
    work = casework(desk.house)
    link = await work.links.look(token_in(thanks))
    proof = await work.reports.attach_proof(link, alice.id, parse_code(code, category="threat", good_faith=True))
    assert proof.result == "verified"
    await hears(desk.person, "Report 1 now has a proof (verified)")
    assert await until(lambda: any(one["type"] == "report.disclosed" for one in scene.told()))
    assert not [one for one in scene.told() if alice.id in str(one) or bob.id in str(one) or THREAT in str(one)]

    # At the desk: sealed to the moderators' key, opened there and nowhere else.
    [row] = await desk.queue()
    assert (row["disclosure"], row["user_id"], row["event_id"]) == ("verified", bob.id, threat)
    opened = await desk.reads(row["id"])
    [item] = opened["evidence"][0]["items"]
    assert json.loads(base64.b64decode(item["plaintext"] + "=="))["content"]["body"] == THREAT
    assert opened["words"] == [{"words": WORDS}]

    decided = await desk.decides(row["id"], {"measure": "suspend"}, reason_code="threat")
    assert decided["measures"][0]["outcome"] == "done"
    assert await until(lambda: any(one["type"] == "report.decided" for one in scene.told()))
    await _is_suspended_everywhere(bob.person, room, carol.person)

    # Notices on both sides; the suspended person reads the reasons and objects.
    await hears(alice.person, "was decided: a measure was taken")
    notice = await hears(bob.person, "The moderators have decided something about you")
    link = await work.links.look(token_in(notice))
    _, [decision] = await work.appeals.opened(link, bob.id)
    assert decision.reasons()["ground"] == "terms:4.2" and decision.reasons()["facts"]
    await alice.person.is_refused(_opens(work.appeals.opened(link, alice.id)))
    await work.appeals.file(link.case_id, bob.id, "this was a line from our play")
    await hears(desk.person, "Somebody objects to decision 1")
    [row] = await desk.queue()
    assert row["state"] == "appealed"
    await desk.asks(
        "POST", f"reports/{row['id']}/appeal",
        {"verdict": "reversed", "reason_code": "mistake", "ground": "terms:4.2", "facts": "It is a line from the play they rehearse."},
    )  # fmt: skip
    await hears(bob.person, "was looked at again, and it was changed")
    await hears(alice.person, "was looked at again, and it was changed")
    await bob.says(room, "back again")
    assert await carol.hears("back again"), "what was taken from him is his again, on the other relay too"

    # The log tells it all, holds, and nothing readable or traceable lies anywhere.
    verdict = await desk.house.command("moderation.verify")
    assert verdict["sound"] and verdict["checkpoint"]["seq"] >= 8
    actions = [entry["action"] for entry in (await desk.asks("GET", f"reports/{row['id']}"))["history"]]
    assert [one for one in actions if one in ("report.created", "suspend", "decided", "appeal.filed", "undo.suspend", "appeal.reversed")] == [
        "report.created", "suspend", "decided", "appeal.filed", "undo.suspend", "appeal.reversed",
    ]  # fmt: skip
    everything = (await desk.person.calls("GET", f"{SAFETY}/audit", limit=200))["entries"]
    assert alice.id not in str(everything), "who reported stands nowhere in the log"
    assert not (await desk.house.command("audit"))["findings"], "every readable row has its rule"
    [disclosed] = parse_code(code, category="threat", good_faith=True).items
    for told in (THREAT.split()[-1].encode(), WORDS.split()[-1].encode(), b"line from our play", disclosed.prk):
        _found_nowhere(scene, told)


async def _both_hear(scene: Scene, text: str) -> bool:
    await scene.alice.says(scene.room, text)
    return await scene.bob.hears(text) and await scene.carol.hears(text)


async def _is_suspended_everywhere(bob: Person, room: str, elsewhere: Person) -> None:
    other = f"!nowhere:{elsewhere.server}"
    asked: list[Callable[[], Awaitable[Any]]] = [
        lambda: bob.sends(room),
        bob.creates_room,
        lambda: bob.invites_to(room, f"@somebody:{elsewhere.server}"),
        lambda: bob.calls("POST", f"join/{path(other)}", {}),
        lambda: bob.calls("POST", f"knock/{path(other)}", {}, server_name=elsewhere.server),
        lambda: bob.calls("PUT", f"profile/{path(bob.id)}/displayname", {"displayname": "x"}),
        lambda: bob.uploads(b"\x00\xff" * 600),
        lambda: bob.calls("PUT", f"directory/room/{path('#x:' + bob.server)}", {"room_id": room}),
    ]
    for doing in asked:
        assert (await bob.is_refused(doing())).errcode == "M_USER_SUSPENDED"
    await bob.syncs()  # reading goes on


async def _opens(doing: Any) -> None:
    try:
        await doing
    except ApiError as no:
        raise Refused(no.status, {"error": no.text}, {}) from no


def _found_nowhere(scene: Scene, raw: bytes) -> None:
    """Neither as it is, nor in the ways in which text hides."""
    forms = [raw, raw.hex().encode(), base64.b64encode(raw)[:-4], base64.urlsafe_b64encode(raw)[:-4]]
    for file in scene.desk.house.files():
        content = file.read_bytes()
        assert not [form for form in forms if form in content], f"{file.name} holds what was said"
