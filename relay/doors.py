"""What each door asks before it opens. A Protocol, and an implementation that lets everybody pass.

Each method returns, or raises an ApiError whose sentence tells the person what to do. `people` (invite blocking) and
`moderation/hooks` implement doors; `Together` asks several in order. A door sees ciphertext and metadata, never more.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from relay.errors import Forbidden
from relay.protocol.event import Event


class Dropped(Exception):
    """A door takes a local user's message and throws it away; she is answered as if it had been sent."""

    def __init__(self, event: Event) -> None:
        super().__init__(event.id)
        self.event = event


class Doors(Protocol):
    async def register(self, user_id: str) -> None: ...
    async def login(self, user_id: str) -> None: ...
    async def create_room(self, user_id: str, content: dict[str, Any]) -> None: ...
    async def invite(self, sender: str, target: str, room_id: str) -> None:
        """A local user is invited, by someone here or elsewhere."""
        ...

    async def join(self, user_id: str, room_id: str) -> None: ...
    async def knock(self, user_id: str, room_id: str) -> None: ...
    async def send(self, event: Event) -> None:
        """An event of a local user, before it is recorded."""
        ...

    async def receive(self, origin: str, event: Event) -> None:
        """An event of another server, before it is recorded. A refusal soft-fails it."""
        ...

    async def upload(self, user_id: str, size: int) -> None: ...
    async def download(self, user_id: str | None, server_name: str, media_id: str) -> None: ...
    async def profile(self, user_id: str, field_name: str, value: Any) -> None: ...
    async def alias(self, user_id: str, alias: str, room_id: str) -> None: ...
    async def publish_room(self, user_id: str, room_id: str) -> None: ...
    async def to_device(self, sender: str, target: str, event_type: str) -> None: ...
    async def server(self, server_name: str) -> None:
        """Any traffic with this server, in or out."""
        ...

    async def transaction(self, origin: str) -> None:
        """A transaction of events of another server, before anything in it is looked at."""
        ...


class Inspector(Protocol):
    """Who wants to know a file's hash before it is kept; the hash is of the bytes as they came."""

    @property
    def wants_files(self) -> bool:
        """Whether it is worth the work."""
        ...

    async def file(self, user_id: str, mxc_uri: str, size: int, sha256: str) -> None:
        """Raises ApiError where the file is not to be kept."""
        ...


class OpenDoors:
    """Lets everybody pass."""

    async def register(self, user_id: str) -> None:
        return None

    async def login(self, user_id: str) -> None:
        return None

    async def create_room(self, user_id: str, content: dict[str, Any]) -> None:
        return None

    async def invite(self, sender: str, target: str, room_id: str) -> None:
        return None

    async def join(self, user_id: str, room_id: str) -> None:
        return None

    async def knock(self, user_id: str, room_id: str) -> None:
        return None

    async def send(self, event: Event) -> None:
        return None

    async def receive(self, origin: str, event: Event) -> None:
        return None

    async def upload(self, user_id: str, size: int) -> None:
        return None

    async def download(self, user_id: str | None, server_name: str, media_id: str) -> None:
        return None

    async def profile(self, user_id: str, field_name: str, value: Any) -> None:
        return None

    async def alias(self, user_id: str, alias: str, room_id: str) -> None:
        return None

    async def publish_room(self, user_id: str, room_id: str) -> None:
        return None

    async def to_device(self, sender: str, target: str, event_type: str) -> None:
        return None

    async def server(self, server_name: str) -> None:
        return None

    async def transaction(self, origin: str) -> None:
        return None


class AloneDoors(OpenDoors):
    """For `federation.enabled: false`: no traffic with other servers, either way."""

    async def server(self, server_name: str) -> None:
        raise Forbidden("This relay does not talk to other servers: its operator has set federation.enabled to false.")


class Together(OpenDoors):
    """Asks each of several doors in order; the first refusal counts. Those that let everybody pass are not asked."""

    def __init__(self, doors: Sequence[Doors]) -> None:
        for name in (name for name in vars(OpenDoors) if not name.startswith("_")):
            open_to_all = getattr(OpenDoors, name)
            asked = [getattr(door, name) for door in doors if getattr(type(door), name, None) is not open_to_all]
            if asked:
                setattr(self, name, asked[0] if len(asked) == 1 else _in_order(asked))


def _in_order(asked: Sequence[Callable[..., Awaitable[None]]]) -> Callable[..., Awaitable[None]]:
    async def ask(*args: Any) -> None:
        for one in asked:
            await one(*args)

    return ask
