"""Flags: what looks odd from the outside, for a person to look at. Rates only, no content; in memory, for a day.

A flag may do two things: put cases about somebody further up in the queue (`weight`), and, where the config says
`hooks.flags.mode: on`, slow her invites and new rooms down for a day at most, which is written into the log as automated.
It never removes, bans or closes anything. In the mode `shadow`, the default, it is only shown.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from relay.clock import DAY, HOUR, MINUTE, SECOND, Clock
from relay.config.hooks import Flags as FlagSettings
from relay.db import Database, Tx
from relay.doors import OpenDoors
from relay.errors import LimitExceeded
from relay.ids import server_of
from relay.moderation.signs import MAX_COUNTERS, Kept, Names, Share, Usual, Window
from relay.protocol.event import Event
from relay.rooms.room import Room
from relay.rooms.rooms import Rooms

MAX_FLAGS = 5_000
MAX_INVITES_REMEMBERED = 20_000
KEPT_MS = DAY

# Thresholds; safety, section 3.
NEW_ACCOUNT_MS = 2 * DAY
INVITES_PER_10_MIN = 10
INVITES_OF_SERVER_PER_HOUR = 15
REFUSED_SHARE, OF_LAST_INVITES = 0.6, 20
ROOMS_PER_HOUR, REPLIED_SHARE = 30, 0.05
JOINS_DEVIATIONS, JOINS_AT_LEAST = 4.0, 20
ACCOUNTS_OF_TOKEN_PER_HOUR = 5
# Of the accounts that one registration token made within a day.
WRONG_ACCOUNTS, WRONG_SHARE = 3, 0.3
MAX_ACCOUNTS_REMEMBERED = 20_000
UPLOAD_BYTES_PER_HOUR = 200 * 1024 * 1024
# What a flag adds to the weight of a case.
WEIGHTS = {
    "invite-wave": 40,
    "refused-invites": 50,
    "server-wave": 30,
    "fan-out": 50,
    "join-wave": 20,
    "uploads": 10,
    "token-wave": 30,
    "token-misused": 50,
    "policy-list": 60,
    "disclosed-text": 60,
}
SLOWED_EVERY_MS = 10 * MINUTE


@dataclass(slots=True)
class Flag:
    rule: str
    subject: str
    raised_ts: int
    value: float
    times: int = 1
    slowed_until: int = 0

    def as_json(self) -> dict[str, Any]:
        return {
            "rule": self.rule,
            "subject": self.subject,
            "raised": self.raised_ts,
            "value": round(self.value, 2),
            "times": self.times,
            "slowed_until": self.slowed_until or None,
        }


class Flags:
    def __init__(self, settings: FlagSettings, db: Database, clock: Clock, rooms: Rooms) -> None:
        self.mode = settings.mode
        self._slows_for = int(settings.slows_for)
        self._db = db
        self._clock = clock
        self._rooms = rooms
        self._names = Names(secrets.token_bytes)
        self._flags: OrderedDict[tuple[str, str], Flag] = OrderedDict()
        self._last_slow: dict[str, int] = {}
        self._invites = Kept(lambda: Window(10 * MINUTE))
        self._of_servers = Kept(lambda: Window(HOUR))
        self._refused = Kept(lambda: Share(OF_LAST_INVITES))
        self._spoke_in = Kept[dict[bytes, tuple[int, bool]]](dict)
        # Who spoke in which room within the hour, as hashes of this process.
        self._heard: set[int] = set()
        self._heard_since = 0
        self._joins = Kept(Usual)
        self._joined = Kept(lambda: Window(10 * MINUTE))
        self._uploads = Kept(lambda: Window(HOUR))
        # (room, invited) -> inviter, for whether an invite was wanted.
        self._inviter: OrderedDict[tuple[str, str], str] = OrderedDict()
        self._accounts_of = Kept(lambda: Window(HOUR))
        # Account -> (the registration token that it was made with, as `RegistrationTokens.name_of` calls it, and when).
        self._token_of: OrderedDict[str, tuple[str, int]] = OrderedDict()
        # Those of them that were reported, flagged or restricted.
        self._wrong: set[str] = set()
        # When an account of ours was made; the assembly sets it. None where there is none.
        self.created: Callable[[str], Awaitable[int | None]] | None = None
        self._made: dict[str, int | None] = {}
        # In the write of a step that a flag takes by itself: the audit log. (tx, rule, subject)
        self.on_step: list[Callable[[Tx, str, str], None]] = []
        rooms.on_membership.append(self.membership_changed)

    def __bool__(self) -> bool:
        return self.mode != "off"

    # --- what is seen

    async def _age_known(self, user_id: str) -> int | None:
        if server_of(user_id) != self._rooms.server_name or self.created is None:
            return None
        if user_id not in self._made:
            if len(self._made) >= MAX_FLAGS:
                self._made.clear()
            self._made[user_id] = await self.created(user_id)
        return self._made[user_id]

    async def invited(self, sender: str, target: str, room_id: str) -> None:
        now = self._clock.now()
        made = await self._age_known(sender)
        if made is not None and now - made < NEW_ACCOUNT_MS + DAY:  # only the day of its making is known
            count = self._invites.of(self._names.of(sender, now)).add(now)
            if count > INVITES_PER_10_MIN:
                self.raise_("invite-wave", sender, count)
        server = server_of(sender)
        if server != self._rooms.server_name:
            count = self._of_servers.of(self._names.of(server, now)).add(now)
            if count > INVITES_OF_SERVER_PER_HOUR:
                self.raise_("server-wave", server, count)
        self._inviter[room_id, target] = sender
        if len(self._inviter) > MAX_INVITES_REMEMBERED:
            self._inviter.popitem(last=False)

    def registered(self, user_id: str, token_name: str | None) -> None:
        """For `Register.on_made`. Without a token the account is nobody's but the person's own."""
        if not self or token_name is None:
            return
        now = self._clock.now()
        while self._token_of:
            oldest = next(iter(self._token_of))
            if len(self._token_of) < MAX_ACCOUNTS_REMEMBERED and now - self._token_of[oldest][1] < DAY:
                break
            del self._token_of[oldest]
            self._wrong.discard(oldest)
        self._token_of[user_id] = (token_name, now)
        count = self._accounts_of.of(self._names.of(token_name, now)).add(now)
        if count > ACCOUNTS_OF_TOKEN_PER_HOUR:
            self.raise_("token-wave", _of_token(token_name), count)

    def went_wrong(self, user_id: str) -> None:
        """Somebody was reported, flagged or restricted: does that happen to many who came with the same token?"""
        if user_id not in self._token_of or user_id in self._wrong:
            return
        self._wrong.add(user_id)
        name, now = self._token_of[user_id][0], self._clock.now()
        came = [one for one, (token, since) in self._token_of.items() if token == name and now - since < DAY]
        wrong = sum(one in self._wrong for one in came)
        if wrong >= WRONG_ACCOUNTS and wrong / len(came) >= WRONG_SHARE:
            self.raise_("token-misused", _of_token(name), wrong)

    def _subjects(self, user_id: str) -> tuple[str, ...]:
        """Under which subjects a flag speaks of somebody."""
        token = self._token_of.get(user_id)
        return (user_id,) if token is None else (user_id, _of_token(token[0]))

    def membership_changed(self, room: Room, user_id: str, before: str | None, now_is: str, pos: int) -> None:
        """For `Rooms.on_membership`."""
        if not self:
            return
        if before == "invite" and now_is != "invite":
            self._invite_ended(room.room_id, user_id, wanted=now_is == "join")
        if now_is == "join" and before != "join":
            self._somebody_joined(room.room_id)

    def _invite_ended(self, room_id: str, user_id: str, *, wanted: bool) -> None:
        sender = self._inviter.pop((room_id, user_id), None)
        if sender is None:
            return
        share = self._refused.of(self._names.of(sender, self._clock.now())).add(not wanted)
        if share is not None and share > REFUSED_SHARE:
            self.raise_("refused-invites", sender, share)

    def _somebody_joined(self, room_id: str) -> None:
        now = self._clock.now()
        name = self._names.of(room_id, now)
        many = self._joined.of(name).add(now)
        if self._joins.of(name).add(now) > JOINS_DEVIATIONS and many >= JOINS_AT_LEAST:
            self.raise_("join-wave", room_id, many)

    def spoke(self, event: Event) -> None:
        """A message, in a room of two: who writes to many strangers and gets no answer? Only the first of each within an hour
        tells anything, and only it costs anything."""
        now = self._clock.now()
        if now - self._heard_since >= HOUR or len(self._heard) >= MAX_COUNTERS:
            self._heard.clear()
            self._heard_since = now
        pair = hash((event.sender, event.room_id))
        if pair in self._heard:
            return
        self._heard.add(pair)
        room = self._rooms.loaded(event.room_id)
        if room is None or room.joined_count > 2:
            return
        others = [u for u, m in room.members.items() if m in ("join", "invite") and u != event.sender]
        if not others:
            return
        name = self._names.of(event.room_id, now)
        answers = False
        for user_id in others[:2]:
            other = self._spoke_in.of(self._names.of(user_id, now))
            if name in other:
                other[name] = (other[name][0], True)
                answers = True
        mine = self._spoke_in.of(self._names.of(event.sender, now))
        if name in mine and now - mine[name][0] <= HOUR:
            return
        for old in [one for one, (since, _) in mine.items() if now - since > HOUR]:
            del mine[old]
        mine[name] = (now, answers)
        if len(mine) > ROOMS_PER_HOUR:
            replied = sum(replied for _, replied in mine.values()) / len(mine)
            if replied < REPLIED_SHARE:
                self.raise_("fan-out", event.sender, len(mine))
            if len(mine) > 10 * ROOMS_PER_HOUR:
                mine.clear()

    def uploaded(self, user_id: str, size: int) -> None:
        now = self._clock.now()
        total = self._uploads.of(self._names.of(user_id, now)).add(now, size)
        if total > UPLOAD_BYTES_PER_HOUR:
            self.raise_("uploads", user_id, total)

    def listed_by_others(self, kind: str, subject: str, room_id: str) -> None:
        """For `PolicyLists.on_review`."""
        self.raise_("policy-list", subject, 1)

    # --- what follows

    def raise_(self, rule: str, subject: str, value: float) -> None:
        if not self:
            return
        now = self._clock.now()
        flag = self._flags.get((rule, subject))
        if flag is not None and now - flag.raised_ts < KEPT_MS:
            flag.value, flag.times = max(flag.value, value), flag.times + 1
            return
        self._flags[rule, subject] = flag = Flag(rule, subject, now, value)
        self.went_wrong(subject)
        while len(self._flags) > MAX_FLAGS:
            self._flags.popitem(last=False)
        if self.mode == "on":
            flag.slowed_until = now + min(self._slows_for, DAY)
            with self._db.write() as tx:
                for told in self.on_step:
                    told(tx, rule, subject)

    def listed(self) -> list[Flag]:
        now = self._clock.now()
        for key in [key for key, flag in self._flags.items() if now - flag.raised_ts >= KEPT_MS]:
            del self._flags[key]
        return list(self._flags.values())

    def about(self, subject: str) -> list[Flag]:
        """Of this person, her server, and the token she came with; or of a server."""
        subjects = (server_of(subject), *self._subjects(subject))
        return [flag for flag in self.listed() if flag.subject in subjects]

    def weight(self, subject: str) -> int:
        """0 to 100: how much further up a case about this person or server belongs."""
        return min(100, sum(WEIGHTS.get(flag.rule, 10) for flag in self.about(subject)))

    async def reported(self, subject: str) -> int:
        """For the reports, when one comes in: the weight of it."""
        self.went_wrong(subject)
        return self.weight(subject)

    def require_slowly(self, subject: str) -> None:
        """Raises LimitExceeded where somebody is slowed down and did this a moment ago."""
        if self.mode != "on" or not self._flags:
            return
        now = self._clock.now()
        subjects = self._subjects(subject)
        if not any(flag.subject in subjects and flag.slowed_until > now for flag in self._flags.values()):
            return
        last = self._last_slow.get(subject, 0)
        if now - last < SLOWED_EVERY_MS:
            raise LimitExceeded((last + SLOWED_EVERY_MS - now) / SECOND)
        if len(self._last_slow) >= MAX_FLAGS:
            self._last_slow.clear()
        self._last_slow[subject] = now


def _of_token(name: str) -> str:
    return f"registration token {name}"


class FlagDoors(OpenDoors):
    """Sees what passes the doors; turns nobody away, and slows down who is flagged where the mode is on."""

    def __init__(self, flags: Flags) -> None:
        self._flags = flags

    async def invite(self, sender: str, target: str, room_id: str) -> None:
        if room_id:
            self._flags.require_slowly(sender)
            self._flags.require_slowly(server_of(sender))
            await self._flags.invited(sender, target, room_id)

    async def create_room(self, user_id: str, content: dict[str, Any]) -> None:
        self._flags.require_slowly(user_id)

    async def send(self, event: Event) -> None:
        if event.state_key is None:
            self._flags.spoke(event)
        elif event.membership == "invite" and server_of(event.state_key) != server_of(event.sender):
            await self.invite(event.sender, event.state_key, event.room_id)

    async def receive(self, origin: str, event: Event) -> None:
        if event.state_key is None:
            self._flags.spoke(event)

    async def upload(self, user_id: str, size: int) -> None:
        self._flags.uploaded(user_id, size)
