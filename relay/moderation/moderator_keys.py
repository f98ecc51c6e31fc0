"""Who is a moderator, and to which keys evidence is sealed: the signed list (key_list.py) as this relay keeps it.

Only public halves are here. A change comes signed, is written with a row in the audit log, told to the others, and counts
a day later. A key that was removed gets nothing new at once, and loses its wraps a day later (envelopes.py). Each key has to
prove every ninety days that it still opens something. Whoever has the admin flag is a moderator too, with or without a key.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Awaitable, Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import orjson

from relay.accounts.users import Users
from relay.clock import DAY, MINUTE, Clock
from relay.db import Database, Query, Tx
from relay.errors import Forbidden, InvalidParam, NotFound
from relay.ids import is_user_id
from relay.moderation import envelope, key_list
from relay.moderation.acts import OPERATOR
from relay.moderation.envelope import Recipient
from relay.moderation.key_list import BadList, KeyList, Listed
from relay.part import Part
from relay.protocol.canonical import to_base64
from relay.tables import Schema, Table
from relay.web import Answer, Request, Route, get_string

MAX_VERSIONS = 1_000
# A statement was made just now, by a clock that is about right.
CLOCK_TOLERANCE = 10 * MINUTE
TEST_EVERY = 90 * DAY
TEST_BYTES = 32

PATH = "/_relay/safety/v1/keys"

OnChange = Callable[[KeyList | None, KeyList], Awaitable[None]]


class Records(Protocol):
    """The audit log, as far as it is needed here."""

    def record(
        self, tx: Tx, *, actor: str, action: str, target: str, reason_code: str,
        case_id: str | None = None, automated: bool = False, detail: Any = None,
    ) -> Any: ...  # fmt: skip


@dataclass(frozen=True, slots=True)
class Moderator:
    """`enrolled_ts` is since when a key of hers counts; None where she has none, and so can open nothing. `rests`: the operator
    has locked or suspended her account, which then moderates nothing."""

    user_id: str
    admin: bool
    enrolled_ts: int | None
    rests: bool = False


class ModeratorKeys(Part):
    schema = Schema(
        "moderator_keys",
        tables=(
            Table(
                "key_lists",
                "a version of the signed list of moderators' public keys",
                {
                    "seq": ("which version", "for good: each version proves the next"),
                    "statement": ("the list as it was signed", "for good: each version proves the next"),
                },
            ),
            Table(
                "key_tests",
                "when a moderator's key last opened a test envelope",
                {
                    "key_id": ("which key", "until the key is removed"),
                    "tested_ts": ("when, to the day", "until the key is removed"),
                    "expected": ("a hash: what the answer to the last test has to be", "until it is answered"),
                },
            ),
        ),
        steps=(
            """
            CREATE TABLE key_lists (seq BIGINT PRIMARY KEY, statement BYTES NOT NULL);
            CREATE TABLE key_tests (key_id TEXT PRIMARY KEY, tested_ts BIGINT NOT NULL)
            """,
            """
            ALTER TABLE key_tests ADD COLUMN expected BYTES
            """,
        ),
    )

    def __init__(self, db: Database, clock: Clock, server_name: str, users: Users, audit_log: Records | None) -> None:
        self._db = db
        self._clock = clock
        self._server_name = server_name
        self._users = users
        self._audit_log = audit_log
        # All versions, oldest first; `take` is the only write, and drops it. What was read before that is not remembered.
        self._known: list[KeyList] | None = None
        self._drops = 0
        self.on_change: list[OnChange] = []

    # --- the list

    async def chain(self) -> list[KeyList]:
        known = self._known
        while known is None:
            drops = self._drops
            rows = await self._db.read(lambda query: query.all("SELECT statement FROM key_lists ORDER BY seq"))
            if drops == self._drops:
                known = self._known = [key_list.read(orjson.loads(row[0])) for row in rows]
        return known

    async def current(self) -> KeyList | None:
        chain = await self.chain()
        return chain[-1] if chain else None

    async def recipients(self, except_users: Collection[str] = ()) -> list[Recipient]:
        """Whom evidence is sealed to now; never the person that a case is about."""
        current = await self.current()
        if current is None:
            return []
        return [
            Recipient(one.key_id, one.user_id, one.public)
            for one in current.active(self._clock.now())
            if one.user_id not in except_users
        ]

    async def take(self, statement: object, actor: str) -> KeyList:
        """A new version, signed. Raises InvalidParam with what is wrong with it."""
        try:
            after = key_list.read(statement)
        except BadList as bad:
            raise InvalidParam(str(bad)) from bad
        now = self._clock.now()
        if abs(after.made_ts - now) > CLOCK_TOLERANCE:
            raise InvalidParam(
                "The list was signed at another time than now. Set the clock of your machine, and sign again."
            )
        await self._require_people(after)
        outcome: list[KeyList | None] = []

        def store(query: Query) -> None:
            row = query.one("SELECT statement FROM key_lists ORDER BY seq DESC LIMIT 1")
            before = key_list.read(orjson.loads(row[0])) if row is not None else None
            try:
                if after.server != self._server_name:
                    raise BadList("The list is that of another relay.")
                key_list.follow(before, after)
            except BadList as bad:
                raise InvalidParam(str(bad)) from bad
            if after.seq >= MAX_VERSIONS:
                raise InvalidParam("The list of keys was changed too often. Ask the makers of this software.")
            query.run(
                "INSERT INTO key_lists (seq, statement) VALUES ($1, $2)", after.seq, orjson.dumps(after.statement)
            )
            for one in after.keys:
                if before is None or before.find(one.key_id) is None:
                    query.run(
                        "INSERT INTO key_tests (key_id, tested_ts) VALUES ($1, $2) "
                        "ON CONFLICT (key_id) DO UPDATE SET tested_ts = excluded.tested_ts",
                        one.key_id,
                        self._today(),
                    )
            outcome.append(before)

        with self._db.write() as tx:
            tx.call(store)
            if self._audit_log is not None:
                self._audit_log.record(
                    tx, actor=actor, action="keys.changed", target=f"key list {after.seq}",
                    reason_code=after.statement["signed_by"], detail={"digest": after.digest},
                )  # fmt: skip
            tx.after(self._forget_known)
        await tx
        for told in self.on_change:
            await told(outcome[0], after)
        return after

    async def _require_people(self, after: KeyList) -> None:
        current = await self.current()
        known = {one.key_id for one in current.keys} if current is not None else set()
        for one in after.keys:
            if one.key_id in known:
                continue
            user = await self._users.find(one.user_id) if is_user_id(one.user_id) else None
            if user is None or user.deactivated:
                raise InvalidParam(f"There is no open account {one.user_id} here. Make it first: relay user add NAME")

    def _forget_known(self) -> None:
        self._drops += 1
        self._known = None

    def _today(self) -> int:
        return self._clock.now() // DAY * DAY

    async def removed_before(self, ts: int) -> set[str]:
        """Keys that once were listed, and were taken off the list before `ts`."""
        gone: dict[str, int] = {}
        listed: set[str] = set()
        for version in await self.chain():
            now = {one.key_id for one in version.keys}
            for key_id in listed - now:
                gone[key_id] = version.made_ts
            for key_id in now:
                gone.pop(key_id, None)
            listed = now
        return {key_id for key_id, removed in gone.items() if removed <= ts}

    # --- who is a moderator

    async def moderators(self) -> list[Moderator]:
        """Admins, and those whose key counts; closed accounts are none."""
        since = await self._enrolled()
        return [
            Moderator(user.user_id, user.admin, since.get(user.user_id), user.locked or user.suspended)
            for user in await self._users.all()
            if not user.deactivated and (user.admin or user.user_id in since)
        ]

    async def is_moderator(self, user_id: str) -> bool:
        """Whether she may work as one now."""
        user = await self._users.find(user_id)
        if user is None or user.deactivated or user.locked or user.suspended:
            return False
        return user.admin or user_id in await self._enrolled()

    async def enrolled_ts(self, user_id: str) -> int | None:
        return (await self._enrolled()).get(user_id)

    async def _enrolled(self) -> dict[str, int]:
        current = await self.current()
        since: dict[str, int] = {}
        for one in current.active(self._clock.now()) if current is not None else ():
            if one.kind == "moderator":
                since[one.user_id] = min(one.active_ts, since.get(one.user_id, one.active_ts))
        return since

    async def require_moderator(self, user_id: str) -> None:
        if not await self.is_moderator(user_id):
            raise Forbidden("This is for moderators. The operator adds one with: relay moderator add NAME")

    async def require_session(self, request: Request) -> str:
        """A moderator who called herself: no bridge or bot moderates in somebody's name. Her user ID."""
        if request.who.service:
            raise Forbidden("A service moderates for nobody. Use a session of the moderator's own.")
        await self.require_moderator(request.user_id)
        return request.user_id

    async def require_own(self, user_id: str, key_id: str) -> str:
        """Whoever tries another's key could spoil the test that she is just answering. Raises Forbidden."""
        current = await self.current()
        listed = current.find(key_id) if current is not None else None
        if listed is None or listed.user_id != user_id:
            raise Forbidden("This key is not yours in the relay's list. Put in the one that was made for you.")
        return key_id

    # --- that a key still opens something

    async def test(self, key_id: str) -> dict[str, Any]:
        """An envelope that only this key opens; whoever opens it answers with what `proof_of` makes of the text."""
        listed = await self._listed(key_id)
        nonce = os.urandom(TEST_BYTES)
        case_id = f"test-{secrets.token_hex(8)}"
        sealed = envelope.seal(nonce, case_id=case_id, version=1, to=[_recipient(listed)], least=1)
        with self._db.write() as tx:
            tx.run("UPDATE key_tests SET expected = $2 WHERE key_id = $1", key_id, proof_of(nonce))
        await tx
        return sealed.json()

    async def tested(self, key_id: str, answer: str) -> None:
        """Raises Forbidden where the answer is not that to the last test."""
        await self._listed(key_id)

        def compare(query: Query) -> None:
            expected = query.value("SELECT expected FROM key_tests WHERE key_id = $1", key_id)
            if expected is None or not secrets.compare_digest(to_base64(bytes(expected)).encode(), answer.encode()):
                raise Forbidden("This does not answer the test. Ask for a new test envelope and open it with this key.")
            query.run("UPDATE key_tests SET tested_ts = $2, expected = NULL WHERE key_id = $1", key_id, self._today())

        with self._db.write() as tx:
            tx.call(compare)
        await tx

    async def _listed(self, key_id: str) -> Listed:
        current = await self.current()
        listed = current.find(key_id) if current is not None else None
        if listed is None:
            raise NotFound("This key is not on the list. See: relay moderator list")
        return listed

    async def _tested(self) -> dict[str, int]:
        return dict(await self._db.read(lambda query: query.all("SELECT key_id, tested_ts FROM key_tests")))

    # --- for the operator

    def commands(self) -> dict[str, Callable[..., Awaitable[Any]]]:
        return {
            "moderator.list": self.listing,
            "moderator.chain": self._chain_json,
            "moderator.change": self._change,
            "moderator.test": self.test,
            "moderator.tested": self._answered,
        }

    async def listing(self) -> list[dict[str, Any]]:
        now, tested = self._clock.now(), await self._tested()
        current = await self.current()
        rows = []
        for one in current.keys if current is not None else ():
            state = "waits" if one.active_ts > now else "counts"
            shown = {"user_id": one.user_id, "kind": one.kind, "key_id": one.key_id, "state": state}
            rows.append({**shown, "active_ts": one.active_ts, "tested_ts": tested.get(one.key_id)})
        for admin in await self.moderators():
            if admin.admin and not any(row["user_id"] == admin.user_id for row in rows):
                rows.append({"user_id": admin.user_id, "kind": "admin", "key_id": None, "state": "has no key"})
        return rows

    async def _chain_json(self) -> dict[str, Any]:
        return {
            "server": self._server_name,
            "now": self._clock.now(),
            "chain": [one.statement for one in await self.chain()],
        }

    async def _change(self, statement: dict[str, Any]) -> dict[str, Any]:
        after = await self.take(statement, OPERATOR)
        return {"seq": after.seq, "digest": after.digest}

    async def _answered(self, key_id: str, answer: str) -> None:
        await self.tested(key_id, answer)

    async def check(self) -> list[dict[str, str]]:
        """Findings for `relay check`."""
        now, current = self._clock.now(), await self.current()
        if current is None or len(current.active(now)) < envelope.MIN_KEYS:
            return [
                {
                    "severity": "warning",
                    "what": "There are no moderators' keys: reports are kept without their text, and no proof can be kept.",
                    "todo": "Make the first key and a recovery key: relay moderator add NAME (an admin's name)",
                }
            ]
        tested, found = await self._tested(), []
        for one in current.keys:
            if tested.get(one.key_id, 0) + TEST_EVERY < now:
                what = (
                    f"The {one.kind} key {one.key_id} of {one.user_id} has proved nothing for 90 days; it may be lost."
                )
                todo = "Its owner tries it: relay moderator test. If it is lost: relay moderator remove, then add a new one."
                found.append({"severity": "warning", "what": what, "todo": todo})
            if one.active_ts > now:
                what = f"A new {one.kind} key {one.key_id} of {one.user_id} counts from tomorrow on."
                found.append(
                    {"severity": "warning", "what": what, "todo": "If you don't know it: relay moderator remove"}
                )
        count = len(current.active(now))
        return found or [{"severity": "ok", "what": f"Evidence is sealed to {count} moderators' keys.", "todo": ""}]

    # --- for the desk

    def routes(self) -> Iterable[Route]:
        yield Route("GET", PATH, self._get)
        yield Route("POST", PATH, self._post)
        yield Route("GET", f"{PATH}/{{key_id}}/test", self._get_test)
        yield Route("POST", f"{PATH}/{{key_id}}/test", self._post_test)

    async def _get(self, request: Request) -> Answer:
        await self.require_session(request)
        return await self._chain_json()

    async def _post(self, request: Request) -> Answer:
        after = await self.take(request.json(), await self.require_session(request))
        return {"seq": after.seq, "digest": after.digest}

    async def _own(self, request: Request) -> str:
        return await self.require_own(await self.require_session(request), request.params["key_id"])

    async def _get_test(self, request: Request) -> Answer:
        return await self.test(await self._own(request))

    async def _post_test(self, request: Request) -> Answer:
        await self.tested(await self._own(request), get_string(request.json(), "answer"))
        return {}


def proof_of(nonce: bytes) -> bytes:
    """What shows that somebody opened a test envelope, and tells nothing of what was in it."""
    return hashlib.sha256(b"relay moderator key test" + nonce).digest()


def _recipient(listed: Listed) -> Recipient:
    return Recipient(listed.key_id, listed.user_id, listed.public)
