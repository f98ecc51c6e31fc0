"""`relay moderation …` and `relay report …` on the command line: their grammar, and the words in which they answer.

What they do stands in `moderation/moderation_commands.py`; this file only asks the relay and tells.
"""

from __future__ import annotations

import argparse
import os
import time
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

        moderation.add("restored", self._restored, "note in the audit log that a backup was restored", "--data data")
        reports = grammar.group("report", "what people reported, and what was decided")
        listed = reports.add("list", self._list, "list the reports that somebody has to look at", "--json --data data")
        listed.add_argument(
            "--state", default="open", metavar="STATE", help="open (default), all, or one state such as decided"
        )
        listed.add_argument("--category", metavar="WORD", help="ncii, minor, threat, harassment, spam, fraud or other")
        show = reports.add("show", self._show, "show one report with its history", "12 --data data")
        decide = reports.add(
            "decide",
            self._decide,
            "decide a report; whoever is concerned gets your reasons",
            "12 --measure suspend --reason-code harassment --terms 4.2 --facts 'what was done, in your words' --data data",
        )
        for command in (show, decide):
            command.add_argument("report", metavar="REPORT", help="its number or its ID")
        decide.add_argument(
            "--measure",
            action="append",
            default=[],
            metavar="NAME[=TARGET]",
            help="what is done; more than once for more; none where nothing is done (a person is the one reported, if not named)",
        )
        decide.add_argument("--room", metavar="ROOM", help="the room, for redact, kick and ban")
        decide.add_argument(
            "--hours", type=float, metavar="N", help="how long the measures hold (default: until they are taken back)"
        )
        decide.add_argument("--reason-code", required=True, metavar="WORD", help="a short word, such as harassment")
        ground = decide.add_mutually_exclusive_group(required=True)
        ground.add_argument("--terms", metavar="CLAUSE", help="the clause of your terms that was broken")
        ground.add_argument("--law", metavar="TEXT", help="the law that was broken")
        decide.add_argument(
            "--facts", required=True, metavar="TEXT", help="what happened, in your own words; both sides read them"
        )

    def _list(self, arguments: argparse.Namespace) -> int:
        asked = {"state": arguments.state, "category": arguments.category}
        return self._tell(arguments, self._ask(arguments.data, "report.list", asked), _listed)

    def _show(self, arguments: argparse.Namespace) -> int:
        return self._tell(arguments, self._ask(arguments.data, "report.show", {"report": arguments.report}), _shown)

    def _decide(self, arguments: argparse.Namespace) -> int:
        measures = [_measure(text, arguments.room, arguments.hours) for text in arguments.measure]
        if not measures:
            raise OperatorError("Say what is done: --measure NAME, or --measure none where nothing is done.")
        decision = {
            "measures": [one for one in measures if one["measure"] != "none"],
            "reason_code": arguments.reason_code,
            "facts": arguments.facts,
            "ground": f"terms:{arguments.terms}" if arguments.terms is not None else f"law:{arguments.law}",
        }
        result = self._ask(arguments.data, "report.decide", {"report": arguments.report, "decision": decision})
        return self._tell(arguments, result, _decided)

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

    def _restored(self, arguments: argparse.Namespace) -> int:
        result = self._ask(arguments.data, "moderation.restored", {})
        return self._tell(
            arguments,
            result,
            lambda made: f"The audit log says that it goes on from row {made['from_seq']} of a backup.",
        )

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


def _measure(text: str, room: str | None, hours: float | None) -> dict[str, Any]:
    name, _, target = text.partition("=")
    found: dict[str, Any] = {"measure": name}
    if target:
        found["target"] = target
    if room is not None:
        found["room_id"] = room
    if hours is not None:
        found["lasts_ms"] = int(hours * 3_600_000)
    return found


def _listed(result: Any) -> str:
    if not result:
        return "Nothing is to be done."
    lines = []
    for row in result:
        about = row["user_id"] or row["room_id"] or "somebody"
        due = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(row["due"] / 1000))
        lines.append(
            f"{row['number']:>5}  {row['category']:<10}  {row['state']:<12}  {row['disclosure']:<15}  due {due}  {about}"
        )
    return "\n".join(lines)


def _shown(result: Any) -> str:
    lines = [f"Report {result['number']} ({result['category']}), {result['state']}, proof: {result['disclosure']}"]
    lines += [
        f"{name}: {result[key]}"
        for name, key in (("person", "user_id"), ("room", "room_id"), ("event", "event_id"))
        if result[key]
    ]
    lines += [f"decided {one['decided']}: {one['reason_code']}, {one['facts']}" for one in result["decisions"]]
    lines += [
        f"  {entry['seq']} {entry['action']} by {entry['actor']} ({entry['reason_code']})"
        for entry in result["history"]
    ]
    return "\n".join(lines)


def _decided(result: Any) -> str:
    done = [f"{one['measure']} {one['target']}: {one['outcome']}" for one in result["measures"]]
    return "\n".join(["Decided; both sides are told.", *(done or ["No measure was taken."])])


def _as_json(result: Any) -> str:
    return orjson.dumps(result, option=orjson.OPT_INDENT_2).decode()
