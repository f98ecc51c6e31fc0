"""`relay report-proof` and `relay desk …` on the command line: tools of one's own machine, that need no relay and no network.

The first makes a proof from a client's key export, the second opens sealed envelopes and checks again what they hold.
"""

from __future__ import annotations

import argparse
import getpass
import hashlib
import time
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import orjson

from relay import folder
from relay.errors import BadJson
from relay.moderating import Grammar, Tell
from relay.moderation import bundle, envelope, evidence, megolm, proof_tool
from relay.moderation.disclosure_form import MAX_ITEMS
from relay.moderation.envelope import Envelope, NotOpened, Recipient, TooFewKeys
from relay.moderation.moderator_secret import BadKey, lock
from relay.moderation.proof_tool import Made, NoProof
from relay.moderator_line import asked, key_arguments, key_from
from relay.protocol.canonical import from_base64
from relay.protocol.event import Event, hash_matches
from relay.protocol.versions import VERSIONS
from relay.serving import OperatorError

MAX_FILE_BYTES = 256 * 2**20
PROOF_PAGE = "proof.html"


class ProofLine:
    def __init__(self, tell: Tell) -> None:
        self._tell = tell

    def join(self, grammar: Grammar) -> None:
        prove = grammar.add(
            "report-proof", self._prove, "make a proof code for encrypted messages, from your client's key export; works offline",
            "--keys element-keys.txt --event event.json", data=False,
        )  # fmt: skip
        prove.add_argument(
            "--keys",
            type=Path,
            required=True,
            metavar="FILE",
            help="the export: Element, Settings, Encryption, Export keys",
        )
        prove.add_argument("--event", type=Path, required=True, action="append", metavar="FILE",
                           help="the message as it was sent (original event source); several, or several in one file: up to 20")  # fmt: skip
        prove.add_argument(
            "--whole", action="store_true", help="put the ciphertext into the code, where the relay no longer has it"
        )
        prove.add_argument(
            "--passphrase-stdin", action="store_true", help="read the export's passphrase from standard input"
        )
        desk = grammar.group("desk", "a moderator's own machine: open sealed evidence without a browser")
        opens = desk.add(
            "open", self._open, "open envelopes with your key; works offline", "case.json --key alice.key", data=False
        )
        opens.add_argument("file", type=Path, metavar="FILE", help="envelopes as the relay gave them (JSON)")
        opens.add_argument("--case", metavar="ID", help="the case that they have to belong to")
        key_arguments(opens, "--key", "the file with your key; else you are asked for it")
        forward = desk.add(
            "forward", self._forward, "seal one proved message to another relay's moderators, without who reported it; works offline",
            "case.json --event EVENT_ID --to their-keys.json --out bundle.json --key alice.key", data=False,
        )  # fmt: skip
        forward.add_argument(
            "file", type=Path, metavar="FILE", help="the case's envelopes as the relay gave them (JSON)"
        )
        forward.add_argument("--event", required=True, metavar="ID", help="which message")
        forward.add_argument(
            "--to",
            type=Path,
            required=True,
            metavar="FILE",
            help="the other relay's keys as yours verified them (JSON)",
        )
        forward.add_argument("--out", type=Path, required=True, metavar="FILE", help="the file to be made")
        key_arguments(forward, "--key", "the file with your key; else you are asked for it")
        keep = desk.add("key", self._keep, "put a key into a file, under a passphrase", "--out alice.key", data=False)
        keep.add_argument("--out", type=Path, required=True, metavar="FILE", help="the file to be made")
        keep.add_argument(
            "--passphrase-stdin", action="store_true", help="read the key, then the passphrase, from standard input"
        )

    # --- relay report-proof

    def _prove(self, arguments: argparse.Namespace) -> int:
        try:
            events = [one for path in arguments.event for one in proof_tool.read_events(_text(path))]
            if len(events) > MAX_ITEMS:
                raise NoProof(f"These are more than {MAX_ITEMS} messages. Choose those that matter.")
            sessions = proof_tool.read_export(
                _text(arguments.keys), asked(arguments, f"Passphrase of {arguments.keys.name}: ")
            )
            made = [proof_tool.prove(one, sessions, whole=arguments.whole) for one in events]
        except NoProof as bad:
            raise OperatorError(str(bad)) from bad
        code = proof_tool.code(made)
        result = {"code": code, "messages": [_preview(one) for one in made]}
        return self._tell(arguments, result, lambda _: _proof_words(made, code))

    # --- relay desk open, relay desk key

    def _open(self, arguments: argparse.Namespace) -> int:
        given = _envelopes(_text(arguments.file))
        secret = key_from(arguments, "key")
        opened = []
        for value in given:
            if value.get("forgotten"):
                opened.append({"kind": value.get("kind"), "forgotten": True})
                continue
            try:
                sealed = Envelope.read(value)
                text = envelope.open_with(
                    secret, sealed, case_id=arguments.case or sealed.case_id, version=sealed.version
                )
            except NotOpened as bad:
                raise OperatorError(str(bad)) from bad
            opened.append(
                {"case_id": sealed.case_id, "version": sealed.version, "kind": value.get("kind"), **_content(text)}
            )
        return self._tell(arguments, opened, _opened_words)

    def _forward(self, arguments: argparse.Namespace) -> int:
        try:
            server, to = bundle.read_recipients(_json(_text(arguments.to)))
        except BadKey as bad:
            raise OperatorError(str(bad)) from bad
        secret = key_from(arguments, "key")
        for value in _envelopes(_text(arguments.file)):
            if value.get("forgotten") or value.get("kind") not in (None, "evidence"):
                continue
            try:
                sealed = Envelope.read(value)
                text = envelope.open_with(secret, sealed, case_id=sealed.case_id, version=sealed.version)
            except NotOpened as bad:
                raise OperatorError(str(bad)) from bad
            for item in orjson.loads(text).get("items", ()):
                if item.get("event_id") == arguments.event and item.get("plaintext") is not None:
                    return self._forwarded(arguments, server, to, item)
        raise OperatorError("None of these envelopes holds a proof of that message. See: relay desk open")

    def _forwarded(
        self, arguments: argparse.Namespace, server: str, to: Sequence[Recipient], item: Mapping[str, Any]
    ) -> int:
        try:
            made = bundle.sealed_to(to, item)
        except TooFewKeys as bad:
            raise OperatorError(
                f"{server} gave fewer than two keys, so nothing is sealed to it. Write to its operators instead."
            ) from bad
        body = {"event_id": item["event_id"], "envelope": made.json()}
        folder.write_durably(arguments.out, orjson.dumps(body) + b"\n", folder.SECRET_MODE)
        result = {"server": server, "sha256": made.digest.hex(), "file": str(arguments.out)}
        return self._tell(arguments, result, _forwarded_words)

    def _keep(self, arguments: argparse.Namespace) -> int:
        arguments.key = None
        secret = key_from(arguments, "key")
        passphrase = asked(arguments, "A passphrase for the file: ")
        if not arguments.passphrase_stdin and passphrase != getpass.getpass("The same once more: "):
            raise OperatorError("The two passphrases differ. Nothing was written; try again.")
        if not passphrase:
            raise OperatorError("The passphrase is empty. Nothing was written; try again.")
        if arguments.out.exists():
            raise OperatorError(f"{arguments.out} is there already. Give another name with --out.")
        folder.write_durably(
            arguments.out,
            orjson.dumps(lock(secret, passphrase), option=orjson.OPT_INDENT_2) + b"\n",
            folder.SECRET_MODE,
        )
        key_id = secret.public.key_id
        return self._tell(
            arguments,
            {"key_id": key_id, "file": str(arguments.out)},
            lambda _: f"{arguments.out} holds the key {key_id} under your passphrase.",
        )


