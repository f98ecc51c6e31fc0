"""Verifiable disclosure of encrypted messages, `relay.disclosure.v1`: the twelve checks, in order, over what lies here.

Nothing is fetched: asking for a key or a file would tell the sender's server what was reported. Text is opened in memory and
leaves it only sealed to the moderators' keys. V1 who may report, V2 what (evidence.py), V3 to V5 whose event it is
(evidence.py), V6 to V10 what it says (megolm.py), V11 whether it was sent before (repeats.py), V12 which files it names.
How and why: docs/reports.md.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from relay.db import Database, Query, Tx
from relay.errors import BadJson
from relay.ids import is_opaque, is_server_name, is_typed_event_id
from relay.media.files import Reader
from relay.moderation import evidence, megolm, repeats
from relay.moderation.disclosure_form import Disclosure, Item
from relay.moderation.envelopes import Envelopes, Sealed
from relay.moderation.evidence import Held
from relay.moderation.megolm import Opened, Unproven
from relay.moderation.proof import Copied, NamedMedia, Proof, ProvedItem
from relay.part import Part
from relay.protocol.canonical import from_base64
from relay.protocol.event import Event
from relay.rooms import store
from relay.rooms.rooms import Rooms
from relay.rooms.store import COLUMNS, GONE, RIM_KEPT, Stored
from relay.rooms.viewing import Viewing
from relay.tables import Schema, Table

# Each with its ciphertext, on one page.
MAX_TAKEN_BACK = 50

_KEPT = "until the case's retention is over"

VerifiedHere = Callable[[Sequence[Event]], Awaitable[list[bool | None]]]
HeldMedia = Callable[[str, str], Awaitable[Reader | None]]


@dataclass(frozen=True, slots=True)
class Prepared:
    """Waits for its write: `sealed` is None where nothing was opened, or there are no keys to seal to."""

    proof: Proof
    sealed: Sealed | None


class Disclosures(Part):
    schema = Schema(
        "disclosures",
        tables=(
            Table(
                "disclosures",
                "what the checks of a proof found, without the text",
                {
                    "case_id": ("which case", _KEPT),
                    "event_id": ("which message", _KEPT),
                    "place": ("the message the report is about comes first", _KEPT),
                    "result": ("verified, verified_remote, invalid, needs_human or undisclosed", _KEPT),
                    "step": ("the check that did not pass", _KEPT),
                    "reason": ("a fixed sentence", _KEPT),
                    "flags": ("fixed words", _KEPT),
                    "attested_by": ("the server that signed the event", _KEPT),
                    "copied_event_id": ("the earlier event with the same ciphertext", _KEPT),
                    "copied_sender": ("who sent that", _KEPT),
                    "media": ("per named file: file or thumbnail, and whether it matches; no address", _KEPT),
                },
            ),
            Table(
                "disclosed_openings",
                "which key opened a ciphertext, as a hash: two would be the sender's doing",
                {
                    "message": ("hash of the ciphertext", _KEPT),
                    "opening": ("hash of the key", _KEPT),
                    "case_id": ("in which case", _KEPT),
                },
            ),
        ),
        steps=(
            """
            CREATE TABLE disclosures (case_id TEXT NOT NULL, event_id TEXT NOT NULL, place SMALLINT NOT NULL, result TEXT NOT NULL,
                step TEXT, reason TEXT, flags TEXT NOT NULL, attested_by TEXT, copied_event_id TEXT, copied_sender TEXT,
                media TEXT NOT NULL, PRIMARY KEY (case_id, event_id));
            CREATE TABLE disclosed_openings (message BYTES NOT NULL, case_id TEXT NOT NULL, opening BYTES NOT NULL,
                PRIMARY KEY (message, case_id, opening))
            """,
        ),
    )

    def __init__(
        self,
        db: Database,
        rooms: Rooms,
        viewing: Viewing,
        envelopes: Envelopes,
        verified_here: VerifiedHere,
        held_media: HeldMedia,
        server_name: str,
    ) -> None:
        self._db = db
        self._rooms = rooms
        self._viewing = viewing
        self._envelopes = envelopes
        self._verified_here = verified_here
        self._held_media = held_media
        self._server_name = server_name
        # Told of what was opened while it lies in memory: classifiers, which sort the queue.
        self.on_opened: list[Callable[[Proof], None]] = []

    # --- V1, asked once when the report arrives, and kept by the case

    async def may_report(self, reporter: str, event_id: str) -> bool:
        """Whether this person was allowed to see the event, also if she has left or was put out since."""
        stored = await self._rooms.event(event_id)
        return stored is not None and await self._may_see(reporter, stored)

    async def _may_see(self, reporter: str, stored: Stored) -> bool:
        room = await self._rooms.get(stored.event.room_id)
        if room is None or not room.known or not stored.shown or stored.pos is None:
            return False
        return bool(await self._viewing.visible(room, [stored], reporter))

    # --- the twelve checks

    async def verify(
        self,
        reporter: str,
        disclosure: Disclosure,
        seen: Collection[str] = (),
        *,
        about_event: str | None = None,
        about_user: str | None = None,
    ) -> Proof:
        """`seen`: the events for which V1 was answered when the report arrived; `about_…`: what the report names. Writes nothing."""
        items = tuple([await self._item(reporter, item, seen) for item in disclosure.items])
        return Proof(items, about_event, about_user)

    async def _item(self, reporter: str, item: Item, seen: Collection[str]) -> ProvedItem:
        stored = await self._rooms.event(item.event_id)
        if stored is None or not (item.event_id in seen or await self._may_see(reporter, stored)):
            return ProvedItem(item.event_id, "invalid", "V1", "The reporter was not allowed to see such an event here.")
        known = ProvedItem(
            item.event_id, "invalid", room_id=stored.event.room_id, sender=stored.event.sender,
            origin_server_ts=stored.event.origin_server_ts, index=item.index, room_version=stored.event.version.name,
        )  # fmt: skip
        try:
            event = await self._origin(stored, item)
        except Unproven as not_so:
            return _failed(known, not_so)
        remote = event.server != self._server_name
        known = replace(known, pdu=event.pdu, attested_by=event.server if remote else None)
        try:
            opened = megolm.open_message(event.content, item.prk, item.index, event.room_id)
        except Unproven as not_so:
            return _failed(known, not_so, item.prk)
        flags = ["relation_unauthenticated"] if "m.relates_to" in event.content else []
        if not remote and not stored.local:
            # Our signature alone: the event came back from others, as after a lost database.
            not_here = Unproven("V5", "This server's signature is on it, but it was not sent from an account here.",
                                result="needs_human", flag="not_sent_here", plaintext=opened.plaintext)  # fmt: skip
            return _failed(known, not_here, item.prk)
        try:
            message, copied, more = await self._repeats(stored, event, item)
        except Unproven as not_so:
            return _failed(known, replace_plaintext(not_so, opened.plaintext), item.prk)
        media = await self._named_media(opened)
        proved = replace(
            known, result="verified_remote" if remote else "verified", flags=(*flags, *more), copied_from=copied,
            plaintext=opened.plaintext, prk=item.prk, media=media, message=message,
        )  # fmt: skip
        if any(one.state == "differs" for one in media):
            reason = "The message is proved; a file that it names is not the one lying under that address."
            return replace(
                proved, result="needs_human", step="V12", reason=reason, flags=(*proved.flags, "media_differs")
            )
        return proved

    async def _origin(self, stored: Stored, item: Item) -> Event:
        """V2 to V5."""
        held = held_form(stored)
        evidence.require_encrypted(held)
        rebuilt = evidence.rebuilt(held, item.content)
        # The signature covers the redacted form: it can be judged whether or not the content is the right one.
        [signature] = await self._verified_here([held.event])
        return evidence.judge_origin(held, item.event_id, rebuilt, signature)

    async def _repeats(self, stored: Stored, event: Event, item: Item) -> tuple[bytes, Copied | None, list[str]]:
        """V11."""
        message = megolm.parse(event.content, item.index)
        name, opening = repeats.message_name(message), repeats.opening_of(item.prk)
        searched = await repeats.earlier(self._db, stored, event, message)
        repeats.require_one_message(searched.repeat)
        for (known,) in await self._db.read(
            lambda query: query.all("SELECT opening FROM disclosed_openings WHERE message = $1", name)
        ):
            repeats.require_one_opening(bytes(known), opening)
        flags = [] if searched.complete else ["older_events_not_searched"]
        if searched.repeat is None:
            return name, None, flags
        return name, Copied(searched.repeat.event_id, searched.repeat.sender), [*flags, "copied"]

    async def _named_media(self, opened: Opened) -> tuple[NamedMedia, ...]:
        """V12: the bytes that lie here, or nothing; nobody is asked for them."""
        content = opened.inner["content"]
        info = content.get("info")
        named = [("file", content.get("file"))]
        if isinstance(info, dict):
            named.append(("thumbnail", info.get("thumbnail_file")))
        found = []
        for role, value in named:
            one = _media(role, value)
            if one is not None:
                found.append(replace(one, state=await self._compared(one)))
        return tuple(found)

    async def _compared(self, one: NamedMedia) -> Any:
        reader = await self._held_media(one.server, one.media_id)
        if reader is None:
            return "not held"
        digest = hashlib.sha256()
        with reader:
            async for block in reader.blocks():
                await asyncio.to_thread(digest.update, block)
        return "matches" if digest.digest() == from_base64(one.sha256) else "differs"

    # --- what is kept

    async def prepare(self, case_id: str, proof: Proof, except_users: Collection[str] = ()) -> Prepared:
        """Seals what was opened. `except_users` are those whom the case is about."""
        sealed = None
        if proof.opened:
            for told in self.on_opened:
                told(proof)
            sealed = await self._envelopes.prepare(case_id, "evidence", proof.evidence(), except_users)
        return Prepared(proof, sealed)

    def store(self, tx: Tx, case_id: str, prepared: Prepared, *, actor: str = "relay") -> None:
        """In the write that changes the case: results, the openings as hashes, and the envelope."""
        for place, one in enumerate(prepared.proof.items):
            if not is_typed_event_id(one.event_id):
                continue  # no event has such a name: it could be any text
            copied = one.copied_from
            tx.run(
                "INSERT INTO disclosures (case_id, event_id, place, result, step, reason, flags, attested_by, copied_event_id, "
                "copied_sender, media) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11) "
                "ON CONFLICT (case_id, event_id) DO UPDATE SET place = excluded.place, result = excluded.result, step = excluded.step, "
                "reason = excluded.reason, flags = excluded.flags, attested_by = excluded.attested_by, "
                "copied_event_id = excluded.copied_event_id, copied_sender = excluded.copied_sender, media = excluded.media "
                # A second, worse proof takes nothing away.
                "WHERE disclosures.result NOT IN ('verified', 'verified_remote')",
                case_id, one.event_id, place, one.result, one.step, one.reason, " ".join(one.flags), one.attested_by,
                copied.event_id if copied else None, copied.sender if copied else None,
                " ".join(f"{media.role}:{media.state.replace(' ', '_')}" for media in one.media),
            )  # fmt: skip
            if one.message is not None and one.prk is not None:
                tx.run(
                    "INSERT INTO disclosed_openings (message, case_id, opening) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
                    one.message, case_id, repeats.opening_of(one.prk),
                )  # fmt: skip
        if prepared.sealed is not None:
            self._envelopes.store(tx, prepared.sealed, actor=actor)

    async def of_case(self, case_id: str) -> list[dict[str, Any]]:
        """What the checks found, for those who see the case without opening it."""
        rows = await self._db.read(
            lambda query: query.all(
                "SELECT event_id, result, step, reason, flags, attested_by, copied_event_id, copied_sender, media "
                "FROM disclosures WHERE case_id = $1 ORDER BY place, event_id",
                case_id,
            )
        )
        return [
            {
                "event_id": event_id, "result": result, "step": step, "reason": reason, "flags": flags.split(),
                "attested_by": attested_by,
                "copied_from": None if copied_id is None else {"event_id": copied_id, "sender": copied_sender},
                "media": [dict(zip(("role", "state"), one.replace("_", " ").split(":"), strict=True)) for one in media.split()],
            }
            for event_id, result, step, reason, flags, attested_by, copied_id, copied_sender, media in rows
        ]  # fmt: skip

    def forget(self, tx: Tx, case_id: str, kinds: Iterable[str] | None = None) -> None:
        """At the end of the case's retention. The envelopes are forgotten too, or those of some kinds."""
        tx.run("DELETE FROM disclosures WHERE case_id = $1", case_id)
        tx.run("DELETE FROM disclosed_openings WHERE case_id = $1", case_id)
        self._envelopes.forget(tx, case_id, kinds)

    # --- for the page behind the link

    async def card(self, reporter: str, event_id: str, seen: Collection[str] = ()) -> dict[str, Any] | None:
        """What the proof tool wants of an event: ciphertext, for whoever was allowed to see it. None for everybody else."""
        stored = await self._rooms.event(event_id)
        if stored is None or not (event_id in seen or await self._may_see(reporter, stored)):
            return None
        return _card(stored)

    async def taken_back(self, reporter: str, room_id: str) -> list[dict[str, Any]]:
        """Cards of a room's encrypted messages that were taken back and can still be proved, newest first, as far as this person
        was allowed to see them: her client may offer no way to report them, and shows no source of them."""
        room = await self._rooms.get(room_id)
        if room is None or not room.known:
            return []

        def find(query: Query) -> list[Stored]:
            rows = query.all(
                f"SELECT {COLUMNS} FROM events e WHERE e.room_nid = $1 AND e.pos IS NOT NULL AND (e.redacted_by IS NOT NULL "
                f"OR (e.marks & {store.WITHHELD}) != 0) AND e.type = $2 AND (e.marks & {GONE | store.HIDDEN}) = 0 ORDER BY e.pos DESC LIMIT $3",
                room.nid,
                evidence.ENCRYPTED,
                MAX_TAKEN_BACK,
            )
            return [store.stored(row, room.version) for row in rows]

        seen = await self._viewing.visible(room, await self._db.read(find), reporter)
        return [_card(one) for one in seen]


