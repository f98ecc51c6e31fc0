"""The application services of one relay, put together: who they are and what they are asked first, what they are told later.

`server.py` makes one of these before the rooms, which ask it for names, and has it deliver once everything is there.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import structlog

from relay.accounts.devices import Devices
from relay.accounts.login import Login
from relay.accounts.register import Register
from relay.accounts.users import Users
from relay.appservices.asking import Asking
from relay.appservices.delivery import Delivery
from relay.appservices.networks import Networks
from relay.appservices.registration import Registration
from relay.appservices.room_lists import RoomLists
from relay.appservices.services import ServiceDoors, Services
from relay.appservices.transaction import Teller
from relay.appservices.whereabouts import Whereabouts
from relay.bell import Bell
from relay.clock import Clock
from relay.db import Database
from relay.ephemeral.presence import Presence
from relay.ephemeral.receipts import Receipts
from relay.ephemeral.typing_notices import TypingNotices
from relay.keys.one_time_keys import OneTimeKeys
from relay.keys.published import Published
from relay.keys.to_device import ToDevice
from relay.moderation.persons import Persons
from relay.part import Part
from relay.people.profile import Profiles
from relay.remote import SpeaksToServices
from relay.rooms.directory import Directory
from relay.rooms.room import Room
from relay.rooms.rooms import Rooms

log = structlog.get_logger("appservices")


class Appservices:
    def __init__(
        self,
        registrations: Sequence[Registration],
        doors: ServiceDoors,
        db: Database,
        clock: Clock,
        users: Users,
        devices: Devices,
        speaks: SpeaksToServices,
    ) -> None:
        self._db = db
        self._clock = clock
        self._devices = devices
        self.services = Services(registrations, db, clock, users, devices)
        self.asking = Asking(self.services, speaks, users)
        self._delivery: Delivery | None = None
        doors.services = self.services

    def answer_for_names(self, login: Login, register: Register, profiles: Profiles, directory: Directory) -> None:
        """Whoever makes or looks up a name asks here first."""
        if self.services.any:
            login.namespaces = register.namespaces = self.services
            profiles.local_user_exists = self.asking.user_exists
            directory.owned_by_service = self.services.require_alias
            directory.asks_services = self.asking.alias_exists

    def deliver(
        self,
        bell: Bell,
        rooms: Rooms,
        directory: Directory,
        to_device: ToDevice,
        published: Published,
        one_time_keys: OneTimeKeys,
        stripped: Callable[[Room, str], Awaitable[list[Any]]],
        receipts: Receipts,
        typing: TypingNotices,
        presence: Presence,
    ) -> list[Part]:
        """The parts that tell the services."""

        def teller(one: Registration, whereabouts: Whereabouts) -> Teller:
            return Teller(
                one, self.services, self._db, bell, rooms, whereabouts, to_device, published, one_time_keys, stripped,
            )  # fmt: skip

        delivery = self._delivery = Delivery(
            self.services.all, self._db, bell, self._clock, self.asking, self._devices, receipts, typing, presence,
            partial(Whereabouts, services=self.services, rooms=rooms), teller, rooms.departed,
        )  # fmt: skip
        self.services.heard_from = delivery.heard_from
        lists = RoomLists(self.services, self._db, rooms)
        directory.of_networks = lists.listed
        return [self.asking, Networks(self.services, self.asking, self._clock), lists, delivery]

    def lend_no_powers(self, login: Login, persons: Persons) -> None:
        """A namespace may cover somebody who moderates; no service gets to be her."""
        self.services.moderating.who = persons.moderators
        login.moderates = persons.is_moderator

    async def check(self) -> list[dict[str, str]]:
        """Findings for `relay check`: moderators within a namespace."""
        who = self.services.moderating.who
        if not self.services.any or who is None:
            return []
        return [
            {
                "severity": "warning",
                "what": f"The namespace of the application service {one.id} covers {user_id}, who moderates here. The service is "
                "refused wherever it tries to act for this person, and is told nothing on their account.",
                "todo": f"Narrow namespaces.users in {one.file}, so that no person's account matches.",
            }
            for user_id in await who()
            for one in self.services.all
            if self.services.covers(one, user_id) and not self.services.is_itself(one.id, user_id)
        ]  # fmt: skip

    async def prepare(self) -> None:
        """Before anybody is answered."""
        if self.services.any:
            await self.services.prepare()
            await self.services.moderating.look()
        if await self.check():
            log.warning("the namespace of an application service covers a moderator; relay check says whose")
        if self._delivery is not None:
            await self._delivery.prepare()
