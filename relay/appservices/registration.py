"""Registration files: which service, where it listens, its two secrets, and the namespaces that are its own.

The files come from the services' programs, so keys that nobody here knows are passed over; what is wrong is told with
the file's name and the remedy. Spec: application-service-api/#registration.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from yarl import URL

from relay.config import ConfigError
from relay.ids import is_localpart, server_of

MAX_FILE_BYTES = 256 * 1024
MAX_ID = 255
MAX_NAMESPACES = 1_000
MAX_REGEX = 2_000
# Answers of the regular expressions that are remembered.
MAX_REMEMBERED = 20_000
KINDS = ("users", "aliases", "rooms")


@dataclass(frozen=True, slots=True)
class Namespace:
    exclusive: bool
    # Matched from the beginning, as other servers do; a `$` is the author's business.
    regex: re.Pattern[str]


class Names:
    """The namespaces of one kind, with what they answered lately: files are read once, so nothing drops it."""

    def __init__(self, namespaces: Sequence[Namespace] = ()) -> None:
        self._namespaces = tuple(namespaces)
        self._known: dict[str, tuple[bool, bool]] = {}

    def __bool__(self) -> bool:
        return bool(self._namespaces)

    @property
    def any_exclusive(self) -> bool:
        return any(one.exclusive for one in self._namespaces)

    def hold(self, name: str) -> bool:
        return self._of(name)[0]

    def hold_alone(self, name: str) -> bool:
        """Whether nobody else may make this name."""
        return self._of(name)[1]

    def _of(self, name: str) -> tuple[bool, bool]:
        known = self._known.get(name)
        if known is None:
            matching = [one for one in self._namespaces if one.regex.match(name)]
            known = bool(matching), any(one.exclusive for one in matching)
            if len(self._known) >= MAX_REMEMBERED:
                self._known.clear()
            self._known[name] = known
        return known


@dataclass(frozen=True, slots=True)
class Registration:
    file: str
    id: str
    url: str | None
    as_token: str = field(repr=False)
    hs_token: str = field(repr=False)
    sender_localpart: str
    users: Names
    aliases: Names
    rooms: Names
    rate_limited: bool
    protocols: tuple[str, ...]
    # Whether it is told of receipts, typing and presence.
    receives_ephemeral: bool
    # Whether it keeps encryption keys: to-device messages, changed device lists and key counts come with transactions.
    encrypts: bool

    def sender(self, server_name: str) -> str:
        return f"@{self.sender_localpart}:{server_name}"

    def acts_for(self, user_id: str, server_name: str) -> bool:
        """Only people of this server ever belong to a service, whatever its expressions match."""
        return server_of(user_id) == server_name and (user_id == self.sender(server_name) or self.users.hold(user_id))


def load_all(data_dir: Path, files: Sequence[str]) -> tuple[Registration, ...]:
    """All registrations. Raises ConfigError where one is wrong, or two are not told apart."""
    found: list[Registration] = []
    for name in files:
        one = load(data_dir / name)
        for other in found:
            for key, what in (
                ("id", "the id"),
                ("as_token", "the as_token"),
                ("sender_localpart", "the sender_localpart"),
            ):
                if getattr(one, key) == getattr(other, key):
                    raise ConfigError(f"{one.file}: {what} is that of {other.file} too. Make one of the two anew.")
        found.append(one)
    return tuple(found)


def load(path: Path) -> Registration:
    """One file. Raises ConfigError."""
    try:
        raw = path.read_bytes()
    except OSError as bad:
        raise ConfigError(
            f"The registration file {path} can't be read: {bad.strerror}. "
            "Correct appservices.registration_files, or copy the file there, readable for the relay's user."
        ) from bad
    if len(raw) > MAX_FILE_BYTES:
        raise ConfigError(
            f"The registration file {path} is larger than {MAX_FILE_BYTES // 1024} KiB. Is it the right one?"
        )
    try:
        text = raw.decode()
        given = yaml.safe_load(text)
    except (UnicodeDecodeError, yaml.YAMLError, ValueError, RecursionError) as bad:
        raise ConfigError(
            f"The registration file {path} is not YAML. Have the service's program write it anew."
        ) from bad
    if not isinstance(given, dict):
        raise ConfigError(f"The registration file {path} holds no keys. Have the service's program write it anew.")
    try:
        return _parse(str(path), given)
    except _Wrong as wrong:
        raise ConfigError(f"{path}: {wrong}.") from None


class _Wrong(Exception):
    """What is amiss, and the remedy, without the file's name."""


