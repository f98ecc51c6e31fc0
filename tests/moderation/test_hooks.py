"""Stories of the operator's own rules at the doors: plug-ins, programs over HTTP, ones that hang, Draupnir's protocol."""

from __future__ import annotations

import sys
from hashlib import sha256
from pathlib import Path
from typing import Any, get_args

import pytest
from standardwebhooks.webhooks import Webhook

from relay.config import ConfigError
from relay.config.hooks import CALLBACKS, POINT_NAMES
from relay.moderation import hook_points
from relay.moderation.doorkeeping import loaded
from relay.moderation.hook_points import ALLOW, POINTS, Asked, Hook, Invite, Media, Verdict, deny
from relay.moderation.hooks import DENIES_KEPT_SECONDS, FAILURES_BEFORE_REST, REST_SECONDS, HookDoors, Hooks, Plugin
from relay.moderation.http_hooks import _CALLBACKS, _FEDERATED_INVITE, BadAnswer, verdict
from tests.moderation.tools import SECRET, Tool
from tests.people import Refused, until
from tests.town import ROOT, Clock, Town

PLUGIN = """
from relay.moderation.hook_points import Hook, Verdict, deny

class NoStrangers(Hook):
    def check_create_room(self, asked):
        return deny("no_rooms", "Only staff make rooms here.") if asked.user_id.startswith("@mallory:") else None

    async def check_message(self, asked):
        assert asked.encrypted and not hasattr(asked, "content")
        return deny("too_small") if asked.sender.startswith("@mallory:") else None

    def check_media(self, asked):
        return Verdict("quarantine") if asked.size > 1000 else None
"""


