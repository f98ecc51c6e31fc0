"""What can be proven about bytes: that they are NOT ciphertext.

Nobody can prove that a blob is encrypted; a file format's signature or a long text in UTF-8 proves that it is not.
Signatures count from 32 fixed bits on, so that one random blob in a hundred million is wrongly refused. Not a detector
of media types: nothing here is stored or served, and the format's name is only for the sentence of the refusal.
"""

from __future__ import annotations

import codecs

# What a signature is looked for in: enough for the last of them, the fourth packet of an MPEG transport stream.
HEAD_BYTES = 1_024
# Shorter bodies are too often valid by chance, or are nobody's message.
TEXT_MIN_BYTES = 64
MIN_FIXED_BITS = 32

_TS_PACKET = 188

# (offset, fixed bytes, name)
_SIGNATURES: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\x89PNG", "PNG picture"),
    (0, b"\x8aMNG", "MNG animation"),
    (0, b"GIF87a", "GIF picture"),
    (0, b"GIF89a", "GIF picture"),
    (0, b"RIFF", "WebP, WAV or AVI file"),
    (0, b"RIFX", "WAV file"),
    (0, b"II*\x00", "TIFF picture"),
    (0, b"MM\x00*", "TIFF picture"),
    (0, b"\x00\x00\x01\x00\x01\x00", "icon"),
    (0, b"\x00\x00\x00\x0cjP  ", "JPEG 2000 picture"),
    (0, b"\x00\x00\x00\x0cJXL ", "JPEG XL picture"),
    (0, b"8BPS", "Photoshop picture"),
    (0, b"gimp xcf", "GIMP picture"),
    (4, b"ftyp", "MP4, QuickTime, HEIC or AVIF file"),
    (4, b"moov", "QuickTime film"),
    (4, b"mdat", "QuickTime film"),
    (4, b"wide", "QuickTime film"),
    (0, b"\x1a\x45\xdf\xa3", "Matroska or WebM film"),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "Windows media file"),
    (0, b"FLV\x01", "Flash film"),
    (0, b"\x00\x00\x01\xba", "MPEG film"),
    (0, b"\x00\x00\x01\xb3", "MPEG film"),
    (0, b"OggS", "Ogg file"),
    (0, b"fLaC", "FLAC sound"),
    (0, b"ID3\x02", "MP3 sound"),
    (0, b"ID3\x03", "MP3 sound"),
    (0, b"ID3\x04", "MP3 sound"),
    (0, b"FORM", "AIFF sound"),
    (0, b"caff", "CAF sound"),
    (0, b"#!AMR", "AMR sound"),
    (0, b".snd", "AU sound"),
    (0, b"MThd", "MIDI file"),
    (0, b"%PDF", "PDF document"),
    (0, b"%!PS", "PostScript document"),
    (0, b"{\\rtf", "RTF document"),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "Office document"),
    (0, b"PK\x03\x04", "ZIP archive or Office document"),
    (0, b"PK\x05\x06", "ZIP archive"),
    (0, b"PK\x07\x08", "ZIP archive"),
    (0, b"7z\xbc\xaf\x27\x1c", "7-Zip archive"),
    (0, b"Rar!\x1a\x07", "RAR archive"),
    (0, b"\xfd7zXZ\x00", "XZ archive"),
    (0, b"\x28\xb5\x2f\xfd", "Zstandard archive"),
    (257, b"ustar", "TAR archive"),
    (0, b"SQLite format 3\x00", "SQLite database"),
    (0, b"\x7fELF", "program"),
    (0, b"\x00asm", "program"),
    (0, b"\xca\xfe\xba\xbe", "program"),
    (0, b"\xcf\xfa\xed\xfe", "program"),
    (0, b"wOFF", "font"),
    (0, b"wOF2", "font"),
    (0, b"OTTO", "font"),
    (128, b"DICM", "DICOM picture"),
)

# The first three bytes of a JPEG are only 24 fixed bits. With the marker that follows they are 32, and each of these
# markers is one signature: APP0 to APP15, tables, frame headers, a comment.
_JPEG = b"\xff\xd8\xff"
_JPEG_MARKERS = frozenset({*range(0xE0, 0xF0), 0xDB, 0xC0, 0xC2, 0xC4, 0xDD, 0xFE})


def known_format(head: bytes) -> str | None:
    """The name of the file format whose signature the first bytes carry (HEAD_BYTES of them, or all there are)."""
    if head.startswith(_JPEG) and len(head) > 3 and head[3] in _JPEG_MARKERS:
        return "JPEG picture"
    for offset, fixed, name in _SIGNATURES:
        if head.startswith(fixed, offset):
            return name
    if head.startswith(b"BM") and head[6:10] == bytes(4):  # Two bytes of signature and four that are always zero.
        return "BMP picture"
    if head.startswith(b"BZh") and head[4:10] == b"1AY&SY":
        return "bzip2 archive"
    if len(head) > 3 * _TS_PACKET and all(head[n * _TS_PACKET] == 0x47 for n in range(4)):
        return "MPEG film"
    return None


class TextWatch:
    """Follows a body as it streams past and knows at its end whether it was wholly valid UTF-8 and long enough.

    Random bytes fail within the first dozen, after which feeding costs nothing.
    """

    __slots__ = ("_decoder", "_length")

    def __init__(self) -> None:
        self._decoder: codecs.IncrementalDecoder | None = codecs.getincrementaldecoder("utf-8")()
        self._length = 0

    def feed(self, chunk: bytes) -> None:
        if self._decoder is None:
            return
        self._length += len(chunk)
        try:
            self._decoder.decode(chunk)
        except UnicodeDecodeError:
            self._decoder = None

    def is_text(self) -> bool:
        """At the end of the body."""
        if self._decoder is None or self._length <= TEXT_MIN_BYTES:
            return False
        try:
            self._decoder.decode(b"", True)
        except UnicodeDecodeError:
            return False
        return True


def is_text(body: bytes) -> bool:
    watch = TextWatch()
    watch.feed(body)
    return watch.is_text()
