"""Every measure against a person, a message, a file, a room or a server, by a moderator, an integration or a rule.

Each is a row of the audit log, in the same write as what it changes. What can't be undone waits: for a second person,
or, where there is none, for a day in which any moderator can cancel it. A room that is to be shut is closed meanwhile.
What has an end is lifted by `run`.
What the measures are stands in `acts.py`, what they do inside rooms in `room_acts.py`, what is in force in `restrictions.py`.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any, Protocol

import structlog

from relay.accounts.account import Account
from relay.accounts.moderated import Moderated
from relay.accounts.users import Users
from relay.clock import DAY, Clock, rest
from relay.db import Database, Query, Tx
from relay.errors import ApiError, Forbidden, InvalidParam, NotAllowed, NotFound, RemoteError
from relay.moderation.act_rows import (
    COLUMNS,
    DONE,
    RUNNING,
    SCHEMA,
    WAITING,
    Strike,
    WaitingAct,
    in_state,
    others_shut,
    put_strike,
    row_of,
    still_waiting,
    strikes_of,
)
from relay.moderation.acts import HASH, MEASURES, OPERATOR, Act, Outcome, checked
from relay.moderation.persons import Persons
from relay.moderation.restrictions import (
    HIDDEN,
    KEPT_OUT,
    LOCK,
    MEDIA,
    MEDIA_HASH,
    ROOM_BLOCK,
    ROOM_SHUTTING,
    SERVER_ALLOW,
    SERVER_BLOCK,
    SHADOW,
    SUSPEND,
    Restrictions,
    TakenBack,
)
from relay.moderation.room_acts import RoomActs
from relay.part import Part

log = structlog.get_logger("actions")

ALONE_WAITS_MS = DAY
# For a second person; then it has to be asked for again.
ASKED_KEPT_MS = 7 * DAY
DONE_KEPT_MS = 7 * DAY
LOOK_EVERY_SECONDS = 60.0
MAX_WAITING = 1_000

Beside = Callable[[Tx], None]

_KIND = {
    "shadow": SHADOW, "block_room": ROOM_BLOCK, "block_server": SERVER_BLOCK, "allow_server": SERVER_ALLOW,
    "suspend": SUSPEND, "lock": LOCK, "hide": HIDDEN,
}  # fmt: skip
_MEASURE_OF = {kind: measure for measure, kind in _KIND.items()} | {MEDIA: "quarantine", MEDIA_HASH: "quarantine"}


class Audit(Protocol):
    """`audit_log.py`."""

    def record(
        self,
        tx: Tx,
        *,
        actor: str,
        action: str,
        target: str,
        reason_code: str,
        case_id: str | None = None,
        automated: bool = False,
        detail: Any = None,
    ) -> Any: ...


class Actions(Part):
    schema = SCHEMA

    def __init__(
        self,
        db: Database,
        clock: Clock,
        audit: Audit,
        restrictions: Restrictions,
        persons: Persons,
        users: Users,
        account: Account,
        moderated: Moderated,
        rooms: RoomActs,
    ) -> None:
        self._db = db
        self._clock = clock
        self._audit = audit
        self._restrictions = restrictions
        self._persons = persons
        self._users = users
        self._account = account
        self._moderated = moderated
        self.rooms = rooms
        # Told of each act that begins to wait, so that all moderators hear of it.
        self.on_waiting: list[Callable[[WaitingAct], Awaitable[None]]] = []
        # In the write of each act that is carried out: webhooks.
        self.on_taken: list[Callable[[Tx, Act], None]] = []
        self._woken = asyncio.Event()
        # One of those that wait is begun, cancelled or joined by another at a time: the last one for a room opens it again.
        self._deciding = asyncio.Lock()

    # --- taking

    async def take(self, act: Act, *, beside: Beside | None = None) -> Outcome:
        """Carries the act out, or lets it wait. `beside` adds to the write that records it. Raises ApiError."""
        act = checked(act)
        await self._require_takeable(act)
        if not act.undo:
            act = replace(act, author=await self._author(act))
        if not MEASURES[act.measure].reversible:
            return await self._ask(act, beside)
        return await self._carry_out(act, beside)

    async def _author(self, act: Act) -> str | None:
        """Whose message or file it is, where that is known."""
        kind = MEASURES[act.measure].target
        if kind == "event":
            return await self.rooms.author(act.target)
        here, media_id = act.target.removeprefix("mxc://").partition("/")[::2]
        if kind != "media" or here != self._users.server_name:
            return None
        uploader: str | None = await self._db.read(
            lambda query: query.value("SELECT uploader FROM media WHERE media_id = $1", media_id)
        )
        return uploader

    async def _require_takeable(self, act: Act) -> None:
        if act.undo and act.measure == "block_room" and self._is_shutting(act.target, alone=True):
            raise TakenBack("This room is closed because its shutting waits for a second person. Cancel that instead.")
        if MEASURES[act.measure].target != "user" or act.measure == "redact_all":
            return
        if act.target == act.actor:
            raise Forbidden("You can't take a measure against yourself, nor lift one. Ask another moderator.")
        if act.undo or act.measure == "warn":
            return
        local = self._users.is_local(act.target)
        if act.measure in ("suspend", "lock", "deactivate", "shadow"):
            if not local:
                raise InvalidParam("This person has no account on this server. Ask the people who run theirs.")
            user = await self._users.get(act.target)
            if user.deactivated:
                raise NotFound(f"The account {act.target} is closed for good.")
        # The operator has the machine, and with it the last word.
        if local and act.actor != OPERATOR and await self._persons.is_moderator(act.target):
            raise Forbidden("A moderator's account can't be restricted. Take the rank away first.")

    async def restrain(self, actor: str, measure: str, user_id: str, on: bool) -> None:
        """For `Moderated.through`: the standard's endpoints and the command line."""
        await self.take(Act(measure, user_id, actor, "by_hand", undo=not on))

    async def make_room_admin(self, actor: str, room_id: str, user_id: str) -> None:
        """A moderator gets the power in a room from somebody of ours who has it."""
        given = Act("make_room_admin", user_id, actor, "by_hand", room_id)
        noted = False

        def note(tx: Tx) -> None:
            nonlocal noted
            noted = True
            self._record(tx, given, None, action=given.measure)

        await self.rooms.make_admin(room_id, user_id, note)
        if not noted:  # she had the power already
            with self._db.write() as tx:
                self._record(tx, given, None, action=given.measure)
            await tx

    def _record(
        self, tx: Tx, act: Act, beside: Beside | None, *, action: str | None = None, detail: Any = None
    ) -> None:
        self._audit.record(
            tx, actor=act.actor, action=action or act.word, target=act.target, reason_code=act.reason_code,
            case_id=act.case_id, automated=act.is_machine, detail=detail,
        )  # fmt: skip
        if beside is not None:
            beside(tx)
        if action is None:
            for told in self.on_taken:
                told(tx, act)

    async def _carry_out(self, act: Act, beside: Beside | None) -> Outcome:
        until = None if act.lasts_ms is None or act.undo else self._clock.now() + act.lasts_ms
        if until is not None and act.is_machine:
            until = await self._not_sooner(act, until)

        # A block that was taken back while a shutting waits opens nothing yet.
        closed = act.undo and act.measure == "block_room" and self._is_shutting(act.target)

        def record(tx: Tx) -> None:
            self._record(tx, act, beside, detail={"still_closed_by": "shut_room"} if closed else None)

        if act.measure in ("suspend", "lock"):

            def with_end(tx: Tx) -> None:
                record(tx)
                self._restrict(tx, act, until, ends_only=True)

            change = self._moderated.set_suspended if act.measure == "suspend" else self._moderated.set_locked
            await change(act.target, not act.undo, also=with_end)
        elif act.measure == "redact":
            await self.rooms.redact(act.actor, str(act.room_id), act.target, record)
        elif act.measure == "hide":
            await self._hide(act, until, record)
        elif act.measure in ("kick", "ban"):
            await self._in_room(act, until, record)
        else:
            with self._db.write() as tx:
                record(tx)
                if act.measure == "warn":
                    put_strike(tx, act, until or 0, self._clock.now())
                else:
                    self._restrict(tx, act, until)
            await tx
        self._woken.set()
        return Outcome(act.measure, act.target, until_ts=until)

    async def _not_sooner(self, act: Act, until: int) -> int | None:
        """A machine's step ends nothing sooner than a person has said. None where what stands has no end."""
        if act.measure == "warn":
            return until
        kind, subject = _row_of(act)
        standing = self._restrictions.find(kind, subject)
        if standing is not None:
            return None if standing.until_ts is None else max(until, standing.until_ts)
        if act.measure not in ("suspend", "lock") or (kind, subject) in self._restrictions.over_keys():
            return until
        # Of these the rows are only ends.
        user = await self._users.get(act.target)
        return None if (user.suspended if act.measure == "suspend" else user.locked) else until

    def _restrict(self, tx: Tx, act: Act, until: int | None, *, ends_only: bool = False) -> None:
        kind, subject = _row_of(act)
        if act.undo or (ends_only and until is None):
            self._restrictions.lift(tx, kind, subject)
        else:
            self._restrictions.put(tx, kind, subject, until_ts=until, case_id=act.case_id)

    async def _in_room(self, act: Act, until: int | None, record: Beside) -> None:
        room_id, subject = str(act.room_id), f"{act.room_id} {act.target}"
        if act.undo:
            await self.rooms.let_in_again(act.actor, room_id, act.target)
            with self._db.write() as tx:
                record(tx)
                self._restrictions.lift(tx, KEPT_OUT, subject)
            await tx
            return

        def keep_out(tx: Tx, in_room: bool) -> None:
            record(tx)
            if act.measure == "ban" and not in_room:
                self._restrictions.put(tx, KEPT_OUT, subject, until_ts=until, case_id=act.case_id)

        await self.rooms.take_out(act.actor, room_id, act.target, "ban" if act.measure == "ban" else "leave", keep_out)

    async def _hide(self, act: Act, until: int | None, record: Beside) -> None:
        def keep(tx: Tx) -> None:
            record(tx)
            self._restrict(tx, act, until)

        if act.undo:
            await self.rooms.show(act.target, lambda edit: self._restrictions.find(HIDDEN, edit) is not None, keep)
        else:
            await self.rooms.hide(act.target, keep)

    async def strikes(self, user_id: str) -> list[Strike]:
        return await self._db.read(strikes_of, user_id, self._clock.now())

    # --- two persons

    async def _ask(self, act: Act, beside: Beside | None) -> Outcome:
        now = self._clock.now()
        alone = not set(await self._persons.may_second(act.actor)) - {act.target}
        waiting = WaitingAct(
            secrets.token_urlsafe(16), act, now, now + ALONE_WAITS_MS if alone else None, WAITING, 0, 0
        )

        def put(query: Query) -> None:
            if int(query.value("SELECT count(*) FROM waiting_acts WHERE state <> $1", DONE) or 0) >= MAX_WAITING:
                raise ApiError("Too many measures are waiting. Confirm or cancel some first.", status=429)
            query.run(
                "INSERT INTO waiting_acts (act_id, measure, target, room_id, actor, reason_code, case_id, erase, asked_ts, due_ts, "
                "state, done_count, failed_count, ground, facts, untold) "
                "VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, 0, 0, $12, $13, $14)",
                waiting.act_id, act.measure, act.target, act.room_id, act.actor, act.reason_code, act.case_id,
                int(act.erase), now, waiting.due_ts, WAITING, *_reasons_of(act),
            )  # fmt: skip

        async with self._deciding:
            with self._db.write() as tx:
                tx.call(put)
                self._record(tx, act, beside, action=f"asked.{act.measure}")
                if act.measure == "shut_room":
                    self._close_meanwhile(tx, act)
            await tx
        self._woken.set()
        for told in self.on_waiting:
            await told(waiting)
        return Outcome(act.measure, act.target, waiting.act_id, waiting.due_ts)

    async def confirm(self, act_id: str, actor: str) -> Outcome:
        """The second person's word. Raises NotFound, Forbidden."""
        waiting = await self.find(act_id)
        if waiting is None or waiting.state != WAITING:
            raise NotFound("Nothing waits under this ID. It was confirmed or cancelled already.")
        if actor == waiting.act.actor:
            raise Forbidden("You have asked for this yourself: it needs the word of another moderator.")
        _require_not_about(waiting, actor)
        if not await self._still_asked(waiting):
            raise Forbidden("Whoever asked for this is no moderator any more, or suspended. Ask for it yourself.")
        if actor not in await self._persons.may_second(waiting.act.actor):
            raise Forbidden(
                "A second person has been a moderator for 7 days and was here within the last 30. You can cancel it, though."
            )
        await self._begin(waiting, actor, f"confirmed.{waiting.act.measure}")
        return Outcome(waiting.act.measure, waiting.act.target)

    async def cancel(self, act_id: str, actor: str) -> None:
        waiting = await self.find(act_id)
        if waiting is None or waiting.state != WAITING:
            raise NotFound("Nothing waits under this ID. It was confirmed or cancelled already.")
        _require_not_about(waiting, actor)
        act = replace(waiting.act, actor=actor)
        async with self._deciding:
            last = act.measure == "shut_room" and not await self._db.read(others_shut, act.target, act_id)
            with self._db.write() as tx:
                tx.call(still_waiting(act_id, None))
                self._record(tx, act, None, action=f"cancelled.{act.measure}")
                if last:
                    self._open_again(tx, act)
            await tx

    # --- a room that is to be shut: closed meanwhile

    def _is_shutting(self, room_id: str, *, alone: bool = False) -> bool:
        """`alone`: nothing else closes it."""
        if alone and self._restrictions.find(ROOM_BLOCK, room_id) is not None:
            return False
        return self._restrictions.find(ROOM_SHUTTING, room_id) is not None

    def _close_meanwhile(self, tx: Tx, act: Act) -> None:
        """The half that can be taken back is done at once."""
        if not self._restrictions.closes(act.target):
            self._record(tx, replace(act, measure="block_room"), None, detail={"until_decided": "shut_room"})
        self._restrictions.put(tx, ROOM_SHUTTING, act.target, case_id=act.case_id)

    def _open_again(self, tx: Tx, act: Act) -> None:
        if self._is_shutting(act.target, alone=True):
            self._record(tx, replace(act, measure="block_room", undo=True), None)
        self._restrictions.lift(tx, ROOM_SHUTTING, act.target)

    async def waiting(self) -> list[WaitingAct]:
        return await self._db.read(in_state, WAITING)

    async def find(self, act_id: str) -> WaitingAct | None:
        found = await self._db.read(
            lambda query: query.one(f"SELECT {COLUMNS} FROM waiting_acts WHERE act_id = $1", act_id)
        )
        return row_of(found) if found is not None else None

    async def _begin(self, waiting: WaitingAct, actor: str, action: str) -> None:
        """From waiting to being carried out, once."""
        async with self._deciding:
            with self._db.write() as tx:
                tx.call(still_waiting(waiting.act_id, RUNNING))
                self._record(tx, replace(waiting.act, actor=actor), None, action=action)
                for told in self.on_taken:
                    told(tx, waiting.act)
            await tx
        self._woken.set()

    # --- the loop

    async def run(self) -> None:
        """Carries out what was confirmed or is due, goes on with what a crash interrupted, ends what is over."""
        while True:
            self._woken.clear()
            began, now = self._clock.monotonic(), self._clock.now()
            for waiting in await self.waiting():
                with suppress(TakenBack, NotFound):  # a moderator was faster
                    if not await self._still_asked(waiting):
                        await self.cancel(waiting.act_id, "rule:asker-moderates-no-more")
                    elif waiting.due_ts is not None and waiting.due_ts <= now:
                        await self._begin(waiting, waiting.act.actor, waiting.act.measure)
                    elif waiting.due_ts is None and waiting.asked_ts + ASKED_KEPT_MS <= now:
                        await self.cancel(waiting.act_id, "rule:not-confirmed")
            for waiting in await self._db.read(in_state, RUNNING):
                await self._finish(waiting)
            await self._end_what_is_over()
            await self._sweep()
            await rest(self._clock, self._woken, LOOK_EVERY_SECONDS, since=began)

    async def _still_asked(self, waiting: WaitingAct) -> bool:
        """What somebody asked for goes with her rank: it may have been taken because of what she did with it."""
        return waiting.act.actor == OPERATOR or await self._persons.may_act(waiting.act.actor)

    async def _finish(self, waiting: WaitingAct) -> None:
        act, done, failed = waiting.act, 1, 0
        try:
            if act.measure == "deactivate":
                await self._account.deactivate(act.target, erase=act.erase)
            elif act.measure == "shut_room":
                with self._db.write() as tx:
                    self._restrictions.put(tx, ROOM_BLOCK, act.target, case_id=act.case_id)
                    self._restrictions.lift(tx, ROOM_SHUTTING, act.target)
                await tx
                gone, stuck = await self.rooms.empty(act.target)
                done, failed = len(gone), len(stuck)
            else:
                done, failed = await self._redact_all(act)
        except (ApiError, NotAllowed, RemoteError) as refused:
            log.warning("a measure could not be carried out", name=act.measure, exc_info=refused)
            done, failed = 0, 1
        with self._db.write() as tx:
            tx.run(
                "UPDATE waiting_acts SET state = $2, done_count = $3, failed_count = $4 WHERE act_id = $1",
                waiting.act_id, DONE, done, failed,
            )  # fmt: skip
        await tx

    async def _redact_all(self, act: Act) -> tuple[int, int]:
        done = failed = 0
        for room_id, event_id in await self.rooms.events_of(act.target, act.room_id):
            try:
                await self.rooms.redact(act.actor, room_id, event_id)
                done += 1
            except (ApiError, NotAllowed, RemoteError):
                failed += 1
        return done, failed

    async def _end_what_is_over(self) -> None:
        for one in self._restrictions.over():
            measure = _MEASURE_OF.get(one.kind)
            if one.kind in (SUSPEND, LOCK, HIDDEN) and measure is not None:
                act = Act(measure, one.subject, "rule:time-is-over", "time_is_over", case_id=one.case_id, undo=True)
                try:
                    await self._carry_out(replace(act, automated=True), None)
                    continue
                except ApiError:
                    pass  # the account or the message is gone; its row goes too
            with self._db.write() as tx:
                self._restrictions.lift(tx, one.kind, one.subject)
            await tx

    async def _sweep(self) -> None:
        now = self._clock.now()
        with self._db.write() as tx:
            tx.run("DELETE FROM strikes WHERE until_ts <= $1", now)
            tx.run(
                "DELETE FROM waiting_acts WHERE state = $1 AND asked_ts < $2", DONE, now - DONE_KEPT_MS - ASKED_KEPT_MS
            )
        await tx


def _row_of(act: Act) -> tuple[str, str]:
    """(kind, subject) of the restriction that the act puts or lifts."""
    if act.measure == "quarantine":
        hashed = act.target.startswith(HASH)
        return (MEDIA_HASH, act.target.removeprefix(HASH)) if hashed else (MEDIA, act.target)
    return _KIND[act.measure], act.target


def _reasons_of(act: Act) -> tuple[str | None, str | None, str]:
    return (None, None, "") if act.reasons is None else (act.reasons.ground, act.reasons.facts, act.reasons.untold)


def _require_not_about(waiting: WaitingAct, actor: str) -> None:
    if waiting.act.target == actor:
        raise Forbidden("This measure is about you: another moderator confirms it, or cancels it.")
