"""Push rules as people change them, one row for each who changed any; all others share the default rules.

What the rules say of an event is in `protocol/pushrules.py`, what a change means in `protocol/pushrule_changes.py`.
Who is woken by them is `pushers` and `gateway`. Spec: client-server-api/#push-rules.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import orjson

from relay.db import Database, Query, Tx
from relay.part import Part, SyncAsk, SyncShare
from relay.protocol import pushrule_changes as changes_of
from relay.protocol.pushrules import DEFAULT, Ruleset
from relay.tables import Schema, Table
from relay.web import Answer, Request, Route

TOPIC = "push_rules"
MAX_RULESETS = 2_000

Stored = dict[str, Any]
Change = Callable[[Stored | None], Stored]

_LIFE = "until the account is deleted"


class PushRules(Part):
    schema = Schema(
        "push_rules",
        tables=(
            Table(
                "push_rules",
                "what a person wants to be notified of; readable, since it is applied here",
                {
                    "user_id": ("whose rules", _LIFE),
                    "rules": ("own rules, and changes to the default ones", _LIFE),
                    "pos": ("when they changed, for /sync", _LIFE),
                },
            ),
        ),
        steps=("CREATE TABLE push_rules (user_id TEXT PRIMARY KEY, rules BYTES NOT NULL, pos BIGINT NOT NULL)",),
    )

    def __init__(self, db: Database) -> None:
        self._db = db
        # Who changed anything, all of them; and the compiled rules of those who were asked for. Both are written through
        # by `_take`, after the commit of a change.
        self._changed: set[str] | None = None
        self._rulesets: OrderedDict[str, Ruleset] = OrderedDict()
        self._loading = asyncio.Lock()
        # Called after the commit with the user: counts that were made by the old rules are out of date.
        self.on_change: list[Callable[[str], None]] = []

    def routes(self) -> Iterable[Route]:
        path = "/_matrix/client/v3/pushrules"
        one = path + "/global/{kind}/{rule_id}"
        yield Route("GET", path, self._get_all)
        yield Route("GET", path + "/", self._get_all)
        yield Route("GET", path + "/global", self._get_global)
        yield Route("GET", path + "/global/", self._get_global)
        yield Route("GET", one, self._get_rule)
        yield Route("PUT", one, self._put_rule)
        yield Route("DELETE", one, self._delete_rule)
        for attribute in ("enabled", "actions"):
            yield Route("GET", f"{one}/{attribute}", self._get_attribute)
            yield Route("PUT", f"{one}/{attribute}", self._put_attribute)

    # --- asking

    async def _get_all(self, request: Request) -> Answer:
        return {"global": await self._merged(request.user_id)}

    async def _get_global(self, request: Request) -> Answer:
        return await self._merged(request.user_id)

    async def _merged(self, user_id: str) -> dict[str, list[Any]]:
        return changes_of.merged(await self._db.read(_stored_of, user_id), user_id)

    async def provide(self, user_id: str, room_id: str) -> dict[str, Any] | None:
        """`m.push_rules` as account data, which some clients ask for."""
        return None if room_id else {"global": await self._merged(user_id)}

    async def _get_rule(self, request: Request) -> Answer:
        stored = await self._db.read(_stored_of, request.user_id)
        return changes_of.find(stored, request.user_id, request.params["kind"], request.params["rule_id"])

    async def _get_attribute(self, request: Request) -> Answer:
        attribute = request.route.path.rpartition("/")[2]
        rule = await self._get_rule(request)
        assert isinstance(rule, dict)
        return {attribute: rule[attribute]}

    # --- changing

    async def _put_rule(self, request: Request) -> Answer:
        kind, rule_id, body = request.params["kind"], request.params["rule_id"], request.json()
        before, after = request.query.get("before"), request.query.get("after")
        return await self._change(
            request.user_id, lambda stored: changes_of.put(stored, kind, rule_id, body, before=before, after=after)
        )

    async def _delete_rule(self, request: Request) -> Answer:
        kind, rule_id = request.params["kind"], request.params["rule_id"]
        return await self._change(request.user_id, lambda stored: changes_of.delete(stored, kind, rule_id))

    async def _put_attribute(self, request: Request) -> Answer:
        attribute = request.route.path.rpartition("/")[2]
        kind, rule_id, value = request.params["kind"], request.params["rule_id"], request.json().get(attribute)
        change = changes_of.set_enabled if attribute == "enabled" else changes_of.set_actions
        return await self._change(request.user_id, lambda stored: change(stored, kind, rule_id, value))

    async def _change(self, user_id: str, change: Change) -> Answer:
        await self._load()
        with self._db.write() as tx:
            pos = tx.pos()

            def apply(query: Query) -> None:
                # Read and written in one transaction: two clients may change rules at once.
                stored = change(_stored_of(query, user_id))
                query.run(
                    "INSERT INTO push_rules (user_id, rules, pos) VALUES ($1, $2, $3) "
                    "ON CONFLICT (user_id) DO UPDATE SET rules = excluded.rules, pos = excluded.pos",
                    user_id,
                    orjson.dumps(stored),
                    pos,
                )

            tx.call(apply)
            tx.after(lambda: self._take(user_id))
            tx.ring((user_id,), TOPIC)
        await tx
        return {}

    async def carry_over(self, user_id: str, old_room: str, new_room: str) -> None:
        """The rules that she made for one room hold for another one, too. Raises what the limits on rules raise."""
        merged = await self._merged(user_id)
        for kind in ("room", "override"):
            rules = {rule["rule_id"]: rule for rule in merged[kind]}
            rule = rules.get(old_room)
            if rule is None or new_room in rules:
                continue
            body = {
                "actions": rule["actions"],
                "conditions": changes_of.moved(rule.get("conditions"), old_room, new_room),
            }
            await self._change(user_id, lambda stored: changes_of.put(stored, kind, new_room, body))  # noqa: B023
            if not rule["enabled"]:
                await self._change(user_id, lambda stored: changes_of.set_enabled(stored, kind, new_room, False))  # noqa: B023

    def _take(self, user_id: str) -> None:
        assert self._changed is not None
        self._changed.add(user_id)
        self._rulesets.pop(user_id, None)
        for callback in self.on_change:
            callback(user_id)

    def forget(self, tx: Tx, user_id: str, erase: bool) -> None:
        """For `account.on_deactivated`."""
        tx.run("DELETE FROM push_rules WHERE user_id = $1", user_id)

        def drop() -> None:
            self._rulesets.pop(user_id, None)

        tx.after(drop)

    # --- for unread counts and pushers

    def known(self, user_id: str) -> Ruleset | None:
        """The person's rules, where they are in memory."""
        if self._changed is None:
            return None
        return DEFAULT if user_id not in self._changed else self._rulesets.get(user_id)

    async def ruleset(self, user_id: str) -> Ruleset:
        await self._load()
        while (known := self.known(user_id)) is None:
            async with self._loading:
                if self.known(user_id) is not None:
                    continue
                stored = await self._db.read(_stored_of, user_id)
                self._rulesets[user_id] = changes_of.ruleset(stored)
                if len(self._rulesets) > MAX_RULESETS:
                    self._rulesets.popitem(last=False)
        return known

    async def _load(self) -> None:
        if self._changed is None:
            async with self._loading:
                if self._changed is None:
                    rows = await self._db.read(lambda query: query.all("SELECT user_id FROM push_rules"))
                    self._changed = {row[0] for row in rows}

    async def changes(self, ask: SyncAsk, share: SyncShare) -> None:
        if ask.since is not None and not ask.concerns(TOPIC):
            return
        since, changed = ask.since, True
        if since is not None:
            changed = bool(
                await self._db.read(
                    lambda query: query.value(
                        "SELECT 1 FROM push_rules WHERE user_id = $1 AND pos > $2", ask.user_id, since
                    )
                )
            )
        if changed:
            rules = await self._merged(ask.user_id)
            share.account_data.append({"type": "m.push_rules", "content": {"global": rules}})


def _stored_of(query: Query, user_id: str) -> Stored | None:
    raw = query.value("SELECT rules FROM push_rules WHERE user_id = $1", user_id)
    return orjson.loads(raw) if raw is not None else None
