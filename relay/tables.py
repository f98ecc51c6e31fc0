"""How a part declares its tables: what each is for, and of each column why it is there and for how long.

Data minimisation in one place: a test fails on a column that is not declared. The SQL of the steps is portable (db.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """What a table is for, and of each column why it is there and for how long. A test fails on one that is not here.

    `rule` is the answer of `relay audit` for a row that needs no closer look; tables with content have a check of their own.
    """

    name: str
    rule: str
    columns: Mapping[str, tuple[str, str]]


@dataclass(frozen=True)
class Schema:
    """A part's tables, and the numbered steps that make them: step n brings version n-1 to n. Steps are never edited."""

    part: str
    tables: Sequence[Table] = ()
    steps: Sequence[str] = ()


OWN = Schema(
    "database",
    tables=(
        Table(
            "schema_versions",
            "the database's own bookkeeping",
            {
                "part": ("which part's tables", "the database's life"),
                "version": ("up to which step they have come", "the database's life"),
            },
        ),
        Table(
            "settings",
            "the database's own bookkeeping",
            {
                "name": ("server_name, epoch, pos, seal, signing_key", "the database's life"),
                "value": ("what it is", "the database's life"),
            },
        ),
        Table(
            "followers",
            "the database's own bookkeeping",
            {
                "name": ("who follows the log", "the database's life"),
                "pos": ("how far it has come", "the database's life"),
            },
        ),
    ),
    steps=(
        """
        CREATE TABLE IF NOT EXISTS schema_versions (part TEXT PRIMARY KEY, version SMALLINT NOT NULL);
        CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
        CREATE TABLE IF NOT EXISTS followers (name TEXT PRIMARY KEY, pos BIGINT NOT NULL)
        """,
    ),
)
