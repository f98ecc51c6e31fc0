"""Rules that are asked over HTTP: the relay's own form, and the antispam protocol of Synapse's HTTP module (Draupnir).

Addresses come from the operator's file, so they may be on her own machine. A question never carries a person's address
or a text: of an event the envelope goes out, for the antispam protocol with its ciphertext, or redacted where it is clear.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import orjson
import structlog

from relay.clock import SECOND, Clock
from relay.config.hooks import Antispam as AntispamSettings
from relay.config.hooks import HttpHook as HttpHookSettings
from relay.errors import RemoteError
from relay.moderation import signatures
from relay.moderation.hook_points import (
    ALLOW,
    Asked,
    Envelope,
    Invite,
    Login,
    Point,
    Register,
    Verdict,
    as_json,
)
from relay.part import Part
from relay.protocol import event as events
from relay.remote import Posts

log = structlog.get_logger("hooks")

MAX_ANSWER_BYTES = 16 * 1024
MAX_WORD = 64
# For an antispam tool that is only told.
TOLD_SECONDS = 10.0
PING_SECONDS = 5.0
MAX_TOLD_WAITING = 1_000
MAX_TOLD_AT_ONCE = 8
_DECISIONS = ("allow", "deny", "quarantine", "challenge")


class BadAnswer(Exception):
    """A hook answered something that is no verdict."""


class HttpHook:
    def __init__(self, settings: HttpHookSettings, posts: Posts, clock: Clock) -> None:
        self.name = settings.name
        self._settings = settings
        self._posts = posts
        self._clock = clock

    def answers(self, point: str) -> bool:
        return point in self._settings.points

    async def ask(self, point: Point, asked: Asked) -> Verdict:
        message_id = f"msg_{secrets.token_urlsafe(18)}"
        body = orjson.dumps({"id": message_id, "point": point.name, "asked": as_json(point, asked)})
        secrets_ = self._settings.secrets
        headers = signatures.headers(secrets_, message_id, self._clock.now(), body) if secrets_ else None
        budget = self._settings.budget or point.budget_ms
        status, answer = await self._posts.post(
            self._settings.url, body, timeout=budget / SECOND, most_bytes=MAX_ANSWER_BYTES, headers=headers
        )
        if status != 200:
            raise BadAnswer(status)
        return verdict(answer)


def verdict(answer: bytes) -> Verdict:
    """From `{"decision": …, "errcode": …, "reason_code": …, "error": …}`. Raises BadAnswer."""
    try:
        given = orjson.loads(answer)
    except orjson.JSONDecodeError:
        raise BadAnswer("not JSON") from None
    if not isinstance(given, dict) or given.get("decision") not in _DECISIONS:
        raise BadAnswer("no decision")
    return Verdict(
        given["decision"], _word(given, "reason_code", ""), _word(given, "errcode", "M_FORBIDDEN"), _text(given)
    )


def _word(given: Mapping[str, Any], key: str, default: str) -> str:
    value = given.get(key)
    return value if isinstance(value, str) and value.isascii() and len(value) <= MAX_WORD else default


def _text(given: Mapping[str, Any]) -> str:
    value = given.get("error")
    return value if isinstance(value, str) else ""


# --- the antispam protocol -------------------------------------------------------------------------------------------

Body = dict[str, Any]


def _event(asked: Envelope) -> Body:
    """As a client would get it: ciphertext whole, everything else in its redacted form."""
    event = asked._event if asked.encrypted else events.redacted(asked._event)
    shown = {"event_id": event.id, "type": event.type, "room_id": event.room_id, "sender": event.sender,
             "origin_server_ts": event.origin_server_ts, "content": event.content}  # fmt: skip
    if event.state_key is not None:
        shown["state_key"] = event.state_key
    return {"event": shown}


def _federated_invite(asked: Invite) -> Body:
    return {
        "event": {
            "type": "m.room.member", "room_id": asked.room_id, "sender": asked.sender, "state_key": asked.target,
            "content": {"membership": "invite"},
        }
    }  # fmt: skip


def _login(asked: Login) -> Body:
    return {
        "user_id": asked.user_id,
        "device_id": None,
        "initial_display_name": None,
        "request_info": [],
        "auth_provider_id": None,
    }


def _register(asked: Register) -> Body:
    profile = {"user_id": asked.user_id, "display_name": None, "avatar_url": None}
    return {"user_profile": profile, "requester_id": asked.user_id}


_Callback = tuple[str, Callable[[Any], Body]]


def _invite(asked: Invite) -> Body:
    return {"inviter": asked.sender, "invitee": asked.target, "room_id": asked.room_id}


# Point -> (callback, its body). Of an invite from elsewhere Synapse asks both, and Draupnir answers only the plain one.
_FEDERATED_INVITE: _Callback = ("federated_user_may_invite", _federated_invite)
_CALLBACKS: dict[str, _Callback] = {
    "invite": ("user_may_invite", _invite),
    "federated_invite": ("user_may_invite", _invite),
    "join": ("user_may_join_room", lambda a: {"user": a.user_id, "room": a.room_id, "is_invited": a.invited}),
    "create_room": ("user_may_create_room", lambda a: {"user_id": a.user_id}),
    "alias": ("user_may_create_room_alias", lambda a: {"user_id": a.user_id, "room_alias": a.alias}),
    "publish": ("user_may_publish_room", lambda a: {"user_id": a.user_id, "room_id": a.room_id}),
    "register": ("check_username_for_spam", _register),
    "login": ("check_login_for_spam", _login),
    "state_event": ("check_event_for_spam", _event),
    "message": ("check_event_for_spam", _event),
}


class Antispam(Part):
    """2xx lets pass, anything else refuses with the error it names; see `synapse-http-antispam`."""

    name = "antispam"

    def __init__(self, settings: AntispamSettings, posts: Posts) -> None:
        self._settings = settings
        self._posts = posts
        self._told: asyncio.Queue[tuple[str, Body]] = asyncio.Queue(MAX_TOLD_WAITING)

    def answers(self, point: str) -> bool:
        return self._settings.url is not None and bool(self._callbacks(point))

    def _callbacks(self, point: str) -> list[_Callback]:
        """In the order in which they are asked, as far as they are wanted."""
        found = [_FEDERATED_INVITE] if point == "federated_invite" else []
        if point in _CALLBACKS:
            found.append(_CALLBACKS[point])
        return [one for one in found if one[0] in self._settings.callbacks]

    def ask(self, point: Point, asked: Asked) -> Verdict | Awaitable[Verdict]:
        if isinstance(asked, Invite) and not asked.room_id:
            return ALLOW  # the room is about to be made, and this is asked again when it is
        questions = []
        for callback, body_of in self._callbacks(point.name):
            if callback not in self._settings.told_only:
                questions.append((callback, body_of(asked)))
            elif self._told.full():
                log.warning("the antispam tool does not keep up, and is not told of everything", name=callback)
            else:
                self._told.put_nowait((callback, body_of(asked)))
        return self._ask_each(questions, point) if questions else ALLOW

    async def _ask_each(self, questions: list[tuple[str, Body]], point: Point) -> Verdict:
        for callback, body in questions:
            verdict = await self._ask(callback, body, point.budget_ms / SECOND / len(questions))
            if verdict is not ALLOW:
                return verdict
        return ALLOW

    async def _ask(self, callback: str, body: Body, seconds: float) -> Verdict:
        try:
            async with asyncio.timeout(seconds):
                status, answer = await self._post(callback, body, seconds)
            given = None if 200 <= status < 300 else orjson.loads(answer)
            if not 200 <= status < 300 and not isinstance(given, dict):
                raise BadAnswer("no object")
        except (RemoteError, TimeoutError, orjson.JSONDecodeError, BadAnswer):
            if callback in self._settings.fail_open:
                log.warning("the antispam tool could not be asked; it was let pass", name=callback)
                return ALLOW
            raise
        if given is None:
            return ALLOW
        return Verdict("deny", "antispam", _word(given, "errcode", "M_FORBIDDEN"), _text(given))

    async def _post(self, callback: str, body: Body, seconds: float) -> tuple[int, bytes]:
        return await self._posts.post(
            f"{str(self._settings.url).rstrip('/')}/{callback}", orjson.dumps(body), timeout=seconds,
            most_bytes=MAX_ANSWER_BYTES, headers={"Authorization": f"Bearer {self._settings.authorization}"},
        )  # fmt: skip

    async def check(self) -> list[dict[str, str]]:
        """For `relay check`: whether the tool is there and takes our token."""
        if self._settings.url is None:
            return []
        question = secrets.token_urlsafe(6)
        try:
            status, answer = await self._post("ping", {"id": question}, PING_SECONDS)
            given = orjson.loads(answer)
            if 200 <= status < 300 and isinstance(given, dict) and given.get("id") == question:
                return []
        except (RemoteError, orjson.JSONDecodeError):
            pass
        what = "The antispam tool of hooks.antispam does not answer its ping."
        todo = "Start it, and compare hooks.antispam.url and authorization with its config."
        return [{"severity": "warning", "what": what, "todo": todo}]

    async def run(self) -> None:
        """Those that are only told."""
        if not self._settings.told_only or self._settings.url is None:
            return
        async with asyncio.TaskGroup() as group:
            for _ in range(MAX_TOLD_AT_ONCE):
                group.create_task(self._tell(), name="antispam")

    async def _tell(self) -> None:
        while True:
            callback, body = await self._told.get()
            try:
                await self._post(callback, body, TOLD_SECONDS)
            except RemoteError:
                log.warning("the antispam tool could not be told", name=callback)
