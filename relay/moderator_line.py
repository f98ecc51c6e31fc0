"""`relay moderator …`, and the keys that `relay user add --admin` makes: secrets are made and used in this process, on the
operator's terminal; the relay gets public halves and signatures. What the rules are stands in moderation/key_list.py.
"""

from __future__ import annotations

import argparse
import getpass
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from relay import folder
from relay.moderating import Ask, Grammar, Tell
from relay.moderation import envelope, key_list
from relay.moderation.envelope import Envelope, NotOpened, Recipient
from relay.moderation.key_list import BadList, KeyList
from relay.moderation.moderator_keys import CLOCK_TOLERANCE, proof_of
from relay.moderation.moderator_secret import BadKey, ModeratorPublic, ModeratorSecret, unlock
from relay.protocol.canonical import to_base64
from relay.serving import OperatorError

MAX_KEY_FILE_BYTES = 64 * 1024
PIN_SUFFIX = ".list"

SHOWN_ONCE = "They are shown this once, and kept nowhere: write them down now."


class ModeratorLine:
    def __init__(self, ask: Ask, tell: Tell) -> None:
        self._ask = ask
        self._tell = tell
        self._now = 0

    def join(self, grammar: Grammar) -> None:
        moderators = grammar.group("moderator", "who may open sealed evidence, and with which keys")
        add = moderators.add(
            "add", self._add, "let somebody moderate: her key is signed in, and counts a day later (the first at once)",
            "bob --sign-with alice.key --data data",
        )  # fmt: skip
        add.add_argument("name", metavar="NAME", help="alice, or @alice:example.org")
        add.add_argument(
            "--public", metavar="rmp1-…", help="the public half of a key that she made herself, in the desk"
        )
        add.add_argument("--recovery", action="store_true", help="a recovery key, to be kept away from the others")
        remove = moderators.add(
            "remove", self._remove, "take a key off the list: it gets nothing new from now on, and loses the old a day later",
            "bob --sign-with alice.key --data data",
        )  # fmt: skip
        remove.add_argument("name", metavar="NAME", help="whose moderator's keys, or the ID of one key")
        moderators.add("list", self._list, "list moderators and their keys", "--json --data data")
        test = moderators.add(
            "test", self._test, "prove that a key still opens what is sealed to it", "--key alice.key --data data"
        )
        rewrap = moderators.add(
            "rewrap",
            self._rewrap,
            "open what is sealed and wrap it for keys that were added later",
            "--key alice.key --data data",
        )
        for parser in (add, remove):
            key_arguments(parser, "--sign-with", "a moderator's key or the recovery key; else you are asked for it")
        for parser in (test, rewrap):
            key_arguments(parser, "--key", "the file with your key; else you are asked for it")

    # --- the first keys

    def first_keys(self, data_dir: Path, user_id: str) -> dict[str, str] | None:
        """Makes the first moderator's key and a recovery key, where there is none yet; the secrets, to be shown once."""
        known = self._ask(data_dir, "moderator.chain", {})
        if known["chain"]:
            return None
        own, recovery = ModeratorSecret.make(), ModeratorSecret.make()
        made = key_list.first(
            known["server"], ((user_id, "moderator", own.public), (user_id, "recovery", recovery.public)), recovery, known["now"]
        )  # fmt: skip
        self._ask(data_dir, "moderator.change", {"statement": made.statement})
        return {"moderator_key": own.text, "recovery_key": recovery.text}

    def _add(self, arguments: argparse.Namespace) -> int:
        user_id = folder.user_id(arguments.name, folder.load_settings(arguments.data))
        keys = None if arguments.public or arguments.recovery else self.first_keys(arguments.data, user_id)
        if keys is not None:
            return self._tell(arguments, {"user_id": user_id, **keys}, lambda _: first_keys_words(user_id, keys))
        before = self._current(arguments)
        made = None
        try:
            public = ModeratorPublic.read(arguments.public) if arguments.public else None
        except BadKey as bad:
            raise OperatorError(str(bad)) from bad
        if public is None:
            made = ModeratorSecret.make()
            public = made.public
        signer = key_from(arguments, "sign_with")
        kind: key_list.Kind = "recovery" if arguments.recovery else "moderator"
        after = key_list.added(before, user_id, kind, public, signer, self._now)
        self._change(arguments, before, after)
        result = {
            "user_id": user_id,
            "kind": kind,
            "key_id": public.key_id,
            "key": made.text if made is not None else None,
        }
        return self._tell(arguments, result, _added)

    def _remove(self, arguments: argparse.Namespace) -> int:
        before = self._current(arguments)
        name = arguments.name
        if before.find(name) is not None:
            gone = [name]
        else:
            user_id = folder.user_id(name, folder.load_settings(arguments.data))
            gone = [one.key_id for one in before.keys if one.user_id == user_id and one.kind == "moderator"]
        if not gone:
            raise OperatorError(f"There is no key of {name} on the list. See: relay moderator list")
        after = key_list.removed(before, gone, key_from(arguments, "sign_with"), self._now)
        self._change(arguments, before, after)
        return self._tell(arguments, {"removed": gone}, _removed)

    def _change(self, arguments: argparse.Namespace, before: KeyList, after: KeyList) -> None:
        try:
            key_list.read(after.statement)
            key_list.follow(before, after)
        except BadList as bad:
            raise OperatorError(str(bad)) from bad
        self._ask(arguments.data, "moderator.change", {"statement": after.statement})
        _pin(arguments, after)

    def _current(self, arguments: argparse.Namespace) -> KeyList:
        """The relay's list, checked against the one that was seen last with this key."""
        known = self._ask(arguments.data, "moderator.chain", {})
        if not known["chain"]:
            raise OperatorError(
                "There are no moderators' keys yet. Make the first: relay moderator add NAME (an admin's name)"
            )
        # What is signed here says this machine's time: a relay that lies about its own could make a key count early.
        self._now = time.time_ns() // 1_000_000
        if abs(self._now - known["now"]) > CLOCK_TOLERANCE:
            raise OperatorError(
                "The relay's clock and this machine's differ by more than ten minutes. Set them right first."
            )
        try:
            return key_list.follow_chain(_pinned(arguments), known["chain"])
        except BadList as bad:
            raise OperatorError(str(bad)) from bad

    # --- what a key is for

    def _list(self, arguments: argparse.Namespace) -> int:
        return self._tell(arguments, self._ask(arguments.data, "moderator.list", {}), _listed)

    def _test(self, arguments: argparse.Namespace) -> int:
        secret = key_from(arguments, "key")
        key_id = secret.public.key_id
        sealed = Envelope.read(self._ask(arguments.data, "moderator.test", {"key_id": key_id}))
        try:
            nonce = envelope.open_with(secret, sealed, case_id=sealed.case_id, version=sealed.version)
        except NotOpened as bad:
            raise OperatorError(str(bad)) from bad
        self._ask(arguments.data, "moderator.tested", {"key_id": key_id, "answer": to_base64(proof_of(nonce))})
        return self._tell(arguments, {"key_id": key_id}, lambda _: f"The key {key_id} opens what is sealed to it.")

    def _rewrap(self, arguments: argparse.Namespace) -> int:
        current = self._current(arguments)
        secret = key_from(arguments, "key")
        counting = {one.key_id: one for one in current.active(self._now)}
        done = 0
        while waiting := self._ask(arguments.data, "moderator.unwrapped", {"key_id": secret.public.key_id}):
            for one in waiting:
                # Only for keys of the list that was checked here, whatever the relay asks for.
                lacks = [counting[key_id] for key_id in one["lacks"] if key_id in counting]
                try:
                    wraps = envelope.rewrap(
                        secret, Envelope.read(one), [Recipient(k.key_id, k.user_id, k.public) for k in lacks]
                    )
                except NotOpened as bad:
                    raise OperatorError(str(bad)) from bad
                given = {key_id: to_base64(wrap) for key_id, wrap in wraps.items()}
                if not self._ask(arguments.data, "moderator.rewrap", {"envelope_id": one["id"], "wraps": given}):
                    raise OperatorError("The relay took no wrap although it asked for one. See its log.")
                done += 1
        _pin(arguments, current)
        return self._tell(
            arguments,
            {"rewrapped": done},
            lambda _: f"{done} sealed texts can now be opened with every key that counts.",
        )


