"""`relay moderation …` and `relay report …` on the command line: their grammar, and the words in which they answer.

What they do stands in `moderation/moderation_commands.py`; this file only asks the relay and tells.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import orjson

from relay.serving import OperatorError

Ask = Callable[[Path, str, Mapping[str, Any]], Any]
Tell = Callable[[argparse.Namespace, Any, Callable[[Any], str]], int]
MAX_CHECKPOINT_BYTES = 64 * 1024


class Grammar(Protocol):
    def add(
        self,
        name: str,
        run: Callable[[argparse.Namespace], int],
        help_text: str,
        example: str,
        *,
        data: bool = True,
        json: bool = True,
    ) -> argparse.ArgumentParser: ...

    def group(self, name: str, help_text: str) -> Grammar: ...


class Moderating:
    def __init__(self, ask: Ask, tell: Tell) -> None:
        self._ask = ask
        self._tell = tell

    def join(self, grammar: Grammar) -> None:
        """Adds its commands to the command line."""
        moderation = grammar.group("moderation", "the audit log of what moderators and rules did")
        verify = moderation.add(
            "verify",
            self._verify,
            "check that no row of the audit log was changed or cut off",
            "--since last.json --data data",
        )
        verify.add_argument(
            "--since",
            type=Path,
            metavar="FILE",
            help="the checkpoint that you keep outside this machine; the log has to extend it, then the newest is written there",
        )
        moderation.add(
            "checkpoint", self._checkpoint, "sign how far the audit log has come, and print it", "--data data"
        )
        moderation.add("new-key", self._new_key, "let another key sign the audit log from now on", "--data data")

    def _verify(self, arguments: argparse.Namespace) -> int:
        since: Path | None = arguments.since
        held = _held(since) if since is not None and since.exists() else None
        result = self._ask(arguments.data, "moderation.verify", {"held": held})
        self._tell(arguments, result, _verified)
        if not result["sound"]:
            return 1
        if since is not None and result["checkpoint"] is not None:
            beside = since.with_name(since.name + ".new")
            beside.write_bytes(orjson.dumps(result["checkpoint"], option=orjson.OPT_INDENT_2) + b"\n")
            os.replace(beside, since)
        return 0

    def _checkpoint(self, arguments: argparse.Namespace) -> int:
        return self._tell(arguments, self._ask(arguments.data, "moderation.checkpoint", {}), _as_json)

    def _new_key(self, arguments: argparse.Namespace) -> int:
        result = self._ask(arguments.data, "moderation.new-key", {})
        return self._tell(arguments, result, lambda made: f"The key {made['key_id']} signs from now on.")


def _held(path: Path) -> dict[str, Any]:
    try:
        raw = path.read_bytes()[: MAX_CHECKPOINT_BYTES + 1]
        held = orjson.loads(raw)
    except (OSError, orjson.JSONDecodeError):
        held = None
    if not isinstance(held, dict):
        raise OperatorError(
            f"{path} holds no checkpoint. Give the file that an earlier relay moderation verify --since wrote."
        )
    return held


def _verified(result: Any) -> str:
    if not result["sound"]:
        return "\n".join(
            [
                *result["found"],
                "The audit log is not what it was. Keep a copy of the data folder, and find out who had access to it.",
            ]
        )
    return f"{result['rows']} rows and {result['checkpoints']} checkpoints: nothing was changed."


def _as_json(result: Any) -> str:
    return orjson.dumps(result, option=orjson.OPT_INDENT_2).decode()
