"""Signed requests between servers: the X-Matrix scheme of the Authorization header, both ways.

What is signed is the canonical JSON of method, URI, origin, destination and content. A body that is canonical already,
as ours and most servers' are, is spliced in and not encoded again. Spec: server-server-api/#request-authentication.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import orjson

from relay.doors import Doors
from relay.errors import BadJson, Unauthorized
from relay.ids import is_server_name
from relay.protocol.canonical import encode, from_base64
from relay.protocol.signing import SigningKey, verify_bytes
from relay.web import Request

SCHEME = "x-matrix"
MAX_HEADER = 4096
MAX_SIGNATURES = 4
# Larger messages are hashed in a thread.
INLINE_BYTES = 256 * 1024
# Beginnings of headers that are remembered: what a peer writes before its signature is the same in each of its requests.
MAX_BEGINNINGS = 1024
MAX_BEGINNING = 512
# `,sig="` and 64 bytes in base64 end the header of most servers.
_LAST, _LAST_LENGTH = ',sig="', 86

_PARAMETER = re.compile(
    r"[ \t]*(?:([!#$%&'*+.^_`|~0-9A-Za-z-]+)[ \t]*=[ \t]*(?:\"((?:[^\"\\]|\\.)*)\"|([^\s,\"\\]+)))?[ \t]*(?:,|\Z)"
)
_ESCAPED = re.compile(r"\\(.)")
_BASE64 = re.compile(r"[A-Za-z0-9+/]+")
_OURS = frozenset({"origin", "destination", "key", "sig", "signature"})


class Keys(Protocol):
    async def knows(self, server: str) -> bool: ...
    async def current_key(self, server: str, key_id: str) -> bytes | None:
        """The key with which this server may sign a request now."""
        ...


@dataclass(frozen=True, slots=True)
class Credentials:
    origin: str
    destination: str | None
    key_id: str
    signature: bytes


def signed_message(method: str, uri: str, origin: str, destination: str, content: bytes | None) -> bytes:
    """`content` is canonical JSON, or None where the request has no body."""
    dump = orjson.dumps
    return b"".join(
        (
            b"{" if content is None else b'{"content":' + content + b",",
            b'"destination":',
            dump(destination),
            b',"method":',
            dump(method),
            b',"origin":',
            dump(origin),
            b',"uri":',
            dump(uri),
            b"}",
        )
    )


def authorization(method: str, uri: str, origin: str, destination: str, content: bytes | None, key: SigningKey) -> str:
    """The header's value for a request of ours."""
    signature = key.sign(signed_message(method, uri, origin, destination, content))
    return f'X-Matrix origin="{origin}",destination="{destination}",key="{key.key_id}",sig="{signature}"'


def parse(header: str) -> Credentials:
    """Raises Unauthorized, and nothing else, whatever came."""
    scheme, _, rest = header.partition(" ")
    if scheme.lower() != SCHEME:
        raise Unauthorized("The Authorization header has another scheme than X-Matrix.")
    if len(header) > MAX_HEADER:
        raise Unauthorized(f"The Authorization header is longer than {MAX_HEADER} characters.")
    claimed = _ending_in_signature(rest) or _claimed(rest)
    if claimed.signature is None:
        raise Unauthorized("The Authorization header lacks one of origin, key and sig.")
    try:
        raw = from_base64(claimed.signature)
    except BadJson:
        raise Unauthorized("The signature in the Authorization header is not base64.") from None
    return Credentials(claimed.origin, claimed.destination, claimed.key_id, raw)


class _Claimed(NamedTuple):
    origin: str
    destination: str | None
    key_id: str
    signature: str | None


def _ending_in_signature(text: str) -> _Claimed | None:
    """None where it has another form, which is no error."""
    beginning, _, signature = text.rpartition(_LAST)
    if len(signature) != _LAST_LENGTH + 1 or signature[-1] != '"' or not 0 < len(beginning) <= MAX_BEGINNING:
        return None
    claimed = _beginning(beginning)
    if claimed.signature is not None or not _BASE64.fullmatch(signature, 0, _LAST_LENGTH):
        return None
    return claimed._replace(signature=signature[:-1])


