"""The block `federation`: how the relay deals with other servers, and with which."""

from __future__ import annotations

import re

from relay.clock import HOUR, SECOND
from relay.config.values import Duration, FileName, Section
from relay.ids import is_server_name
from relay.protocol.globs import MAX_PATTERN

# Letters, digits and what else a name, an address or a pattern has.
_SERVERS = re.compile(r"[A-Za-z0-9.:*?\[\]-]+\Z")


class Federation(Section, frozen=True):
    enabled: bool = True
    """Talk to other servers."""
    key_file: FileName = "signing.key"
    """The signing key, relative to the data folder. Keep a copy: without it the rooms of this server are lost."""
    extra_ca_file: str | None = None
    """PEM file with certificate authorities that are trusted beside the system's. Example: ca.pem"""
    allow: tuple[str, ...] = ()
    """The only servers to deal with: names, or patterns such as *.example.org; none: all. `relay reload` takes up a change."""
    deny: tuple[str, ...] = ()
    """Servers to have nothing to do with, in the same way; they count before those of allow."""
    key_notaries: tuple[str, ...] = ()
    """Servers that are believed about the keys of servers that can't be reached themselves. They learn whose keys are
    asked for. Example: [matrix.org]"""
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
    """Longest wait between two attempts; a day once a server has been silent for a week."""

    def __post_init__(self) -> None:
        for name in ("request_timeout", "key_timeout", "outbox_backoff_min"):
            if not getattr(self, name):
                raise ValueError(f"{name} can't be 0: write a time such as 10s")
        if self.outbox_backoff_max < self.outbox_backoff_min:
            raise ValueError("outbox_backoff_max is shorter than outbox_backoff_min: raise the one or lower the other")
        for name in ("allow", "deny"):
            for pattern in getattr(self, name):
                if not _SERVERS.match(pattern) or len(pattern) > MAX_PATTERN:
                    raise ValueError(f"{name} takes server names and patterns such as *.example.org, not {pattern!r}")
        for notary in self.key_notaries:
            if not is_server_name(notary):
                raise ValueError(f"key_notaries takes server names such as matrix.org, not {notary!r}")
