"""People with matrix-nio and its encryption: an unmodified client, as a stranger would bring it.

`Nio` is one device: it keeps its keys in a folder, syncs when it is told to, and remembers what it could decrypt.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import nio
from nio import AsyncClient, AsyncClientConfig

from tests.people import PATIENCE_SECONDS, Person


class Nio:
    def __init__(self, person: Person, folder: Path, device: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.person = person
        self.id = person.id
        self.texts: list[tuple[str, str]] = []
        self.undecrypted: list[str] = []
        self.events: list[Any] = []
        self.left: set[str] = set()
        self.typing: list[str] = []
        self.receipts: list[tuple[str, str]] = []
        self.verifications: list[Any] = []
        self.client = AsyncClient(
            person.url,
            person.id,
            device_id=device,
            store_path=str(folder),
            config=AsyncClientConfig(
                encryption_enabled=True, store_sync_tokens=True, max_timeouts=2, request_timeout=20
            ),
        )
        self.client.add_event_callback(self._text, nio.RoomMessageText)
        self.client.add_event_callback(self._undecrypted, nio.MegolmEvent)
        self.client.add_event_callback(self._any, nio.Event)
        self.client.add_ephemeral_callback(self._typing, nio.TypingNoticeEvent)
        self.client.add_ephemeral_callback(self._receipt, nio.ReceiptEvent)
        self.client.add_to_device_callback(self._verification, nio.KeyVerificationEvent)

    async def signs_in(self) -> None:
        answer = await self.client.login(self.person.password, device_name="nio")
        assert isinstance(answer, nio.LoginResponse), f"the client signs in: {answer}"
        await self.syncs()

    async def syncs(self, timeout: int = 0) -> None:
        answer = await self.client.sync(timeout=timeout)
        assert isinstance(answer, nio.SyncResponse), f"the client understands the sync: {answer}"
        self.left |= set(answer.rooms.leave)
        await self.tends_keys()

    async def tends_keys(self) -> None:
        """What nio's own `sync_forever` does between two syncs."""
        await self.client.send_to_device_messages()
        if self.client.should_upload_keys:
            good(await self.client.keys_upload(), nio.KeysUploadResponse)
        if self.client.should_query_keys:
            good(await self.client.keys_query(), nio.KeysQueryResponse)
        if self.client.should_claim_keys:
            good(await self.client.keys_claim(self.client.get_users_for_key_claiming()), nio.KeysClaimResponse)

    async def notices(self, what: Any, within: float = PATIENCE_SECONDS) -> bool:
        deadline = time.monotonic() + within
        while not what():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            await self.syncs(timeout=int(min(left, 0.5) * 1000))
        return True

    async def says(self, room: str, text: str) -> str:
        await self.tends_keys()
        answer = await self.client.room_send(
            room, "m.room.message", {"msgtype": "m.text", "body": text}, ignore_unverified_devices=True
        )
        assert isinstance(answer, nio.RoomSendResponse), f"the relay takes the message: {answer}"
        return str(answer.event_id)

    async def hears(self, text: str, within: float = PATIENCE_SECONDS) -> bool:
        return await self.notices(lambda: any(said == text for _, said in self.texts), within)

    def knows_device(self, user_id: str, device: str) -> bool:
        return any(one.id == device for one in self.client.device_store.active_user_devices(user_id))

    def room(self, room_id: str) -> Any:
        return self.client.rooms.get(room_id)

    async def _text(self, room: Any, event: Any) -> None:
        self.texts.append((event.sender, event.body))

    async def _undecrypted(self, room: Any, event: Any) -> None:
        self.undecrypted.append(event.event_id)

    async def _any(self, room: Any, event: Any) -> None:
        self.events.append(event)

    async def _typing(self, room: Any, event: Any) -> None:
        self.typing = event.users

    async def _receipt(self, room: Any, event: Any) -> None:
        self.receipts += [(receipt.user_id, receipt.event_id) for receipt in event.receipts]

    async def _verification(self, event: Any) -> None:
        self.verifications.append(event)

    async def closes(self) -> None:
        await self.client.close()


def good(answer: Any, kind: type) -> Any:
    assert isinstance(answer, kind), f"the client understands the answer: {answer}"
    return answer
