"""The log keeps promise 1 and 3 by construction: only known fields, no exception texts, no filled-in lines of libraries."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import orjson
import pytest
import structlog

from relay import log as log_lines
from relay.config import Log

SECRET = "meet me at 203.0.113.9, Mozilla/5.0"


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    before, handlers, level = structlog.get_config(), logging.getLogger().handlers[:], logging.getLogger().level
    out = io.StringIO()
    log_lines.configure(Log(format="json"), out)
    yield out
    structlog.configure(**before)
    logging.getLogger().handlers[:] = handlers
    logging.getLogger().setLevel(level)


def _line(stream: io.StringIO) -> dict[str, object]:
    found: dict[str, object] = orjson.loads(stream.getvalue())
    return found


def test_a_field_that_is_not_listed_is_left_out(stream: io.StringIO) -> None:
    structlog.get_logger("send").info("an event was refused", rule="5.3", body=SECRET)
    line = _line(stream)
    assert line["rule"] == "5.3", "a known field is written"
    assert line["part"] == "send", "and who wrote it"
    assert line["left_out"] == ["body"], "of an unknown one only the name is told"
    assert SECRET not in stream.getvalue(), "never its value"


def test_an_exception_is_told_without_its_text(stream: io.StringIO) -> None:
    def fails(content: str) -> None:
        try:
            raise ValueError(content)
        except ValueError as cause:
            raise RuntimeError(f"cannot parse {content}") from cause

    try:
        fails(SECRET)
    except RuntimeError:
        structlog.get_logger("web").error("a request failed", exc_info=True)
    line = _line(stream)
    assert SECRET not in stream.getvalue(), "an exception's text may quote a message"
    text = "\n".join(map(str, line["error"]))  # type: ignore[call-overload]
    assert "RuntimeError" in text and "ValueError" in text, "its type and that of its cause are told"
    assert "test_log.py" in text and "fails" in text, "and where it happened"


def test_a_library_is_told_without_what_it_filled_in(stream: io.StringIO) -> None:
    logging.getLogger("aiohttp.server").error("Error handling request from %s", SECRET)
    line = _line(stream)
    assert line["text"] == "Error handling request from %s", "the template is enough to find the place"
    assert SECRET not in stream.getvalue(), "an address does not get into the log through a library"


def test_a_name_from_outside_cannot_forge_a_line() -> None:
    out = io.StringIO()
    before = structlog.get_config()
    log_lines.configure(Log(), out)
    structlog.get_logger("inbound").info(
        "a transaction arrived", origin="evil.example\n2026-01-01 info: all is well\x1b[2J"
    )
    structlog.configure(**before)
    assert out.getvalue().count("\n") == 1, "one call, one line"
    assert "\x1b" not in out.getvalue(), "and no codes for the terminal"
