"""HTTP at the rim: routes, who is calling, JSON in and out, errors, CORS and limits. The one place that catches.

A part lists `Route`s; each function gets a `Request` and returns a dict, ready JSON bytes, or an aiohttp response.
Paths are matched segment by segment before percent-decoding, so an alias may hold an encoded slash.
Spec: client-server-api/#api-standards, server-server-api/#api-standards.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol
from urllib.parse import parse_qsl, unquote

import orjson
import structlog
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from multidict import CIMultiDict

from relay import wire
from relay.callers import AssertsIdentities, Sessions
from relay.callers import Caller as Caller
from relay.errors import (
    ApiError,
    BadJson,
    Forbidden,
    InvalidParam,
    MissingParam,
    MissingToken,
    NotAllowed,
    NotJson,
    RemoteError,
    UnknownToken,
    Unrecognized,
    UserLocked,
)
from relay.limits import Limits

log = structlog.get_logger("web")

MAX_BODY = 2**20
MAX_FEDERATION_BODY = 16 * 2**20
MAX_JSON_DEPTH = 100

MAX_PROXIES = 10
MAX_DECODED, MAX_DECODED_LENGTH = 2_000, 256

Networks = tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]
Auth = Literal["none", "user", "optional", "server"]
Answer = Mapping[str, Any] | list[Any] | bytes | web.StreamResponse
Function = Callable[["Request"], Awaitable[Answer]]
Refusal = Callable[["Request", ApiError], Awaitable[web.StreamResponse]]

JSON_TYPE = "application/json"
# On every answer. Which library serves it is nobody's business.
HEADERS = {
    "Server": "Sealed Relay",
    "Access-Control-Allow-Origin": "*",
    "Access-Control-Allow-Methods": "GET, POST, PUT, DELETE, OPTIONS, PATCH, HEAD",
    "Access-Control-Allow-Headers": "X-Requested-With, Content-Type, Authorization",
    "Access-Control-Expose-Headers": "Content-Disposition, Retry-After",
}
JSON_HEADERS = CIMultiDict({**HEADERS, "Content-Type": JSON_TYPE})
_JSON_HEAD = wire.head_of(JSON_HEADERS)


@dataclass(slots=True, frozen=True)
class Route:
    """One endpoint. `limit` names a rate class of the configuration; `body` "stream" leaves reading it to the function.

    `serves` says on which listeners it stands; `when_locked`, whether it is for locked accounts too. `refusal` makes
    the answer of what is refused, where that is to be a page and not the standard's form. `for_services`: an application
    service proves itself there, of whom nothing else is asked.
    """

    method: str
    path: str
    function: Function
    auth: Auth = "user"
    limit: str | None = None
    body: Literal["json", "stream"] = "json"
    serves: Literal["client", "federation", "both", "metrics"] = "client"
    max_body: int = MAX_BODY
    when_locked: bool = False
    refusal: Refusal | None = None
    for_services: bool = False


class AuthenticatesServers(Protocol):
    """Checks an X-Matrix header; `federation/xmatrix` implements it."""

    async def origin(self, request: Request) -> str:
        """The server name that signed the request. Raises Unauthorized."""
        ...


class Request:
    """What a function gets to see. `params` are the decoded path segments, `query` the last value of each key."""

    __slots__ = ("_json", "_proxies", "body", "caller", "http", "origin", "params", "query", "route")

    def __init__(self, http: web.BaseRequest, route: Route, params: dict[str, str], proxies: Networks = ()) -> None:
        self.http = http
        self._proxies = proxies
        self.route = route
        self.params = params
        raw = http.rel_url.raw_query_string
        self.query: dict[str, str] = dict(parse_qsl(raw, keep_blank_values=True)) if raw else {}
        self.body = b""
        self.caller: Caller | None = None
        self.origin = ""
        self._json: Any = None

    @property
    def user_id(self) -> str:
        return self.who.user_id

    @property
    def who(self) -> Caller:
        if self.caller is None:
            raise MissingToken("Sign in first: this needs an access token.")
        return self.caller

    @property
    def address(self) -> str:
        """Whose request it is, as far as an address tells; for rate limits in memory, never to be written."""
        peer = self.http.remote or ""
        told = self.http.headers.get("X-Forwarded-For")
        if told is None or not _within(peer, self._proxies):
            return peer
        # Each proxy adds whom it heard from at the end: the last one that is no proxy of ours counts.
        for one in reversed([part.strip() for part in told.split(",")][-MAX_PROXIES:]):
            if not _within(one, self._proxies):
                return one
        return peer

    def query_list(self, key: str) -> list[str]:
        return [v for k, v in parse_qsl(self.http.rel_url.raw_query_string, keep_blank_values=True) if k == key]

    def query_int(self, key: str, default: int, *, low: int = 0, high: int = 2**53 - 1) -> int:
        text = self.query.get(key)
        if text is None:
            return default
        try:
            number = int(text)
        except ValueError:
            raise InvalidParam(f"The parameter {key} is not a whole number.") from None
        if number < low:
            raise InvalidParam(f"The parameter {key} is below {low}.")
        return min(number, high)

    def query_bool(self, key: str, default: bool = False) -> bool:
        text = self.query.get(key)
        return default if text is None else text.lower() == "true"

    def json(self) -> dict[str, Any]:
        """The body as an object. Raises NotJson, BadJson."""
        if self._json is None:
            self._json = parse_object(self.body)
        parsed: dict[str, Any] = self._json
        return parsed

    def optional_json(self) -> dict[str, Any]:
        """The same, where an empty body counts as an empty object."""
        return self.json() if self.body.strip() else {}


def _within(address: str, networks: Networks) -> bool:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    return any(parsed in network for network in networks)


def parse_object(body: bytes) -> dict[str, Any]:
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise NotJson("The body is not JSON.") from None
    if type(value) is not dict:
        raise BadJson("The body is not a JSON object.")
    require_shallow(value)
    return value


def require_shallow(value: Any) -> None:
    """Bounds the nesting, so that nothing behind it can run out of stack."""
    level: list[Any] = [value] if type(value) is dict or type(value) is list else []
    for _ in range(MAX_JSON_DEPTH):
        level = [v for c in level for v in (c.values() if type(c) is dict else c) if type(v) is dict or type(v) is list]
        if not level:
            return
    raise BadJson(f"The JSON is nested deeper than {MAX_JSON_DEPTH} levels.")


def get_string(body: Mapping[str, Any], key: str, default: str | None = None) -> str:
    """A required (or defaulted) string of a body."""
    value = body.get(key, default)
    if value is None:
        raise MissingParam(f"The key {key} is missing.")
    if not isinstance(value, str):
        raise BadJson(f"The key {key} is not a string.")
    return value


def get_optional_string(body: Mapping[str, Any], key: str) -> str | None:
    value = body.get(key)
    if value is not None and not isinstance(value, str):
        raise BadJson(f"The key {key} is not a string.")
    return value


def get_object(body: Mapping[str, Any], key: str, default: dict[str, Any] | None = None) -> dict[str, Any]:
    value = body.get(key, default)
    if value is None:
        raise MissingParam(f"The key {key} is missing.")
    if not isinstance(value, dict):
        raise BadJson(f"The key {key} is not an object.")
    return value


def get_list(body: Mapping[str, Any], key: str, default: list[Any] | None = None) -> list[Any]:
    value = body.get(key, default)
    if value is None:
        raise MissingParam(f"The key {key} is missing.")
    if not isinstance(value, list):
        raise BadJson(f"The key {key} is not an array.")
    return value


def get_bool(body: Mapping[str, Any], key: str, default: bool) -> bool:
    value = body.get(key, default)
    if not isinstance(value, bool):
        raise BadJson(f"The key {key} is not true or false.")
    return value


class _Node:
    __slots__ = ("children", "wild", "name", "methods")

    def __init__(self) -> None:
        self.children: dict[str, _Node] = {}
        self.wild: _Node | None = None
        self.methods: dict[str, tuple[Route, tuple[str, ...]]] = {}


class Router:
    """A tree of path segments. A literal segment wins over a parameter; an empty last segment is one of its own."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self._root = _Node()
        # The ends of paths without parameters, which need not be looked for.
        self._literal: dict[str, _Node] = {}
        self.routes: list[Route] = []
        for route in routes:
            self.add(route)

    def add(self, route: Route) -> None:
        node, names = self._root, []
        for segment in route.path.split("/")[1:]:
            if segment.startswith("{"):
                names.append(segment[1:-1])
                if node.wild is None:
                    node.wild = _Node()
                node = node.wild
            else:
                node = node.children.setdefault(segment, _Node())
        if route.method in node.methods:
            raise ValueError(f"two routes for {route.method} {route.path}")
        node.methods[route.method] = (route, tuple(names))
        if not names:
            self._literal[route.path] = node
        self.routes.append(route)

    def find(self, method: str, raw_path: str) -> tuple[Route, dict[str, str]]:
        """Raises Unrecognized with 404, or 405 where the path exists with other methods."""
        literal = self._literal.get(raw_path)
        found = (literal, []) if literal is not None else self._walk(raw_path.split("/")[1:])
        if found is None:
            raise Unrecognized("This server does not know this endpoint.")
        node, values = found
        entry = node.methods.get(method) or (node.methods.get("GET") if method == "HEAD" else None)
        if entry is None:
            raise Unrecognized("This endpoint does not take this method.", status=405)
        route, names = entry
        try:
            return route, {name: _decoded(value) for name, value in zip(names, values, strict=True)}
        except UnicodeDecodeError:
            raise InvalidParam("The path is not UTF-8.") from None

    def _walk(self, segments: list[str]) -> tuple[_Node, list[str]] | None:
        node, index, values = self._root, 0, list[str]()
        # Where a parameter can be taken if the literal segment leads nowhere.
        turnings: list[tuple[_Node, int, list[str]]] = []
        while True:
            if index == len(segments):
                if node.methods:
                    return node, values
            else:
                segment = segments[index]
                index += 1
                child, wild = node.children.get(segment), node.wild
                if child is not None:
                    if wild is not None:
                        turnings.append((wild, index, [*values, segment]))
                    node = child
                    continue
                if wild is not None:
                    values.append(segment)
                    node = wild
                    continue
            if not turnings:
                return None
            node, index, values = turnings.pop()


