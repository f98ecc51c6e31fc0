"""Builds the parts of moderation by hand, in order, as `server.py` does for the whole."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from relay.clock import Clock
from relay.db import Database
from relay.moderation.audit_log import AuditLog
from relay.moderation.moderation_commands import ModerationCommands
from relay.part import Part

Command = Callable[..., Awaitable[Any]]


@dataclass
class Moderation:
    """What the server takes of it."""

    audit_log: AuditLog
    parts: list[Part] = field(default_factory=list)
    commands: Mapping[str, Command] = field(default_factory=dict)


def assemble(db: Database, clock: Clock, server_name: str) -> Moderation:
    audit_log = AuditLog(db, clock, server_name)
    commands = ModerationCommands(db, audit_log, server_name).commands()
    return Moderation(audit_log, [audit_log], commands)
