"""A relay's life around `server.py`: first start, what is said on the way, signals, the end; and the same relay opened without
listeners, for a command while none runs. Everything here holds the data folder's lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import gc
import os
import resource
import signal
import ssl
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import structlog
import uvloop

from relay import answers, control, folder
from relay import log as log_lines
from relay.config import Listener, Settings
from relay.upgrade import WrongDatabase

if TYPE_CHECKING:
    from relay.server import Server

log = structlog.get_logger("serve")

COLLECT_AFTER_OBJECTS = 10_000
SWITCH_SECONDS = 0.001
OPEN_FILES = 16_384
# What glibc's malloc calls its settings (malloc.h). A block of this size goes back to the system when it is freed, and so does
# as much at the end of the heap; less is soon needed again.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
GIVEN_BACK_BYTES = 4 * 2**20


class OperatorError(Exception):
    """Something that the operator can mend. The text says how."""


def serve(data_dir: Path, server_name: str | None, port: int | None, *, program: str) -> int:
    """Runs the relay until SIGTERM or SIGINT. Raises OperatorError where it can't start."""
    # A crash must not write to disk what is in memory: disclosed messages, the keys that open them.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    allow_many_files()
    hold_little_memory()
    done = folder.make(data_dir)
    with control.locked(data_dir):
        prepared = folder.prepare(data_dir, server_name, Listener() if port is None else Listener(port=port))
        settings = prepared.settings
        if port is not None:
            settings = _with_port(settings, port)
        log_lines.configure(settings.log)
        new_database = not (data_dir / settings.database.path).exists()
        done += prepared.done
        if new_database:
            done.append(f"made the database {data_dir / settings.database.path}")
        return uvloop.run(_serve(data_dir, settings, done, program))


def allow_many_files() -> None:
    """A thousand servers and as many clients are more connections than a process may have open by habit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= OPEN_FILES:
        return
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES), hard)
    )


def hold_little_memory() -> None:
    """glibc gives each thread a heap of its own, and keeps what was freed of a large block, as a password check's 19 MiB, for
    the next one. Threads that take turns need neither. Other C libraries have no such habits, nor this function."""
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(M_ARENA_MAX, 1)
        library.mallopt(M_MMAP_THRESHOLD, GIVEN_BACK_BYTES)
        library.mallopt(M_TRIM_THRESHOLD, GIVEN_BACK_BYTES)


def _trim() -> None:
    """What the start needed and nobody needs now."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def offline(data_dir: Path, command: str, args: Mapping[str, Any]) -> Any:
    """Carries out a command on the data folder of a relay that does not run."""
    if not data_dir.is_dir():
        raise OperatorError(f"There is no data folder {data_dir}. Make one: relay init --server-name NAME --data DIR")
    with control.locked(data_dir):
        settings = folder.load_settings(data_dir)
        folder.load_key(data_dir, settings)
        # Beside the answer only trouble is of interest here.
        log_lines.configure(msgspec.structs.replace(settings.log, level="warning"))
        return uvloop.run(_offline(data_dir, settings, command, args))


async def _serve(data_dir: Path, settings: Settings, done: list[str], program: str) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    server = await _opened(data_dir, settings)
    sockets = control.ControlSocket(data_dir, server.commands)
    try:
        for line in done:
            _say(f"First start: {line}.")
        await _started(server, settings)
        await sockets.start()
        for line in _greeting(
            data_dir, settings, has_users=bool(await server.commands["user.list"]()), program=program
        ):
            _say(line)
        _settle()
        reloads: set[asyncio.Task[None]] = set()
        loop.add_signal_handler(signal.SIGHUP, lambda: reloads.add(loop.create_task(_reload(server))))
        await stop.wait()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.remove_signal_handler(number)  # whoever asks twice does not want to wait
        _say("Stopping: what was answered is saved, open requests are finished.")
    finally:
        await sockets.stop()
        await server.stop()
    _say("Stopped.")
    return 0


