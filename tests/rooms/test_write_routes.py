"""What people do in rooms through the endpoints: sending once, taking back, state, coming and going."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from relay.config import Limits, Rate
from relay.rooms import rooms, store
from tests.rooms.ground import V3, Ground, ciphertext


async def _events(ground: Ground, event_type: str = "m.room.encrypted") -> int:
    return int(
        await ground.db.read(lambda query: query.value("SELECT count(*) FROM events WHERE type = $1", event_type))
    )


async def test_a_retry_sends_nothing_twice_not_even_after_a_restart(tmp_path: Path) -> None:
    async with Ground(tmp_path).opened() as ground:
        alice, phone = ground.people("alice", "alice.PHONE")
        room, other = await alice.creates(), await alice.creates()
        path = f"{V3}/rooms/{room}/send/m.room.encrypted/t1"
        answers = await asyncio.gather(*(alice.does("PUT", path, ciphertext("once")) for _ in range(8)))
        assert len({a["event_id"] for a in answers}) == 1, "eight at once make one event"
        first = answers[0]["event_id"]
        assert await _events(ground) == 1, "and one row"
        assert (await phone.does("PUT", path, ciphertext("once")))["event_id"] != first, (
            "another device has its own IDs"
        )
        elsewhere = await alice.does("PUT", f"{V3}/rooms/{other}/send/m.room.encrypted/t1", ciphertext("there"))
        assert elsewhere["event_id"] != first, "an ID holds for one room"
        redacted = (await alice.does("PUT", f"{V3}/rooms/{room}/redact/{first}/t1", {}))["event_id"]
        assert redacted != first, "and for one endpoint"

    async with Ground(tmp_path).opened() as ground:
        alice = ground.person("alice")
        assert (await alice.does("PUT", path, ciphertext("once")))["event_id"] == first, (
            "a restart does not forget what was sent"
        )
        again = await alice.does("PUT", f"{V3}/rooms/{room}/redact/{first}/t1", {})
        assert again["event_id"] == redacted, "nor what was taken back"
        assert await _events(ground) == 3, "nothing was sent twice"
        await alice.says(room, "and the room goes on")
        await alice.leaves(room)

    async with Ground(tmp_path).opened() as ground:
        alice = ground.person("alice")
        assert (await alice.does("PUT", path, ciphertext("once")))["event_id"] == first, (
            "even if she could not send it now"
        )
        fresh = f"{V3}/rooms/{room}/send/m.room.encrypted/t2"
        assert (await alice.asks("PUT", fresh, ciphertext("new")))[0] == 403, "what is new is refused"


async def test_a_failed_send_may_be_tried_again_under_its_id(ground: Ground) -> None:
    alice, bob = ground.people("alice", "bob")
    room = await alice.creates(preset="public_chat")
    path = f"{V3}/rooms/{room}/send/m.room.encrypted/t1"
    answers = await asyncio.gather(*(bob.asks("PUT", path, ciphertext("too soon")) for _ in range(3)))
    assert {status for status, _ in answers} == {403}, "who is not in the room can't send"
    await bob.joins(room)
    await bob.does("PUT", path, ciphertext("now"))
    assert await _events(ground) == 1, "the same ID serves once it is allowed"


async def test_the_seal_speaks_before_anything_is_written(ground: Ground) -> None:
    alice = ground.person("alice")
    room = await alice.creates()
    status, answer = await alice.asks(
        "PUT", f"{V3}/rooms/{room}/send/m.room.message/t1", {"msgtype": "m.text", "body": "in clear"}
    )
    assert (status, answer["errcode"]) == (403, "M_FORBIDDEN"), "readable messages are refused"
    status, answer = await alice.asks("PUT", f"{V3}/rooms/{room}/redact/$hidden-words-in-the-target/t1", {})
    assert (status, answer["errcode"]) == (400, "M_INVALID_PARAM"), "nor can words be hidden in what is taken back"
    status, _ = await alice.asks("PUT", f"{V3}/rooms/{room}/state/org.example.note/x", {"text": "in clear"})
    assert status == 403, "readable state of no use to the relay is refused"
    assert await _events(ground, "org.example.note") == 0, "and not written"


async def test_a_redaction_may_be_sent_as_an_event_in_every_version(ground: Ground) -> None:
    alice, bob = ground.people("alice", "bob")
    for version in ("10", "12"):
        room = await alice.creates(preset="public_chat", room_version=version)
        await bob.joins(room)
        hers, his = await alice.says(room, "hers"), await bob.says(room, "his")
        sent = f"{V3}/rooms/{room}/send/m.room.redaction"
        redaction = (await bob.does("PUT", f"{sent}/r1", {"redacts": his, "reason": "typo"}))["event_id"]
        event = await bob.gets(f"{V3}/rooms/{room}/event/{redaction}")
        assert event["redacts"] == his == event["content"]["redacts"], (
            f"version {version}: clients of all ages find the target"
        )
        assert "reason" not in event["content"], "free text is left out"
        assert (await bob.asks("PUT", f"{sent}/r2", {"redacts": hers}))[0] == 403, (
            "only a moderator takes back others' words"
        )
        assert (await alice.asks("PUT", f"{sent}/r3", {"redacts": his}))[0] == 200, "she is one"
        assert (await bob.asks("PUT", f"{sent}/r4", {}))[0] == 400, "a redaction names its target"
        stored = await ground.rooms.event(redaction)
        assert stored is not None and ("redacts" in stored.event.pdu) == (version == "10"), (
            "the event has its version's form"
        )


async def test_memberships_set_as_state_go_the_same_way(ground: Ground) -> None:
    alice, bob = ground.people("alice", "bob")
    room = await alice.creates()

    async def sets(who: str, target: str, membership: str) -> tuple[int, dict[str, str]]:
        return await ground.person(who).asks(
            "PUT", f"{V3}/rooms/{room}/state/m.room.member/{target}", {"membership": membership}
        )

    assert (await sets("bob", bob.id, "join"))[0] == 403, "nobody comes in uninvited"
    status, answer = await sets("alice", bob.id, "invite")
    assert status == 200 and ground.rooms.membership(room, bob.id) == "invite", "she may invite him"
    assert (await ground.room(room)).state[("m.room.member", bob.id)] == answer["event_id"], (
        "the answer names the event"
    )
    assert (await sets("alice", bob.id, "join"))[0] == 403, "but not make him join"
    for who, membership in (
        ("bob", "join"),
        ("alice", "leave"),
        ("alice", "ban"),
        ("alice", "leave"),
        ("alice", "invite"),
    ):
        assert (await sets(who, bob.id, membership))[0] == 200, f"{who} sets {membership}"
        assert ground.rooms.membership(room, bob.id) == membership, "and so it is"
    assert (await sets("alice", bob.id, "dance"))[0] == 400, "a membership is one of five"
    name = {"membership": "join", "displayname": "Alice here"}
    await alice.does("PUT", f"{V3}/rooms/{room}/state/m.room.member/{alice.id}", name)
    members = await alice.gets(f"{V3}/rooms/{room}/joined_members")
    assert members["joined"][alice.id]["display_name"] == "Alice here", "her name in one room is hers to set"


async def test_coming_and_going_by_the_endpoints(ground: Ground) -> None:
    alice, bob = ground.people("alice", "bob")
    room = await alice.creates(room_alias_name="den", preset="public_chat")
    assert (await bob.does("POST", f"{V3}/join/%23den:one.example", {}))["room_id"] == room, "an alias leads in"
    assert (await bob.gets(f"{V3}/joined_rooms"))["joined_rooms"] == [room], "he is in it"
    assert (await bob.asks("POST", f"{V3}/join/%23none:one.example", {}))[0] == 404, "an unknown alias does not"
    assert (await bob.asks("POST", f"{V3}/join/den", {}))[0] == 400, "a word is neither ID nor alias"
    assert (await bob.asks("POST", f"{V3}/rooms/{room}/kick", {"user_id": alice.id}))[0] == 403, "he has no say"
    assert (await alice.asks("POST", f"{V3}/rooms/{room}/kick", {}))[1]["errcode"] == "M_MISSING_PARAM", "whom?"
    for act, now in (("kick", "leave"), ("ban", "ban"), ("unban", "leave"), ("invite", "invite")):
        await alice.does("POST", f"{V3}/rooms/{room}/{act}", {"user_id": bob.id, "reason": "words"})
        assert ground.rooms.membership(room, bob.id) == now, f"after {act}"
    await bob.leaves(room)
    await bob.does("POST", f"{V3}/rooms/{room}/forget")
    status, answer = await alice.asks(
        "POST", f"{V3}/rooms/{room}/invite", {"medium": "email", "address": "bob@example.org"}
    )
    assert (status, answer["errcode"]) == (403, "M_THREEPID_DENIED"), "no invitations by e-mail"
    raw = await ground.db.read(lambda query: b"".join(bytes(row[0]) for row in query.all("SELECT json FROM events")))
    assert b"words" not in raw, "no reason was written"


async def test_an_invitation_that_reaches_nobody_does_not_undo_the_room(ground: Ground) -> None:
    alice = ground.person("alice")
    room = await alice.creates(invite=["@far:two.example"], room_alias_name="den")
    assert await alice.says(room, "still here"), "the room stands although the other server is away"
    status, answer = await alice.asks("POST", f"{V3}/createRoom", {"room_alias_name": "den"})
    assert (status, answer["errcode"]) == (400, "M_ROOM_IN_USE"), "an address is given once"


async def test_limits_hold_for_the_roundabout_way_too(tmp_path: Path) -> None:
    settings = Limits(invites=Rate(per_second=0.001, burst=1))
    async with Ground(tmp_path, limits=settings).opened() as ground:
        alice = ground.person("alice")
        room = await alice.creates()
        await alice.does("POST", f"{V3}/rooms/{room}/invite", {"user_id": "@bob:one.example"})
        path = f"{V3}/rooms/{room}/state/m.room.member/@carol:one.example"
        status, answer = await alice.asks("PUT", path, {"membership": "invite"})
        assert (status, answer["errcode"]) == (429, "M_LIMIT_EXCEEDED"), "an invitation by state counts as one"


async def test_a_rooms_aliases_have_to_lead_to_it(ground: Ground) -> None:
    alice = ground.person("alice")
    room, other = await alice.creates(room_alias_name="den"), await alice.creates(room_alias_name="other")
    ground.remote.aliases["#far:two.example"] = (room, ["two.example"])

    async def sets(**content: object) -> tuple[int, str | None]:
        status, answer = await alice.asks("PUT", f"{V3}/rooms/{room}/state/m.room.canonical_alias", content)
        return status, answer.get("errcode")

    assert await sets(alias="#den:one.example", alt_aliases=["#far:two.example"]) == (200, None), "both lead here"
    assert await sets(alias="#other:one.example") == (400, "M_BAD_ALIAS"), "this one leads elsewhere"
    assert await sets(alt_aliases=["#none:one.example"]) == (400, "M_BAD_ALIAS"), "this one leads nowhere"
    assert await sets(alt_aliases=["den"]) == (400, "M_INVALID_PARAM"), "this is no alias"
    ground.remote.aliases.clear()
    assert await sets(alt_aliases=["#far:two.example"]) == (200, None), "what stood there before may stay"
    assert other != room


async def test_transaction_ids_are_forgotten_after_a_day(ground: Ground) -> None:
    alice = ground.person("alice")
    room = await alice.creates()
    await alice.says(room, "hello")
    await ground.part.forget_transactions()
    count = "SELECT count(*) FROM sent_transactions"
    assert await ground.db.read(lambda query: query.value(count)) == 1, "a young one is kept"
    with ground.db.write() as tx:
        tx.run("UPDATE sent_transactions SET sent_ts = sent_ts - $1", 26 * 3_600_000)
    await tx
    await ground.part.forget_transactions()
    assert await ground.db.read(lambda query: query.value(count)) == 0, "an old one is not"


async def test_audit_names_the_rule_of_every_event(ground: Ground) -> None:
    alice, bob = ground.people("alice", "bob")
    room = await alice.creates(preset="public_chat", name="The den")
    await bob.joins(room)
    taken = await bob.says(room, "oops")
    await bob.does("PUT", f"{V3}/rooms/{room}/redact/{taken}/r1", {})
    counts, findings = await ground.db.read(ground.part.audit)
    assert not findings, f"what the relay wrote may all exist: {findings}"
    total = sum(n for name, n in counts.items() if name.startswith("events: ") and "keys beside" not in name)
    assert total == await ground.db.read(lambda query: query.value("SELECT count(*) FROM events")), (
        "every row is counted once"
    )
    assert counts["events: ciphertext"] == 1 and counts["events: room profile"] == 1, "each under its rule"
    with ground.db.write() as tx:
        raw = b'{"type":"m.room.message","content":{"body":"planted"}}'
        tx.run(
            store.INSERT_EVENT,
            9_999_999,
            "$planted",
            1,
            None,
            1,
            "m.room.message",
            bob.id,
            None,
            None,
            0,
            None,
            None,
            None,
            raw,
        )
        told = b'[{"type":"org.example.words","state_key":"","content":{"text":"planted"}}]'
        tx.run("UPDATE memberships SET stripped = $2 WHERE user_id = $1", bob.id, told)
    await tx
    counts, findings = await ground.db.read(ground.part.audit)
    assert {f.table for f in findings} == {"events", "memberships"}, "a readable row is a finding"
    assert all("planted" not in f.text for f in findings), "which never repeats what it found"


async def test_memory_holds_only_so_many_events(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "MAX_EVENTS_LOADED", 60)
    monkeypatch.setattr(rooms, "ROOMS_BEFORE_COUNTING", 1)
    alice = ground.person("alice")
    first = await alice.creates()
    await alice.says(first, "hello")
    for _ in range(12):
        await alice.creates()
    loaded = [room for room_id in ground.rooms.loaded_ids() if (room := ground.rooms.loaded(room_id)) is not None]
    assert sum(room.weight for room in loaded) <= 60 + max(room.weight for room in loaded)
    assert ground.rooms.loaded(first) is None, "whom nobody asks for goes first"
    await alice.says(first, "and again")
    assert await _events(ground) == 2, "and is there as soon as somebody asks"
