"""Canaries: words that must never reach a disk. Each is planted under a name, and looked for in every byte of a relay.

A canary is looked for as it was written, in UTF-16, in hexadecimal, and in base64 at each of its three alignments.
"""

from __future__ import annotations

import base64
import secrets
from pathlib import Path


class Canaries:
    def __init__(self) -> None:
        self.planted: dict[str, str] = {}

    def __call__(self, name: str) -> str:
        """A new one. The name says where it was planted."""
        word = f"canary {secrets.token_hex(8)} sings"
        self.planted[word] = name
        return word

    def found_in(self, files: list[Path]) -> list[str]:
        """Sentences: which one, and where."""
        found = []
        for file in files:
            content = file.read_bytes()
            lower = content.lower()
            for word, name in self.planted.items():
                for form, needle in _forms(word).items():
                    if needle in content or needle.lower() in lower:
                        found.append(f"{name}: {word!r} stands in {file.name} ({form})")
        return found


def _forms(word: str) -> dict[str, bytes]:
    raw = word.split()[1].encode()  # the middle is enough: spaces may have been escaped
    forms = {"as it is": raw, "UTF-16": raw.decode().encode("utf-16-le"), "hexadecimal": raw.hex().encode()}
    for shift in range(3):
        coded = base64.b64encode(b"\0" * shift + raw)
        # The first and the last group depend on the neighbours.
        forms[f"base64, shifted by {shift}"] = coded[4:-4]
    return forms
