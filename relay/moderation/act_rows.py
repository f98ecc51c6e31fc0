"""Rows of acts that wait or run, and of strikes: their tables, and how a row becomes an act. `actions.py` decides."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from relay.clock import DAY
from relay.db import Query, Tx
from relay.moderation.acts import Act, Reasons
from relay.moderation.restrictions import TakenBack
from relay.tables import Schema, Table

WAITING, RUNNING, DONE = 0, 1, 2

SCHEMA = Schema(
    "actions",
    tables=(
        Table(
            "strikes",
            "a warning that counts for a while",
            {
                "strike_id": ("its name", "until it expires or is taken back"),
                "user_id": ("who was warned", "until it expires or is taken back"),
                "given_day": ("the day", "until it expires or is taken back"),
                "until_ts": ("when it counts no longer", "until it expires or is taken back"),
                "reason_code": ("why, as a word of a list", "until it expires or is taken back"),
                "case_id": ("the case it belongs to", "until it expires or is taken back"),
            },
        ),
        Table(
            "waiting_acts",
            "a measure that waits for a second person or for its time, or is being carried out",
            {
                "act_id": ("its name", "7 d after it is done"),
                "measure": ("what is asked for", "7 d after it is done"),
                "target": ("against whom or what", "7 d after it is done"),
                "room_id": ("in which room", "7 d after it is done"),
                "actor": ("who asked for it: may not be the second person", "7 d after it is done"),
                "reason_code": ("why, as a word of a list", "7 d after it is done"),
                "case_id": ("the case it belongs to", "7 d after it is done"),
                "erase": ("whether a closed account's messages go too", "7 d after it is done"),
                "ground": ("which rule or law, for whoever is concerned", "7 d after it is done"),
                "facts": ("the moderator's own words for whoever is concerned", "7 d after it is done"),
                "untold": ("why that person is not told, as a word", "7 d after it is done"),
                "asked_ts": ("when it was asked for", "7 d after it is done"),
                "due_ts": ("when it runs by itself, where there is no second person", "7 d after it is done"),
                "state": ("0 waiting, 1 being carried out, 2 done", "7 d after it is done"),
                "done_count": ("events taken back, people taken out", "7 d after it is done"),
                "failed_count": ("of them, what did not work", "7 d after it is done"),
            },
        ),
    ),
    steps=(
        """
        CREATE TABLE strikes (strike_id TEXT PRIMARY KEY, user_id TEXT NOT NULL, given_day BIGINT NOT NULL,
            until_ts BIGINT NOT NULL, reason_code TEXT NOT NULL, case_id TEXT);
        CREATE INDEX strikes_of_user ON strikes (user_id);
        CREATE TABLE waiting_acts (act_id TEXT PRIMARY KEY, measure TEXT NOT NULL, target TEXT NOT NULL, room_id TEXT,
            actor TEXT NOT NULL, reason_code TEXT NOT NULL, case_id TEXT, erase SMALLINT NOT NULL, asked_ts BIGINT NOT NULL,
            due_ts BIGINT, state SMALLINT NOT NULL, done_count BIGINT NOT NULL, failed_count BIGINT NOT NULL)
        """,
        """
        ALTER TABLE waiting_acts ADD COLUMN ground TEXT;
        ALTER TABLE waiting_acts ADD COLUMN facts TEXT;
        ALTER TABLE waiting_acts ADD COLUMN untold TEXT NOT NULL DEFAULT ''
        """,
    ),
)


@dataclass(frozen=True, slots=True)
class WaitingAct:
    act_id: str
    act: Act
    asked_ts: int
    due_ts: int | None
    state: int
    done: int
    failed: int

    def as_json(self) -> dict[str, Any]:
        return {
            "id": self.act_id,
            "measure": self.act.measure,
            "target": self.act.target,
            "room_id": self.act.room_id,
            "asked_by": self.act.actor,
            "reason_code": self.act.reason_code,
            "report_id": self.act.case_id,
            "asked": self.asked_ts,
            "due": self.due_ts,
            "state": ("waiting", "running", "done")[self.state],
        }


@dataclass(frozen=True, slots=True)
class Strike:
    strike_id: str
    given_day: int
    until_ts: int
    reason_code: str
    case_id: str | None


COLUMNS = (
    "act_id, measure, target, actor, reason_code, room_id, case_id, erase, asked_ts, due_ts, state, done_count, failed_count, "
    "ground, facts, untold"
)


def row_of(row: Sequence[Any]) -> WaitingAct:
    (
        act_id, measure, target, actor, reason_code, room_id, case_id, erase, asked, due, state, done, failed, ground, facts, untold,
    ) = row  # fmt: skip
    reasons = Reasons(ground, facts or "", untold) if ground is not None else None
    act = Act(measure, target, actor, reason_code, room_id, case_id, erase=bool(erase), reasons=reasons)
    return WaitingAct(act_id, act, asked, due, state, done, failed)


def in_state(query: Query, state: int) -> list[WaitingAct]:
    return [
        row_of(row)
        for row in query.all(f"SELECT {COLUMNS} FROM waiting_acts WHERE state = $1 ORDER BY asked_ts, act_id", state)
    ]


def others_shut(query: Query, room_id: str, act_id: str) -> bool:
    """Whether another act than this one is about to shut the room."""
    return bool(
        query.value(
            "SELECT count(*) FROM waiting_acts WHERE measure = 'shut_room' AND target = $1 AND act_id <> $2 AND state <> $3",
            room_id,
            act_id,
            DONE,
        )
    )


def still_waiting(act_id: str, becomes: int | None) -> Callable[[Query], None]:
    """The write fails where somebody else was faster. None takes the row away."""

    def look(query: Query) -> None:
        if becomes is None:
            touched = query.run("DELETE FROM waiting_acts WHERE act_id = $1 AND state = $2", act_id, WAITING)
        else:
            touched = query.run(
                "UPDATE waiting_acts SET state = $3 WHERE act_id = $1 AND state = $2", act_id, WAITING, becomes
            )
        if not touched:
            raise TakenBack("Another moderator was faster: this was confirmed or cancelled already.")

    return look


def put_strike(tx: Tx, act: Act, until: int, now: int) -> None:
    """Puts the strike, or takes the latest one back."""
    if act.undo:
        tx.run(
            "DELETE FROM strikes WHERE strike_id = (SELECT strike_id FROM strikes WHERE user_id = $1 "
            "AND ($2 = '' OR case_id = $2) ORDER BY until_ts DESC LIMIT 1)",
            act.target,
            act.case_id or "",
        )
        return
    tx.run(
        "INSERT INTO strikes (strike_id, user_id, given_day, until_ts, reason_code, case_id) VALUES ($1, $2, $3, $4, $5, $6)",
        secrets.token_urlsafe(12),
        act.target,
        now // DAY * DAY,
        until,
        act.reason_code,
        act.case_id,
    )


def strikes_of(query: Query, user_id: str, now: int) -> list[Strike]:
    rows = query.all(
        "SELECT strike_id, given_day, until_ts, reason_code, case_id FROM strikes WHERE user_id = $1 AND until_ts > $2 "
        "ORDER BY given_day, strike_id",
        user_id,
        now,
    )
    return [Strike(*row) for row in rows]
