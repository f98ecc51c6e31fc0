"""What the operator asks of the whole database: is it sealed, is it sound, what lies in it and why.

Each part answers for its own tables (`Part.audit`, `Part.reseal`); here the answers are put together.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from relay.db import Database, Query
from relay.part import Part
from relay.rooms.rooms import Rooms
from relay.tables import OWN

Check = Callable[[], Awaitable[list[dict[str, str]]]]

# From the loosest to the strictest.
LEVELS = ("open", "standard", "strict")
MAX_FINDINGS_SHOWN = 20


class NotSealed(Exception):
    """The configuration asks for a stricter seal than the database keeps."""

    def __init__(self, level: str, findings: list[dict[str, Any]]) -> None:
        shown = [f"  {one['table']} {one['row']}: {one['text']}" for one in findings[:MAX_FINDINGS_SHOWN]]
        more = [f"  and {len(findings) - MAX_FINDINGS_SHOWN} more"] if len(findings) > MAX_FINDINGS_SHOWN else []
        super().__init__(
            "\n".join(
                [
                    f"privacy.seal is {level}, but the database holds {len(findings)} rows from a looser time:",
                    *shown,
                    *more,
                    "`relay seal` redacts them for good. Or set privacy.seal back in the config.",
                ]
            )
        )


class Inspection:
    def __init__(
        self, db: Database, rooms: Rooms, parts: Sequence[Part], level: str, checks: Sequence[Check] = ()
    ) -> None:
        """`level` is the seal's; `checks` are what parts have to say in `relay check`."""
        self._db = db
        self._rooms = rooms
        self._parts = parts
        self._level = level
        self._checks = checks

    def commands(self) -> dict[str, Callable[..., Awaitable[Any]]]:
        return {"audit": self.audit, "check": self.check, "columns": self.columns, "seal": self.seal}

    async def require_sealed(self) -> None:
        """A stricter seal than the one that wrote the database: nothing that it forbids may lie there."""
        level = self._level
        before = await self._db.note("seal")
        if before is not None and LEVELS.index(level) > LEVELS.index(before):
            found = (await self.audit())["findings"]
            if found:
                raise NotSealed(level, found)
        if before != level:
            await self._db.take_note("seal", level)

    async def seal(self) -> dict[str, Any]:
        """Redacts what the present seal does not allow."""

        def reseal(query: Query) -> dict[str, int]:
            return {type(part).__name__: changed for part in self._parts if (changed := part.reseal(query))}

        with self._db.write() as tx:
            tx.call(reseal)
        changed = await tx
        for room_id in list(self._rooms.loaded_ids()):
            room = self._rooms.loaded(room_id)
            if room is not None:
                self._rooms.drop(room)
        return {"changed": changed}

    async def check(self) -> list[dict[str, Any]]:
        damage = await self._db.damage()
        if damage is None:
            said = [finding for check in self._checks for finding in await check()]
            return [{"severity": "ok", "what": "The database is sound.", "todo": ""}, *said]
        return [
            {
                "severity": "error",
                "what": f"The database is damaged: {damage}",
                "todo": "Stop the relay, keep a copy of the data folder, and restore the latest backup.",
            }
        ]

    async def columns(self) -> list[dict[str, Any]]:
        schemas = [*(part.schema for part in self._parts if part.schema is not None), OWN]
        return [
            {
                "table": table.name,
                "rule": table.rule,
                "columns": [{"column": c, "purpose": why, "kept": kept} for c, (why, kept) in table.columns.items()],
            }
            for schema in schemas
            for table in schema.tables
        ]

    async def audit(self) -> dict[str, Any]:
        def walk(query: Query) -> dict[str, Any]:
            counts: dict[str, int] = {}
            findings = []
            for part in self._parts:
                counted, found = part.audit(query)
                counts.update(counted)
                findings += [{"table": f.table, "row": f.row, "text": f.text} for f in found]
            for table in OWN.tables:
                counts[f"{table.name}: {table.rule}"] = int(query.value(f"SELECT count(*) FROM {table.name}"))
            return {"counts": counts, "findings": findings}

        return await self._db.read(walk)
