"""What moderators have put in force: blocked servers and rooms, quarantined files, people kept out, and when each ends.

One row for each; all of them are in memory, since every door asks. `actions.py` writes them. Also the doors that they
close (`RestrictionDoors`); blocked servers are `server_controls.py`'s to turn away. Locked and suspended accounts are `accounts/moderated.py`'s; here stands only their end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from relay.clock import DAY, Clock
from relay.db import Database, Query, Tx
from relay.doors import Dropped, OpenDoors
from relay.errors import ApiError, Forbidden, InvalidParam, NotFound
from relay.ids import split_server_name
from relay.part import Part
from relay.protocol.event import Event
from relay.protocol.globs import Glob, compile_glob
from relay.rooms.rooms import CLOSED
from relay.tables import Schema, Table

SERVER_BLOCK, SERVER_ALLOW, ROOM_BLOCK = "server_block", "server_allow", "room_block"
# Closed because somebody asked to shut it, until that is decided: apart from a block, which stands or falls by itself.
ROOM_SHUTTING = "room_shutting"
MEDIA, MEDIA_HASH = "media", "media_hash"
SHADOW, KEPT_OUT, SUSPEND, LOCK = "shadow", "kept_out", "suspend", "lock"
# A message; the mark on its row is what the rooms look at (rooms/withholding.py).
HIDDEN = "hidden"
KINDS = (
    SERVER_BLOCK,
    SERVER_ALLOW,
    ROOM_BLOCK,
    ROOM_SHUTTING,
    MEDIA,
    MEDIA_HASH,
    SHADOW,
    KEPT_OUT,
    SUSPEND,
    LOCK,
    HIDDEN,
)

_LIFE = "until it is lifted, or its time is over"

# Which rule a policy list or another list has for a server; None where it has none.
ServerRule = Callable[[str], str | None]


@dataclass(frozen=True, slots=True)
class Restriction:
    """`until_ts` None: until somebody lifts it. `subject` is a user, room or server (or a pattern of servers), an mxc URI,
    the SHA-256 of a file in hex, or for somebody kept out of a room "room user"."""

    kind: str
    subject: str
    until_ts: int | None
    case_id: str | None
    since_day: int


class Servers:
    """Names and patterns of servers. A pattern without a port speaks of the host at every port."""

    def __init__(self, patterns: Iterable[str]) -> None:
        compiled = [compile_glob(pattern) for pattern in patterns]
        self._exact = {glob.literal for glob in compiled if glob.literal is not None}
        self._wild: list[Glob] = [glob for glob in compiled if glob.literal is None]

    def __bool__(self) -> bool:
        return bool(self._exact or self._wild)

    def match(self, server_name: str) -> bool:
        whole = server_name.lower()
        try:
            host = split_server_name(whole)[0]
        except InvalidParam:
            host = whole
        return (
            whole in self._exact
            or host in self._exact
            or any(glob.matches(whole) or glob.matches(host) for glob in self._wild)
        )


class Restrictions(Part):
    schema = Schema(
        "restrictions",
        tables=(
            Table(
                "restrictions",
                "a measure in force",
                {
                    "kind": ("what is restricted: a server, a room, a file, a person, a message", _LIFE),
                    "subject": ("which one", _LIFE),
                    "until_ts": ("when it ends by itself", _LIFE),
                    "case_id": ("the case it belongs to", _LIFE),
                    "since_day": ("the day it began, for the moderators' list", _LIFE),
                },
            ),
        ),
        steps=(
            """
            CREATE TABLE restrictions (kind TEXT NOT NULL, subject TEXT NOT NULL, until_ts BIGINT, case_id TEXT,
                since_day BIGINT NOT NULL, PRIMARY KEY (kind, subject)) CLUSTERED
            """,
        ),
    )

    def __init__(self, db: Database, clock: Clock) -> None:
        self._db = db
        self._clock = clock
        self._of: dict[str, dict[str, Restriction]] = {kind: {} for kind in KINDS}
        self._servers: dict[str, Servers] = {}
        # Further rules about servers, such as those of policy lists.
        self.further: list[ServerRule] = []
        # Told after each change: what others have worked out from it no longer holds.
        self.on_change: list[Callable[[], None]] = []

    async def open(self) -> None:
        """Before anything is asked: every door looks into memory only."""
        for one in await self._db.read(_rows):
            self._of.setdefault(one.kind, {})[one.subject] = one

    # --- asking

    def find(self, kind: str, subject: str) -> Restriction | None:
        found = self._of[kind].get(subject)
        return found if found is not None and self._holds(found) else None

    def _holds(self, one: Restriction) -> bool:
        return one.until_ts is None or one.until_ts > self._clock.now()

    def closes(self, room_id: str) -> bool:
        return self.find(ROOM_BLOCK, room_id) is not None or self.find(ROOM_SHUTTING, room_id) is not None

    def any(self, kind: str) -> bool:
        return bool(self._of[kind])

    async def listed(self, kind: str) -> list[Restriction]:
        return [one for one in self._of[kind].values() if self._holds(one)]

    def over(self) -> list[Restriction]:
        """Those whose time is over and whose row still stands."""
        return [one for kind in KINDS for one in self._of[kind].values() if not self._holds(one)]

    def over_keys(self) -> set[tuple[str, str]]:
        return {(one.kind, one.subject) for one in self.over()}

    def server_rule(self, server_name: str) -> str | None:
        """ "block", "allow", or None where nobody has decided about this server."""
        if self._names(SERVER_BLOCK).match(server_name):
            return "block"
        if self._names(SERVER_ALLOW).match(server_name):
            return "allow"
        return next((found for rule in self.further if (found := rule(server_name)) is not None), None)

    def refuses(self, server_name: str) -> bool:
        return self.server_rule(server_name) == "block"

    def admits(self, server_name: str) -> bool:
        return self.server_rule(server_name) == "allow"

    def _names(self, kind: str) -> Servers:
        found = self._servers.get(kind)
        if found is None:
            # One whose time is over may count until `Actions.run` lifts it, a minute at most.
            found = self._servers[kind] = Servers(self._of[kind])
        return found

    # --- writing

    def put(self, tx: Tx, kind: str, subject: str, *, until_ts: int | None = None, case_id: str | None = None) -> None:
        one = Restriction(kind, subject, until_ts, case_id, self._clock.now() // DAY * DAY)
        tx.run(
            "INSERT INTO restrictions (kind, subject, until_ts, case_id, since_day) VALUES ($1, $2, $3, $4, $5) "
            "ON CONFLICT (kind, subject) DO UPDATE SET until_ts = excluded.until_ts, case_id = excluded.case_id",
            kind,
            subject,
            until_ts,
            case_id,
            one.since_day,
        )

        def take() -> None:
            self._of[kind][subject] = one
            self.changed()

        tx.after(take)

    def lift(self, tx: Tx, kind: str, subject: str) -> None:
        tx.run("DELETE FROM restrictions WHERE kind = $1 AND subject = $2", kind, subject)

        def take() -> None:
            self._of[kind].pop(subject, None)
            self.changed()

        tx.after(take)

    def changed(self) -> None:
        self._servers.clear()
        for told in self.on_change:
            told()


def _rows(query: Query) -> list[Restriction]:
    return [
        Restriction(*row) for row in query.all("SELECT kind, subject, until_ts, case_id, since_day FROM restrictions")
    ]


class RestrictionDoors(OpenDoors):
    """Blocked rooms, quarantined files, people kept out of a room, and those whose messages go nowhere."""

    def __init__(self, restrictions: Restrictions) -> None:
        self._restrictions = restrictions

    async def _require_room(self, room_id: str) -> None:
        if self._restrictions.closes(room_id):
            raise Forbidden(CLOSED)

    async def invite(self, sender: str, target: str, room_id: str) -> None:
        await self._require_room(room_id)

    async def join(self, user_id: str, room_id: str) -> None:
        await self._require_room(room_id)
        if self._restrictions.find(KEPT_OUT, f"{room_id} {user_id}") is not None:
            raise Forbidden("The moderators of this server keep you out of this room. Their notice says why.")

    async def knock(self, user_id: str, room_id: str) -> None:
        await self.join(user_id, room_id)

    async def alias(self, user_id: str, alias: str, room_id: str) -> None:
        await self._require_room(room_id)

    async def publish_room(self, user_id: str, room_id: str) -> None:
        await self._require_room(room_id)

    async def send(self, event: Event) -> None:
        if not self._restrictions.any(SHADOW):
            return
        # Taking back passes: a moderator takes back her messages in her own name (room_acts.py).
        if event.state_key is not None or event.type == "m.room.redaction":
            return
        if self._restrictions.find(SHADOW, event.sender) is not None:
            raise Dropped(event)

    async def download(self, user_id: str | None, server_name: str, media_id: str) -> None:
        if self._restrictions.find(MEDIA, f"mxc://{server_name}/{media_id}") is not None:
            raise NotFound("There is no such file.")


class TakenBack(ApiError):
    """Somebody else has decided meanwhile."""

    status = 409
    errcode = "M_UNKNOWN"


def as_json(one: Restriction) -> dict[str, Any]:
    return {
        "kind": one.kind,
        "subject": one.subject,
        "until": one.until_ts,
        "report_id": one.case_id,
        "since_day": one.since_day,
    }