def _card(stored: Stored) -> dict[str, Any]:
    event = stored.event
    return {
        "event_id": event.id,
        "room_id": event.room_id,
        "sender": event.sender,
        "origin_server_ts": event.origin_server_ts,
        "type": event.type,
        "content": event.content,
        "taken_back": stored.taken_back,
        "ciphertext_gone": held_form(stored).content_gone,
    }


def held_form(stored: Stored) -> Held:
    gone = bool(stored.marks & GONE)
    # Without the mark: a peer gave it to us redacted already.
    came_empty = not gone and stored.event.type == evidence.ENCRYPTED and not stored.event.content
    return Held(
        stored.event, gone or came_empty, not came_empty and (not gone or bool(stored.marks & RIM_KEPT)), stored.local
    )


def replace_plaintext(not_so: Unproven, plaintext: bytes) -> Unproven:
    """The same verdict, with what was opened by then."""
    return Unproven(not_so.step, not_so.reason, result=not_so.result, flag=not_so.flag, plaintext=plaintext)


def _failed(known: ProvedItem, not_so: Unproven, prk: bytes | None = None) -> ProvedItem:
    human = not_so.result == "needs_human"
    return replace(
        known, result=not_so.result, step=not_so.step, reason=not_so.reason, flags=(not_so.flag,) if not_so.flag else (),
        plaintext=not_so.plaintext if human else None, prk=prk if human else None,
    )  # fmt: skip


def _media(role: Any, value: object) -> NamedMedia | None:
    """Of the named file what can be compared. Spec: client-server-api/#sending-encrypted-attachments"""
    if not isinstance(value, dict) or not isinstance(value.get("url"), str):
        return None
    server, _, media_id = value["url"].removeprefix("mxc://").partition("/")
    hashes = value.get("hashes")
    sha256 = hashes.get("sha256") if isinstance(hashes, dict) else None
    if not value["url"].startswith("mxc://") or not is_server_name(server) or not is_opaque(media_id):
        return None
    try:
        fits = isinstance(sha256, str) and len(from_base64(sha256)) == 32
    except BadJson:
        fits = False
    return NamedMedia(role, server, media_id, sha256) if fits and isinstance(sha256, str) else None