# --- keys at the terminal ------------------------------------------------------------------------------------------


def key_arguments(parser: argparse.ArgumentParser, name: str, help_text: str) -> None:
    parser.add_argument(name, type=Path, metavar="FILE", help=help_text)
    parser.add_argument(
        "--passphrase-stdin",
        action="store_true",
        help="read the key file's passphrase (or the key) from standard input",
    )


def key_from(arguments: argparse.Namespace, name: str) -> ModeratorSecret:
    """From a file with the key itself, or with the key under a passphrase; else typed. Raises OperatorError."""
    path: Path | None = getattr(arguments, name)
    try:
        if path is None:
            return ModeratorSecret.read(asked(arguments, "Your moderator's key (rmk1-…): "))
        try:
            raw = path.read_bytes()[:MAX_KEY_FILE_BYTES]
        except OSError as bad:
            raise OperatorError(f"The key file {path} can't be read: {bad.strerror}. Check its name.") from bad
        if raw.lstrip().startswith(b"{"):
            try:
                stored = orjson.loads(raw)
            except orjson.JSONDecodeError as bad:
                raise OperatorError(
                    f"{path} is no key file. Take the one that `relay desk key` or the desk made."
                ) from bad
            return unlock(stored, asked(arguments, f"Passphrase of {path.name}: "))
        return ModeratorSecret.read(raw.decode("utf-8", "replace"))
    except BadKey as bad:
        raise OperatorError(str(bad)) from bad


