"""A decision and its statement of reasons: what has to be in it before it may be saved. Pure.

Measures, the ground (a clause of the terms, or a law), the facts in the moderator's own words, whether a machine decided, and
how to object: whoever is decided on reads all of it. Nothing of it is optional, since a decision without reasons is none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from relay.errors import BadJson, InvalidParam, MissingParam, TooLarge
from relay.moderation.acts import BULK, FORBIDDEN, MEASURES, UNTOLD, Act, Reasons, checked
from relay.web import get_bool, get_list, get_optional_string, get_string

MAX_MEASURES = 10
MIN_FACTS, MAX_FACTS = 20, 4_000
MAX_GROUND = 200
MIN_LASTS_MS = 60_000
_REASON_CODE = re.compile(r"[a-z0-9][a-z0-9_.\-]{0,63}\Z")
_GROUND = re.compile(r"(terms|law):\S.*\Z", re.DOTALL)
_KEYS = frozenset(
    {"measures", "action", "target", "room_id", "lasts_ms", "erase", "reason_code", "tos_clause", "law_ref", "ground", "facts",
     "untold",
     # What a signed decision says about itself (integrations.py).
     "aud", "purpose", "report_id", "version", "automated"}
)  # fmt: skip


# What is believed of another server's reason codes; its other words are theirs, and kept nowhere here.
SHARED_REASONS = frozenset(
    {"harassment", "threat", "ncii", "minor", "spam", "fraud", "other", "house_rules", "law", "abuse_of_reports", "protection", "mistake"}
)  # fmt: skip


def is_reason_code(text: str) -> bool:
    return _REASON_CODE.match(text) is not None


def shared_reason(text: str) -> str:
    return text if text in SHARED_REASONS else "other"


@dataclass(frozen=True, slots=True)
class Chosen:
    measure: str
    target: str
    room_id: str | None = None
    lasts_ms: int | None = None
    erase: bool = False

    def act(self, actor: str, reason_code: str, case_id: str, *, automated: bool = False, undo: bool = False) -> Act:
        return Act(
            self.measure, self.target, actor, reason_code, self.room_id, case_id, automated,
            None if undo else self.lasts_ms, self.erase, undo,
        )  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        told: dict[str, Any] = {"measure": self.measure, "target": self.target}
        if self.room_id is not None:
            told["room_id"] = self.room_id
        if self.lasts_ms is not None:
            told["lasts_ms"] = self.lasts_ms
        return told


@dataclass(frozen=True, slots=True)
class Statement:
    """`ground` begins with `terms:` or `law:`. No measures: that nothing is done is a decision too."""

    reason_code: str
    ground: str
    facts: str = field(repr=False)
    measures: tuple[Chosen, ...] = ()
    # Why the person decided on is not told: a word of acts.UNTOLD.
    untold: str = ""

    @property
    def reasons(self) -> Reasons:
        return Reasons(self.ground, self.facts, self.untold)


def require_complete(statement: Statement, actor: str, case_id: str, *, automated: bool = False) -> Statement:
    """Raises an ApiError that says what is missing."""
    if not is_reason_code(statement.reason_code):
        raise InvalidParam("Give a reason code: a short word of a-z, digits, '.', '_' and '-', such as harassment.")
    if not _GROUND.match(statement.ground) or len(statement.ground) > MAX_GROUND:
        raise InvalidParam(
            "Give the ground: the clause of your terms (terms:4.2), or the law (law:…). Without it nobody can object."
        )
    if len(statement.facts.strip()) < MIN_FACTS:
        raise InvalidParam(
            f"State the facts in at least {MIN_FACTS} characters, in your own words: whoever is decided on has to understand them."
        )
    if len(statement.facts) > MAX_FACTS:
        raise TooLarge(f"The facts have {MAX_FACTS} characters at most.")
    if statement.untold not in UNTOLD:
        raise InvalidParam('The key untold is "bulk" or "law"; leave it out, so that the person hears of it.')
    if statement.untold == BULK and statement.reason_code != "spam":
        raise InvalidParam("Only who sends advertising in bulk may be left untold: then the reason is spam.")
    if statement.untold == FORBIDDEN and not statement.ground.startswith("law:"):
        raise InvalidParam("Name the law that forbids to tell the person as the ground (law:…).")
    if len(statement.measures) > MAX_MEASURES:
        raise InvalidParam(f"A decision has {MAX_MEASURES} measures at most.")
    for one in statement.measures:
        checked(one.act(actor, statement.reason_code, case_id, automated=automated))
    return statement


def parse(body: Mapping[str, Any], *, about: str | None = None) -> Statement:
    """From the API or a signed decision. `measures` is a list, or one stands in `action` and `target` (default: whom the case is
    about); `action` "none" is no measure. Raises ApiError."""
    unknown = set(body) - _KEYS
    if unknown:
        raise InvalidParam(f"A decision has no key {min(unknown)[:40]!r}. See docs/safety-api.md.")
    given = get_list(body, "measures", [])
    if "action" in body:
        given = [
            *given,
            {
                **{k: body[k] for k in ("target", "room_id", "lasts_ms", "erase") if k in body},
                "measure": body["action"],
            },
        ]
    elif "measures" not in body:
        raise MissingParam("Say what is done: measures, a list; an empty one where nothing is done.")
    return Statement(
        get_string(body, "reason_code"), _ground(body), get_string(body, "facts").strip(), tuple(_chosen(given, about)),
        get_string(body, "untold", ""),
    )  # fmt: skip


def parse_reasons(body: Mapping[str, Any], actor: str) -> Reasons | None:
    """Of a measure without a report; None where none are given. Raises ApiError."""
    if not any(key in body for key in ("ground", "tos_clause", "law_ref", "facts")):
        return None
    given = Statement(
        get_string(body, "reason_code"),
        _ground(body),
        get_string(body, "facts").strip(),
        untold=get_string(body, "untold", ""),
    )
    return require_complete(given, actor, "").reasons


def _ground(body: Mapping[str, Any]) -> str:
    clause, law = get_optional_string(body, "tos_clause"), get_optional_string(body, "law_ref")
    if clause:
        return f"terms:{clause.strip()}"
    return f"law:{law.strip()}" if law else get_string(body, "ground")


def _chosen(given: Sequence[Any], about: str | None) -> list[Chosen]:
    found = []
    for one in given:
        if not isinstance(one, dict):
            raise BadJson("Each of measures is an object with a measure and a target.")
        measure = get_string(one, "measure")
        if measure == "none":
            continue
        if measure not in MEASURES:
            raise InvalidParam(f"There is no measure {measure[:40]!r}. There are: none, {', '.join(MEASURES)}.")
        lasts = one.get("lasts_ms")
        if lasts is not None and (type(lasts) is not int or lasts < MIN_LASTS_MS):
            raise InvalidParam(
                "lasts_ms is a number of milliseconds, a minute at least; leave it out where the measure has no end."
            )
        default = about if MEASURES[measure].target == "user" else None
        found.append(
            Chosen(measure, get_string(one, "target", default), get_optional_string(one, "room_id"), lasts, get_bool(one, "erase", False))
        )  # fmt: skip
    return found
