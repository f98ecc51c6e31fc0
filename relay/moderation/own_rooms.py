"""Rooms in which the relay itself speaks: a notice room for each person, and the room of the moderators.

They never leave this server, nobody but the relay's own user writes in them, and people are put into them without being
asked: a suspended person has to hear of it too. No door is asked: these are the relay's own. What is said comes from
notice_words.py alone. Spec: client-server-api/#server-notices.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence

from relay.accounts.users import Users, find
from relay.db import ChainBroken, Database, Query, Tx
from relay.doors import OpenDoors
from relay.errors import ApiError, Forbidden
from relay.moderation import notice_words
from relay.part import Part
from relay.people.account_data import AccountData
from relay.people.profile import Profiles
from relay.protocol.seal import Seal
from relay.protocol.versions import VERSIONS
from relay.rooms.append import Appender
from relay.rooms.create import Creator
from relay.rooms.rooms import Rooms
from relay.rooms.send import Sender
from relay.rooms.store import LOCAL
from relay.tables import Schema, Table

MODERATORS = "moderators"
# Nobody can register these; the second stands in where somebody already had the first.
NAMES = ("notices", "relay-notices", "relay-notices-2", "relay-notices-3")
NOTICE_TAG = "m.server_notice"
MEMBER = "m.room.member"
MAX_TRIES = 5

_LIFE = "until the account is closed; for the moderators' room, the relay's life"


class ReservedNames(OpenDoors):
    """The relay's own user must not be anybody else."""

    async def register(self, user_id: str) -> None:
        if user_id[1:].partition(":")[0] in NAMES:
            raise Forbidden("This name belongs to the server itself. Take another one.")


