"""What a setting may be made of: lengths of time, sizes, ports, names of files, and the block that holds settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated

import msgspec
from msgspec import Meta

from relay.clock import DAY, HOUR, MINUTE, SECOND

_TIME_UNITS = {"ms": 1, "s": SECOND, "m": MINUTE, "h": HOUR, "d": DAY, "w": 7 * DAY}
_SIZE_UNITS = {"B": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}
_AMOUNT = re.compile(r"(\d{1,12})\s*([A-Za-z]{1,3})\Z")


class Duration(int):
    """A length of time: in the file a text like 48h, inside a number of milliseconds."""

    @classmethod
    def parse(cls, given: object) -> Duration:
        if given == 0 and type(given) is int:
            return cls(0)
        found = _AMOUNT.match(given) if isinstance(given, str) else None
        if found is None or found[2] not in _TIME_UNITS:
            raise ValueError("write a length of time: a whole number with its unit, such as 30s, 10m, 48h or 7d (or 0)")
        return cls(int(found[1]) * _TIME_UNITS[found[2]])

    @property
    def seconds(self) -> float:
        return self / SECOND

    def __str__(self) -> str:
        return _with_unit(int(self), _TIME_UNITS, skip=("w",), space="") if self else "0"


class Size(int):
    """An amount of bytes: in the file a text like 50 MiB, inside a number of bytes."""

    @classmethod
    def parse(cls, given: object) -> Size:
        found = _AMOUNT.match(given) if isinstance(given, str) else None
        if found is None or found[2] not in _SIZE_UNITS:
            raise ValueError("write a size: a whole number with its unit, such as 512 KiB, 50 MiB or 2 GiB")
        return cls(int(found[1]) * _SIZE_UNITS[found[2]])

    def __str__(self) -> str:
        return _with_unit(int(self), _SIZE_UNITS, space=" ")


def _with_unit(amount: int, units: Mapping[str, int], *, space: str, skip: tuple[str, ...] = ()) -> str:
    unit = max((name for name in units if name not in skip and amount % units[name] == 0), key=lambda name: units[name])
    return f"{amount // units[unit]}{space}{unit}"


Port = Annotated[int, Meta(ge=0, le=65535)]
FileName = Annotated[str, Meta(min_length=1)]


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A block of the file."""