def proof_page_hash() -> str:
    """What the release page names too, so that a saved copy can be compared."""
    return hashlib.sha256((resources.files("relay.pages") / "static" / PROOF_PAGE).read_bytes()).hexdigest()


# --- checking again ------------------------------------------------------------------------------------------------


def checked_again(item: Mapping[str, Any]) -> str | None:
    """V3, V4 and V6 to V10 on this machine, over what the envelope holds; None where they hold, else which does not. The
    server's signature (V5) needs its key, and V1, V11 and V12 the relay."""
    try:
        version = VERSIONS[item["room_version"]]
        if evidence.identity(item["pdu"], version) != item["event_id"]:
            return "V4"
        if not hash_matches(Event(item["pdu"], item["event_id"], version)):
            return "V3"
        megolm.open_message(item["pdu"]["content"], from_base64(item["prk"]), item["index"], item["room_id"])
    except megolm.Unproven as not_so:
        return not_so.step
    except (KeyError, TypeError, BadJson):
        return "what the envelope holds is incomplete"
    return None


def _content(text: bytes) -> dict[str, Any]:
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return {"text": text.decode("utf-8", "replace")}
    if not isinstance(value, dict) or not isinstance(value.get("items"), list):
        return {"content": value}
    if "relay.evidence" not in value:
        return {"disclosure": value}
    messages = []
    for item in value["items"]:
        shown = {
            key: item.get(key)
            for key in (
                "event_id",
                "room_id",
                "sender",
                "origin_server_ts",
                "result",
                "step",
                "reason",
                "flags",
                "attested_by",
                "copied_from",
                "media",
            )
        }
        if item.get("plaintext") is not None:
            shown["text"] = from_base64(item["plaintext"]).decode("utf-8", "replace")
            failed = checked_again(item)
            shown["checked_again"] = "holds" if failed is None else f"does not hold: {failed}"
        messages.append(shown)
    return {"messages": messages}


