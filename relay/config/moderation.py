"""Reports and what becomes of them."""

from __future__ import annotations

from relay.config.values import Section

MAX_OUTSIDE = 10


class Moderation(Section, frozen=True):
    outside_addresses: tuple[str, ...] = ()
    """Whom to turn to where nobody here can judge: told to people who report the only moderator. Addresses of your choice,
    such as a hotline. Example: ["https://example.org/help"]"""
    forwarding: bool = False
    """Whether moderators may hand a single report to the moderators of the other person's server, if the reporter agrees."""

    def __post_init__(self) -> None:
        if len(self.outside_addresses) > MAX_OUTSIDE:
            raise ValueError(f"outside_addresses has at most {MAX_OUTSIDE} addresses")
