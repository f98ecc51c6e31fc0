"""What the checks of a disclosure found, message by message. The secrets in it live in memory, and in the sealed envelope."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from relay.moderation.megolm import Result
from relay.protocol.canonical import encode, to_base64

EVIDENCE_VERSION = 1


@dataclass(frozen=True, slots=True)
class NamedMedia:
    """A file that the message names. The address stands inside the ciphertext: it is as secret as the text."""

    role: Literal["file", "thumbnail"]
    server: str = field(repr=False)
    media_id: str = field(repr=False)
    sha256: str = field(repr=False)
    state: Literal["matches", "differs", "not held"] = "not held"


@dataclass(frozen=True, slots=True)
class Copied:
    event_id: str
    sender: str


@dataclass(frozen=True, slots=True)
class ProvedItem:
    """One message. `result` with its `step` where a check did not pass; `flags` and `reason` are fixed words."""

    event_id: str
    result: Result
    step: str | None = None
    reason: str | None = None
    flags: tuple[str, ...] = ()
    attested_by: str | None = None
    copied_from: Copied | None = None
    room_id: str | None = None
    sender: str | None = None
    origin_server_ts: int | None = None
    index: int | None = None
    room_version: str | None = None
    media: tuple[NamedMedia, ...] = ()
    pdu: Mapping[str, Any] | None = field(default=None, repr=False)
    plaintext: bytes | None = field(default=None, repr=False)
    prk: bytes | None = field(default=None, repr=False)
    message: bytes | None = field(default=None, repr=False)

    @property
    def opened(self) -> bool:
        return self.plaintext is not None

    def shown(self) -> dict[str, Any]:
        """What may stand outside the envelope."""
        return {
            "event_id": self.event_id,
            "result": self.result,
            "step": self.step,
            "reason": self.reason,
            "flags": list(self.flags),
            "attested_by": self.attested_by,
            "copied_from": None if self.copied_from is None else {"event_id": self.copied_from.event_id, "sender": self.copied_from.sender},
            "media": [{"role": one.role, "state": one.state} for one in self.media],
        }  # fmt: skip

    def evidence(self) -> dict[str, Any]:
        """What the envelope holds. The plaintext as base64 of its bytes: JSON of it would be somebody's reading."""
        return {
            **self.shown(),
            "room_id": self.room_id,
            "sender": self.sender,
            "origin_server_ts": self.origin_server_ts,
            "index": self.index,
            "room_version": self.room_version,
            "pdu": self.pdu,
            "plaintext": None if self.plaintext is None else to_base64(self.plaintext),
            "prk": None if self.prk is None else to_base64(self.prk),
            "media": [
                {
                    "role": one.role,
                    "state": one.state,
                    "server": one.server,
                    "media_id": one.media_id,
                    "sha256": one.sha256,
                }
                for one in self.media
            ],
        }


@dataclass(frozen=True, slots=True)
class Proof:
    """Of a whole disclosure. Its result is that of the message which the report is about; the rest is context.

    Where the report names an event, that is the one; where it names a person, the first message of hers. A proof of something
    else proves nothing about these, and counts as none.
    """

    items: tuple[ProvedItem, ...] = ()
    about_event: str | None = None
    about_user: str | None = None

    @property
    def main(self) -> ProvedItem | None:
        if self.about_event is not None:
            return self.of(self.about_event)
        # Of an item that failed at V1 the sender is not known, and not to be told.
        return next(
            (one for one in self.items if self.about_user is None or one.sender in (self.about_user, None)), None
        )

    @property
    def result(self) -> Result:
        return self.main.result if self.main is not None else "undisclosed"

    @property
    def step(self) -> str | None:
        return self.main.step if self.main is not None else None

    @property
    def opened(self) -> tuple[ProvedItem, ...]:
        return tuple(one for one in self.items if one.opened)

    def of(self, event_id: str) -> ProvedItem | None:
        return next((one for one in self.items if one.event_id == event_id), None)

    def media(self) -> Iterable[NamedMedia]:
        """The files that the opened messages name: exactly these are held while the case lasts."""
        return (media for one in self.items for media in one.media)

    def evidence(self) -> bytes:
        """The text of the envelope."""
        return encode({"relay.evidence": EVIDENCE_VERSION, "items": [one.evidence() for one in self.items]})