def _claimed(text: str) -> _Claimed:
    found: dict[str, str] = {}
    at = 0
    while at < len(text):
        match = _PARAMETER.match(text, at)
        if match is None or match.end() == at:
            raise Unauthorized("The Authorization header is malformed: it is a list of name=value, parted by commas.")
        at = match.end()
        if match[1] is None:
            continue
        name = match[1].lower()
        if name in _OURS:
            if name in found:
                raise Unauthorized(f"The Authorization header has two values for {name}.")
            found[name] = _ESCAPED.sub(r"\1", match[2]) if match[2] is not None else match[3]
    origin, key_id = found.get("origin"), found.get("key")
    if origin is None or key_id is None:
        raise Unauthorized("The Authorization header lacks one of origin, key and sig.")
    if not is_server_name(origin):
        raise Unauthorized("The origin in the Authorization header is not a server name.")
    if not key_id.startswith("ed25519:"):
        raise Unauthorized("The key in the Authorization header is not an ed25519 key.")
    return _Claimed(origin, found.get("destination"), key_id, found.get("sig", found.get("signature")))


_beginning = lru_cache(MAX_BEGINNINGS)(_claimed)


class XMatrix:
    """Implements `web.AuthenticatesServers`. Those of `heard_from` are told of every server that proved who it is;
    `meets` of the address at which one was named that is not known here, before it is asked for its keys. It may refuse."""

    def __init__(
        self,
        server_name: str,
        keys: Keys,
        doors: Doors,
        *heard_from: Callable[[str], None],
        meets: Callable[[str], None] | None = None,
    ) -> None:
        self._server_name = server_name
        self._keys = keys
        self._doors = doors
        self._heard_from = heard_from
        self._meets = meets

    async def origin(self, request: Request) -> str:
        headers = [
            value
            for value in request.http.headers.getall("Authorization", [])
            if value.partition(" ")[0].lower() == SCHEME
        ]
        if not headers:
            raise Unauthorized("Sign the request: an Authorization header with the scheme X-Matrix is needed here.")
        if len(headers) > MAX_SIGNATURES:
            raise Unauthorized(f"The request bears more than {MAX_SIGNATURES} signatures.")
        credentials = [parse(value) for value in headers]
        origin = credentials[0].origin
        for one in credentials:
            if one.origin != origin:
                raise Unauthorized("The request is signed by several servers.")
            if one.destination is not None and one.destination != self._server_name:
                raise Unauthorized(f"The request is meant for {one.destination}; this is {self._server_name}.")
        if origin == self._server_name:
            raise Unauthorized("The request claims to come from this server itself.")
        for one in credentials:
            if await self._signed(request, one):
                await self._doors.server(origin)
                for tell in self._heard_from:
                    tell(origin)
                return origin
        raise Unauthorized(
            f"No signature of the request could be verified with a key that {origin} publishes and that is valid now."
        )

    async def _signed(self, request: Request, claimed: Credentials) -> bool:
        if self._meets is not None and not await self._keys.knows(claimed.origin):
            self._meets(request.address)
        key = await self._keys.current_key(claimed.origin, claimed.key_id)
        if key is None:
            return False
        # A peer that left out the destination has signed without one.
        if await self._verify(request, claimed, key, request.body or None):
            return True
        if not request.body:
            return False
        try:
            canonical = encode(request.json())
        except BadJson as bad:
            raise Unauthorized("The body has no canonical JSON form, so no signature can cover it.") from bad
        return canonical != request.body and await self._verify(request, claimed, key, canonical)

    async def _verify(self, request: Request, claimed: Credentials, key: bytes, content: bytes | None) -> bool:
        if content is not None:
            request.json()  # what is spliced into the signed text has to be one object. Raises NotJson, BadJson
            content = content.strip()
        http = request.http
        if claimed.destination is None:
            message = _without_destination(http.method, http.raw_path, claimed.origin, content)
        else:
            message = signed_message(http.method, http.raw_path, claimed.origin, claimed.destination, content)
        if len(message) > INLINE_BYTES:
            return await asyncio.to_thread(verify_bytes, message, claimed.signature, key)
        return verify_bytes(message, claimed.signature, key)


def _without_destination(method: str, uri: str, origin: str, content: bytes | None) -> bytes:
    head = b"{" if content is None else b'{"content":' + content + b","
    return (
        head
        + b'"method":'
        + orjson.dumps(method)
        + b',"origin":'
        + orjson.dumps(origin)
        + b',"uri":'
        + orjson.dumps(uri)
        + b"}"
    )
