"""Builds every part by hand, in order, and starts them. The only file that knows all: read it as the map of the program.

`open` makes the parts and the database; `start` adds the listeners and the parts' loops; `stop` ends both. A command
of the command line is one of `commands`, carried out in the running relay or in one that was only opened.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from federation.addresses import AddressRule, SystemLookups
from federation.answers import Answers
from federation.asking import Asking, as_seen_by
from federation.backoff import Backoff
from federation.chains import Chains
from federation.client import Client
from federation.connections import Connections
from federation.dates import DatesAnswers
from federation.discovery import Discovery
from federation.doctor import Doctor
from federation.inbound import Inbound
from federation.invites import Invites
from federation.joins import Joins
from federation.kept_keys import KeptKeys
from federation.keyring import Keyring
from federation.media import ServesMedia
from federation.notary import Notary
from federation.openid import UserInfo
from federation.outbox import Outbox
from federation.outward import Outward, Posting, ToServices, tls_context
from federation.queries import Queries
from federation.spaces import Hierarchy
from federation.xmatrix import XMatrix
from relay import folder
from relay.absent import Absent
from relay.accounts.account import Account
from relay.accounts.devices import Devices
from relay.accounts.login import Login
from relay.accounts.moderated import Moderated, Restrained, RestrainedDoors
from relay.accounts.openid import OpenId
from relay.accounts.passwords import Passwords
from relay.accounts.reauth import Reauth
from relay.accounts.register import Register
from relay.accounts.sessions import Sessions
from relay.accounts.shared_secret import SharedSecret
from relay.accounts.tokens import RegistrationTokens
from relay.accounts.users import Users
from relay.advertised import Advertised
from relay.appservices.assembled import Appservices
from relay.appservices.registration import load_all
from relay.appservices.services import ServiceDoors
from relay.bell import Bell
from relay.clock import Clock, SystemClock
from relay.config import Settings
from relay.db import Database
from relay.departures import Departures
from relay.doors import AloneDoors, OpenDoors, Together
from relay.ephemeral.presence import Presence
from relay.ephemeral.receipts import Receipts
from relay.ephemeral.typing_notices import TypingNotices
from relay.forgetting import Forgetting
from relay.inspection import Inspection
from relay.keys.backup import KeyBackup
from relay.keys.cross_signing import CrossSigning
from relay.keys.dehydrated import Dehydrated
from relay.keys.device_keys import DeviceKeys
from relay.keys.device_lists import DeviceLists
from relay.keys.one_time_keys import OneTimeKeys
from relay.keys.published import Published
from relay.keys.remote_lists import RemoteLists
from relay.keys.to_device import ToDevice
from relay.keys.user_signatures import UserSignatures
from relay.limits import Limits
from relay.listeners import Listeners
from relay.media.remote_copies import RemoteCopies
from relay.media.routes import Media
from relay.metrics import Backlog, Metrics
from relay.moderation import assembled as moderation_assembled
from relay.moderation.acting import Means
from relay.moderation.casework import Ground
from relay.moderation.doorkeeping import Doorkeeping
from relay.moderation.own_rooms import NAMES as OWN_NAMES
from relay.moderation.own_rooms import ReservedNames
from relay.moderation.proving import Sources
from relay.own_keys import OwnKeys
from relay.pages import assembled as pages_assembled
from relay.part import Part
from relay.people.account_data import AccountData
from relay.people.calls import Calls, transports
from relay.people.contact_gate import ContactGate
from relay.people.contact_links import ContactLinks
from relay.people.filters import Filters, parse_event_filter
from relay.people.following import Following
from relay.people.hidden_invites import HiddenInvites
from relay.people.invite_blocking import InviteBlocking
from relay.people.profile import Profiles
from relay.people.server_notices import ServerNotices
from relay.people.tags import Tags
from relay.people.user_search import UserSearch
from relay.protocol.seal import Seal
from relay.push.badges import Badges
from relay.push.gateway import Gateway
from relay.push.notifications import Notifications
from relay.push.pushers import Pushers
from relay.push.rules import PushRules
from relay.push.unread import Unread
from relay.reloading import Reloading
from relay.rooms import erasure
from relay.rooms.afar import Afar
from relay.rooms.append import Appender
from relay.rooms.completion import PartialJoins
from relay.rooms.create import Creator
from relay.rooms.dates import Dates
from relay.rooms.delayed import CAPABILITIES as DELAYED_CAPABILITIES
from relay.rooms.delayed import DelayedEvents
from relay.rooms.directory import Directory
from relay.rooms.gaps import Gaps
from relay.rooms.history import History
from relay.rooms.intake import Intake
from relay.rooms.later import Later
from relay.rooms.members import Members
from relay.rooms.mutual import MutualRooms
from relay.rooms.policy_server import PolicyServers
from relay.rooms.receive import Receiver
from relay.rooms.redactions import Grace
from relay.rooms.relations import Relations
from relay.rooms.rooms import Rooms
from relay.rooms.routes import RoomsPart
from relay.rooms.send import Sender
from relay.rooms.spaces import Spaces
from relay.rooms.summary import Summaries
from relay.rooms.timeline import Timeline
from relay.rooms.upgrade import Upgrades
from relay.rooms.viewing import Viewing
from relay.rooms.write_routes import WriteRoutes
from relay.server_controls import ServerControls
from relay.sync.classic import ClassicSync
from relay.sync.gather import Gather
from relay.sync.rooms import SyncRooms
from relay.sync.sliding import SlidingSync
from relay.sync.sliding_extensions import SlidingExtensions
from relay.sync.sliding_lists import RoomOrders
from relay.sync.sliding_rooms import SlidingRooms
from relay.web import Web

log = structlog.get_logger("server")

VERSION = "0.1.0"

Command = Callable[..., Awaitable[Any]]


class Server:
    def __init__(self, settings: Settings, data_dir: Path, clock: Clock | None = None) -> None:
        self.settings = settings
        self.data_dir = data_dir
        self.clock: Clock = clock or SystemClock()
        self._loops: asyncio.Task[None] | None = None
        self._build()

    def _build(self) -> None:
        settings, clock, name = self.settings, self.clock, self.settings.server_name
        key = folder.load_key(self.data_dir, settings)
        media_folder = self.data_dir / "media"
        limits = Limits(settings.limits.rates, clock, enabled=settings.limits.enabled)
        bell = Bell()
        db = Database(self.data_dir / settings.database.path, bell, settings.database.reader_threads)
        seal = Seal(settings.privacy.seal, settings.privacy.allow, settings.privacy.clear_rooms)
        account_data = AccountData(db)
        rooms = Rooms(db, name)
        invite_blocking = InviteBlocking(account_data, rooms)
        contact_links = ContactLinks(db, clock)
        contact_gate = ContactGate(db, clock, rooms, contact_links, settings.contact, name)
        hidden_invites = HiddenInvites(invite_blocking, contact_gate)
        passwords = Passwords(settings.accounts.password_hash_parallel)
        users = Users(db, name, passwords, clock)
        restrained = Restrained(users)
        restrained_doors = RestrainedDoors(restrained)
        federation = settings.federation
        controls = ServerControls(name, federation.allow, federation.deny)

        # The network, as far as we go out: the federation, push gateways and the operator's own programs have connections
        # of their own, so that slow ones use up nobody else's.
        rule = AddressRule(private=federation.allow_private_addresses, here=settings.on_loopback)
        lookups = SystemLookups()
        ca_file = self.data_dir / federation.extra_ca_file if federation.extra_ca_file else None
        trusted = tls_context(ca_file)
        outward = Outward(lookups, rule, trusted)
        plain_http = rule.here or rule.private
        to_gateways = Outward(lookups, rule, trusted, plain=plain_http)
        to_webhooks = Outward(lookups, AddressRule(), trusted)
        to_tools = Outward(lookups, AddressRule(private=True), trusted, plain=True)

        # The doors.
        keeping = self._keeping = Doorkeeping(
            settings.hooks, db, clock, rooms, Posting(to_webhooks), Posting(to_tools), self.data_dir
        )
        controls.also_ask(keeping.restrictions.refuses)
        controls.also_admit(keeping.restrictions.admits)
        keeping.restrictions.on_change.append(controls.changed)
        service_doors = ServiceDoors()
        doors = Together(
            [
                OpenDoors() if federation.enabled else AloneDoors(), service_doors,
                controls, ReservedNames(), restrained_doors, invite_blocking, contact_gate, *keeping.doors,
            ]
        )  # fmt: skip
        departures = Departures(name, controls.allows)

        # Other servers, as far as we ask them.
        discovery = Discovery(lookups, outward, clock)
        backoff = Backoff(clock, least=federation.outbox_backoff_min, most=federation.outbox_backoff_max)
        timeout = federation.request_timeout.seconds
        connections = Connections(name, key, discovery, outward, backoff, doors, timeout=timeout)
        own_keys = self._own_keys = OwnKeys(self.data_dir, settings, key, db, clock)
        kept_keys = KeptKeys(name, key, db, own_keys.old)
        keyring = Keyring(
            name, key, db, clock, connections.server_keys, timeout=federation.key_timeout.seconds,
            old_keys=own_keys.old, notaries=federation.key_notaries, ask_notary=connections.notary_keys, kept=kept_keys,
        )  # fmt: skip
        remote = Client(connections, keyring)

        # Accounts.
        sessions = Sessions(db, bell, clock, settings.accounts.access_token_lifetime)
        tokens = RegistrationTokens(db, clock, settings.registration)
        reauth = Reauth(users, tokens, limits, clock)
        devices = Devices(db, sessions, reauth)
        login = Login(db, users, devices, doors, limits, settings.public_base_url)
        register = Register(db, users, devices, reauth, tokens, doors, settings.registration, limits)
        register.on_made.append(lambda who, by: keeping.flags.registered(who, tokens.name_of(by) if by else None))
        shared_secret = SharedSecret(settings.registration.shared_secret, register, clock)
        account = Account(db, users, sessions, devices, reauth)
        moderated = Moderated(db, users, sessions, devices, account, restrained)
        openid = OpenId(users, clock)
        registrations = load_all(self.data_dir, settings.appservices.registration_files)
        appservices = self._appservices = Appservices(
            registrations, service_doors, db, clock, users, devices, ToServices(to_tools)
        )
        local_user_exists = appservices.asking.user_exists if registrations else users.exists

        # Rooms.
        appender = Appender(rooms)
        profiles = Profiles(
            db, users, rooms, doors, remote, open_to_everyone=settings.privacy.profiles_open, seal_open=seal.open
        )
        intake = Intake(remote, seal)
        gaps = Gaps(db, rooms, appender, intake, remote)
        receiver = Receiver(db, rooms, appender, intake, gaps, doors)
        history = History(db, rooms, appender, intake, gaps, remote)
        sender = Sender(db, rooms, appender, seal, doors, clock, key)
        later = Later(db, clock, rooms, receiver, seal, remote)
        receiver.keep_for_later = later.keep
        policies = PolicyServers(name, remote)
        receiver.look_at, sender.policies = policies.look_at, policies
        creator = Creator(db, rooms, appender, sender, seal, doors, profiles, key, settings.rooms.default_version)
        afar = Afar(db, rooms, appender, intake, remote, key)
        partial_joins = PartialJoins(db, clock, rooms, appender, intake, remote)
        afar.on_partial = partial_joins.begin
        partial_joins.keep_for_later = later.keep_all
        members = Members(
            db, rooms, appender, sender, seal, doors, profiles, afar, receiver,
            clear_rooms=settings.privacy.clear_rooms, local_user_exists=local_user_exists,
        )  # fmt: skip
        viewing = Viewing(db, rooms)
        filters = Filters(db)
        timeline = Timeline(db, rooms, viewing, parse_event_filter, history.backfill)
        directory = Directory(db, rooms, viewing, sender, doors, remote, clock)
        rooms_part = RoomsPart(db, rooms, viewing, seal, clock, settings.privacy.clear_rooms)
        write_routes = WriteRoutes(rooms, sender, creator, members, directory, limits)
        summaries = Summaries(db, rooms, members, directory, remote)
        dates = Dates(db, rooms, viewing, remote, history.backfill)
        upgrades = Upgrades(db, rooms, sender, creator, seal, doors)
        delayed = DelayedEvents(db, clock, rooms, sender, seal, limits)
        grace = Grace(db, clock, settings.privacy.redacted_grace)

        # Keys.
        published = Published(db, name)
        device_lists = DeviceLists(db, clock, published, rooms, departures, name)
        remote_lists = RemoteLists(db, published, device_lists, rooms, remote, name)
        signatures = UserSignatures(db)
        to_device = ToDevice(db, clock, departures, devices, seal, doors, name)
        one_time_keys = OneTimeKeys(db, clock, devices, remote, name)
        cross_signing = CrossSigning(db, published, device_lists, remote_lists, signatures, devices, reauth, name)
        device_keys = DeviceKeys(
            db, published, device_lists, remote_lists, one_time_keys, cross_signing, signatures, to_device, devices, name,
        )  # fmt: skip
        backup = KeyBackup(db, seal)
        dehydrated = Dehydrated(db, devices, published, device_lists, one_time_keys, cross_signing)

        # What passes, what is counted, what is stored beside.
        receipts = Receipts(db, clock, rooms, departures, name)
        typing = TypingNotices(bell, clock, rooms, departures, name)
        presence = Presence(settings.presence.enabled, bell, clock, rooms, departures, name, texts=seal.open)
        push_rules = PushRules(db)
        unread = Unread(db, rooms, push_rules, receipts, account_data.ignored_known)
        badges = Badges(db, rooms, unread, receipts, push_rules)
        pushers = Pushers(db, clock, devices, plain_http=plain_http)
        gateway = Gateway(
            db, bell, clock, rooms, push_rules, badges, pushers, Posting(to_gateways), account_data.ignored_users,
        )  # fmt: skip
        notifications = Notifications(db, rooms, push_rules, badges, account_data.ignored_users)
        copies = RemoteCopies(db, clock, settings.media, seal, remote, media_folder / "remote")
        media = Media(db, clock, settings.media, seal, doors, copies, name, media_folder / "local")

        notices = ServerNotices(db, users, rooms, creator, members, sender, account_data, seal)

        # Who is told of what happens elsewhere.
        appservices.answer_for_names(login, register, profiles, directory)
        rooms.updates_profile = members.update_profile
        profiles.update_rooms = members.update_profile
        profiles.adopt_avatar = media.adopt
        sender.adopt_avatar = media.adopt
        account.leave_rooms = members.leave_everything
        account_data.provided["m.push_rules"] = push_rules.provide
        account_data.provided["m.fully_read"] = receipts.provide_fully_read
        account.on_deactivated += [
            profiles.forget, account_data.forget, filters.forget, push_rules.forget, backup.forget,
            cross_signing.forget, pushers.forget, delayed.forget, contact_gate.forget, contact_links.forget, erasure.erase,
        ]  # fmt: skip
        devices.on_device_deleted += [device_keys.device_deleted, pushers.device_deleted, dehydrated.device_deleted]
        write_routes.delayed = delayed.asked
        contact_gate.leave, contact_gate.forget_room = members.leave, members.forget
        contact_gate.tell = members.tell_again
        restrained_doors.sender_of = rooms.sender_of
        media.inspector = keeping.finish(media.store, copies)
        members.before_turning_down = notices.keeps
        devices.is_signing_key = cross_signing.is_signing_key

        # /sync.
        self._parts: list[Part] = [
            Advertised(
                name, settings.public_base_url, settings.rooms.default_version, sealed=not seal.open,
                transports=transports(settings.calls.livekit_service_urls), capabilities=DELAYED_CAPABILITIES,
            ), Absent(), Calls(settings.turn, settings.calls, clock), openid, moderated, delayed, dehydrated,
            departures, users, sessions, tokens, devices, login, register, shared_secret, account,
            rooms_part, partial_joins, timeline, Relations(db, viewing), directory, write_routes, later, _Looping(grace.run),
            summaries, Spaces(summaries, clock), dates, upgrades, MutualRooms(rooms), Following(db, rooms, account_data, push_rules),
            profiles, account_data, contact_gate, contact_links, Tags(db, account_data), filters, UserSearch(db, users, rooms, profiles),
            published, device_lists, remote_lists, signatures, to_device, one_time_keys, cross_signing, device_keys, backup,
            receipts, typing, presence, push_rules, unread, pushers, gateway, notifications, copies, media, notices,
        ]  # fmt: skip
        sync_rooms = SyncRooms(db, rooms, viewing)
        gather = Gather(rooms, bell, sync_rooms, self._parts, account_data.ignored_users)
        self._sync = ClassicSync(
            db, bell, clock, gather, filters, sessions.require_alive, presence.seen, to_device.queues.known_empty
        )
        orders = RoomOrders(db, bell, rooms, account_data)
        gather.hides_invite = orders.hides_invite = gateway.hides_invite = hidden_invites.hides
        gather.hides_leave = badges.holds_back = contact_gate.hides_leave
        tells = SlidingRooms(db, rooms, viewing, sync_rooms, unread)
        beside = SlidingExtensions(
            db, rooms, to_device, device_lists, one_time_keys, account_data, push_rules, receipts, typing
        )
        self._sliding = SlidingSync(
            db, bell, clock, rooms, orders, tells, beside, account_data.ignored_users, sessions.require_alive, presence.seen,
        )  # fmt: skip
        self._parts += [
            self._sync, self._sliding, *keeping.parts,
            *appservices.deliver(
                bell, rooms, directory, to_device, published, one_time_keys, sync_rooms.stripped, receipts, typing, presence
            ),
        ]  # fmt: skip

        # Other servers, as far as they ask us.
        outbox = Outbox(name, db, bell, clock, rooms, departures, connections, backoff)
        receiver.on_newcomer, outbox.as_seen_by = outbox.newcomer, partial(as_seen_by, db, rooms)
        partial_joins.on_completed += [outbox.came_to_light, device_lists.came_to_light]
        partial_joins.on_gone.append(device_lists.came_to_light)
        departures.deliver_passing_to(outbox.passing)
        edus = {edu_type: taker for part in self._parts for edu_type, taker in part.edus().items()}
        xmatrix = XMatrix(
            name, keyring, doors, outbox.heard_from, later.heard_from, meets=partial(limits.spend_at, "strangers")
        )
        asking, chains = Asking(rooms), Chains(db)
        invites = Invites(db, rooms, appender, intake, remote, seal, doors, key, local_user_exists=local_user_exists)
        self._parts += [
            keyring, kept_keys, Notary(name, key, keyring, clock, partial(limits.spend_at, "strangers")), outbox if federation.enabled else Part(), ServesMedia(media),
            Queries(name, VERSION, directory, profiles, device_keys, one_time_keys),
            Inbound(rooms, receiver, invites=invites, edus=edus, doors=doors), invites, Answers(name, db, clock, rooms, asking, chains),
            Joins(db, rooms, sender, members, receiver, remote, asking, chains, key),
            Hierarchy(summaries), DatesAnswers(asking, dates), UserInfo(openid),
        ]  # fmt: skip

        # Reports, decisions, and the log of both.
        moderation = moderation_assembled.assemble(
            db, clock, users, rooms, viewing,
            Sources(kept_keys.verified_here, media.held),
            Means(devices, account, moderated, sender, members, keeping),
            Ground(
                appender, seal, key, settings.rooms.default_version, settings.base_url,
                settings.moderation.outside_addresses, profiles, account_data, account, devices, sessions, rooms_part, grace, copies, keeping,
                remote, connections, settings.moderation.forwarding, members, directory.room_of,
            ),
        )  # fmt: skip
        self._parts += moderation.parts
        appservices.lend_no_powers(login, moderation.acting.persons)
        contact_gate.own_accounts.update(f"@{localpart}:{name}" for localpart in OWN_NAMES)

        self._parts.append(Metrics(settings.metrics, db, clock, appender, keeping, lambda: Backlog(*outbox.backlog())))

        # What a browser shows.
        pages = pages_assembled.assemble(
            db, clock, limits, users, account, devices, doors, contact_gate, contact_links, moderation, keeping, media.held,
            copies, settings.public_base_url,
        )  # fmt: skip
        self._parts += pages.parts

        routes = [
            pages.shown(route) if part in pages.parts else route for part in self._parts for route in part.routes()
        ]
        self.web = Web(routes, sessions, xmatrix if federation.enabled else None, limits, appservices.services)
        self._listeners = Listeners(self.web, self.data_dir, clock)
        self._parts.append(_Looping(self._listeners.renew_certificates))
        self.db, self.bell, self.rooms, self.outbox, self.moderation = db, bell, rooms, outbox, moderation
        self._closing = [passwords.close, media.store.close, copies.store.close, keyring.close]
        self._closing_later = [outward.close, to_gateways.close, to_webhooks.close, to_tools.close, lookups.close]
        checks = (*moderation.checks, appservices.check)
        self._inspection = Inspection(db, rooms, self._parts, settings.privacy.seal, checks)
        self.commands: Mapping[str, Command] = {
            **account.commands(),
            **tokens.commands(),
            **moderated.commands(),
            **keeping.commands(),
            **self._inspection.commands(),
            **own_keys.commands(),
            **Doctor(settings, key, clock, lookups, trusted, connections, backoff).commands(),
            **Forgetting(name, db, rooms, appender, self._parts, grace.must_stay).commands(),
            **moderation.commands,
            **Reloading(self.data_dir, settings, controls).commands(),
            "status": self._status,
        }

    # --- life

    async def open(self) -> None:
        """Database and memory. Raises WrongDatabase."""
        schemas = [part.schema for part in self._parts if part.schema is not None]
        await self.db.open(schemas, self.settings.server_name)
        await self.rooms.open()
        await self._keeping.open()

    async def start(self) -> None:
        """Listeners and loops. Raises OSError where a port is not to be had, NotSealed, WrongKey."""
        await self._inspection.require_sealed()
        await self._own_keys.require_known()
        await self._appservices.prepare()
        await self._listeners.open(self.settings.listeners)
        self._loops = asyncio.create_task(self._run_parts(), name="parts")

    async def stop(self) -> None:
        self._sync.stop()
        self._sliding.stop()
        await self._listeners.close()
        if self._loops is not None:
            self._loops.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._loops
        for close in self._closing:
            close()
        for close_later in self._closing_later:
            await close_later()
        await self.db.close()

    async def _run_parts(self) -> None:
        async with asyncio.TaskGroup() as group:
            for part in self._parts:
                group.create_task(self._run_part(part), name=type(part).__name__)

    async def _run_part(self, part: Part) -> None:
        """A loop that breaks is begun again: one part's trouble must not end the others."""
        while True:
            try:
                await part.run()
                return
            except Exception as error:
                log.error("a part's loop broke and is begun again", part=type(part).__name__, exc_info=error)
                await self.clock.sleep(1.0)

    async def _status(self) -> dict[str, Any]:
        return {"server_name": self.settings.server_name, "version": VERSION, "pos": self.db.stable_pos()}


class _Looping(Part):
    """A loop without tables."""

    def __init__(self, loop: Callable[[], Awaitable[None]]) -> None:
        self._loop = loop

    async def run(self) -> None:
        await self._loop()
