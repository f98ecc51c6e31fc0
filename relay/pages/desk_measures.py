"""The desk's page of measures: what is in force, what waits for a second person, and taking or lifting a measure.

Each is asked about once more on a page of its own before it is done, so that nothing happens by one slip; with or
without scripts.
"""

from __future__ import annotations

from collections.abc import Iterable

from relay.accounts.users import Users
from relay.clock import DAY
from relay.errors import InvalidParam, NotFound
from relay.moderation.actions import Actions
from relay.moderation.acts import MEASURES, Act
from relay.moderation.flags import Flags
from relay.moderation.restrictions import KEPT_OUT, KINDS, LOCK, MEDIA_HASH, SUSPEND, Restriction, Restrictions
from relay.moderation.statements import MAX_FACTS
from relay.pages import desk_words
from relay.pages.desk_statements import NotWhole, reasons_of
from relay.pages.forms import Form
from relay.pages.frame import Frame
from relay.pages.visits import Visit
from relay.part import Part
from relay.web import Answer, Request, Route

PAGE = "/_relay/desk/measures"
MAX_FORM_BYTES = 32 * 1024
MAX_TARGET = 400
MAX_SHOWN = 500


class DeskMeasures(Part):
    def __init__(self, frame: Frame, actions: Actions, restrictions: Restrictions, flags: Flags, users: Users) -> None:
        self._frame = frame
        self._actions = actions
        self._restrictions = restrictions
        self._flags = flags
        self._users = users

    def routes(self) -> Iterable[Route]:
        frame = self._frame
        yield Route("GET", PAGE, frame.open_to("moderator", self._page), auth="none")
        yield Route("GET", "/_relay/desk/person", frame.open_to("moderator", self._person), auth="none")
        for name, function in (("take", self._take), ("confirm", self._confirm), ("cancel", self._cancel)):
            take = frame.taking("moderator", function)
            yield Route("POST", f"{PAGE}/{name}", take, auth="none", max_body=MAX_FORM_BYTES)

    async def _page(self, request: Request, visit: Visit) -> Answer:
        return await self._show(request, visit)

    async def _show(
        self, request: Request, visit: Visit, *, wrong: NotWhole | None = None, form: Form | None = None
    ) -> Answer:
        in_force = await self._in_force()
        given = form or Form([])
        return await self._frame.page(
            request, visit, "desk_measures.html", status=200 if wrong is None else wrong.status, wrong=wrong, given=given, in_force=in_force[:MAX_SHOWN], left_out=len(in_force[MAX_SHOWN:]),
            # What is asked for against herself is not hers to see.
            waiting=[one for one in await self._actions.waiting() if one.act.target != visit.user_id], words=desk_words, target=given.text("target", MAX_TARGET) or request.query.get("target", "")[:MAX_TARGET],
            chosen=given.text("measure", 40) or request.query.get("measure", ""),
        )  # fmt: skip

    async def _in_force(self) -> list[Restriction]:
        found = [one for kind in KINDS for one in await self._restrictions.listed(kind)]
        ending = {(one.kind, one.subject) for one in found}
        # Those without an end have no row there.
        for user in await self._users.restrained():
            for kind, set_ in ((SUSPEND, user.suspended), (LOCK, user.locked)):
                if set_ and (kind, user.user_id) not in ending:
                    found.append(Restriction(kind, user.user_id, None, None, 0))
        return sorted(found, key=lambda one: (KINDS.index(one.kind), one.subject))

    async def _person(self, request: Request, visit: Visit) -> Answer:
        user_id = self._users.full_id(request.query.get("user", "")[:MAX_TARGET])
        user = await self._users.find(user_id)
        in_force = [one for one in await self._in_force() if user_id in one.subject.split()]
        return await self._frame.page(
            request, visit, "desk_person.html", user_id=user_id, user=user, local=self._users.is_local(user_id),
            strikes=await self._actions.strikes(user_id), in_force=in_force, words=desk_words,
            flags=self._flags.about(user_id),
        )  # fmt: skip

    async def _take(self, request: Request, visit: Visit, form: Form) -> Answer:
        try:
            act = parse_act(form, visit.user_id)
        except NotWhole as wrong:
            return await self._show(request, visit, wrong=wrong, form=form)
        if not form.ticked("sure"):
            return await self._frame.page(
                request, visit, "desk_sure.html", act=act, fields=_fields(form), words=desk_words, back=PAGE,
                to=f"{PAGE}/take", asked_by="",
            )  # fmt: skip
        outcome = await self._actions.take(act)
        if outcome.waits is not None:
            return self._frame.redirect(f"{PAGE}#waiting")
        return self._frame.redirect(f"{PAGE}#in-force")

    async def _confirm(self, request: Request, visit: Visit, form: Form) -> Answer:
        act_id = form.required("act", 100, "the measure")
        if not form.ticked("sure"):
            waiting = await self._actions.find(act_id)
            if waiting is None or waiting.act.target == visit.user_id:
                raise NotFound("Nothing waits under this ID. It was confirmed or cancelled already.")
            return await self._frame.page(
                request, visit, "desk_sure.html", act=waiting.act, fields=[("act", act_id)], words=desk_words, back=PAGE,
                to=f"{PAGE}/confirm", asked_by=waiting.act.actor,
            )  # fmt: skip
        await self._actions.confirm(act_id, visit.user_id)
        return self._frame.redirect(PAGE)

    async def _cancel(self, request: Request, visit: Visit, form: Form) -> Answer:
        await self._actions.cancel(form.required("act", 100, "the measure"), visit.user_id)
        return self._frame.redirect(PAGE)


def parse_act(form: Form, actor: str, *, case_id: str | None = None) -> Act:
    """What a form asks for. Raises ApiError."""
    measure = form.required("measure", 40, "what to do")
    target = form.required("target", MAX_TARGET, "whom or what it is against")
    lasts, reason, room_id = (
        form.text("lasts", 10),
        form.required("reason", 40, "the reason"),
        form.text("room", MAX_TARGET),
    )
    kind = form.text("kind", 20)
    if measure not in MEASURES or reason not in desk_words.REASONS:
        raise InvalidParam("The desk does not know this measure or this reason. Load the page again.")
    if lasts and lasts not in desk_words.LASTS_DAYS:
        raise InvalidParam("The desk does not know this length of time. Load the page again.")
    undo = form.ticked("undo")
    reasons = None
    # Whoever is concerned reads why: with a measure against a file she may be unknown, and nobody has to be told.
    if not undo and (MEASURES[measure].target in ("user", "event") or form.text("facts", MAX_FACTS)):
        reasons = reasons_of(form).reasons
    if kind == KEPT_OUT:
        room_id, _, target = target.partition(" ")
    elif kind == MEDIA_HASH:
        target = f"sha256:{target}"
    return Act(
        measure, target, actor, reason, room_id=room_id or None, case_id=case_id, undo=undo, reasons=reasons,
        lasts_ms=desk_words.LASTS_DAYS[lasts] * DAY if lasts else None,
    )  # fmt: skip


def _fields(form: Form) -> list[tuple[str, str]]:
    names = ("measure", "target", "lasts", "reason", "room", "kind", "undo", "ground_kind", "ground", "facts", "untold")
    return [(name, form.text(name, MAX_FACTS)) for name in names if form.ticked(name)]
