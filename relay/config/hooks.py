"""The settings of the operator's own rules and tools: who is asked at the doors, who is told, and who may decide.

Secrets are of Standard Webhooks: `whsec_` and 24 to 64 random bytes in base64 (`relay hooks secret` makes one).
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import Annotated, Literal

from msgspec import Meta

from relay.clock import DAY
from relay.config.values import Duration, Section

Word = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9_\-]{0,31}\Z")]
SECRET_PREFIX = "whsec_"
MIN_SECRET_BYTES, MAX_SECRET_BYTES = 24, 64
POINT_NAMES = (
    "register", "login", "invite", "federated_invite", "join", "knock", "create_room", "alias", "publish", "state_event",
    "message", "media", "transaction",
)  # fmt: skip
CALLBACKS = (
    "user_may_invite", "federated_user_may_invite", "user_may_join_room", "user_may_create_room",
    "user_may_create_room_alias", "user_may_publish_room", "check_username_for_spam", "check_login_for_spam",
    "check_event_for_spam",
)  # fmt: skip
SCOPES = ("reports:read", "reports:decide", "users:act", "federation:write", "audit:read")


def _require_url(url: str) -> None:
    if not re.match(r"https?://[^/\s]+(/\S*)?\Z", url):
        raise ValueError(f"url is a whole address such as https://desk.example.org/relay, not {url!r}")


def _require_known(given: tuple[str, ...], known: tuple[str, ...], field: str) -> None:
    for name in given:
        if name not in known:
            raise ValueError(f"{field} has {name!r}, which is not one of: {', '.join(known)}")


def _require_secrets(secrets: tuple[str, ...]) -> None:
    for secret in secrets:
        try:
            raw = base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
        except (binascii.Error, ValueError):
            raw = b""
        if not secret.startswith(SECRET_PREFIX) or not MIN_SECRET_BYTES <= len(raw) <= MAX_SECRET_BYTES:
            raise ValueError(
                f"a secret is {SECRET_PREFIX} and {MIN_SECRET_BYTES} to {MAX_SECRET_BYTES} bytes in base64; "
                "`relay hooks secret` makes one"
            )


class HttpHook(Section, frozen=True):
    name: Word
    """What the log and `relay hooks status` call it."""
    url: str
    """Where each question is POSTed as JSON. Example: http://127.0.0.1:9000/check"""
    points: tuple[str, ...]
    """At which points it is asked; docs/hooks.md has the table."""
    secrets: tuple[str, ...] = ()
    """Secrets that sign the questions, the present one first; several while one is being replaced."""
    on_failure: Literal["default", "open", "closed"] = "default"
    """What counts when it fails or is too slow: open lets pass, closed refuses; default as the table of points says."""
    budget: Duration | None = None
    """How long it may take; without it as the table of points says. Example: 500ms"""

    def __post_init__(self) -> None:
        _require_url(self.url)
        _require_known(self.points, POINT_NAMES, "points")
        _require_secrets(self.secrets)


class Antispam(Section, frozen=True):
    url: str | None = None
    """Where Draupnir (or another tool with the HTTP antispam protocol of Synapse's module) listens; none: it is not asked.
    Example: http://127.0.0.1:8082/api/1/spam_check"""
    authorization: str = ""
    """The token that it expects."""
    callbacks: tuple[str, ...] = ("user_may_invite", "user_may_join_room", "check_event_for_spam")
    """What it is asked."""
    fail_open: tuple[str, ...] = ("check_event_for_spam",)
    """Those that let pass where it can't be asked; the others refuse."""
    told_only: tuple[str, ...] = ()
    """Those that are told in the background, without waiting for an answer."""

    def __post_init__(self) -> None:
        if self.url is not None:
            _require_url(self.url)
        for field in ("callbacks", "fail_open", "told_only"):
            _require_known(getattr(self, field), CALLBACKS, field)


class WebhookTarget(Section, frozen=True):
    name: Word
    """What the log and `relay hooks status` call it."""
    url: str
    """Where it is told. Example: https://desk.example.org/relay"""
    secrets: Annotated[tuple[str, ...], Meta(min_length=1)]
    """Secrets that sign what is told, the present one first; several while one is being replaced."""
    types: tuple[str, ...] = ("*",)
    """What it is told: types, or their beginning with a star, such as report.*"""
    allow_private_addresses: bool = False
    """Whether it may be on this machine or in a private network."""

    def __post_init__(self) -> None:
        _require_url(self.url)
        _require_secrets(self.secrets)


class Integration(Section, frozen=True):
    name: Word
    """Its name in the audit log: integration:NAME."""
    secrets: Annotated[tuple[str, ...], Meta(min_length=1)]
    """Secrets with which it signs its decisions; a new one counts after a day."""
    scopes: tuple[str, ...] = ("reports:decide",)
    """What it may do: reports:read, reports:decide, users:act, federation:write, audit:read."""

    def __post_init__(self) -> None:
        _require_secrets(self.secrets)
        _require_known(self.scopes, SCOPES, "scopes")


class PolicyList(Section, frozen=True):
    room_id: str
    """The policy room; somebody of this server has to be in it."""
    effect: Literal["apply", "review", "ignore"] = "review"
    """apply: its bans hold at this server's doors; review: they raise a flag for the moderators; ignore: nothing."""

    def __post_init__(self) -> None:
        if not self.room_id.startswith("!"):
            raise ValueError(f"room_id is a room ID, which begins with '!', not {self.room_id!r}")


class Flags(Section, frozen=True):
    mode: Literal["off", "shadow", "on"] = "shadow"
    """off: nothing is counted; shadow: flags are shown and slow nobody down; on: a flag slows down for a day at most."""
    slows_for: Duration = Duration(DAY)
    """How long somebody who is flagged is slowed down, where the mode is on. At most a day."""

    def __post_init__(self) -> None:
        if self.slows_for > DAY:
            raise ValueError("slows_for is a day at most: what lasts longer is for a person to decide")


class Hooks(Section, frozen=True):
    plugins: tuple[str, ...] = ()
    """Names of installed plug-ins (entry points of the group relay.hooks), in the order in which they are asked."""
    http: tuple[HttpHook, ...] = ()
    """Programs that are asked over HTTP: name, url, points, secrets, on_failure, budget. See docs/hooks.md."""
    antispam: Antispam = Antispam()
    """Draupnir, or another tool that speaks the HTTP antispam protocol of Synapse's module."""
    webhooks: tuple[WebhookTarget, ...] = ()
    """Who is told of cases, without names or texts: name, url, secrets, types, allow_private_addresses."""
    integrations: tuple[Integration, ...] = ()
    """Programs that may decide what can be taken back: name, secrets, scopes."""
    policy_lists: tuple[PolicyList, ...] = ()
    """Rooms with ban lists of others: room_id, effect (apply, review, ignore)."""
    flags: Flags = Flags()
    """What looks odd from the outside: many invites to strangers, many refused ones. Kept in memory only."""

    classifiers: tuple[str, ...] = ()
    """Names of installed classifiers of disclosed text (entry points of the group relay.classifiers)."""
    classifier_model: str | None = None
    """The model of `relay classifier train`, relative to the data folder. Example: classifier.json"""

    def __post_init__(self) -> None:
        for field in ("http", "webhooks", "integrations"):
            names = [one.name for one in getattr(self, field)]
            if len(names) != len(set(names)):
                raise ValueError(f"two entries of {field} have the same name")