def _envelopes(text: str) -> list[dict[str, Any]]:
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as bad:
        raise OperatorError("This file is no JSON. Save the case's envelopes as the relay gives them.") from bad
    if isinstance(value, dict):
        value = value.get("envelopes", [value])
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise OperatorError("This file holds no envelopes. Save the case's envelopes as the relay gives them.")
    return value


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise OperatorError(f"{path} is too large to be such a file. Check its name.")
        return path.read_text("utf-8", "replace")
    except OSError as bad:
        raise OperatorError(f"{path} can't be read: {bad.strerror}. Check its name.") from bad


def _json(text: str) -> dict[str, Any]:
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise OperatorError(
            "This file holds no list of another relay's keys. Save what your relay answers under /_relay/safety/v1/peers/SERVER/keys."
        )
    return value


# --- words ---------------------------------------------------------------------------------------------------------


def harmless(text: str) -> str:
    """What a stranger wrote, for a terminal: no character of it may move the cursor or turn the line round."""
    return "".join(letter if letter.isprintable() or letter == "\n" else f"\\u{ord(letter):04x}" for letter in text)


def _when(ms: object) -> str:
    return (
        time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(ms / 1000)) if isinstance(ms, int) and 0 <= ms < 2**42 else "?"
    )


def _preview(one: Made) -> dict[str, Any]:
    return {
        "event_id": one.event["event_id"],
        "sender": one.event.get("sender"),
        "origin_server_ts": one.event.get("origin_server_ts"),
        "text": one.plaintext.decode("utf-8", "replace"),
    }


def _proof_words(made: Sequence[Made], code: str) -> str:
    lines = ["You are about to disclose:"]
    for one in made:
        shown = _preview(one)
        lines.append(harmless(f"  {shown['sender']}, {_when(shown['origin_server_ts'])}: {shown['text']}"))
    lines += [
        "The code opens these messages and no others. Paste it into the page behind your link, and nowhere else:",
        code,
    ]
    return "\n".join(lines)


def _forwarded_words(result: Any) -> str:
    return (
        f"{result['file']} can be opened by the moderators of {result['server']} only, and names neither reporter nor reason. "
        "Hand it to your relay: POST /_relay/safety/v1/reports/CASE/forward"
    )


def _opened_words(result: Any) -> str:
    lines = []
    for one in result:
        if one.get("forgotten"):
            lines.append(f"{one['kind']}: forgotten; nobody can open it any more.")
            continue
        lines.append(harmless(f"case {one['case_id']}, {one['kind'] or 'text'}, version {one['version']}"))
        for message in one.get("messages", ()):
            step = f" at {message['step']}" if message["step"] else ""
            lines.append(
                harmless(
                    f"  {message['sender']}, {_when(message['origin_server_ts'])}, {message['event_id']}: {message['result']}{step}"
                )
            )
            if message["flags"]:
                lines.append(harmless(f"    {', '.join(message['flags'])}"))
            if "text" in message:
                lines += [harmless(f"    {message['text']}"), f"    checked again here: {message['checked_again']}"]
        if "text" in one:
            lines.append(harmless(f"  {one['text']}"))
        if "disclosure" in one:
            events = ", ".join(
                str(item.get("event_id")) for item in one["disclosure"]["items"] if isinstance(item, dict)
            )
            lines.append(
                harmless(
                    f"  a proof of {events}, from another relay's moderators. With --json it is what your relay checks:"
                )
            )
            lines.append("  POST /_relay/safety/v1/reports/CASE/proof")
        if "content" in one:
            lines.append(harmless("  " + orjson.dumps(one["content"], option=orjson.OPT_INDENT_2).decode()))
    return "\n".join(lines) or "There is no envelope in this file."
