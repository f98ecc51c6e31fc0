"""A room may have a policy server: it is asked about every event before that is sent, and signs those that it recommends.

An event of another server without a valid signature of it is asked about here, and soft-failed where it says no. Only the
envelope and ciphertext are there to be looked at. The name that Matrix had for it before 1.18 is understood as well, since
servers in use still write it. Spec: server-server-api/#policy-servers, MSC4284.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Self

import structlog

from relay.errors import ApiError, BadJson, RemoteError
from relay.ids import is_server_name
from relay.protocol.canonical import from_base64
from relay.protocol.event import Event, signing_bytes, with_signature
from relay.protocol.signing import KEY_BYTES, signature_of, verify_bytes
from relay.remote import AsksPolicy
from relay.rooms.intake import Taken
from relay.rooms.room import Room

log = structlog.get_logger("policy")

STATE_TYPE = "m.room.policy"
OLD_STATE_TYPE = "org.matrix.msc4284.policy"
# The key's ID, always. Spec: server-server-api/#validating-policy-server-signatures
KEY_ID = "ed25519:policy_server"
# A person waits for it.
ASK_SECONDS = 10.0
# How often it is asked about one event without holding up the room, which may move on meanwhile each time; and for how long
# the room is held up after that.
MAX_ASKED_AHEAD = 3
HELD_SECONDS = 2.0
# One that could not be reached is left alone for so long: nobody waits for it meanwhile.
DOWN_SECONDS = 30.0
MAX_ASKED_AT_ONCE = 10
MAX_DOWN = 1_000
_OF_SESSIONS = frozenset(
    {"M_UNKNOWN_TOKEN", "M_MISSING_TOKEN", "M_USER_LOCKED", "M_USER_DEACTIVATED", "M_USER_SUSPENDED"}
)


@dataclass(frozen=True, slots=True)
class PolicyServer:
    name: str
    verify_key: bytes


class PolicyServers:
    def __init__(self, server_name: str, remote: AsksPolicy, *, ask_seconds: float = ASK_SECONDS) -> None:
        self._server_name = server_name
        self._remote = remote
        self._ask_seconds = ask_seconds
        self._down_until: dict[str, float] = {}

    async def of(self, room: Room) -> PolicyServer | None:
        """The one that the room uses by its current state: it has a key, and somebody of it is joined."""
        for event_type in (STATE_TYPE, OLD_STATE_TYPE):
            if (event_type, "") not in room.entries:
                continue
            event = await room.event(event_type, "")
            content = event.content if event is not None else {}
            keys = content.get("public_keys")
            key = keys.get("ed25519") if isinstance(keys, dict) else None
            if key is None and event_type == OLD_STATE_TYPE:
                key = content.get("public_key")
            name = content.get("via")
            if not isinstance(key, str) or not is_server_name(name) or name == self._server_name:
                return None
            try:
                raw = from_base64(key)
            except BadJson:
                return None
            return PolicyServer(str(name), raw) if len(raw) == KEY_BYTES and name in room.servers else None
        return None

    async def looks_at(self, room: Room, event_type: str, state_key: str | None) -> bool:
        """Whether events of this kind need its signature."""
        if (STATE_TYPE, "") not in room.entries and (OLD_STATE_TYPE, "") not in room.entries:
            return False
        return (event_type, state_key) not in _EXEMPT and await self.of(room) is not None

    async def concerns(self, room: Room, event: Event) -> bool:
        """Whether this event of ours needs a signature that it has not."""
        if (STATE_TYPE, "") not in room.entries and (OLD_STATE_TYPE, "") not in room.entries:
            return False
        policy = await self.of(room)
        return policy is not None and not _exempt(event) and not _holds(policy, event)

    async def signed(self, room: Room, event: Event, seconds: float | None = None) -> Event:
        """An event of ours with the signature that it needs, before it is sent; somebody's own leave goes without, too. Raises
        ApiError: what the policy server said, or that it can't be asked. The caller does not hold `room.lock`, or gives it
        few `seconds`."""
        policy = await self.of(room)
        if policy is None or _exempt(event) or _holds(policy, event):
            return event
        try:
            return await self._ask(policy, event, seconds)
        except RemoteError as error:
            if _is_leave(event):
                # Nobody is held in a room by its policy server: here she has left, whatever others make of it.
                log.info("left without the policy server's signature", room_id=event.room_id, server=policy.name)
                return event
            if 400 <= error.status < 500 and error.status != 429:
                # In its own words, but never in those that would end a client's session.
                errcode = "M_FORBIDDEN" if error.errcode in _OF_SESSIONS else error.errcode
                raise ApiError(error.text, status=400 if error.status == 400 else 403, errcode=errcode) from error
            raise ApiError(
                f"This room has every message looked at by {policy.name}, which can't be reached just now. Try again later.",
                status=503,
            ) from error

    async def look_at(self, room: Room, given: Sequence[Taken]) -> None:
        """Events of other servers: `objection` is set on those that are not recommended, a signature got for the others."""
        fresh = [one for one in given if not one.looked_at]
        for one in fresh:
            one.looked_at = True
        policy = await self.of(room) if fresh else None
        if policy is None:
            return
        slots = asyncio.Semaphore(MAX_ASKED_AT_ONCE)

        async def look(one: Taken) -> None:
            if _exempt(one.event) or _holds(policy, one.event):
                return
            async with slots:
                try:
                    one.event = await self._ask(policy, one.event)
                except RemoteError as error:
                    log.info(
                        "the policy server did not sign", event_id=one.event.id, server=policy.name, status=error.status
                    )
                    one.objection = "the room's policy server has not signed it"

        await asyncio.gather(*(look(one) for one in fresh))

    async def _ask(self, policy: PolicyServer, event: Event, seconds: float | None = None) -> Event:
        """The event with its signature. Raises RemoteError."""
        now = time.monotonic()
        if self._down_until.get(policy.name, 0.0) > now:
            raise RemoteError(policy.name, 0, "it could not be reached a moment ago")
        try:
            async with asyncio.timeout(self._ask_seconds if seconds is None else seconds):
                answer = await self._remote.policy_signature(policy.name, event)
        except TimeoutError as late:
            if seconds is None:
                self._is_down(policy.name)
            raise RemoteError(policy.name, 0, "it took too long to answer") from late
        except RemoteError as error:
            if error.status == 0 or error.status >= 500:
                self._is_down(policy.name)
            raise
        except ApiError as shut_out:
            raise RemoteError(policy.name, 0, shut_out.text) from shut_out
        # Only this one: whatever else it may have signed, the event keeps its own.
        signature = answer.get(policy.name, {}) if isinstance(answer.get(policy.name), dict) else {}
        text = signature.get(KEY_ID)
        if not isinstance(text, str):
            # Before 1.18 an empty answer was the refusal.
            raise RemoteError(
                policy.name, 403, "This room's policy server does not let this event pass.", "M_FORBIDDEN"
            )
        signed = with_signature(event, policy.name, KEY_ID, text)
        if not _holds(policy, signed):
            raise RemoteError(policy.name, 200, "its signature is not made with the key that the room names")
        return signed

    def _is_down(self, name: str) -> None:
        while len(self._down_until) >= MAX_DOWN:
            del self._down_until[next(iter(self._down_until))]
        self._down_until[name] = time.monotonic() + DOWN_SECONDS


class Draft:
    """An event of ours on its way into a room that may have a policy server. That one is asked without the room's lock, about
    one event of ours after the other, so that only what comes from elsewhere meanwhile makes it be asked again."""

    def __init__(self, policies: PolicyServers | None, event_type: str, state_key: str | None) -> None:
        self._policies = policies
        self._event_type = event_type
        self._state_key = state_key
        self._event: Event | None = None
        self._asked = 0
        self._turn = AsyncExitStack()
        self._has_turn = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._turn.aclose()

    async def prepare(self, room: Room) -> None:
        """Before the room's lock. Raises ApiError: the policy server says no, or can't be asked."""
        if self._policies is None:
            return
        if self._event is not None:
            self._asked += 1
            self._event = await self._policies.signed(room, self._event)
        elif not self._has_turn and await self._policies.looks_at(room, self._event_type, self._state_key):
            await self._turn.enter_async_context(room.asking)
            self._has_turn = True

    # --- under the room's lock

    def forget(self) -> None:
        """The room has to be loaded again; what it was built on may not be there any more."""
        self._event = None

    def ready(self, room: Room) -> Event | None:
        """The event with its signature, if the room has not moved on."""
        event, self._event = self._event, None
        return event if event is not None and set(event.prev_events) == set(room.extremities) else None

    @property
    def held(self) -> bool:
        """Whether the room has moved on so often that it waits now."""
        return self._asked >= MAX_ASKED_AHEAD

    async def put_aside(self, room: Room, event: Event) -> bool:
        """Whether the policy server has to be asked about it first; the caller lets go of the room and begins again."""
        if self.held or self._policies is None or not await self._policies.concerns(room, event):
            return False
        self._event = event
        return True


_EXEMPT = ((STATE_TYPE, ""), (OLD_STATE_TYPE, ""))


def _exempt(event: Event) -> bool:
    return event.key in _EXEMPT


def _is_leave(event: Event) -> bool:
    return event.membership == "leave" and event.state_key == event.sender


def _holds(policy: PolicyServer, event: Event) -> bool:
    signature = signature_of(event.pdu, policy.name, KEY_ID)
    return signature is not None and verify_bytes(signing_bytes(event), signature, policy.verify_key)
