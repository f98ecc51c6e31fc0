"""Builds what a browser shows, by hand and in order, for `server.py`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from relay.accounts.account import Account
from relay.accounts.users import Users
from relay.clock import Clock
from relay.db import Database
from relay.doors import Doors
from relay.limits import Limits
from relay.moderation.assembled import Moderation
from relay.moderation.restrictions import Restrictions
from relay.pages.contact import ContactPages
from relay.pages.desk_keys import DeskKeys
from relay.pages.desk_log import DeskLog
from relay.pages.desk_measures import DeskMeasures
from relay.pages.frame import Entry, Frame
from relay.pages.signing_in import SigningIn
from relay.pages.visits import Visits
from relay.part import Part
from relay.people.contact_gate import ContactGate
from relay.people.contact_links import ContactLinks
from relay.web import Route


@dataclass(slots=True, frozen=True)
class Pages:
    frame: Frame
    visits: Visits
    parts: tuple[Part, ...]

    def shown(self, route: Route) -> Route:
        """Whatever is refused there is a page too."""
        return replace(route, refusal=self.frame.refusal)


def assemble(
    db: Database,
    clock: Clock,
    limits: Limits,
    users: Users,
    account: Account,
    doors: Doors,
    gate: ContactGate,
    links: ContactLinks,
    moderation: Moderation,
    restrictions: Restrictions,
    public_base_url: str | None,
) -> Pages:
    visits = Visits(db, clock)
    frame = Frame(visits, clock, users.server_name, public_base_url)
    account.on_password_changed.append(visits.end_all)
    account.on_deactivated.append(lambda tx, user_id, erase: visits.end_all(tx, user_id))
    frame.menu.append(Entry("/_relay/", "Account", ""))
    signing_in = SigningIn(frame, users, doors, limits)
    frame.menu.append(
        Entry("/_relay/contact", "Contact", "Who may invite you, invites that wait, and your contact links.")
    )
    contact = ContactPages(frame, gate, links)
    frame.menu.append(
        Entry("/_relay/desk", "Desk", "Reports, decisions and measures of the moderators.", for_moderators=True)
    )
    keys = moderation.proving.keys
    frame.is_moderator = keys.is_moderator
    desk = (
        DeskLog(frame, moderation.audit_log),
        DeskKeys(frame, clock, keys),
        DeskMeasures(frame, moderation.acting.actions, restrictions, users),
    )
    return Pages(frame, visits, (visits, signing_in, contact, *desk))
