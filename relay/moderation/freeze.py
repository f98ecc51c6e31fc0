"""Freeze on report: what was reported is not deleted while its case lasts, and nothing else about it changes.

Who sees it stays as it was: what was visible stays visible until a decision, what was taken back stays unserved. Otherwise one
report would censor, and would tell the sender. The address of a file lies inside the ciphertext: until there is a proof, what
the sender uploaded shortly before is held for a week; with a proof, exactly the files that the message names.
"""

from __future__ import annotations

from collections.abc import Iterable

from relay.clock import HOUR, Clock
from relay.db import Query, Tx
from relay.moderation.case_rules import MEDIA_BEFORE, MEDIA_HELD
from relay.moderation.proof import NamedMedia
from relay.part import Part
from relay.protocol.event import Event
from relay.tables import Schema, Table

# Of one report: a flood of uploads must not fill the disk by way of reports.
MAX_MEDIA_HELD = 50
_LIFE = "until the case's retention is over"


class Freeze(Part):
    schema = Schema(
        "freeze",
        tables=(
            Table(
                "frozen_events",
                "a reported event, which is not deleted",
                {"event_id": ("which event", _LIFE), "case_id": ("for which case", _LIFE)},
            ),
            Table(
                "frozen_media",
                "a file that may belong to a reported event, which is not deleted",
                {
                    "server": ("whose file", _LIFE),
                    "media_id": ("which", _LIFE),
                    "case_id": ("for which case", _LIFE),
                    "until_ts": ("until when, where there is no proof yet", _LIFE + ", a week without proof"),
                },
            ),
        ),
        steps=(
            """
            CREATE TABLE frozen_events (event_id TEXT NOT NULL, case_id TEXT NOT NULL, PRIMARY KEY (event_id, case_id));
            CREATE INDEX frozen_events_of_case ON frozen_events (case_id);
            CREATE TABLE frozen_media (server TEXT NOT NULL, media_id TEXT NOT NULL, case_id TEXT NOT NULL, until_ts BIGINT,
                PRIMARY KEY (server, media_id, case_id));
            CREATE INDEX frozen_media_of_case ON frozen_media (case_id)
            """,
        ),
    )

    def __init__(self, clock: Clock, server_name: str) -> None:
        self._clock = clock
        self._server_name = server_name

    # --- in the writes of cases

    def hold(self, tx: Tx, case_id: str, event_ids: Iterable[str]) -> None:
        tx.many(
            "INSERT INTO frozen_events (event_id, case_id) VALUES ($1, $2) ON CONFLICT DO NOTHING",
            [(event_id, case_id) for event_id in event_ids],
        )

    def hold_uploads_before(self, tx: Tx, case_id: str, event: Event) -> None:
        """Without a proof nobody knows which files the message names: those its sender uploaded in the hour before."""
        # The time of an upload is kept to the hour only.
        begin, end = event.origin_server_ts - MEDIA_BEFORE - HOUR, event.origin_server_ts

        def find(query: Query) -> None:
            rows = query.all(
                "SELECT media_id FROM media WHERE uploader = $1 AND created_ts BETWEEN $2 AND $3 AND size >= 0 AND readable = 0 "
                "ORDER BY created_ts DESC LIMIT $4",
                event.sender,
                begin,
                end,
                MAX_MEDIA_HELD,
            )
            until = self._clock.now() + MEDIA_HELD
            query.many(
                "INSERT INTO frozen_media (server, media_id, case_id, until_ts) VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING",
                [(self._server_name, media_id, case_id, until) for (media_id,) in rows],
            )

        tx.call(find)

    def hold_named(self, tx: Tx, case_id: str, named: Iterable[NamedMedia]) -> None:
        """A proof says which: these and no others are held from now on."""
        tx.run("DELETE FROM frozen_media WHERE case_id = $1 AND until_ts IS NOT NULL", case_id)
        tx.many(
            "INSERT INTO frozen_media (server, media_id, case_id) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
            [(one.server, one.media_id, case_id) for one in named],
        )

    def release(self, tx: Tx, case_id: str) -> None:
        tx.run("DELETE FROM frozen_events WHERE case_id = $1", case_id)
        tx.run("DELETE FROM frozen_media WHERE case_id = $1", case_id)

    def sweep(self, tx: Tx) -> None:
        tx.run("DELETE FROM frozen_media WHERE until_ts IS NOT NULL AND until_ts <= $1", self._clock.now())

    # --- asked by whatever deletes; in a database thread

    def events(self, query: Query, event_ids: Iterable[str]) -> set[str]:
        """Which of these must stay."""
        return {
            event_id
            for event_id in event_ids
            if query.value("SELECT 1 FROM frozen_events WHERE event_id = $1 LIMIT 1", event_id)
        }

    def media(self, query: Query) -> set[tuple[str, str]]:
        """(server, media ID) of all files that must stay: few."""
        return {(server, media_id) for server, media_id in query.all("SELECT server, media_id FROM frozen_media")}
