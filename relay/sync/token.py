"""A /sync token: where a client stands on the number line, and on the typing line of this process.

`s{epoch}_{pos}_{boot}-{typing}`. A token of another epoch (a restored backup), or from a future that the database does
not know, counts as none: a full sync follows. Another boot has another typing line.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass

from relay.errors import InvalidParam

_FORM = re.compile(r"s(\d{1,10})_(\d{1,18})_([0-9a-f]{8})-(\d{1,18})\Z")
BOOT = secrets.token_hex(4)


@dataclass(frozen=True, slots=True)
class Token:
    epoch: int
    pos: int
    typing: int = 0
    boot: str = BOOT

    def __str__(self) -> str:
        return f"s{self.epoch}_{self.pos}_{self.boot}-{self.typing}"

    @classmethod
    def parse(cls, text: str) -> Token:
        """Raises InvalidParam for what no server of ours ever wrote."""
        found = _FORM.match(text)
        if found is None:
            raise InvalidParam("This is not a token of this server's /sync. Leave `since` out to start afresh.")
        boot = found[3]
        return cls(int(found[1]), int(found[2]), int(found[4]) if boot == BOOT else 0, boot)
