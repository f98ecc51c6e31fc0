"""A bot made of mautrix-python, unmodified: its AppService, its Client and its OlmMachine, put together as its bridges do.

It keeps its keys in memory, gets everything by transactions (it never syncs), joins where it is invited, and answers what
it can read. `ghosts` of its namespace speak through its keys, as those of an encrypted bridge do.
"""

from __future__ import annotations

from typing import Any

from mautrix.appservice import AppService
from mautrix.appservice.state_store import ASStateStore
from mautrix.client import Client
from mautrix.client.state_store import MemoryStateStore
from mautrix.crypto import MemoryCryptoStore, OlmMachine
from mautrix.crypto import StateStore as CryptoStateStore
from mautrix.errors import EncryptionError, SessionNotFound
from mautrix.types import EventType, LoginType, Membership, MessageType, TextMessageEventContent

from tests.people import Json
from tests.town import House, free_port

KEY_SECONDS = 30


class _Rooms(MemoryStateStore, ASStateStore):
    def __init__(self) -> None:
        MemoryStateStore.__init__(self)
        ASStateStore.__init__(self)


class _Encryption(CryptoStateStore):
    """What the OlmMachine asks about rooms."""

    def __init__(self, rooms: _Rooms) -> None:
        self._rooms = rooms

    async def is_encrypted(self, room_id: str) -> bool:
        return bool(await self._rooms.is_encrypted(room_id))

    async def get_encryption_info(self, room_id: str) -> Any:
        return await self._rooms.get_encryption_info(room_id)

    async def find_shared_rooms(self, user_id: str) -> list[str]:
        return [room for room, members in self._rooms.members.items() if user_id in members]


class Bot:
    def __init__(self, name: str = "echo", *, signs_in: bool = False) -> None:
        """`signs_in`: it gets its device by m.login.application_service, as older bridges do, not by MSC4190."""
        self.signs_in = signs_in
        self.name = name
        self.port = free_port()
        self.heard: list[tuple[str, str]] = []
        self.ephemeral: list[Any] = []
        self.failures: list[BaseException] = []

    def registration(self) -> Json:
        """As mautrix's bridges write it."""
        return {
            "id": self.name,
            "url": f"http://127.0.0.1:{self.port}",
            "as_token": "as-token-of-the-bot",
            "hs_token": "hs-token-of-the-bot",
            "sender_localpart": f"{self.name}bot",
            "rate_limited": False,
            "namespaces": {
                "users": [
                    {"exclusive": True, "regex": rf"^@{self.name}_.*:.*$"},
                    {"exclusive": True, "regex": rf"^@{self.name}bot:.*$"},
                ]
            },
            "receive_ephemeral": True,
            "de.sorunome.msc2409.push_ephemeral": True,
            "org.matrix.msc3202": True,
            "io.element.msc4190": True,
        }

    async def starts(self, house: House) -> None:
        registration, self.rooms = self.registration(), _Rooms()
        self.az = AppService(
            server=house.url,
            domain=house.name,
            as_token=registration["as_token"],
            hs_token=registration["hs_token"],
            bot_localpart=registration["sender_localpart"],
            id=self.name,
            state_store=self.rooms,
            ephemeral_events=True,
            encryption_events=True,
        )
        await self.az.start("127.0.0.1", self.port)
        self.id = self.az.bot_mxid
        await self.az.intent.ensure_registered()
        self.client = Client(mxid=self.id, base_url=house.url, token=registration["as_token"], state_store=self.rooms)
        self.keys = MemoryCryptoStore("", "pickle")
        self.crypto = OlmMachine(self.client, self.keys, _Encryption(self.rooms))
        self.az.otk_handler = self.crypto.handle_as_otk_counts
        self.az.device_list_handler = self.crypto.handle_as_device_lists
        self.az.to_device_handler = self.crypto.handle_as_to_device_event
        self.az.matrix_event_handler(self._event)
        if self.signs_in:
            flows = await self.client.get_login_flows()
            assert flows.supports_type(LoginType.APPSERVICE), "the relay says that services may sign in"
            await self.client.login(
                login_type=LoginType.APPSERVICE,
                device_name="Echo bot",
                device_id=None,
                store_access_token=True,
                update_hs_url=False,
            )
        else:
            await self.client.create_device_msc4190(device_id="", initial_display_name="Echo bot")
        await self.crypto.load()
        await self.crypto.share_keys()
        await self.az.ping_self(txn_id="hello")

    async def stops(self) -> None:
        await self.client.api.session.close()
        await self.az.stop()

    async def _event(self, event: Any) -> None:
        try:
            await self._takes(event)
        except Exception as failure:
            self.failures.append(failure)
            raise

    async def _takes(self, event: Any) -> None:
        if event.type.is_ephemeral:
            self.ephemeral.append(event)
        elif event.type == EventType.ROOM_MEMBER:
            if event.state_key == self.id and event.content.membership == Membership.INVITE:
                await self.az.intent.join_room_by_id(event.room_id)
                # A bridge that came into a room asks once how it stands there.
                await self.az.intent.get_state(event.room_id)
            await self.crypto.handle_member_event(event)
        elif event.type == EventType.ROOM_ENCRYPTED and event.sender != self.id:
            await self._reads(event)

    async def _reads(self, event: Any) -> None:
        if self.owns(event.sender):
            return
        try:
            decrypted = await self.crypto.decrypt_megolm_event(event)
        except SessionNotFound as missing:
            await self.crypto.wait_for_session(event.room_id, missing.session_id, timeout=KEY_SECONDS)
            decrypted = await self.crypto.decrypt_megolm_event(event)
        self.heard.append((decrypted.sender, decrypted.content.body))
        await self.az.intent.mark_read(event.room_id, event.event_id)
        await self.says(event.room_id, f"you said: {decrypted.content.body}")

    def owns(self, user_id: str) -> bool:
        return user_id.startswith(f"@{self.name}_")

    async def says(self, room: str, text: str, ghost: str | None = None) -> str:
        """Encrypted with the bot's keys; `ghost` is who says it."""
        content = TextMessageEventContent(msgtype=MessageType.TEXT, body=text)
        try:
            sealed = await self.crypto.encrypt_megolm_event(room, EventType.ROOM_MESSAGE, content)
        except EncryptionError:
            members = await self.az.intent.get_room_members(room)
            await self.crypto.share_group_session(room, [m for m in members if not self.owns(m)])
            sealed = await self.crypto.encrypt_megolm_event(room, EventType.ROOM_MESSAGE, content)
        intent = self.az.intent.user(ghost) if ghost is not None else self.az.intent
        return str(await intent.send_message_event(room, EventType.ROOM_ENCRYPTED, sealed))

    async def brings(self, room: str, name: str, shown: str) -> str:
        """A ghost comes into the room."""
        ghost = f"@{self.name}_{name}:{self.az.domain}"
        intent = self.az.intent.user(ghost)
        await intent.set_displayname(shown)
        await self.az.intent.invite_user(room, ghost)
        await intent.ensure_joined(room)
        return ghost

    async def counts(self) -> int:
        """One-time keys that it has left at the relay."""
        counts = await self.client.upload_keys()
        return int(next(iter(counts.values()), 0))
