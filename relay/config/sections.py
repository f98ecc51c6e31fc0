"""The blocks of the config file, one struct each. A slice with settings of its own may have a file beside this one.

Every field carries its default and its explanation here and nowhere else.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Literal

from msgspec import Meta

from relay.clock import DAY, HOUR, SECOND
from relay.config.values import Duration, FileName, Port, Section, Size

MIN_SECRET = 8


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
    serves: tuple[Literal["client", "federation", "metrics"], ...] = ("client", "federation")
    """What is answered here: client (apps), federation (other servers), metrics (figures; best on a listener of its own)."""
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
    """IDs of rooms that people may join although they are not encrypted, and whose messages may be readable: for tools
    such as Draupnir."""
    redacted_grace: Duration = Duration(48 * HOUR)
    """How long the ciphertext of a redacted message is kept, so that a report can still prove what was taken back.
    0 removes it at once."""
    profiles_open: bool = False
    """Show display names and avatars to everybody, not only to people who share a room; and let those who are in a room
    of the directory be found by anybody here."""

    def __post_init__(self) -> None:
        for room_id in self.clear_rooms:
            if not room_id.startswith("!"):
                raise ValueError(f"clear_rooms takes room IDs, which begin with '!', not {room_id!r}")


class Registration(Section, frozen=True):
    mode: Literal["closed", "token", "open_to_everyone"] = "closed"
    """Who may make an account. closed: only you, with `relay user add`; token: whoever has a token of
    `relay token create`; open_to_everyone: anybody who can reach the relay, robots included."""
    shared_secret: str | None = None
    """A secret with which a program makes accounts, administrators too, whatever the mode: the registration of Synapse,
    /_synapse/admin/v1/register. None: that way is shut. Example: CHANGE-ME"""

    def __post_init__(self) -> None:
        if self.shared_secret is not None and len(self.shared_secret) < MIN_SECRET:
            raise ValueError(
                f"shared_secret is too short: write at least {MIN_SECRET} characters that nobody can guess"
            )


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
    """Tell people who share a room whether the other is online. Status texts are dropped, unless privacy.seal is open."""


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
    registration: Rate = Rate(per_second=0.1, burst=10)
    """Attempts to register, for each address: names looked up and tokens tried included."""
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
    strangers: Rate = Rate(per_second=5, burst=200)
    """Servers never met before that requests from one address name: to verify them, their keys have to be fetched."""

    @property
    def rates(self) -> dict[str, Rate]:
        given = {field: getattr(self, field) for field in self.__struct_fields__}
        return {name: rate for name, rate in given.items() if isinstance(rate, Rate)}


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


def _require_address(address: str, field: str) -> None:
    try:
        ipaddress.ip_address(address)
    except ValueError:
        raise ValueError(f"{field} is an IP address such as 127.0.0.1, 0.0.0.0 or ::, not {address!r}") from None