def _decoded(segment: str) -> str:
    if "%" not in segment:
        return segment
    # A stranger's may be as long as a path, and is named once.
    return _unquoted(segment) if len(segment) <= MAX_DECODED_LENGTH else unquote(segment, errors="strict")


@lru_cache(MAX_DECODED)
def _unquoted(segment: str) -> str:
    """The same rooms and people are named again and again."""
    return unquote(segment, errors="strict")


class _Passing(web.Response):
    """Its bytes are let go once they are written: a connection holds its last answer for as long as it rests."""

    async def write_eof(self, data: bytes = b"") -> None:
        await super().write_eof(data)
        self._body = None


class Web:
    """Turns HTTP requests into calls of route functions, and whatever they raise into answers."""

    def __init__(
        self,
        routes: Iterable[Route],
        sessions: Sessions,
        servers: AuthenticatesServers | None,
        limits: Limits,
        services: AssertsIdentities | None = None,
    ) -> None:
        """`services` is None where there are no application services."""
        self._routes = list(routes)
        self.routers = {
            "client": self._router(frozenset({"client"})),
            "federation": self._router(frozenset({"federation"})),
            "both": self._router(frozenset({"client", "federation"})),
        }
        self._sessions = sessions
        self._servers = servers
        self._services = services
        self._limits = limits

    def _router(self, serves: frozenset[str]) -> Router:
        anybody = serves & {"client", "federation"}
        return Router(r for r in self._routes if (anybody if r.serves == "both" else r.serves in serves))

    def listener(self, serves: frozenset[str], trusted_proxies: Sequence[str] = ()) -> web.Server:
        """The addresses of `trusted_proxies` are believed when they say whom they speak for."""
        router = self._router(serves)
        networks = tuple(ipaddress.ip_network(text, strict=False) for text in trusted_proxies)

        async def answer(http: web.BaseRequest) -> web.StreamResponse:
            return await self._answer(http, router, networks)

        return wire.Listening(answer, _refusal)

    async def _answer(self, http: web.BaseRequest, router: Router, proxies: Networks) -> web.StreamResponse:
        if http.method == "OPTIONS":
            return web.Response(status=204, headers=HEADERS)
        request = None
        try:
            # old clients say r0 where the standard now says v3
            route, params = router.find(
                http.method, http.rel_url.raw_path.replace("/_matrix/client/r0/", "/_matrix/client/v3/", 1)
            )
            request = Request(http, route, params, proxies)
            result = await self._call(request)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            refused = _as_refusal(request, error)
            if request is None or request.route.refusal is None:
                return _ended(http, refused, _refusal(refused))
            return _ended(http, refused, await request.route.refusal(request, refused))
        if isinstance(result, web.StreamResponse):
            return result
        body = result if isinstance(result, bytes) else orjson.dumps(result)
        if wire.OnePiece.fits(http, body):
            return wire.OnePiece(_JSON_HEAD, body)
        return _Passing(body=body, headers=JSON_HEADERS)

    async def _call(self, request: Request) -> Answer:
        route = request.route
        if route.body == "json":
            if request.http.body_exists:
                request.body = await wire.whole(request.http, route.max_body)
        if route.auth == "user":
            request.caller = await self._caller(request)
            if route.limit is not None and request.caller.limited:
                self._limits.spend(route.limit, request.caller.user_id)
        elif route.auth == "server":
            if self._servers is None:
                raise Unrecognized("This server does not federate.")
            request.origin = await self._servers.origin(request)
            if route.limit is not None:
                self._limits.spend(route.limit, request.origin)
        else:
            if route.auth == "optional" and _token(request) is not None:
                request.caller = await self._caller(request)
            elif route.for_services and self._services is not None and self._services.knows(_token(request) or ""):
                # Signing in and registering: it names its user in the body.
                request.caller = self._services.itself(_token(request) or "")
            if route.limit is not None and (request.caller is None or request.caller.limited):
                # Only in memory, and only for as long as the limit's bucket fills.
                self._limits.spend_at(route.limit, request.address)
        return await route.function(request)

    async def _caller(self, request: Request) -> Caller:
        token = _token(request)
        if token is None:
            raise MissingToken("Sign in first: this needs an access token.")
        caller = self._sessions.known(token)
        if caller is None:
            if self._services is not None and self._services.knows(token):
                caller = await self._services.caller(token, request.query)
            else:
                caller = await self._sessions.caller(token)
        if caller.locked and not request.route.when_locked:
            raise UserLocked
        return caller