def test_the_table_the_config_and_the_interface_name_the_same_points() -> None:
    assert tuple(POINTS) == POINT_NAMES, "the config knows every point"
    for name in POINTS:
        assert hasattr(Hook, f"check_{name}"), "a plug-in can stand at every point"
    assert {callback for callback, _ in (*_CALLBACKS.values(), _FEDERATED_INVITE)} == set(CALLBACKS), (
        "the config knows every callback"
    )
    words = " ".join(field for point in POINTS.values() for field in point.sees)
    for secret in ("address", "ip", "content", "body", "text", "password", "agent"):
        assert secret not in words.split(), "no hook is shown a person's address or words"
    for kind in get_args(Asked):
        assert kind.__name__ in vars(hook_points), "every question is a type of its own"


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An installed package with an entry point, as pip would leave it."""
    place = tmp_path / "installed"
    (place / "no_strangers-1.dist-info").mkdir(parents=True)
    (place / "no_strangers.py").write_text(PLUGIN)
    (place / "no_strangers-1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: no-strangers\nVersion: 1\n"
    )
    (place / "no_strangers-1.dist-info" / "entry_points.txt").write_text(
        "[relay.hooks]\nno-strangers = no_strangers:NoStrangers\nbroken = no_strangers:Missing\nodd = no_strangers:Verdict\n"
    )
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.delitem(sys.modules, "no_strangers", raising=False)
    return "no-strangers"


async def test_an_installed_plug_in_stands_at_the_doors(town: Town, plugin: str) -> None:
    house = await town.relay("one", f"hooks: {{plugins: [{plugin}]}}")
    alice, mallory = await town.users("alice@one", "mallory@one")
    refused = await mallory.is_refused(mallory.creates_room())
    assert refused.text == "Only staff make rooms here.", "the rule's own sentence is told"
    room = await alice.creates_room(with_=mallory)
    assert (await mallory.is_refused(mallory.sends(room))).errcode == "M_FORBIDDEN"
    seen = await alice.sends(room)
    assert await mallory.sees(seen), "the others send as always"
    big, small = await alice.uploads(b"\x00\xff" * 600), await alice.uploads(b"\x00\xff" * 60)
    assert (await alice.is_refused(alice.downloads(big))).status == 404, "a quarantined file is served to nobody"
    assert (await alice.downloads(small))[1] == b"\x00\xff" * 60
    status = await house.command("hooks.status")
    assert status["hooks"][0]["points"] == ["create_room", "message", "media"], "only what it overrides is asked"
    assert status["hooks"][0]["refused"] == 3 and not status["hooks"][0]["failed"]
    for name in ("broken", "odd", "absent"):
        with pytest.raises(ConfigError, match="plug-in"):
            loaded(name)


async def test_a_program_is_asked_over_http_and_sees_only_envelopes(town: Town) -> None:
    async with Tool() as tool:
        await town.relay(
            "one",
            f"hooks: {{http: [{{name: mine, url: '{tool.url}/mine', points: [invite, federated_invite, join, message, login, transaction], "
            f"secrets: [{SECRET}]}}]}}",
        )
        alice, bob = await town.users("alice@one", "bob@two")
        room = await alice.creates_room(with_=bob)
        sent = await alice.sends(room)
        assert await bob.sees(sent), "what it lets pass passes"
        heard = {body["point"]: body["asked"] for _, body, _ in tool.heard}
        assert heard["invite"] == {"sender": alice.id, "target": bob.id, "room_id": room}, "people elsewhere count, too"
        assert heard["message"]["event_id"] == sent and heard["message"]["encrypted"] is True
        assert b"ciphertext" not in b"".join(tool.raw), "not even ciphertext goes out"
        for raw, (_, _, headers) in zip(tool.raw, tool.heard, strict=True):
            Webhook(SECRET).verify(raw.decode(), headers)
        tool.usual = (
            200,
            {"decision": "deny", "reason_code": "x", "errcode": "M_LIMIT_EXCEEDED", "error": "Not today."},
        )
        refused = await alice.is_refused(alice.sends(room))
        assert (refused.status, refused.errcode, refused.text) == (403, "M_LIMIT_EXCEEDED", "Not today.")
        hidden = await bob.sends(room)
        assert await alice.does_not_see(hidden), "a message from elsewhere that is refused is shown to nobody"
        tool.usual = (200, {"decision": "challenge"})
        assert (await alice.is_refused(alice.sends(room))).status == 429, "a challenge asks to come back later"
        tool.usual = (200, {"decision": "allow"})
        again = await alice.sends(room)
        assert await bob.sees(again), "messages are asked about one by one"


async def test_a_program_that_hangs_holds_nobody_up_beyond_its_budget(town: Town) -> None:
    async with Tool() as tool:
        house = await town.relay(
            "one",
            f"hooks: {{http: [{{name: slow, url: '{tool.url}/slow', points: [message, register], budget: 200ms}}]}}",
        )
        alice = await town.user("alice@one")
        room = await alice.creates_room()
        tool.hangs = True
        for _ in range(FAILURES_BEFORE_REST + 3):
            await alice.sends(room)
        asked = len(tool.told("slow"))
        status = (await house.command("hooks.status"))["hooks"][0]
        assert status["resting"] and status["failed"] == FAILURES_BEFORE_REST, "it is left alone after five failures"
        refused = await alice.is_refused(town.user("bob@one"))
        assert "could not be asked" in refused.text, "where a rule must be asked, the door stays shut"
        await alice.sends(room)
        assert len(tool.told("slow")) == asked, "while it rests it is not asked at all"
        tool.hangs = False
        town.clock.forward(seconds=REST_SECONDS + 1)
        await alice.sends(room)
        assert len(tool.told("slow")) == asked + 1, "then it is asked again"
        await town.user("bob@one")


async def test_draupnirs_antispam_protocol(town: Town) -> None:
    async with Tool() as tool:
        tool.usual = (200, {})
        house = await town.relay(
            "one",
            f"hooks: {{antispam: {{url: '{tool.url}/api/1/spam_check', authorization: s3cret, "
            "callbacks: [user_may_invite, user_may_join_room, check_event_for_spam, user_may_create_room], "
            "told_only: [user_may_create_room]}}",
        )
        alice, bob = await town.users("alice@one", "bob@one")
        room = await alice.creates_room(with_=bob, name="a name")
        assert tool.told("user_may_invite") == [{"inviter": alice.id, "invitee": bob.id, "room_id": room}]
        assert tool.told("user_may_join_room") == [{"user": bob.id, "room": room, "is_invited": True}]
        assert all(headers["Authorization"] == "Bearer s3cret" for _, _, headers in tool.heard)
        sent = await alice.sends(room)
        event = tool.told("check_event_for_spam")[-1]["event"]
        assert event["event_id"] == sent and "ciphertext" in event["content"], "ciphertext goes out as it is"
        await alice.sets(room, "m.room.name", {"name": "secret"})
        assert tool.told("check_event_for_spam")[-1]["event"]["content"] == {}, "what is readable goes out redacted"
        tool.answers["user_may_invite"] = (403, {"errcode": "M_FORBIDDEN", "error": "Protected."})
        other = await alice.creates_room()
        refused = await alice.is_refused(alice.invites_to(other, bob))
        assert (refused.errcode, refused.text) == ("M_FORBIDDEN", "Protected."), "the tool's answer is told"
        mallory = await town.user("mallory@two")
        elsewhere = await mallory.creates_room()
        refused = await mallory.is_refused(mallory.invites_to(elsewhere, bob))
        assert "Protected." in refused.text, "of an invite from elsewhere it is asked in the same way, as Synapse does"
        assert tool.told("user_may_invite")[-1] == {"inviter": mallory.id, "invitee": bob.id, "room_id": elsewhere}
        tool.answers["user_may_join_room"] = (500, "nonsense")
        carol = await town.user("carol@one")
        public = await alice.creates_room(preset="public_chat")
        assert (await carol.is_refused(carol.joins(public))).status == 403, "joining is refused where it can't be asked"
        tool.answers["user_may_join_room"] = (500, None)
        assert (await carol.is_refused(carol.joins(public))).status == 403, "nor is no answer a yes"
        tool.answers["check_event_for_spam"] = (500, "nonsense")
        await alice.sends(room)
        said = [finding["what"] for finding in await house.command("check")]
        assert any("antispam" in what for what in said), "a tool that does not answer its ping is told of"


class Counting(Hook):
    def __init__(self) -> None:
        self.asked = 0
        self.answer: Verdict | None = None
        self.breaks = False

    def check_invite(self, asked: Invite) -> Verdict | None:
        self.asked += 1
        if self.breaks:
            raise ValueError("a bug")
        return self.answer

    async def check_media(self, asked: Media) -> Verdict | None:
        return deny("media")


async def test_denies_are_remembered_and_failures_counted() -> None:
    clock, rule = Clock(), Counting()
    hooks = Hooks(clock)
    hooks.add(Plugin("counting", rule))
    point, asked = POINTS["invite"], Invite("@a:x", "@b:x", "!r:x")
    rule.answer = deny("no")
    for _ in range(3):
        assert (await hooks.ask(point, asked)).decision == "deny"
    assert rule.asked == 1, "a deny holds for a while without asking again"
    assert (await hooks.ask(point, Invite("@a:x", "@c:x", "!r:x"))).decision == "deny" and rule.asked == 2, (
        "of this one only"
    )
    clock.forward(seconds=DENIES_KEPT_SECONDS + 1)
    rule.answer = None
    assert await hooks.ask(point, asked) is ALLOW and rule.asked == 3, "then it is asked again"
    rule.breaks = True
    for _ in range(FAILURES_BEFORE_REST + 2):
        assert (await hooks.ask(point, asked)).decision == "allow", "a local invite passes where the rule fails"
    assert rule.asked == 3 + FAILURES_BEFORE_REST, "a broken rule is left alone"
    assert (await hooks.ask(POINTS["media"], Media("@a:x", 1, "00"))).decision == "allow", "at each of its points"
    assert (await hooks.ask(POINTS["login"], asked)) is ALLOW, "and is never asked where it has no opinion"


async def test_no_hook_no_door() -> None:
    assert not Hooks(Clock()), "without a rule the doors are not even built"
    doors = HookDoors(Hooks(Clock()), "x")
    assert not doors.wants_files, "no file is hashed for nobody"


@pytest.mark.parametrize("answer", [b"", b"[]", b"{}", b'{"decision": "maybe"}', b'{"decision": ["deny"]}', b"\xff"])
def test_an_answer_that_is_no_verdict_is_a_failure(answer: bytes) -> None:
    with pytest.raises(BadAnswer):
        verdict(answer)


def test_a_verdict_from_outside_is_bounded() -> None:
    got = verdict(b'{"decision": "deny", "errcode": "' + b"x" * 200 + b'", "reason_code": 5, "error": ["a"]}')
    assert got == Verdict("deny", "", "M_FORBIDDEN", ""), "odd words are replaced by our own"


async def test_blocked_files_stay_out_by_their_hash(town: Town) -> None:
    house = await town.relay("one")
    alice = await town.user("alice@one")
    blob = b"\x00\xff\x01" * 500
    kept = await alice.uploads(blob)
    assert (await alice.downloads(kept))[1] == blob
    assert house.server is not None
    restrictions = house.server._keeping.restrictions
    with house.server.db.write() as tx:
        restrictions.put(tx, "media_hash", sha256(blob).hexdigest())
    await tx
    refused = await alice.is_refused(alice.uploads(blob))
    assert refused.status == 403, "it can't be uploaded again"

    async def gone() -> bool:
        try:
            await alice.downloads(kept)
        except Refused as no:
            return no.status == 404
        return False

    assert await until(gone), "what was there is served to nobody any more"
    assert await alice.uploads(ciphertext_of(blob)), "other files are taken"
    await house.restart()
    assert await gone(), "also after a restart"


def ciphertext_of(blob: bytes) -> bytes:
    return bytes(byte ^ 0x5A for byte in blob)


def test_the_page_shows_the_table_and_an_example_that_runs() -> None:
    page = (ROOT / "docs" / "hooks.md").read_text(encoding="utf-8")
    for point in POINTS.values():
        [row] = [line for line in page.splitlines() if line.startswith(f"| `{point.name}` |")]
        assert row.endswith(f"| {point.on_failure} |"), f"the page says what happens where {point.name} fails"
        assert all(field in row for field in point.sees), f"the page says what {point.name} sees"
        budget = f"{point.budget_ms} ms" if point.budget_ms < 1000 else f"{point.budget_ms // 1000} s"
        assert f"| {budget} |" in row, f"the page says how long {point.name} may take"
    example = page.split("```python\n")[1].split("```")[0]
    made: dict[str, Any] = {}
    exec(compile(example, "docs/hooks.md", "exec"), made)
    hook = made["NoStrangers"]()
    assert hook.check_federated_invite(Invite("@a:example.org", "@b:x", "!r:x")) is None
    assert hook.check_federated_invite(Invite("@a:else.example", "@b:x", "!r:x")).decision == "deny"
