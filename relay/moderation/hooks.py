"""Asks the operator's rules: in order, each within its budget; the first that does not let pass counts.

A hook that fails or is too slow counts as `on_failure` says; after five failures in a row it is left alone for a minute
(the breaker), so that a dead one costs its budget five times and then nothing. A deny is remembered for a minute.
Where no hook is configured none of this stands in the way: `HookDoors` is not built.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Protocol

import structlog

from relay.clock import MINUTE, SECOND, Clock
from relay.doors import OpenDoors
from relay.errors import ApiError, Forbidden
from relay.ids import server_of
from relay.moderation.hook_points import (
    ALLOW,
    POINTS,
    Alias,
    Asked,
    CreateRoom,
    Envelope,
    Failing,
    Hook,
    Invite,
    Join,
    Knock,
    Login,
    MaybeLater,
    Media,
    Point,
    Publish,
    Register,
    Transaction,
    Verdict,
)
from relay.protocol.event import Event

log = structlog.get_logger("hooks")

FAILURES_BEFORE_REST = 5
REST_SECONDS = 60.0
DENIES_KEPT_SECONDS = 60.0
MAX_DENIES_KEPT = 10_000
CHALLENGE_MS = MINUTE
MAX_TEXT = 300


class Rule(Protocol):
    """One that is asked: a plug-in, an HTTP hook, the antispam protocol."""

    name: str

    def answers(self, point: str) -> bool: ...
    def ask(self, point: Point, asked: Asked) -> MaybeLater: ...


class Plugin:
    """A `Hook` object as a rule. Points whose method it does not override are never asked."""

    def __init__(self, name: str, hook: Hook) -> None:
        self.name = name
        self._methods: dict[str, Callable[[Any], MaybeLater]] = {
            point: getattr(hook, f"check_{point}")
            for point in POINTS
            if getattr(type(hook), f"check_{point}", None) is not getattr(Hook, f"check_{point}")
        }

    def answers(self, point: str) -> bool:
        return point in self._methods

    def ask(self, point: Point, asked: Asked) -> MaybeLater:
        return self._methods[point.name](asked)


@dataclass(slots=True)
class _Kept:
    """One rule and how it has behaved."""

    rule: Rule
    on_failure: Failing | None
    budget_ms: int | None
    failures_in_a_row: int = 0
    rests_until: float = 0.0
    asked: int = 0
    refused: int = 0
    failed: int = 0
    seconds: float = 0.0
    denies: OrderedDict[tuple[str, Asked], tuple[float, Verdict]] = field(default_factory=OrderedDict)


class Hooks:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._kept: list[_Kept] = []
        self._at: dict[str, list[_Kept]] = {}

    def add(self, rule: Rule, *, on_failure: Failing | None = None, budget_ms: int | None = None) -> None:
        """None takes what the table of points says."""
        kept = _Kept(rule, on_failure, budget_ms)
        self._kept.append(kept)
        for point in POINTS:
            if rule.answers(point):
                self._at.setdefault(point, []).append(kept)

    def asked_at(self, point: str) -> bool:
        return point in self._at

    def __bool__(self) -> bool:
        return bool(self._kept)

    async def ask(self, point: Point, asked: Asked) -> Verdict:
        for kept in self._at.get(point.name, ()):
            verdict = await self._ask_one(kept, point, asked)
            if verdict.decision != "allow":
                kept.refused += 1
                return verdict
        return ALLOW

    async def _ask_one(self, kept: _Kept, point: Point, asked: Asked) -> Verdict:
        if kept.rests_until and self._clock.monotonic() < kept.rests_until:
            return self._failing(kept, point)
        if point.remembered and kept.denies and (known := self._remembered(kept, point, asked)) is not None:
            return known
        kept.asked += 1
        began = perf_counter()
        try:
            answer = kept.rule.ask(point, asked)
            if isinstance(answer, Awaitable):
                async with asyncio.timeout((kept.budget_ms or point.budget_ms) / SECOND):
                    answer = await answer
        except Exception as error:
            return self._failed(kept, point, error)
        finally:
            kept.seconds += perf_counter() - began
        kept.failures_in_a_row = 0
        kept.rests_until = 0.0
        if answer is None or answer.decision == "allow":
            return ALLOW
        if point.remembered and answer.decision == "deny":
            kept.denies[(point.name, asked)] = (self._clock.monotonic() + DENIES_KEPT_SECONDS, answer)
            while len(kept.denies) > MAX_DENIES_KEPT:
                kept.denies.popitem(last=False)
        return answer

    def _remembered(self, kept: _Kept, point: Point, asked: Asked) -> Verdict | None:
        known = kept.denies.get((point.name, asked))
        if known is None:
            return None
        if known[0] < self._clock.monotonic():
            del kept.denies[(point.name, asked)]
            return None
        return known[1]

    def _failed(self, kept: _Kept, point: Point, error: Exception) -> Verdict:
        kept.failed += 1
        kept.failures_in_a_row += 1
        if kept.failures_in_a_row >= FAILURES_BEFORE_REST:
            kept.rests_until = self._clock.monotonic() + REST_SECONDS
            log.error(
                "a hook has failed too often and is left alone for a while", name=kept.rule.name, stage=point.name,
                seconds=int(REST_SECONDS), exc_info=error,
            )  # fmt: skip
        else:
            log.warning("a hook failed or was too slow", name=kept.rule.name, stage=point.name, exc_info=error)
        return self._failing(kept, point)

    def _failing(self, kept: _Kept, point: Point) -> Verdict:
        if (kept.on_failure or point.on_failure) == "open":
            return ALLOW
        return Verdict(
            "deny", "hook_failed", "M_UNKNOWN",
            "A rule of this server could not be asked, and without it this is not allowed. Try again in a minute.",
        )  # fmt: skip

    async def status(self) -> list[dict[str, Any]]:
        """For the operator: who is asked where, and how it went since the start."""
        now = self._clock.monotonic()
        return [
            {
                "name": kept.rule.name,
                "points": [point for point in POINTS if kept.rule.answers(point)],
                "asked": kept.asked,
                "refused": kept.refused,
                "failed": kept.failed,
                "seconds": round(kept.seconds, 6),
                "resting": kept.rests_until > now,
            }
            for kept in self._kept
        ]


class HookDoors(OpenDoors):
    """The doors of the house, as far as a hook stands at one."""

    def __init__(self, hooks: Hooks, server_name: str) -> None:
        self._hooks = hooks
        self._server_name = server_name
        # Whether a local user is invited to a room; the server sets it.
        self.is_invited: Callable[[str, str], bool] = lambda user_id, room_id: False
        # Keeps a file from everybody: a hook wants a moderator to look first; the server sets it.
        self.quarantine: Callable[[str], Awaitable[None]] | None = None

    async def _require(self, name: str, asked: Asked) -> None:
        verdict = await self._hooks.ask(POINTS[name], asked)
        if verdict.decision != "allow":
            raise refusal(verdict)

    async def register(self, user_id: str) -> None:
        if self._hooks.asked_at("register"):
            await self._require("register", Register(user_id))

    async def login(self, user_id: str) -> None:
        if self._hooks.asked_at("login"):
            await self._require("login", Login(user_id))

    async def create_room(self, user_id: str, content: dict[str, Any]) -> None:
        if self._hooks.asked_at("create_room"):
            room_type = content.get("type")
            await self._require("create_room", CreateRoom(user_id, room_type if isinstance(room_type, str) else None))

    async def invite(self, sender: str, target: str, room_id: str) -> None:
        name = "invite" if server_of(sender) == self._server_name else "federated_invite"
        if self._hooks.asked_at(name):
            await self._require(name, Invite(sender, target, room_id))

    async def join(self, user_id: str, room_id: str) -> None:
        if self._hooks.asked_at("join"):
            await self._require("join", Join(user_id, room_id, self.is_invited(user_id, room_id)))

    async def knock(self, user_id: str, room_id: str) -> None:
        if self._hooks.asked_at("knock"):
            await self._require("knock", Knock(user_id, room_id))

    async def alias(self, user_id: str, alias: str, room_id: str) -> None:
        if self._hooks.asked_at("alias"):
            await self._require("alias", Alias(user_id, alias, room_id))

    async def publish_room(self, user_id: str, room_id: str) -> None:
        if self._hooks.asked_at("publish"):
            await self._require("publish", Publish(user_id, room_id))

    async def send(self, event: Event) -> None:
        if event.membership == "invite" and event.state_key is not None:
            # A local target was asked about at the invite's own door.
            if server_of(event.state_key) != self._server_name:
                await self.invite(event.sender, event.state_key, event.room_id)
        await self._event(event, self._server_name)

    async def receive(self, origin: str, event: Event) -> None:
        await self._event(event, origin)

    async def _event(self, event: Event, origin: str) -> None:
        name = "message" if event.state_key is None else "state_event"
        if self._hooks.asked_at(name):
            await self._require(name, envelope(event, origin))

    async def transaction(self, origin: str) -> None:
        if self._hooks.asked_at("transaction"):
            await self._require("transaction", Transaction(origin))

    @property
    def wants_files(self) -> bool:
        return self._hooks.asked_at("media")

    async def file(self, user_id: str, mxc_uri: str, size: int, sha256: str) -> None:
        """Before a file that came whole is kept."""
        if not self._hooks.asked_at("media"):
            return
        verdict = await self._hooks.ask(POINTS["media"], Media(user_id, size, sha256))
        if verdict.decision == "quarantine" and self.quarantine is not None:
            await self.quarantine(mxc_uri)
        elif verdict.decision != "allow":
            raise refusal(verdict)


def envelope(event: Event, origin: str) -> Envelope:
    return Envelope(
        event.id, event.room_id, event.type, event.sender, event.state_key, event.origin_server_ts, len(event.raw),
        event.type == "m.room.encrypted", origin, event,
    )  # fmt: skip


def refusal(verdict: Verdict) -> ApiError:
    if verdict.decision == "challenge":
        return ApiError(
            verdict.text[:MAX_TEXT] or "This server asks you to wait a minute before you try that again.", status=429,
            errcode="M_LIMIT_EXCEEDED", retry_after_ms=CHALLENGE_MS, headers={"Retry-After": str(CHALLENGE_MS // SECOND)},
        )  # fmt: skip
    return Forbidden(
        verdict.text[:MAX_TEXT] or "A rule of this server does not allow this. Ask the people who run it.",
        errcode=verdict.errcode,
    )


def in_order(rules: Sequence[tuple[Rule, Failing | None, int | None]], clock: Clock) -> Hooks:
    hooks = Hooks(clock)
    for rule, on_failure, budget_ms in rules:
        hooks.add(rule, on_failure=on_failure, budget_ms=budget_ms)
    return hooks
