"""The command line of proof: keys made by `relay user add --admin`, `relay moderator …`, `relay desk …`, `relay report-proof`."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nio.crypto.key_export import encrypt_and_save

from relay.__main__ import main
from relay.moderation import envelope
from relay.moderation.disclosure_form import parse_code, parse_disclosure
from relay.moderation.envelope import Recipient
from relay.moderation.moderator_secret import ModeratorSecret, lock
from relay.moderation.proof import Proof, ProvedItem
from relay.protocol import event as events
from relay.protocol.signing import SigningKey
from relay.protocol.versions import VERSIONS
from tests.canaries import Canaries
from tests.moderation.sessions import Session, b64

Line = Callable[..., Any]


class Terminal:
    """`relay …` on a data folder, in this process; what it said, and where it ended."""

    def __init__(self, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.data = data
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *words: str, given: str = "", data: bool = True, ends: int = 0) -> str:
        self._monkeypatch.setattr("sys.stdin", io.StringIO(given))
        status = main([*words, *(("--data", str(self.data)) if data else ())])
        said = self._capsys.readouterr()
        assert status == ends, said.err
        return said.out if ends == 0 else said.err

    def json(self, *words: str, **more: Any) -> Any:
        return json.loads(self(*words, "--json", **more))


@pytest.fixture
def relay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    terminal = Terminal(tmp_path / "data", monkeypatch, capsys)
    terminal("init", "--server-name", "localhost", "--port", "0")
    return terminal


def password(name: str) -> str:
    return f"a long password of {name}\n"


def test_a_life_with_moderators_keys(relay: Terminal, tmp_path: Path) -> None:
    relay("user", "add", "carol", "--password-stdin", given=password("carol"))
    assert "no moderators' keys" in relay("check"), "an operator is told"
    assert "no moderators yet" in relay("moderator", "list")
    added = relay.json("user", "add", "alice", "--admin", "--password-stdin", given=password("alice"))
    own, recovery = (ModeratorSecret.read(added[name]) for name in ("moderator_key", "recovery_key"))
    checked = relay("check")
    assert "sealed to 2 moderators' keys" in checked and "proof.html) has the SHA-256" in checked
    again = relay("user", "add", "bob", "--admin", "--password-stdin", given=password("bob"))
    assert "rmk1-" not in again, "the second admin gets a key from a moderator, not from the relay"

    kept = tmp_path / "alice.key"
    relay("desk", "key", "--out", str(kept), "--passphrase-stdin", given=f"{own.text}\npass\n", data=False)
    assert own.text not in kept.read_text() and kept.stat().st_mode & 0o077 == 0
    # The same with less work, for the sake of this test's time.
    kept.write_text(json.dumps(lock(own, "pass", iterations=1000)))
    assert "passphrase does not open" in relay(
        "moderator", "test", "--key", str(kept), "--passphrase-stdin", given="no\n", ends=1
    )
    assert "opens what is sealed" in relay(
        "moderator", "test", "--key", str(kept), "--passphrase-stdin", given="pass\n"
    )
    stranger = ModeratorSecret.make()
    assert "not on the list" in relay("moderator", "test", "--passphrase-stdin", given=stranger.text, ends=1)

    refused = relay("moderator", "add", "carol", "--passphrase-stdin", given=stranger.text, ends=1)
    assert "signed by no key that counts" in refused
    assert "no open account" in relay("moderator", "add", "nobody", "--passphrase-stdin", given=own.text, ends=1)
    hers = relay.json("moderator", "add", "carol", "--sign-with", str(kept), "--passphrase-stdin", given="pass\n")
    assert ModeratorSecret.read(hers["key"]).public.key_id == hers["key_id"]
    assert (tmp_path / "alice.key.list").exists(), "the list that was seen is pinned beside the key"
    rows = {row["key_id"]: row for row in relay.json("moderator", "list")}
    assert rows[hers["key_id"]]["state"] == "waits" and rows[own.public.key_id]["state"] == "counts"
    assert rows[None]["user_id"] == "@bob:localhost" and rows[None]["state"] == "has no key"
    assert "counts from tomorrow on" in relay("check")

    second = relay.json(
        "moderator", "add", "bob", "--public", stranger.public.text, "--passphrase-stdin", given=recovery.text
    )
    assert second["key"] is None and second["key_id"] == stranger.public.key_id, (
        "a key that he made himself in the desk"
    )
    too_few = relay("moderator", "remove", recovery.public.key_id, "--passphrase-stdin", given=own.text, ends=1)
    assert "A recovery key has to remain" in too_few
    relay("moderator", "remove", "carol", "--sign-with", str(kept), "--passphrase-stdin", given="pass\n")
    assert hers["key_id"] not in {row["key_id"] for row in relay.json("moderator", "list")}
    assert "0 sealed texts" in relay("moderator", "rewrap", "--key", str(kept), "--passphrase-stdin", given="pass\n")

    # A relay that was broken into comes with a history of its own.
    pinned = tmp_path / "alice.key.list"
    other = json.loads(pinned.read_text())
    pinned.write_text(json.dumps({**other, "made_ts": other["made_ts"] + 1}))
    warned = relay("moderator", "rewrap", "--key", str(kept), "--passphrase-stdin", given="pass\n", ends=1)
    assert "does not follow from the one you saw last" in warned
    rows_on_disk = b"".join(path.read_bytes() for path in relay.data.rglob("*") if path.is_file())
    for secret in (own, recovery):
        for needle in (secret.raw, secret.raw.hex().encode(), b64(secret.raw).encode()[:-1], secret.text.encode()):
            assert needle not in rows_on_disk, "no private half ever lay on the relay's disk"


class Export:
    """What Element would export: the sessions of one person, under a passphrase."""

    def __init__(self, folder: Path, *sessions: Session, begins: int = 0) -> None:
        self.path = folder / "element-keys.txt"
        self.path.unlink(missing_ok=True)
        rows = [
            {"algorithm": "m.megolm.v1.aes-sha2", "room_id": "!r", "session_id": one.id, "sender_key": "x",
             "session_key": one.inbound.export_at(begins).to_base64()}
            for one in sessions
        ]  # fmt: skip
        encrypt_and_save(json.dumps(rows).encode(), str(self.path), "pass", count=1000)


def written(folder: Path, *given: Any) -> str:
    path = folder / "event.json"
    path.write_text("\n".join(json.dumps(one) for one in given))
    return str(path)


def test_a_proof_is_made_offline(relay: Terminal, tmp_path: Path) -> None:
    session, room = Session(), "!r"
    sent = [
        {
            "event_id": f"$e{n}",
            "sender": "@eve:x",
            "origin_server_ts": 1,
            "content": session.says(room, f"word {n}\x1b[2J"),
        }
        for n in range(3)
    ]
    export = Export(tmp_path, session)

    def proves(*given: Any, passphrase: str = "pass", more: tuple[str, ...] = (), **how: Any) -> str:
        words = (
            "report-proof",
            "--keys",
            str(export.path),
            "--event",
            written(tmp_path, *given),
            "--passphrase-stdin",
            *more,
        )
        return relay(*words, given=passphrase + "\n", data=False, **how)

    said = proves(sent[2], sent[0])
    assert "word 2\\u001b[2J" in said and "\x1b" not in said, "what a stranger wrote moves no cursor"
    items = parse_code(said.splitlines()[-1], category="threat", good_faith=True).items
    assert [(one.event_id, one.index, one.prk, one.content) for one in items] == [
        ("$e2", 2, session.prk(2), None), ("$e0", 0, session.prk(0), None),
    ]  # fmt: skip
    whole = json.loads(proves(sent[1], more=("--whole", "--json")))
    assert parse_code(whole["code"], category="other", good_faith=True).items[0].content == sent[1]["content"]
    assert "word 1" in whole["messages"][0]["text"]

    assert "passphrase does not open" in proves(sent[0], passphrase="no", ends=1)
    assert "original event source" in proves({"event_id": "$e", "content": {"body": "x"}}, ends=1)
    assert "no longer has" in proves({"event_id": "$e", "content": {}, "ciphertext_gone": True}, ends=1)
    assert "more than 20" in proves(*(sent[:1] * 21), ends=1)
    text = sent[0]["content"]["ciphertext"]
    altered = {
        **sent[0],
        "content": {**sent[0]["content"], "ciphertext": text[:30] + ("A" if text[30] != "A" else "B") + text[31:]},
    }
    assert "do not open this message" in proves(altered, ends=1)
    other = {**sent[0], "content": Session().says(room, "x")}
    assert "no key for a message" in proves(other, ends=1)
    export = Export(tmp_path, session, begins=2)
    assert "begins after this message" in proves(sent[0], ends=1)
    export.path.write_text("something else")
    assert "not an export" in proves(sent[0], ends=1)


def test_a_moderator_opens_and_checks_again_without_a_browser(relay: Terminal, tmp_path: Path) -> None:
    canaries = Canaries()
    own, recovery, stranger = (ModeratorSecret.make() for _ in range(3))
    to = [Recipient(one.public.key_id, "@alice:one", one.public) for one in (own, recovery)]
    session, room, word = Session(), "!room:one", canaries("a word")
    pdu = {
        "room_id": room, "type": "m.room.encrypted", "sender": "@eve:one", "content": session.says(room, word), "depth": 5,
        "prev_events": [], "auth_events": [], "origin_server_ts": 1,
    }  # fmt: skip
    event = events.sign(pdu, VERSIONS["11"], "one", SigningKey.generate("ed25519:a"))

    def item(event_id: str = event.id, index: int = 0) -> ProvedItem:
        return ProvedItem(
            event_id, "verified", sender="@eve:one", room_id=room, origin_server_ts=1, index=index, room_version="11",
            pdu=event.pdu, plaintext=b"\x1b[1m" + word.encode(), prk=session.prk(0),
        )  # fmt: skip

    def saved(proof: Proof, **change: Any) -> str:
        made = envelope.seal(proof.evidence(), case_id="case-1", version=1, to=to).json()
        path = tmp_path / "case.json"
        path.write_text(json.dumps({"envelopes": [{**made, "kind": "evidence", **change}]}))
        return str(path)

    def opens(path: str, secret: ModeratorSecret = own, *more: str, **how: Any) -> str:
        return relay("desk", "open", path, "--passphrase-stdin", *more, given=secret.text + "\n", data=False, **how)

    for secret in (own, recovery):
        said = opens(saved(Proof((item(),))), secret)
        assert word in said and "\x1b" not in said and "checked again here: holds" in said
    lied = opens(saved(Proof((item(index=1),))))
    assert "does not hold: V6" in lied, "whoever sealed it may have lied"
    assert "does not hold: V4" in opens(saved(Proof((item("$another"),))))
    assert "not sealed to your key" in opens(saved(Proof((item(),))), stranger, ends=1)
    assert "another case" in opens(saved(Proof((item(),))), own, "--case", "case-2", ends=1)
    assert "another case" not in opens(saved(Proof((item(),))), own, "--case", "case-1")
    assert "The wrapped key was changed" in opens(saved(Proof((item(),)), version=2), ends=1)
    assert "forgotten" in opens(saved(Proof((item(),)), forgotten=True))
    # To another relay's moderators: one message, and nothing that says who reported it.
    theirs = [ModeratorSecret.make(), ModeratorSecret.make()]
    published = tmp_path / "their-keys.json"
    keys = [{"key_id": one.public.key_id, "public": one.public.text} for one in theirs]
    published.write_text(json.dumps({"server": "two", "keys": keys}))
    made = tmp_path / "bundle.json"
    words = (
        "desk",
        "forward",
        saved(Proof((item(),))),
        "--to",
        str(published),
        "--out",
        str(made),
        "--passphrase-stdin",
    )
    relay(*words, "--event", event.id, given=own.text, data=False)
    body = json.loads(made.read_text())
    assert body["event_id"] == event.id
    made.write_text(json.dumps(body["envelope"]))
    assert f"a proof of {event.id}" in opens(str(made), theirs[0])
    [there] = json.loads(opens(str(made), theirs[1], "--json"))
    [given] = parse_disclosure({**there["disclosure"], "category": "other"}).items
    assert (given.event_id, given.index, given.prk) == (event.id, 0, session.prk(0)), (
        "what their relay checks by itself"
    )
    assert "not sealed to your key" in opens(str(made), own, ends=1)
    assert "None of these envelopes" in relay(*words, "--event", "$other", given=own.text, data=False, ends=1)
    published.write_text(json.dumps({"server": "two", "keys": keys[:1]}))
    assert "fewer than two keys" in relay(*words, "--event", event.id, given=own.text, data=False, ends=1)
    published.write_text(json.dumps({"server": "two", "keys": [5, 6]}))
    assert "begins with rmp1-" in relay(*words, "--event", event.id, given=own.text, data=False, ends=1)
    (tmp_path / "no.json").write_text("[5]")
    assert "no envelopes" in opens(str(tmp_path / "no.json"), ends=1)
