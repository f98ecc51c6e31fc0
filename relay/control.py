"""The socket through which the command line speaks to the running relay, and the lock of the data folder.

`data/relay.sock` (mode 0600: whoever may open it is the operator). One JSON object a line each way:
{"command": NAME, "args": {…}} is answered by {"ok": true, "result": …} or {"ok": false, "error": "a sentence"}.
What the commands do stands in the parts; `server.py` names them. Whoever works on a data folder, the relay or an offline
command, holds `data/lock`, so two never do.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import orjson
import structlog

from relay.errors import ApiError

SOCKET_NAME = "relay.sock"
LOCK_NAME = "lock"
MAX_REQUEST = 1024 * 1024
MAX_ANSWER = 64 * 1024 * 1024
# An audit walks the whole database.
CALL_TIMEOUT = 3600.0

Command = Callable[..., Awaitable[Any]]

log = structlog.get_logger("control")


class CommandFailed(Exception):
    """A command was refused; the text is for the operator."""


class NotRunning(Exception):
    """No relay answers on this data folder."""


class Taken(Exception):
    """Another process works on the data folder."""

    def __init__(self, data_dir: Path, pid: int | None) -> None:
        who = f"process {pid}" if pid else "another process"
        super().__init__(
            f"The data folder {data_dir} is in use by {who}. Two relays can't share one folder: stop that one, or give --data another folder."
        )
        self.pid = pid


# --- the lock ------------------------------------------------------------------------------------------------------


@contextmanager
def locked(data_dir: Path) -> Iterator[None]:
    """Holds the data folder. Raises Taken at once if somebody else does. The kernel lets go if we are killed."""
    descriptor = os.open(data_dir / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Taken(data_dir, _pid_in(descriptor)) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
        yield
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _pid_in(descriptor: int) -> int | None:
    text = os.pread(descriptor, 20, 0).strip()
    return int(text) if text.isdigit() else None


# --- the relay's side ----------------------------------------------------------------------------------------------


class ControlSocket:
    """Answers commands while the relay runs. The caller holds the lock of the folder."""

    def __init__(self, data_dir: Path, commands: Mapping[str, Command]) -> None:
        self._path = data_dir / SOCKET_NAME
        self._commands = commands
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        # Under the lock, a socket file that is still there belongs to a relay that was killed.
        self._path.unlink(missing_ok=True)
        listening = socket.socket(socket.AF_UNIX)
        try:
            before = os.umask(0o177)
            try:
                with _short_path(self._path) as path:
                    listening.bind(path)
            finally:
                os.umask(before)
            listening.setblocking(False)
            self._server = await asyncio.start_unix_server(self._serve, sock=listening, limit=MAX_REQUEST)
        except BaseException:
            listening.close()
            raise

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            for writer in list(self._open):
                writer.close()
            self._server = None
            self._path.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            while line := await reader.readline():
                writer.write(orjson.dumps(await self._answer(line), default=str) + b"\n")
                await writer.drain()
        except (ConnectionError, ValueError):
            pass  # the command line went away, or sent a line beyond MAX_REQUEST
        finally:
            self._open.discard(writer)
            writer.close()

    async def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            asked = orjson.loads(line)
            name, args = asked["command"], asked.get("args", {})
            command = self._commands.get(name)
        except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
            return {"ok": False, "error": 'A request is one line: {"command": NAME, "args": {…}}.'}
        if command is None:
            return {
                "ok": False,
                "error": f"The running relay knows no command {name!r}. Is it another version? Restart it.",
            }
        try:
            return {"ok": True, "result": await run(command, args)}
        except CommandFailed as refused:
            return {"ok": False, "error": str(refused)}


async def run(command: Command, args: Mapping[str, Any]) -> Any:
    """Raises CommandFailed with a sentence for the operator, whatever went wrong."""
    try:
        return await command(**args)
    except CommandFailed:
        raise
    except ApiError as refused:
        raise CommandFailed(refused.text) from refused
    except Exception as error:
        log.error("a command failed", exc_info=error)
        raise CommandFailed("The relay failed at this, and its log says where. Nothing was changed by half.") from error


# --- the command line's side ---------------------------------------------------------------------------------------


def is_running(data_dir: Path) -> bool:
    """Whether a relay answers on this folder's socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            with _short_path(data_dir / SOCKET_NAME) as path:
                probe.connect(path)
        except OSError:
            return False
    return True


async def call(data_dir: Path, command: str, args: Mapping[str, Any]) -> Any:
    """The result of a command in the running relay. Raises NotRunning, CommandFailed."""
    try:
        with _short_path(data_dir / SOCKET_NAME) as path:
            reader, writer = await asyncio.open_unix_connection(path, limit=MAX_ANSWER)
    except (FileNotFoundError, ConnectionRefusedError):
        raise NotRunning(f"No relay runs on {data_dir}.") from None
    except PermissionError:
        raise CommandFailed(
            f"You may not speak to the relay on {data_dir}. Run this as the user that runs the relay."
        ) from None
    try:
        writer.write(orjson.dumps({"command": command, "args": dict(args)}) + b"\n")
        line = await asyncio.wait_for(reader.readline(), CALL_TIMEOUT)
    except (ConnectionError, TimeoutError, ValueError) as lost:
        raise CommandFailed("The relay did not answer. See its log, and try again.") from lost
    finally:
        writer.close()
    if not line:
        raise CommandFailed("The relay stopped before it answered. Start it and try again.")
    answer = orjson.loads(line)
    if not answer["ok"]:
        raise CommandFailed(answer["error"])
    return answer["result"]


@contextmanager
def _short_path(path: Path) -> Iterator[str]:
    # A socket's path is limited to about 100 bytes; through the folder's descriptor any folder will do.
    if len(os.fsencode(path)) < 100:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        with suppress(OSError):
            os.close(folder)
