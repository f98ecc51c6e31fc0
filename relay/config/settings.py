"""The whole config file as one struct: the blocks in the order in which the example shows them."""

from __future__ import annotations

import re

from relay.config.appservices import Appservices
from relay.config.contact import Contact
from relay.config.federation import Federation
from relay.config.hooks import Hooks
from relay.config.metrics import Metrics
from relay.config.moderation import Moderation
from relay.config.sections import (
    Accounts,
    Calls,
    Database,
    Limits,
    Listener,
    Log,
    Media,
    Presence,
    Privacy,
    Registration,
    Rooms,
    Turn,
)
from relay.config.values import Section
from relay.ids import MAX_SERVER_NAME, is_loopback_name, is_server_name


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
    contact: Contact = Contact()
    """The contact gate: who may invite people here."""
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
    hooks: Hooks = Hooks()
    """Rules and tools of your own: who is asked at the doors, who is told, who may decide. See docs/hooks.md."""
    calls: Calls = Calls()
    """Calls of many people (MatrixRTC)."""
    appservices: Appservices = Appservices()
    """Bridges and bots of yours (application services)."""
    moderation: Moderation = Moderation()
    """Reports, and what becomes of them. See docs/moderation.md."""
    metrics: Metrics = Metrics()
    """Figures for a monitoring program. See docs/operating.md."""
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
    def base_url(self) -> str:
        """Where links lead that the relay itself gives to people."""
        if self.public_base_url is not None:
            return self.public_base_url
        here = next((one for one in self.listeners if "client" in one.serves), None)
        if here is not None and self.on_loopback:
            host = f"[{here.address}]" if ":" in here.address else here.address
            return f"{'https' if here.tls_certificate else 'http'}://{host}:{here.port}"
        return f"https://{self.server_name}"

    @property
    def on_loopback(self) -> bool:
        """Whether the name can only mean this machine: for trying out, with peers on loopback."""
        return is_loopback_name(self.server_name)
