"""What the relay tells about itself, on standard error, as lines for people or as JSON.

The log never holds a message, an IP address or a user agent. That is not left to care: a line is a fixed text with fields
from `FIELDS`, any other field is left out and only its name is told; of an exception its type and the lines of code are
written, never its text or its values; of foreign libraries the unfilled template. Write
`log = structlog.get_logger("web")` and `log.info("a fixed text", room=room_id)`.
"""

from __future__ import annotations

import errno
import logging
import sys
import traceback
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any, TextIO

import orjson
import structlog

from relay.config import Log

MAX_VALUE = 300
MAX_FRAMES = 30
MAX_CAUSES = 4

# Names of what may stand in the log: identifiers that route, numbers, names of code, the operator's own files.
FIELDS = frozenset(
    {
        "attempt", "attempts", "bytes", "code", "count", "database", "depth", "destination", "device", "device_id", "edu",
        "edus", "edu_type", "errcode", "event_id", "event_type", "events", "exc", "field", "file", "key_id",
        "left", "limit", "listener", "logger", "media_id", "method", "missing", "ms", "name", "number", "origin", "outcome",
        "part", "path", "pdus", "pid", "pos", "room", "room_id", "room_version", "route", "rule", "seconds", "sender",
        "serves", "server", "signal", "since", "size", "stage", "state_key", "status", "step", "table", "task", "tls", "txn",
        "type", "url", "user", "user_id", "version", "waiting",
    }
)  # fmt: skip
_PACKAGE_ROOT = Path(__file__).parent.parent


def configure(settings: Log, stream: TextIO | None = None) -> None:
    """From now on every line goes to `stream` (standard error where none is given)."""
    out = stream if stream is not None else sys.stderr
    level = getattr(logging, settings.level.upper())
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _only_known_fields,
            _as_json if settings.format == "json" else _as_text,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *name: _Line(out, *name),
        cache_logger_on_first_use=True,
    )
    foreign = logging.getLogger()
    foreign.handlers[:] = [_Foreign()]
    foreign.setLevel(max(level, logging.WARNING))


class _Line:
    """Where a finished line goes."""

    def __init__(self, stream: TextIO, name: str = "relay") -> None:
        self.name = name
        self._stream = stream

    def msg(self, line: str) -> None:
        try:
            self._stream.write(line + "\n")
            self._stream.flush()
        except (OSError, ValueError):
            pass  # a closed terminal or a full disk must not take the relay down

    debug = info = warning = error = critical = msg


class _Foreign(logging.Handler):
    """Lines of libraries: the template without what was filled in, which may be an address or a piece of a message."""

    def emit(self, record: logging.LogRecord) -> None:
        text = str(record.msg).partition("\n")[0]
        log = structlog.get_logger(record.name)
        log.log(record.levelno, text, exc_info=record.exc_info)


def _only_known_fields(logger: Any, _: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    kept: dict[str, Any] = {
        "time": line.pop("timestamp", ""),
        "level": line.pop("level", ""),
        "part": getattr(logger, "name", "relay"),
        "text": str(line.pop("event", ""))[:MAX_VALUE],
    }
    error = line.pop("exc_info", None)
    left_out = []
    for name, value in line.items():
        if name in FIELDS:
            kept[name] = _short(value)
        else:
            left_out.append(name)
    if left_out:
        kept["left_out"] = sorted(left_out)
    if isinstance(error, tuple):
        error = error[1]
    elif error and not isinstance(error, BaseException):
        error = sys.exc_info()[1]
    if isinstance(error, BaseException):
        kept["error"] = list(describe(error))
    return kept


def _short(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, BaseException):
        return type(value).__name__
    if isinstance(value, list | tuple | set | frozenset):
        return [_short(item) for item in list(value)[:20]]
    text = str(value)
    return text if len(text) <= MAX_VALUE else text[:MAX_VALUE] + "…"


def describe(error: BaseException) -> Iterator[str]:
    """Type and place of an exception and of what caused it. Its text is left out: it may quote what somebody wrote."""
    found: BaseException | None = error
    for _ in range(MAX_CAUSES):
        if found is None:
            return
        number = getattr(found, "errno", None)
        name = f" {errno.errorcode.get(number, number)}" if isinstance(number, int) else ""
        yield f"{type(found).__module__}.{type(found).__qualname__}{name}".removeprefix("builtins.")
        for frame, line in list(traceback.walk_tb(found.__traceback__))[-MAX_FRAMES:]:
            code = frame.f_code
            yield f"  {_place(code.co_filename)}:{line} {code.co_qualname}"
        if isinstance(found, BaseExceptionGroup):
            found = found.exceptions[0]
        else:
            found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)


def _place(file: str) -> str:
    path = Path(file)
    if path.is_relative_to(_PACKAGE_ROOT) and "site-packages" not in path.parts:
        return str(path.relative_to(_PACKAGE_ROOT))
    return "/".join(path.parts[-2:])


def _as_json(_: Any, __: str, line: MutableMapping[str, Any]) -> str:
    return orjson.dumps(line, default=str).decode()


def _as_text(_: Any, __: str, line: MutableMapping[str, Any]) -> str:
    error = line.pop("error", ())
    head = f"{line.pop('time')[:19]}Z {line.pop('level'):<7} {line.pop('part')}: {line.pop('text')}"
    fields = " ".join(f"{name}={_one_line(value)}" for name, value in line.items())
    return "\n".join([f"{head}  {fields}" if fields else head, *(f"    {frame}" for frame in error)])


def _one_line(value: Any) -> str:
    text = ",".join(str(item) for item in value) if isinstance(value, list) else str(value)
    # An identifier from outside may hold line breaks or terminal codes; none may forge a line.
    return "".join(character if character.isprintable() else "?" for character in text)
