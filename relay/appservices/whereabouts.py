"""In which rooms a service's users are, and were when something happened that it has not been told of yet.

In memory, from the memberships of local people; changes come after each commit, in the order of the line, so that what is
asked about a committed position is complete. What lies before the service's own position is let go.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from relay.appservices.registration import Registration
from relay.appservices.services import Services
from relay.rooms.rooms import Membership, Rooms

# Member events of rooms that are not ours to know; an invite that is forgotten here still stands among the memberships.
MAX_MOVES = 10_000


@dataclass(frozen=True, slots=True)
class Move:
    """A membership of one of the service's users became another one."""

    pos: int
    room_id: str
    user_id: str
    event_id: str


class Whereabouts:
    def __init__(self, one: Registration, services: Services, rooms: Rooms) -> None:
        self._one = one
        self._services = services
        self._rooms = rooms
        self._joined: dict[str, dict[str, int]] = {}  # room -> user -> since when
        self._ended: dict[str, list[tuple[int, int, str]]] = {}  # room -> (since, until, user) of stays that are over
        self._moves: deque[Move] = deque(maxlen=MAX_MOVES)

    def begin(self, pos: int, departed: Iterable[tuple[str, str, int]]) -> None:
        """`pos` is up to where the service was told; `departed` is who left which room after it."""
        for user_id, memberships in self._rooms.all_memberships():
            if self._owned(user_id):
                for room_id, mine in memberships.items():
                    if mine.membership == "join":
                        self._joined.setdefault(room_id, {})[user_id] = mine.since_pos
                    if mine.pos > pos and mine.event_id:
                        self._moves.append(Move(mine.pos, room_id, user_id, mine.event_id))
        for room_id, user_id, until in departed:
            if self._owned(user_id):
                self._ended.setdefault(room_id, []).append((0, until, user_id))
        self._rooms.on_local_membership.append(self._take)

    def _owned(self, user_id: str) -> bool:
        """By name: who moderates is left out when it is asked, since that may change."""
        return self._services.covers(self._one, user_id)

    def _counts(self, user_id: str) -> bool:
        return not self._services.keeps_off(self._one, user_id)

    def _take(self, room_id: str, user_id: str, before: Membership | None) -> None:
        now = self._rooms.memberships(user_id)[room_id]
        if not self._owned(user_id):
            return
        here = self._joined.setdefault(room_id, {})
        since = here.get(user_id)
        if now.membership == "join":
            here.setdefault(user_id, now.since_pos)
        elif since is not None:
            del here[user_id]
            self._ended.setdefault(room_id, []).append((since, now.pos, user_id))
        if not here:
            del self._joined[room_id]
        if now.event_id:
            self._moves.append(Move(now.pos, room_id, user_id, now.event_id))

    # --- what is asked

    def in_room(self, room_id: str) -> bool:
        return any(map(self._counts, self._joined.get(room_id, ())))

    def were_in_room(self, room_id: str, pos: int) -> bool:
        """Whether one of them was joined when this happened."""
        here = self._joined.get(room_id)
        if here is not None and any(since <= pos and self._counts(user_id) for user_id, since in here.items()):
            return True
        return any(
            since <= pos <= until and self._counts(user_id) for since, until, user_id in self._ended.get(room_id, ())
        )

    def rooms(self) -> frozenset[str]:
        if not self._services.moderating.people:
            return frozenset(self._joined)
        return frozenset(room_id for room_id, here in self._joined.items() if any(map(self._counts, here)))

    def moves(self, after: int, upto: int) -> list[Move]:
        return [one for one in self._moves if after < one.pos <= upto and self._counts(one.user_id)]

    def told(self, pos: int) -> None:
        """The service knows everything up to here."""
        while self._moves and self._moves[0].pos <= pos:
            self._moves.popleft()
        for room_id, stays in list(self._ended.items()):
            left = [stay for stay in stays if stay[1] > pos]
            if left:
                self._ended[room_id] = left
            else:
                del self._ended[room_id]
