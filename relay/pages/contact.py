"""The pages of the contact gate: who may invite me, which invites wait, my contact links; and what a link opens for a stranger.

Of a waiting invite only the sender, the room's ID and the times are shown: names and pictures of a room are a stranger's words.
"""

from __future__ import annotations

from collections.abc import Iterable

from relay.pages.forms import Form
from relay.pages.frame import Frame
from relay.pages.visits import Visit
from relay.part import Part
from relay.people.contact_gate import CHOICES, ContactGate
from relay.people.contact_links import ContactLinks
from relay.web import Answer, Request, Route

PAGE = "/_relay/contact"
MAX_FORM_BYTES = 8192
MAX_ID = 300
WORDS = {
    "everybody": ("Everybody", "Any Matrix user may invite you. Nothing is held back."),
    "shared_rooms": (
        "People I share a room with, or who have my contact link",
        "Invites of all others wait here until you let them in.",
    ),
    "link": (
        "Only people with my contact link",
        "Invites of all others wait here, also of people you share a room with.",
    ),
    "nobody": ("Nobody", "Invites are refused, and the sender is told so."),
}


class ContactPages(Part):
    def __init__(self, frame: Frame, gate: ContactGate, links: ContactLinks) -> None:
        self._frame = frame
        self._gate = gate
        self._links = links

    def routes(self) -> Iterable[Route]:
        frame = self._frame
        yield Route("GET", PAGE, frame.open_to("signed in", self._page), auth="none")
        for name, function in (
            ("choose", self._choose),
            ("let-in", self._let_in),
            ("drop", self._drop),
            ("make-link", self._make_link),
            ("revoke-link", self._revoke_link),
        ):
            take = frame.taking("signed in", function)
            yield Route("POST", f"{PAGE}/{name}", take, auth="none", max_body=MAX_FORM_BYTES)
        yield Route("GET", f"{PAGE}/{{token}}", frame.open_to("anybody", self._link), auth="none")
        yield Route(
            "POST", f"{PAGE}/{{token}}", frame.taking("anybody", self._use), auth="none", limit="login",
            max_body=MAX_FORM_BYTES,
        )  # fmt: skip

    # --- her own page

    async def _page(self, request: Request, visit: Visit) -> Answer:
        links = await self._links.of(visit.user_id)
        return await self._frame.page(
            request, visit, "contact.html",
            choice=await self._gate.choice(visit.user_id),
            choices=[(name, *WORDS[name]) for name in CHOICES],
            held=await self._gate.held(visit.user_id),
            links=[(link, f"{self._frame.origin(request)}{PAGE}/{link.token}") for link in links if not (link.once and link.passes)],
            used_up=[link for link in links if link.once and link.passes],
        )  # fmt: skip

    async def _choose(self, request: Request, visit: Visit, form: Form) -> Answer:
        await self._gate.choose(visit.user_id, form.text("invites_from", 20))
        return self._frame.redirect(PAGE)

    async def _let_in(self, request: Request, visit: Visit, form: Form) -> Answer:
        await self._gate.let_in(visit.user_id, form.required("room", MAX_ID, "the room"))
        return self._frame.redirect(f"{PAGE}#waiting")

    async def _drop(self, request: Request, visit: Visit, form: Form) -> Answer:
        await self._gate.drop(visit.user_id, form.required("room", MAX_ID, "the room"))
        return self._frame.redirect(f"{PAGE}#waiting")

    async def _make_link(self, request: Request, visit: Visit, form: Form) -> Answer:
        await self._links.make(visit.user_id, once=form.text("uses", 10) != "many")
        return self._frame.redirect(f"{PAGE}#links")

    async def _revoke_link(self, request: Request, visit: Visit, form: Form) -> Answer:
        await self._links.revoke(visit.user_id, form.required("token", 100, "the link"))
        return self._frame.redirect(f"{PAGE}#links")

    # --- what a link opens

    async def _link(self, request: Request, visit: Visit) -> Answer:
        owner = await self._links.owner(request.params["token"])
        return await self._frame.page(request, visit, "contact_link.html", owner=owner, used_by="")

    async def _use(self, request: Request, visit: Visit, form: Form) -> Answer:
        guest = visit.user_id if visit.signed_in else form.required("user_id", MAX_ID, "your Matrix user ID")
        owner = await self._links.use(request.params["token"], guest)
        await self._gate.let_in_from(owner, guest)
        return await self._frame.page(request, visit, "contact_link.html", owner=owner, used_by=guest)
