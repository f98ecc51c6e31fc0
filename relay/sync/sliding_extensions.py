"""What a sliding sync answer carries beside rooms: to-device messages, keys, account data, receipts, typing notices.

Each extension asks the same parts as /sync does, for the rooms that the client's rules speak of. To-device messages alone
are acknowledged by themselves: they stay until the client names the batch that it has. Spec: MSC3884, MSC3885, MSC3959,
MSC3960, MSC3961; of thread subscriptions (MSC4308) there are none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from relay.db import Database
from relay.ephemeral.receipts import Receipts
from relay.ephemeral.typing_notices import TypingNotices
from relay.errors import InvalidParam
from relay.keys.device_lists import DeviceLists
from relay.keys.device_queues import TOPIC as TO_DEVICE
from relay.keys.one_time_keys import OneTimeKeys
from relay.keys.to_device import ToDevice
from relay.part import SyncAsk, SyncShare
from relay.people.account_data import TOPIC as ACCOUNT_DATA
from relay.people.account_data import AccountData
from relay.push.rules import PushRules
from relay.rooms.rooms import Rooms
from relay.rooms.store import Stored
from relay.sync.sliding_asked import ByRoom, Extensions
from relay.sync.token import Token

DEFAULT_TO_DEVICE = 100
MAX_TO_DEVICE = 1_000
THREAD_SUBSCRIPTIONS = "io.element.msc4308.thread_subscriptions"

_BATCH = re.compile(r"d(\d{1,10})_(\d{1,18})\Z")

# Whether an extension with these rules speaks of this room; the second: whether it lies in a window of theirs.
Concerns = Callable[[ByRoom, str, bool], bool]


@dataclass(slots=True)
class Aside:
    """One answer, as the extensions see it. `fresh` are the rooms that it tells anew, with the events that it shows of them;
    `back` those of which more is told than what came since. `sent` are all rooms that the connection knows."""

    user_id: str
    device_id: str
    since: Token | None
    upto: Token
    topics: frozenset[str] | None
    concerns: Concerns
    sent: Callable[[], Iterable[str]]
    knows: Callable[[str], bool]
    fresh: Mapping[str, Iterable[Stored]]
    back: frozenset[str]
    keys: object


@dataclass(slots=True)
class Beside:
    """`news` says whether a long poll ends for it; `keys` is what was told of one-time keys."""

    extensions: dict[str, Any] = field(default_factory=dict)
    news: bool = False
    keys: object = None


class SlidingExtensions:
    def __init__(
        self,
        db: Database,
        rooms: Rooms,
        to_device: ToDevice,
        device_lists: DeviceLists,
        one_time_keys: OneTimeKeys,
        account_data: AccountData,
        push_rules: PushRules,
        receipts: Receipts,
        typing: TypingNotices,
    ) -> None:
        self._db = db
        self._rooms = rooms
        self._to_device = to_device
        self._device_lists = device_lists
        self._one_time_keys = one_time_keys
        self._account_data = account_data
        self._push_rules = push_rules
        self._receipts = receipts
        self._typing = typing

    async def gather(self, asked: Extensions, aside: Aside) -> Beside:
        beside = Beside(keys=aside.keys)
        if asked.to_device.enabled:
            await self._messages(asked, aside, beside)
        if asked.e2ee.enabled:
            await self._keys(aside, beside)
        receipts = SyncShare()
        if asked.receipts.enabled or asked.account_data.enabled:
            await self._receipts.changes(self._receipts_ask(asked, aside), receipts)
        if asked.account_data.enabled:
            await self._notes(asked.account_data, aside, beside, receipts)
        if asked.receipts.enabled:
            self._read_marks(asked.receipts, aside, beside, receipts)
        if asked.typing.enabled:
            self._who_types(asked.typing, aside, beside)
        if asked.thread_subscriptions.enabled:
            beside.extensions[THREAD_SUBSCRIPTIONS] = {}
        return beside

    def _ask(self, aside: Aside, rooms: frozenset[str], fresh: frozenset[str], left: frozenset[str]) -> SyncAsk:
        since = aside.since
        return SyncAsk(
            user_id=aside.user_id,
            device_id=aside.device_id,
            since=since.pos if since is not None else None,
            upto=aside.upto.pos,
            since_typing=since.typing if since is not None else 0,
            topics=aside.topics,
            rooms=rooms,
            newly_joined=fresh,
            left_rooms=left,
        )

    # --- to-device messages and keys

    async def _messages(self, asked: Extensions, aside: Aside, beside: Beside) -> None:
        wanted = asked.to_device
        limit = min(DEFAULT_TO_DEVICE if wanted.limit is None else max(wanted.limit, 1), MAX_TO_DEVICE)
        taken = self._batch(wanted.since, aside.upto.pos)
        quiet = aside.topics is not None and TO_DEVICE not in aside.topics
        events, reached = await self._to_device.hand_out(
            aside.user_id, aside.device_id, taken, aside.upto.pos, limit,
            quiet_since=aside.since.pos if quiet and aside.since is not None else None,
        )  # fmt: skip
        beside.extensions["to_device"] = {"next_batch": f"d{self._db.epoch}_{reached}", "events": events}
        beside.news = beside.news or bool(events)

    def _batch(self, text: str | None, upto: int) -> int:
        """Up to which message the client has them; 0 where that was before the database was put back from a copy."""
        if text is None:
            return 0
        found = _BATCH.match(text)
        if found is None:
            raise InvalidParam("to_device.since is not a next_batch of this server. Leave it out to get what waits.")
        pos = int(found[2])
        return pos if int(found[1]) == self._db.epoch and pos <= upto else 0

    async def _keys(self, aside: Aside, beside: Beside) -> None:
        since = aside.since.pos if aside.since is not None else 0
        mine = self._rooms.memberships(aside.user_id)
        looked = mine if aside.topics is None else {r: mine[r] for r in aside.topics if r in mine}
        fresh = frozenset(r for r, m in looked.items() if m.membership == "join" and m.since_pos > since)
        left = frozenset(r for r, m in looked.items() if m.membership in ("leave", "ban") and m.pos > since)
        share = SyncShare()
        ask = self._ask(aside, self._rooms.joined(aside.user_id), fresh, left)
        await self._device_lists.changes(ask, share)
        await self._one_time_keys.changes(ask, share)
        told: dict[str, Any] = {}
        if share.device_lists_changed or share.device_lists_left:
            told["device_lists"] = {
                "changed": sorted(share.device_lists_changed),
                "left": sorted(share.device_lists_left),
            }
            beside.news = True
        told["device_one_time_keys_count"] = share.one_time_keys_count or {}
        told["device_unused_fallback_key_types"] = share.unused_fallback_key_types or []
        beside.extensions["e2ee"] = told
        keys = (
            tuple(sorted(told["device_one_time_keys_count"].items())),
            tuple(told["device_unused_fallback_key_types"]),
        )
        if aside.since is not None and aside.keys is not None and keys != aside.keys:
            beside.news = True
        beside.keys = keys

    # --- account data

    async def _notes(self, asked: ByRoom, aside: Aside, beside: Beside, receipts: SyncShare) -> None:
        share = SyncShare()
        fresh = frozenset(aside.fresh)
        if aside.since is None or aside.topics is None or ACCOUNT_DATA in aside.topics or fresh:
            ask = self._ask(aside, frozenset(aside.sent()), fresh, frozenset())
            await self._account_data.changes(ask, share)
        await self._push_rules.changes(self._ask(aside, frozenset(), frozenset(), frozenset()), share)
        rooms: dict[str, list[Any]] = {}
        for of in (share.rooms, receipts.rooms):
            for room_id, room in of.items():
                if room.account_data and asked_for(asked, aside, room_id):
                    rooms.setdefault(room_id, []).extend(room.account_data)
        if share.account_data or rooms:
            told: dict[str, Any] = {}
            if share.account_data:
                told["global"] = share.account_data
            if rooms:
                told["rooms"] = rooms
            beside.extensions["account_data"] = told
            beside.news = True

    # --- receipts and typing

    def _receipts_ask(self, asked: Extensions, aside: Aside) -> SyncAsk:
        anew = frozenset(aside.fresh) | aside.back
        if aside.topics is None:
            rooms = frozenset(aside.sent())
        else:
            rooms = frozenset(r for r in aside.topics if aside.knows(r)) | anew
        return self._ask(aside, rooms, anew, frozenset())

    def _read_marks(self, asked: ByRoom, aside: Aside, beside: Beside, receipts: SyncShare) -> None:
        told: dict[str, Any] = {}
        for room_id, room in receipts.rooms.items():
            if not room.ephemeral or not aside.concerns(asked, room_id, True):
                continue
            content = _merged(event["content"] for event in room.ephemeral)
            if room_id in aside.fresh and room_id not in aside.back:
                shown = {one.id for one in aside.fresh[room_id]}
                content = _of_shown(content, shown, aside.user_id)
            if content:
                told[room_id] = {"type": "m.receipt", "content": content}
        if told:
            beside.extensions["receipts"] = {"rooms": told}
            beside.news = True

    def _who_types(self, asked: ByRoom, aside: Aside, beside: Beside) -> None:
        told: dict[str, Any] = {}
        if aside.since is not None:
            for room_id in self._typing.changed(aside.since.typing):
                if aside.knows(room_id) and aside.concerns(asked, room_id, True):
                    told[room_id] = _typing(self._typing.in_room(room_id))
        for room_id in {*aside.fresh, *aside.back}:
            people = self._typing.in_room(room_id)
            if people and aside.concerns(asked, room_id, True):
                told[room_id] = _typing(people)
        if told:
            beside.extensions["typing"] = {"rooms": told}
            beside.news = True


def asked_for(asked: ByRoom, aside: Aside, room_id: str) -> bool:
    """What she notes about a room is told wherever it stands in its list: it would be lost otherwise."""
    return (asked.lists is None and asked.rooms is None) or aside.concerns(asked, room_id, False)


def _typing(people: list[str]) -> dict[str, Any]:
    return {"type": "m.typing", "content": {"user_ids": people}}


def _merged(contents: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """One m.receipt event a room: those of several threads go together."""
    found: dict[str, Any] = {}
    for content in contents:
        if not found:
            found = content
            continue
        for event_id, kinds in content.items():
            for kind, readers in kinds.items():
                found.setdefault(event_id, {}).setdefault(kind, {}).update(readers)
    return found


def _of_shown(content: dict[str, Any], shown: set[str], user_id: str) -> dict[str, Any]:
    """Of a room that is new: who read what is shown, and how far she herself has read."""
    found: dict[str, Any] = {}
    for event_id, kinds in content.items():
        if event_id in shown:
            found[event_id] = kinds
            continue
        own = {kind: {user_id: readers[user_id]} for kind, readers in kinds.items() if user_id in readers}
        if own:
            found[event_id] = own
    return found
