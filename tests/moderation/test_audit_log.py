"""The audit log holds what was done, and any change to it before a checkpoint held outside is found."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from relay.bell import Bell
from relay.db import Database, IntegrityError, Query
from relay.moderation import audit_check
from relay.moderation.audit_log import AuditLog
from tests.town import Clock

NAME = "one.example"


@pytest.fixture
async def log(tmp_path: Path) -> AsyncIterator[AuditLog]:
    db = Database(tmp_path / "relay.db", Bell())
    log = AuditLog(db, Clock(), NAME)
    await db.open([log.schema], NAME)
    yield log
    await db.close()


async def record(log: AuditLog, number: int, target: str = "@bob:one.example") -> None:
    with log._db.write() as tx:
        for one in range(number):
            log.record(
                tx,
                actor="@mod:one.example",
                action="suspend",
                target=target,
                reason_code="harassment",
                case_id=f"c{one}",
            )
    await tx


async def verdict(log: AuditLog, held: dict[str, Any] | None = None) -> list[str]:
    return (await log._db.read(audit_check.verify, NAME, held)).found


async def tamper(log: AuditLog, *statements: str) -> None:
    """As somebody with the file in her hands would: the triggers are the first to go."""
    with log._db.write() as tx:
        for verb in ("UPDATE", "DELETE"):
            tx.run(f"DROP TRIGGER IF EXISTS audit_log_no_{verb}")
            tx.run(f"DROP TRIGGER IF EXISTS audit_checkpoints_no_{verb}")
        for sql in statements:
            tx.run(sql)
    await tx


async def test_what_was_done_is_read_again_and_the_chain_is_sound(log: AuditLog) -> None:
    await record(log, 3)
    newest = (await log.page(limit=2))[0]
    assert (newest.seq, newest.actor, newest.target, newest.case_id) == (
        3,
        "@mod:one.example",
        "@bob:one.example",
        "c2",
    )
    assert [one.case_id for one in await log.of_case("c1")] == ["c1"]
    made = await log.checkpoint()
    assert made is not None and made.seq == 4, "the row that introduces the key, and then the checkpoint"
    assert await verdict(log, made.json) == []
    again = await log.checkpoint()
    assert again is not None and again.json == made.json, "nothing new, nothing new to sign"


async def test_rows_are_only_ever_added(log: AuditLog) -> None:
    await record(log, 1)
    for sql in ("UPDATE audit_log SET actor = 'somebody else'", "DELETE FROM audit_log"):
        with log._db.write() as tx:
            tx.run(sql)
        with pytest.raises(IntegrityError):
            await tx


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("UPDATE audit_log SET actor = '@other:one.example' WHERE seq = 2", "Row 2 was changed."),
        ("UPDATE audit_log SET sealed = X'00' WHERE seq = 3", "Row 3 was changed."),
        ("DELETE FROM audit_log WHERE seq = 2", "Rows 2 to 2 are missing."),
        ("DELETE FROM audit_log WHERE seq > 2", "it was cut."),
        ("UPDATE audit_checkpoints SET statement = '{\"seq\": 6}'", "signature of the checkpoint"),
        ("UPDATE audit_checkpoints SET statement = X'FF00'", "signature of the checkpoint"),
        ("UPDATE audit_checkpoints SET statement = '[1]'", "signature of the checkpoint"),
        ("UPDATE audit_log SET hash = 7 WHERE seq = 2", "Row 2 was changed."),
        ("UPDATE audit_log SET prev_hash = 'x' WHERE seq = 2", "Row 2 does not follow"),
        ("UPDATE audit_log SET sealed = 3 WHERE seq = 2", "Row 2 was changed."),
        ("UPDATE audit_log SET ts = 1.5 WHERE seq = 2", "Row 2 was changed."),
    ],
)
async def test_tampering_is_found(log: AuditLog, statement: str, said: str) -> None:
    await record(log, 5)
    await log.checkpoint()
    await tamper(log, statement)
    assert any(said in one for one in await verdict(log))


async def test_a_log_that_was_written_anew_does_not_extend_the_checkpoint_held_outside(log: AuditLog) -> None:
    await record(log, 5)
    made = await log.checkpoint()
    assert made is not None
    await tamper(log, "DELETE FROM audit_log", "DELETE FROM audit_checkpoints", "DELETE FROM audit_keys WHERE seq > 0")
    await record(log, 8)
    await log.checkpoint()
    assert await verdict(log) == [], "within itself it is sound"
    assert any("rewritten" in one for one in await verdict(log, made.json))
    await tamper(log, "DELETE FROM audit_signers")
    assert any("key and log were replaced" in one for one in await verdict(log, made.json))
    foreign = {**made.json, "server": "two.example"}
    assert await verdict(log, foreign), "a checkpoint of another server"
    assert await verdict(log, {"nonsense": True}), "not a checkpoint"


async def test_another_key_takes_over_with_both_signatures(log: AuditLog) -> None:
    await record(log, 1)
    before = await log.checkpoint()
    key_id = await log.introduce_signer()
    await record(log, 1)
    after = await log.checkpoint()
    assert before is not None and after is not None and after.json["key_id"] == key_id != before.json["key_id"]
    assert await verdict(log, before.json) == []
    change = next(one for one in await log.page() if one.action == "signer.changed")
    assert set(change.detail["signatures"][NAME]) == {key_id, before.json["key_id"]}
    seeds = await log._db.read(lambda query: query.all("SELECT length(seed) FROM audit_signers ORDER BY since_seq"))
    assert seeds == [(0,), (32,)], "the retired key signs nothing any more"


async def test_a_person_who_is_erased_is_gone_from_it_and_the_chain_holds(log: AuditLog) -> None:
    await record(log, 2)
    await record(log, 1, target="@carol:one.example")
    with log._db.write() as tx:
        log.forget(tx, "@bob:one.example")
    await tx
    assert [one.target for one in await log.page()] == ["@carol:one.example", None, None]
    assert await verdict(log) == []

    def everything(query: Query) -> str:
        return json.dumps([[str(v) for v in row] for row in query.all("SELECT * FROM audit_log")])

    assert "@bob" not in await log._db.read(everything)


async def test_a_restored_backup_is_told_until_somebody_has_seen_it(log: AuditLog) -> None:
    await log._note_restore()
    assert await log.restored() is None, "the first start is no restore"
    await record(log, 2)
    log._db.epoch += 1
    await log._note_restore()
    seq = await log.restored()
    assert seq == 3 and (await log.page(limit=1))[0].reason_code == "from_seq_2"
    await log.acknowledge_restore("@mod:one.example")
    assert await log.restored() is None
