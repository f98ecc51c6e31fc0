"""Builds the parts of casework by hand: reports come in, become cases, are decided, objected to, told, kept and counted."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from relay.accounts.account import Account
from relay.accounts.devices import Devices
from relay.accounts.users import Users
from relay.callers import Sessions
from relay.clock import Clock
from relay.db import Database, Tx
from relay.doors import OpenDoors
from relay.media.remote_copies import RemoteCopies
from relay.moderation.act_routes import ActRoutes
from relay.moderation.acting import Acting
from relay.moderation.appeals import Appeals
from relay.moderation.audit_log import AuditLog
from relay.moderation.cases import Cases
from relay.moderation.decisions import Decisions
from relay.moderation.direct import DirectMeasures
from relay.moderation.doorkeeping import Doorkeeping
from relay.moderation.freeze import Freeze
from relay.moderation.keeping import Keeping
from relay.moderation.links import Links
from relay.moderation.list_following import Finds, ListFollowing
from relay.moderation.list_routes import ListRoutes
from relay.moderation.moderation_commands import ModerationCommands
from relay.moderation.notices import Notices
from relay.moderation.own_rooms import OwnRooms
from relay.moderation.peer_routes import PeerRoutes
from relay.moderation.peers import Peers
from relay.moderation.proving import Proving
from relay.moderation.reports import Reports
from relay.moderation.safety_api import SafetyApi
from relay.moderation.safety_tokens import SafetyTokens
from relay.moderation.tool_rooms import ToolRooms
from relay.moderation.transparency import Transparency
from relay.part import Part
from relay.people.account_data import AccountData
from relay.people.profile import Profiles
from relay.protocol.seal import Seal
from relay.protocol.signing import SigningKey
from relay.remote import Remote, SpeaksSigned
from relay.rooms.append import Appender
from relay.rooms.create import Creator
from relay.rooms.members import Members
from relay.rooms.redactions import Grace
from relay.rooms.rooms import Rooms
from relay.rooms.routes import RoomsPart
from relay.rooms.send import Sender

Command = Callable[..., Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Ground:
    """What casework needs of the rest of the house."""

    appender: Appender
    seal: Seal
    key: SigningKey
    default_version: str
    base_url: str
    outside: Sequence[str]
    profiles: Profiles
    account_data: AccountData
    account: Account
    devices: Devices
    sessions: Sessions
    rooms_part: RoomsPart
    grace: Grace
    copies: RemoteCopies
    keeping: Doorkeeping
    remote: Remote
    speaks: SpeaksSigned
    forwarding: bool
    members: Members
    # The room that an ID or an alias means.
    finds: Finds


@dataclass
class Casework:
    own_rooms: OwnRooms
    links: Links
    notices: Notices
    cases: Cases
    freeze: Freeze
    reports: Reports
    decisions: Decisions
    appeals: Appeals
    keeping: Keeping
    transparency: Transparency
    tokens: SafetyTokens
    peers: Peers
    api: SafetyApi
    direct: DirectMeasures
    following: ListFollowing
    tool_rooms: ToolRooms
    parts: list[Part] = field(default_factory=list)
    commands: Mapping[str, Command] = field(default_factory=dict)


def assemble(
    db: Database,
    clock: Clock,
    users: Users,
    rooms: Rooms,
    ground: Ground,
    audit_log: AuditLog,
    proving: Proving,
    acting: Acting,
) -> Casework:
    persons, actions, webhooks = acting.persons, acting.actions, ground.keeping.webhooks
    # The relay's own rooms ask no door: nobody may be kept from hearing what was decided.
    speaks = Sender(db, rooms, ground.appender, ground.seal, OpenDoors(), clock, ground.key)
    makes = Creator(
        db,
        rooms,
        ground.appender,
        speaks,
        ground.seal,
        OpenDoors(),
        ground.profiles,
        ground.key,
        ground.default_version,
    )
    own_rooms = OwnRooms(
        db,
        rooms,
        ground.appender,
        speaks,
        makes,
        ground.seal,
        users,
        ground.profiles,
        ground.account_data,
        ground.default_version,
    )
    links = Links(db, clock, ground.base_url)
    notices = Notices(db, clock, own_rooms, links, persons)
    cases = Cases(db, clock, audit_log, persons)
    freeze = Freeze(clock, users.server_name)
    reports = Reports(
        db,
        clock,
        users,
        rooms,
        cases,
        proving.disclosures,
        proving.envelopes,
        freeze,
        links,
        notices,
        audit_log,
        ground.outside,
    )
    decisions = Decisions(db, clock, users, cases, actions, persons, links, notices, audit_log)
    appeals = Appeals(
        db, clock, users, users.passwords, cases, decisions, proving.envelopes, persons, notices, audit_log
    )
    keeping = Keeping(db, clock, cases, proving.disclosures, freeze, links, audit_log)
    transparency = Transparency(db)
    tokens = SafetyTokens(db, clock, ground.sessions, persons, audit_log)
    peers = Peers(
        db, clock, rooms, ground.remote, ground.speaks, cases, decisions, proving.disclosures, audit_log,
        forwarding=ground.forwarding,
    )  # fmt: skip
    peer_routes = PeerRoutes(
        db, clock, ground.key, users, rooms, peers, proving.keys, cases, decisions, appeals, proving.envelopes, freeze, links,
        notices, audit_log,
    )  # fmt: skip
    api = SafetyApi(
        db, clock, tokens, cases, decisions, appeals, proving.disclosures, proving.envelopes, ground.keeping.integrations,
        transparency, peers, reports, audit_log,
    )  # fmt: skip

    cases.on_change += [
        notices.changed,
        lambda tx, happened, case: webhooks.announce(
            tx, happened, case_id=case.case_id, category=case.category, state=case.state
        ),
    ]
    acting.reports.lists, acting.reports.speaks = cases.listed_for_tools, own_rooms.speaker
    reports.weight = ground.keeping.flags.reported
    proving.disclosures.on_opened.append(ground.keeping.classifiers.opened)
    audit_log.on_checkpoint.append(notices.checkpoint)
    audit_log.on_restored.append(notices.restored)
    actions.on_waiting.append(notices.act_waits)
    proving.keys.on_change.append(notices.keys_changed)
    proving.envelopes.persons_of = cases.persons_of
    direct = DirectMeasures(db, clock, users, cases, decisions, links, notices, audit_log)
    actions.on_taken += [direct.taken, decisions.carried_out]
    decisions.on_decided += [appeals.keep_password, peers.decided]
    appeals.peers = peers
    keeping.forgets.append(peers.forget)
    ground.account.on_password_changed += [
        appeals.password_changed, lambda tx, user_id: tokens.end_all(tx, user_id, "password_changed"),
    ]  # fmt: skip
    ground.account.on_rank_lost.append(lambda tx, user_id: tokens.end_all(tx, user_id, "moderates_no_more"))
    ground.account.on_deactivated.append(lambda tx, user_id, erase: tokens.end_all(tx, user_id, "account_closed"))
    ground.devices.on_all_signed_out.append(lambda tx, user_id: tokens.end_all(tx, user_id, "signed_out"))
    proving.keys.on_change.append(tokens.keys_changed)
    ground.account.on_deactivated.append(own_rooms.forget)

    def forget_in_log(tx: Tx, user_id: str, erase: bool) -> None:
        if erase:
            audit_log.forget(tx, user_id)

    ground.account.on_deactivated.append(forget_in_log)
    keeping.sweeps += [appeals.sweep, tokens.sweep, api.sweep]
    ground.grace.frozen = freeze.events
    ground.copies.frozen = freeze.media
    ground.rooms_part.is_own = own_rooms.is_own

    # Without the seal as well: a room for a bot that can't decrypt, which only the operator makes.
    clear = Creator(
        db, rooms, ground.appender, speaks, Seal("open"), OpenDoors(), ground.profiles, ground.key, ground.default_version,
    )  # fmt: skip
    tool_rooms = ToolRooms(users, rooms, clear, ground.seal.clear_rooms)
    following = ListFollowing(
        db, ground.keeping.lists, rooms, ground.members, own_rooms, audit_log, ground.finds
    )  # fmt: skip
    commands = {
        **following.commands(),
        **ModerationCommands(db, audit_log, users.server_name, cases, decisions, api).commands(),
        "rooms.management": tool_rooms.make_command,
    }
    parts: list[Part] = [
        own_rooms,
        links,
        notices,
        cases,
        freeze,
        reports,
        decisions,
        appeals,
        keeping,
        transparency,
        tokens,
        peers,
        peer_routes,
        api,
        ActRoutes(actions, ground.keeping, tokens),
        ListRoutes(following, ground.keeping.lists, tokens),
    ]
    return Casework(
        own_rooms,
        links,
        notices,
        cases,
        freeze,
        reports,
        decisions,
        appeals,
        keeping,
        transparency,
        tokens,
        peers,
        api,
        direct,
        following,
        tool_rooms,
        parts,
        commands,
    )