class OwnRooms(Part):
    schema = Schema(
        "own_rooms",
        tables=(
            Table(
                "own_rooms",
                "a room in which the relay itself speaks",
                {
                    "of": ("the person whose it is, or moderators", _LIFE),
                    "room_id": ("the room", _LIFE),
                    "speaker": ("the relay's own user", _LIFE),
                },
            ),
        ),
        steps=("CREATE TABLE own_rooms (of TEXT PRIMARY KEY, room_id TEXT NOT NULL, speaker TEXT NOT NULL)",),
    )

    def __init__(
        self,
        db: Database,
        rooms: Rooms,
        appender: Appender,
        sender: Sender,
        creator: Creator,
        seal: Seal,
        users: Users,
        profiles: Profiles,
        account_data: AccountData,
        default_version: str,
    ) -> None:
        """`sender` and `creator` are of its own, with doors that stand open."""
        self._db = db
        self._rooms = rooms
        self._appender = appender
        self._sender = sender
        self._creator = creator
        self._seal = seal
        self._users = users
        self._profiles = profiles
        self._account_data = account_data
        self._version = VERSIONS[default_version]
        self._speaker: str | None = None
        self._making = asyncio.Lock()

    # --- who speaks

    async def speaker(self) -> str:
        """The relay's own user, made when it first has something to say. It has no password and no session."""
        async with self._making:  # a notice and a list may want it at once
            if self._speaker is None:
                known = await self._db.read(lambda query: query.value("SELECT speaker FROM own_rooms LIMIT 1"))
                self._speaker = known if known is not None else await self._make_speaker()
            return self._speaker

    async def _make_speaker(self) -> str:
        for localpart in NAMES:
            user_id = self._users.new_id(localpart)
            before = await self._users.find(user_id)
            if before is None:
                with self._db.write() as tx:
                    self._users.add(tx, user_id, None)
                await tx
                return user_id
            if before.password_hash is None and not before.deactivated:
                return user_id  # ours, from a start that ended before its first room
        raise ApiError(
            "All names for the relay's own user are taken by people. Close one of these accounts.", status=500
        )

    # --- saying

    async def say(
        self, of: str, people: Collection[str], notice: str, fields: dict[str, object], beside: Callable[[Tx], None]
    ) -> None:
        """One sentence in the room of `of`, which is made where there is none; `people` are put into it."""
        room_id = await self._room(of)
        await self._gather(room_id, people, exactly=of == MODERATORS)
        await self._sender.send(
            room_id, sender=await self.speaker(), type=notice_words.MESSAGE, content=notice_words.say(notice, fields),
            sealed=False, beside=lambda tx, _: beside(tx),
        )  # fmt: skip

    async def room_of(self, of: str) -> str | None:
        found: str | None = await self._db.read(
            lambda query: query.value("SELECT room_id FROM own_rooms WHERE of = $1", of)
        )
        return found

    async def _room(self, of: str) -> str:
        known = await self.room_of(of)
        if known is not None:
            return known
        speaker = await self.speaker()
        version = self._version
        creation: dict[str, object] = {"room_version": version.name, "m.federate": False}
        if version.create_creator:
            creation["creator"] = speaker
        creation = self._seal.outgoing("m.room.create", "", creation)
        if version.room_id_is_create:
            creation["relay.nonce"] = f"own{self._db.next_pos()}"
        name = "Moderators" if of == MODERATORS else "Notices of this server"
        room_id = await self._creator.write(version, speaker, creation, self._plan(speaker, name), None, False)
        with self._db.write() as tx:
            tx.run("INSERT INTO own_rooms (of, room_id, speaker) VALUES ($1, $2, $3)", of, room_id, speaker)
        await tx
        return room_id

    def _plan(self, speaker: str, name: str) -> Sequence[tuple[str, str, dict[str, object]]]:
        levels: dict[str, object] = dict.fromkeys(
            ("events_default", "state_default", "invite", "kick", "ban", "redact"), 100
        )
        levels |= {"users": {} if self._version.creators_privileged else {speaker: 100}, "users_default": 0}
        planned: list[tuple[str, str, dict[str, object]]] = [
            ("m.room.power_levels", "", levels),
            ("m.room.join_rules", "", {"join_rule": "invite"}),
            ("m.room.history_visibility", "", {"history_visibility": "invited"}),
            ("m.room.guest_access", "", {"guest_access": "forbidden"}),
        ]
        if not self._seal.leaves_out("m.room.name"):
            planned.append(("m.room.name", "", {"name": name}))
        return planned

    # --- who is in it

    async def _gather(self, room_id: str, people: Collection[str], *, exactly: bool) -> None:
        room = await self._rooms.get(room_id)
        if room is None:
            raise ApiError("The relay's own room is gone.", status=500)
        speaker = await self.speaker()
        for user_id in people:
            if room.members.get(user_id) != "join":
                await self._put_in(room_id, speaker, user_id)
        if exactly:
            for user_id, membership in list(room.members.items()):
                if membership in ("join", "invite") and user_id != speaker and user_id not in people:
                    await self._sender.send(
                        room_id, sender=speaker, type=MEMBER, content={"membership": "leave"}, state_key=user_id
                    )

    async def _put_in(self, room_id: str, speaker: str, user_id: str) -> None:
        room = await self._rooms.get(room_id)
        if room is not None and room.members.get(user_id) != "invite":
            await self._sender.send(
                room_id, sender=speaker, type=MEMBER, content={"membership": "invite"}, state_key=user_id
            )
        content = {"membership": "join", **await self._profiles.member_content(user_id)}
        for _ in range(MAX_TRIES):
            room = await self._rooms.get(room_id)
            if room is None:
                raise ApiError("The relay's own room is gone.", status=500)
            async with room.lock:
                if room.dropped:
                    continue
                event = await self._sender.judged(room, sender=user_id, type=MEMBER, content=content, state_key=user_id)
                if room.dropped:
                    continue
                with self._db.write(chain=room_id) as tx:
                    self._appender.append(tx, room, event, marks=LOCAL)
                    self._account_data.set(tx, user_id, "m.tag", {"tags": {NOTICE_TAG: {}}}, room_id)
            try:
                await tx
                return
            except ChainBroken:
                continue
        raise ApiError("The relay's own room is busy repairing itself.", status=503)

    async def can_hear(self, user_id: str) -> bool:
        """Whether there is somebody to tell: a local account that is not closed."""
        if not self._users.is_local(user_id):
            return False
        user = await self._db.read(find, user_id)
        return user is not None and not user.deactivated

    # --- for relay audit and relay seal

    def is_own(self, query: Query, sender: str, event_type: str, content: object) -> bool:
        """Whether this readable message is the relay's own, in its own words."""
        if event_type != notice_words.MESSAGE or not notice_words.is_own(content):
            return False
        return bool(query.value("SELECT 1 FROM own_rooms WHERE speaker = $1 LIMIT 1", sender))

    def forget(self, tx: Tx, user_id: str, erase: bool) -> None:
        """The account is closed. (It leaves the room as it leaves all.)"""
        tx.run("DELETE FROM own_rooms WHERE of = $1", user_id)
