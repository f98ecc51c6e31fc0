"""Which bytes prove that they are not ciphertext, and that random ones never do."""

from __future__ import annotations

import random

import pytest

from relay.errors import Refused
from relay.protocol import readable
from relay.protocol.seal import Seal

STANDARD = Seal("standard")
OPEN = Seal("open")


@pytest.mark.parametrize(
    "head",
    [
        b"\x89PNG\r\n\x1a\n" + bytes(50),
        b"GIF89a" + bytes(50),
        b"\xff\xd8\xff\xe0\x00\x10JFIF",
        b"\xff\xd8\xff\xe1\x00\x10Exif",
        b"\xff\xd8\xff\xdb\x00\x43",
        b"RIFF\x00\x00\x00\x00WEBPVP8 ",
        b"\x00\x00\x00\x20ftypisom",
        b"\x1a\x45\xdf\xa3\x01",
        b"OggS\x00\x02",
        b"%PDF-1.7",
        b"PK\x03\x04\x14\x00",
        b"BM\xff\xff\x00\x00\x00\x00\x00\x00\x36\x00",
        (b"G" + b"\xff" * 187) * 5,
    ],
)
def test_known_formats_are_refused(head: bytes) -> None:
    with pytest.raises(Refused, match="readable"):
        STANDARD.media(head)
    OPEN.media(head)


@pytest.mark.parametrize("head", [b"\x1f\x8b\x08\x00", b"BM", b"\xff\xd8\xff", b"\xff\xfb\x90\x00", b"", b"G" * 10])
def test_short_signatures_prove_nothing(head: bytes) -> None:
    STANDARD.media(head)


def test_every_signature_has_32_fixed_bits() -> None:
    for _, fixed, name in readable._SIGNATURES:
        assert len(fixed) * 8 >= readable.MIN_FIXED_BITS, f"{name} could be a random blob"


def test_a_text_of_more_than_64_bytes_is_refused() -> None:
    for text in ("word " * 20, "ж" * 40, "{}" * 33):
        with pytest.raises(Refused, match="text"):
            STANDARD.media(text.encode()[:100], text.encode())
    STANDARD.media(b"a" * 64, b"a" * 64)
    STANDARD.media(b"a" * 64 + b"\xff", b"a" * 64 + b"\xff")
    STANDARD.media("ж".encode() * 40 + b"\xd0", "ж".encode() * 40 + b"\xd0")
    STANDARD.media(b"a" * 100, None)


def test_a_streamed_text_is_noticed_at_its_end() -> None:
    watch = readable.TextWatch()
    for byte in ("жизнь " * 20).encode():
        watch.feed(bytes([byte]))
    assert watch.is_text(), "pieces cut inside a character are still text"
    watch.feed(b"\xff")
    assert not watch.is_text(), "one wrong byte and nothing is proven"


def test_random_blobs_all_pass() -> None:
    source = random.Random(20260824)
    for _ in range(100_000):
        blob = source.randbytes(source.choice((65, 66, 80, 300)))
        STANDARD.media(blob, blob)
