"""Tells the operator's programs what happens to cases: thin, signed, from a queue on disk.

What is told has a type, a case, its category and state, and no person, no room and no word of anybody. It is queued in the
write that it tells of, so that a crash loses nothing, and tried again for about three days. A 410 ends it for that target.
Of cases of the category `minor` only that there is an urgent one. Spec: Standard Webhooks 1.0.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import orjson
import structlog

from relay.clock import HOUR, MINUTE, SECOND, Clock, rest
from relay.config.hooks import WebhookTarget
from relay.db import Database, Query, Row, Tx
from relay.errors import NotFound, RemoteError
from relay.moderation import signatures
from relay.moderation.acts import Act
from relay.part import Part
from relay.remote import Posts
from relay.tables import Schema, Table

log = structlog.get_logger("webhooks")

# Standard Webhooks, "Deliverability and reliability": after each failed attempt the next wait.
WAITS_MS = (
    5 * SECOND, 5 * MINUTE, 30 * MINUTE, 2 * HOUR, 5 * HOUR, 10 * HOUR, 14 * HOUR, 20 * HOUR, 24 * HOUR,
)  # fmt: skip
TIMEOUT_SECONDS = 15.0
MAX_ANSWER_BYTES = 64 * 1024
MAX_AT_ONCE = 50
GONE = 410
LOOK_EVERY_SECONDS = 3_600.0
URGENT = "report.urgent"
SECRET_CATEGORY = "minor"

_LIFE = "until it is delivered, about three days at most"


@dataclass(frozen=True, slots=True)
class _Waiting:
    target: str
    pos: int
    message_id: str
    body: bytes
    attempt: int
    due_ts: int


class Webhooks(Part):
    schema = Schema(
        "webhooks",
        tables=(
            Table(
                "webhook_queue",
                "what a program of the operator's is still to be told",
                {
                    "target": ("which program, by its name in the config", _LIFE),
                    "pos": ("the order of what is told", _LIFE),
                    "message_id": ("its ID, the same at each attempt", _LIFE),
                    "body": ("type, time, case, category, state; no person and no text", _LIFE),
                    "attempt": ("how often it was tried", _LIFE),
                    "due_ts": ("when it is tried next", _LIFE),
                },
            ),
            Table(
                "webhooks_off",
                "a program that wants to be told no more",
                {
                    "target": ("which program", "until it is switched on again"),
                    "url": ("where it was; another address counts as another program", "until it is switched on again"),
                },
            ),
        ),
        steps=(
            """
            CREATE TABLE webhook_queue (target TEXT NOT NULL, pos BIGINT NOT NULL, message_id TEXT NOT NULL, body BYTES NOT NULL,
                attempt SMALLINT NOT NULL, due_ts BIGINT NOT NULL, PRIMARY KEY (target, pos));
            CREATE INDEX webhook_queue_by_time ON webhook_queue (target, due_ts);
            CREATE TABLE webhooks_off (target TEXT PRIMARY KEY, url TEXT NOT NULL)
            """,
        ),
    )

    def __init__(
        self, db: Database, clock: Clock, targets: Sequence[WebhookTarget], outside: Posts, anywhere: Posts
    ) -> None:
        """`outside` reaches public addresses only, `anywhere` also this machine and private networks."""
        self._db = db
        self._clock = clock
        self._targets = {one.name: one for one in targets}
        self._outside = outside
        self._anywhere = anywhere
        self._off: set[str] = set()
        self._woken = {name: asyncio.Event() for name in self._targets}
        self._counts = {name: [0, 0, 0] for name in self._targets}  # delivered, failed, given up

    def commands(self) -> Mapping[str, Callable[..., Awaitable[Any]]]:
        return {"webhooks.status": self.status, "webhooks.enable": self.enable_command}

    async def open(self) -> None:
        """Which of the targets have asked not to be told any more."""
        rows = await self._db.read(lambda query: query.all("SELECT target, url FROM webhooks_off"))
        self._off = {name for name, url in rows if name in self._targets and self._targets[name].url == url}

    # --- telling

    def announce(
        self,
        tx: Tx,
        type: str,
        *,
        case_id: str | None = None,
        category: str | None = None,
        state: str | None = None,
        detail: Mapping[str, Any] | None = None,
    ) -> None:
        """Inside the write of what is told. `detail` holds numbers, hashes and words of fixed lists only."""
        if category == SECRET_CATEGORY:
            if type != "report.created":
                return
            type, category, state, detail = URGENT, None, None, None
        wanted = [one for one in self._targets.values() if one.name not in self._off and _wants(one, type)]
        if not wanted:
            return
        now = self._clock.now()
        given = {"report_id": case_id, "category": category, "state": state, **(detail or {})}
        body = orjson.dumps(
            {
                "type": type,
                "timestamp": datetime.fromtimestamp(now / SECOND, UTC)
                .isoformat(timespec="seconds")
                .replace("+00:00", "Z"),
                "data": {key: value for key, value in given.items() if value is not None},
            }
        )
        pos = tx.pos()
        for one in wanted:
            message_id = f"msg_{secrets.token_urlsafe(18)}"
            # Whoever announces may not know the category: of `minor` nothing goes out but that there is an urgent case.
            tx.run(
                "INSERT INTO webhook_queue (target, pos, message_id, body, attempt, due_ts) SELECT $1, $2, $3, $4, 0, $5 "
                "WHERE NOT EXISTS (SELECT 1 FROM cases WHERE case_id = $6 AND category = 'minor')",
                one.name, pos, message_id, body, now, "" if type == URGENT else case_id or "",
            )  # fmt: skip
            tx.after(self._woken[one.name].set)

    def act_taken(self, tx: Tx, act: Act) -> None:
        """For `Actions.on_taken`."""
        self.announce(tx, "action.taken", case_id=act.case_id, detail={"action": act.word, "automated": act.is_machine})

    # --- delivering

    async def run(self) -> None:
        if not self._targets:
            return
        await self._forget_strangers()
        async with asyncio.TaskGroup() as group:
            for one in self._targets.values():
                group.create_task(self._lane(one), name="webhook")

    async def _forget_strangers(self) -> None:
        """What waits for programs that the config does not name any more."""
        names = await self._db.read(lambda query: query.all("SELECT DISTINCT target FROM webhook_queue"))
        gone = [(name,) for (name,) in names if name not in self._targets]
        if gone:
            with self._db.write() as tx:
                tx.many("DELETE FROM webhook_queue WHERE target = $1", gone)
            await tx

    async def _lane(self, target: WebhookTarget) -> None:
        woken = self._woken[target.name]
        while True:
            woken.clear()
            began, now = self._clock.monotonic(), self._clock.now()
            rows, following = await self._db.read(_due, target.name, now)
            for row in rows:
                await self._deliver(target, row)
            if not rows:
                wait = LOOK_EVERY_SECONDS if following is None else max(0.0, (following - now) / SECOND)
                await rest(self._clock, woken, min(wait, LOOK_EVERY_SECONDS), since=began)

    async def _deliver(self, target: WebhookTarget, row: _Waiting) -> None:
        posts = self._anywhere if target.allow_private_addresses else self._outside
        headers = signatures.headers(target.secrets, row.message_id, self._clock.now(), row.body)
        try:
            status, _ = await posts.post(
                target.url, row.body, timeout=TIMEOUT_SECONDS, most_bytes=MAX_ANSWER_BYTES, headers=headers
            )
        except RemoteError:
            status = 0
        counts = self._counts[target.name]
        with self._db.write() as tx:
            if 200 <= status < 300:
                counts[0] += 1
                tx.run("DELETE FROM webhook_queue WHERE target = $1 AND pos = $2", row.target, row.pos)
            elif status == GONE:
                log.warning("a webhook wants to be told no more", name=target.name)
                tx.run("DELETE FROM webhook_queue WHERE target = $1", row.target)
                tx.run(
                    "INSERT INTO webhooks_off (target, url) VALUES ($1, $2) ON CONFLICT (target) DO UPDATE SET url = excluded.url",
                    row.target, target.url,
                )  # fmt: skip
                tx.after(lambda: self._off.add(target.name))
            elif row.attempt >= len(WAITS_MS):
                counts[2] += 1
                log.error("a webhook could not be reached for days and was given up", name=target.name, status=status)
                tx.run("DELETE FROM webhook_queue WHERE target = $1 AND pos = $2", row.target, row.pos)
            else:
                counts[1] += 1
                log.info("a webhook was not taken and is tried again", name=target.name, status=status)
                tx.run(
                    "UPDATE webhook_queue SET attempt = attempt + 1, due_ts = $3 WHERE target = $1 AND pos = $2",
                    row.target, row.pos, self._clock.now() + WAITS_MS[row.attempt],
                )  # fmt: skip
        await tx

    # --- the operator

    async def status(self) -> list[dict[str, Any]]:
        waiting: dict[str, int] = dict(
            await self._db.read(lambda query: query.all("SELECT target, count(*) FROM webhook_queue GROUP BY target"))
        )
        return [
            {
                "name": name,
                "off": name in self._off,
                "waiting": waiting.get(name, 0),
                "delivered": delivered,
                "failed": failed,
                "given_up": given_up,
            }
            for name, (delivered, failed, given_up) in self._counts.items()
        ]

    async def check(self) -> list[dict[str, str]]:
        """For `relay check`."""
        return [
            {
                "severity": "warning",
                "what": f"The webhook {name} has asked to be told no more (410).",
                "todo": f"relay hooks enable {name} tells it again; or take it out of the config.",
            }
            for name in sorted(self._off)
        ]

    async def enable_command(self, *, webhook: str) -> dict[str, Any]:
        if webhook not in self._targets:
            raise NotFound(f"The config names no webhook {webhook}. It names: {', '.join(self._targets) or 'none'}.")
        with self._db.write() as tx:
            tx.run("DELETE FROM webhooks_off WHERE target = $1", webhook)
            tx.after(lambda: self._off.discard(webhook))
        await tx
        return {"name": webhook, "off": False}


def _wants(target: WebhookTarget, type: str) -> bool:
    return any(type == one or (one.endswith("*") and type.startswith(one[:-1])) for one in target.types)


def _due(query: Query, target: str, now: int) -> tuple[list[_Waiting], int | None]:
    """What is due, in order, and when the next one is."""
    rows: list[Row] = query.all(
        "SELECT target, pos, message_id, body, attempt, due_ts FROM webhook_queue WHERE target = $1 AND due_ts <= $2 "
        "ORDER BY pos LIMIT $3",
        target,
        now,
        MAX_AT_ONCE,
    )
    following = query.value("SELECT min(due_ts) FROM webhook_queue WHERE target = $1", target)
    return [_Waiting(t, pos, m, bytes(body), attempt, due) for t, pos, m, body, attempt, due in rows], following
