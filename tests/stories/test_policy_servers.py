"""A room with a policy server: it is asked before anything is sent, and what it has not signed is shown to nobody."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from relay.errors import ApiError, Forbidden
from relay.protocol import event as events
from relay.protocol.event import signing_bytes
from relay.protocol.signing import SigningKey
from relay.rooms.policy_server import PolicyServers
from tests.forger import Forger
from tests.people import ciphertext, path, until
from tests.policy_office import Office
from tests.town import Town, Within

# Longer than a slow machine needs for what has to come through meanwhile.
PATIENT = "federation: {extra_ca_file: ca.crt, outbox_backoff_min: 1s, request_timeout: 2m}"


@pytest.fixture
def office(monkeypatch: pytest.MonkeyPatch) -> Office:
    assert PolicyServers.__init__.__kwdefaults__ is not None
    monkeypatch.setitem(PolicyServers.__init__.__kwdefaults__, "ask_seconds", 120.0)
    return Office(monkeypatch)


async def signers(house: Within, event_id: str) -> dict[str, Any]:
    assert house.server is not None
    one = await house.server.rooms.event(event_id)
    assert one is not None
    signatures: dict[str, Any] = one.event.pdu["signatures"]
    return signatures


async def test_a_policy_server_is_asked_before_and_after(town: Town, office: Office) -> None:
    alice, bob, officer = await town.users("alice@one", "bob@two", "officer@three")
    one, two = await town.relay("one"), await town.relay("two")
    room = await alice.creates_room(with_=[bob, officer])
    stable = {"via": officer.server, "public_keys": {"ed25519": office.public_key}}
    assert await bob.sees(await alice.sets(room, "m.room.policy", stable))
    assert office.asked == [], "nobody is asked about the event that names it"

    sent = await alice.sends(room)
    assert await bob.sees(sent) and office.asked == [sent], "asked once, before it is sent"
    assert "ed25519:policy_server" in (await signers(two, sent))[officer.server], "its signature goes along"
    pinned = await alice.sets(room, "m.room.pinned_events", {"pinned": [sent]})
    assert await bob.sees(pinned) and office.asked[1:] == [pinned], "about state as well"

    office.refusal = ApiError("No such thing in here, please.", status=400, errcode="M_FORBIDDEN")
    refused = await alice.is_refused(alice.sends(room))
    assert (refused.status, refused.errcode) == (400, "M_FORBIDDEN"), "what it says is passed on"
    assert "No such thing" in refused.text
    office.refusal = ApiError("Who are you?", status=401, errcode="M_UNKNOWN_TOKEN")
    assert (await alice.is_refused(alice.sends(room))).errcode == "M_FORBIDDEN", "but it can't end her session"

    # A server that does not ask.
    office.refusal = Forbidden("Spam.")
    forger = Forger(two, alice.server)
    asked = len(office.asked)
    unsigned = await forger.builds(room, bob.id, "m.room.encrypted", ciphertext())
    await forger.transaction([unsigned.pdu])
    assert office.asked[asked:] == [unsigned.id], "one asks in its stead"
    assert await alice.does_not_see(unsigned.id), "and shows nobody what is not signed"
    office.refusal = None
    forgotten = await forger.builds(room, bob.id, "m.room.encrypted", ciphertext())
    lied = events.with_signature(forgotten, officer.server, "ed25519:policy_server", "A" * 86)
    await forger.transaction([lied.pdu])
    assert await alice.sees(forgotten.id), "what it signs when asked is shown"
    assert (await signers(one, forgotten.id))[officer.server]["ed25519:policy_server"] != "A" * 86
    assert await officer.sees(await bob.sends(room)), "the room goes on"

    # One that is gone: nobody waits for it twice, and the room can do without it again.
    town.cut("one", "three")
    for _ in range(2):
        gone = await alice.is_refused(alice.sends(room))
        assert gone.status == 503 and officer.server in gone.text and "Try again" in gone.text
    await alice.sets(room, "m.room.policy", {})
    assert await bob.sees(await alice.sends(room)), "without one nobody is asked"


async def test_nobody_is_held_in_a_room_by_its_policy_server(town: Town, office: Office) -> None:
    alice, bob, carol, officer = await town.users("alice@one", "bob@one", "carol@one", "officer@three")
    room = await alice.creates_room(with_=[bob, carol, officer])
    await alice.sets(room, "m.room.policy", {"via": officer.server, "public_keys": {"ed25519": office.public_key}})
    office.refusal = Forbidden("Nobody leaves.")
    asked = len(office.asked)
    await bob.leaves(room)
    assert len(office.asked) == asked + 1, "it is asked"
    assert await alice.notices(lambda: alice.membership(room, bob) == "leave"), "and she leaves, whatever it says"
    await bob.forgets(room)
    town.cut("one", "three")
    await carol.leaves(room)
    assert await alice.notices(lambda: alice.membership(room, carol) == "leave"), "also when it can't be reached"


async def test_the_form_before_1_18_is_understood(town: Town, office: Office) -> None:
    alice, officer = await town.users("alice@one", "officer@three")
    office.old = True
    room = await alice.creates_room(with_=officer)
    await alice.sets(room, "org.matrix.msc4284.policy", {"via": officer.server, "public_key": office.public_key})
    sent = await alice.sends(room)
    assert office.asked == [sent] and "unstable" in office.paths[0], "under its old name"
    assert await officer.sees(sent)
    await officer.leaves(room)
    assert await alice.notices(lambda: alice.membership(room, officer) == "leave")
    asked = len(office.asked)
    await alice.sends(room)
    assert len(office.asked) == asked, "it is in force only while somebody of it is there"


async def test_nobody_is_held_up_while_the_policy_server_thinks(town: Town, office: Office) -> None:
    await town.relay("one", PATIENT)
    alice, bob, officer = await town.users("alice@one", "bob@two", "officer@three")
    room = await alice.creates_room(with_=[bob, officer])
    policy = {"via": officer.server, "public_keys": {"ed25519": office.public_key}}
    assert await bob.sees(await alice.sets(room, "m.room.policy", policy))
    await alice.syncs()
    office.thinks.clear()
    first = asyncio.create_task(alice.sends(room))
    assert await until(lambda: len(office.asked) == 1), "Alice's words are looked at"
    # Bob's have their signature already.
    one, two = town.houses["one"], town.houses["two"]
    assert isinstance(two, Within)
    event = await Forger(two, one.name).builds(room, bob.id, "m.room.encrypted", ciphertext())
    passed = events.with_signature(
        event, officer.server, "ed25519:policy_server", office.key.sign(signing_bytes(event))
    )
    await Forger(two, one.name).transaction([passed.pdu])
    assert await alice.sees(event.id), "they come through meanwhile"
    office.thinks.set()
    sent = await first
    assert len(office.asked) == 2, "asked once more, for an event that comes after Bob's"
    assert await officer.sees(sent)
    several = await asyncio.gather(*(alice.sends(room) for _ in range(6)))
    for one_of_them in several:
        assert await officer.sees(one_of_them), "several at once are all sent"


async def test_a_policy_server_that_hangs_keeps_nobody_from_the_room(town: Town, office: Office) -> None:
    """Whatever is looked at, also somebody's coming and going: what needs no look comes through, and is seen."""
    await town.relay("one", PATIENT)
    alice, bob, officer = await town.users("alice@one", "bob@two", "officer@three")
    carol, dora, frank = await town.users("carol@one", "dora@one", "frank@two")
    room = await alice.creates_room(with_=[bob, officer], preset="public_chat")
    policy = {"via": officer.server, "public_keys": {"ed25519": office.public_key}}
    assert await bob.sees(await alice.sets(room, "m.room.policy", policy))
    await carol.joins(room)
    await alice.syncs()
    forger = Forger(town.houses["two"], town.houses["one"].name)  # type: ignore[arg-type]

    async def bob_is_heard() -> None:
        event = await forger.builds(room, bob.id, "m.room.encrypted", ciphertext())
        signature = office.key.sign(signing_bytes(event))
        await forger.transaction([events.with_signature(event, officer.server, "ed25519:policy_server", signature).pdu])
        assert await alice.sees(event.id), "what is signed already comes through meanwhile"

    for doing in (
        lambda: dora.joins(room),
        lambda: alice.kicks(room, dora),
        lambda: alice.invites_to(room, dora),
        lambda: alice.invites_to(room, frank),
        lambda: alice.kicks(room, carol),
    ):
        office.thinks.clear()
        asked = len(office.asked)
        under_way = asyncio.create_task(doing())
        assert await until(lambda asked=asked: len(office.asked) > asked), "it is looked at"
        await bob_is_heard()
        assert (await alice.calls("GET", path("rooms", room, "state", "m.room.policy")))["via"] == officer.server
        assert not under_way.done(), "while the policy server hangs"
        office.thinks.set()
        await under_way
    assert await bob.notices(lambda: bob.membership(room, carol) == "leave"), "and all of it happens"
    assert await bob.notices(lambda: bob.membership(room, dora) == bob.membership(room, frank) == "invite")

    # Several who speak at once take turns, so that nobody is looked at over and over.
    asked = len(office.asked)
    erin = await town.user("erin@one")
    sent = await asyncio.gather(*(alice.sends(room) for _ in range(5)), erin.joins(room))
    assert len(office.asked) - asked <= 2 * len(sent)
    for event_id in sent[:5]:
        assert await bob.sees(event_id)


async def test_only_the_key_that_the_room_names_signs_for_it(town: Town, office: Office) -> None:
    alice, bob, officer = await town.users("alice@one", "bob@two", "officer@three")
    two = await town.relay("two")
    room = await alice.creates_room(with_=[bob, officer])
    policy = {"via": officer.server, "public_keys": {"ed25519": office.public_key}}
    assert await bob.sees(await alice.sets(room, "m.room.policy", policy))
    assert await bob.sees(await alice.sends(room))
    named, office.key = office.key, SigningKey.generate("policy_server")
    refused = await alice.is_refused(alice.sends(room))
    assert refused.status == 503, "whoever answers there now is not the one that the room trusts"
    forger = Forger(two, alice.server)
    unsigned = await forger.builds(room, bob.id, "m.room.encrypted", ciphertext())
    mark = office.key.sign(signing_bytes(unsigned))
    asked = len(office.asked)
    await forger.transaction([events.with_signature(unsigned, officer.server, "ed25519:policy_server", mark).pdu])
    assert await alice.does_not_see(unsigned.id) and len(office.asked) == asked + 1, "nor is what it signed shown"
    office.key = named
    assert await bob.sees(await alice.sends(room))
