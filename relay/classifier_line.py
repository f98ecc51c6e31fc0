"""The command line that trains the small classifier, on a moderator's machine: it needs no relay and touches no network.

It reads what `relay desk open --json` wrote of decided cases, and the list of cases (`relay report list --state all --json`), so
that nothing of the category `minor` is ever learned from.
"""

from __future__ import annotations

import argparse
import secrets
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from relay import folder
from relay.moderation.bayes import ENOUGH_DECISIONS, KEY_BYTES, LEAST_CASES, Example, Trial, trained, trial
from relay.moderation.classifiers import THRESHOLD, texts_of
from relay.peer_commands import Tell
from relay.protocol.canonical import from_base64
from relay.serving import OperatorError

NEVER = "minor"


def grow(grammar: Any, tell: Tell) -> None:
    def train(arguments: argparse.Namespace) -> int:
        categories = {str(row["id"]): str(row["category"]) for row in _read(arguments.cases, _rows)}
        examples, left_out = [], 0
        for files, acted in ((arguments.acted, True), (arguments.dismissed, False)):
            for file in files:
                for example in _read(file, partial(_examples, acted=acted)):
                    category = categories.get(example.case_id)
                    if category is None or category == NEVER:
                        left_out += 1
                    else:
                        examples.append(example)
        if not examples:
            raise OperatorError("There is nothing to learn from: no file holds the opened evidence of a listed case.")
        key = secrets.token_bytes(KEY_BYTES)
        model, tried = trained(examples, key), trial(examples, key, THRESHOLD)
        folder.write_durably(arguments.model, orjson.dumps(model.as_json()) + b"\n", folder.SECRET_MODE)
        result = {
            "model": str(arguments.model), "version": model.version, "decisions": model.decisions, "left_out": left_out,
            "listened_to": model.is_enough, "precision": tried.precision, "recall": tried.recall,
        }  # fmt: skip
        return tell(arguments, result, lambda _: _words(result, tried))

    group = grammar.group("classifier", "the small classifier of disclosed text (docs/hooks.md)")
    command = group.add(
        "train", train, "learn from decided cases, on a moderator's machine; works offline",
        "classifier.json --cases cases.json --acted a.json --dismissed b.json", data=False,
    )  # fmt: skip
    command.add_argument("model", type=Path, metavar="FILE", help="where the model is written")
    command.add_argument(
        "--cases", type=Path, required=True, metavar="FILE", help="relay report list --state all --json"
    )
    for name, what in (("acted", "a measure was taken"), ("dismissed", "nothing was done")):
        command.add_argument(
            f"--{name}", type=Path, nargs="*", default=[], metavar="FILE",
            help=f"relay desk open --json of cases in which {what}",
        )  # fmt: skip


def _read(file: Path, parse: Callable[[Any], Any]) -> Any:
    try:
        return parse(orjson.loads(file.read_bytes()))
    except (OSError, orjson.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as bad:
        raise OperatorError(
            f"{file} can't be used. See relay classifier train --help for what it should hold."
        ) from bad


def _rows(value: Any) -> list[dict[str, Any]]:
    rows = value if isinstance(value, list) else value["reports"]
    return [row for row in rows if isinstance(row, dict)]


def _examples(value: Any, *, acted: bool) -> list[Example]:
    """One for each case; an envelope is one of several of it."""
    texts: dict[str, list[str]] = {}
    for opened in value if isinstance(value, list) else [value]:
        for item in opened.get("items", ()):
            if item.get("plaintext"):
                texts.setdefault(str(opened["case_id"]), []).extend(texts_of(from_base64(item["plaintext"])))
    return [Example(case_id, tuple(found), acted) for case_id, found in texts.items()]


def _words(result: dict[str, Any], tried: Trial) -> str:
    def share(value: float | None) -> str:
        return "none to tell by" if value is None else f"{value:.0%}"

    lines = [
        f"{result['model']} has learned from {result['decisions']} decisions ({result['left_out']} left out: not listed, or {NEVER}). "
        f"A word counts once it stood in {LEAST_CASES} cases.",
        f"Tried on cases it had not seen: of what it flags {share(tried.precision)} is right, of what there is it finds {share(tried.recall)}.",
    ]
    if not result["listened_to"]:
        lines.append(f"The relay does not listen to it before it has seen {ENOUGH_DECISIONS} decisions.")
    return "\n".join(lines)
