"""Builds the parts of moderation by hand, in order, as `server.py` does for the whole."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from relay.accounts.users import Users
from relay.clock import Clock
from relay.db import Database
from relay.moderation import acting as acting_parts
from relay.moderation import casework as casework_parts
from relay.moderation import proving as proving_parts
from relay.moderation.acting import Acting, Means
from relay.moderation.audit_log import AuditLog
from relay.moderation.casework import Casework, Ground
from relay.moderation.proving import Check, Proving, Sources
from relay.part import Part
from relay.rooms.rooms import Rooms
from relay.rooms.viewing import Viewing

Command = Callable[..., Awaitable[Any]]


@dataclass
class Moderation:
    """What the server takes of it."""

    audit_log: AuditLog
    proving: Proving
    acting: Acting
    casework: Casework
    parts: list[Part] = field(default_factory=list)
    commands: Mapping[str, Command] = field(default_factory=dict)
    # Findings for `relay check`.
    checks: Sequence[Check] = ()


def assemble(
    db: Database,
    clock: Clock,
    users: Users,
    rooms: Rooms,
    viewing: Viewing,
    sources: Sources,
    means: Means,
    ground: Ground,
) -> Moderation:
    audit_log = AuditLog(db, clock, users.server_name)
    proving = proving_parts.assemble(db, clock, users, rooms, viewing, sources, audit_log)
    acting = acting_parts.assemble(db, clock, users, rooms, means, audit_log, proving.keys)
    casework = casework_parts.assemble(db, clock, users, rooms, ground, audit_log, proving, acting)
    commands = {**proving.commands, **acting.commands, **casework.commands}
    parts = [audit_log, *proving.parts, *acting.parts, *casework.parts]
    return Moderation(
        audit_log,
        proving,
        acting,
        casework,
        parts,
        commands,
        (
            *proving.checks,
            casework.cases.check,
            casework.tool_rooms.check,
            means.keeping.antispam.check,
            means.keeping.webhooks.check,
        ),
    )
