"""The tree of a space, walked depth first, page by page; branches on other servers are asked for there.

A page ends at its limit of rooms, or where too much was asked of others for one request; what is still to be walked waits in
memory under the token of the next page. Who may see which room is decided in `summary.py`, for each person anew.
Spec: client-server-api/#get_matrixclientv1roomsroomidhierarchy, server-server-api/#spaces.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from relay.clock import MINUTE, Clock
from relay.errors import Forbidden, InvalidParam
from relay.ids import is_room_id, random_string, server_of
from relay.part import Part
from relay.rooms.summary import Summaries, Summary, via_of
from relay.web import Answer, Request, Route

DEFAULT_LIMIT = 50
MAX_LIMIT = 100
DEFAULT_DEPTH = 10
MAX_DEPTH = 20
# Of one page; the next one goes on.
MAX_ASKED = 20
MAX_ASKING_SECONDS = 20.0
# Of one walk.
MAX_ROOMS_WALKED = 5_000
MAX_WALKS = 500
WALKS_KEPT_MS = 30 * MINUTE
MAX_ANSWERS = 500
ANSWERS_KEPT_MS = 1 * MINUTE

_ANSWER = tuple[Summary, list[Summary], set[str]]


@dataclass(slots=True)
class _Walk:
    """What is still to be walked, the next room last; never changed once it lies under a token, so that a page can be had
    twice. `told` is what servers said of their spaces' children."""

    user_id: str
    room_id: str
    suggested_only: bool
    max_depth: int
    waiting: list[tuple[str, Sequence[str], int]]
    seen: set[str] = field(default_factory=set)
    told: dict[str, Summary] = field(default_factory=dict)
    closed: set[str] = field(default_factory=set)
    until: int = 0

    def copy(self) -> _Walk:
        return _Walk(
            self.user_id, self.room_id, self.suggested_only, self.max_depth, list(self.waiting), set(self.seen),
            dict(self.told), set(self.closed), self.until,
        )  # fmt: skip


class Spaces(Part):
    def __init__(self, summaries: Summaries, clock: Clock) -> None:
        self._summaries = summaries
        self._clock = clock
        # Token -> walk. Dropped by age and number.
        self._walks: OrderedDict[str, _Walk] = OrderedDict()
        # (room, only suggested) -> (what its server said, until when). Dropped by age and number.
        self._answers: OrderedDict[tuple[str, bool], tuple[_ANSWER, int]] = OrderedDict()

    def routes(self) -> Iterable[Route]:
        for path in ("v1", "unstable/org.matrix.msc2946"):
            yield Route("GET", f"/_matrix/client/{path}/rooms/{{roomId}}/hierarchy", self._hierarchy, limit="messages")

    async def _hierarchy(self, request: Request) -> Answer:
        room_id, query = request.params["roomId"], request.query
        if not is_room_id(room_id):
            raise InvalidParam(f"{room_id!r} is not a room ID.")
        limit = request.query_int("limit", DEFAULT_LIMIT, low=1, high=MAX_LIMIT)
        walk = self._begun(request, room_id) if "from" in query else None
        if walk is None:
            depth = request.query_int("max_depth", DEFAULT_DEPTH, high=MAX_DEPTH)
            home = [server_of(room_id)] if server_of(room_id) else []
            walk = _Walk(request.user_id, room_id, request.query_bool("suggested_only"), depth, [(room_id, home, 0)])
        first = not walk.seen
        found = await self._page(walk, limit)
        if first and not (found and found[0].room_id == room_id):
            raise Forbidden("You can't look into this room. Join it, or ask for an invitation.")
        answer: dict[str, Any] = {"rooms": [summary.whole() for summary in found]}
        if walk.waiting and len(walk.seen) < MAX_ROOMS_WALKED:
            answer["next_batch"] = self._keep(walk)
        return answer

    def _begun(self, request: Request, room_id: str) -> _Walk:
        walk = self._walks.get(request.query["from"])
        if walk is None or walk.user_id != request.user_id or walk.room_id != room_id or walk.until < self._clock.now():
            raise InvalidParam("This is not a token of this server, or it is too old. Begin anew without `from`.")
        if (
            request.query_bool("suggested_only", walk.suggested_only) != walk.suggested_only
            or request.query_int("max_depth", walk.max_depth, high=MAX_DEPTH) != walk.max_depth
        ):
            raise InvalidParam("From page to page suggested_only and max_depth stay as they are.")
        return walk.copy()

    def _keep(self, walk: _Walk) -> str:
        walk.until = self._clock.now() + WALKS_KEPT_MS
        token = random_string(24)
        self._walks[token] = walk
        while len(self._walks) > MAX_WALKS:
            self._walks.popitem(last=False)
        return token

    # --- the walk

    async def _page(self, walk: _Walk, limit: int) -> list[Summary]:
        found: list[Summary] = []
        asked, stop_at = 0, self._clock.monotonic() + MAX_ASKING_SECONDS
        while walk.waiting and len(found) < limit and len(walk.seen) < MAX_ROOMS_WALKED:
            room_id, via, depth = walk.waiting[-1]
            if room_id in walk.seen:
                walk.waiting.pop()
                continue
            room = await self._summaries.here(room_id)
            if room is not None:
                summary: Summary | None = await self._summaries.of(room)
                assert summary is not None
                seen = await self._summaries.open_to_user(room, summary, walk.user_id)
            else:
                summary = self._known(walk, room_id)
                if summary is None and room_id not in walk.closed:
                    if asked >= MAX_ASKED or (asked and self._clock.monotonic() > stop_at):
                        break
                    asked += 1
                    summary = await self._ask(walk, room_id, via)
                seen = summary is not None and self._summaries.open_by_word(summary, walk.user_id)
            walk.waiting.pop()
            walk.seen.add(room_id)
            if summary is None or not seen:
                continue
            found.append(summary)
            if summary.is_space and depth < walk.max_depth:
                chosen = chosen_of(summary, walk.suggested_only)
                walk.waiting += [
                    (child["state_key"], via_of(child["content"]), depth + 1) for child in reversed(chosen)
                ]
            if walk.suggested_only:
                found[-1] = Summary(summary.told, chosen_of(summary, True))
        return found

    def _known(self, walk: _Walk, room_id: str) -> Summary | None:
        """What a server said of the child of its space. Of a space it does not say what lies below, as a rule."""
        kept = self._answers.get((room_id, walk.suggested_only))
        if kept is not None and kept[1] >= self._clock.now():
            return self._take(walk, kept[0])
        told = walk.told.get(room_id)
        return None if told is None or (told.is_space and not told.children) else told

    async def _ask(self, walk: _Walk, room_id: str, via: Sequence[str]) -> Summary | None:
        answer = await self._summaries.ask(room_id, via, suggested_only=walk.suggested_only)
        if answer is None:
            return walk.told.get(room_id)
        # Only what was told is kept: a server that knew nothing may know more in a moment.
        self._answers[(room_id, walk.suggested_only)] = (answer, self._clock.now() + ANSWERS_KEPT_MS)
        while len(self._answers) > MAX_ANSWERS:
            self._answers.popitem(last=False)
        return self._take(walk, answer)

    def _take(self, walk: _Walk, answer: _ANSWER) -> Summary:
        summary, children, closed = answer
        for child in children:
            walk.told.setdefault(child.room_id, child)
        walk.closed |= closed - walk.told.keys()
        return summary


def chosen_of(summary: Summary, suggested_only: bool) -> list[dict[str, Any]]:
    return [one for one in summary.children if not suggested_only or one["content"].get("suggested") is True]
