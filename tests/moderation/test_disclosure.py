"""Proof between real relays: who may give it, what a purge leaves, who attests, copies, files, and that nothing goes out or
stays readable on disk."""

from __future__ import annotations

import base64
import hashlib
import json
import sqlite3
from typing import Any

from relay.moderation import envelope, key_list, megolm, repeats
from relay.moderation.disclosure import Disclosures, held_form
from relay.moderation.disclosure_form import Item
from relay.moderation.envelope import Envelope
from relay.moderation.moderator_secret import ModeratorSecret
from relay.moderation.proof import Proof, ProvedItem
from relay.protocol import event as events
from relay.protocol.signing import SigningKey
from relay.rooms.store import GONE, LOCAL, REJECTED, SOFT_FAILED
from tests.canaries import Canaries
from tests.forger import Forger
from tests.moderation.sessions import Forged, Session, b64, disclosure, inner
from tests.people import Person, until
from tests.town import Town, Within


async def proving(town: Town, nickname: str = "one") -> Disclosures:
    house = await town.relay(nickname)
    assert house.server is not None
    return house.server.moderation.proving.disclosures


async def proved(
    town: Town, reporter: Person, event_id: str, index: int, prk: bytes, content: Any = None, at: str = "one"
) -> ProvedItem:
    disclosures = await proving(town, at)
    proof = await disclosures.verify(reporter.id, disclosure(Item(event_id, index, prk, content)))
    return proof.items[0]


async def purged(town: Town, house: Within, event_id: str) -> None:
    """Time passes until the grace is over."""
    town.clock.forward(hours=50)

    async def gone() -> bool:
        assert house.server is not None
        stored = await house.server.rooms.event(event_id)
        return stored is not None and bool(stored.marks & GONE)

    assert await until(gone), "the ciphertext is gone from the database"


async def test_whoever_was_allowed_to_see_it_can_prove_it_and_nobody_else(town: Town) -> None:
    alice, bob, carol, eve = await town.users("alice@one", "bob@one", "carol@one", "eve@one")
    room = await alice.creates_room(with_=[bob, carol])
    session = Session()
    sent = await alice.sends(room, session.says(room, "an ugly word"))
    found = await proved(town, bob, sent, 0, session.prk(0))
    assert (found.result, found.step, found.attested_by) == ("verified", None, None)
    assert found.plaintext is not None and json.loads(found.plaintext)["content"]["body"] == "an ugly word"
    assert "ugly" not in repr(found) + str(found.shown()), "what was opened does not show itself by accident"

    stranger = await proved(town, eve, sent, 0, session.prk(0))
    assert (stranger.result, stranger.step, stranger.plaintext) == ("invalid", "V1", None)
    unknown = await proved(town, eve, "$" + "x" * 43, 0, session.prk(0))
    assert (unknown.result, unknown.step) == ("invalid", "V1") and unknown.reason == stranger.reason, (
        "a stranger learns nothing"
    )

    await bob.leaves(room)
    await alice.kicks(room, carol)
    await alice.bans(room, carol)
    later = await alice.sends(room, session.says(room, "behind their backs"))
    for person in (bob, carol):
        assert (await proved(town, person, sent, 0, session.prk(0))).result == "verified", (
            "who left or was put out still can"
        )
        assert (await proved(town, person, later, 1, session.prk(1))).step == "V1", "but not what came after that"
    disclosures = await proving(town)
    assert await disclosures.may_report(carol.id, sent) and not await disclosures.may_report(carol.id, later)
    kept = await disclosures.verify(eve.id, disclosure(Item(sent, 0, session.prk(0))), seen={sent})
    assert kept.result == "verified", "an answer that was given when the report came is not asked for again"
    card = await disclosures.card(carol.id, sent)
    assert card is not None and card["content"]["session_id"] == session.id and card["room_id"] == room
    assert await disclosures.card(eve.id, sent) is None, "and a stranger gets no ciphertext either"

    state = (await alice.calls("GET", f"rooms/{room}/state".replace("!", "%21")))[0]["event_id"]
    assert (await proved(town, alice, state, 0, session.prk(0))).step == "V2", "a state event is no message"
    assert (await proved(town, alice, sent, 1, session.prk(0))).step == "V6"
    assert (await proved(town, alice, sent, 0, session.prk(1))).step == "V8"


