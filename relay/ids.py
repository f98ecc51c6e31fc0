"""Identifiers: what they look like, whose they are, and new ones. Spec: appendices/#identifier-grammar."""

from __future__ import annotations

import ipaddress
import re
import secrets
import string

from relay.errors import InvalidParam

MAX_ID_BYTES = 255
MAX_SERVER_NAME = 230
# What `shared` holds, 100 bytes or so each.
MAX_SHARED = 20_000

_LETTERS = string.ascii_letters + string.digits
_LOCALPART = re.compile(r"[a-z0-9._=\-/+]+\Z")
# Historical user IDs: anything printable but ':' and NUL, still met over federation.
_HISTORICAL_LOCALPART = re.compile(r"[^:\x00]*\Z")
_TYPED_LOCALPART = re.compile(r"[\x21-\x39\x3b-\x7e]{1,128}\Z")
_DNS_NAME = re.compile(r"[A-Za-z0-9.\-]{1,255}\Z")
_OPAQUE = re.compile(r"[0-9A-Za-z_\-]+\Z")
_EVENT_ID = re.compile(r"\$[A-Za-z0-9_\-+/]{43}\Z")
_TYPED_OLD_EVENT_ID = re.compile(r"\$[A-Za-z0-9._~=+/\-]{1,64}\Z")
_OLD_EVENT_ID = re.compile(r"\$[^\x00]+\Z")


def random_string(length: int) -> str:
    """Letters and digits from the system's random source; 5.95 bits a character."""
    return "".join(secrets.choice(_LETTERS) for _ in range(length))


def server_of(identifier: str) -> str:
    """The server name of a user ID, alias or room ID with one; '' where there is none (room version 12)."""
    return identifier.partition(":")[2]


def localpart_of(identifier: str) -> str:
    return identifier[1:].partition(":")[0]


_shared: dict[str, str] = {}


def shared(identifier: str) -> str:
    """The same identifier, in one copy for all who named it lately and keep it. (`sys.intern` would never let go of one in
    Python 3.12.0 to 3.12.4.)"""
    if len(_shared) >= MAX_SHARED:
        _shared.clear()
    return _shared.setdefault(identifier, identifier)


def split_server_name(name: str) -> tuple[str, int | None]:
    """(host, port); an IPv6 literal keeps its brackets. Raises InvalidParam."""
    if name.startswith("["):
        host, bracket, rest = name.partition("]")
        host += bracket
        port = rest[1:] if rest.startswith(":") else None
        if not bracket or (rest and port is None):
            raise InvalidParam(f"{name!r} is not a server name.")
        try:
            ipaddress.IPv6Address(host[1:-1])
        except ValueError as bad:
            raise InvalidParam(f"{name!r} is not a server name.") from bad
    else:
        host, colon, after = name.partition(":")
        port = after if colon else None
        if not _DNS_NAME.match(host):
            raise InvalidParam(f"{name!r} is not a server name.")
    if port is None:
        return host, None
    if not (port.isascii() and port.isdigit() and 1 <= len(port) <= 5 and int(port) < 65536):
        raise InvalidParam(f"{name!r} is not a server name: its port is not a number below 65536.")
    return host, int(port)


def is_server_name(name: object) -> bool:
    if not isinstance(name, str) or not 0 < len(name) <= MAX_ID_BYTES:
        return False
    try:
        split_server_name(name)
    except InvalidParam:
        return False
    return True


def is_user_id(text: object) -> bool:
    """A user ID as it may come over federation: the historical grammar."""
    if (
        not isinstance(text, str)
        or not text.startswith("@")
        or len(text.encode("utf-8", "surrogatepass")) > MAX_ID_BYTES
    ):
        return False
    local, colon, server = text[1:].partition(":")
    return bool(colon) and bool(_HISTORICAL_LOCALPART.match(local)) and is_server_name(server)


def is_typed_user_id(text: object) -> bool:
    """As somebody may write it into a form or a report: without blanks and letters of other scripts. The historical grammar lets in
    any text after the '@', and what is written there is stored."""
    return is_user_id(text) and bool(_TYPED_LOCALPART.match(localpart_of(str(text))))


def is_localpart(text: object) -> bool:
    """The localpart of a new account."""
    return isinstance(text, str) and bool(_LOCALPART.match(text))


def is_room_id(text: object) -> bool:
    return (
        isinstance(text, str)
        and text.startswith("!")
        and 1 < len(text)
        and len(text.encode("utf-8", "surrogatepass")) <= MAX_ID_BYTES
    )


def is_event_id(text: object) -> bool:
    return isinstance(text, str) and bool(_EVENT_ID.match(text))


def is_typed_event_id(text: object) -> bool:
    """As servers make them, now or with the first room versions: what somebody writes there is stored, also where no such event is
    known."""
    if is_event_id(text):
        return True
    name, colon, server = text.partition(":") if isinstance(text, str) else ("", "", "")
    return bool(colon) and bool(_TYPED_OLD_EVENT_ID.match(name)) and is_server_name(server)


def is_old_event_id(text: object) -> bool:
    """In any form that a room version ever had."""
    return (
        isinstance(text, str)
        and bool(_OLD_EVENT_ID.match(text))
        and len(text.encode("utf-8", "surrogatepass")) <= MAX_ID_BYTES
    )


def is_alias(text: object) -> bool:
    if (
        not isinstance(text, str)
        or not text.startswith("#")
        or len(text.encode("utf-8", "surrogatepass")) > MAX_ID_BYTES
    ):
        return False
    local, colon, server = text[1:].partition(":")
    return bool(colon) and "\x00" not in local and is_server_name(server)


def is_opaque(text: object) -> bool:
    """Spec: appendices/#opaque-identifiers."""
    return isinstance(text, str) and 0 < len(text) <= MAX_ID_BYTES and bool(_OPAQUE.match(text))


def require_user_id(text: object) -> str:
    if not is_user_id(text):
        raise InvalidParam(f"{text!r} is not a user ID. It looks like @name:server.")
    return str(text)


def require_room_id(text: object) -> str:
    if not is_room_id(text):
        raise InvalidParam(f"{text!r} is not a room ID. It begins with '!'.")
    return str(text)


def is_loopback_name(server_name: str) -> bool:
    """Whether a server name can only mean this machine."""
    host = split_server_name(server_name)[0].strip("[]")
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
