"""Builds the parts of proof by hand: the moderators' keys, the envelopes sealed to them, the disclosures that fill these."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from relay.accounts.users import Users
from relay.clock import Clock
from relay.db import Database
from relay.moderation.disclosure import Disclosures, HeldMedia, VerifiedHere
from relay.moderation.envelopes import Envelopes
from relay.moderation.moderator_keys import ModeratorKeys, Records
from relay.part import Part
from relay.rooms.rooms import Rooms
from relay.rooms.viewing import Viewing

Command = Callable[..., Awaitable[Any]]
Check = Callable[[], Awaitable[list[dict[str, str]]]]


@dataclass(frozen=True, slots=True)
class Sources:
    """What the rest of the house gives to proof. Neither opens a connection."""

    verified_here: VerifiedHere
    held_media: HeldMedia


@dataclass(frozen=True, slots=True)
class Proving:
    keys: ModeratorKeys
    envelopes: Envelopes
    disclosures: Disclosures

    @property
    def parts(self) -> tuple[Part, ...]:
        return self.keys, self.envelopes, self.disclosures

    @property
    def commands(self) -> Mapping[str, Command]:
        return {**self.keys.commands(), **self.envelopes.commands()}

    @property
    def checks(self) -> tuple[Check, ...]:
        """Findings for `relay check`."""
        return self.keys.check, self.envelopes.check


def assemble(
    db: Database,
    clock: Clock,
    users: Users,
    rooms: Rooms,
    viewing: Viewing,
    sources: Sources,
    audit_log: Records | None,
) -> Proving:
    keys = ModeratorKeys(db, clock, users.server_name, users, audit_log)
    envelopes = Envelopes(db, clock, keys, audit_log)
    name = users.server_name
    disclosures = Disclosures(db, rooms, viewing, envelopes, sources.verified_here, sources.held_media, name)
    return Proving(keys, envelopes, disclosures)
