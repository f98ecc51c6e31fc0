"""Whether an event that we hold bears its servers' signatures, judged by the keys kept here: no connection is opened.

For proofs: asking a server for its key would tell it which of its users was reported. An event was verified when it came, by
a key that was valid then; that key is kept, also when its server later publishes another one under the same name, so that
nobody can disown what he sent. So is the last list that named a key, which we give on as a notary. Not here: what is verified on arrival (keyring.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import orjson

from federation.server_keys import ALGORITHM, MAX_KEY_ID, KnownKey
from relay.db import Database, Query, Tx
from relay.errors import BadJson
from relay.part import Part
from relay.protocol.canonical import from_base64
from relay.protocol.event import Event, required_signers, signing_bytes
from relay.protocol.signing import OldKey, SigningKey, signature_of, verify_bytes
from relay.tables import Schema, Table

MAX_SIGNATURES_PER_SERVER = 8
# A server that changes its key under the same name over and over fills nobody's disk.
MAX_FORMER = 16
# Of a list that is kept; with a dozen keys and signatures one has two thousand.
MAX_FORMER_BYTES = 8 * 1024
_LIFE = "as long as events signed with it may be met"


def named_in(answer: Mapping[str, Any]) -> set[str]:
    """The IDs of all keys in a server's signed list."""
    lists = (answer.get("verify_keys"), answer.get("old_verify_keys"))
    named = {key_id for one in lists if isinstance(one, dict) for key_id in one}
    return {key_id for key_id in named if key_id.startswith(ALGORITHM) and len(key_id) <= MAX_KEY_ID}


class KeptKeys(Part):
    schema = Schema(
        "kept_keys",
        tables=(
            Table(
                "former_server_keys",
                "a public key whose server publishes another one under its name",
                {"server": ("whose key", _LIFE), "key_id": ("its ID", _LIFE), "verify_key": ("the public key", _LIFE)},
            ),
            Table(
                "former_key_answers",
                "the last signed list of a server that named a key which its later lists don't",
                {
                    "server": ("whose key", _LIFE),
                    "key_id": ("its ID", _LIFE),
                    "answer": ("the list, given on as a notary", _LIFE),
                },
            ),
        ),
        steps=(
            """
            CREATE TABLE former_server_keys (server TEXT NOT NULL, key_id TEXT NOT NULL, verify_key BYTES NOT NULL,
                PRIMARY KEY (server, key_id, verify_key))
            """,
            """
            CREATE TABLE former_key_answers (server TEXT NOT NULL, key_id TEXT NOT NULL, answer BYTES NOT NULL,
                PRIMARY KEY (server, key_id))
            """,
        ),
    )

    def __init__(self, server_name: str, key: SigningKey, db: Database, old_keys: Sequence[OldKey] = ()) -> None:
        self._server_name = server_name
        self._key = key
        self._old_keys = old_keys
        self._db = db

    def note(self, tx: Tx, server: str, keys: Mapping[str, KnownKey]) -> None:
        """Before the keyring's rows of this server are written over."""

        def keep(query: Query) -> None:
            for key_id, key in keys.items():
                row = query.one("SELECT verify_key FROM server_keys WHERE server = $1 AND key_id = $2", server, key_id)
                if row is None or bytes(row[0]) == key.raw:
                    continue
                known = query.value(
                    "SELECT count(*) FROM former_server_keys WHERE server = $1 AND key_id = $2", server, key_id
                )
                if known < MAX_FORMER:
                    query.run(
                        "INSERT INTO former_server_keys (server, key_id, verify_key) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
                        server,
                        key_id,
                        bytes(row[0]),
                    )

            self._note_answer(query, server, keys)

        tx.call(keep)

    def _note_answer(self, query: Query, server: str, keys: Mapping[str, KnownKey]) -> None:
        answer = query.value("SELECT answer FROM server_key_answers WHERE server = $1", server)
        if answer is None or len(bytes(answer)) > MAX_FORMER_BYTES:
            return
        for key_id in named_in(orjson.loads(bytes(answer))) - keys.keys():
            known = query.value("SELECT count(*) FROM former_key_answers WHERE server = $1", server)
            if known < MAX_FORMER:
                query.run(
                    "INSERT INTO former_key_answers (server, key_id, answer) VALUES ($1, $2, $3) "
                    "ON CONFLICT (server, key_id) DO UPDATE SET answer = excluded.answer",
                    server,
                    key_id,
                    bytes(answer),
                )

    async def former_answers(self, server: str, key_ids: Sequence[str]) -> list[dict[str, Any]]:
        """What the server once said of keys that it names no longer; the same list only once."""

        def look(query: Query) -> list[bytes]:
            found = [
                query.value("SELECT answer FROM former_key_answers WHERE server = $1 AND key_id = $2", server, key_id)
                for key_id in key_ids
            ]
            return list(dict.fromkeys(bytes(answer) for answer in found if answer is not None))

        return [orjson.loads(answer) for answer in await self._db.read(look)]

    async def verified_here(self, events: Sequence[Event]) -> list[bool | None]:
        """Whether each event carries all the signatures it needs; None where no key that it names is kept here."""
        return await self._db.read(lambda query: [self._verdict(query, event) for event in events])

    def _verdict(self, query: Query, event: Event) -> bool | None:
        try:
            message = signing_bytes(event)
        except BadJson:
            return False
        lacks_key = False
        for server in sorted(required_signers(event)):
            signatures = event.pdu["signatures"].get(server)
            named = (
                [key_id for key_id in signatures if key_id.startswith(ALGORITHM)]
                if isinstance(signatures, dict)
                else []
            )
            pairs = [
                (signature, key)
                for key_id in named[:MAX_SIGNATURES_PER_SERVER]
                if (signature := signature_of(event.pdu, server, key_id)) is not None
                for key in self._keys(query, server, key_id)
            ]
            if not named:
                return False
            if not pairs:
                lacks_key = True
            elif not any(verify_bytes(message, signature, key) for signature, key in pairs):
                return False
        return None if lacks_key else True

    def _keys(self, query: Query, server: str, key_id: str) -> Iterable[bytes]:
        if server == self._server_name:
            if key_id == self._key.key_id:
                yield self._key.verify_key
            yield from (from_base64(old.verify_key_base64) for old in self._old_keys if old.key_id == key_id)
        for table in ("server_keys", "former_server_keys"):
            for row in query.all(f"SELECT verify_key FROM {table} WHERE server = $1 AND key_id = $2", server, key_id):
                yield bytes(row[0])
