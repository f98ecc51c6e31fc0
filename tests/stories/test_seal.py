"""The seal: what is readable is refused with a sentence, or left out, or kept only in its redacted form."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import pytest

from tests.canaries import Canaries
from tests.forger import Forger
from tests.people import Person, Refused, ciphertext, path
from tests.town import Town, Within

OPEN = "privacy: {seal: open}\n"


async def test_a_readable_message_is_refused_with_advice(town: Town) -> None:
    alice = await town.user("alice@one")
    room = await alice.creates_room()
    refused = await alice.is_refused(alice.sends(room, {"msgtype": "m.text", "body": "hello"}, type="m.room.message"))
    assert (refused.status, refused.errcode) == (403, "M_FORBIDDEN")
    assert "encrypt" in refused.text.lower(), f"the sentence says what to do: {refused.text}"
    refused = await alice.is_refused(
        alice.sends(room, {"algorithm": "m.megolm.v1.aes-sha2", "ciphertext": "not a ciphertext at all"})
    )
    assert refused.status == 403, "what only calls itself encrypted is refused as well"
    refused = await alice.is_refused(alice.tells_devices("m.room_key", {alice.id: {"*": {"session_key": "in clear"}}}))
    assert refused.status == 403, "a key in clear does not pass to a device"
    refused = await alice.is_refused(alice.uploads(b"A readable text, long enough to be sure about it. " * 10))
    assert refused.status == 403, "a readable file is refused"
    refused = await alice.is_refused(alice.sets(room, "m.room.encryption", {"algorithm": "rot13"}))
    assert refused.status == 403, "nobody makes the encryption worse"


async def test_free_text_is_left_out_of_what_is_kept(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob)
    sent = await alice.sends(room, ciphertext(body="a plain remark", **{"m.mentions": {"user_ids": [bob.id]}}))
    kept = (await bob.event(room, sent))["content"]
    assert set(kept) == {"algorithm", "ciphertext", "session_id", "device_id", "sender_key"}, (
        "only what is listed is kept"
    )


async def test_rooms_without_encryption_are_not_joined(town: Town) -> None:
    await town.relay("clear", OPEN)
    clara, alice = await town.users("clara@clear", "alice@one")
    room = await clara.creates_room(preset="public_chat", room_alias_name="plain", name="Plain")
    refused = await alice.is_refused(alice.joins(f"#plain:{clara.server}"))
    assert refused.status == 403 and "encrypt" in refused.text.lower(), "she is told why"
    assert room not in (await alice.calls("GET", "joined_rooms"))["joined_rooms"]
    assert alice.id not in {u for u, m in (await clara.members(room)).items() if m == "join"}, (
        "and the room does not count her"
    )
    await clara.invites_to(room, alice)
    assert await alice.notices(lambda: room in alice.invites), "an invitation still arrives"
    refused = await alice.is_refused(alice.joins(room))
    assert refused.status == 403
    await alice.leaves(room)
    encrypted = await clara.creates_room(
        initial_state=[{"type": "m.room.encryption", "content": {"algorithm": "m.megolm.v1.aes-sha2"}}]
    )
    await clara.invites_to(encrypted, alice)
    assert await alice.notices(lambda: encrypted in alice.invites)
    await alice.joins(encrypted)
    space = await clara.creates_room(preset="public_chat", creation_content={"type": "m.space"})
    await alice.joins(space, clara.server)


async def test_what_another_server_sends_in_clear_is_never_shown(town: Town) -> None:
    await town.relay("clear", OPEN)
    clara, alice = await town.users("clara@clear", "alice@one")
    room = await encrypted_room(clara, alice)
    await alice.syncs()
    plain = await clara.sends(room, {"msgtype": "m.text", "body": "oops"}, type="m.room.message")
    sealed = await clara.sends(room)
    assert await alice.sees(sealed), "what is encrypted arrives"
    assert alice.has(plain) is None, "what is not does not show in the sync"
    assert plain not in [e["event_id"] for e in await alice.history(room)], "nor in the history"
    refused = await alice.is_refused(alice.event(room, plain))
    assert (refused.status, refused.errcode) == (404, "M_NOT_FOUND")
    answer = await alice.sends(room)
    assert await clara.sees(answer), "the conversation goes on over it"
    around = await alice.calls("GET", path("rooms", room, "context", sealed))
    assert plain not in [e["event_id"] for e in around["events_before"]]


@pytest.mark.parametrize("level", ["standard", "strict"])
async def test_no_canary_ever_reaches_the_disk(town: Town, level: str) -> None:
    """Everything readable that a person or another server can try, and then a search of every byte."""
    town.log_level = "debug"
    sealed = await town.relay_apart("one", f"privacy: {{seal: {level}}}\nmedia: {{remote_retention: 7d}}\n")
    clear = await town.relay("clear", OPEN)
    alice, bob = await town.users("alice@one", "bob@one")
    clara, zoe = await town.users("clara@clear", "zoe@clear")
    canary = Canaries()
    room = await encrypted_room(alice, bob, clara)
    await plants_locally(canary, alice, bob, room, level)
    await plants_from_afar(canary, clear, sealed.name, clara, zoe, alice, room, level)
    last = await clara.sends(room)
    assert await alice.sees(last, within=15), "whatever was tried, the conversation goes on"
    await alice.history(room)
    for uri in clara_media:
        with contextlib.suppress(Refused):
            await alice.downloads(uri)
    # What may be readable is found, so the search is not blind.
    control = Canaries()
    await alice.calls("PUT", path("profile", alice.id, "displayname"), {"displayname": control("a display name")})
    assert control.found_in(sealed.files()), "a name that may be readable is found by the same search"
    running = canary.found_in([*sealed.files(), sealed.log])
    assert not running, "while it runs nothing readable is on the disk:\n" + "\n".join(running)
    await sealed.stop()
    stopped = canary.found_in([*sealed.files(), sealed.log])
    assert not stopped, "nor after it stopped:\n" + "\n".join(stopped)
    files = {file.name for file in sealed.files()}
    assert "relay.db" in files, "the search looked at the database"
    assert sealed.log.stat().st_size > 0, "and at the log"
    status, said = await sealed.command("audit")
    assert status == 0, f"the audit finds nothing either:\n{said}"


clara_media: list[str] = []


async def encrypted_room(host: Person, *guests: Person) -> str:
    room = await host.creates_room(
        preset="private_chat",
        initial_state=[{"type": "m.room.encryption", "content": {"algorithm": "m.megolm.v1.aes-sha2"}}],
    )
    for guest in guests:
        await host.invites_to(room, guest)
        assert await guest.notices(lambda guest=guest: room in guest.invites)
        await guest.joins(room, host.server)
    return room


async def plants_locally(canary: Canaries, alice: Person, bob: Person, room: str, level: str) -> None:
    async def tries(doing: Any) -> Any:
        with contextlib.suppress(Refused):
            return await doing

    await tries(alice.sends(room, {"msgtype": "m.text", "body": canary("a message")}, type="m.room.message"))
    await tries(
        alice.sends(room, {canary("a key beside a ciphertext"): 1, "body": canary("a value beside it"), **ciphertext()})
    )
    await tries(alice.sends(room, {**ciphertext(), "ciphertext": canary("a ciphertext that is none")}))
    await tries(alice.sends(room, {**ciphertext(), "session_id": canary("a session ID that is none")}))
    await tries(
        alice.sends(
            room,
            ciphertext(**{"m.relates_to": {"rel_type": "m.thread", "event_id": "$x", "key": canary("a relation")}}),
        )
    )
    await tries(alice.sends(room, {"m.relates_to": {"key": canary("a reaction")}}, type="m.reaction"))
    await tries(alice.sends(room, {"text": canary("an unknown type")}, type="com.example.note"))
    await tries(alice.sets(room, "com.example.note", {"text": canary("unknown state")}))
    await tries(alice.sets(room, "m.room.tombstone", {"body": canary("a tombstone"), "replacement_room": room}))
    rule = {"entity": "@x:y", "recommendation": "m.ban", "reason": canary("a policy rule")}
    await tries(alice.sets(room, "m.policy.rule.user", rule, "rule:x"))
    await tries(alice.sets(room, "m.room.join_rules", {"join_rule": "invite", "text": canary("beside join rules")}))
    await tries(
        alice.sets(
            room, "m.room.encryption", {"algorithm": "m.megolm.v1.aes-sha2", "text": canary("beside encryption")}
        )
    )
    await tries(
        alice.sets(room, "m.room.member", {"membership": "join", "reason": canary("a reason to stay")}, alice.id)
    )
    if level == "strict":
        await tries(alice.sets(room, "m.room.name", {"name": canary("a room's name at strict")}))
        await tries(alice.creates_room(name=canary("a name at its creation"), topic=canary("a topic at its creation")))
    initial = [{"type": "com.example.note", "content": {"text": canary("initial state")}}]
    await tries(alice.creates_room(initial_state=initial))
    await tries(alice.creates_room(creation_content={"text": canary("creation content")}))
    other = await alice.creates_room()
    await tries(
        alice.calls("POST", f"{path('rooms', other)}/invite", {"user_id": bob.id, "reason": canary("an invitation")})
    )
    await tries(bob.calls("POST", path("join", other), {"reason": canary("a join")}))
    await tries(alice.kicks(other, bob, reason=canary("a kick")))
    await tries(alice.bans(other, bob, reason=canary("a ban")))
    await tries(alice.calls("POST", f"{path('rooms', other)}/leave", {"reason": canary("a leave")}))
    sent = await alice.sends(room)
    await tries(alice.redacts(room, sent, reason=canary("a redaction"), text=canary("beside a redaction's reason")))
    await tries(alice.tells_devices("m.room_key", {bob.id: {"*": {"session_key": canary("a room key to a device")}}}))
    await tries(
        alice.tells_devices(
            "m.room.encrypted", {bob.id: {"*": {**olm(), "text": canary("beside a to-device ciphertext")}}}
        )
    )
    start = {"from_device": "A", "transaction_id": "t", "text": canary("beside a verification")}
    await tries(alice.tells_devices("m.key.verification.request", {bob.id: {"*": start}}))
    await tries(alice.tells_devices("com.example.note", {bob.id: {"*": {"text": canary("unknown to-device")}}}))
    reported = await bob.sends(room)
    await tries(alice.calls("POST", path("rooms", room, "report", reported), {"reason": canary("a report")}))
    await tries(alice.calls("POST", f"{path('rooms', room)}/report", {"reason": canary("a report of a room")}))
    await tries(alice.calls("POST", path("users", bob.id, "report"), {"reason": canary("a report of a person")}))
    await tries(
        alice.calls(
            "PUT", path("presence", alice.id, "status"), {"presence": "online", "status_msg": canary("a status")}
        )
    )
    await tries(alice.uploads(canary("a text file").encode() * 20, "text/plain", filename=canary("a file name")))
    await tries(alice.uploads(b"%PDF-1.7\n" + canary("a document").encode() * 20, "application/pdf"))
    await tries(alice.uploads(b"\x89PNG\r\n\x1a\n" + canary("a picture nobody names").encode() * 20, "image/png"))
    await tries(alice.uploads(os.urandom(500), f"text/x; name={canary('a content type')}", filename=canary("a name")))
    await tries(
        alice.calls(
            "PUT", path("rooms", room, "send", "m.room.message", "t"), b'{"body": "' + canary("broken JSON").encode()
        )
    )
    await tries(
        alice.calls("PUT", path("rooms", room, "send", "m.room.message"), {"body": canary("an unknown endpoint")})
    )
    await tries(alice.calls("GET", path("nosuch", canary("a path"))))
    await tries(
        alice.calls("PUT", path("rooms", room, "typing", alice.id), {"typing": True, "text": canary("beside typing")})
    )
    await tries(
        alice.calls("POST", path("rooms", room, "receipt", "m.read", reported), {"text": canary("beside a receipt")})
    )
    await tries(
        alice.calls("POST", "search", {"search_categories": {"room_events": {"search_term": canary("a search")}}})
    )


async def plants_from_afar(
    canary: Canaries, clear: Within, target: str, clara: Person, zoe: Person, alice: Person, room: str, level: str
) -> None:
    for content, type in (
        ({"msgtype": "m.text", "body": canary("a foreign message")}, "m.room.message"),
        (
            {
                "msgtype": "m.file",
                "body": canary("a foreign file's body"),
                "filename": canary("its name"),
                "url": "mxc://x/y",
            },
            "m.room.message",
        ),
        (
            {"m.relates_to": {"rel_type": "m.annotation", "event_id": "$x", "key": canary("a foreign reaction")}},
            "m.reaction",
        ),
        ({"text": canary("a foreign unknown type")}, "com.example.note"),
        ({**ciphertext(), "ciphertext": canary("a foreign ciphertext that is none")}, "m.room.encrypted"),
        ({"algorithm": canary("a foreign algorithm alone")}, "m.room.encrypted"),
    ):
        await clara.sends(room, content, type=type)
    sent = await clara.sends(room)
    await clara.redacts(room, sent, reason=canary("a foreign redaction"))
    # Clara has no power to set these: they are refused by the rules, and kept as what they are.
    forger = Forger(clear, target)
    await forger.sends(
        room, clara, "com.example.note", {"text": canary("foreign state against the rules")}, state_key="x"
    )
    if level == "strict":
        topic = {"topic": canary("a foreign topic against the rules"), "text": canary("beside it")}
        await forger.sends(room, clara, "m.room.topic", topic, state_key="")
    await forger.sends(room, zoe, "m.room.message", {"body": canary("a message of somebody who is not here")})
    await forger.sends(room, clara, "m.room.message", {"body": canary("a badly signed message")}, spoil=True)
    await forger.sends(
        room,
        clara,
        "m.room.message",
        {"body": canary("a message with wrong content")},
        change={"body": canary("another body")},
    )
    await forger.sends(room, clara, "m.room.encrypted", ciphertext(), unsigned={"text": canary("unsigned")})
    await forger.tells("m.direct_to_device", {
        "sender": clara.id, "type": "m.room_key", "message_id": "1", "messages": {alice.id: {"*": {"session_key": canary("a foreign room key")}}},
    })  # fmt: skip
    await forger.tells("m.direct_to_device", {
        "sender": clara.id, "type": "com.example.note", "message_id": "2", "messages": {alice.id: {"*": {"text": canary("foreign unknown to-device")}}},
    })  # fmt: skip
    await forger.tells("m.direct_to_device", {
        "sender": clara.id, "type": "m.room.encrypted", "message_id": "3",
        "messages": {alice.id: {"*": {**olm(), "text": canary("beside a foreign to-device ciphertext")}}},
    })  # fmt: skip
    await forger.tells("m.presence", {
        "push": [{"user_id": clara.id, "presence": "online", "last_active_ago": 1, "status_msg": canary("a foreign status")}],
    })  # fmt: skip
    await forger.tells("m.device_list_update", {
        "user_id": clara.id, "device_id": "X", "stream_id": 5, "prev_id": [], "device_display_name": canary("a foreign device's name"),
    })  # fmt: skip
    await forger.tells("m.receipt", {
        room: {"m.read": {clara.id: {"event_ids": [sent], "data": {"ts": 1, "text": canary("beside a foreign receipt")}}}},
    })  # fmt: skip
    await forger.tells(
        "m.typing", {"room_id": room, "user_id": clara.id, "typing": True, "text": canary("beside foreign typing")}
    )
    await forger.tells("com.example.edu", {"text": canary("an unknown EDU")})
    clara_media[:] = [
        await clara.uploads(
            canary("a foreign text").encode() * 20, "text/plain", filename=canary("a foreign file name")
        ),
        await clara.uploads(b"\x89PNG\r\n\x1a\n" + canary("a foreign picture").encode() * 20, "image/png"),
    ]
    # History: what lies before her time comes by backfill, in clear as well.
    own = await encrypted_room(clara)
    await clara.sends(own, {"msgtype": "m.text", "body": canary("foreign history")}, type="m.room.message")
    for _ in range(3):
        await clara.sends(own)
    await clara.sets(own, "com.example.note", {"text": canary("foreign state at a join")}, "x")
    await clara.invites_to(own, alice)
    assert await alice.notices(lambda: own in alice.invites)
    await alice.joins(own)
    await alice.history(own)


def olm() -> dict[str, Any]:
    return {
        "algorithm": "m.olm.v1.curve25519-aes-sha2",
        "sender_key": "k" * 43,
        "ciphertext": {"k" * 43: {"type": 0, "body": "QUJD" * 20}},
    }
