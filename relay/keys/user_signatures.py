"""What a person says about others: signatures of her user-signing key on their master keys. Only she ever sees them.

Spec: client-server-api/#key-and-signature-security.
"""

from __future__ import annotations

from dataclasses import dataclass

from relay.db import Database, Query, Tx
from relay.keys.kept import Kept
from relay.part import Part
from relay.tables import Schema, Table

MAX_SIGNERS_KEPT = 2_000


@dataclass(slots=True, frozen=True)
class Vouched:
    """`signer_key` signed `master_key`; both are key IDs, ed25519:PUBLIC."""

    master_key: str
    signer_key: str
    signature: str


_SIGNER_LIFE = "until the signer's key is replaced"


class UserSignatures(Part):
    schema = Schema(
        "user_signatures",
        tables=(
            Table(
                "user_signatures",
                "a signature, shown to nobody but the signer",
                {
                    "signer": ("who verified somebody", _SIGNER_LIFE),
                    "user_id": ("who was verified", _SIGNER_LIFE),
                    "master_key": ("which key was signed", _SIGNER_LIFE),
                    "signer_key": ("which key signed it", _SIGNER_LIFE),
                    "signature": ("the signature", _SIGNER_LIFE),
                    "pos": ("so that the signer's other devices hear of it", _SIGNER_LIFE),
                },
            ),
        ),
        steps=(
            """
            CREATE TABLE user_signatures (
                signer TEXT NOT NULL, user_id TEXT NOT NULL, master_key TEXT NOT NULL, signer_key TEXT NOT NULL,
                signature TEXT NOT NULL, pos BIGINT NOT NULL, PRIMARY KEY (signer, user_id));
            CREATE INDEX user_signatures_by_pos ON user_signatures (signer, pos)
            """,
        ),
    )

    def __init__(self, db: Database) -> None:
        self._db = db
        # Dropped by `put` and `clear`, for their signer.
        self._kept: Kept[str, dict[str, Vouched]] = Kept(MAX_SIGNERS_KEPT)

    async def made_by(self, signer: str) -> dict[str, Vouched]:
        """Whom this person verified."""
        known = self._kept.get(signer)
        if known is None:
            ticket = self._kept.begin(signer)
            rows = await self._db.read(
                lambda query: query.all(
                    "SELECT user_id, master_key, signer_key, signature FROM user_signatures WHERE signer = $1", signer
                )
            )
            known = {user_id: Vouched(*rest) for user_id, *rest in rows}
            self._kept.put(signer, known, ticket)
        return known

    @staticmethod
    def made_between(query: Query, signer: str, since: int, upto: int) -> list[str]:
        """Whom this person verified in (since, upto]."""
        rows = query.all(
            "SELECT user_id FROM user_signatures WHERE signer = $1 AND pos > $2 AND pos <= $3", signer, since, upto
        )
        return [user_id for (user_id,) in rows]

    def put(self, tx: Tx, signer: str, user_id: str, vouched: Vouched, pos: int) -> None:
        tx.run(
            "INSERT INTO user_signatures (signer, user_id, master_key, signer_key, signature, pos) "
            "VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (signer, user_id) DO UPDATE SET "
            "master_key = excluded.master_key, signer_key = excluded.signer_key, signature = excluded.signature, "
            "pos = excluded.pos",
            signer,
            user_id,
            vouched.master_key,
            vouched.signer_key,
            vouched.signature,
            pos,
        )
        tx.after(lambda: self._kept.drop(signer))

    def clear(self, tx: Tx, signer: str) -> None:
        """The signing key was replaced: its signatures say nothing any more."""
        tx.run("DELETE FROM user_signatures WHERE signer = $1", signer)
        tx.after(lambda: self._kept.drop(signer))
