"""The contact gate: who may invite the people of this relay, as long as they set nothing else themselves."""

from __future__ import annotations

from typing import Literal

from relay.clock import DAY
from relay.config.values import Duration, Section

InvitesFrom = Literal["everybody", "shared_rooms", "link", "nobody"]


class Contact(Section, frozen=True):
    invites_from: InvitesFrom = "everybody"
    """Who may invite a person here, until she chooses herself at /_relay/contact. everybody; shared_rooms: people she
    shares a room with, or who have her contact link; link: only people with her contact link; nobody. Invites of
    others are held back and listed on that page (with nobody they are refused)."""
    held_for: Duration = Duration(14 * DAY)
    """How long an invite is held back before it is turned down by itself."""

    def __post_init__(self) -> None:
        if not self.held_for:
            raise ValueError("held_for can't be 0: write a time such as 14d")