async def test_a_proof_of_something_else_proves_nothing(town: Town) -> None:
    """Else somebody could have a harmless message of another person marked as proved by a vile one of her own."""
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob)
    hers, his = Session(), Session()
    harmless = await alice.sends(room, hers.says(room, "good morning"))
    vile = await bob.sends(room, his.says(room, "something vile"))
    disclosures = await proving(town)
    given = disclosure(Item(vile, 0, his.prk(0)), Item(harmless, 0, bytes(32)))
    about_event = await disclosures.verify(bob.id, given, about_event=harmless, about_user=alice.id)
    assert (about_event.result, about_event.step) == ("invalid", "V8"), "the message that was reported counts"
    about_her = await disclosures.verify(bob.id, given, about_user=alice.id)
    assert about_her.result == "invalid", "and of a reported person only her own"
    only_his = disclosure(Item(vile, 0, his.prk(0)))
    for about in ({"about_event": harmless}, {"about_user": alice.id}):
        assert (await disclosures.verify(bob.id, only_his, **about)).result == "undisclosed"
    assert (await disclosures.verify(bob.id, only_his)).result == "verified"


async def test_what_came_back_from_others_or_was_refused_here(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob)
    one = await town.relay("one")
    assert one.server is not None
    session = Session()
    sent = await alice.sends(room, session.says(room, "from her own account"))
    for marks, expected in (
        (
            0,
            ("needs_human", "V5", ("not_sent_here",)),
        ),  # after a lost database: our signature, and no token that we saw
        (LOCAL | SOFT_FAILED, ("invalid", "V1", ())),
        (LOCAL | REJECTED, ("invalid", "V1", ())),
        (LOCAL, ("verified", None, ())),
    ):
        with one.server.db.write() as tx:
            tx.run("UPDATE events SET marks = $2 WHERE event_id = $1", sent, marks)
        await tx
        found = await proved(town, bob, sent, 0, session.prk(0))
        assert (found.result, found.step, found.flags) == expected