def _parse(file: str, given: dict[str, Any]) -> Registration:
    tokens = {key: _text(given, key, "a long random text") for key in ("as_token", "hs_token")}
    if tokens["as_token"] == tokens["hs_token"]:
        raise _Wrong("as_token and hs_token are the same: the service would open its own door. Make them differ")
    localpart = _text(given, "sender_localpart", "the user name of the service's bot, such as bridgebot")
    if not is_localpart(localpart):
        raise _Wrong(
            f"sender_localpart {localpart!r} is not a user name: it has letters a-z, digits and . _ = - / + only"
        )
    if "namespaces" not in given:
        raise _Wrong("namespaces is missing: write `namespaces: {}` for a service that has none")
    namespaces = _shaped(given["namespaces"] or {}, dict, "namespaces has the keys users, aliases and rooms")
    names = {kind: _names(kind, namespaces.get(kind) or []) for kind in KINDS}
    protocols = _shaped(given.get("protocols") or [], list, "protocols is a list of names")
    if not all(isinstance(one, str) for one in protocols):
        raise _Wrong("protocols is a list of names, such as [irc]")
    ephemeral = _flag(given, "receive_ephemeral", "push_ephemeral", "de.sorunome.msc2409.push_ephemeral")
    return Registration(
        file=file,
        id=_id(given),
        url=_url(given),
        as_token=tokens["as_token"],
        hs_token=tokens["hs_token"],
        sender_localpart=localpart,
        users=names["users"],
        aliases=names["aliases"],
        rooms=names["rooms"],
        rate_limited=_flag(given, "rate_limited", default=True),
        protocols=tuple(protocols),
        receives_ephemeral=ephemeral,
        encrypts=_flag(given, "org.matrix.msc3202"),
    )


def _id(given: dict[str, Any]) -> str:
    found = _text(given, "id", "a name such as telegram")
    if len(found) > MAX_ID:
        raise _Wrong(f"id has more than {MAX_ID} characters")
    return found


def _text(given: dict[str, Any], key: str, remedy: str) -> str:
    found = given.get(key)
    if not isinstance(found, str) or not found or not found.isascii() or not found.isprintable():
        raise _Wrong(f"{key} is missing, or not a printable text: write {remedy}")
    return found


def _url(given: dict[str, Any]) -> str | None:
    if "url" not in given:
        raise _Wrong(
            "url is missing: where the service listens, such as http://localhost:29318, or null for one that is told nothing"
        )
    found = given["url"]
    if found is None or found == "":
        return None
    try:
        url = URL(found) if isinstance(found, str) else URL()
    except ValueError:
        url = URL()
    if url.scheme not in ("http", "https") or not url.host or url.query_string:
        raise _Wrong(f"url {found!r} is not an address such as http://localhost:29318")
    return str(url).rstrip("/")


def _flag(given: dict[str, Any], *keys: str, default: bool = False) -> bool:
    for key in keys:
        if key in given and given[key] is not None:
            return bool(_shaped(given[key], bool, f"{key} is true or false"))
    return default


def _names(kind: str, given: Any) -> Names:
    listed = _shaped(given, list, f"namespaces.{kind} is a list")
    if len(listed) > MAX_NAMESPACES:
        raise _Wrong(f"namespaces.{kind} has more than {MAX_NAMESPACES} entries")
    found = []
    for one in listed:
        entry = _shaped(one, dict, f"each of namespaces.{kind} has the keys exclusive and regex")
        text = entry.get("regex")
        if not isinstance(text, str) or len(text) > MAX_REGEX:
            raise _Wrong(
                f"each of namespaces.{kind} has a regex of at most {MAX_REGEX} characters, such as '@bridge_.*'"
            )
        try:
            regex = re.compile(text)
        except (re.error, OverflowError, RecursionError) as bad:
            raise _Wrong(f"the regex {text!r} of namespaces.{kind} is none: {bad}") from None
        found.append(Namespace(_flag(entry, "exclusive"), regex))
    return Names(found)


def _shaped(value: Any, kind: type, otherwise: str) -> Any:
    if not isinstance(value, kind):
        raise _Wrong(otherwise)
    return value
