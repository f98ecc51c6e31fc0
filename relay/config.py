"""What an operator may set: one YAML file, read once at the start into frozen, typed settings.

Every field carries its default and its explanation here and nowhere else; `config_example.py` prints them as
`config.example.yaml`. Only `server_name` is required. Nothing outside this module reads the file, and no part looks a
setting up by its name: parts get the struct they need. A mistake in the file becomes a `ConfigError` that names the
line and the field and says what to write there.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec
import yaml
from msgspec import Meta

from relay.clock import DAY, HOUR, MINUTE, SECOND
from relay.ids import MAX_SERVER_NAME, is_loopback_name, is_server_name

CONFIG_NAME = "relay.yaml"
MAX_CONFIG_BYTES = 1024 * 1024

_TIME_UNITS = {"ms": 1, "s": SECOND, "m": MINUTE, "h": HOUR, "d": DAY, "w": 7 * DAY}
_SIZE_UNITS = {"B": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}
_AMOUNT = re.compile(r"(\d{1,12})\s*([A-Za-z]{1,3})\Z")


class ConfigError(Exception):
    """The operator's file can't be used. The text names the place and the remedy; there may be several lines."""


class Duration(int):
    """A length of time: in the file a text like 48h, inside a number of milliseconds."""

    @classmethod
    def parse(cls, given: object) -> Duration:
        if given == 0 and type(given) is int:
            return cls(0)
        found = _AMOUNT.match(given) if isinstance(given, str) else None
        if found is None or found[2] not in _TIME_UNITS:
            raise ValueError("write a length of time: a whole number with its unit, such as 30s, 10m, 48h or 7d (or 0)")
        return cls(int(found[1]) * _TIME_UNITS[found[2]])

    @property
    def seconds(self) -> float:
        return self / SECOND

    def __str__(self) -> str:
        return _with_unit(int(self), _TIME_UNITS, skip=("w",), space="") if self else "0"


class Size(int):
    """An amount of bytes: in the file a text like 50 MiB, inside a number of bytes."""

    @classmethod
    def parse(cls, given: object) -> Size:
        found = _AMOUNT.match(given) if isinstance(given, str) else None
        if found is None or found[2] not in _SIZE_UNITS:
            raise ValueError("write a size: a whole number with its unit, such as 512 KiB, 50 MiB or 2 GiB")
        return cls(int(found[1]) * _SIZE_UNITS[found[2]])

    def __str__(self) -> str:
        return _with_unit(int(self), _SIZE_UNITS, space=" ")


def _with_unit(amount: int, units: Mapping[str, int], *, space: str, skip: tuple[str, ...] = ()) -> str:
    unit = max((name for name in units if name not in skip and amount % units[name] == 0), key=lambda name: units[name])
    return f"{amount // units[unit]}{space}{unit}"


def _require_address(address: str, field: str) -> None:
    try:
        ipaddress.ip_address(address)
    except ValueError:
        raise ValueError(f"{field} is an IP address such as 127.0.0.1, 0.0.0.0 or ::, not {address!r}") from None


Port = Annotated[int, Meta(ge=0, le=65535)]
FileName = Annotated[str, Meta(min_length=1)]


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A block of the file."""


class Listener(Section, frozen=True):
    address: str = "127.0.0.1"
    """IP address to listen on. 127.0.0.1 is reachable from this machine only; 0.0.0.0 and :: from everywhere."""
    port: Port = 8008
    """TCP port."""
    tls_certificate: str | None = None
    """PEM file with the certificate chain, relative to the data folder. Leave it out behind a reverse proxy.
    Example: fullchain.pem"""
    tls_key: str | None = None
    """PEM file with its private key. A renewed pair of files is taken up without a restart. Example: privkey.pem"""
    serves: tuple[Literal["client", "federation"], ...] = ("client", "federation")
    """What is answered here: client (apps), federation (other servers)."""
    trusted_proxies: tuple[str, ...] = ("127.0.0.1", "::1")
    """Addresses or networks of reverse proxies whose X-Forwarded-For is believed. Used in memory for rate limits,
    never written."""

    def __post_init__(self) -> None:
        _require_address(self.address, "address")
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key belong together: give both, or neither behind a proxy")
        if not self.serves:
            raise ValueError("a listener serves something: write [client, federation], [client] or [federation]")
        for network in self.trusted_proxies:
            try:
                ipaddress.ip_network(network, strict=False)
            except ValueError:
                raise ValueError(
                    f"trusted_proxies takes addresses or networks such as 172.16.0.0/12, not {network!r}"
                ) from None