async def test_history_that_was_closed_to_her_stays_so(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(
        initial_state=[
            {"type": "m.room.history_visibility", "state_key": "", "content": {"history_visibility": "joined"}}
        ]
    )
    session = Session()
    before = await alice.sends(room, session.says(room, "before she came"))
    await alice.invites_to(room, bob)
    await bob.joins(room)
    after = await alice.sends(room, session.says(room, "after"))
    assert (await proved(town, bob, before, 0, session.prk(0))).step == "V1"
    assert (await proved(town, bob, after, 1, session.prk(1))).result == "verified"


async def test_what_was_taken_back_can_be_proved_before_and_after_the_purge(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@two")
    room = await alice.creates_room(with_=bob)
    session = Session()
    content = session.says(room, "taken back at once")
    sent = await alice.sends(room, content)
    assert await bob.sees(sent)
    taken = await alice.redacts(room, sent)
    assert await bob.sees(taken)
    assert (await proved(town, bob, sent, 0, session.prk(0), at="two")).result == "verified_remote", "within the grace"
    disclosures = await proving(town, "two")
    listed = await disclosures.taken_back(bob.id, room)
    assert [(one["event_id"], one["sender"]) for one in listed] == [(sent, alice.id)], (
        "the page can name what was taken back"
    )

    two = await town.relay("two")
    await purged(town, two, sent)
    without = await proved(town, bob, sent, 0, session.prk(0), at="two")
    assert (without.result, without.flags) == ("undisclosed", ("content_needed",))
    assert (await proved(town, bob, sent, 0, session.prk(0), content, at="two")).result == "verified_remote", (
        "from the stub's hash"
    )
    swapped = session.says(room, "never sent")
    forged = await proved(town, bob, sent, 1, session.prk(1), swapped, at="two")
    assert (forged.result, forged.step, forged.plaintext) == ("invalid", "V3", None)
    assert not await disclosures.taken_back(bob.id, room), "what is gone is not listed"
    card = await disclosures.card(bob.id, sent)
    assert card is not None and card["ciphertext_gone"] and card["taken_back"]


async def test_a_purge_leaves_the_odd_keys_of_other_servers(town: Town) -> None:
    """The content hash covers them; without them nothing that was purged could be proved."""
    alice, bob = await town.users("alice@one", "bob@two")
    room = await alice.creates_room(with_=bob)
    one, two = await town.relay("one"), await town.relay("two")
    forger = Forger(two, alice.server)
    session = Session()
    content = session.says(room, "with odd keys")
    plain = await forger.builds(room, bob.id, "m.room.encrypted", content)
    pdu = {key: value for key, value in plain.pdu.items() if key not in ("hashes", "signatures")}
    odd = events.sign(
        {**pdu, "x": {"odd": 1}, "origin": "two", "membership": "join"}, plain.version, two.name, forger._key
    )
    answer = await forger.transaction([odd.pdu])
    assert answer["pdus"][odd.id] == {}, "such an event is a valid one"
    assert await alice.sees(odd.id)
    await alice.redacts(room, odd.id)
    await purged(town, one, odd.id)
    assert one.server is not None
    stored = await one.server.rooms.event(odd.id)
    assert stored is not None and stored.event.content == {} and stored.event.pdu["x"] == {"odd": 1}
    assert held_form(stored).kept_whole
    assert (await proved(town, alice, odd.id, 0, session.prk(0), content)).result == "verified_remote"
    given = await forger.asks("GET", f"/_matrix/federation/v1/event/{odd.id}")
    assert not {"x", "origin", "membership"} & set(given["pdus"][0]), "peers get the redacted form"
    # A stub that an earlier purge, or a peer, stripped of them: nobody is called a liar for that.
    bare = events.redacted(stored.event).raw
    with one.server.db.write() as tx:
        tx.run(f"UPDATE events SET json = $2, marks = {stored.marks & GONE} WHERE event_id = $1", odd.id, bare)
    await tx
    found = await proved(town, alice, odd.id, 0, session.prk(0), content)
    assert (found.result, found.step, found.flags) == ("needs_human", "V3", ("keys_missing",))


async def test_a_remote_sender_is_attested_by_her_server_and_nobody_is_asked(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@two")
    room = await alice.creates_room(with_=bob)
    session = Session()
    picture = f"mxc://{bob.server}/abcdef"
    sent = await bob.sends(room, session.encrypts(file_message(room, picture, hashlib.sha256(b"x").digest())))
    assert await alice.sees(sent)
    one = await town.relay("one")
    assert one.server is not None
    asked: list[str] = []
    outward = one.server.outbox._connections._outward

    async def overheard(method: str, url: Any, **rest: Any) -> Any:
        asked.append(str(url))
        raise AssertionError(f"a connection to {url} was opened")

    outward.request = overheard  # type: ignore[method-assign]
    found = await proved(town, alice, sent, 0, session.prk(0))
    assert (found.result, found.attested_by) == ("verified_remote", bob.server)
    assert [media.state for media in found.media] == ["not held"], "the sender's server would see who fetched it"
    assert not asked
    # Had another key signed it:
    with one.server.db.write() as tx:
        old = SigningKey.generate("ed25519:x")
        tx.run("UPDATE server_keys SET verify_key = $2 WHERE server = $1", bob.server, old.verify_key)
    await tx
    denied = await proved(town, alice, sent, 0, session.prk(0))
    assert (denied.result, denied.step) == ("invalid", "V5"), "a signature that does not hold is none"
    with one.server.db.write() as tx:
        tx.run("DELETE FROM server_keys WHERE server = $1", bob.server)
    await tx
    lost = await proved(town, alice, sent, 0, session.prk(0))
    assert (lost.result, lost.step, lost.flags) == ("needs_human", "V5", ("key_missing",))


async def test_a_server_cannot_disown_what_it_signed_by_renaming_its_key(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@two")
    room = await alice.creates_room(with_=bob)
    session = Session()
    sent = await bob.sends(room, session.says(room, "signed with the old key"))
    assert await alice.sees(sent)
    one, two = await town.relay("one"), await town.relay("two")
    assert one.server is not None
    key_id = Forger(two, alice.server)._key.key_id
    keyring = next(part for part in one.server._parts if type(part).__name__ == "Keyring")
    from federation.server_keys import KnownKey

    other = SigningKey.generate(key_id)
    await keyring._keep(bob.server, {key_id: KnownKey(other.verify_key, one.server.clock.now() + 10**9)}, {})  # type: ignore[attr-defined]
    assert (await proved(town, alice, sent, 0, session.prk(0))).result == "verified_remote"


async def test_a_copied_ciphertext_leads_to_its_author(town: Town) -> None:
    alice, mallory, bob = await town.users("alice@one", "mallory@one", "bob@one")
    room = await alice.creates_room(with_=[mallory, bob])
    session = Session()
    content = session.says(room, "alice wrote this")
    original = await alice.sends(room, content)
    copy = await mallory.sends(room, {**content, "device_id": "MALLORY"})
    first = await proved(town, bob, original, 0, session.prk(0))
    assert (first.result, first.flags, first.copied_from) == ("verified", (), None), "the earliest is the message"
    second = await proved(town, bob, copy, 0, session.prk(0))
    assert second.result == "verified" and "copied" in second.flags, "a copy makes nothing false"
    assert second.copied_from is not None and (second.copied_from.event_id, second.copied_from.sender) == (
        original,
        alice.id,
    )
    # Also when the original is gone by then.
    third = await mallory.sends(room, content)
    await alice.redacts(room, original)
    await purged(town, await town.relay("one"), original)
    found = await proved(town, bob, third, 0, session.prk(0))
    assert found.copied_from is not None and found.copied_from.event_id == original, "its hash remembers"


async def test_a_sender_who_makes_two_messages_of_one_is_for_a_person(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob)
    sender = Forged()
    first = await alice.sends(room, sender.builds(inner(room, "how nice you are")))
    other_ratchet = Forged(bytes(128))
    other_ratchet._signer, other_ratchet.id = sender._signer, sender.id
    second = await alice.sends(room, other_ratchet.builds(inner(room, "how ugly you are")))
    assert (await proved(town, bob, first, 0, sender.prk(0))).result == "verified"
    found = await proved(town, bob, second, 0, other_ratchet.prk(0))
    assert (found.result, found.step, found.flags) == ("needs_human", "V11", ("equivocation",))
    assert found.plaintext is not None and b"ugly" in found.plaintext, "with its text: it was written"
    # Somebody without the session's key can't set such a trap.
    honest, stranger = Session(), Forged()
    content = honest.says(room, "honest")
    trap = {**stranger.builds(inner(room, "trap")), "session_id": honest.id}
    await bob.sends(room, trap)
    sent = await alice.sends(room, content)
    assert (await proved(town, bob, sent, 0, honest.prk(0))).result == "verified"
    # Two keys for one ciphertext cost the sender 2^64 work, so a row stands for the first opening.
    disclosures = await proving(town)
    message = megolm.parse(content, 0)
    assert disclosures._db is not None
    with disclosures._db.write() as tx:
        tx.run(
            "INSERT INTO disclosed_openings (message, case_id, opening) VALUES ($1, $2, $3)",
            repeats.message_name(message),
            "c",
            b"another",
        )
    await tx
    twice = await proved(town, bob, sent, 0, honest.prk(0))
    assert (twice.result, twice.step, twice.flags) == ("needs_human", "V11", ("two_openings",))


def file_message(room: str, address: str, sha256: bytes, thumbnail: tuple[str, bytes] | None = None) -> bytes:
    content: dict[str, Any] = {
        "msgtype": "m.image",
        "body": "a picture",
        "file": {"url": address, "hashes": {"sha256": b64(sha256)}},
    }
    if thumbnail is not None:
        content["info"] = {"thumbnail_file": {"url": thumbnail[0], "hashes": {"sha256": b64(thumbnail[1])}}}
    return json.dumps({"type": "m.room.message", "content": content, "room_id": room}).encode()


async def test_named_files_are_compared_with_what_lies_here(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob)
    blob, small = bytes(range(256)) * 300, b"\xff\x00" * 900
    picture, thumbnail = await alice.uploads(blob), await alice.uploads(small)
    right, of_small = hashlib.sha256(blob).digest(), hashlib.sha256(small).digest()
    session = Session()
    for index, (message, result, states) in enumerate(
        (
            (file_message(room, picture, right, (thumbnail, of_small)), "verified", ["matches", "matches"]),
            (file_message(room, picture, right, (thumbnail, right)), "needs_human", ["matches", "differs"]),
            (file_message(room, picture, of_small), "needs_human", ["differs"]),
            (file_message(room, f"mxc://{alice.server}/nothing"[:-2], right), "verified", ["not held"]),
            (file_message(room, "mxc://elsewhere.example/abc", right), "verified", ["not held"]),
            (file_message(room, "https://evil.example/x", right), "verified", []),
            (file_message(room, "mxc://../../etc/passwd", right), "verified", []),
        )
    ):
        sent = await alice.sends(room, session.encrypts(message))
        found = await proved(town, bob, sent, index, session.prk(index))
        assert (found.result, [one.state for one in found.media]) == (result, states), message
        assert found.step == ("V12" if result == "needs_human" else None)
        assert found.plaintext == message, "the text is proved in any case"
        assert "mxc" not in str(found.shown()) and "nothing" not in repr(found), "the address is as secret as the text"


# --- sealed, and nowhere else --------------------------------------------------------------------------------------


def needles(prk: bytes) -> dict[str, bytes]:
    """The key and what follows from it, in each form in which it could be written."""
    keys = megolm.keys_of(prk)
    found = {}
    for name, raw in {"PRK": prk, "AES key": keys.aes, "MAC key": keys.mac, "IV": keys.iv}.items():
        found[f"{name}, raw"] = raw
        found[f"{name}, hex"] = raw.hex().encode()
        found[f"{name}, base64"] = base64.b64encode(raw).rstrip(b"=")[:-1]
        found[f"{name}, base64url"] = base64.urlsafe_b64encode(raw).rstrip(b"=")[:-1]
    return found


async def test_disclosed_text_and_its_keys_are_nowhere_on_disk(town: Town) -> None:
    town.log_level = "debug"
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob)
    one = await town.relay("one")
    assert one.server is not None
    parts = one.server.moderation.proving
    own, recovery = ModeratorSecret.make(), ModeratorSecret.make()
    keys = ((alice.id, "moderator", own.public), (bob.id, "recovery", recovery.public))
    now = one.server.clock.now()
    canaries = Canaries()
    session, word, bad_word = Session(), canaries("a disclosed message"), canaries("a message that is for a person")
    sent = await alice.sends(room, session.says(room, word))
    unreadable = await alice.sends(room, session.encrypts(bad_word.encode()))
    items = disclosure(
        Item(sent, 0, session.prk(0)), Item(unreadable, 1, session.prk(1)), Item("$" + "n" * 43, 0, bytes(32))
    )
    proof = await parts.disclosures.verify(bob.id, items)
    assert [item.result for item in proof.items] == ["verified", "needs_human", "invalid"]

    unsealed = await parts.disclosures.prepare("case-0", proof)
    assert unsealed.sealed is None, "while there are no keys nothing of the text is kept"
    await parts.keys.take(key_list.first(one.name, keys, recovery, now).statement, "operator")  # type: ignore[arg-type]
    assert (await parts.disclosures.prepare("case-0", proof, {bob.id})).sealed is None, "one key is too few"
    prepared = await parts.disclosures.prepare("case-1", proof)
    with one.server.db.write() as tx:
        parts.disclosures.store(tx, "case-1", prepared)
    await tx
    shown = await parts.disclosures.of_case("case-1")
    assert [(row["event_id"], row["result"], row["step"]) for row in shown][:2] == [
        (sent, "verified", None),
        (unreadable, "needs_human", "V10"),
    ]
    [sealed] = await parts.envelopes.of_case("case-1")
    for secret in (own, recovery):
        text = envelope.open_with(secret, Envelope.read(sealed), case_id="case-1", version=1)
        items_inside = json.loads(text)["items"]
        assert word.encode() in base64.b64decode(items_inside[0]["plaintext"] + "==="), "a moderator reads it"
        assert items_inside[0]["pdu"]["content"]["session_id"] == session.id and items_inside[0]["result"] == "verified"
        assert items_inside[2]["plaintext"] is None and items_inside[2]["prk"] is None, (
            "of a false proof nothing is kept"
        )

    def searched() -> list[str]:
        files = [*one.files(), *(path for path in town.folder.glob("*.log"))]
        found = canaries.found_in(files)
        for path in files:
            content = path.read_bytes()
            for index in (0, 1):
                found += [
                    f"{name} stands in {path.name}"
                    for name, needle in needles(session.prk(index)).items()
                    if needle in content
                ]
        return found

    assert not searched(), "neither while the relay runs"
    await one.stop()
    assert not searched(), "nor after it ended"
    assert sealed["sha256"] == Envelope.read(sealed).digest.hex()
    await one.start()
    assert one.server is not None
    parts = one.server.moderation.proving
    with one.server.db.write() as tx:
        parts.disclosures.forget(tx, "case-1")
    await tx
    [forgotten] = await parts.envelopes.of_case("case-1")
    assert forgotten["forgotten"] and not forgotten["wraps"] and forgotten["body"] == "", "nobody can open it any more"
    assert forgotten["sha256"] == sealed["sha256"], "its hash stays, as the log names it"
    assert not await parts.disclosures.of_case("case-1")
    await one.stop()
    rows = sqlite3.connect(one.folder / "relay.db").execute("SELECT count(*) FROM disclosed_openings").fetchone()
    assert rows == (0,)


async def test_a_second_false_proof_takes_nothing_away(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob)
    session = Session()
    sent = await alice.sends(room, session.says(room, "proved"))
    disclosures = await proving(town)
    for prk, expected in ((session.prk(0), "verified"), (bytes(32), "verified")):
        proof: Proof = await disclosures.verify(bob.id, disclosure(Item(sent, 0, prk)))
        prepared = await disclosures.prepare("case", proof)
        with disclosures._db.write() as tx:
            disclosures.store(tx, "case", prepared)
        await tx
        assert [row["result"] for row in await disclosures.of_case("case")] == [expected]
