"""Builds the parts that act: measures, and the tools of others that ask for them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from relay.accounts.account import Account
from relay.accounts.devices import Devices
from relay.accounts.moderated import Moderated
from relay.accounts.users import Users
from relay.clock import Clock
from relay.db import Database, Tx
from relay.moderation.actions import Actions
from relay.moderation.acts import MEASURES, OPERATOR, Act
from relay.moderation.audit_log import AuditLog
from relay.moderation.doorkeeping import Doorkeeping
from relay.moderation.moderator_keys import ModeratorKeys
from relay.moderation.persons import Persons
from relay.moderation.room_acts import RoomActs
from relay.moderation.synapse_admin import SynapseAdmin
from relay.part import Part
from relay.rooms.members import Members
from relay.rooms.rooms import Rooms
from relay.rooms.send import Sender

Command = Callable[..., Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Means:
    """What acting needs of the rest of the house."""

    devices: Devices
    account: Account
    moderated: Moderated
    sender: Sender
    members: Members
    keeping: Doorkeeping


class ToolReports:
    """What tools may know of reports; the cases, which are built later, fill it."""

    def __init__(self) -> None:
        self.lists: Callable[[int, int], Awaitable[tuple[list[dict[str, Any]], int]]] | None = None
        self.speaks: Callable[[], Awaitable[str]] | None = None

    async def listed(self, start: int, limit: int) -> tuple[list[dict[str, Any]], int]:
        return await self.lists(start, limit) if self.lists is not None else ([], 0)

    async def speaker(self) -> str:
        return await self.speaks() if self.speaks is not None else ""


@dataclass
class Acting:
    actions: Actions
    persons: Persons
    reports: ToolReports
    parts: list[Part] = field(default_factory=list)
    commands: Mapping[str, Command] = field(default_factory=dict)


def assemble(
    db: Database, clock: Clock, users: Users, rooms: Rooms, means: Means, audit_log: AuditLog, keys: ModeratorKeys
) -> Acting:
    keeping = means.keeping
    persons = Persons(means.devices, clock, keys.moderators)
    room_acts = RoomActs(db, rooms, means.sender, means.members)
    actions = Actions(
        db, clock, audit_log, keeping.restrictions, persons, users, means.account, means.moderated, room_acts
    )
    actions.on_taken.append(keeping.webhooks.act_taken)
    means.moderated.through = actions.restrain

    async def made(user_id: str) -> int | None:
        user = await users.find(user_id)
        return user.created_day if user is not None else None

    def slowed(tx: Tx, rule: str, subject: str) -> None:
        audit_log.record(tx, actor=f"rule:{rule}", action="slowed", target=subject, reason_code=rule, automated=True)
        keeping.webhooks.announce(tx, "flag.raised", detail={"rule": rule})

    means.account.noted = lambda tx, action, target: audit_log.record(
        tx, actor=OPERATOR, action=action, target=target, reason_code="by_hand"
    )

    def restricted(tx: Tx, act: Act) -> None:
        if MEASURES[act.measure].target == "user" and not act.undo:
            tx.after(lambda: keeping.flags.went_wrong(act.target))

    actions.on_taken.append(restricted)
    keeping.flags.created = made
    keeping.flags.on_step.append(slowed)
    audit_log.on_checkpoint.append(
        lambda tx, checkpoint: keeping.webhooks.announce(tx, "audit.checkpoint", detail=checkpoint.json)
    )
    reports = ToolReports()
    tools = SynapseAdmin(
        db, users, means.devices, rooms, actions, keeping.restrictions, reports.listed, reports.speaker
    )
    return Acting(actions, persons, reports, [actions, tools])
