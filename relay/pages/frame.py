"""The frame of every page: its template, its headers, its cookie, and what is shown where something is refused.

A page function takes (request, visit) and returns an answer; `open_to` makes a route of it. Templates escape everything.
The content security policy lets nothing in but our own files: what a stranger wrote can't become code.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from hashlib import sha256
from importlib import resources
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

from aiohttp import web
from markupsafe import Markup, escape

from relay.clock import DAY, HOUR, MINUTE, SECOND, Clock
from relay.errors import ApiError, Forbidden
from relay.pages.forms import TOKEN_FIELD, Form, parse, require_ours, token_for
from relay.pages.visits import APPEAL, COOKIE, LIFETIME_MS, Visit, Visits
from relay.web import Answer, Function, Request

if TYPE_CHECKING:
    from jinja2 import Environment

Who = Literal["anybody", "signed in", "appeal", "moderator"]
Page = Callable[[Request, Visit], Awaitable[Answer]]

STATIC = "/_relay/static/"
SIGN_IN = "/_relay/sign-in"
DEFAULT_AFTER_SIGN_IN = "/_relay/"
MAX_NEXT = 300
# What a browser may take from where. Only the nonce lets a script or a style sheet in.
POLICY = (
    "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src 'self' data: blob:; media-src blob:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "Server": "Sealed Relay",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=(), payment=(), usb=()",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "X-Robots-Tag": "noindex, nofollow",
}


@dataclass(slots=True, frozen=True)
class Entry:
    """A line of the menu. `for_moderators` is shown only to them."""

    path: str
    text: str
    about: str
    for_moderators: bool = False


@dataclass(slots=True)
class _Static:
    body: bytes
    content_type: str
    version: str = field(init=False)

    def __post_init__(self) -> None:
        self.version = sha256(self.body).hexdigest()[:16]


_TYPES = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml", "html": "text/html"}


class Frame:
    """`is_moderator` says of a user ID whether the desk is hers; `server.py` sets it."""

    def __init__(self, visits: Visits, clock: Clock, server_name: str, public_base_url: str | None) -> None:
        self.visits = visits
        self._clock = clock
        self.server_name = server_name
        self._base_url = (public_base_url or "").rstrip("/")
        self.is_moderator: Callable[[str], Awaitable[bool]] | None = None
        self.menu: list[Entry] = []
        self._static = _read_static()

    # --- pages

    @cached_property
    def _templates(self) -> Environment:
        # Loaded with the first page that somebody opens: 2 MB of memory that a relay without one does not need.
        from jinja2 import Environment, PackageLoader, StrictUndefined

        templates = Environment(
            loader=PackageLoader("relay.pages"), autoescape=True, undefined=StrictUndefined, auto_reload=False,
            trim_blocks=True, lstrip_blocks=True,
        )  # fmt: skip
        templates.filters.update(
            when=when, day=day, lines=lines, amount_of_time=amount_of_time, until=self._until, due=self._due
        )
        templates.globals.update(static=self._address, server_name=self.server_name)
        return templates

    def open_to(self, who: Who, page: Page) -> Function:
        """A route's function: finds the visit, sends to the sign-in where one is needed, shows refusals as pages."""

        async def answer(request: Request) -> Answer:
            visit = await self.visits.of(request)
            try:
                await self._require(who, visit)
                return await page(request, visit)
            except SignInFirst:
                if request.http.method not in ("GET", "HEAD"):
                    return self.redirect(SIGN_IN)
                return self.redirect(f"{SIGN_IN}?next={quote(_own_path(request), safe='')}")
            except ApiError as refused:
                return await self.refuse(request, visit, refused)

        return answer

    def taking(self, who: Who, page: Callable[[Request, Visit, Form], Awaitable[Answer]]) -> Function:
        """The same for a sent form, which has to be our own."""

        async def take(request: Request, visit: Visit) -> Answer:
            form = parse(request)
            require_ours(request, form, "" if visit.new else visit.cookie, guest=not visit.signed_in)
            return await page(request, visit, form)

        return self.open_to(who, take)

    async def _require(self, who: Who, visit: Visit) -> None:
        if who == "anybody":
            return
        if not visit.signed_in or (visit.opens == APPEAL and who != "appeal"):
            raise SignInFirst
        if who == "moderator":
            if not await self.moderates(visit):
                raise Forbidden("This page is for the moderators of this relay. Ask its operator if you should be one.")
            if not visit.is_fresh(self._clock.now()):
                raise SignInFirst

    async def moderates(self, visit: Visit) -> bool:
        if not visit.signed_in or visit.opens == APPEAL:
            return False
        return visit.admin if self.is_moderator is None else await self.is_moderator(visit.user_id)

    async def page(
        self, request: Request, visit: Visit, template: str, *, status: int = 200, **values: Any
    ) -> web.Response:
        nonce = secrets.token_urlsafe(18)
        moderates = await self.moderates(visit)
        html = self._templates.get_template(template).render(
            nonce=nonce,
            visit=visit,
            moderates=moderates,
            menu=[entry for entry in self.menu if moderates or not entry.for_moderators],
            here=request.http.rel_url.raw_path,
            form_field=Markup(f'<input type="hidden" name="{TOKEN_FIELD}" value="{token_for(visit.cookie)}">'),
            **values,
        )
        answer = web.Response(
            status=status, text=html, content_type="text/html", charset="utf-8",
            headers={**HEADERS, "Content-Security-Policy": POLICY.format(nonce=nonce)},
        )  # fmt: skip
        if self._is_encrypted(request):
            answer.headers["Strict-Transport-Security"] = "max-age=31536000"
        if visit.new:
            self.set_cookie(request, answer, visit)
        return answer

    async def refusal(self, request: Request, refused: ApiError) -> web.Response:
        """Of what was refused before the page's function was reached: too large a form, too many attempts."""
        return await self.refuse(request, await self.visits.of(request), refused)

    async def refuse(self, request: Request, visit: Visit, refused: ApiError) -> web.Response:
        answer = await self.page(request, visit, "refusal.html", status=refused.status, text=refused.text)
        answer.headers.update(refused.headers)
        return answer

    def redirect(self, where: str) -> web.Response:
        return web.Response(status=303, headers={**HEADERS, "Location": where})

    def origin(self, request: Request) -> str:
        """The address under which this page was asked for, to build links that are given away."""
        return self._base_url or f"{'https' if self._is_encrypted(request) else 'http'}://{request.http.host}"

    def set_cookie(self, request: Request, answer: web.StreamResponse, visit: Visit) -> None:
        """A guest's ends with the browser; a signed-in one lives as long as the visit."""
        answer.set_cookie(
            COOKIE, visit.cookie, path="/_relay/", httponly=True, samesite="Lax", secure=self._is_encrypted(request),
            max_age=LIFETIME_MS // SECOND if visit.signed_in else None,
        )  # fmt: skip

    def _is_encrypted(self, request: Request) -> bool:
        """Also behind a proxy that does not say so, where the page was asked for under the relay's own https address."""
        # Whoever lies in these headers spoils only her own cookie.
        told = request.http.headers.get("X-Forwarded-Proto", "").strip().lower() == "https"
        return request.http.secure or told or self._base_url.lower() == f"https://{request.http.host}".lower()

    # --- files

    def file(self, name: str, version: str) -> web.Response | None:
        found = self._static.get(name)
        if found is None:
            return None
        kept = "public, max-age=31536000, immutable" if version == found.version else "no-cache"
        headers = {**HEADERS, "Cache-Control": kept, "Content-Security-Policy": "default-src 'none'; sandbox"}
        if name.endswith(".html"):
            # It is a tool of its own, to be kept and opened from the disk.
            headers["Content-Disposition"] = f'attachment; filename="{name}"'
        return web.Response(body=found.body, content_type=found.content_type, charset="utf-8", headers=headers)

    def _address(self, name: str) -> str:
        return f"{STATIC}{name}?v={self._static[name].version}"

    def _due(self, ts: int) -> str:
        left = ts - self._clock.now()
        return f"in {amount_of_time(left)}" if left >= 0 else f"{amount_of_time(-left)} late"

    def _until(self, ts: int) -> str:
        """How far off a moment is, either way, in words."""
        left = ts - self._clock.now()
        return f"in {amount_of_time(left)}" if left >= 0 else f"{amount_of_time(-left)} ago"


