"""The statement of reasons in a form of the desk: what is done, why, on which ground, what happened, and who is not told.

The same fields stand where a case is decided, where a decision is changed on appeal, where a measure is taken without a report,
and where its reasons are stated later (`desk_pieces.html`). What is missing is said beside its field (`NotWhole`).
"""

from __future__ import annotations

from relay.clock import DAY
from relay.errors import ApiError
from relay.ids import server_of
from relay.moderation.acts import BULK, FORBIDDEN, MEASURES, UNTOLD
from relay.moderation.case_rows import Case
from relay.moderation.statements import MAX_FACTS, MIN_FACTS, Chosen, Statement, require_complete
from relay.pages import desk_words
from relay.pages.forms import Form

MAX_GROUND, MAX_MEDIA = 180, 400
FIELDS = ("version", "reason", "lasts", "ground_kind", "ground", "facts", "media", "outcome", "untold")
# Measures that end by themselves only where the moderator says so.
LASTING = frozenset({"suspend", "lock", "ban", "hide", "quarantine", "block_room", "block_server"})


class NotWhole(ApiError):
    """Something of a form is missing or wrong: `field` is where it is said."""

    def __init__(self, field: str, text: str) -> None:
        super().__init__(text)
        self.field = field


def reasons_of(form: Form, *, reason: str | None = None) -> Statement:
    """Reason, ground, facts and whether the person is told. Raises NotWhole."""
    if reason is None:
        reason = form.text("reason", 40)
        if reason not in desk_words.REASONS:
            raise NotWhole("reason", "Choose a reason.")
    ground, facts, untold = form.text("ground", MAX_GROUND), form.text("facts", MAX_FACTS), form.text("untold", 10)
    law = form.text("ground_kind", 10) == "law"
    if not ground:
        raise NotWhole("ground", "Name the rule or the law: without it nobody can object.")
    if len(facts) < MIN_FACTS:
        raise NotWhole(
            "facts",
            f"Say what happened in at least {MIN_FACTS} characters: whoever is decided on has to understand it.",
        )
    if untold not in UNTOLD:
        raise NotWhole("untold", "Choose whether the person is told.")
    if untold == BULK and reason != "spam":
        raise NotWhole("untold", "Only who sends advertising in bulk may be left untold: then the reason is spam.")
    if untold == FORBIDDEN and not law:
        raise NotWhole("ground", "Name the law that forbids to tell them: choose “A law” as the ground.")
    return Statement(reason, f"{'law' if law else 'terms'}:{ground}", facts, untold=untold)


def statement_of(form: Form, case: Case, actor: str, possible: list[str]) -> tuple[Statement, list[str]]:
    """The whole of a decision, and the measures as they were ticked. Raises NotWhole, ApiError."""
    wanted = form.every("measure")
    if not wanted:
        raise NotWhole("measure", "Say what is done: tick one of these at least.")
    if "none" in wanted and len(wanted) > 1:
        raise NotWhole("measure", "You ticked Nothing and a measure beside it. Choose one or the other.")
    if any(one != "none" and one not in possible for one in wanted):
        raise NotWhole("measure", "A measure does not fit this case. Look at the list again.")
    told = reasons_of(form)
    lasts = form.text("lasts", 10)
    if lasts and lasts not in desk_words.LASTS_DAYS:
        raise NotWhole("lasts", "Choose one of these lengths of time.")
    lasts_ms = desk_words.LASTS_DAYS[lasts] * DAY if lasts else None
    statement = Statement(
        told.reason_code, told.ground, told.facts,
        tuple(_chosen(one, case, form, lasts_ms) for one in wanted if one != "none"), told.untold,
    )  # fmt: skip
    return require_complete(statement, actor, case.case_id), wanted


def _chosen(measure: str, case: Case, form: Form, lasts_ms: int | None) -> Chosen:
    kind = MEASURES[measure]
    target = {
        "user": case.user_id, "event": case.event_id, "room": case.room_id, "server": server_of(case.user_id or ""),
        "media": form.text("media", MAX_MEDIA),
    }[kind.target]  # fmt: skip
    if not target:
        raise NotWhole("media", "Name the file that is to be quarantined: mxc://server/ID or sha256:HEX.")
    room_id = case.room_id if kind.in_a_room else None
    return Chosen(measure, target, room_id, lasts_ms if measure in LASTING else None)


def fields_of(form: Form) -> list[tuple[str, str]]:
    return [(name, form.text(name, MAX_FACTS)) for name in FIELDS if form.ticked(name)]