class Database(Section, frozen=True):
    path: FileName = "relay.db"
    """The SQLite file, relative to the data folder."""
    reader_threads: Annotated[int, Meta(ge=1, le=16)] = 2
    """Threads that read while the one writer writes."""


class Privacy(Section, frozen=True):
    seal: Literal["strict", "standard", "open"] = "standard"
    """What may be readable on this server. strict: ciphertext and routing only; standard: also room names, topics
    and avatars; open: everything."""
    allow: tuple[str, ...] = ()
    """Further event types that local clients may send readable, such as m.reaction (one emoji and its target,
    nothing else)."""
    clear_rooms: tuple[str, ...] = ()
    """IDs of rooms that people may join although they are not encrypted."""
    redacted_grace: Duration = Duration(48 * HOUR)
    """How long the ciphertext of a redacted message is kept, so that a report can still prove what was taken back.
    0 removes it at once."""
    profiles_open: bool = False
    """Show display names and avatars to everybody, not only to people who share a room."""

    def __post_init__(self) -> None:
        for room_id in self.clear_rooms:
            if not room_id.startswith("!"):
                raise ValueError(f"clear_rooms takes room IDs, which begin with '!', not {room_id!r}")


class Registration(Section, frozen=True):
    mode: Literal["closed", "token", "open_to_everyone"] = "closed"
    """Who may make an account. closed: only you, with `relay user add`; token: whoever has a token of
    `relay token create`; open_to_everyone: anybody who can reach the relay, robots included."""


class Accounts(Section, frozen=True):
    access_token_lifetime: Duration = Duration(HOUR)
    """How long an access token lives for clients that can refresh it. Others keep theirs until they log out."""
    password_hash_parallel: Annotated[int, Meta(ge=1, le=64)] = 2
    """Password checks at once; each needs 19 MiB of memory."""


class Rooms(Section, frozen=True):
    default_version: Literal["3", "4", "5", "6", "7", "8", "9", "10", "11", "12"] = "12"
    """Room version of new rooms, where the client asks for none."""


class Presence(Section, frozen=True):
    enabled: bool = False
    """Tell people who share a room whether the other is online. Status texts are dropped in any case."""


class Media(Section, frozen=True):
    max_upload_bytes: Size = Size(50 * 1024**2)
    """Largest upload."""
    remote_retention: Duration = Duration(7 * DAY)
    """How long a copy of another server's file is kept after it was last asked for. 0 keeps none."""
    remote_cache_bytes: Size = Size(1024**3)
    """Most room for copies of other servers' files; the longest unused go first."""


class Rate(Section, frozen=True):
    per_second: Annotated[float, Meta(gt=0)]
    """How many in the long run."""
    burst: Annotated[int, Meta(ge=1)]
    """How many at once."""


class Limits(Section, frozen=True):
    enabled: bool = True
    """Switch all rate limits off for a test on loopback, never on the internet."""
    messages: Rate = Rate(per_second=10, burst=60)
    """Events a person sends."""
    login: Rate = Rate(per_second=0.2, burst=10)
    """Attempts to log in, for each address and each account."""
    registration: Rate = Rate(per_second=0.1, burst=5)
    """Attempts to register, for each address."""
    joins: Rate = Rate(per_second=0.5, burst=20)
    """Rooms a person joins or knocks on."""
    invites: Rate = Rate(per_second=0.3, burst=20)
    """Invitations a person sends."""
    keys: Rate = Rate(per_second=20, burst=200)
    """Requests for encryption keys and to-device messages, for each device."""
    media: Rate = Rate(per_second=10, burst=100)
    """Uploads and downloads of a person."""
    federation: Rate = Rate(per_second=50, burst=500)
    """Requests of another server."""


class Federation(Section, frozen=True):
    enabled: bool = True
    """Talk to other servers."""
    key_file: FileName = "signing.key"
    """The signing key, relative to the data folder. Keep a copy: without it the rooms of this server are lost."""
    extra_ca_file: str | None = None
    """PEM file with certificate authorities that are trusted beside the system's. Example: ca.pem"""
    allow_private_addresses: bool = False
    """Connect to servers on private and loopback addresses. With a server name of localhost, loopback is allowed
    anyway."""
    request_timeout: Duration = Duration(30 * SECOND)
    """How long another server may take to answer."""
    key_timeout: Duration = Duration(10 * SECOND)
    """How long a request waits for the keys that verify it."""
    outbox_backoff_min: Duration = Duration(5 * SECOND)
    """First wait after a server could not be reached; it doubles with each attempt."""
    outbox_backoff_max: Duration = Duration(HOUR)
    """Longest wait between two attempts."""

    def __post_init__(self) -> None:
        for name in ("request_timeout", "key_timeout", "outbox_backoff_min"):
            if not getattr(self, name):
                raise ValueError(f"{name} can't be 0: write a time such as 10s")
        if self.outbox_backoff_max < self.outbox_backoff_min:
            raise ValueError("outbox_backoff_max is shorter than outbox_backoff_min: raise the one or lower the other")


