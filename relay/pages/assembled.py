"""Builds what a browser shows, by hand and in order, for `server.py`."""

from __future__ import annotations

from dataclasses import dataclass

from relay.accounts.account import Account
from relay.accounts.users import Users
from relay.clock import Clock
from relay.db import Database
from relay.doors import Doors
from relay.limits import Limits
from relay.pages.frame import Entry, Frame
from relay.pages.signing_in import SigningIn
from relay.pages.visits import Visits
from relay.part import Part


@dataclass(slots=True, frozen=True)
class Pages:
    frame: Frame
    visits: Visits
    parts: tuple[Part, ...]


def assemble(db: Database, clock: Clock, limits: Limits, users: Users, account: Account, doors: Doors) -> Pages:
    visits = Visits(db, clock)
    frame = Frame(visits, clock, users.server_name)
    account.on_password_changed.append(visits.end_all)
    account.on_deactivated.append(lambda tx, user_id, erase: visits.end_all(tx, user_id))
    frame.menu.append(Entry("/_relay/", "Account", ""))
    signing_in = SigningIn(frame, users, doors, limits)
    return Pages(frame, visits, (visits, signing_in))
