"""Stories of reports and what becomes of them: told, looked at, decided, objected to, and let go when their time is over."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable

import pytest

from relay.errors import ApiError
from relay.moderation.acts import Reasons
from relay.moderation.direct import NOT_STATED
from tests.moderation.casehouse import SAFETY, casework, desk, hears, notices_of, reports, token_in
from tests.people import Refused, path
from tests.town import Town

WORDS = "bob threatens me, see the message above"


async def test_a_report_reaches_the_moderators_and_is_decided_and_objected_to(town: Town) -> None:
    mod = await desk(town)
    alice, bob = await town.users("alice@one", "bob@one")
    house = mod.house
    room = await alice.creates_room(with_=bob)
    said = await bob.sends(room)
    await reports(alice, room, said, WORDS, **{"org.relay.category": "threat"})

    [row] = await mod.queue()
    case_id = row["id"]
    assert (row["event_id"], row["room_id"], row["user_id"]) == (said, room, bob.id)
    assert (row["category"], row["state"], row["disclosure"], row["words"]) == (
        "threat",
        "new",
        "undisclosed",
        "sealed",
    )
    assert alice.id not in str(await mod.asks("GET", f"reports/{case_id}")), "nobody needs to know who reported"
    told = await hears(mod.person, "Report 1 has come (threat)")
    assert f"/_relay/desk/case/{case_id}" in told
    thanks = await hears(alice, "Your report has the number 1")
    assert (await mod.reads(case_id))["words"] == [{"words": WORDS}], "her words, for the moderators' key only"
    assert (await bob.is_refused(bob.calls("GET", f"{SAFETY}/reports"))).status == 403

    # The link alone opens nothing; with her account she adds to it.
    work = casework(house)
    link = await work.links.look(token_in(thanks))
    await work.reports.answer(link, alice.id, "and again today")
    await alice.is_refused(_raises(work.reports.answer(link, bob.id, "it was nothing")))
    assert (await mod.reads(case_id))["answer"] == [{"words": "and again today"}]

    # Taken, then decided: refused while the statement of reasons is incomplete, or built on an old version.
    taken = await mod.asks("POST", f"reports/{case_id}/assign", {"take": True})
    assert (taken["state"], taken["assignee"]) == ("in_review", mod.person.id)
    suspend = {"measure": "suspend"}
    for missing in ({"facts": "short"}, {"tos_clause": ""}, {"reason_code": "Not A Word"}):
        refused = await mod.person.is_refused(mod.decides(case_id, suspend, **missing))
        assert refused.status == 400, missing
    stale = await mod.person.is_refused(
        mod.asks("POST", f"reports/{case_id}/decision", {"measures": [], "reason_code": "x", "ground": "terms:1", "facts": "f" * 30}, If_Match='"1"')
    )  # fmt: skip
    assert stale.status == 412, "somebody looked at an older version"
    decided = await mod.decides(case_id, suspend)
    assert [(one["measure"], one["target"], one["outcome"]) for one in decided["measures"]] == [
        ("suspend", bob.id, "done")
    ]
    assert (await bob.is_refused(bob.sends(room))).errcode == "M_USER_SUSPENDED"

    # Both sides hear of it; the suspended person reads the reasons and objects.
    await hears(alice, "was decided: a measure was taken")
    notice = await hears(bob, "The moderators have decided something about you")
    assert alice.name not in notice and WORDS not in notice
    link = await work.links.look(token_in(notice))
    _, [decision] = await work.appeals.opened(link, bob.id)
    assert decision.reasons()["facts"].startswith("Sent threats") and "decider" not in decision.reasons()
    await work.appeals.file(link.case_id, bob.id, "it was a quotation from a film")
    await bob.is_refused(_raises(work.appeals.file(link.case_id, bob.id, "once more")))
    await hears(alice, "Somebody has objected to decision number 1")
    [row] = await mod.queue()
    assert row["state"] == "appealed"
    assert (await mod.reads(case_id))["appeal"] == [{"side": "subject", "words": "it was a quotation from a film"}]

    # The only moderator answers herself, and the log says so. What was decided is taken back.
    answer = await mod.asks(
        "POST", f"reports/{case_id}/appeal",
        {"verdict": "reversed", "reason_code": "mistake", "ground": "terms:4.2", "facts": "The sentence quotes a film, as its context shows."},
    )  # fmt: skip
    assert answer["verdict"] == "reversed"
    await bob.sends(room)
    await hears(bob, "was looked at again, and it was changed")
    shown = await mod.asks("GET", f"reports/{case_id}")
    assert shown["state"] == "decided" and shown["decisions"][0]["measures"][0]["outcome"] == "undone"
    actions = [entry["action"] for entry in shown["history"]]
    assert [one for one in actions if one in ("report.created", "decided", "suspend", "appeal.filed", "undo.suspend", "appeal.reversed", "appeal.same_person")] == [
        "report.created", "suspend", "decided", "appeal.filed", "undo.suspend", "appeal.reversed", "appeal.same_person",
    ]  # fmt: skip
    assert (await house.command("moderation.verify"))["sound"]
    audit = await house.command("audit")
    assert not audit["findings"] and audit["counts"]["events: the relay's own notices"] >= 6
    figures = await mod.asks("GET", "transparency/" + _month(town))
    assert (figures["reports"], figures["decisions"], figures["overturned_share"]) == (1, 1, 1.0)
    assert figures["flags"] == {
        "flagged": 0, "flagged_acted_share": None, "others_acted_share": 1.0, "acted_flagged_share": 0.0,
        "flagged_overturned_share": None,
    }  # fmt: skip

    # The room of the moderators holds how far the log has come, and hears of a restored backup.
    held = await hears(mod.person, "Audit log up to row")
    made = await work.cases._audit_log.last_checkpoint()
    assert made is not None and int(held.split()[5].rstrip(":")) <= made["seq"]
    await house.command("moderation.restored")
    await hears(mod.person, "was restored from a backup")
    assert (await mod.asks("GET", "audit"))["restored"] is not None
    await mod.asks("POST", "audit/acknowledge", {})
    assert (await mod.asks("GET", "audit"))["restored"] is None

    # When its time is over nothing but the count is left.
    town.clock.forward(hours=184 * 24)
    await work.keeping.look()
    [gone] = await mod.queue(state="all")
    assert (gone["state"], gone["user_id"], gone["event_id"]) == ("closed", None, None)
    assert all(one["forgotten"] for one in (await mod.asks("GET", f"reports/{case_id}/envelopes"))["envelopes"])
    assert (await house.command("moderation.verify"))["sound"]
    assert not [one for one in notices_of(mod.person) if alice.id in one or bob.id in one]


async def test_whoever_is_concerned_by_a_measure_without_a_report_can_object_too(town: Town) -> None:
    mod = await desk(town)
    bob = await town.user("bob@one")
    work = casework(mod.house)
    suspend = {"measure": "suspend", "target": bob.id, "reason_code": "spam"}
    bare = await mod.person.is_refused(mod.asks("POST", "acts", suspend))
    assert bare.status == 400 and "told why" in bare.text, (
        "nothing is done to anybody without a reason that she can read"
    )
    await mod.asks("POST", "acts", {**suspend, "tos_clause": "3", "facts": "Sent one advertisement to forty people."})
    link = await work.links.look(token_in(await hears(bob, "The moderators have decided something about you")))
    case, [decision] = await work.appeals.opened(link, bob.id)
    told = decision.reasons()
    assert (case.kind, told["reason_code"], told["ground"]) == ("direct", "spam", "terms:3")
    assert told["facts"] == "Sent one advertisement to forty people."
    await work.appeals.file(case.case_id, bob.id, "I sent nothing")
    [row] = await mod.queue()
    await mod.asks(
        "POST", f"reports/{row['id']}/appeal",
        {"verdict": "reversed", "reason_code": "mistake", "ground": "terms:1", "facts": "Another account sent the messages."},
    )  # fmt: skip
    await bob.creates_room()
    figures = await mod.asks("GET", "transparency/" + _month(town))
    assert (figures["reports"], figures["decisions"], figures["appeals"]) == (0, 0, 1)


def _month(town: Town) -> str:
    return time.strftime("%Y-%m", time.gmtime(town.clock.now() / 1000))


async def _raises(doing: Awaitable[object]) -> None:
    try:
        await doing
    except ApiError as no:
        raise Refused(no.status, {"error": no.text}, {}) from no


async def test_whoever_left_her_notice_room_is_told_there_again_at_the_strictest_seal_too(town: Town) -> None:
    house = await town.relay("one", "privacy: {seal: strict}\n")
    mod = await desk(town)
    alice, bob = await town.users("alice@one", "bob@one")
    await alice.calls("POST", f"users/{path(bob.id)}/report", {"reason": "x"})
    await hears(alice, "Your report has the number 1")
    room = await casework(house).own_rooms.room_of(alice.id)
    assert room is not None
    await alice.leaves(room)
    await alice.forgets(room)
    [row] = await mod.queue()
    [waits] = (await mod.decides(row["id"], {"measure": "deactivate"}))["measures"]
    await hears(alice, "was decided: a measure was taken")
    assert not (await house.command("audit"))["findings"] and not (await house.command("seal"))["changed"]
    await mod.asks("POST", f"acts/{waits['waits']}/cancel", {})
    [decision] = (await mod.asks("GET", f"reports/{row['id']}"))["decisions"]
    assert (waits["outcome"], decision["measures"][0]["outcome"]) == ("waits", "undone")


async def test_what_was_to_be_said_is_said_after_a_restart_and_once(town: Town) -> None:
    mod = await desk(town)
    alice = await town.user("alice@one")
    work = casework(mod.house)
    case = work.cases.new(kind="user", category="spam", user_id="@a:else.example", reporter=alice.id)
    speaking, work.own_rooms.say = work.own_rooms.say, _never  # type: ignore[method-assign]
    with work.cases._db.write() as tx:
        work.cases.open(tx, case)
        work.notices.tell(tx, alice.id, "decided_none", case.case_id, link=("appeal", "t" * 43))
    await tx
    await mod.house.restart()
    del speaking
    await hears(alice, "was decided: no measure was taken")
    await hears(mod.person, "Report 1 has come (spam)")
    await alice.syncs()
    assert len(notices_of(alice)) == 1


async def _never(*_: object) -> None:
    raise ApiError("The wire is cut.")


async def test_tools_are_told_of_reports_without_reporters_minors_or_moderators(town: Town) -> None:
    mod = await desk(town)
    alice, bob = await town.users("alice@one", "bob@one")
    second = await town.user("second@one")
    await mod.house.command("user.admin", user="second", admin=True)
    room = await alice.creates_room(with_=[bob, second])
    plain, urgent = await bob.sends(room), await bob.sends(room)
    await reports(alice, room, plain)
    await reports(alice, room, urgent, **{"org.relay.category": "minor"})
    await reports(alice, room, await second.sends(room))
    rows, total = await casework(mod.house).cases.listed_for_tools(0, 50)
    assert ([row["event_id"] for row in rows], total) == ([plain], 1)
    assert alice.id not in str(rows)

    # Draupnir polls, and goes on from where the last answer ended.
    polled: list[str] = []
    position = 0

    async def polls() -> None:
        nonlocal position
        answer = await mod.person.calls("GET", "/_synapse/admin/v1/event_reports", dir="f", **{"from": position})
        polled.extend(row["event_id"] for row in answer["event_reports"])
        position = answer.get("next_token", answer["total"])

    more = [await bob.sends(room) for _ in range(3)]
    for event_id in more[:2]:
        await reports(alice, room, event_id)
    await polls()
    [gone] = [one for one in await mod.queue() if one["event_id"] == more[0]]
    await mod.asks("POST", f"reports/{gone['id']}/sort", {"category": "minor"})
    await reports(alice, room, more[2])
    await polls()
    await polls()
    assert polled == [plain, *more], "none twice, and none missed where one has gone from the list"


async def test_what_a_tool_did_without_reasons_is_told_and_explained_later(town: Town) -> None:
    mod = await desk(town)
    bob, carol, spam = await town.user("bob@one"), await town.user("carol@one"), await town.user("spam@one")
    work = casework(mod.house)
    suspend = f"/_synapse/admin/v1/suspend/{path(bob.id)}"
    await mod.person.calls("PUT", suspend, {"suspend": True})
    link = await work.links.look(token_in(await hears(bob, "The moderators have decided something about you")))
    case, [decision] = await work.appeals.opened(link, bob.id)
    assert decision.ground == NOT_STATED, "tools give no reasons"
    assert case.case_id in await hears(mod.person, "without a report and without reasons"), (
        "a moderator is asked for them"
    )
    assert (await mod.queue()) == [], "but nobody has reported anything"
    given = Reasons("terms:3", "Sent the same advertisement to forty people.")
    await work.direct.state(case.case_id, mod.person.id, given)
    again = await work.links.look(token_in(await hears(bob, "have now given the reasons")))
    assert (await work.appeals.opened(again, bob.id))[1][0].facts == given.facts
    with pytest.raises(ApiError, match="stated already"):
        await work.direct.state(case.case_id, mod.person.id, given)

    # Whose message or file it is hears of it as well.
    room = await carol.creates_room()
    sent, file = await carol.sends(room), await carol.uploads(os.urandom(200))
    why = {"reason_code": "harassment", "ground": "terms:1", "facts": "What happened, in the moderator's own words."}
    await mod.asks("POST", "acts", {"measure": "redact", "target": sent, "room_id": room, **why})
    await mod.asks("POST", "acts", {"measure": "quarantine", "target": file, **why})
    assert len(await work.appeals.of_person(carol.id)) == 2, "of her message and of her file"

    # Nobody is told who only advertises, or where a law forbids it; the log names why.
    untold = {
        "measure": "lock",
        "target": spam.id,
        "ground": "terms:3",
        "facts": "Nothing but advertising since it was made.",
    }
    wrong = await mod.person.is_refused(mod.asks("POST", "acts", {**untold, "reason_code": "threat", "untold": "bulk"}))
    assert "advertising in bulk" in wrong.text
    await mod.asks("POST", "acts", {**untold, "reason_code": "spam", "untold": "bulk"})
    assert len(await work.appeals.of_person(spam.id)) == 1, "who asks can read it all the same"
    law = {**untold, "target": carol.id, "reason_code": "law", "untold": "law"}
    assert "Name the law" in (await mod.person.is_refused(mod.asks("POST", "acts", law))).text
    del law["ground"]
    await mod.asks("POST", "acts", {**law, "law_ref": "an order of the court that forbids to tell"})
    assert len(await work.appeals.of_person(carol.id)) == 2, "nothing of it is shown to her"
    entries = (await mod.asks("GET", "audit"))["entries"]
    assert [one["reason_code"] for one in entries if one["action"] == "untold"] == ["law", "bulk"]


async def test_two_that_first_speak_for_the_relay_speak_as_one(town: Town) -> None:
    own = casework(await town.relay("one")).own_rooms
    speakers = await asyncio.gather(*(own.speaker() for _ in range(4)))
    assert len(set(speakers)) == 1, "a notice and a list that is followed do not both make its user"
