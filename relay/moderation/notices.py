"""Who is told what: rows written with what they tell of, spoken into the notice rooms a moment later, once.

A row names a recipient, a sentence of notice_words.py, a case and the link that goes with it. It is removed in the write that
appends the message, so a crash neither loses nor repeats one. Whoever has no account here, or a closed one, is not told by
this way: the page for appeals, or her own server, tells her.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

import orjson
import structlog

from relay.clock import DAY, MINUTE, Clock, rest
from relay.db import Database, Query, Tx
from relay.errors import ApiError, NotAllowed
from relay.moderation import notice_words as words
from relay.moderation.audit_log import Checkpoint
from relay.moderation.case_rows import Case, by_id
from relay.moderation.links import Links, Purpose
from relay.moderation.own_rooms import MODERATORS, OwnRooms
from relay.moderation.persons import Persons
from relay.part import Part
from relay.tables import Schema, Table

log = structlog.get_logger("notices")

MAX_AT_ONCE = 100
RETRY_MS = MINUTE
KEPT_MS = 14 * DAY
LOOK_EVERY_SECONDS = 60.0
_LIFE = "until it is said, 14 d at most"


@dataclass(frozen=True, slots=True)
class _Due:
    pos: int
    recipient: str
    sentence: str
    case_id: str | None
    fields: dict[str, Any]
    made_ts: int


class Notices(Part):
    schema = Schema(
        "notices",
        tables=(
            Table(
                "notices_due",
                "a sentence of the relay's own that is still to be said",
                {
                    "pos": ("the order", _LIFE),
                    "recipient": ("who hears it: a person here, or moderators", _LIFE),
                    "sentence": ("which of the fixed sentences", _LIFE),
                    "case_id": ("the case, whose number it names", _LIFE),
                    "fields": ("numbers and a link", _LIFE),
                    "made_ts": ("when it was made", _LIFE),
                    "not_before": ("when it is tried again", _LIFE),
                },
            ),
        ),
        steps=(
            """
            CREATE TABLE notices_due (pos BIGINT PRIMARY KEY, recipient TEXT NOT NULL, sentence TEXT NOT NULL, case_id TEXT,
                fields TEXT NOT NULL, made_ts BIGINT NOT NULL, not_before BIGINT NOT NULL)
            """,
        ),
    )

    def __init__(self, db: Database, clock: Clock, rooms: OwnRooms, links: Links, persons: Persons) -> None:
        self._db = db
        self._clock = clock
        self._rooms = rooms
        self._links = links
        self._persons = persons
        self._woken = asyncio.Event()

    # --- in the writes of others

    def tell(
        self,
        tx: Tx,
        recipient: str,
        sentence: str,
        case_id: str | None,
        *,
        link: tuple[Purpose, str] | None = None,
        **fields: Any,
    ) -> None:
        """`link` is a purpose and the token that was made for it; for moderators it is the case at the desk."""
        if link is not None:
            fields["link"] = self._links.address(*link)
        elif recipient == MODERATORS:
            fields.setdefault("link", self._links.of_desk(case_id))
        now = self._clock.now()
        tx.run(
            "INSERT INTO notices_due (pos, recipient, sentence, case_id, fields, made_ts, not_before) VALUES ($1, $2, $3, $4, $5, $6, $6)",
            tx.pos(), recipient, sentence, case_id, orjson.dumps(fields).decode(), now,
        )  # fmt: skip
        tx.after(self._woken.set)

    def changed(self, tx: Tx, happened: str, case: Case) -> None:
        """`Cases.on_change`: what moderators hear at once."""
        if happened == "report.created":
            # Of what may show a minor no more than that it is there.
            urgent = case.category == "minor"
            self.tell(tx, MODERATORS, words.URGENT_REPORT if urgent else words.NEW_REPORT, case.case_id)
        elif happened == "report.disclosed":
            self.tell(tx, MODERATORS, words.PROOF_CAME, case.case_id, state=case.disclosure)
        elif happened == "report.answered":
            self.tell(tx, MODERATORS, words.ANSWERED, case.case_id)
        elif happened == "report.sla_breach":
            self.tell(tx, MODERATORS, words.LATE, case.case_id)
        elif happened == "report.decided":
            self.tell(tx, MODERATORS, words.DECIDED, case.case_id)
        elif happened == "report.appealed":
            self.tell(tx, MODERATORS, words.APPEALED, case.case_id)
        elif happened == "report.peer_answered":
            self.tell(tx, MODERATORS, words.ANSWER_FROM_PEER, case.case_id)

    def checkpoint(self, tx: Tx, made: Checkpoint) -> None:
        """`AuditLog.on_checkpoint`: the members' clients hold a copy from then on."""
        signed = next(iter(made.json["signatures"].values()))
        key_id = made.json["key_id"]
        self.tell(
            tx, MODERATORS, words.CHECKPOINT, None,
            number=made.seq, hash=made.json["hash"], key_id=key_id, signature=signed[key_id],
        )  # fmt: skip

    def restored(self, tx: Tx, seq: int) -> None:
        """`AuditLog.on_restored`."""
        self.tell(tx, MODERATORS, words.RESTORED, None, number=seq)

    async def act_waits(self, _: object) -> None:
        """`Actions.on_waiting`."""
        with self._db.write() as tx:
            self.tell(tx, MODERATORS, words.WAITS, None)
        await tx

    async def keys_changed(self, _: object, new: Any) -> None:
        """`ModeratorKeys.on_change`."""
        with self._db.write() as tx:
            self.tell(tx, MODERATORS, words.KEYS_CHANGED, None, number=int(new.seq))
        await tx

    # --- saying

    async def run(self) -> None:
        while True:
            self._woken.clear()
            began = self._clock.monotonic()
            while await self._say_some():
                pass
            await rest(self._clock, self._woken, LOOK_EVERY_SECONDS, since=began)

    async def _say_some(self) -> bool:
        """Whether there may be more."""
        due = await self._db.read(_due, self._clock.now())
        for one in due:
            try:
                await self._say(one)
            except (ApiError, NotAllowed, ValueError) as error:
                log.warning("a notice could not be said yet", name=one.sentence, exc_info=error)
                await self._later(one)
        return len(due) == MAX_AT_ONCE

    async def _later(self, one: _Due) -> None:
        over = one.made_ts + KEPT_MS <= self._clock.now()
        with self._db.write() as tx:
            if over:
                tx.run("DELETE FROM notices_due WHERE pos = $1", one.pos)
            else:
                tx.run("UPDATE notices_due SET not_before = $2 WHERE pos = $1", one.pos, self._clock.now() + RETRY_MS)
        await tx

    async def _say(self, one: _Due) -> None:
        case = await self._db.read(by_id, one.case_id) if one.case_id is not None else None
        rooms = await self._hearers(one, case)
        if not rooms:
            # Nobody to tell. To moderators it is said once there is one.
            await (self._later(one) if one.recipient == MODERATORS else self._drop(one))
            return
        fields = dict(one.fields)
        if case is not None:
            fields |= {"number": case.number, "category": case.category, "day": _minute(case.due_ts)}
        last = len(rooms) - 1
        for number, (room, people) in enumerate(rooms):

            def said(tx: Tx, *, done: bool = number == last) -> None:
                if done:
                    tx.run("DELETE FROM notices_due WHERE pos = $1", one.pos)

            await self._rooms.say(room, people, one.sentence, fields, said)

    async def _hearers(self, one: _Due, case: Case | None) -> list[tuple[str, list[str]]]:
        """(whose room, who has to be in it). Of a case about a moderator nothing is said in the room where she reads too: the
        others hear of it each in her own."""
        if one.recipient != MODERATORS:
            return [(one.recipient, [one.recipient])] if await self._rooms.can_hear(one.recipient) else []
        everybody = sorted(await self._persons.at_work())
        if not everybody or case is None or case.user_id not in everybody:
            return [(MODERATORS, everybody)] if everybody else []
        return [(user_id, [user_id]) for user_id in everybody if user_id != case.user_id]

    async def _drop(self, one: _Due) -> None:
        with self._db.write() as tx:
            tx.run("DELETE FROM notices_due WHERE pos = $1", one.pos)
        await tx


def _due(query: Query, now: int) -> list[_Due]:
    rows = query.all(
        "SELECT pos, recipient, sentence, case_id, fields, made_ts FROM notices_due WHERE not_before <= $1 ORDER BY pos LIMIT $2",
        now,
        MAX_AT_ONCE,
    )
    return [
        _Due(pos, recipient, sentence, case_id, orjson.loads(fields), made)
        for pos, recipient, sentence, case_id, fields, made in rows
    ]


def _minute(ts: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(ts / 1000))
