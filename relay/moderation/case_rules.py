"""What a case may become, when it is due, and how long what belongs to it is kept: pure.

new > triaged > in_review > decided > closed, with awaiting_disclosure and escalated beside, and appealed > re_review > decided
after a decision. Safety: states, due times, retention.
"""

from __future__ import annotations

from typing import Literal

from relay.clock import DAY, HOUR, MINUTE
from relay.errors import ApiError, InvalidParam

Kind = Literal["event", "room", "user", "notice", "forwarded", "elsewhere", "direct"]
Side = Literal["reporter", "subject"]

CATEGORIES = ("ncii", "minor", "threat", "harassment", "spam", "fraud", "other")

NEW, TRIAGED, AWAITING, REVIEW, ESCALATED = "new", "triaged", "awaiting_disclosure", "in_review", "escalated"
DECIDED, APPEALED, RE_REVIEW, CLOSED = "decided", "appealed", "re_review", "closed"
STATES = (NEW, TRIAGED, AWAITING, REVIEW, ESCALATED, DECIDED, APPEALED, RE_REVIEW, CLOSED)
# Somebody has to do something: these stand in the queue.
OPEN_STATES = frozenset({NEW, TRIAGED, AWAITING, REVIEW, ESCALATED, APPEALED, RE_REVIEW})
UNDECIDED = frozenset({NEW, TRIAGED, AWAITING, REVIEW, ESCALATED})

_NEXT = {
    NEW: {TRIAGED, AWAITING, REVIEW, ESCALATED, DECIDED, CLOSED},
    TRIAGED: {AWAITING, REVIEW, ESCALATED, DECIDED, CLOSED},
    AWAITING: {TRIAGED, REVIEW, ESCALATED, DECIDED, CLOSED},
    REVIEW: {TRIAGED, AWAITING, ESCALATED, DECIDED, CLOSED},
    ESCALATED: {TRIAGED, REVIEW, DECIDED, CLOSED},
    DECIDED: {APPEALED, CLOSED},
    APPEALED: {RE_REVIEW, DECIDED},
    RE_REVIEW: {DECIDED},
    CLOSED: {APPEALED},
}

LEASE = 30 * MINUTE
_DUE = {"minor": HOUR, "ncii": 48 * HOUR, "threat": 4 * HOUR}
_DUE_OTHERWISE = 72 * HOUR
APPEAL_DUE = 7 * DAY

# Both sides may object for as long; the evidence stays until then.
APPEAL_WINDOW = 183 * DAY
MINOR_KEPT = 366 * DAY
# A case that nobody decides and nobody closes.
UNDECIDED_KEPT = 366 * DAY
# Proof may still come for what was uploaded shortly before.
MEDIA_HELD = 7 * DAY
MEDIA_BEFORE = HOUR

# A flag sorts the queue, by at most so much.
MAX_WEIGHT = 100
WEIGHT_STEP = 30 * MINUTE

# From the best to the worst result of the checks.
DISCLOSURES = ("verified", "verified_remote", "needs_human", "invalid", "undisclosed")


class Stale(ApiError):
    """The case has changed since it was read."""

    status = 412
    errcode = "M_UNKNOWN"

    def __init__(self) -> None:
        super().__init__("This case has changed since you looked at it. Read it again, then decide.")


class NotNow(ApiError):
    status = 409
    errcode = "M_UNKNOWN"


def due(category: str, created_ts: int) -> int:
    return created_ts + _DUE.get(category, _DUE_OTHERWISE)


def place_in_queue(due_ts: int, weight: int) -> int:
    return due_ts - max(0, min(weight, MAX_WEIGHT)) * WEIGHT_STEP


def require_category(category: object) -> str:
    if not isinstance(category, str) or category not in CATEGORIES:
        raise InvalidParam(f"The category is one of: {', '.join(CATEGORIES)}.")
    return category


def require_step(state: str, becomes: str) -> None:
    """Raises NotNow."""
    if becomes not in _NEXT[state]:
        raise NotNow(
            f"A case that is {state} can't become {becomes}. It can become: {', '.join(sorted(_NEXT[state]))}."
        )


def kept_until(category: str, created_ts: int, decided_ts: int | None) -> int:
    """Until when the evidence stays, where nobody appeals."""
    until = created_ts + UNDECIDED_KEPT if decided_ts is None else decided_ts + APPEAL_WINDOW
    return max(until, created_ts + MINOR_KEPT) if category == "minor" else until


def better(one: str, other: str) -> str:
    """Of two results of the checks the one that stands: a worse proof takes nothing away."""
    return min(one, other, key=DISCLOSURES.index)
