"""Writes into proof.html which script and style it may run: the hashes in its content security policy. `scripts/format` runs it."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

PAGE = Path(__file__).parent.parent / "relay" / "pages" / "static" / "proof.html"


def with_hashes(page: str) -> str:
    for name, element in (("script", "script"), ("style", "style")):
        [inside] = re.findall(rf"<{element}>(.*?)</{element}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        page = re.sub(rf"{name}-src 'sha256-[^']*'", f"{name}-src 'sha256-{digest}'", page, count=1)
    return page


if __name__ == "__main__":
    PAGE.write_text(with_hashes(PAGE.read_text("utf-8")), "utf-8")