class Turn(Section, frozen=True):
    uris: tuple[str, ...] = ()
    """The TURN server's addresses, such as "turn:turn.example.org?transport=udp"; none: calls go without."""
    shared_secret: str | None = None
    """The secret of coturn's static-auth-secret, from which each caller gets a password of her own. Example: CHANGE-ME"""
    ttl: Duration = Duration(HOUR)
    """How long such a password is good."""

    def __post_init__(self) -> None:
        for uri in self.uris:
            if not re.match(r"turns?:[^\s/]+\Z", uri):
                raise ValueError(f"uris takes addresses such as turn:turn.example.org?transport=udp, not {uri!r}")
        if self.uris and not self.shared_secret:
            raise ValueError("shared_secret is missing: write the one of the TURN server's static-auth-secret")
        if self.ttl < SECOND:
            raise ValueError("ttl is too short: write a time such as 1h")


class Calls(Section, frozen=True):
    livekit_service_urls: tuple[str, ...] = ()
    """Where clients get a ticket for your LiveKit server, such as https://calls.example.org/livekit/jwt, best one first;
    none: calls of many people go without."""

    def __post_init__(self) -> None:
        for url in self.livekit_service_urls:
            if not re.match(r"https?://[^/\s]+(/\S*)?\Z", url):
                raise ValueError(
                    f"livekit_service_urls takes whole addresses such as https://calls.example.org/livekit/jwt, not {url!r}"
                )


class Log(Section, frozen=True):
    level: Literal["debug", "info", "warning", "error"] = "info"
    """How much is written. No level writes messages, IP addresses or user agents."""
    format: Literal["text", "json"] = "text"
    """text for people, json for machines."""


class Settings(Section, frozen=True):
    server_name: str
    """The part after the colon in user IDs (@name:example.org). It can never be changed later."""
    public_base_url: str | None = None
    """Where clients reach the relay, for /.well-known/matrix/client. Example: https://matrix.example.org"""
    listeners: tuple[Listener, ...] = (Listener(),)
    """Where the relay listens; any number."""
    database: Database = Database()
    """Where everything but media is kept."""
    privacy: Privacy = Privacy()
    """The seal: what may be readable here. See docs/privacy.md."""
    registration: Registration = Registration()
    """New accounts."""
    accounts: Accounts = Accounts()
    """Sessions and passwords."""
    rooms: Rooms = Rooms()
    """New rooms."""
    presence: Presence = Presence()
    """Who is online."""
    media: Media = Media()
    """Files."""
    limits: Limits = Limits()
    """Rate limits: per_second in the long run, burst at once."""
    federation: Federation = Federation()
    """Other servers."""
    turn: Turn = Turn()
    """Calls between two people behind firewalls: a TURN server of yours."""
    calls: Calls = Calls()
    """Calls of many people (MatrixRTC)."""
    log: Log = Log()
    """What the relay tells about itself, on standard error."""

    def __post_init__(self) -> None:
        name = self.server_name
        if not is_server_name(name) or len(name) > MAX_SERVER_NAME:
            raise ValueError(f"{name!r} is not a server name: write a host name such as example.org, with :port if any")
        if name != name.lower():
            raise ValueError(f"write the server name in small letters: {name.lower()}")
        if not self.listeners:
            raise ValueError("listeners is empty, so nobody could reach the relay: leave it out for 127.0.0.1:8008")
        if self.public_base_url is not None and not re.match(r"https?://[^/\s]+(/\S*)?\Z", self.public_base_url):
            raise ValueError("public_base_url is a whole address, such as https://matrix.example.org")

    @property
    def on_loopback(self) -> bool:
        """Whether the name can only mean this machine: for trying out, with peers on loopback."""
        return is_loopback_name(self.server_name)


# --- reading -------------------------------------------------------------------------------------------------------


