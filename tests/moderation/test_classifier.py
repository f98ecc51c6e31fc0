"""The small classifier: what it learns, what it must not keep, and that it only sorts the queue."""

from __future__ import annotations

import base64
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.__main__ import main
from relay.config import ConfigError
from relay.config.hooks import Flags as FlagSettings
from relay.moderation.bayes import ENOUGH_DECISIONS, LEAST_CASES, BadModel, Example, Model, trained, trial
from relay.moderation.classifiers import RULE, Classifiers, texts_of
from relay.moderation.proof import Proof, ProvedItem

KEY = bytes(range(32))
BAD, GOOD = (
    ["pay", "now", "bitcoin", "wallet", "urgent", "click", "link"],
    ["see", "you", "tomorrow", "thanks", "lovely", "show", "evening"],
)


def decided(number: int, seed: int = 1) -> list[Example]:
    chance = random.Random(seed)
    return [
        Example(f"case-{n}", (" ".join(chance.choices(BAD if n % 2 else GOOD, k=8)),), bool(n % 2))
        for n in range(number)
    ]


def test_it_learns_what_moderators_decided() -> None:
    examples = decided(60)
    model = trained(examples, KEY)
    assert (
        model.score(["URGENT: pay the wallet!"]).probability
        > 0.9
        > 0.1
        > model.score(["thanks, lovely evening"]).probability
    )
    assert 0.3 < model.score(["nothing that it knows"]).probability < 0.7, "of what it does not know it says nothing"
    tried = trial(examples, KEY, 0.8)
    assert tried.precision is not None and tried.precision > 0.9 and tried.recall is not None and tried.recall > 0.9
    assert not model.is_enough and trained(decided(ENOUGH_DECISIONS), KEY).is_enough


def test_a_word_counts_once_it_stood_in_five_cases_and_no_word_is_kept() -> None:
    few = [Example(f"c{n}", ("secretword secretword",), True) for n in range(LEAST_CASES - 1)]
    assert trained(few, KEY).score(["secretword"]).words == 0, "four cases might be one person"
    same = [Example("one case", (f"secretword {n}",), True) for n in range(50)]
    assert trained(same, KEY).score(["secretword"]).words == 0, "many messages of one case are one case"
    model = trained([*few, Example("c9", ("SecretWord!",), False)], KEY)
    assert model.score(["secretword"]).words == 1
    assert "secretword" not in json.dumps(model.as_json()), "the file holds hashes"
    assert Model.of(model.as_json()).version == model.version, "it reads back as it was"


@pytest.mark.parametrize(
    "value",
    [None, [], {}, {"relay.bayes": 2}, {"relay.bayes": 1, "key": "AA", "acted": 1, "dismissed": 1, "counts": {}},
     {"relay.bayes": 1, "key": "A" * 43, "acted": -1, "dismissed": 1, "counts": {}},
     {"relay.bayes": 1, "key": "A" * 43, "acted": 1, "dismissed": 1, "counts": {"1": [1]}},
     {"relay.bayes": 1, "key": "A" * 43, "acted": 1, "dismissed": 1, "counts": {"x": [1, 1]}}],
)  # fmt: skip
def test_a_damaged_model_is_refused(value: Any) -> None:
    with pytest.raises(BadModel):
        Model.of(value)


@given(
    st.binary(max_size=200)
    | st.recursive(
        st.text(max_size=5), lambda x: st.dictionaries(st.sampled_from(["content", "body", "a"]), x, max_size=3)
    ).map(lambda v: json.dumps(v).encode())
)
def test_whatever_was_disclosed_is_read_without_harm(plaintext: bytes) -> None:
    for text in texts_of(plaintext):
        trained([Example("a", (text,), True)], KEY).score([text])


def proof(sender: str, body: str, result: Any = "verified") -> Proof:
    plaintext = json.dumps({"type": "m.room.message", "content": {"body": body}, "room_id": "!r:x"}).encode()
    return Proof((ProvedItem("$e", result, sender=sender, plaintext=plaintext),))


