"""Two relays and their moderators: a single report is handed over with its proof, decisions reach people who live elsewhere."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from relay.errors import ApiError, RemoteError
from relay.moderation import bundle
from relay.moderation.disclosure_form import Item
from relay.moderation.moderator_secret import ModeratorSecret
from relay.moderation.peer_routes import MAX_DECISIONS_OF_CASE
from tests.moderation.casehouse import Desk, casework, hears, reports, token_in
from tests.moderation.sessions import Session, disclosure
from tests.people import Person, path, until
from tests.town import Town

FORWARDING = "\nmoderation: {forwarding: true}\n"


async def desks(town: Town, settings: str) -> tuple[Desk, Desk]:
    made = []
    for nickname in ("one", "two"):
        house = await town.relay(nickname, settings)
        one = Desk(house, await town.user(f"mod@{nickname}"))
        await one.opens()
        made.append(one)
    return made[0], made[1]


async def threatened(town: Town) -> tuple[Person, Person, str, str, Session]:
    """Bob of the other server threatens Alice."""
    alice, bob = await town.users("alice@one", "bob@two")
    room = await alice.creates_room(with_=bob)
    session = Session()
    said = await bob.sends(room, session.says(room, "an ugly word"))
    assert await alice.sees(said)
    return alice, bob, room, said, session


async def test_a_report_is_handed_over_and_answered(town: Town) -> None:
    here, there = await desks(town, FORWARDING)
    alice, bob, room, said, session = await threatened(town)
    await reports(alice, room, said, "he does this every day", **{"org.relay.category": "threat"})
    work = casework(here.house)
    link = await work.links.look(token_in(await hears(alice, "Your report has the number")))
    proof = await work.reports.attach_proof(link, alice.id, disclosure(Item(said, 0, session.prk(0))))
    assert proof.result == "verified_remote", "the other server attests who sent it"
    [case] = await here.queue()

    # On the moderator's machine: opened with her key, and only what proves this message sealed to their keys.
    [item] = (await here.reads(case["id"]))["evidence"][0]["items"]
    keys = await here.asks("GET", f"peers/{path(there.house.name)}/keys")
    _, to = bundle.read_recipients(keys)
    body = {"event_id": said, "envelope": bundle.sealed_to(to, item).json()}  # what `relay desk forward` makes
    refused = await here.person.is_refused(here.asks("POST", f"reports/{case['id']}/forward", body))
    assert "has not agreed" in refused.text, "never without the reporter's consent"
    await work.reports.consent(link, alice.id, True)
    await here.asks("POST", f"reports/{case['id']}/forward", body)
    again = await here.person.is_refused(here.asks("POST", f"reports/{case['id']}/forward", body))
    assert again.status == 409, "one bundle for each event"

    # At the other server's desk: no reporter, no category, no words; the proof is checked against what lies there.
    await hears(there.person, "Report 1 has come (other)")
    [row] = await there.queue()
    assert (row["kind"], row["peer"], row["category"], row["user_id"]) == (
        "forwarded",
        here.house.name,
        "other",
        bob.id,
    )
    shown = str(await there.asks("GET", f"reports/{row['id']}"))
    assert alice.id not in shown and "threat" not in shown
    [held] = (await there.reads(row["id"]))["forward"]
    checked = await there.asks("POST", f"reports/{row['id']}/proof", held)
    assert checked["result"] == "verified", "its own account sent it"
    await there.decides(row["id"], {"measure": "lock"})
    assert (await bob.is_refused(bob.syncs())).errcode == "M_USER_LOCKED"

    # The answer comes back: words of fixed lists.
    await hears(here.person, "The other server has answered")
    [forwarded] = (await here.asks("GET", f"reports/{case['id']}"))["forwards"]
    assert orjson.loads(forwarded["answer"])["measures"] == ["lock"]
    for house in (here.house, there.house):
        assert (await house.command("moderation.verify"))["sound"]
        assert not (await house.command("audit"))["findings"]


async def test_only_what_is_proved_is_handed_over_and_only_what_the_case_is_about(town: Town) -> None:
    here, there = await desks(town, FORWARDING)
    alice, bob, room, said, session = await threatened(town)
    other, mine = await bob.sends(room, session.says(room, "another word")), await alice.sends(room)
    assert await alice.sees(other)
    await reports(alice, room, said)
    work = casework(here.house)
    link = await work.links.look(token_in(await hears(alice, "Your report has the number")))
    await work.reports.consent(link, alice.id, True)
    [case] = await here.queue()
    _, to = bundle.read_recipients(await here.asks("GET", f"peers/{path(there.house.name)}/keys"))

    async def refused(event_id: str, index: int) -> str:
        item = {"event_id": event_id, "index": index, "prk": "A" * 43}
        body = {"event_id": event_id, "envelope": bundle.sealed_to(to, item).json()}
        return (await here.person.is_refused(here.asks("POST", f"reports/{case['id']}/forward", body))).text

    assert "Only a message with a proof" in await refused(said, 0), "the other side believes nothing else"
    await work.reports.attach_proof(link, alice.id, disclosure(Item(said, 0, bytes(32))))
    assert "Only a message with a proof" in await refused(said, 0), "a false one is none"
    for event_id in (other, mine):
        assert "an event of this case" in await refused(event_id, 1), "nothing else of the room leaves the house"
    assert not await there.queue(state="all")


async def test_keys_that_their_server_has_not_signed_are_not_sealed_to(town: Town) -> None:
    here, there = await desks(town, FORWARDING)
    alice, bob = await town.users("alice@one", "bob@two")
    await alice.creates_room(with_=bob)
    assert here.house.server is not None
    connections = here.house.server.outbox._connections
    get, where = connections.get, f"peers/{path(there.house.name)}/keys"
    change: dict[str, Any] = {}

    async def altered(server: str, target: str, **more: Any) -> Any:
        return {**await get(server, target, **more), **change}

    connections.get = altered  # type: ignore[method-assign]
    assert len((await here.asks("GET", where))["keys"]) == 2
    stranger = ModeratorSecret.make().public.text
    for wrong in ({"keys": [stranger, stranger]}, {"server": here.house.name}, {"signatures": {}}):
        change.clear()
        change.update(wrong)
        refused = await here.person.is_refused(here.asks("GET", where))
        assert refused.status == 502 and "not signed by it" in refused.text, wrong


async def test_a_decision_reaches_a_person_who_lives_elsewhere(town: Town) -> None:
    here, there = await desks(town, "")
    alice, bob, room, said, _ = await threatened(town)
    await reports(alice, room, said)
    [case] = await here.queue()
    facts = "Sent threats to another person, quixotic-pergola."
    await here.decides(case["id"], {"measure": "block_room", "target": room}, facts=facts)
    notice = await hears(bob, "The moderators of another server have decided something about you")

    async def is_told() -> bool:
        [decision] = (await here.asks("GET", f"reports/{case['id']}"))["decisions"]
        return bool(decision["told_other_server"] == "told")

    assert await until(is_told)
    work = casework(there.house)
    link = await work.links.look(token_in(notice))
    _, [decision] = await work.appeals.opened(link, bob.id)
    assert decision.reasons()["facts"] == facts and decision.reasons()["ground"] == "terms:4.2", "asked for just now"
    [(_, again)] = await work.appeals.of_person(bob.id)
    assert again.facts == facts, "also where she comes without the link"
    for file in there.house.files():
        assert b"quixotic-pergola" not in file.read_bytes(), "and kept nowhere there"
    assert not await there.queue(state="all"), "it is no case of theirs"
    await work.appeals.file(link.case_id, bob.id, "it was a joke, saturnine-lozenge")
    [row] = await here.queue()
    assert row["state"] == "appealed"
    assert (await here.reads(case["id"]))["appeal"] == [
        {"side": "subject", "words": "it was a joke, saturnine-lozenge"}
    ]
    for house in (here.house, there.house):
        for file in house.files():
            assert b"saturnine-lozenge" not in file.read_bytes()
    await here.asks(
        "POST", f"reports/{case['id']}/appeal",
        {"verdict": "reversed", "reason_code": "mistake", "ground": "terms:4.2", "facts": "It was a joke between friends."},
    )  # fmt: skip
    await hears(bob, "was looked at again, and it was changed")
    # Where forwarding is off nothing is handed over and nothing is taken.
    for desk in (here, there):
        with pytest.raises(ApiError, match="forwarding is off"):
            casework(desk.house).peers.require_forwarding()


async def test_a_server_that_takes_no_decisions(town: Town) -> None:
    here, _ = await desks(town, "")
    alice, bob, room, said, _ = await threatened(town)
    await reports(alice, room, said)
    [case] = await here.queue()
    town.cut("one", "two")
    await here.decides(case["id"], {"measure": "block_room", "target": room})

    async def is_given_up() -> bool:
        town.clock.forward(hours=5)  # a try that was under way is followed by another one
        [decision] = (await here.asks("GET", f"reports/{case['id']}"))["decisions"]
        return bool(decision["told_other_server"] == "not reached")

    assert await until(is_given_up), "the case says so"
    del bob


async def test_another_server_can_neither_flood_nor_guess_nor_write(town: Town) -> None:
    here, there = await desks(town, FORWARDING)
    alice, bob, room, said, session = await threatened(town)
    eve = await town.user("eve@one")
    assert there.house.server is not None
    asks = there.house.server.outbox._connections
    base = "/_relay/federation/v1"

    async def refused(method: str, where: str, body: dict[str, Any]) -> RemoteError:
        with pytest.raises(RemoteError) as no:
            await asks.send(here.house.name, method, f"{base}/{where}", body, forced=True)
        return no.value

    case_id = "x" * 22
    told: dict[str, Any] = {"measures": ["suspend"], "reason_code": "spam", "user_id": alice.id}
    for changed in (
        {"measures": ["<script>"]}, {"measures": ["suspend"] * 11}, {"reason_code": "You are ugly"}, {"verdict": "x"},
        {"user_id": bob.id}, {"user_id": "@nobody:" + here.house.name},
    ):  # fmt: skip
        assert (await refused("PUT", f"decision/{case_id}", {**told, **changed})).status in (400, 403, 404)
    assert (await refused("PUT", f"decision/{case_id}", {**told, "user_id": eve.id})).status == 403, (
        "they share no room"
    )
    await asks.send(
        here.house.name, "PUT", f"{base}/decision/{case_id}", {**told, "facts": "words of theirs"}, forced=True
    )
    notice = await hears(alice, "The moderators of another server have decided")
    assert "words" not in notice and await alice.creates_room(), "told, and nothing happens here"

    _, to = bundle.read_recipients(await there.asks("GET", f"peers/{path(here.house.name)}/keys"))
    item = {"event_id": said, "index": 0, "prk": "A" * 43}
    good = {"event_id": said, "room_id": room, "envelope": bundle.sealed_to(to, item).json()}
    where = "forward/" + good["envelope"]["case_id"]
    for changed in (
        {"event_id": "$" + "x" * 43}, {"room_id": "!" + "x" * 43}, {"envelope": {}}, {"envelope": {**good["envelope"], "version": 2}},
        {"envelope": bundle.sealed_to([*to, *to][:2], item).json()}, {"envelope": {**good["envelope"], "wraps": {}}},
        {"envelope": {**good["envelope"], "wraps": dict.fromkeys(good["envelope"]["wraps"], "A" * 400)}},
        {"envelope": {**good["envelope"], "iv": "A" * 40}},
    ):  # fmt: skip
        assert (await refused("PUT", where, {**good, **changed})).status in (400, 404)
    outsider = await town.relay("three")
    assert outsider.server is not None
    with pytest.raises(RemoteError, match="not in its room"):
        await outsider.server.outbox._connections.send(here.house.name, "PUT", f"{base}/{where}", good, forced=True)
    await asks.send(here.house.name, "PUT", f"{base}/{where}", good, forced=True)
    again = {**good, "envelope": bundle.sealed_to(to, item).json()}
    assert (await refused("PUT", "forward/" + again["envelope"]["case_id"], again)).status == 409, (
        "one bundle for each event"
    )
    [row] = await here.queue()
    assert row["disclosure"] == "needs_human", "it was not sent from an account here"
    checked = await here.asks("POST", f"reports/{row['id']}/proof", (await here.reads(row["id"]))["forward"][0])
    assert checked["result"] == "invalid"
    for _ in range(MAX_DECISIONS_OF_CASE - 1):
        await asks.send(here.house.name, "PUT", f"{base}/decision/{case_id}", told, forced=True)
    assert (await refused("PUT", f"decision/{case_id}", told)).status == 429, "nobody is told the same for ever"
    for number in range(18):
        await asks.send(here.house.name, "PUT", f"{base}/decision/{number:022}", told, forced=True)
    assert (await refused("PUT", f"decision/{'y' * 22}", told)).status == 429
    for guess in ("answer/" + "z" * 22, "appeal/" + row["id"]):
        assert (await refused("PUT", guess, {**told, "words": "x", "decided": 1})).status == 404
    del session


async def _forwarded(here: Desk, there: Desk, alice: Person, room: str, said: str, session: Session) -> tuple[str, str]:
    """Handed over; (the case here, its name between the two)."""
    await reports(alice, room, said)
    work = casework(here.house)
    link = await work.links.look(token_in(await hears(alice, "Your report has the number")))
    await work.reports.attach_proof(link, alice.id, disclosure(Item(said, 0, session.prk(0))))
    await work.reports.consent(link, alice.id, True)
    [case] = await here.queue()
    [item] = (await here.reads(case["id"]))["evidence"][0]["items"]
    _, to = bundle.read_recipients(await here.asks("GET", f"peers/{path(there.house.name)}/keys"))
    body = {"event_id": said, "envelope": bundle.sealed_to(to, item).json()}
    return case["id"], (await here.asks("POST", f"reports/{case['id']}/forward", body))["id"]


async def test_an_answer_counts_once_and_later_ones_only_a_few_times(town: Town) -> None:
    here, there = await desks(town, FORWARDING)
    alice, _, room, said, session = await threatened(town)
    case_id, forward_id = await _forwarded(here, there, alice, room, said, session)
    assert there.house.server is not None and here.house.server is not None
    asks = there.house.server.outbox._connections
    now = town.clock.now()

    async def answers(decided: object, *measures: str, reason_code: str = "spam") -> None:
        body = {"measures": list(measures), "reason_code": reason_code, "decided": decided}
        await asks.send(here.house.name, "PUT", f"/_relay/federation/v1/answer/{forward_id}", body, forced=True)

    async def heard() -> int:
        rows = (await here.asks("GET", f"reports/{case_id}"))["history"]
        return len([one for one in rows if one["action"] == "peer.answered"])

    for odd in (None, True, "now", now + 3_600_000, -1):
        with pytest.raises(RemoteError, match="decided"):
            await answers(odd, "lock")
    for _ in range(3):
        await answers(now - 1000, "lock", reason_code="you-are-ugly")
    assert await heard() == 1, "said again, it is no news"
    [forwarded] = (await here.asks("GET", f"reports/{case_id}"))["forwards"]
    assert orjson.loads(forwarded["answer"])["reason_code"] == "other", "their own words are not kept"
    with pytest.raises(RemoteError, match="not earlier"):
        await answers(now - 2000)
    assert orjson.loads(forwarded["answer"])["measures"] == ["lock"], (
        "an older one that comes once more changes nothing"
    )
    for number in range(4):
        await answers(now + number)
    with pytest.raises(RemoteError) as no:
        await answers(now + 10)
    assert no.value.status == 429 and await heard() == 5, "nor can they call us for ever"


async def test_nobody_learns_whom_we_look_at_nor_who_moderates(town: Town) -> None:
    here, there = await desks(town, FORWARDING)
    alice, bob, room, said, session = await threatened(town)
    assert here.house.server is not None and there.house.server is not None
    asked: list[str] = []
    connections = here.house.server.outbox._connections
    get = connections.get

    async def listening(server: str, target: str, **more: Any) -> Any:
        asked.append(target)
        return await get(server, target, **more)

    connections.get = listening  # type: ignore[method-assign]
    where = f"peers/{path(there.house.name)}/keys"
    keys = [await here.asks("GET", f"{where}{about}") for about in ("", f"?about={path(bob.id)}")]
    assert asked == ["/_relay/federation/v1/keys"] * 2, "they hear that somebody asks, and nothing of whom"
    assert keys[0] == keys[1]

    # The other way round: Bob's server asks with and without the moderator's name, and hands over what she wrote.
    base, asks = "/_relay/federation/v1/keys", there.house.server.outbox._connections
    lists = [
        (await asks.get(here.house.name, f"{base}{about}", forced=True))["keys"]
        for about in ("", f"?about={path(here.person.id)}", f"?about={path(alice.id)}")
    ]
    assert lists[0] == lists[1] == lists[2] and len(lists[0]) == 2, "the answer does not tell who moderates"
    shared = await here.person.creates_room(with_=bob)
    hers, hers_too = [await here.person.sends(shared, session.says(shared, "words")) for _ in range(2)]
    from_alice = await alice.sends(room, session.says(room, "words"))
    assert await bob.sees(hers_too) and await bob.sees(from_alice)
    _, to = bundle.read_recipients(await there.asks("GET", f"peers/{path(here.house.name)}/keys"))
    for event_id, place in ((hers, shared), (from_alice, room)):
        sealed = bundle.sealed_to(to, {"event_id": event_id, "index": 0, "prk": "A" * 43}).json()
        body = {"event_id": event_id, "room_id": place, "envelope": sealed}
        target = f"/_relay/federation/v1/forward/{sealed['case_id']}"
        assert await asks.send(here.house.name, "PUT", target, body, forced=True) == {}, "the same answer for both"
    assert [row["user_id"] for row in await here.queue()] == [alice.id], "she does not see what is about herself"
    work = casework(here.house)
    found, _ = await work.cases.queue(actor="operator")
    [about_her] = [case for case in found if case.user_id == here.person.id]
    assert about_her.words == 2 and not (await here.house.command("report.show", report=about_her.case_id))["proofs"]
    held = await work.cases._db.read(
        lambda query: query.value("SELECT count(*) FROM envelopes WHERE case_id = $1", about_her.case_id)
    )
    assert held == 0, "where nobody else could open it, it is not kept"
    del said
