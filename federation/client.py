"""What rooms, keys, people and media ask of other servers: implements `relay/remote.py`.

Answers are checked in their outer shape; what stands inside an event is for `protocol.event.parse` to judge. Requests for
which a person waits are made even where the server could not be reached lately. Spec: server-server-api.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from federation import media
from federation.connections import Connections, path
from federation.keyring import Keyring
from relay.errors import BadJson, RemoteError
from relay.ids import is_event_id, is_room_id, is_server_name
from relay.protocol.event import Event
from relay.protocol.versions import VERSIONS
from relay.remote import JoinAnswer, Pdu, RawPdu, RemoteMedia, Template
from relay.web import require_shallow

V1 = "/_matrix/federation/v1"
V2 = "/_matrix/federation/v2"

# A room's whole state; the largest public rooms have some 100 MB of it, which a small relay can't hold.
MAX_STATE_BYTES = 64 * 2**20
STATE_TIMEOUT_FACTOR = 4
MAX_SERVERS = 5_000


class _JoinAnswer(msgspec.Struct):
    state: list[msgspec.Raw]
    auth_chain: list[msgspec.Raw]
    event: dict[str, Any] | None = None
    members_omitted: bool = False
    servers_in_room: list[Any] | None = None


class _StateAnswer(msgspec.Struct):
    pdus: list[msgspec.Raw]
    auth_chain: list[msgspec.Raw]


class Client:
    def __init__(self, connections: Connections, keyring: Keyring) -> None:
        self._connections = connections
        self._keyring = keyring
        self._state_timeout = connections.timeout * STATE_TIMEOUT_FACTOR

    def left_alone(self, server: str) -> int:
        return self._connections.left_alone(server)

    # --- coming and going

    async def make(self, kind: Literal["join", "leave", "knock"], server: str, room_id: str, user_id: str) -> Template:
        query = [] if kind == "leave" else [("ver", version) for version in VERSIONS]
        target = path(f"{V1}/make_{kind}", room_id, user_id, query=query)
        answer = await self._connections.get(server, target, forced=True)
        # Where it is missing, the room has version 1, which we don't speak.
        name = answer.get("room_version", "1")
        version = VERSIONS.get(name) if isinstance(name, str) else None
        if version is None:
            raise RemoteError(
                server,
                400,
                "the room has a version that this relay does not know",
                "M_INCOMPATIBLE_ROOM_VERSION",
                {"room_version": name},
            )
        return Template(version, _object(server, answer, "event"))

    async def send_join(self, server: str, event: Event, *, omit_members: bool = False) -> JoinAnswer:
        answer = await self._connections.fragments(
            _JoinAnswer,
            server,
            "PUT",
            path(f"{V2}/send_join", event.room_id, event.id, query=(("omit_members", _flag(omit_members)),)),
            event.raw,
            forced=True,
            most_bytes=MAX_STATE_BYTES,
            timeout=self._state_timeout,
        )
        if answer.members_omitted and not omit_members:
            raise RemoteError(server, 200, "it left out members of the room, although it was asked not to")
        try:
            require_shallow(answer.event)
        except BadJson as error:
            raise RemoteError(server, 200, "the event in its answer is nested too deep") from error
        servers = _names(answer.servers_in_room or [])
        if answer.members_omitted and not servers:
            raise RemoteError(server, 200, "it left out members of the room, and does not say which servers are in it")
        return JoinAnswer(
            _raw_pdus(server, answer.state),
            _raw_pdus(server, answer.auth_chain),
            answer.event,
            servers,
            answer.members_omitted,
        )

    async def send_leave(self, server: str, event: Event) -> None:
        target = path(f"{V2}/send_leave", event.room_id, event.id)
        await self._connections.send(server, "PUT", target, event.raw, forced=True)

    async def send_knock(self, server: str, event: Event) -> list[dict[str, Any]]:
        target = path(f"{V1}/send_knock", event.room_id, event.id)
        answer = await self._connections.send(server, "PUT", target, event.raw, forced=True)
        return _pdus(server, answer, "knock_room_state")

    async def invite(self, server: str, event: Event, stripped: Sequence[Pdu]) -> Pdu:
        content = {"room_version": event.version.name, "event": event.pdu, "invite_room_state": list(stripped)}
        target = path(f"{V2}/invite", event.room_id, event.id)
        answer = await self._connections.send(server, "PUT", target, content, forced=True)
        return _object(server, answer, "event")

    # --- events and state

    async def missing_events(
        self, server: str, room_id: str, earliest: Sequence[str], latest: Sequence[str], limit: int, min_depth: int
    ) -> list[Pdu]:
        content = {
            "earliest_events": list(earliest),
            "latest_events": list(latest),
            "limit": limit,
            "min_depth": min_depth,
        }
        answer = await self._connections.send(server, "POST", path(f"{V1}/get_missing_events", room_id), content)
        return _pdus(server, answer, "events")

    async def state_ids(self, server: str, room_id: str, event_id: str) -> tuple[list[str], list[str]]:
        target = path(f"{V1}/state_ids", room_id, query=(("event_id", event_id),))
        answer = await self._connections.get(server, target, timeout=self._state_timeout)
        return _event_ids(server, answer, "pdu_ids"), _event_ids(server, answer, "auth_chain_ids")

    async def state(self, server: str, room_id: str, event_id: str) -> tuple[list[RawPdu], list[RawPdu]]:
        target = path(f"{V1}/state", room_id, query=(("event_id", event_id),))
        answer = await self._connections.fragments(
            _StateAnswer, server, "GET", target, None, most_bytes=MAX_STATE_BYTES, timeout=self._state_timeout
        )
        return _raw_pdus(server, answer.pdus), _raw_pdus(server, answer.auth_chain)

    async def event(self, server: str, event_id: str) -> Pdu:
        pdus = _pdus(server, await self._connections.get(server, path(f"{V1}/event", event_id)), "pdus")
        if len(pdus) != 1:
            raise RemoteError(server, 200, "it was asked for one event and gave another number of them")
        return pdus[0]

    async def event_auth(self, server: str, room_id: str, event_id: str) -> list[Pdu]:
        answer = await self._connections.get(server, path(f"{V1}/event_auth", room_id, event_id))
        return _pdus(server, answer, "auth_chain")

    async def backfill(self, server: str, room_id: str, event_ids: Sequence[str], limit: int) -> list[Pdu]:
        query = [*(("v", event_id) for event_id in event_ids), ("limit", str(limit))]
        return _pdus(server, await self._connections.get(server, path(f"{V1}/backfill", room_id, query=query)), "pdus")

    # --- questions

    async def directory(self, server: str, alias: str) -> tuple[str, list[str]]:
        target = path(f"{V1}/query/directory", query=(("room_alias", alias),))
        answer = await self._connections.get(server, target, forced=True)
        room_id = answer.get("room_id")
        if not isinstance(room_id, str) or not is_room_id(room_id):
            raise RemoteError(server, 200, "its answer names no room")
        servers = answer.get("servers")
        return room_id, _names(servers) if isinstance(servers, list) else []

    async def public_rooms(self, server: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = await self._connections.send(server, "POST", f"{V1}/publicRooms", body, forced=True)
        _pdus(server, answer, "chunk")
        return answer

    async def hierarchy(self, server: str, room_id: str, suggested_only: bool) -> dict[str, Any]:
        query = (("suggested_only", _flag(suggested_only)),)
        answer = await self._connections.get(server, path(f"{V1}/hierarchy", room_id, query=query))
        _object(server, answer, "room")
        _pdus(server, answer, "children", optional=True)
        return answer

    async def event_at(self, server: str, room_id: str, ts: int, direction: Literal["b", "f"]) -> tuple[str, int]:
        query = (("ts", str(ts)), ("dir", direction))
        answer = await self._connections.get(server, path(f"{V1}/timestamp_to_event", room_id, query=query))
        event_id, at = answer.get("event_id"), answer.get("origin_server_ts")
        if not isinstance(event_id, str) or not is_event_id(event_id) or type(at) is not int:
            raise RemoteError(server, 200, "its answer names no event and its time")
        return event_id, at

    async def profile(self, server: str, user_id: str, field_name: str | None) -> dict[str, Any]:
        query = [("user_id", user_id)] + ([] if field_name is None else [("field", field_name)])
        return await self._connections.get(server, path(f"{V1}/query/profile", query=query))

    async def query_keys(self, server: str, device_keys: dict[str, list[str]]) -> dict[str, Any]:
        answer = await self._connections.send(server, "POST", f"{V1}/user/keys/query", {"device_keys": device_keys})
        for name in ("device_keys", "master_keys", "self_signing_keys"):
            _object(server, answer, name, optional=name != "device_keys")
        return answer

    async def claim_keys(self, server: str, one_time_keys: dict[str, dict[str, str]]) -> dict[str, Any]:
        content = {"one_time_keys": one_time_keys}
        answer = await self._connections.send(server, "POST", f"{V1}/user/keys/claim", content)
        _object(server, answer, "one_time_keys")
        return answer

    async def user_devices(self, server: str, user_id: str) -> dict[str, Any]:
        answer = await self._connections.get(server, path(f"{V1}/user/devices", user_id))
        _pdus(server, answer, "devices")
        if type(answer.get("stream_id")) is not int or answer.get("user_id") != user_id:
            raise RemoteError(server, 200, "its list of devices is for another user, or has no stream_id")
        return answer

    async def media(self, server: str, media_id: str, most_bytes: int) -> RemoteMedia:
        return await media.fetch(self._connections, server, media_id, most_bytes)

    async def policy_signature(self, server: str, event: Event) -> dict[str, Any]:
        """By the path of 1.18, and where that is unknown by the one before it."""
        try:
            return await self._connections.send(server, "POST", "/_matrix/policy/v1/sign", event.raw, forced=True)
        except RemoteError as error:
            if error.errcode != "M_UNRECOGNIZED" and not (error.status in (404, 405) and not error.body):
                raise
        unstable = "/_matrix/policy/unstable/org.matrix.msc4284/sign"
        return await self._connections.send(server, "POST", unstable, event.raw, forced=True)

    # --- signatures

    async def verified(self, events: Sequence[Event]) -> list[bool]:
        return await self._keyring.verified(events)

    async def verified_json(self, server: str, value: dict[str, Any]) -> bool:
        return await self._keyring.verified_json(server, value)


def _flag(value: bool) -> str:
    return "true" if value else "false"


def _object(server: str, answer: dict[str, Any], name: str, *, optional: bool = False) -> dict[str, Any]:
    value = answer.get(name, {} if optional else None)
    if not isinstance(value, dict):
        raise RemoteError(server, 200, f"{name} in its answer is not an object")
    return value


def _pdus(server: str, answer: dict[str, Any], name: str, *, optional: bool = False) -> list[dict[str, Any]]:
    value = answer.get(name, [] if optional else None)
    if not isinstance(value, list) or not all(type(item) is dict for item in value):
        raise RemoteError(server, 200, f"{name} in its answer is not a list of objects")
    return value


def _raw_pdus(server: str, given: Sequence[msgspec.Raw]) -> list[RawPdu]:
    found: list[RawPdu] = [memoryview(raw) for raw in given]
    if not all(raw[:1] == b"{" for raw in found):
        raise RemoteError(server, 200, "something in its answer's lists is not an object")
    return found


def _event_ids(server: str, answer: dict[str, Any], name: str) -> list[str]:
    value = answer.get(name)
    if not isinstance(value, list) or not all(is_event_id(item) for item in value):
        raise RemoteError(server, 200, f"{name} in its answer is not a list of event IDs")
    return value


def _names(value: list[Any]) -> list[str]:
    return [name for name in value[:MAX_SERVERS] if is_server_name(name)]
