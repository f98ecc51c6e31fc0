"""Requests that nothing is wrong with, one for each endpoint that reads something, and the means to spoil them in one place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import quote

from tests.fuzz.oddities import as_json
from tests.fuzz.place import Place
from tests.people import ciphertext

V3 = "/_matrix/client/v3"
Json = dict[str, Any]


@dataclass(frozen=True)
class Decent:
    method: str
    start: str
    segments: tuple[str, ...]
    body: Any = None
    query: dict[str, str] = field(default_factory=dict)

    def where(self) -> str:
        path = "/".join((self.start, *(quote(segment, safe="") for segment in self.segments)))
        # Nobody waits for long here.
        pairs = [
            f"{quote(name)}={quote(value)}" for name, value in self.query.items() if name != "timeout" or len(value) < 3
        ]
        return path + ("?" + "&".join(pairs) if pairs else "")

    def raw(self) -> bytes | None:
        return None if self.body is None else as_json(self.body)

    def words(self) -> tuple[str, ...]:
        return tuple(sorted({str(spot[-1]) for spot in _spots(self.body) if spot} | {"type", "content"}))

    def with_body(self, choose: Callable[[Sequence[Any]], Any], value: Any) -> Decent:
        """One place of the body changed: its value, or the key under which it stands."""
        spot = choose(list(_spots(self.body)))
        if not spot:
            return replace(self, body=value)
        body = copy.deepcopy(self.body)
        inner = body
        for step in spot[:-1]:
            inner = inner[step]
        if isinstance(inner, dict) and isinstance(value, str) and choose((True, False, False)):
            inner[value] = inner.pop(spot[-1])
        else:
            inner[spot[-1]] = value
        return replace(self, body=body)

    def with_query(self, name: str, value: str) -> Decent:
        return replace(self, query={**self.query, name: value})

    def with_segment(self, number: int, value: str) -> Decent:
        return replace(self, segments=(*self.segments[:number], value, *self.segments[number + 1 :]))


def _spots(value: Any) -> Iterator[tuple[Any, ...]]:
    yield ()
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, below in inner:
        for spot in _spots(below):
            yield (step, *spot)


def decent_requests(place: Place, area: str) -> list[Decent]:
    return [_of(method, path, *rest) for method, path, *rest in AREAS[area](place)]


def _of(method: str, path: tuple[str, ...], body: Any = None, query: Json | None = None) -> Decent:
    start, *segments = path
    # At least one segment can be spoiled: the last one of the fixed part, where there is no other.
    if not segments:
        start, _, last = start.rpartition("/")
        segments = [last]
    return Decent(method, start, tuple(segments), body, {name: str(value) for name, value in (query or {}).items()})


def _accounts(place: Place) -> list[Any]:
    me = place.thrower
    password = {
        "type": "m.login.password",
        "identifier": {"type": "m.id.user", "user": me.name},
        "password": me.password,
    }
    return [
        ("POST", (f"{V3}/login",), {**password, "device_id": "D", "initial_device_display_name": "x", "refresh_token": True}),
        ("POST", (f"{V3}/register",), {
            "username": f"new{place.fresh()}", "password": "long enough for this", "auth": {"type": "m.login.dummy"}, "device_id": "D",
            "initial_device_display_name": "x", "refresh_token": True, "inhibit_login": False}, {"kind": "user"}),
        ("GET", (f"{V3}/register/available",), None, {"username": f"new{place.fresh()}"}),
        ("PUT", (f"{V3}/devices", me.device), {"display_name": "phone"}),
        ("POST", (f"{V3}/delete_devices",), {"devices": ["GONE"], "auth": password}),
        ("POST", (f"{V3}/account/password",), {"new_password": me.password, "logout_devices": False, "auth": password}),
    ]  # fmt: skip


def _rooms(place: Place) -> list[Any]:
    room, other = place.room, place.quiet.id
    state = (f"{V3}/rooms", room, "state")
    levels = {
        "users": {place.thrower.id: 100},
        "users_default": 0,
        "events": {"m.room.name": 50},
        "ban": 50,
        "notifications": {"room": 50},
    }
    if place.version == "12":
        del levels["users"]
    return [
        ("POST", (f"{V3}/createRoom",), {
            "preset": "private_chat", "name": "n", "topic": "t", "invite": [other], "is_direct": True, "visibility": "private", "room_version": "12",
            "room_alias_name": f"a{place.fresh()}", "creation_content": {"m.federate": True, "additional_creators": [other]},
            "initial_state": [{"type": "m.room.history_visibility", "state_key": "", "content": {"history_visibility": "joined"}}],
            "power_level_content_override": {"events_default": 0}}),
        ("PUT", (f"{V3}/rooms", room, "send", "m.room.encrypted", f"t{place.fresh()}"), ciphertext(**{"m.relates_to": {
            "rel_type": "m.thread", "event_id": place.event, "m.in_reply_to": {"event_id": place.event}, "is_falling_back": True}})),
        ("PUT", (*state, "m.room.power_levels", ""), levels),
        ("PUT", (*state, "m.room.name", ""), {"name": "n"}),
        ("PUT", (*state, "m.room.join_rules", ""), {"join_rule": "restricted", "allow": [{"type": "m.room_membership", "room_id": room}]}),
        ("PUT", (*state, "m.room.server_acl", ""), {"allow": ["*"], "deny": ["evil.example"], "allow_ip_literals": True}),
        ("PUT", (*state, "m.room.encryption", ""), {"algorithm": "m.megolm.v1.aes-sha2", "rotation_period_ms": 1000}),
        ("PUT", (*state, "m.room.canonical_alias", ""), {}),
        ("PUT", (*state, "m.room.history_visibility", ""), {"history_visibility": "shared"}),
        ("PUT", (*state, "m.room.member", place.thrower.id), {"membership": "join", "displayname": "x"}),
        ("PUT", (f"{V3}/rooms", room, "redact", place.spare_event, f"t{place.fresh()}"), {"reason": "r"}),
        ("POST", (f"{V3}/rooms", room, "ban"), {"user_id": place.banned, "reason": "r"}),
        ("POST", (f"{V3}/join", room), {"reason": "r"}, {"via": place.thrower.server}),
        ("PUT", (f"{V3}/directory/room", f"#b{place.fresh()}:{place.thrower.server}"), {"room_id": room}),
        ("PUT", (f"{V3}/directory/list/room", room), {"visibility": "public"}),
        ("POST", (f"{V3}/publicRooms",), {"limit": 1, "filter": {"generic_search_term": "x", "room_types": [None, "m.space"]}}),
    ]  # fmt: skip


def _reading(place: Place) -> list[Any]:
    room, event = place.room, place.event
    some = '{"limit":3,"types":["m.*"],"not_senders":[],"lazy_load_members":true,"contains_url":false}'
    whole = '{"room":{"timeline":{"limit":2,"types":["*"]},"state":{"lazy_load_members":true},"rooms":[]},"event_fields":["content"]}'
    return [
        ("GET", (f"{V3}/rooms", room, "messages"), None, {"dir": "b", "limit": 2, "filter": some, "from": place.token}),
        ("GET", (f"{V3}/rooms", room, "messages"), None, {"dir": "f", "from": place.token, "to": place.token}),
        ("GET", (f"{V3}/rooms", room, "context", event), None, {"limit": 2, "filter": some}),
        ("GET", (f"{V3}/rooms", room, "event", event)),
        ("GET", (f"{V3}/rooms", room, "members"), None, {"at": place.token, "membership": "join", "not_membership": "ban"}),
        ("GET", (f"{V3}/rooms", room, "state", "m.room.create", ""), None, {"format": "event"}),
        ("GET", ("/_matrix/client/v1/rooms", room, "relations", event, "m.thread", "m.room.encrypted"), None, {"dir": "b", "limit": 1, "recurse": "true"}),
        ("GET", ("/_matrix/client/v1/rooms", room, "threads"), None, {"include": "participated", "limit": 1}),
        ("GET", (f"{V3}/sync",), None, {"since": place.since, "filter": whole, "full_state": "true", "set_presence": "online", "timeout": 0}),
        ("GET", (f"{V3}/sync",), None, {"since": place.since, "use_state_after": "true"}),
        ("GET", (f"{V3}/keys/changes",), None, {"from": place.since, "to": place.since}),
        ("GET", (f"{V3}/publicRooms",), None, {"limit": 2}),
    ]  # fmt: skip


def _people(place: Place) -> list[Any]:
    me = place.thrower.id
    part = {
        "limit": 1,
        "types": ["m.room.*"],
        "not_types": [],
        "senders": [me],
        "rooms": [place.room],
        "not_rooms": [],
        "contains_url": True,
    }
    return [
        ("PUT", (f"{V3}/profile", me, "displayname"), {"displayname": "x"}),
        ("PUT", (f"{V3}/profile", me, "avatar_url"), {"avatar_url": f"mxc://{place.thrower.server}/abc"}),
        ("PUT", (f"{V3}/profile", me, "m.tz"), {"m.tz": "Europe/Berlin"}),
        ("PUT", (f"{V3}/user", me, "account_data", "m.direct"), {me: [place.room]}),
        ("PUT", (f"{V3}/user", me, "account_data", "m.ignored_user_list"), {"ignored_users": {"@x:y": {}}}),
        ("PUT", (f"{V3}/user", me, "rooms", place.room, "account_data", "x.y"), {"a": [1, {"b": None}]}),
        ("PUT", (f"{V3}/user", me, "rooms", place.room, "tags", "u.x"), {"order": 0.5}),
        ("POST", (f"{V3}/user", me, "filter"), {
            "event_fields": ["content.body"], "event_format": "client", "presence": part, "account_data": part,
            "room": {"timeline": part, "state": {**part, "lazy_load_members": True, "include_redundant_members": True}, "ephemeral": part,
                     "account_data": part, "include_leave": True, "rooms": [place.room], "not_rooms": []}}),
        ("POST", (f"{V3}/user_directory/search",), {"search_term": "quiet", "limit": 2}),
    ]  # fmt: skip


def _keys(place: Place) -> list[Any]:
    me, device, other = place.thrower.id, place.thrower.device, place.quiet.id
    algorithms = ["m.olm.v1.curve25519-aes-sha2", "m.megolm.v1.aes-sha2"]
    signature = {me: {f"ed25519:{device}": "A" * 86}}
    one_time = {"key": "B" * 43, "signatures": signature}
    backed_up = {
        "first_message_index": 0,
        "forwarded_count": 0,
        "is_verified": True,
        "session_data": {"ephemeral": "QUJD" * 10, "ciphertext": "QUJD" * 20, "mac": "QUJDREVGR0g"},
    }
    auth_data = {"public_key": "A" * 43, "signatures": signature}
    return [
        ("POST", (f"{V3}/keys/upload",), {
            "device_keys": {"user_id": me, "device_id": device, "algorithms": algorithms,
                            "keys": {f"ed25519:{device}": "A" * 43, f"curve25519:{device}": "B" * 43}, "signatures": signature},
            "one_time_keys": {f"signed_curve25519:K{place.fresh()}": one_time},
            "fallback_keys": {f"signed_curve25519:F{place.fresh()}": {**one_time, "fallback": True}}}),
        ("POST", (f"{V3}/keys/query",), {"device_keys": {me: [device], other: []}, "timeout": 10}),
        ("POST", (f"{V3}/keys/claim",), {"one_time_keys": {me: {device: "signed_curve25519"}}, "timeout": 10}),
        ("POST", (f"{V3}/keys/signatures/upload",), {me: {device: {
            "user_id": me, "device_id": device, "algorithms": algorithms, "keys": {f"ed25519:{device}": "A" * 43}, "signatures": signature}}}),
        ("PUT", (f"{V3}/sendToDevice", "m.room.encrypted", f"t{place.fresh()}"), {"messages": {other: {"*": {
            "algorithm": algorithms[0], "sender_key": "QUJD", "ciphertext": {"QUJD": {"type": 0, "body": "QUJD"}}, "org.matrix.msgid": "1"}}}}),
        ("PUT", (f"{V3}/sendToDevice", "m.room_key_request", f"t{place.fresh()}"), {"messages": {other: {"D": {
            "action": "request_cancellation", "requesting_device_id": device, "request_id": "1"}}}}),
        ("PUT", (f"{V3}/room_keys/keys",), {"rooms": {place.room: {"sessions": {"s": backed_up}}}}, {"version": place.backup}),
        ("PUT", (f"{V3}/room_keys/keys", place.room, "s"), backed_up, {"version": place.backup}),
        ("GET", (f"{V3}/room_keys/keys", place.room), None, {"version": place.backup}),
        ("POST", (f"{V3}/keys/device_signing/upload",), {"master_key": {"user_id": me, "usage": ["master"], "keys": {"ed25519:" + "M" * 43: "M" * 43}}}),
        ("POST", (f"{V3}/room_keys/version",), {"algorithm": "m.megolm_backup.v1.curve25519-aes-sha2", "auth_data": auth_data}),
    ]  # fmt: skip


def _ephemeral(place: Place) -> list[Any]:
    return [
        ("POST", (f"{V3}/rooms", place.room, "receipt", "m.read", place.event), {"thread_id": "main"}),
        ("POST", (f"{V3}/rooms", place.room, "read_markers"), {"m.fully_read": place.event, "m.read": place.event, "m.read.private": place.event}),
        ("PUT", (f"{V3}/rooms", place.room, "typing", place.thrower.id), {"typing": True, "timeout": 1000}),
    ]  # fmt: skip


def _push(place: Place) -> list[Any]:
    conditions = [{"kind": "event_match", "key": "type", "pattern": "m.*"}, {"kind": "room_member_count", "is": ">2"},
                  {"kind": "event_property_is", "key": "content.x", "value": 1}, {"kind": "sender_notification_permission", "key": "room"}]  # fmt: skip
    rules = f"{V3}/pushrules/global"
    return [
        ("PUT", (rules, "override", "mine"), {"actions": ["notify", {"set_tweak": "sound", "value": "default"}], "conditions": conditions}),
        ("PUT", (rules, "content", "word"), {"actions": ["notify"], "pattern": "x*"}),
        ("PUT", (rules, "override", ".m.rule.master", "enabled"), {"enabled": False}),
        ("PUT", (rules, "override", ".m.rule.master", "actions"), {"actions": []}),
        ("GET", (rules, "override", ".m.rule.master", "actions")),
    ]  # fmt: skip


def _media(place: Place) -> list[Any]:
    server, media_id = place.media.removeprefix("mxc://").split("/")
    new = "/_matrix/client/v1/media"
    return [
        ("GET", (f"{new}/download", server, media_id), None, {"timeout_ms": 1, "allow_remote": "false"}),
        ("GET", (f"{new}/download", server, media_id, "a name.txt")),
        ("GET", (f"{new}/config",)),
    ]  # fmt: skip


AREAS: dict[str, Callable[[Place], list[Any]]] = {
    "accounts": _accounts, "rooms": _rooms, "reading": _reading, "people": _people, "keys": _keys, "ephemeral": _ephemeral,
    "push": _push, "media": _media,
}  # fmt: skip
