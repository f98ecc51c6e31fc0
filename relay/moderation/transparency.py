"""The figures of a month: how many reports came, what was decided, how fast, and how often wrongly. Counts, never a name."""

from __future__ import annotations

import calendar
import re
from collections.abc import Mapping, Sequence
from typing import Any

from relay.clock import HOUR
from relay.db import Database, Query
from relay.errors import InvalidParam
from relay.moderation.case_rules import CATEGORIES
from relay.part import Part

_MONTH = re.compile(r"(20\d\d)-(0[1-9]|1[0-2])\Z")


class Transparency(Part):
    def __init__(self, db: Database) -> None:
        self._db = db

    async def month(self, month: str) -> dict[str, Any]:
        """`month` as 2026-11. Raises InvalidParam."""
        begin, end = span(month)
        return {"month": month, **await self._db.read(_figures, begin, end)}


def span(month: str) -> tuple[int, int]:
    found = _MONTH.match(month)
    if found is None:
        raise InvalidParam("Name the month as 2026-11.")
    year, number = int(found[1]), int(found[2])
    begin = calendar.timegm((year, number, 1, 0, 0, 0)) * 1000
    after = (year + 1, 1) if number == 12 else (year, number + 1)
    return begin, calendar.timegm((*after, 1, 0, 0, 0)) * 1000


def _figures(query: Query, begin: int, end: int) -> dict[str, Any]:
    # What other servers decided about people of ours, and measures without a report, are no reports.
    came = "kind NOT IN ('elsewhere', 'direct') AND created_ts >= $1 AND created_ts < $2"
    decided = "d.decided_ts >= $1 AND d.decided_ts < $2 AND d.case_id IN (SELECT case_id FROM cases WHERE kind <> 'elsewhere')"
    disclosures = _counts(query, f"SELECT disclosure, count(*) FROM cases WHERE {came} GROUP BY disclosure", begin, end)
    proofs = sum(number for name, number in disclosures.items() if name != "undisclosed")
    good = disclosures.get("verified", 0) + disclosures.get("verified_remote", 0)
    first = query.all(
        "SELECT d.decided_ts, c.created_ts, c.due_ts, d.automated, c.sort_ts < c.due_ts, "
        "EXISTS (SELECT 1 FROM decided_measures m WHERE m.decision_id = d.decision_id), "
        "EXISTS (SELECT 1 FROM decisions a WHERE a.case_id = d.case_id AND a.verdict = 'reversed') "
        "FROM decisions d JOIN cases c ON c.case_id = d.case_id "
        f"WHERE {decided} AND d.verdict IS NULL AND c.kind <> 'direct'",
        begin,
        end,
    )
    touched = query.all(
        f"SELECT touched_ts - created_ts FROM cases WHERE touched_ts IS NOT NULL AND {came}", begin, end
    )
    verdicts = _counts(
        query,
        f"SELECT d.verdict, count(*) FROM decisions d WHERE d.verdict IS NOT NULL AND {decided} GROUP BY d.verdict",
        begin,
        end,
    )
    answered = sum(verdicts.values())
    return {
        "reports": int(query.value(f"SELECT count(*) FROM cases WHERE {came}", begin, end)),
        "by_category": {
            name: number
            for name in CATEGORIES
            if (number := query.value(f"SELECT count(*) FROM cases WHERE category = $3 AND {came}", begin, end, name))
        },
        "by_kind": _counts(query, f"SELECT kind, count(*) FROM cases WHERE {came} GROUP BY kind", begin, end),
        "joined": int(query.value(f"SELECT count(*) FROM cases WHERE duplicate_of IS NOT NULL AND {came}", begin, end)),
        "by_disclosure": disclosures,
        "proofs_valid_share": _share(good, proofs),
        "decisions": len(first),
        "decided_by_machine_share": _share(sum(1 for row in first if row[3]), len(first)),
        "late": sum(1 for decided_ts, _, due_ts, *_ in first if decided_ts > due_ts),
        "flags": _of_flags([(bool(flagged), bool(acted), bool(undone)) for *_, flagged, acted, undone in first]),
        "measures": _counts(
            query,
            "SELECT m.measure, count(*) FROM decided_measures m JOIN decisions d ON d.decision_id = m.decision_id "
            f"WHERE {decided} GROUP BY m.measure",
            begin,
            end,
        ),
        "hours_to_first_look": _hours([row[0] for row in touched]),
        "hours_to_decision": _hours([decided_ts - created_ts for decided_ts, created_ts, *_ in first]),
        "appeals": int(query.value("SELECT count(*) FROM appeals WHERE filed_ts >= $1 AND filed_ts < $2", begin, end)),
        "appeals_answered": dict(verdicts),
        "overturned_share": _share(verdicts.get("reversed", 0), answered),
        "open_at_present": _counts(
            query, "SELECT category, count(*) FROM cases WHERE is_open = 1 AND duplicate_of IS NULL GROUP BY category"
        ),
    }


def _of_flags(decided: Sequence[tuple[bool, bool, bool]]) -> dict[str, Any]:
    """How good the flags are, by what people decided: (flagged, a measure was taken, it was taken back on appeal). People
    look at every case, flagged or not, so nothing has to be sampled. A flag moves a case up, so its place tells."""
    flagged = [one for one in decided if one[0]]
    acted = [one for one in decided if one[1]]
    return {
        "flagged": len(flagged),
        "flagged_acted_share": _share(sum(1 for one in flagged if one[1]), len(flagged)),
        "others_acted_share": _share(len(acted) - sum(1 for one in flagged if one[1]), len(decided) - len(flagged)),
        "acted_flagged_share": _share(sum(1 for one in acted if one[0]), len(acted)),
        "flagged_overturned_share": _share(
            sum(1 for one in flagged if one[1] and one[2]), sum(1 for one in flagged if one[1])
        ),
    }


def _counts(query: Query, sql: str, *params: Any) -> Mapping[str, int]:
    return {str(name): int(number) for name, number in query.all(sql, *params)}


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 3) if whole else None


def _hours(spans_ms: Sequence[int]) -> dict[str, float | None]:
    """The middle one, and the one below which 95 of 100 lie."""
    ordered = sorted(spans_ms)

    def at(share: float) -> float | None:
        return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))] / HOUR, 2) if ordered else None

    return {"p50": at(0.5), "p95": at(0.95)}
