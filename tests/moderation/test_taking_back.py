"""What a reporter takes back, what ends by itself, and what neither takes away from others: their reports, their evidence, their
objections. And what of a case that may show a minor never leaves the house."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import orjson
import pytest

from relay.errors import ApiError
from relay.log import FIELDS
from relay.moderation import envelope, keeping, signatures
from relay.moderation.disclosure_form import Item
from relay.moderation.envelope import Envelope
from relay.moderation.reports import MAX_ADDED
from tests.moderation.casehouse import FACTS, SAFETY, Desk, casework, desk, hears, notices_of, reports, token_in
from tests.moderation.sessions import Session, disclosure
from tests.moderation.tools import SECRET, Tool
from tests.pages.visitors import Visitor
from tests.people import Person, Refused, path, until
from tests.town import Town

DAYS = 24


async def link_of(mod: Desk, who: Person, number: int) -> Any:
    return await casework(mod.house).links.look(token_in(await hears(who, f"Your report has the number {number}")))


async def words_of(mod: Desk, case_id: str) -> list[str]:
    """Of the case and of those joined to it, each opened as its own."""
    found = []
    for one in (await mod.asks("GET", f"reports/{case_id}/envelopes"))["envelopes"]:
        if one["kind"] == "words" and not one["forgotten"]:
            opened = envelope.open_with(mod.secret, Envelope.read(one), case_id=one["case_id"], version=one["version"])
            found.append(str(orjson.loads(opened)["words"]))
    return found


async def test_whoever_reports_first_takes_no_other_report_away_with_hers(town: Town) -> None:
    mod = await desk(town)
    alice, bob, carol, dan = await town.users("alice@one", "bob@one", "carol@one", "dan@one")
    room = await alice.creates_room(with_=[bob, carol, dan])
    said = await bob.sends(room)
    for who in (dan, alice, carol):  # Dan is a friend of Bob's, and quicker than the others
        await reports(who, room, said, f"words of {who.name}")
    work = casework(mod.house)
    case = await work.reports.opened(await link_of(mod, dan, 1), dan.id)
    await work.keeping.withdraw(case)
    [left] = await mod.queue()
    assert (left["number"], left["state"]) == (2, "new"), "Alice's stands in the queue now"
    assert len((await mod.asks("GET", f"reports/{left['id']}"))["joined"]) == 1, "and Carol's with it"
    assert await words_of(mod, left["id"]) == ["words of alice", "words of carol"]
    await mod.decides(left["id"])
    for who in (alice, carol):
        await hears(who, "was decided")
    assert (await mod.house.command("moderation.verify"))["sound"]


async def test_a_decision_outlives_the_report_so_that_one_can_object(town: Town) -> None:
    mod = await desk(town)
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob)
    session = Session()
    said = await bob.sends(room, session.says(room, "an ugly word"))
    await reports(alice, room, said, "he does this every day")
    work = casework(mod.house)
    link = await link_of(mod, alice, 1)
    await work.reports.attach_proof(link, alice.id, disclosure(Item(said, 0, session.prk(0))))
    [case] = await mod.queue()
    await mod.asks("POST", f"reports/{case['id']}/note", {"text": "a note of the moderator's"})
    await mod.decides(case["id"], {"measure": "suspend"})
    await work.keeping.withdraw(await work.reports.opened(link, alice.id))
    opened = await work.cases._db.read(
        lambda query: query.all(
            "SELECT e.kind FROM envelopes e JOIN envelope_wraps w USING (envelope_id) GROUP BY e.envelope_id"
        )
    )
    assert opened == [("note",)], "what she wrote and proved opens for nobody"
    row = await work.cases.get(case["id"])
    assert (row.reporter, row.user_id, row.emptied) == (None, bob.id, False)
    with pytest.raises(ApiError):
        await work.links.look(token_in(await hears(alice, "Your report has the number 1")))
    [(_, decision)] = await work.appeals.of_person(bob.id)
    assert decision.reasons()["facts"] == FACTS, "he still reads why"
    await work.appeals.file(case["id"], bob.id, "I did not do this")
    why = {
        "verdict": "reversed",
        "reason_code": "mistake",
        "ground": "terms:1",
        "facts": "Nothing is left that shows it.",
    }
    await mod.asks("POST", f"reports/{case['id']}/appeal", why)
    assert await bob.creates_room(), "and can be freed"


async def test_what_a_moderator_marks_at_the_last_moment_stays(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    mod = await desk(town)
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob)
    await reports(alice, room, await bob.sends(room), "a reason")
    work = casework(mod.house)
    [row] = await mod.queue()
    link = await link_of(mod, alice, 1)
    read_before = await work.reports.opened(link, alice.id)
    await work.cases.may_show_minor(row["id"], mod.person.id)
    # The loop and the reporter have looked at it before that.
    monkeypatch.setattr(keeping, "_over", lambda query, now: [read_before])
    await work.keeping._end_some()
    with pytest.raises(ApiError):
        await work.keeping.withdraw(read_before)
    assert (await mod.reads(row["id"]))["words"], "what may show a minor is there for a year"


async def test_proofs_of_joined_reports_last_as_long_as_what_is_objected_to(town: Town) -> None:
    mod = await desk(town)
    alice, bob, carol = await town.users("alice@one", "bob@one", "carol@one")
    room = await alice.creates_room(with_=[bob, carol])
    said = await bob.sends(room)
    await reports(alice, room, said, "the first")
    await reports(carol, room, said, "the second")
    [case] = await mod.queue()
    await mod.decides(case["id"], {"measure": "warn"})
    work = casework(mod.house)
    town.clock.forward(hours=182 * DAYS)
    await work.appeals.file(case["id"], bob.id, "please look again")
    town.clock.forward(hours=3 * DAYS)
    await work.keeping.look()
    assert len(await words_of(mod, case["id"])) == 2
    why = {"verdict": "upheld", "reason_code": "spam", "ground": "terms:1", "facts": FACTS}
    await mod.asks("POST", f"reports/{case['id']}/appeal", why)
    town.clock.forward(hours=184 * DAYS)
    await work.keeping.look()
    await work.keeping.look()
    left = await work.cases._db.read(lambda query: query.value("SELECT count(*) FROM cases WHERE emptied = 0"))
    assert left == 0, "in the end all is let go"


async def test_two_answers_to_one_objection_make_one(town: Town) -> None:
    mod = await desk(town)
    others = await town.users("second@one", "third@one")
    for one in others:
        await mod.house.command("user.admin", user=one.name, admin=True)
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob)
    await reports(alice, room, await bob.sends(room))
    [case] = await mod.queue()
    await mod.decides(case["id"], {"measure": "suspend"})
    work = casework(mod.house)
    await work.appeals.file(case["id"], bob.id, "please look again")
    why = {"reason_code": "mistake", "ground": "terms:1", "facts": FACTS}
    where = f"{SAFETY}/reports/{case['id']}/appeal"
    answers = await asyncio.gather(
        others[0].calls("POST", where, {"verdict": "reversed", **why}),
        others[1].calls("POST", where, {"verdict": "upheld", **why}),
        work.appeals.file(case["id"], alice.id, "no, it is right"),
        return_exceptions=True,
    )
    assert len([one for one in answers[:2] if isinstance(one, Refused)]) == 1, "whoever comes second hears so"
    verdict = (await work.decisions.of_case(case["id"]))[-1].verdict
    assert mod.house.server is not None
    suspended = await mod.house.server.db.read(
        lambda query: query.value("SELECT suspended FROM users WHERE user_id = $1", bob.id)
    )
    assert bool(suspended) is (verdict == "upheld"), "what holds is what was answered"
    state = (await work.cases.get(case["id"])).state
    assert (state == "appealed") is bool(await work.appeals.open_ones(case["id"])), "no objection is left behind"


async def test_a_reporter_calls_nobody_for_ever(town: Town) -> None:
    mod = await desk(town)
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob)
    said = await bob.sends(room)
    await reports(alice, room, said)
    work = casework(mod.house)
    link = await link_of(mod, alice, 1)
    added = 1
    for number in range(8):
        await work.reports.attach_proof(link, alice.id, disclosure(Item(said, 0, bytes([number]) * 32)))
        added += 1
    await hears(mod.person, "now has a proof (invalid)")
    assert len([one for one in notices_of(mod.person) if "now has a proof" in one]) == 1, "that it fails is news once"
    with pytest.raises(ApiError, match="So much has been added"):
        for _ in range(MAX_ADDED + 1):
            await work.reports.consent(link, alice.id, True)
            added += 1
    assert added == MAX_ADDED, "also where nothing is written and only a mind is changed"


async def test_what_may_show_a_minor_is_told_once_and_decided_by_people(town: Town) -> None:
    async with Tool() as tool:
        settings = (
            f"hooks: {{webhooks: [{{name: pager, url: '{tool.url}/told', secrets: [{SECRET}], allow_private_addresses: true}}], "
            f"integrations: [{{name: triage, secrets: [{SECRET}]}}]}}\n"
        )
        await town.relay("one", settings)
        mod = await desk(town)
        alice, bob = await town.users("alice@one", "bob@one")
        room = await alice.creates_room(with_=bob)
        await reports(alice, room, await bob.sends(room), "x", **{"org.relay.category": "minor"})
        [case] = await mod.queue()
        body = {
            "aud": mod.house.name, "purpose": "decision", "report_id": case["id"], "version": 1, "action": "none",
            "reason_code": "spam", "ground": "terms:3", "facts": FACTS,
        }  # fmt: skip
        raw = orjson.dumps(body)
        headers = signatures.headers([SECRET], "m1", int(time.time() * 1000), raw)
        where = f"{SAFETY}/reports/{case['id']}/decision"
        refused = await mod.person.is_refused(mod.person.calls("POST", where, raw, token="", headers=headers))
        assert refused.status == 403 and "by a person" in refused.text, "no machine waves it aside"
        act = {
            "measure": "quarantine",
            "target": f"mxc://{mod.house.name}/abc",
            "reason_code": "minor",
            "report_id": case["id"],
        }
        await mod.asks("POST", "acts", act)
        await mod.decides(case["id"], {"measure": "lock"})
        carl = await town.user("carl@one")
        await carl.calls("POST", f"users/{path(bob.id)}/report", {"reason": ""})
        assert await until(lambda: any(one["type"] == "report.created" for one in tool.told("told"))), "what came later"
        checkpoint = await mod.house.command("moderation.checkpoint")
        # One of the start may come before it.
        assert await until(lambda: checkpoint in [one["data"] for one in tool.told("told")]), (
            "how far the log has come leaves the machine signed"
        )
        told = [(one["type"], one["data"].get("report_id")) for one in tool.told("told")]
        assert [one for one in told if one[1] == case["id"]] == [("report.urgent", case["id"])], (
            "and nothing else of it"
        )


async def test_what_may_show_a_minor_is_handed_to_nobody_and_outlives_its_sender(town: Town) -> None:
    await town.relay("one", "moderation: {forwarding: true}\n")
    mod = await desk(town)
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob)
    session = Session()
    said = await bob.sends(room, session.says(room, "an ugly word"))
    await reports(alice, room, said, "a reason", **{"org.relay.category": "minor"})
    work = casework(mod.house)
    link = await link_of(mod, alice, 1)
    assert (
        await work.reports.attach_proof(link, alice.id, disclosure(Item(said, 0, session.prk(0))))
    ).result == "verified"
    [case] = await mod.queue()
    with pytest.raises(ApiError, match="never forwarded"):
        await work.reports.consent(link, alice.id, True)
    with pytest.raises(ApiError, match="never forwarded"):
        await work.peers.forward(case["id"], mod.person.id, said, {})
    await mod.decides(case["id"])
    await mod.house.command("user.deactivate", user="bob", erase=True)

    async def is_there() -> bool:
        assert mod.house.server is not None
        stored = await mod.house.server.rooms.event(said)
        return (
            stored is not None
            and "ciphertext" in stored.event.content
            and bool((await mod.reads(case["id"]))["evidence"])
        )

    for days in (3, 200):
        town.clock.forward(hours=days * DAYS)
        await work.keeping.look()
        assert await is_there(), "ciphertext and proof stay, whoever closes an account, and longer than others"
    town.clock.forward(hours=170 * DAYS)
    await work.keeping.look()
    assert (await work.cases.get(case["id"])).emptied, "for a year"


async def test_sorting_shortens_nothing_that_may_show_a_minor(town: Town) -> None:
    mod = await desk(town)
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob)
    await reports(alice, room, await bob.sends(room), "x", **{"org.relay.category": "minor"})
    [case] = await mod.queue()
    await mod.decides(case["id"])
    work = casework(mod.house)
    before = (await work.cases.get(case["id"])).keep_until
    await work.appeals.file(case["id"], alice.id, "please look again")
    with pytest.raises(ApiError):
        await work.cases.triage(case["id"], mod.person.id, category="spam")
    await reports(alice, room, await bob.sends(room), "x", **{"org.relay.category": "minor"})
    [second] = [one for one in await mod.queue() if one["id"] != case["id"]]
    await mod.asks("POST", f"reports/{second['id']}/sort", {"category": "spam"})
    sorted_ = await work.cases.get(second["id"])
    assert sorted_.category == "spam" and sorted_.keep_until >= before


async def test_the_operator_hears_that_a_readable_room_has_readers_elsewhere(town: Town) -> None:
    house = await town.relay("one")
    alice, bob = await town.users("alice@one", "bob@two")
    room = await alice.creates_room()
    await house.stop()
    file = house.folder / "relay.yaml"
    file.write_text(file.read_text() + f"privacy: {{clear_rooms: ['{room}', '!nobody']}}\n")
    await house.start()

    async def said() -> list[str]:
        return [one["what"] for one in await house.command("check") if room in one["what"] or "!nobody" in one["what"]]

    assert [one for one in await said() if "!nobody" in one] and not [one for one in await said() if room in one]
    await alice.invites_to(room, bob)
    assert await bob.notices(lambda: room in bob.invites)
    await bob.joins(room, alice.server)

    async def is_warned() -> bool:
        return any(room in one and "other servers" in one for one in await said())

    assert await until(is_warned)


async def test_no_receipt_stands_in_the_log(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    mod = await desk(town)
    work = casework(mod.house)
    code = await work.reports.notice(category="spam", where="x", text="y", contact="", good_faith=True)
    visitor = Visitor(town, mod.house)
    assert (await visitor.gets(f"/_relay/report/{code}"))[0] == 200

    async def breaks(link: object, user_id: object) -> None:
        raise RuntimeError(code)

    written: list[tuple[str, dict[str, Any]]] = []
    log = SimpleNamespace(error=lambda said, **fields: written.append((said, fields)))
    monkeypatch.setattr("relay.web.log", log)
    monkeypatch.setattr(work.reports, "opened", breaks)
    status, text = await visitor.gets(f"/_relay/report/{code}")
    assert status == 500 and code not in text
    [(said, fields)] = written
    assert said == "a request failed" and code not in str({**fields, "exc_info": None}), (
        "whoever reads the log could open the report with it"
    )
    assert fields["route"] == "/_relay/report/{token}" and fields.keys() <= FIELDS | {"exc_info"}
