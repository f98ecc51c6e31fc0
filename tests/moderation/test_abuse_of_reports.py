"""Reports as a weapon: floods, false proofs, reports about oneself and about the moderator, guessing, oversized bundles."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
from typing import Any

import pytest

from relay.clock import HOUR
from relay.errors import ApiError
from relay.moderation.disclosure_form import Item
from relay.rooms.store import GONE
from tests.moderation.casehouse import SAFETY, casework, desk, hears, notices_of, reports, token_in
from tests.moderation.sessions import Session, b64
from tests.moderation.sessions import disclosure as parsed
from tests.pages.visitors import Visitor
from tests.people import Person, Refused, path, until
from tests.town import Town


def disclosure(*items: tuple[str, int, bytes], **more: Any) -> dict[str, Any]:
    told = [{"event_id": event_id, "index": index, "prk": b64(prk)} for event_id, index, prk in items]
    return {"v": 1, "alg": "m.megolm.v1.aes-sha2", "category": "harassment", "good_faith": True, "items": told, **more}


async def test_a_flood_is_bounded_and_the_same_thing_stands_in_the_queue_once(town: Town) -> None:
    mod = await desk(town)
    alice, bob, carol = await town.users("alice@one", "bob@one", "carol@one")
    room = await alice.creates_room(with_=[bob, carol])
    said = await bob.sends(room)
    answers = await asyncio.gather(*(reports(alice, room, said) for _ in range(14)), return_exceptions=True)
    assert len([one for one in answers if isinstance(one, Refused)]) == 4, "ten an hour, also where all come at once"
    refused = await alice.is_refused(reports(alice, room, said))
    assert refused.errcode == "M_LIMIT_EXCEEDED" and refused.body["retry_after_ms"] > 0
    await reports(carol, room, said)  # others are heard as before
    assert len(await mod.queue()) == 1, "eleven reports of one message are one case for the moderators"
    [case] = await mod.queue()
    assert len((await mod.asks("GET", f"reports/{case['id']}"))["joined"]) == 10
    await mod.decides(case["id"])
    assert not await mod.queue(), "decided together"
    await hears(carol, "was decided: no measure was taken")
    town.clock.forward(minutes=61)
    await reports(alice, room, said)


async def test_whoever_guesses_learns_nothing(town: Town) -> None:
    mod = await desk(town)
    alice, bob, eve = await town.users("alice@one", "bob@one", "eve@one")
    room = await alice.creates_room(with_=bob)
    said = await bob.sends(room)
    nowhere = "!" + "x" * 43
    for where, body in (
        (f"rooms/{path(room)}/report/{path(said)}", {}),  # it exists, and she may not see it
        (f"rooms/{path(room)}/report/{path('$' + 'x' * 43)}", {}),
        (f"rooms/{path(nowhere)}/report/{path(said)}", {"reason": "x", "score": -100}),
        (f"users/{path('no user')}/report", {"reason": ""}),
        (f"users/{path('@you are ugly:' + eve.server)}/report", {"reason": ""}),
        (f"users/{path('@ты:' + eve.server)}/report", {"reason": ""}),
        (f"rooms/{path('!you are ugly')}/report", {"reason": ""}),
        (f"rooms/{path('!x:you are ugly')}/report", {"reason": ""}),
        ("users/%3Cscript%3E/report", {"reason": ""}),
    ):
        assert await eve.calls("POST", where, body) == {}, "always the same answer"
    assert not await mod.queue(state="all"), "no event that she could not see makes a row, and no text that is no name"
    assert (await eve.is_refused(eve.calls("POST", f"users/{path(bob.id)}/report", {}))).errcode == "M_MISSING_PARAM"
    await eve.calls("POST", f"users/{path(bob.id)}/report", {"reason": ""})
    assert [one["user_id"] for one in await mod.queue()] == [bob.id]


async def test_neither_answer_nor_notice_tells_who_and_what_is_there(town: Town) -> None:
    mod = await desk(town)
    alice, bob, eve = await town.users("alice@one", "bob@one", "eve@one")
    secret = await alice.creates_room(with_=bob)
    tried = [
        *(f"users/{path(f'@{name}:' + eve.server)}/report" for name in ("bob", "nobody")),
        *(f"rooms/{path(room)}/report" for room in (secret, "!" + "x" * 43)),
    ]
    for number, where in enumerate(tried, 1):
        assert await eve.calls("POST", where, {"reason": "a reason"}) == {}
        notice = await hears(eve, f"Your report has the number {number}")
        work = casework(mod.house)
        link = await work.links.look(token_in(notice))
        case = await work.reports.opened(link, eve.id)
        assert (case.words, await work.reports.card(link, eve.id), case.state) == (1, [], "new")
    notices = [re.sub(r"number \d+|report/\S+", "…", one) for one in notices_of(eve)]
    assert len(notices) == 4 and len(set(notices)) == 1, "the same words for what is there and what is not"
    shown = [(await mod.asks("GET", f"reports/{one['id']}"))["known_here"] for one in await mod.queue()]
    assert shown == [True, False, True, False], "moderators see the difference"
    for _ in range(6):
        await eve.calls("POST", tried[1], {"reason": ""})
    refused = await eve.is_refused(eve.calls("POST", tried[1], {"reason": ""}))
    assert refused.errcode == "M_LIMIT_EXCEEDED", "and guesses are counted like reports"


async def test_false_proofs_are_kept_apart_and_take_nothing_away(town: Town) -> None:
    mod = await desk(town)
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob)
    session = Session()
    said = await bob.sends(room, session.says(room, "an ugly word"))
    await reports(alice, room, said, **{"org.relay.disclosure": disclosure((said, 0, os.urandom(32)))})
    [case] = await mod.queue()
    assert case["disclosure"] == "invalid"
    [proof] = (await mod.asks("GET", f"reports/{case['id']}"))["proofs"]
    assert (proof["result"], proof["step"]) == ("invalid", "V8")
    assert "evidence" not in await mod.reads(case["id"]), "of what proves nothing, nothing is kept"

    work = casework(mod.house)
    link = await work.links.look(token_in(await hears(alice, "Your report has the number")))
    await work.reports.attach_proof(link, alice.id, parsed(Item(said, 0, session.prk(0))))
    assert (await mod.queue())[0]["disclosure"] == "verified"
    await work.reports.attach_proof(link, alice.id, parsed(Item(said, 0, os.urandom(32))))
    assert (await mod.queue())[0]["disclosure"] == "verified", "a worse proof takes nothing away"
    assert len((await mod.reads(case["id"]))["evidence"]) == 1


@pytest.mark.parametrize(
    ("changed", "status"),
    [
        ({"items": [{"event_id": f"${n}", "index": 0, "prk": b64(bytes(32))} for n in range(21)]}, 400),
        ({"items": [{"event_id": "$x", "index": 0, "prk": b64(bytes(32)), "content": {"x": "y" * 270_000}}]}, 413),
        ({"items": [{"event_id": "$x", "index": 0, "ratchet": b64(bytes(128))}]}, 400),
        ({"items": {}}, 400), ({"v": 2}, 400), ({"good_faith": False}, 400), ({"category": "<script>"}, 400),
    ],
)  # fmt: skip
async def test_oversized_and_odd_bundles(town: Town, changed: dict[str, Any], status: int) -> None:
    alice = await _alone(town)
    where = f"users/{path(alice.id)}/report"
    body = {"reason": "", "org.relay.disclosure": disclosure(("$x", 0, bytes(32)), **changed)}
    assert (await alice.is_refused(alice.calls("POST", where, body))).status == status


async def test_oversized_words(town: Town) -> None:
    alice = await _alone(town)
    where = f"users/{path(alice.id)}/report"
    assert (await alice.is_refused(alice.calls("POST", where, {"reason": "x" * 10_001}))).status == 413
    assert (await alice.is_refused(alice.calls("POST", where, {"reason": "x" * 400_000}))).status == 413
    work = casework(await town.relay("one"))
    for odd in (
        {"where": "x" * 2_001}, {"text": "x" * 10_001}, {"text": "  "}, {"category": "nonsense"}, {"good_faith": False},
    ):  # fmt: skip
        with pytest.raises(ApiError):
            await work.reports.notice(
                **{"category": "other", "where": "here", "text": "x", "contact": "", "good_faith": True} | odd
            )


async def test_what_is_named_in_a_bundle_is_a_name_and_no_text(town: Town) -> None:
    mod = await desk(town)
    alice, bob = await town.users("alice@one", "bob@one")
    named = ["$you are ugly quillon-marzipan", "$" + "x" * 43, "$quillon:else example", "$old:else.example"]
    given = disclosure(*((one, 0, bytes(32)) for one in named))
    await alice.calls("POST", f"users/{path(bob.id)}/report", {"reason": "x", "org.relay.disclosure": given})
    [case] = await mod.queue()
    assert case["disclosure"] == "invalid"
    proofs = (await mod.asks("GET", f"reports/{case['id']}"))["proofs"]
    assert [one["event_id"] for one in proofs] == ["$" + "x" * 43, "$old:else.example"]
    for file in mod.house.files():
        assert b"quillon" not in file.read_bytes(), file.name


async def test_a_moderator_learns_of_a_case_about_herself_from_no_list(town: Town) -> None:
    mod = await desk(town)
    second, alice, bob = await town.users("second@one", "alice@one", "bob@one")
    await mod.house.command("user.admin", user="second", admin=True)
    await alice.calls("POST", f"users/{path(second.id)}/report", {"reason": "", "org.relay.category": "threat"})
    await alice.calls("POST", f"users/{path(bob.id)}/report", {"reason": ""})
    about_her, about_bob = sorted(await mod.queue(), key=lambda one: one["number"])
    why = {
        "measures": [{"measure": "warn"}],
        "reason_code": "threat",
        "tos_clause": "1",
        "facts": "Threatened somebody twice.",
    }
    await mod.asks("POST", f"reports/{about_her['id']}/assign", {})
    await mod.asks("POST", f"reports/{about_her['id']}/decision", why)
    mine, hers = [await who.calls("GET", f"{SAFETY}/audit") for who in (mod.person, second)]
    assert about_her["id"] in str(mine) and about_bob["id"] in str(hers)
    assert (
        about_her["id"] not in str(hers) and "warn" not in str(hers["entries"]) and "threat" not in str(hers["entries"])
    )
    assert [one["hash"] for one in mine["entries"]] == [one["hash"] for one in hers["entries"]], (
        "but she can follow the chain"
    )
    assert {one["action"] for one in mine["entries"]} >= {"decided", "warn"}
    visit = Visitor(town, mod.house, second)
    await visit.signs_in()
    status, text = await visit.gets("/_relay/desk/log")
    assert status == 200 and about_her["id"] not in text and "Not shown to you" in text and about_bob["id"] in text
    for number in (about_her["number"], 77):
        fields = {"into": str(number), "version": "1"}
        page = f"/_relay/desk/case/{about_bob['id']}"
        answer, text = await visit.sends(page, fields, to=f"{page}/merge")
        assert answer.status == 404 and "no case of this number" in text, "hers is as if it were not there"
    # And two people are decided apart: whoever is named in one must not read of the other.
    await alice.calls("POST", f"users/{path(mod.person.id)}/report", {"reason": ""})
    [third] = [one for one in await _queue(second) if one["user_id"] == mod.person.id]
    refused = await second.is_refused(
        second.calls("POST", f"{SAFETY}/reports/{third['id']}/join", {"into": about_bob["id"]})
    )
    assert "different people" in refused.text


async def _queue(who: Person) -> list[dict[str, Any]]:
    return list((await who.calls("GET", f"{SAFETY}/reports"))["reports"])


async def _alone(town: Town) -> Person:
    return await town.user("alice@one")


async def test_reporting_oneself_keeps_nothing_from_being_deleted(town: Town) -> None:
    mod = await desk(town)
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob)
    said = await bob.sends(room)
    await reports(bob, room, said)
    await reports(alice, room, said)
    queue = await mod.queue()
    assert len(queue) == 2, "what somebody says about herself does not swallow what others say"
    work = casework(mod.house)
    frozen = await work.cases._db.read(
        lambda query: query.all("SELECT case_id FROM frozen_events WHERE event_id = $1", said)
    )
    assert len(frozen) == 1, "only the other's report freezes it"


async def test_what_was_reported_stays_and_shows_itself_to_nobody(town: Town) -> None:
    mod = await desk(town)
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob)
    session = Session()
    reported, other = [await bob.sends(room, session.says(room, word)) for word in ("one", "two")]
    await bob.redacts(room, reported)
    await bob.redacts(room, other)
    await reports(alice, room, reported, **{"org.relay.disclosure": disclosure((reported, 0, session.prk(0)))})
    assert (await mod.queue())[0]["disclosure"] == "verified", "it was taken back, and is proved all the same"
    town.clock.forward(hours=50)

    async def gone(event_id: str) -> bool:
        assert mod.house.server is not None
        town.clock.forward(minutes=6)  # a sweep that was under way is followed by another one
        stored = await mod.house.server.rooms.event(event_id)
        return stored is not None and bool(stored.marks & GONE)

    assert await until(lambda: gone(other)), "what nobody reported is deleted in time"
    assert not await gone(reported)
    assert not (await alice.event(room, reported))["content"], "but it is served to nobody, as before"


async def test_files_are_held_until_a_proof_says_which(town: Town) -> None:
    mod = await desk(town)
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob)
    blobs = [os.urandom(600) for _ in range(2)]
    named, other = [await bob.uploads(blob) for blob in blobs]
    session = Session()
    file = {"url": named, "hashes": {"sha256": b64(hashlib.sha256(blobs[0]).digest())}, "v": "v2"}
    said = await bob.sends(room, session.says(room, "", content={"msgtype": "m.image", "body": "look", "file": file}))
    await reports(alice, room, said)
    work = casework(mod.house)

    async def held() -> set[str]:
        return {f"mxc://{server}/{media}" for server, media in await work.cases._db.read(work.freeze.media)}

    assert await held() == {named, other}, "what he uploaded in the hour before"
    link = await work.links.look(token_in(await hears(alice, "Your report has the number")))
    await work.reports.attach_proof(link, alice.id, parsed(Item(said, 0, session.prk(0))))
    assert await held() == {named}, "with the proof, exactly what the message names"
    await reports(alice, room, await bob.sends(room, session.says(room, "and again")))
    assert await held() == {named, other}
    town.clock.forward(hours=8 * 24)
    await work.keeping.look()
    assert await held() == {named}, "without a proof for a week"


async def test_the_room_of_the_moderators_follows_the_list(town: Town) -> None:
    mod = await desk(town)
    second, alice = await town.users("second@one", "alice@one")
    await mod.house.command("user.admin", user="second", admin=True)
    await alice.calls("POST", f"users/{path('@a:else.example')}/report", {"reason": ""})
    await hears(second, "Report 1 has come")
    room = await casework(mod.house).own_rooms.room_of("moderators")
    assert room is not None and second.membership(room, second) == "join"
    assert (await second.is_refused(second.sends(room))).status == 403, "nobody but the relay writes there"
    await mod.house.command("user.admin", user="second", admin=False)
    await alice.calls("POST", f"users/{path('@b:else.example')}/report", {"reason": ""})
    await hears(mod.person, "Report 2 has come")
    assert (await mod.person.members(room)).get(second.id) == "leave"
    assert await second.notices(lambda: room in second.left)


async def test_the_only_moderator_is_reported(town: Town) -> None:
    mod = await desk(town)
    alice = await town.user("alice@one")
    where = f"users/{path(mod.person.id)}/report"
    told = await alice.is_refused(alice.calls("POST", where, {"reason": "she threatens me"}))
    assert told.errcode == "ORG.RELAY.NO_OTHER_MODERATOR", "she hears it before anything is filed"
    assert not await mod.queue(state="all")
    await alice.calls("POST", where, {"reason": "she threatens me"})
    await hears(alice, "is the only moderator here")
    assert not await mod.queue(state="all"), "the named person never sees it"
    work = casework(mod.house)
    [case], _ = await work.cases.queue(actor="operator")
    assert case.words == 2, "and nothing is sealed to her key"
    assert (await mod.person.is_refused(mod.decides(case.case_id))).status == 404
    await mod.person.syncs()
    assert not [one for one in notices_of(mod.person) if "Report" in one]
    # Now somebody else is there, and hears of it in her own notice room.
    second = await town.user("second@one")
    await mod.house.command("user.admin", user="second", admin=True)

    async def has_heard() -> bool:
        town.clock.forward(minutes=2)
        await second.syncs()
        return any("Report 1 has come" in one for one in notices_of(second))

    assert await until(has_heard)
    assert not [one for one in notices_of(mod.person) if "Report" in one]


async def test_locked_and_closed_people_can_still_object(town: Town) -> None:
    mod = await desk(town)
    alice, bob, carl = await town.users("alice@one", "bob@one", "carl@one")
    work = casework(mod.house)
    for who, measure in ((bob, "lock"), (carl, "deactivate")):
        await alice.calls("POST", f"users/{path(who.id)}/report", {"reason": "x"})
        [case] = await mod.queue()
        [taken] = (await mod.decides(case["id"], {"measure": measure}))["measures"]
        assert taken["outcome"] == ("done" if measure == "lock" else "waits"), "what can't be undone waits a day"
    assert (await bob.is_refused(bob.syncs())).errcode == "M_USER_LOCKED"
    [(case, decision)] = await work.appeals.of_person(bob.id)
    assert decision.reasons()["facts"]
    await work.appeals.file(case.case_id, bob.id, "please look again")

    town.clock.forward(hours=25)

    async def is_closed() -> bool:
        assert mod.house.server is not None
        town.clock.forward(minutes=2)
        return await mod.house.server.db.read(
            lambda query: query.value("SELECT deactivated FROM users WHERE user_id = $1", carl.id) != 0
        )

    assert await until(is_closed), "nobody else is there to confirm it: it is carried out a day later"
    assert await work.appeals.may_appeal(carl.id, carl.password), "the old password opens the objection"
    assert not await work.appeals.may_appeal(carl.id, "another password")
    assert not await work.appeals.may_appeal(bob.id, bob.password), "bob has an account; he signs in with it"
    [(case, decision)] = await work.appeals.of_person(carl.id)
    assert decision.measures[0].outcome == "done"
    await work.appeals.file(case.case_id, carl.id, "I did not do this")
    assert {one["state"] for one in await mod.queue()} == {"appealed"}


async def test_without_keys_nothing_of_the_words_is_kept_and_she_is_told(town: Town) -> None:
    house = await town.relay("one")
    mod, alice, bob = await town.users("mod@one", "alice@one", "bob@one")
    await house.command("user.admin", user="mod", admin=True)
    await alice.calls("POST", f"users/{path(bob.id)}/report", {"reason": "quillon-marzipan"})
    thanks = await hears(alice, "but your words were not kept")
    work = casework(house)
    link = await work.links.look(token_in(thanks))
    with pytest.raises(ApiError, match="no key yet"):
        await work.reports.answer(link, alice.id, "quillon-marzipan")
    for file in house.files():
        assert b"quillon-marzipan" not in file.read_bytes()
    assert (await hears(mod, "Report 1 has come")).endswith((await work.cases.queue())[0][0].case_id)


async def test_a_stranger_s_notice_and_its_receipt(town: Town) -> None:
    mod = await desk(town)
    bob = await town.user("bob@one")
    work = casework(mod.house)
    hostile = f"<script>alert(1)</script> {bob.id}"
    code = await work.reports.notice(
        category="ncii", where=hostile, text="<img src=x onerror=y>", contact="me@example.org", good_faith=True
    )
    [case] = await mod.queue()
    assert (case["kind"], case["category"], case["user_id"]) == ("notice", "ncii", bob.id)
    assert (await mod.reads(case["id"]))["words"] == [
        {"where": hostile, "words": "<img src=x onerror=y>", "contact": "me@example.org"}
    ]
    assert case["due"] - case["created"] == 48 * HOUR
    await mod.decides(case["id"])
    link = await work.links.look(code)
    _, [decision] = await work.appeals.opened(link, None)
    assert not decision.measures
    await work.appeals.file(link.case_id, None, "please look again")
    for _ in range(59):
        await work.reports.notice(category="spam", where="x", text="y", contact="", good_faith=True)
    with pytest.raises(ApiError, match="Too many"):
        await work.reports.notice(category="spam", where="x", text="y", contact="", good_faith=True)
