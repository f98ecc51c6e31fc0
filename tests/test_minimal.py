"""Data minimisation, checked on a real relay: every column of its database is declared with a purpose and an end.

And what is declared nowhere is written nowhere: a run with a planted address and user agent, then a search of every byte.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from relay.tables import OWN, Schema
from tests.people import ciphertext, path
from tests.town import Town, Within

AGENT = "CanaryBrowser/77.31 (Planted; rv:9)"
ADDRESS = "203.0.113.77"
ADDRESS_6 = "2001:db8:77::31"
# Words that name a column whose content identifies a person's connection or machine.
TELLTALE = ("ip", "ips", "addr", "address", "agent", "useragent", "ua", "fingerprint", "referer", "geo", "country")


def declared(house: Within) -> dict[str, dict[str, tuple[str, str]]]:
    assert house.server is not None
    schemas: list[Schema] = [part.schema for part in house.server._parts if part.schema is not None]
    tables = [table for schema in (OWN, *schemas) for table in schema.tables]
    names = [table.name for table in tables]
    assert len(names) == len(set(names)), "a table is declared once"
    return {table.name: dict(table.columns) for table in tables}


def found(house: Within) -> dict[str, set[str]]:
    connection = sqlite3.connect(f"file:{house.folder / 'relay.db'}?mode=ro", uri=True)
    try:
        tables = [
            row[0]
            for row in connection.execute(
                "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
            )
        ]
        return {table: {row[1] for row in connection.execute(f"PRAGMA table_info({table})")} for table in tables}
    finally:
        connection.close()


async def test_every_column_is_declared_and_every_declared_one_exists(town: Town) -> None:
    house = await town.relay("one")
    there, said = found(house), declared(house)
    assert len(there) > 20, "the whole relay is here"
    assert set(there) == set(said), f"tables made or declared, but not both: {sorted(set(there) ^ set(said))}"
    for table, columns in there.items():
        differing = sorted(columns ^ set(said[table]))
        assert not differing, f"columns of {table} that are made or declared, but not both: {differing}"


async def test_every_column_says_why_it_is_there_and_for_how_long(town: Town) -> None:
    house = await town.relay("one")
    assert house.server is not None
    for table, columns in declared(house).items():
        for column, (purpose, lifetime) in columns.items():
            assert purpose.strip() and lifetime.strip(), f"{table}.{column} needs a purpose and a lifetime"
            telling = set(column.lower().split("_")) & set(TELLTALE)
            assert not telling, f"{table}.{column} sounds like {telling}: the relay keeps nothing of the kind"
    rules = [table.rule for part in house.server._parts if part.schema is not None for table in part.schema.tables]
    assert all(rule.strip() for rule in rules), "each table says under which rule `relay audit` counts its rows"


@pytest.mark.parametrize("level", ["debug"])
async def test_no_address_and_no_user_agent_is_written_anywhere(town: Town, level: str) -> None:
    town.log_level = level
    house = await town.relay_apart("one")
    headers = {
        "User-Agent": AGENT, "X-Forwarded-For": f"{ADDRESS}, {ADDRESS_6}", "X-Real-IP": ADDRESS, "Forwarded": f"for={ADDRESS}",
        "Referer": f"https://{ADDRESS}/", "Accept-Language": AGENT,
    }  # fmt: skip
    town.http.headers.update(headers)
    alice, bob = await town.users("alice@one", "bob@one")
    phone = await alice.on_another_device(initial_device_display_name="phone", refresh_token=True)
    await phone.calls("POST", "refresh", {"refresh_token": phone.refresh_token}, token="")
    room = await alice.creates_room(with_=bob)
    await alice.sends(room)
    await alice.is_typing(room)
    await bob.syncs()
    await bob.has_read(room, await alice.sends(room))
    await alice.uploads(b"\x93\x01" * 300)
    await alice.tells_devices(
        "m.room.encrypted",
        {
            bob.id: {
                "*": {
                    **ciphertext(),
                    "algorithm": "m.olm.v1.curve25519-aes-sha2",
                    "sender_key": "QUJD",
                    "ciphertext": {},
                }
            }
        },
    )
    for method, where, body in (
        ("POST", "login", {"type": "m.login.password", "identifier": {"type": "m.id.user", "user": "alice"}, "password": "wrong"}),
        ("GET", path("rooms", "!no:where", "messages"), None),
        ("PUT", path("rooms", room, "send", "m.room.encrypted", "x"), b"{"),
        ("GET", "nothing/of/the/kind", None),
    ):  # fmt: skip
        await alice.is_refused(alice.calls(method, where, body))
    for text in (AGENT, ADDRESS, ADDRESS_6):
        assert not _where(house.files(), house.log, text), f"while it runs, {text} is written nowhere"
    await house.stop()
    for text in (AGENT, ADDRESS, ADDRESS_6, "CanaryBrowser"):
        assert not _where(house.files(), house.log, text), f"and not at its end either: {text}"
    assert b"alice" in b"".join(file.read_bytes() for file in house.files()), "what is searched is what was written"
    log = house.log.read_text()
    assert "127.0.0.1:" not in log.replace(f"127.0.0.1:{house.client_port}", "").replace(
        f"127.0.0.1:{house.federation_port}", ""
    ), "nobody's own address"


def _where(files: list[Path], log: Path, text: str) -> list[str]:
    """Files in which it stands, in any of the ways in which a text is written."""
    ways = [text.encode(), text.encode("utf-16-le"), text.encode().hex().encode()]
    return [str(file) for file in (*files, log) if any(way in file.read_bytes() for way in ways)]
