"""The control socket and the lock of the data folder, without a relay behind them."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from relay import control
from relay.control import CommandFailed, ControlSocket, NotRunning, Taken
from relay.errors import NotFound


async def _echo(**args: Any) -> dict[str, Any]:
    return args


async def _refuses(**_: Any) -> None:
    raise NotFound("There is no such user.")


async def _fails(**_: Any) -> None:
    raise ValueError("something secret")


@pytest.fixture
async def folder(tmp_path: Path) -> AsyncIterator[Path]:
    # Deeper than a socket's path may be long: operators choose their folders.
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    deep.mkdir(parents=True)
    sockets = ControlSocket(deep, {"echo": _echo, "refuses": _refuses, "fails": _fails})
    await sockets.start()
    yield deep
    await sockets.stop()
    assert not (deep / control.SOCKET_NAME).exists(), "nothing is left behind"


async def test_a_command_is_answered(folder: Path) -> None:
    assert await control.call(folder, "echo", {"user": "@zoë:a.example"}) == {"user": "@zoë:a.example"}, (
        "there and back"
    )
    assert await asyncio.to_thread(control.is_running, folder), "and the relay counts as running"


async def test_only_the_operator_may_speak(folder: Path) -> None:
    mode = stat.S_IMODE((folder / control.SOCKET_NAME).stat().st_mode)
    assert mode == 0o600, "the socket is the operator's alone"


@pytest.mark.parametrize(
    ("command", "words"), [("refuses", "no such user"), ("fails", "its log says where"), ("unknown", "no command")]
)
async def test_a_refusal_arrives_in_words(folder: Path, command: str, words: str) -> None:
    with pytest.raises(CommandFailed, match=words) as refused:
        await control.call(folder, command, {})
    assert "secret" not in str(refused.value), "what went wrong inside stays inside"


async def test_nonsense_on_the_socket_harms_nobody(folder: Path) -> None:
    descriptor_path = folder / control.SOCKET_NAME
    for nonsense in (b"\n", b"[]\n", b'{"command": []}\n', b'{"command": "echo", "args": 3}\n', b"x" * 100):
        with control._short_path(descriptor_path) as path:
            reader, writer = await asyncio.open_unix_connection(path)
        writer.write(nonsense)
        writer.write_eof()
        answer = await reader.read()
        assert b'"ok":true' not in answer, f"{nonsense!r} is no command"
        writer.close()
    assert await control.call(folder, "echo", {"a": 1}) == {"a": 1}, "the next one is served"


async def test_without_a_relay_the_caller_knows(tmp_path: Path) -> None:
    with pytest.raises(NotRunning):
        await control.call(tmp_path, "echo", {})
    (tmp_path / control.SOCKET_NAME).touch()
    with pytest.raises(NotRunning):
        await control.call(tmp_path, "echo", {})


def test_a_folder_has_one_user_at_a_time(tmp_path: Path) -> None:
    with control.locked(tmp_path), pytest.raises(Taken, match="in use by process"), control.locked(tmp_path):
        pass
    with control.locked(tmp_path):
        pass
