"""What the links in a notice room open: adding to a report, reading a decision, objecting to it; and the form for everybody.

The link alone opens nothing: the page asks who you are, and a locked or closed account can come as well. A receipt of the
public form has nobody behind it; whoever has the code has the report. What people write is sealed to the moderators.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import orjson

from relay.errors import ApiError, Forbidden, MissingParam, NotFound
from relay.ids import server_of
from relay.moderation import case_rules as rules
from relay.moderation.appeals import Appeals
from relay.moderation.case_rows import WORDS_NOT_KEPT, Case
from relay.moderation.decisions import Decision
from relay.moderation.disclosure_form import MAX_BYTES, parse_code
from relay.moderation.envelopes import Envelopes
from relay.moderation.keeping import Keeping
from relay.moderation.links import Link, Links
from relay.moderation.reports import MAX_FORM_FIELD, MAX_WORDS, Reports
from relay.pages import desk_words
from relay.pages.forms import Form
from relay.pages.frame import Frame, SignInFirst
from relay.pages.visits import Visit
from relay.part import Part
from relay.web import Answer, Request, Route

REPORT, APPEAL, NOTICE = "/_relay/report", "/_relay/appeal", "/_relay/notice"
MAX_FORM_BYTES = 64 * 1024
# A proof code in a form: base64, and percent signs for its few odd characters.
MAX_PROOF_FORM_BYTES = MAX_BYTES * 2
MAX_CODE = MAX_BYTES * 3 // 2
MAX_RECEIPT = 100
SAID = {
    "answer": "Your words have reached the moderators, sealed.",
    "yes": "You agreed that the proof is sent to the other server's moderators.",
    "no": "The proof will not be sent to the other server.",
    "appeal": "Your objection has reached the moderators. You will hear what comes of it.",
}


class ReportPages(Part):
    def __init__(
        self,
        frame: Frame,
        links: Links,
        reports: Reports,
        appeals: Appeals,
        envelopes: Envelopes,
        keeping: Keeping,
        answers: Callable[[str], Awaitable[list[dict[str, Any]]]],
    ) -> None:
        self._frame = frame
        self._links = links
        self._reports = reports
        self._appeals = appeals
        self._envelopes = envelopes
        self._keeping = keeping
        self._answers = answers

    def routes(self) -> Iterable[Route]:
        frame = self._frame
        yield Route("GET", f"{REPORT}/{{token}}", frame.open_to("anybody", self._report), auth="none")
        for name, function, most in (
            ("proof", self._proof, MAX_PROOF_FORM_BYTES),
            ("answer", self._answer, MAX_FORM_BYTES),
            ("consent", self._consent, MAX_FORM_BYTES),
            ("appeal", self._object, MAX_FORM_BYTES),
            ("withdraw", self._withdraw, MAX_FORM_BYTES),
        ):
            take = frame.taking("anybody", function)
            yield Route("POST", f"{REPORT}/{{token}}/{name}", take, auth="none", limit="login", max_body=most)
        yield Route("GET", APPEAL, frame.open_to("appeal", self._appeals_of), auth="none")
        yield Route(
            "POST", APPEAL, frame.taking("appeal", self._appeal), auth="none", limit="login", max_body=MAX_FORM_BYTES
        )
        yield Route("GET", f"{APPEAL}/{{token}}", frame.open_to("anybody", self._decision), auth="none")
        yield Route("GET", NOTICE, frame.open_to("anybody", self._notice), auth="none")
        yield Route(
            "POST",
            NOTICE,
            frame.taking("anybody", self._file_notice),
            auth="none",
            limit="registration",
            max_body=MAX_FORM_BYTES,
        )
        yield Route("GET", f"{NOTICE}/status", frame.open_to("anybody", self._status), auth="none")
        yield Route(
            "POST",
            f"{NOTICE}/status",
            frame.taking("anybody", self._look_up),
            auth="none",
            limit="login",
            max_body=MAX_FORM_BYTES,
        )

    async def _link(self, request: Request, visit: Visit) -> tuple[Link, str | None]:
        """The link of this address, and who opens it. Raises SignInFirst, NotFound."""
        link = await self._links.look(request.params["token"])
        if link.purpose == "receipt":
            return link, None
        if not visit.signed_in:
            raise SignInFirst
        return link, visit.user_id

    # --- a report

    async def _report(self, request: Request, visit: Visit) -> Answer:
        link, user_id = await self._link(request, visit)
        case = await self._reports.opened(link, user_id)
        return await self._show_report(
            request, visit, link, user_id, case, said=SAID.get(request.query.get("done", ""), "")
        )

    async def _show_report(
        self, request: Request, visit: Visit, link: Link, user_id: str | None, case: Case, **more: Any
    ) -> Answer:
        cards = await self._reports.card(link, user_id)
        shown = {"said": "", "proof": None, **more}
        return await self._frame.page(
            request, visit, "report.html", case=case, receipt=link.purpose == "receipt", at=request.http.rel_url.raw_path.rsplit("/proof", 1)[0],
            cards=_shown(cards) if cards else "",
            taken_back=[{**one, "card": _shown(one)} for one in await self._reports.taken_back(link, user_id)], words=desk_words,
            elsewhere=user_id is not None and case.user_id is not None and server_of(case.user_id) != self._frame.server_name,
            not_kept=case.words == WORDS_NOT_KEPT, can_seal=await self._envelopes.can_seal(),
            decisions=await self._decided(link, user_id), answers=await self._answers(case.case_id), expires_ts=link.expires_ts, **shown,
        )  # fmt: skip

    async def _decided(self, link: Link, user_id: str | None) -> list[Decision]:
        if link.purpose != "receipt":
            return []
        return (await self._appeals.opened(link, user_id))[1]

    async def _proof(self, request: Request, visit: Visit, form: Form) -> Answer:
        link, user_id = await self._link(request, visit)
        case = await self._reports.opened(link, user_id)
        code = form.required("code", MAX_CODE, "the proof code")
        disclosure = parse_code(code, category=case.category, good_faith=form.ticked("good_faith"))
        proof = await self._reports.attach_proof(link, user_id, disclosure)
        case = await self._reports.opened(link, user_id)
        return await self._show_report(request, visit, link, user_id, case, proof=proof)

    async def _answer(self, request: Request, visit: Visit, form: Form) -> Answer:
        link, user_id = await self._link(request, visit)
        await self._reports.answer(link, user_id, form.text("words", MAX_WORDS))
        return self._done(request, "answer")

    async def _consent(self, request: Request, visit: Visit, form: Form) -> Answer:
        link, user_id = await self._link(request, visit)
        agreed = form.text("agree", 10) == "yes"
        await self._reports.consent(link, user_id, agreed)
        return self._done(request, "yes" if agreed else "no")

    async def _object(self, request: Request, visit: Visit, form: Form) -> Answer:
        """With a receipt."""
        link, user_id = await self._link(request, visit)
        case, _ = await self._appeals.opened(link, user_id)
        await self._appeals.file(case.case_id, user_id, form.text("words", MAX_WORDS))
        return self._done(request, "appeal")

    async def _withdraw(self, request: Request, visit: Visit, form: Form) -> Answer:
        link, user_id = await self._link(request, visit)
        case = await self._reports.opened(link, user_id)
        if not form.ticked("sure"):
            raise MissingParam("Tick that you are sure. Go back and do so, if you are.")
        await self._keeping.withdraw(case)
        return await self._frame.page(request, visit, "report_withdrawn.html")

    def _done(self, request: Request, what: str) -> Answer:
        return self._frame.redirect(f"{REPORT}/{request.params['token']}?done={what}")

    # --- decisions and objections

    async def _appeals_of(self, request: Request, visit: Visit) -> Answer:
        found = await self._appeals.of_person(visit.user_id)
        return await self._show_decisions(request, visit, found)

    async def _decision(self, request: Request, visit: Visit) -> Answer:
        link, user_id = await self._link(request, visit)
        case, decisions = await self._appeals.opened(link, user_id)
        return await self._show_decisions(request, visit, [(case, one) for one in reversed(decisions)])

    async def _show_decisions(self, request: Request, visit: Visit, found: list[tuple[Case, Decision]]) -> Answer:
        newest: dict[str, str] = {}
        for case, decision in found:
            newest.setdefault(case.case_id, decision.decision_id)
        open_to_objection = {
            case.case_id: (newest[case.case_id], case.state in (rules.DECIDED, rules.CLOSED)) for case, _ in found
        }
        return await self._frame.page(
            request, visit, "appeal.html", found=found, words=desk_words, open=open_to_objection,
            said=SAID.get(request.query.get("done", ""), ""), can_seal=await self._envelopes.can_seal(),
        )  # fmt: skip

    async def _appeal(self, request: Request, visit: Visit, form: Form) -> Answer:
        await self._appeals.file(
            form.required("case", 100, "the decision"), visit.user_id, form.text("words", MAX_WORDS)
        )
        return self._frame.redirect(f"{APPEAL}?done=appeal")

    # --- the form for everybody

    async def _notice(self, request: Request, visit: Visit) -> Answer:
        return await self._frame.page(
            request, visit, "notice.html", words=desk_words, can_seal=await self._envelopes.can_seal()
        )

    async def _file_notice(self, request: Request, visit: Visit, form: Form) -> Answer:
        contact = ", ".join(part for part in (form.text("name", 200), form.text("contact", 300)) if part)
        who = "I am the person concerned, or act for that person.\n\n" if form.ticked("depicted") else ""
        can_seal = await self._envelopes.can_seal()
        receipt = await self._reports.notice(
            category=form.text("category", 20), where=form.required("where", MAX_FORM_FIELD, "where it is"),
            text=who + form.required("why", MAX_WORDS - 100, "what is wrong with it"), contact=contact,
            good_faith=form.ticked("good_faith"), address=request.address,
        )  # fmt: skip
        return await self._frame.page(
            request, visit, "notice_sent.html", receipt=receipt, origin=self._frame.origin(request), kept=can_seal
        )

    async def _status(self, request: Request, visit: Visit) -> Answer:
        return await self._frame.page(request, visit, "notice_status.html")

    async def _look_up(self, request: Request, visit: Visit, form: Form) -> Answer:
        receipt = form.required("receipt", MAX_RECEIPT, "your receipt code")
        try:
            link = await self._links.look(receipt)
        except ApiError:
            raise NotFound(
                "This receipt code is not known here, or its time is over. Look at each letter again."
            ) from None
        if link.purpose != "receipt":
            raise Forbidden("This is the code of a link, not of a receipt. Open the link in your notice room instead.")
        return self._frame.redirect(f"{REPORT}/{receipt}")


def _shown(value: Any) -> str:
    return orjson.dumps(value, option=orjson.OPT_INDENT_2).decode()