class Watching:
    """Stands for `Flags`."""

    def __init__(self) -> None:
        self.raised: list[tuple[str, str]] = []

    def __bool__(self) -> bool:
        return True

    def raise_(self, rule: str, subject: str, value: float) -> None:
        self.raised.append((rule, subject))


def test_it_only_raises_flags_and_only_for_what_was_proved(tmp_path: Path) -> None:
    file = tmp_path / "classifier.json"
    file.write_text(json.dumps(trained(decided(ENOUGH_DECISIONS), KEY).as_json()))
    flags: Any = Watching()
    classifiers = Classifiers(flags, [], file)
    classifiers.opened(proof("@mallory:x", "pay now, urgent: bitcoin wallet"))
    classifiers.opened(proof("@carol:x", "thanks, lovely evening"))
    classifiers.opened(proof("@alice:x", "pay now, urgent: bitcoin wallet", "needs_human"))
    assert flags.raised == [(RULE, "@mallory:x")]
    file.write_text(json.dumps(trained(decided(ENOUGH_DECISIONS - 2), KEY).as_json()))
    early = Classifiers(flags, [], file)
    early.opened(proof("@bob:x", "pay now, urgent: bitcoin wallet"))
    assert len(flags.raised) == 1, "a young model is not listened to"
    file.write_text("{}")
    with pytest.raises(ConfigError, match="relay classifier train"):
        Classifiers(flags, [], file)
    with pytest.raises(ConfigError, match="installed"):
        Classifiers(flags, ["absent"], None)
    assert FlagSettings().mode == "shadow", "by default a flag is only shown"


def test_an_installed_classifier_is_asked_and_may_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "installed"
    (place / "wary-1.dist-info").mkdir(parents=True)
    (place / "wary.py").write_text(
        "class Wary:\n    name, version = 'wary', '1'\n    def score(self, texts):\n"
        "        if 'boom' in texts:\n            raise ValueError\n        return float('knife' in ' '.join(texts))\n"
    )
    (place / "wary-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: wary\nVersion: 1\n")
    (place / "wary-1.dist-info" / "entry_points.txt").write_text("[relay.classifiers]\nwary = wary:Wary\n")
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.delitem(sys.modules, "wary", raising=False)
    flags: Any = Watching()
    classifiers = Classifiers(flags, ["wary"], None)
    for body in ("boom", "a knife", "flowers"):
        classifiers.opened(proof(f"@{body[-5:].strip()}:x", body))
    assert flags.raised == [(RULE, "@knife:x")]


def test_training_on_a_moderators_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def opened(examples: list[Example], name: str) -> str:
        value = [
            {"case_id": one.case_id, "version": 1, "kind": "evidence", "items": [
                {"event_id": "$e", "plaintext": base64.b64encode(json.dumps({"content": {"body": text}}).encode()).decode().rstrip("=")}
                for text in one.texts]}
            for one in examples
        ]  # fmt: skip
        (tmp_path / name).write_text(json.dumps(value))
        return str(tmp_path / name)

    examples = decided(40)
    cases = [{"id": one.case_id, "category": "minor" if n == 1 else "spam"} for n, one in enumerate(examples[:-2])]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    model = tmp_path / "classifier.json"
    arguments = ["classifier", "train", str(model), "--cases", str(tmp_path / "cases.json")]
    acted, dismissed = (
        opened([e for e in examples if e.acted], "a.json"),
        opened([e for e in examples if not e.acted], "d.json"),
    )
    assert main([*arguments, "--acted", acted, "--dismissed", dismissed, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["decisions"] == 37 and told["left_out"] == 3, (
        "what is of the category minor, or unknown, teaches nothing"
    )
    assert not told["listened_to"] and told["precision"] is not None
    assert model.stat().st_mode & 0o777 == 0o600
    assert main([*arguments, "--acted", acted]) == 0
    assert "does not listen" in capsys.readouterr().out
    (tmp_path / "cases.json").write_text("[]")
    assert main([*arguments, "--acted", acted]) == 1, "without a case there is nothing to learn"
