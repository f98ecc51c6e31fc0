"""What rooms, keys, people and media may ask of other servers: a Protocol, no code. `federation/client.py` implements it.

Every method may raise RemoteError, and takes a bounded time. Answers are parsed JSON whose outer shape was checked;
what stands inside an event is for `protocol.event.parse` to judge. Spec: server-server-api.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from relay.protocol.event import Event
from relay.protocol.versions import RoomVersion

Pdu = dict[str, Any]
# One that stands in a large answer: its bytes, which are parsed when it is looked at.
RawPdu = bytes | memoryview


@dataclass(slots=True)
class Template:
    version: RoomVersion
    pdu: Pdu


@dataclass(slots=True)
class JoinAnswer:
    """`servers` are those in the room; they are named where `members_omitted`: then the members have to be fetched later."""

    state: Sequence[RawPdu]
    auth_chain: Sequence[RawPdu]
    event: Pdu | None
    servers: list[str] = field(default_factory=list)
    members_omitted: bool = False


@dataclass(slots=True)
class RemoteMedia:
    content_type: str
    disposition: str | None
    chunks: AsyncIterator[bytes]
    length: int | None = None


class Remote(Protocol):
    def left_alone(self, server: str) -> int:
        """Milliseconds until a server that could not be reached lately is asked anything again; 0 where it may be asked now."""
        ...

    async def make(
        self, kind: Literal["join", "leave", "knock"], server: str, room_id: str, user_id: str
    ) -> Template: ...
    async def send_join(self, server: str, event: Event, *, omit_members: bool = False) -> JoinAnswer: ...
    async def send_leave(self, server: str, event: Event) -> None: ...
    async def send_knock(self, server: str, event: Event) -> list[dict[str, Any]]:
        """The room's stripped state."""
        ...

    async def invite(self, server: str, event: Event, stripped: Sequence[Pdu]) -> Pdu:
        """The invite as the other server has signed it."""
        ...

    async def missing_events(
        self, server: str, room_id: str, earliest: Sequence[str], latest: Sequence[str], limit: int, min_depth: int
    ) -> list[Pdu]: ...
    async def state_ids(self, server: str, room_id: str, event_id: str) -> tuple[list[str], list[str]]:
        """(state before the event, its auth chain), as event IDs."""
        ...

    async def state(self, server: str, room_id: str, event_id: str) -> tuple[Sequence[RawPdu], Sequence[RawPdu]]:
        """(state before the event, its auth chain)."""
        ...

    async def event(self, server: str, event_id: str) -> Pdu: ...
    async def event_auth(self, server: str, room_id: str, event_id: str) -> list[Pdu]: ...
    async def backfill(self, server: str, room_id: str, event_ids: Sequence[str], limit: int) -> list[Pdu]: ...
    async def directory(self, server: str, alias: str) -> tuple[str, list[str]]:
        """(room ID, servers that are in it)."""
        ...

    async def public_rooms(self, server: str, body: dict[str, Any]) -> dict[str, Any]: ...
    async def hierarchy(self, server: str, room_id: str, suggested_only: bool) -> dict[str, Any]: ...
    async def event_at(self, server: str, room_id: str, ts: int, direction: Literal["b", "f"]) -> tuple[str, int]:
        """(ID, time) of the event that is closest to a moment, at or before it (`b`) or at or after it (`f`)."""
        ...

    async def profile(self, server: str, user_id: str, field_name: str | None) -> dict[str, Any]: ...
    async def query_keys(self, server: str, device_keys: dict[str, list[str]]) -> dict[str, Any]: ...
    async def claim_keys(self, server: str, one_time_keys: dict[str, dict[str, str]]) -> dict[str, Any]: ...
    async def user_devices(self, server: str, user_id: str) -> dict[str, Any]: ...
    async def media(self, server: str, media_id: str, most_bytes: int) -> RemoteMedia: ...
    async def verified(self, events: Sequence[Event]) -> list[bool]:
        """Whether each event carries the valid signatures of all servers that must have signed it (keys are fetched)."""
        ...

    async def verified_json(self, server: str, value: dict[str, Any]) -> bool:
        """Whether `server` signed this object with a key that is valid now."""
        ...


class SpeaksSigned(Protocol):
    """Requests to another server that are signed as this one, for what is no part of the standard."""

    async def get(
        self, server: str, target: str, *, forced: bool = False, most_bytes: int = ..., timeout: float | None = None
    ) -> dict[str, Any]:
        """Raises RemoteError."""
        ...

    async def send(
        self,
        server: str,
        method: str,
        target: str,
        content: dict[str, Any] | bytes,
        *,
        forced: bool = False,
        most_bytes: int = ...,
        timeout: float | None = None,
    ) -> dict[str, Any]:
        """Raises RemoteError."""
        ...


class AsksPolicy(Protocol):
    async def policy_signature(self, server: str, event: Event) -> dict[str, Any]:
        """The signatures that a policy server gives an event: server -> key ID -> signature. Raises RemoteError."""
        ...


class Posts(Protocol):
    """Plain requests to an address that a client or the operator named, such as a push gateway: not signed as a server. Which
    networks may be reached is fixed where it is built."""

    async def post(
        self, url: str, body: bytes, *, timeout: float, most_bytes: int, headers: Mapping[str, str] | None = None
    ) -> tuple[int, bytes]:
        """(status, body) of the answer to this JSON. Redirects are not followed. Raises RemoteError where none came."""
        ...


class SpeaksToServices(Protocol):
    """Requests to an address that the operator named in a registration file: anywhere, unsigned, with that file's token."""

    async def request(
        self, method: str, url: str, *, token: str, body: bytes | None, timeout: float, most_bytes: int
    ) -> tuple[int, bytes]:
        """(status, body). Redirects are not followed. Raises RemoteError: 504 where it took too long, 0 for the rest."""
        ...
