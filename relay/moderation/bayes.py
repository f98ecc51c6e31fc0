"""A small classifier of disclosed text: naive Bayes over single words, each known only by a keyed hash. Pure.

It learns from what moderators decided, on a moderator's machine (`relay classifier train`); the relay only scores with it.
A word counts once it stood in five cases. The model holds hashes and counts, no words; whoever has it and its key can still
try words out, so it is as private as the data folder. What it says can sort the queue and nothing else.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from relay.protocol.canonical import from_base64, to_base64

BUCKETS = 2**16
LEAST_CASES = 5
# Fewer decisions than this and the model is not listened to.
ENOUGH_DECISIONS = 200
MAX_WORDS = 2_000
KEY_BYTES = 32
VERSION = 1
_WORD = re.compile(r"\w+")


class BadModel(Exception):
    """A file that is no model of this version."""


@dataclass(frozen=True, slots=True)
class Example:
    """One case as it was decided. `acted`: a measure was taken."""

    case_id: str
    texts: tuple[str, ...]
    acted: bool


@dataclass(frozen=True, slots=True)
class Score:
    """`probability` that a moderator would act; `words` is how many known words it rests on."""

    probability: float
    words: int


def buckets(text: str, key: bytes) -> set[int]:
    """The words of a text as numbers. Case and marks do not matter."""
    return {
        int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), key=key, digest_size=4).digest())
        % BUCKETS
        for word in _WORD.findall(text.casefold())[:MAX_WORDS]
    }


class Model:
    """`counts` maps a word's number to (acted, dismissed): in how many cases of each kind it stood."""

    def __init__(self, key: bytes, acted: int, dismissed: int, counts: Mapping[int, tuple[int, int]]) -> None:
        self.key = key
        self.acted = acted
        self.dismissed = dismissed
        self._counts = dict(counts)

    @property
    def decisions(self) -> int:
        return self.acted + self.dismissed

    @property
    def version(self) -> str:
        """A name for the log: the same model has the same one."""
        return f"bayes-{hashlib.sha256(repr(sorted(self._counts.items())).encode()).hexdigest()[:12]}"

    @property
    def is_enough(self) -> bool:
        return self.decisions >= ENOUGH_DECISIONS

    def score(self, texts: Iterable[str]) -> Score:
        """A word that stood in no case, or in too few, says nothing."""
        odds = math.log((self.acted + 1) / (self.dismissed + 1))
        known = {b for text in texts for b in buckets(text, self.key)} & self._counts.keys()
        for bucket in known:
            acted, dismissed = self._counts[bucket]
            odds += math.log((acted + 1) / (self.acted + 2)) - math.log((dismissed + 1) / (self.dismissed + 2))
        return Score(1 / (1 + math.exp(-max(-30.0, min(30.0, odds)))), len(known))

    def as_json(self) -> dict[str, Any]:
        return {
            "relay.bayes": VERSION,
            "key": to_base64(self.key),
            "acted": self.acted,
            "dismissed": self.dismissed,
            "counts": {str(bucket): list(pair) for bucket, pair in sorted(self._counts.items())},
        }

    @classmethod
    def of(cls, value: object) -> Model:
        """Raises BadModel."""
        try:
            if not isinstance(value, dict) or value["relay.bayes"] != VERSION:
                raise BadModel("it is not a model of this version")
            key = from_base64(value["key"])
            counts = {int(bucket): (int(pair[0]), int(pair[1])) for bucket, pair in value["counts"].items()}
            model = cls(key, int(value["acted"]), int(value["dismissed"]), counts)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as bad:
            raise BadModel("it is damaged") from bad
        if (
            len(key) != KEY_BYTES
            or model.acted < 0
            or model.dismissed < 0
            or any(a < 0 or d < 0 for a, d in counts.values())
        ):
            raise BadModel("it is damaged")
        return model


def trained(examples: Sequence[Example], key: bytes) -> Model:
    """Each case counts once, however many messages it has."""
    by_case: dict[str, Example] = {one.case_id: one for one in examples}
    acted: Counter[int] = Counter()
    dismissed: Counter[int] = Counter()
    for one in by_case.values():
        (acted if one.acted else dismissed).update({b for text in one.texts for b in buckets(text, key)})
    counts = {
        bucket: (acted[bucket], dismissed[bucket])
        for bucket in acted.keys() | dismissed.keys()
        if acted[bucket] + dismissed[bucket] >= LEAST_CASES
    }
    number = sum(one.acted for one in by_case.values())
    return Model(key, number, len(by_case) - number, counts)


@dataclass(frozen=True, slots=True)
class Trial:
    """How a model does on cases that it has not seen: what it flags rightly, and what it finds of what there is."""

    tried: int
    precision: float | None
    recall: float | None


def trial(examples: Sequence[Example], key: bytes, threshold: float) -> Trial:
    """Trains on four fifths, tries on the fifth, five times over."""
    hits = flagged = there = 0
    for part in range(5):
        model = trained([one for place, one in enumerate(examples) if place % 5 != part], key)
        for place, one in enumerate(examples):
            if place % 5 == part:
                raised = model.score(one.texts).probability >= threshold
                flagged += raised
                there += one.acted
                hits += raised and one.acted
    return Trial(len(examples), hits / flagged if flagged else None, hits / there if there else None)