def asked(arguments: argparse.Namespace, prompt: str) -> str:
    if arguments.passphrase_stdin:
        return sys.stdin.readline().rstrip("\r\n")
    if not sys.stdin.isatty():
        raise OperatorError("There is no terminal to ask on. Pipe it in and add --passphrase-stdin.")
    return getpass.getpass(prompt)


def _pin_file(arguments: argparse.Namespace) -> Path | None:
    path: Path | None = getattr(arguments, "sign_with", None) or getattr(arguments, "key", None)
    return None if path is None else path.with_name(path.name + PIN_SUFFIX)


def _pinned(arguments: argparse.Namespace) -> KeyList | None:
    """The list as it was seen last with this key file, kept beside it."""
    path = _pin_file(arguments)
    if path is None or not path.exists():
        return None
    try:
        return key_list.read(orjson.loads(path.read_bytes()))
    except (BadList, orjson.JSONDecodeError, OSError) as bad:
        raise OperatorError(
            f"{path} should hold the list of keys that you saw last, and does not. Put your copy back, or ask in person."
        ) from bad


def _pin(arguments: argparse.Namespace, seen: KeyList) -> None:
    path = _pin_file(arguments)
    if path is not None:
        folder.write_durably(path, orjson.dumps(seen.statement), folder.SECRET_MODE)


# --- words ---------------------------------------------------------------------------------------------------------


def first_keys_words(user_id: str, keys: Mapping[str, str]) -> str:
    return "\n".join(
        [
            f"Reports are from now on sealed to two keys. {SHOWN_ONCE}",
            f"  key of {user_id}: {keys['moderator_key']}",
            f"  recovery key: {keys['recovery_key']}",
            "The first opens evidence, in the desk or with relay desk open: into a password manager. The second is for the day the",
            "first is lost: on paper, in another place. Without both, nobody can open what was sealed.",
        ]
    )


def _added(result: Any) -> str:
    lines = [
        f"{result['user_id']} has a new {result['kind']} key ({result['key_id']}). It counts from this time tomorrow on."
    ]
    if result["key"] is not None:
        lines += [f"  {result['key']}", "It is shown this once, and kept nowhere: hand it over in person, or on paper."]
    lines.append(
        "What was sealed before is opened to it tomorrow by somebody with an older key: relay moderator rewrap"
    )
    return "\n".join(lines)


def _removed(result: Any) -> str:
    return f"{', '.join(result['removed'])}: sealed to no longer, and unable to open the old ones from this time tomorrow on."


def _listed(result: Any) -> str:
    if not result:
        return "There are no moderators yet. Make the first: relay user add NAME --admin"
    rows = []
    for one in result:
        tested = one.get("tested_ts")
        day = time.strftime("%Y-%m-%d", time.gmtime(tested / 1000)) if tested else ""
        rows.append(
            (one["user_id"], one["kind"], one["key_id"] or "", one["state"], f"last proved {day}" if day else "")
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