def load(path: Path) -> Settings:
    """The settings of a file. Raises ConfigError."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(
            f"There is no config at {path}. Make one with: relay init --server-name NAME --data {path.parent}"
        ) from None
    except OSError as bad:
        raise ConfigError(f"The config {path} can't be read: {bad.strerror}. Check who owns it.") from bad
    if len(raw) > MAX_CONFIG_BYTES:
        raise ConfigError(f"The config {path} is larger than 1 MiB. Is it the right file?")
    try:
        text = raw.decode()
    except UnicodeDecodeError as bad:
        raise ConfigError(f"The config {path} is not UTF-8 text (byte {bad.start}). Save it as UTF-8.") from bad
    return parse(text, str(path))


def parse(text: str, name: str = CONFIG_NAME) -> Settings:
    """The settings of a text; `name` stands in the errors. Raises ConfigError."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None:
            _refuse_doubles(root, name)
        given = yaml.safe_load(text)
    except yaml.YAMLError as bad:
        mark = getattr(bad, "problem_mark", None) or getattr(bad, "context_mark", None)
        place = f"{name}, line {mark.line + 1}" if mark else name
        problem = getattr(bad, "problem", None) or "unreadable"
        raise ConfigError(
            f"{place}: this is not YAML ({problem}). Look at the indentation and the quotes there."
        ) from None
    except RecursionError:
        raise ConfigError(f"{name}: nested too deeply. Compare it with `relay config example`.") from None
    if not isinstance(given, dict):
        raise ConfigError(
            f"{name}: the config is a list of settings such as `server_name: example.org`. See `relay config example`."
        )
    try:
        return msgspec.convert(given, Settings, dec_hook=_amounts)
    except msgspec.ValidationError as bad:
        raise ConfigError(_explain(str(bad), root, name)) from None


def _amounts(kind: type, given: Any) -> Any:
    if kind is Duration or kind is Size:
        return kind.parse(given)
    raise NotImplementedError(kind)


def _refuse_doubles(node: yaml.Node, name: str, depth: int = 0) -> None:
    # YAML loaders let the last of two equal keys win without a word; an operator who sees the first is misled.
    if depth > 50:
        raise ConfigError(f"{name}: nested too deeply. Compare it with `relay config example`.")
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise ConfigError(
                    f"{name}, line {line}: {key.value} stands here for the second time (first in line {seen[key.value]}). Keep one."
                )
            seen[str(key.value)] = line
            _refuse_doubles(value, name, depth + 1)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_doubles(item, name, depth + 1)


_PLACE = re.compile(r"(?P<text>.*?)(?: - at `(?P<path>\$[^`]*)`)?\Z", re.DOTALL)
_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+|\.\.\.)\]")


def _explain(error: str, root: yaml.Node | None, name: str) -> str:
    found = _PLACE.match(error)
    assert found is not None
    text, path = found["text"], found["path"] or "$"
    unknown = re.match(r"Object contains unknown field `(.*)`", text)
    missing = re.match(r"Object missing required field `(.*)`", text)
    steps = [key or int(index) if index != "..." else 0 for key, index in _STEP.findall(path)]
    if unknown:
        steps.append(unknown[1])
    line = _line(root, steps)
    field = ".".join(str(step) if isinstance(step, str) else str(step + 1) for step in steps)
    place = f"{name}, line {line}" if line else name
    if unknown:
        known = [field.name for field in msgspec.structs.fields(_kind_at(steps[:-1]))]
        close = difflib.get_close_matches(unknown[1], known, n=1)
        advice = f"Did you mean {close[0]}?" if close else f"Known here are: {', '.join(known)}."
        return f"{place}: there is no setting {field}. {advice}"
    if missing:
        where = f"{field}.{missing[1]}" if field else missing[1]
        return f"{place}: {where} is missing. Add it; `relay config example` shows how."
    text = text.replace("`", "")
    if enum := re.match(r"Invalid enum value (.*)", text):
        text = f"{enum[1]} is not one of its values, which are: {', '.join(choices_of(_kind_at(steps)))}"
    elif wrong := re.match(r"Expected (.*), got (.*)", text):
        text = f"this is a value of type {wrong[2]}, and one of type {wrong[1]} is needed; `relay config example` shows how it is written"
    elif bounds := re.match(r"Expected (?:int|float|str|object)(.*)", text):
        text = f"the value has to be{bounds[1]}"
    return f"{place}: {field + ': ' if field else ''}{text}."


def _line(node: yaml.Node | None, steps: list[str | int]) -> int:
    line = 0
    for step in steps:
        if isinstance(node, yaml.MappingNode):
            pair = next(((key, value) for key, value in node.value if key.value == step), None)
            if pair is None:
                break
            line, node = pair[0].start_mark.line + 1, pair[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            node = node.value[step]
            line = node.start_mark.line + 1
        else:
            break
    return line


def _kind_at(steps: list[str | int]) -> Any:
    kind: Any = Settings
    for step in steps:
        kind = get_type_hints(kind)[step] if isinstance(step, str) else get_args(kind)[0]
    return kind


def choices_of(kind: Any) -> tuple[str, ...]:
    """The values of a setting that has only a few."""
    if get_origin(kind) is tuple:
        kind = get_args(kind)[0]
    return get_args(kind) if get_origin(kind) is Literal else ()
