"""The command line about other servers: the signing keys, what is wrong with the federation, whom to forget.

`__main__.py` has the rest and the means: how a command is asked for, and how its answer is told.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from relay import checkup, control, folder, own_keys
from relay.clock import SECOND
from relay.serving import offline

Run = Callable[[argparse.Namespace], int]
Tell = Callable[[argparse.Namespace, Any, Callable[[Any], str]], int]
_ASLEEP = {
    "subject": "federation",
    "severity": "error",
    "what": "The relay does not run, so nobody can reach it.",
    "todo": "Start it, and run relay doctor again.",
}
Ask = Callable[[Path, str, Mapping[str, Any]], Any]


class Grammar(Protocol):
    def add(self, name: str, run: Run, help_text: str, example: str) -> argparse.ArgumentParser: ...
    def group(self, name: str, help_text: str) -> Grammar: ...


def grow(grammar: Grammar, tell: Tell, ask: Ask) -> None:
    """`ask` reaches the running relay or, where none runs, the data folder."""

    def key_list(arguments: argparse.Namespace) -> int:
        return tell(arguments, ask(arguments.data, "key.list", {}), _keys)

    def key_rotate(arguments: argparse.Namespace) -> int:
        if not arguments.lost:
            return tell(arguments, ask(arguments.data, "key.rotate", {}), _rotated)
        if control.is_running(arguments.data):
            raise control.CommandFailed(
                "The relay runs, so its key is not lost: relay key rotate makes a new one, and puts it into the place of the file."
            )
        with control.locked(arguments.data):
            own_keys.make_new(arguments.data, folder.load_settings(arguments.data))
        return tell(arguments, offline(arguments.data, "key.lost", {}), _rotated)

    def doctor(arguments: argparse.Namespace) -> int:
        if not control.is_running(arguments.data):
            found = [
                {"subject": "federation", "severity": one.severity, "what": one.what, "todo": one.todo}
                for one in checkup.look(arguments.data, running=False)[0]
                if one.severity != "ok"
            ]
            found.append(_ASLEEP)
        else:
            found = ask(arguments.data, "doctor", {"ask": arguments.ask})
        tell(arguments, found, _findings)
        return 1 if any(one["severity"] == "error" for one in found) else 0

    examined = grammar.add(
        "doctor",
        doctor,
        "say what is wrong between this relay and other servers, and what to do",
        "--ask matrix.org --data data",
    )
    examined.add_argument(
        "--ask", metavar="SERVER", help="another server that is asked to look at this one from outside"
    )

    keys = grammar.group("key", "the signing keys by which other servers know this relay")
    keys.add("list", key_list, "show the key in use and those that were put away", "--data data")
    rotate = keys.add(
        "rotate", key_rotate, "sign with a new key from now on, and announce the old one as such", "--data data"
    )
    rotate.add_argument("--lost", action="store_true", help="the old key is gone: make and announce a new one")

    def server_forget(arguments: argparse.Namespace) -> int:
        return tell(arguments, ask(arguments.data, "server.forget", {"server": arguments.server}), _forgotten)

    servers = grammar.group("server", "other servers")
    forget = servers.add(
        "forget",
        server_forget,
        "remove all that came from a server and waits to go there",
        "evil.example --data data",
    )
    forget.add_argument("server", metavar="NAME", help="the part after the colon in user IDs")


def _findings(found: Any) -> str:
    # For a program that reads along each finding is one line.
    width = min(shutil.get_terminal_size().columns, 110) if sys.stdout.isatty() else 10_000
    lines = []
    for one in found:
        lines.append(_wrapped(f"{one['severity']:<8} {one['subject']}: {one['what']}", width))
        if one["todo"]:
            lines.append(_wrapped(f"      -> {one['todo']}", width))
    errors = sum(one["severity"] == "error" for one in found)
    warnings = sum(one["severity"] == "warning" for one in found)
    lines.append(f"{_number(errors, 'error')}, {_number(warnings, 'warning')}.")
    if errors:
        again = "Begin with the first error, and run relay doctor again: those after it may come from it."
        lines.append(_wrapped(again, width))
    return "\n".join(lines)


def _wrapped(line: str, width: int) -> str:
    return textwrap.fill(
        line, max(40, width), subsequent_indent=" " * 9, break_long_words=False, break_on_hyphens=False
    )


def _number(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _keys(result: Any) -> str:
    return "\n".join(
        f"{key['key_id']}  {key['verify_key']}  "
        + ("in use" if key["until"] is None else f"put away {_moment(key['until'])}")
        for key in result
    )


def _rotated(result: Any) -> str:
    before = (
        f" {result['before']} stays published as an old key, so that what it signed stays good."
        if result["before"]
        else ""
    )
    return f"The relay signs with {result['key_id']} from now on.{before} Keep a copy of the new key in a safe place."


def _forgotten(result: Any) -> str:
    removed = result["removed"]
    lines = [f"{number:>8}  {part}" for part, number in removed.items()] or ["Nothing is here of that server."]
    return "\n".join([*lines, "To keep it out from now on, write its name under federation.deny in the config."])


def _moment(ms: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(ms // SECOND))
