"""Signing in to the relay's pages with a password, signing out, the first page, and the files that pages need.

A second factor will be one more step between the password and `visits.begin`; an OAuth sign-in begins here and goes on
where `next` says. A locked or closed account gets no further than the page for appeals.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from functools import partial

from relay.accounts.users import User, Users
from relay.db import Tx
from relay.doors import Doors
from relay.errors import ApiError, Forbidden, NotFound, UserLocked
from relay.limits import Limits
from relay.pages.forms import Form
from relay.pages.frame import SIGN_IN, Frame, local_path
from relay.pages.visits import ACCOUNT, APPEAL, PASSWORD, Visit
from relay.part import Part
from relay.web import Answer, Request, Route

MAX_NAME, MAX_PASSWORD = 300, 1100
MAX_FORM_BYTES = 8192
APPEALS = "/_relay/appeal"


class SigningIn(Part):
    def __init__(self, frame: Frame, users: Users, doors: Doors, limits: Limits) -> None:
        self._frame = frame
        self._users = users
        self._doors = doors
        self._limits = limits
        # Whether a password opens the appeals of an account that is closed; the moderation sets it.
        self.may_appeal: Callable[[str, str], Awaitable[bool]] | None = None

    def routes(self) -> Iterable[Route]:
        frame = self._frame
        yield Route("GET", "/_relay/", frame.open_to("signed in", self._home), auth="none")
        yield Route("GET", SIGN_IN, frame.open_to("anybody", self._form), auth="none")
        yield Route(
            "POST", SIGN_IN, frame.taking("anybody", self._sign_in), auth="none", limit="login", max_body=MAX_FORM_BYTES
        )
        yield Route(
            "POST", "/_relay/sign-out", frame.taking("appeal", self._sign_out), auth="none", max_body=MAX_FORM_BYTES
        )
        yield Route("GET", "/_relay/static/{name}", self._file, auth="none")

    async def _home(self, request: Request, visit: Visit) -> Answer:
        return await self._frame.page(request, visit, "home.html")

    async def _form(self, request: Request, visit: Visit) -> Answer:
        after = local_path(request.query.get("next", ""))
        return await self._frame.page(request, visit, "sign_in.html", after=after, name=visit.user_id, wrong="")

    async def _sign_in(self, request: Request, visit: Visit, form: Form) -> Answer:
        after = local_path(form.text("next", 1000))
        name = form.required("name", MAX_NAME, "your user name")
        password = form.required("password", MAX_PASSWORD, "your password")
        user_id = self._users.full_id(name)
        self._limits.spend("login", user_id)
        try:
            opens, user = await self._proves(user_id, password)
            # A second factor will be asked for between here and the next line, and named beside the password.
            begun = await self._frame.visits.begin(
                user_id, frozenset({PASSWORD}), opens, require=partial(self._require_unchanged, user)
            )
        except ApiError as refused:
            return await self._frame.page(
                request, visit, "sign_in.html", status=refused.status, after=after, name=name, wrong=refused.text
            )
        if visit.signed_in:
            await self._frame.visits.end(visit)
        answer = self._frame.redirect(after if opens == ACCOUNT or after.startswith(APPEALS) else APPEALS)
        self._frame.set_cookie(request, answer, begun)
        return answer

    def _require_unchanged(self, user: User | None, tx: Tx) -> None:
        """A password that is changed while the old one is being checked ends all visits, and this one must not come after that."""
        if user is not None:
            self._users.require_unchanged(tx, user)

    async def _proves(self, user_id: str, password: str) -> tuple[str, User | None]:
        """What this password opens, and whose it was; none for an account that is closed. Raises Forbidden."""
        user = await self._users.authenticate(user_id, password)
        if user is None:
            if self.may_appeal is not None and await self.may_appeal(user_id, password):
                return APPEAL, None
            raise Forbidden("The user name or the password is wrong. Try again.")
        if user.locked:
            return APPEAL, user
        try:
            await self._doors.login(user_id)
        except UserLocked:
            return APPEAL, user
        return ACCOUNT, user

    async def _sign_out(self, request: Request, visit: Visit, form: Form) -> Answer:
        await self._frame.visits.end(visit)
        return self._frame.redirect(SIGN_IN)

    async def _file(self, request: Request) -> Answer:
        found = self._frame.file(request.params["name"], request.query.get("v", ""))
        if found is None:
            raise NotFound("There is no such file.")
        return found
