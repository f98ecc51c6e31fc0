"""The contact gate: invites of strangers are held back until the person invited lets them in, drops them, or they expire.

Held means: signed and stored like any invite, so that the stranger can't tell, and in no answer to her clients. Each invite
is judged once, by whichever way it came, before anything shows it; the judgement is a row for as long as the invite lasts.
Turning one down sends the leave. `invite_blocking.py` is what apps set themselves; `contact_links.py` lets strangers in.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, get_args

import structlog

from relay.clock import HOUR, MINUTE, SECOND, Clock, rest
from relay.config.contact import Contact, InvitesFrom
from relay.db import Database, Query, Tx
from relay.doors import OpenDoors
from relay.errors import ApiError, Forbidden, InvalidParam, NotFound
from relay.ids import server_of
from relay.part import Part
from relay.people.contact_links import ContactLinks
from relay.rooms.room import Room
from relay.rooms.rooms import Rooms
from relay.tables import Schema, Table

log = structlog.get_logger("contact")

CHOICES: tuple[InvitesFrom, ...] = get_args(InvitesFrom)
# Invites that are held back for one person; more are refused.
MAX_HELD = 200
# Of one server's people, so that no server alone shuts the gate for everybody.
MAX_HELD_OF_SERVER = 50
LOOK_MS = HOUR
# What could not be turned down at once, such as where the other server is down, is tried again after this.
RETRY_MS = 10 * MINUTE


@dataclass(slots=True, frozen=True)
class Held:
    room_id: str
    event_id: str
    sender: str
    held_ts: int
    until_ts: int


class ContactGate(Part, OpenDoors):
    """A door as well: it refuses where nobody may invite, or too many wait."""

    schema = Schema(
        "contact_gate",
        tables=(
            Table(
                "contact_settings",
                "who may invite a person, as she chose",
                {
                    "user_id": ("who chose", "until she closes the account"),
                    "invites_from": ("everybody, shared_rooms, link or nobody", "until she closes the account"),
                },
            ),
            Table(
                "judged_invites",
                "an invite that waits for an answer, and whether it is held back",
                {
                    "user_id": ("who is invited", "until it is answered or expires"),
                    "room_id": ("to which room", "until it is answered or expires"),
                    "event_id": ("by which event", "until it is answered or expires"),
                    "sender": ("by whom, since that is all she is shown of it", "until it is answered or expires"),
                    "held_ts": ("since when it is held back; none where it was let in", "until it is answered or expires"),
                    "until_ts": ("when it is turned down by itself", "until it is answered or expires"),
                },
            ),
        ),
        steps=(
            """
            CREATE TABLE contact_settings (user_id TEXT PRIMARY KEY, invites_from TEXT NOT NULL);
            CREATE TABLE judged_invites (
                user_id TEXT NOT NULL, room_id TEXT NOT NULL, event_id TEXT NOT NULL, sender TEXT NOT NULL, held_ts BIGINT,
                until_ts BIGINT, PRIMARY KEY (user_id, room_id)) CLUSTERED
            """,
        ),
    )  # fmt: skip

    def __init__(
        self, db: Database, clock: Clock, rooms: Rooms, links: ContactLinks, settings: Contact, server_name: str
    ) -> None:
        self._db = db
        self._clock = clock
        self._rooms = rooms
        self._links = links
        self._settings = settings
        self._server_name = server_name
        # (user, room) -> the invite that was judged, held back or not; the rows of `judged_invites`.
        self._judged: dict[tuple[str, str], str] = {}
        self._held: dict[str, dict[str, Held]] = {}
        self._loaded = False
        self._one_at_a_time = asyncio.Lock()
        self._news: list[tuple[str, str]] = []
        self._woken = asyncio.Event()
        # Whoever knocked has asked to be invited.
        self._asked_for: set[tuple[str, str]] = set()
        # Accounts of the relay's own, whose invites always pass.
        self.own_accounts: set[str] = set()
        # The server sets them: leaving a room, forgetting it, and telling her clients of an invite as if it came now.
        self.leave: Callable[[str, str], Awaitable[None]] | None = None
        self.forget_room: Callable[[str, str], Awaitable[None]] | None = None
        self.tell: Callable[[Tx, str, str], None] | None = None
        rooms.on_membership.append(self._membership_changed)

    # --- what a person chooses

    async def choice(self, user_id: str) -> InvitesFrom:
        found = await self._db.read(
            lambda query: query.value("SELECT invites_from FROM contact_settings WHERE user_id = $1", user_id)
        )
        return next((one for one in CHOICES if one == found), self._settings.invites_from)

    async def choose(self, user_id: str, choice: str) -> None:
        """From now on; what waits already stays as it is."""
        if choice not in CHOICES:
            raise InvalidParam(f"Choose one of these: {', '.join(CHOICES)}.")
        with self._db.write() as tx:
            tx.run(
                "INSERT INTO contact_settings (user_id, invites_from) VALUES ($1, $2)"
                " ON CONFLICT (user_id) DO UPDATE SET invites_from = excluded.invites_from",
                user_id,
                choice,
            )
        await tx

    async def invite(self, sender: str, target: str, room_id: str) -> None:
        if server_of(target) != self._server_name or sender in self.own_accounts:
            return
        choice = await self.choice(target)
        if choice == "everybody":
            return
        if choice == "nobody" and self._rooms.membership(room_id, target) != "knock":
            raise Forbidden(
                f"{target} takes no invites at present. Ask them in another way to allow them.",
                errcode="M_INVITE_BLOCKED",
            )
        await self._load()
        held, server = self._held.get(target, {}), server_of(sender)
        of_server = sum(1 for one in held.values() if server_of(one.sender) == server)
        too_many = len(held) >= MAX_HELD or of_server >= MAX_HELD_OF_SERVER
        if too_many and not await self._may_invite(sender, target, choice):
            raise Forbidden(f"{target} has too many unanswered invites. Try again in some days.")

    async def _may_invite(self, sender: str, target: str, choice: str) -> bool:
        if choice == "everybody" or sender in self.own_accounts:
            return True
        if choice == "shared_rooms" and await self._rooms.share_a_room(target, sender):
            return True
        return choice in ("shared_rooms", "link") and await self._links.has_pass(target, sender)

    # --- what is asked before an invite is shown

    async def hides(self, user_id: str, room_id: str) -> bool:
        """Whether her invite to this room is kept from her clients."""
        await self._judge(user_id, room_id)
        return room_id in self._held.get(user_id, ())

    def hides_leave(self, user_id: str, room_id: str) -> bool:
        """Whether she never heard of the invite whose end this is."""
        return room_id in self._held.get(user_id, ())

    async def held(self, user_id: str) -> list[Held]:
        await self._load()
        return sorted(self._held.get(user_id, {}).values(), key=lambda one: one.until_ts)

    # --- judging

    def _membership_changed(self, room: Room, user_id: str, before: str | None, now: str, pos: int) -> None:
        key = (user_id, room.room_id)
        if now == "invite":
            if before == "knock":
                self._asked_for.add(key)
            self._news.append(key)
            self._woken.set()
        elif before == "invite" or key in self._judged or room.room_id in self._held.get(user_id, ()):
            # Also where it is being judged at this moment. Whoever has joined knows of the room, and hears of all that follows.
            if now == "join":
                self._drop_held(user_id, room.room_id)
            self._news.append(key)
            self._woken.set()

    async def _load(self) -> None:
        if self._loaded:
            return
        async with self._one_at_a_time:
            if self._loaded:
                return
            rows = await self._db.read(
                lambda query: query.all(
                    "SELECT user_id, room_id, event_id, sender, held_ts, until_ts FROM judged_invites"
                )
            )
            for user_id, room_id, event_id, sender, held_ts, until_ts in rows:
                self._judged[(user_id, room_id)] = event_id
                if held_ts is not None:
                    self._held.setdefault(user_id, {})[room_id] = Held(room_id, event_id, sender, held_ts, until_ts)
            self._loaded = True

    async def _judge(self, user_id: str, room_id: str) -> None:
        """Once for each invite, before anything shows it."""
        await self._load()
        mine = self._rooms.memberships(user_id).get(room_id)
        if mine is None or mine.membership != "invite" or self._judged.get((user_id, room_id)) == mine.event_id:
            return
        async with self._one_at_a_time:
            mine = self._rooms.memberships(user_id).get(room_id)
            if mine is None or mine.membership != "invite" or self._judged.get((user_id, room_id)) == mine.event_id:
                return
            sender = await self._rooms.sender_of(mine.event_id) or ""
            choice = await self.choice(user_id)
            shown_already = (user_id, room_id) in self._judged and room_id not in self._held.get(user_id, ())
            passes = (
                shown_already
                or (user_id, room_id) in self._asked_for
                or await self._may_invite(sender, user_id, choice)
            )
            now = self._clock.now()
            held = None if passes else Held(room_id, mine.event_id, sender, now, now + self._settings.held_for)
            await self._record(user_id, room_id, mine.event_id, sender, held)

    async def _record(self, user_id: str, room_id: str, event_id: str, sender: str, held: Held | None) -> None:
        was_held = room_id in self._held.get(user_id, ())

        def take() -> None:
            self._asked_for.discard((user_id, room_id))
            mine = self._rooms.memberships(user_id).get(room_id)
            if mine is None or mine.membership != "invite":
                return  # answered meanwhile: its row goes with the news of that
            self._judged[(user_id, room_id)] = event_id
            if held is not None:
                self._held.setdefault(user_id, {})[room_id] = held
            else:
                self._drop_held(user_id, room_id)

        with self._db.write() as tx:
            tx.run(
                "INSERT INTO judged_invites (user_id, room_id, event_id, sender, held_ts, until_ts)"
                " VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (user_id, room_id) DO UPDATE SET event_id = excluded.event_id,"
                " sender = excluded.sender, held_ts = excluded.held_ts, until_ts = excluded.until_ts",
                user_id,
                room_id,
                event_id,
                sender,
                held.held_ts if held is not None else None,
                held.until_ts if held is not None else None,
            )
            if was_held and held is None and self.tell is not None:
                self.tell(tx, user_id, room_id)
            tx.after(take)
        await tx

    def _drop_held(self, user_id: str, room_id: str) -> None:
        held = self._held.get(user_id)
        if held is not None and held.pop(room_id, None) is not None and not held:
            del self._held[user_id]

    # --- what becomes of a held invite

    async def let_in(self, user_id: str, room_id: str) -> None:
        """Her apps show it, as if it had come now."""
        async with self._one_at_a_time:
            held = self._require(user_id, room_id, await self._now_held(user_id))
            await self._record(user_id, room_id, held.event_id, held.sender, None)

    async def let_in_from(self, user_id: str, sender: str) -> None:
        """Whatever this person sent, since she may invite now."""
        for one in await self.held(user_id):
            if one.sender == sender:
                await self.let_in(user_id, one.room_id)

    async def drop(self, user_id: str, room_id: str) -> None:
        """Turns it down: the room hears of the leave, her apps of nothing."""
        self._require(user_id, room_id, await self._now_held(user_id))
        if self.leave is not None:
            await self.leave(user_id, room_id)
        await self._over(user_id, room_id)

    async def _now_held(self, user_id: str) -> dict[str, Held]:
        if not self._loaded:
            raise ApiError("The relay is just starting. Try again in a moment.", status=503)
        return self._held.get(user_id, {})

    def _require(self, user_id: str, room_id: str, held: dict[str, Held]) -> Held:
        one = held.get(room_id)
        if one is None:
            raise NotFound("This invite does not wait any more: it was answered, taken back, or has expired.")
        return one

    async def _over(self, user_id: str, room_id: str) -> None:
        """The invite is no more. A held one is forgotten before anything could speak of its end."""
        mine = self._rooms.memberships(user_id).get(room_id)
        if mine is not None and mine.membership == "invite":
            return
        gone = mine is not None and mine.membership in ("leave", "ban")
        if gone and room_id in self._held.get(user_id, ()) and self.forget_room is not None:
            await self.forget_room(user_id, room_id)

        def take() -> None:
            self._judged.pop((user_id, room_id), None)
            self._drop_held(user_id, room_id)

        with self._db.write() as tx:
            tx.run("DELETE FROM judged_invites WHERE user_id = $1 AND room_id = $2", user_id, room_id)
            tx.after(take)
        await tx

    def forget(self, tx: Tx, user_id: str, erase: bool) -> None:
        """For `Account.on_deactivated`; its invites go with its leaving."""
        tx.run("DELETE FROM contact_settings WHERE user_id = $1", user_id)

    def forget_server(self, query: Query, server: str) -> int:
        return query.run("DELETE FROM judged_invites WHERE sender LIKE $1", f"%:{server}")

    # --- the loop

    async def run(self) -> None:
        await self._load()
        # Of a time when nobody looked.
        rows = await self._db.read(_unjudged)
        for key in [*rows, *self._judged]:
            await self._follow(*key)
        while True:
            self._woken.clear()
            began = self._clock.monotonic()
            news, self._news = self._news, []
            for user_id, room_id in news:
                await self._follow(user_id, room_id)
            wait_ms = await self._expire()
            if self._news:
                continue
            await rest(self._clock, self._woken, wait_ms / SECOND, since=began)

    async def _follow(self, user_id: str, room_id: str) -> None:
        if self._rooms.membership(room_id, user_id) == "invite":
            await self._judge(user_id, room_id)
        else:
            await self._over(user_id, room_id)

    async def _expire(self) -> int:
        """Turns down what was held for long enough; returns when to look again."""
        now, wait_ms = self._clock.now(), LOOK_MS
        for user_id, held in list(self._held.items()):
            for one in list(held.values()):
                if one.until_ts > now:
                    wait_ms = min(wait_ms, one.until_ts - now)
                    continue
                try:
                    await self.drop(user_id, one.room_id)
                except ApiError:
                    wait_ms = min(wait_ms, RETRY_MS)
                except Exception as error:
                    log.warning(
                        "a held invite could not be turned down yet", user=user_id, room=one.room_id, exc_info=error
                    )
                    wait_ms = min(wait_ms, RETRY_MS)
        return wait_ms


def _unjudged(query: Query) -> list[Any]:
    return query.all(
        "SELECT m.user_id, r.room_id FROM memberships m JOIN rooms r ON r.nid = m.room_nid"
        " WHERE m.local = 1 AND m.membership = 'invite' AND NOT EXISTS (SELECT 1 FROM judged_invites j"
        " WHERE j.user_id = m.user_id AND j.room_id = r.room_id AND j.event_id = m.event_id)"
    )