class SignInFirst(Exception):
    pass


def local_path(text: str) -> str:
    """Where to go after signing in: a page of ours, whatever a link said."""
    fine = text.startswith("/_relay/") and len(text) <= MAX_NEXT and text.isascii() and text.isprintable()
    return text if fine and "\\" not in text and "//" not in text and "/../" not in text else DEFAULT_AFTER_SIGN_IN


def when(ts: int) -> Markup:
    """A moment; a script turns it into the reader's own time."""
    moment = datetime.fromtimestamp(ts / 1000, UTC)
    return Markup('<time datetime="{}">{}</time>').format(
        moment.isoformat(timespec="seconds"), moment.strftime("%-d %b %Y, %H:%M UTC")
    )


def day(ts: int) -> str:
    return datetime.fromtimestamp(ts / 1000, UTC).strftime("%-d %b %Y")


def amount_of_time(ms: int) -> str:
    for unit, name in ((DAY, "day"), (HOUR, "hour"), (MINUTE, "minute")):
        if ms >= unit:
            number = ms // unit
            return f"{number} {name}{'' if number == 1 else 's'}"
    return "less than a minute"


def lines(text: str) -> Markup:
    """Somebody's own words with their line breaks."""
    return Markup("<br>").join(escape(line) for line in text.split("\n"))


def _own_path(request: Request) -> str:
    return local_path(request.http.rel_url.raw_path_qs)


def _read_static() -> dict[str, _Static]:
    found = {}
    for file in (resources.files("relay.pages") / "static").iterdir():
        suffix = file.name.rpartition(".")[2]
        if suffix in _TYPES:
            found[file.name] = _Static(file.read_bytes(), _TYPES[suffix])
    return found
