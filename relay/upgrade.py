"""Bringing a database's tables to what this version of the relay knows: numbered steps, part by part.

A step runs in one transaction, so that a crash leaves either side of it. Before the first step on a database that holds
something, a copy of the file is taken.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from relay.tables import Schema


class WrongDatabase(Exception):
    """The file is not ours, or was made for another server name or by a newer version."""


class Connection(Protocol):
    def execute(self, sql: str, parameters: Any = ..., /) -> Any: ...


def claim(connection: Connection, server_name: str) -> None:
    """The file becomes this server's, if it is nobody's yet. Raises WrongDatabase."""
    known = connection.execute("SELECT value FROM settings WHERE name = 'server_name'").fetchone()
    if known is None:
        connection.execute(
            "INSERT INTO settings VALUES ('server_name', ?), ('epoch', '1'), ('pos', '0')", (server_name,)
        )
    elif known[0] != server_name:
        raise WrongDatabase(
            f"This database belongs to the server name {known[0]!r}, the configuration says {server_name!r}. A server name can't "
            "be changed later: put the old name back into the configuration, or start a new data folder with --data."
        )


def upgrade(
    connection: Connection, schemas: Sequence[Schema], path: Path, *, fresh: bool, define: Callable[[str], str]
) -> None:
    """`define` turns our SQL into the engine's. Raises WrongDatabase."""
    versions = dict(connection.execute("SELECT part, version FROM schema_versions").fetchall())
    copied = fresh or not versions
    for schema in schemas:
        have = versions.get(schema.part, 0)
        if have > len(schema.steps):
            raise WrongDatabase(
                f"The part {schema.part!r} of this database has version {have}, this relay knows {len(schema.steps)}. "
                "It was written by a newer relay: start that one, or restore the copy that was taken before the upgrade."
            )
        for number, step in enumerate(schema.steps[have:], start=have + 1):
            if not copied:
                _copy(connection, path)
                copied = True
            _apply(connection, schema.part, number, step, define)


def _apply(connection: Connection, part: str, number: int, step: str, define: Callable[[str], str]) -> None:
    connection.execute("BEGIN IMMEDIATE")
    try:
        for statement in filter(None, (s.strip() for s in step.split(";"))):
            connection.execute(define(statement))
        connection.execute(
            "INSERT INTO schema_versions VALUES (?, ?) ON CONFLICT (part) DO UPDATE SET version = excluded.version",
            (part, number),
        )
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise


def _copy(connection: Connection, path: Path) -> None:
    target = path.with_suffix(".before-upgrade")
    needed = 2 * path.stat().st_size
    if shutil.disk_usage(path.parent).free < needed:
        raise WrongDatabase(
            "There is no room for the copy that is taken before an upgrade. "
            f"Make {needed // 2**20 + 1} MiB free in {path.parent} and start again."
        )
    target.unlink(missing_ok=True)
    connection.execute("VACUUM INTO ?", (str(target),))
    target.chmod(0o600)
