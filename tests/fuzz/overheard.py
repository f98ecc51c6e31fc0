"""Listening in on what the relay says about itself, so that a story can tell that nothing broke inside."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from relay.log import describe

FOREIGN = ("asyncio", "aiohttp.server", "aiohttp.web")


class Ears:
    """Every line of the relay's own modules, and the errors of the libraries under it."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str, dict[str, Any]]] = []
        self.breaks: list[str] = []

    def _hears(self, level: str, text: str, fields: dict[str, Any]) -> None:
        self.lines.append((level, text, fields))
        error = fields.get("exc_info")
        if isinstance(error, BaseException):
            self.breaks.append(f"{text} {fields.get('path', '')}: {error!r}\n" + "\n".join(describe(error)))

    def debug(self, text: str, **fields: Any) -> None:
        self._hears("debug", text, fields)

    def info(self, text: str, **fields: Any) -> None:
        self._hears("info", text, fields)

    def warning(self, text: str, **fields: Any) -> None:
        self._hears("warning", text, fields)

    def error(self, text: str, **fields: Any) -> None:
        self._hears("error", text, fields)

    def log(self, level: int, text: str, **fields: Any) -> None:
        self._hears(logging.getLevelName(level).lower(), text, fields)

    def nothing_broke(self) -> None:
        broken, self.breaks = self.breaks, []
        assert not broken, "something broke inside the relay:\n" + "\n".join(broken[:5])


class _Foreign(logging.Handler):
    def __init__(self, ears: Ears) -> None:
        super().__init__(logging.ERROR)
        self._ears = ears

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        self._ears.breaks.append(
            f"{record.name}: {record.getMessage()} {error!r}" + "\n".join(describe(error) if error else ())
        )


@contextmanager
def overhearing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ears]:
    ears = Ears()
    for name, module in list(sys.modules.items()):
        if name.startswith(("relay.", "federation.")) and hasattr(getattr(module, "log", None), "bind"):
            monkeypatch.setattr(module, "log", ears)
    handler = _Foreign(ears)
    for name in FOREIGN:
        logging.getLogger(name).addHandler(handler)
    try:
        yield ears
    finally:
        for name in FOREIGN:
            logging.getLogger(name).removeHandler(handler)
