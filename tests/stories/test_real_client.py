"""matrix-nio with its encryption, unmodified: two people on two relays, several devices."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from io import BytesIO

import nio
import pytest
from nio.crypto import decrypt_attachment

from tests.nio_people import Nio, good
from tests.town import Town


class Company:
    """Alice's laptop and Bob's laptop, on two relays, in one encrypted room."""

    def __init__(self, town: Town) -> None:
        self.town = town
        self.everybody: list[Nio] = []

    async def begins(self) -> None:
        # nio takes another person's device of the same name for its own, so each has a name of its own.
        self.alice = await self.device("alice@one", "ALICELAPTOP")
        self.bob = await self.device("bob@two", "BOBLAPTOP")
        made = good(
            await self.alice.client.room_create(invite=[self.bob.id], preset=nio.RoomPreset.private_chat),
            nio.RoomCreateResponse,
        )
        self.room = made.room_id
        assert await self.bob.notices(lambda: self.room in self.bob.client.invited_rooms), "the invitation arrives"
        good(await self.bob.client.join(self.room), nio.JoinResponse)
        assert await self.alice.notices(
            lambda: self.bob.id in (self.alice.room(self.room).users if self.alice.room(self.room) else ())
        )
        assert await self.bob.notices(lambda: self.room in self.bob.client.rooms)

    async def device(self, address: str, name: str) -> Nio:
        known = next((one.person for one in self.everybody if one.id.startswith(f"@{address.split('@')[0]}:")), None)
        person = known or await self.town.user(address)
        one = Nio(person, self.town.folder / "nio" / f"{person.name}-{name}", name)
        self.everybody.append(one)
        await one.signs_in()
        return one


@pytest.fixture
async def company(town: Town) -> AsyncIterator[Company]:
    company = Company(town)
    try:
        await company.begins()
        yield company
    finally:
        for one in company.everybody:
            await one.closes()


async def test_encrypted_text_crosses_both_ways(company: Company) -> None:
    alice, bob, room = company.alice, company.bob, company.room
    assert alice.room(room).encrypted and bob.room(room).encrypted, "both clients see that the room is encrypted"
    await alice.says(room, "good evening")
    assert await bob.hears("good evening"), "the other reads what was written"
    await bob.says(room, "and to you")
    assert await alice.hears("and to you")
    assert not alice.undecrypted and not bob.undecrypted, "nothing remained unreadable"


async def test_a_new_device_reads_what_comes_after_it(company: Company) -> None:
    alice, bob, room = company.alice, company.bob, company.room
    await alice.says(room, "before")
    assert await bob.hears("before")
    phone = await company.device("bob@two", "PHONE")
    assert await alice.notices(lambda: alice.knows_device(bob.id, "PHONE")), "the other side learns of the new device"
    await alice.says(room, "hello to all your devices")
    assert await phone.hears("hello to all your devices"), "the new device is written to as well"
    assert await bob.hears("hello to all your devices")
    await phone.says(room, "from my phone")
    assert await alice.hears("from my phone") and await bob.hears("from my phone"), "and can write itself"


async def test_two_devices_verify_each_other(company: Company) -> None:
    alice, bob, room = company.alice, company.bob, company.room
    await alice.says(room, "let us verify")
    assert await bob.hears("let us verify")
    await bob.says(room, "yes")
    assert await alice.hears("yes")
    [bobs] = list(alice.client.device_store.active_user_devices(bob.id))
    [alices] = list(bob.client.device_store.active_user_devices(alice.id))
    good(await alice.client.start_key_verification(bobs), nio.ToDeviceResponse)
    assert await bob.notices(lambda: any(isinstance(e, nio.KeyVerificationStart) for e in bob.verifications))
    transaction = bob.verifications[0].transaction_id
    good(await bob.client.accept_key_verification(transaction), nio.ToDeviceResponse)
    assert await alice.notices(lambda: any(isinstance(e, nio.KeyVerificationAccept) for e in alice.verifications))
    await alice.tends_keys()
    assert await bob.notices(lambda: any(isinstance(e, nio.KeyVerificationKey) for e in bob.verifications))
    await bob.tends_keys()
    assert await alice.notices(lambda: any(isinstance(e, nio.KeyVerificationKey) for e in alice.verifications))
    shown = [one.client.key_verifications[transaction].get_emoji() for one in (alice, bob)]
    assert shown[0] == shown[1], "both see the same emoji"
    good(await alice.client.confirm_short_auth_string(transaction), nio.ToDeviceResponse)
    good(await bob.client.confirm_short_auth_string(transaction), nio.ToDeviceResponse)
    assert await alice.notices(lambda: bobs.verified), "the one trusts the other's device"
    assert await bob.notices(lambda: alices.verified), "and the other way round"


async def test_an_encrypted_attachment_arrives(company: Company) -> None:
    alice, bob, room = company.alice, company.bob, company.room
    picture = b"\x89PNG\r\n\x1a\n" + os.urandom(150_000)
    answer, keys = await alice.client.upload(
        lambda *_: BytesIO(picture),
        content_type="image/png",
        filename="secret name.png",
        encrypt=True,
        filesize=len(picture),
    )
    good(answer, nio.UploadResponse)
    assert keys is not None
    content = {
        "msgtype": "m.image",
        "body": "secret name.png",
        "file": {"url": answer.content_uri, **keys},
        "info": {"size": len(picture)},
    }
    good(
        await alice.client.room_send(room, "m.room.message", content, ignore_unverified_devices=True),
        nio.RoomSendResponse,
    )
    assert await bob.notices(lambda: any(isinstance(e, nio.RoomEncryptedImage) for e in bob.events)), (
        "the message arrives"
    )
    event = next(e for e in bob.events if isinstance(e, nio.RoomEncryptedImage))
    got = good(await bob.client.download(mxc=event.url), nio.MemoryDownloadResponse)
    assert decrypt_attachment(got.body, event.key["k"], event.hashes["sha256"], event.iv) == picture, (
        "and so does the picture"
    )


async def test_typing_receipts_and_redaction(company: Company) -> None:
    alice, bob, room = company.alice, company.bob, company.room
    good(await alice.client.room_typing(room, True), nio.RoomTypingResponse)
    assert await bob.notices(lambda: alice.id in bob.typing), "typing is seen"
    sent = await alice.says(room, "to be taken back")
    assert await bob.hears("to be taken back")
    good(await bob.client.room_read_markers(room, sent, sent), nio.RoomReadMarkersResponse)
    assert await alice.notices(lambda: (bob.id, sent) in alice.receipts), "reading is seen"
    good(await alice.client.room_redact(room, sent), nio.RoomRedactResponse)
    assert await bob.notices(lambda: any(isinstance(e, nio.RedactionEvent) and e.redacts == sent for e in bob.events))
    found = good(await bob.client.room_get_event(room, sent), nio.RoomGetEventResponse)
    assert isinstance(found.event, nio.RedactedEvent), "what was taken back is gone"


async def test_leaving_and_being_kicked(company: Company) -> None:
    alice, bob, room = company.alice, company.bob, company.room
    await alice.says(room, "first")
    assert await bob.hears("first")
    good(await bob.client.room_leave(room), nio.RoomLeaveResponse)
    assert await alice.notices(lambda: bob.id not in alice.room(room).users), "who leaves is gone for the others"
    good(await alice.client.room_invite(room, bob.id), nio.RoomInviteResponse)
    assert await bob.notices(lambda: room in bob.client.invited_rooms)
    good(await bob.client.join(room), nio.JoinResponse)
    assert await alice.notices(lambda: bob.id in alice.room(room).users)
    await alice.says(room, "welcome back")
    assert await bob.hears("welcome back"), "after coming back the conversation goes on"
    good(await alice.client.room_kick(room, bob.id, reason="a private remark"), nio.RoomKickResponse)
    assert await bob.notices(lambda: room in bob.left), "who is kicked learns it"
    assert isinstance(await bob.client.joined_members(room), nio.JoinedMembersError), "and can't look in any more"


async def test_a_relay_is_down_for_a_while(company: Company) -> None:
    alice, bob, room, town = company.alice, company.bob, company.room, company.town
    await alice.says(room, "one")
    assert await bob.hears("one")
    await town.houses["two"].stop()
    for number in range(5):
        await alice.says(room, f"while you were away {number}")
    await town.houses["two"].start()
    town.clock.forward(minutes=30)
    for number in range(5):
        assert await bob.hears(f"while you were away {number}", within=15), "what was written meanwhile can be read"
    await bob.says(room, "I am back")
    assert await alice.hears("I am back")
    assert not bob.undecrypted, "nothing remained unreadable"


async def test_a_relay_restarts_in_the_middle_of_a_sync(company: Company) -> None:
    alice, bob, room, town = company.alice, company.bob, company.room, company.town
    await alice.says(room, "one")
    assert await bob.hears("one")
    waiting = asyncio.create_task(bob.client.sync(timeout=15000))
    await asyncio.sleep(0.3)
    await town.houses["two"].restart()
    good(await asyncio.wait_for(waiting, 20), nio.SyncResponse)
    await alice.says(room, "after the restart")
    town.clock.forward(minutes=1)
    assert await bob.hears("after the restart", within=15), "the client goes on with its old token"
    assert not bob.undecrypted