async def _reload(server: Server) -> None:
    try:
        _say(answers.reloaded(await control.run(server.commands["reload"], {})))
    except control.CommandFailed as refused:
        _say(str(refused))


async def _offline(data_dir: Path, settings: Settings, command: str, args: Mapping[str, Any]) -> Any:
    server = await _opened(data_dir, settings)
    try:
        return await control.run(server.commands[command], args)
    finally:
        await server.stop()


async def _opened(data_dir: Path, settings: Settings) -> Server:
    # The parts are loaded here, so that `relay --help` and `relay config example` need none of them.
    from relay.server import Server

    server = Server(settings, data_dir)
    try:
        await server.open()
    except WrongDatabase as wrong:
        raise OperatorError(str(wrong)) from wrong
    except OSError as bad:
        raise OperatorError(
            f"The database in {data_dir} can't be opened: {bad.strerror or bad}. Check the disk and who owns the folder."
        ) from bad
    return server


async def _started(server: Server, settings: Settings) -> None:
    from relay.inspection import NotSealed
    from relay.own_keys import WrongKey

    try:
        await server.start()
    except (NotSealed, WrongKey) as refused:
        raise OperatorError(str(refused)) from refused
    except (ssl.SSLError, FileNotFoundError) as bad:
        raise OperatorError(
            "The TLS certificate or key of a listener can't be used: `relay check` says which and why."
        ) from bad
    except OSError as bad:
        places = " or ".join(f"{listener.address}:{listener.port}" for listener in settings.listeners)
        advice = {
            errno.EADDRINUSE: "Another program listens there: stop it, or take another port with --port or in the config.",
            errno.EACCES: "This user may not open that port: take one above 1023 and put a reverse proxy before it.",
            errno.EADDRNOTAVAIL: "This machine has no such address: correct it under listeners in the config.",
        }.get(bad.errno or 0, "Check the listeners in the config, and their certificate files.")
        reason = os.strerror(bad.errno) if bad.errno else str(bad)
        raise OperatorError(f"The relay can't listen on {places}: {reason}. {advice}") from bad


def _settle() -> None:
    """What stands after the start stays: the collector of cycles need not walk it again, nor look as often as it does.

    The event loop and the database's threads hand the interpreter to each other for every statement: the one that waits
    for it asks sooner than by default.
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    gc.collect()
    gc.freeze()
    _trim()
    gc.set_threshold(COLLECT_AFTER_OBJECTS, 20, 20)


def _greeting(data_dir: Path, settings: Settings, *, has_users: bool, program: str) -> list[str]:
    lines = [
        f"{settings.server_name} listens on {_address(listener)} for {' and '.join(listener.serves)}."
        for listener in settings.listeners
    ]
    if settings.on_loopback:
        lines.append(
            f"The name {settings.server_name} is for trying out: it does not federate outside loopback, and it can't be changed later. "
            "For real use start on a new data folder with --server-name and a name of your own."
        )
    services = len(settings.appservices.registration_files)
    if services and settings.privacy.seal != "open":
        lines.append(
            f"Application services: {services}. The seal is {settings.privacy.seal}, so they have to encrypt what they send."
        )
    if not has_users:
        lines.append("There is no account yet. In another terminal make the first:")
        lines.append(f"    {program} user add NAME --admin --data {answers.shown(data_dir)}")
    lines.append(f"Process {os.getpid()}; Ctrl-C stops it.")
    return lines


def _address(listener: Listener) -> str:
    host = f"[{listener.address}]" if ":" in listener.address else listener.address
    return f"{'https' if listener.tls_certificate else 'http'}://{host}:{listener.port}"


def _with_port(settings: Settings, port: int) -> Settings:
    first, *others = settings.listeners
    return msgspec.structs.replace(settings, listeners=(msgspec.structs.replace(first, port=port), *others))


def _say(line: str) -> None:
    print(line, flush=True)
