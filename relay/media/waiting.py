"""Readable pictures wait here, in memory, until a profile or a room names them as its avatar; else they are forgotten.

Bounded by number, size and time, and shown only to whoever uploaded them. Also: which pictures a browser may be shown,
found in the bytes themselves, never in what the uploader claimed.
"""

from __future__ import annotations

from dataclasses import dataclass

from relay.clock import MINUTE, Clock
from relay.errors import LimitExceeded

MAX_PICTURE = 1024 * 1024
MAX_TOTAL = 16 * 1024 * 1024
MAX_OF_ONE_PERSON = 3
STAYS = 5 * MINUTE

_HEIF_BRANDS = {b"avif": "image/avif", b"avis": "image/avif"}


def picture_type(head: bytes) -> str | None:
    """The content type of a picture that browsers show without running anything; None for all else. 16 bytes suffice."""
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if head.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "image/gif"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "image/webp"
    if head[4:8] == b"ftyp":
        return _HEIF_BRANDS.get(head[8:12])
    return None


@dataclass(frozen=True, slots=True)
class Picture:
    uploader: str
    content_type: str
    body: bytes
    until: int


class Waiting:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._pictures: dict[str, Picture] = {}  # in order of arrival, and so of expiry
        self._total = 0

    def add(self, media_id: str, uploader: str, content_type: str, body: bytes) -> None:
        """Raises LimitExceeded where memory for them is full. Of one person the latest few are kept."""
        self.forget_old()
        own = [known for known, picture in self._pictures.items() if picture.uploader == uploader]
        for known in own[: max(0, len(own) - MAX_OF_ONE_PERSON + 1)]:
            self.drop(known)
        if self._total + len(body) > MAX_TOTAL:
            first = next(iter(self._pictures.values()))
            raise LimitExceeded((first.until - self._clock.now()) / 1000)
        self._pictures[media_id] = Picture(uploader, content_type, body, self._clock.now() + STAYS)
        self._total += len(body)

    def get(self, media_id: str) -> Picture | None:
        picture = self._pictures.get(media_id)
        return picture if picture is not None and picture.until > self._clock.now() else None

    def drop(self, media_id: str) -> None:
        picture = self._pictures.pop(media_id, None)
        if picture is not None:
            self._total -= len(picture.body)

    def forget_old(self) -> None:
        now = self._clock.now()
        for media_id, picture in list(self._pictures.items()):
            if picture.until > now:
                break
            self.drop(media_id)