def _token(request: Request) -> str | None:
    header = request.http.headers.get("Authorization")
    if header is not None:
        scheme, _, token = header.partition(" ")
        token = token.strip() if scheme.lower() == "bearer" else ""
    else:
        token = request.query.get("access_token", "")
    if not token.isascii():
        raise UnknownToken("No token of this server looks like that. Sign in again.")
    return token or None


def _as_refusal(request: Request | None, error: Exception) -> ApiError:
    if isinstance(error, NotAllowed):
        return Forbidden(f"The room does not allow this: {error.reason}.")
    if isinstance(error, RemoteError):
        return _from_remote(error)
    if isinstance(error, (HttpProcessingError, web.RequestPayloadError, ConnectionResetError)):
        return NotJson("The request broke off, or its body is not encoded as its headers say.")
    if isinstance(error, ApiError):
        return error
    # The route, never the path: a receipt or a link stands in it, and whoever reads the log could open it.
    log.error("a request failed", route=request.route.path if request is not None else "", exc_info=error)
    return ApiError("Something went wrong inside the server. Its log says what.", status=500)


def _ended(http: web.BaseRequest, error: ApiError, answer: web.StreamResponse) -> web.StreamResponse:
    if error.status == 413 or (http.body_exists and not http.content.is_eof()):
        # What was not read can't be told from the next request.
        answer.headers["Connection"] = "close"
    return answer


def json_response(body: Mapping[str, Any], *, status: int) -> web.Response:
    """An answer whose status says more than 200."""
    return web.Response(status=status, body=orjson.dumps(body), headers=JSON_HEADERS)


def _refusal(error: ApiError) -> web.Response:
    return web.Response(
        status=error.status,
        body=orjson.dumps(error.body()),
        content_type=JSON_TYPE,
        headers={**HEADERS, **error.headers},
    )


def _from_remote(error: RemoteError) -> ApiError:
    return error.passed_on() or ApiError(
        f"The server {error.server} could not be asked: {error.text}. Try again later.", status=502, errcode="M_UNKNOWN"
    )
