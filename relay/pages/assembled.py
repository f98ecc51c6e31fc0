"""Builds what a browser shows, by hand and in order, for `server.py`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from relay.accounts.account import Account
from relay.accounts.devices import Devices
from relay.accounts.users import Users
from relay.clock import Clock
from relay.db import Database
from relay.doors import Doors
from relay.limits import Limits
from relay.media.remote_copies import RemoteCopies
from relay.moderation.assembled import Moderation
from relay.moderation.disclosure import HeldMedia
from relay.moderation.doorkeeping import Doorkeeping
from relay.pages.contact import ContactPages
from relay.pages.desk_cases import DeskCases
from relay.pages.desk_decisions import DeskDecisions
from relay.pages.desk_figures import DeskFigures
from relay.pages.desk_forwarding import DeskForwarding
from relay.pages.desk_keys import DeskKeys
from relay.pages.desk_lists import DeskLists
from relay.pages.desk_log import DeskLog
from relay.pages.desk_measures import DeskMeasures
from relay.pages.desk_media import DeskMedia
from relay.pages.frame import Entry, Frame
from relay.pages.report_pages import ReportPages
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
    devices: Devices,
    doors: Doors,
    gate: ContactGate,
    links: ContactLinks,
    moderation: Moderation,
    keeping: Doorkeeping,
    held_media: HeldMedia,
    copies: RemoteCopies,
    public_base_url: str | None,
) -> Pages:
    visits = Visits(db, clock)
    frame = Frame(visits, clock, users.server_name, public_base_url)
    frame.is_moderator = moderation.proving.keys.is_moderator
    account.on_password_changed.append(visits.end_all)
    devices.on_all_signed_out.append(visits.end_all)
    account.on_deactivated.append(lambda tx, user_id, erase: visits.end_all(tx, user_id))
    frame.menu += [
        Entry("/_relay/", "Account", ""),
        Entry("/_relay/contact", "Contact", "Who may invite you, invites that wait, and your contact links."),
        Entry("/_relay/appeal", "Decisions", "What moderators decided about you, and how to object."),
        Entry("/_relay/desk", "Desk", "Reports, decisions and measures of the moderators.", for_moderators=True),
    ]
    signing_in = SigningIn(frame, users, doors, limits)
    signing_in.may_appeal = moderation.casework.appeals.may_appeal
    casework = moderation.casework
    reports = ReportPages(
        frame,
        casework.links,
        casework.reports,
        casework.appeals,
        moderation.proving.envelopes,
        casework.keeping,
        casework.peers.answers,
    )
    return Pages(
        frame,
        visits,
        (
            visits,
            signing_in,
            ContactPages(frame, gate, links),
            reports,
            *_desk(frame, db, clock, users, moderation, keeping, held_media, copies),
        ),
    )


def _desk(
    frame: Frame,
    db: Database,
    clock: Clock,
    users: Users,
    moderation: Moderation,
    keeping: Doorkeeping,
    held_media: HeldMedia,
    copies: RemoteCopies,
) -> tuple[Part, ...]:
    proving, acting, casework = moderation.proving, moderation.acting, moderation.casework
    audit_log = moderation.audit_log
    return (
        DeskCases(
            frame, clock, casework.cases, proving.disclosures, proving.envelopes, acting.actions, audit_log, casework.api,
            DeskDecisions(frame, users, casework.decisions, casework.appeals, casework.direct), DeskMedia(db, audit_log, held_media, copies, users.server_name),
            DeskForwarding(casework.peers, casework.reports),
        ),
        DeskMeasures(frame, acting.actions, keeping.restrictions, keeping.flags, users),
        DeskLists(frame, keeping.lists, casework.following, keeping.flags),
        DeskLog(frame, audit_log),
        DeskFigures(frame, clock, casework.transparency),
        DeskKeys(frame, clock, proving.keys, proving.envelopes),
    )  # fmt: skip
