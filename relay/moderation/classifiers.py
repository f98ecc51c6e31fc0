"""Who looks at disclosed text for a moment, in memory, so that the worst comes first: the small model, and plug-ins.

A classifier is an installed package with an entry point in the group `relay.classifiers`, named in `hooks.classifiers`. It
sees what a reporter has proved and nothing else. Its score raises a flag, which sorts the queue; nothing of the text and no
score is written. The model of the instance's own decisions is not listened to before it has seen 200 of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

import orjson
import structlog

from relay.config import ConfigError
from relay.moderation.bayes import BadModel, Model
from relay.moderation.flags import Flags
from relay.moderation.proof import Proof

log = structlog.get_logger("classifiers")

GROUP = "relay.classifiers"
RULE = "disclosed-text"
THRESHOLD = 0.8
MAX_TEXT = 20_000
MAX_MODEL_BYTES = 8 * 1024 * 1024
MAX_DEPTH = 20


class Classifier(Protocol):
    """`score`: how sure it is, 0 to 1, that a moderator would act on these messages of one person. It may not keep them."""

    name: str
    version: str

    def score(self, texts: Sequence[str]) -> float: ...


class Bayes:
    name = "bayes"

    def __init__(self, model: Model) -> None:
        self._model = model
        self.version = model.version

    def score(self, texts: Sequence[str]) -> float:
        return self._model.score(texts).probability if self._model.is_enough else 0.0


class Classifiers:
    def __init__(self, flags: Flags, names: Sequence[str], model_file: Path | None) -> None:
        """Raises ConfigError."""
        self._flags = flags
        self._all: list[Classifier] = [_installed(name) for name in names]
        if model_file is not None:
            self._all.append(Bayes(_model(model_file)))

    def opened(self, proof: Proof) -> None:
        """For `Disclosures.on_opened`: what was proved lies in memory just now."""
        if not self._all or not self._flags:
            return
        by_sender: dict[str, list[str]] = {}
        for one in proof.opened:
            if one.sender is not None and one.plaintext is not None and one.result in ("verified", "verified_remote"):
                by_sender.setdefault(one.sender, []).extend(texts_of(one.plaintext))
        for sender, texts in by_sender.items():
            for classifier in self._all:
                try:
                    score = float(classifier.score(texts))
                except Exception as error:
                    log.warning("a classifier failed", name=classifier.name, exc_info=error)
                    continue
                if score >= THRESHOLD:
                    self._flags.raise_(RULE, sender, score)


def texts_of(plaintext: bytes) -> list[str]:
    """What a person could read in an opened message: the strings of its content, keys and addresses aside."""
    try:
        value = orjson.loads(plaintext.decode("utf-8", "replace"))
    except orjson.JSONDecodeError:
        return []
    content = value.get("content") if isinstance(value, dict) else None
    found: list[str] = []
    level: list[Any] = [content] if isinstance(content, dict) else []
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for one in level:
            for key, part in one.items() if isinstance(one, dict) else enumerate(one):
                if isinstance(part, str) and key in ("body", "formatted_body", "name", "topic", "question", "answer"):
                    found.append(part[:MAX_TEXT])
                elif isinstance(part, dict | list):
                    below.append(part)
        level = below
    return found


def _installed(name: str) -> Classifier:
    found = list(entry_points(group=GROUP, name=name))
    if not found:
        raise ConfigError(
            f"hooks.classifiers: no classifier {name} is installed. Install its package, or take the name out."
        )
    try:
        classifier: Classifier = found[0].load()()
    except Exception as error:
        raise ConfigError(
            f"hooks.classifiers: {name} can't be started ({type(error).__name__}). Ask who made it."
        ) from error
    return classifier


def _model(file: Path) -> Model:
    try:
        if file.stat().st_size > MAX_MODEL_BYTES:
            raise BadModel("it is too large")
        return Model.of(orjson.loads(file.read_bytes()))
    except (OSError, orjson.JSONDecodeError, BadModel) as bad:
        raise ConfigError(
            f"hooks.classifier_model: {file} can't be used ({bad}). Make it with: relay classifier train"
        ) from bad
