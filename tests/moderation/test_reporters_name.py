"""Where the name of whoever reported stands: in her report and in what is addressed to herself, and nowhere else."""

from __future__ import annotations

import sqlite3
from contextlib import closing

from relay.moderation.disclosure_form import Item
from tests.moderation.casehouse import casework, desk, hears, notices_of, reports, token_in
from tests.moderation.sessions import Session, disclosure
from tests.moderation.tools import SECRET, Tool
from tests.people import until
from tests.town import Town, Within

# Her report; what only she can open with her account; the room in which the relay speaks to her.
HERS = {("cases", "reporter"), ("report_links", "user_id"), ("notices_due", "recipient"), ("own_rooms", "of")}


def named_in(house: Within, user_id: str) -> set[tuple[str, str]]:
    """(table, column) of the moderation's own tables in which the name stands."""
    assert house.server is not None
    parts = [part for part in house.server._parts if type(part).__module__.startswith("relay.moderation")]
    tables = [table for part in parts if part.schema is not None for table in part.schema.tables]
    assert len(tables) > 20, "cases, decisions, evidence, log, measures, webhooks …"
    found = set()
    with closing(sqlite3.connect(house.folder / "relay.db")) as db:
        for table in tables:
            for column in table.columns:
                sql = f"SELECT count(*) FROM {table.name} WHERE instr(CAST({column} AS BLOB), CAST(? AS BLOB)) > 0"
                if db.execute(sql, (user_id,)).fetchone()[0]:
                    found.add((table.name, column))
    return found


async def test_the_name_of_whoever_reported_stands_in_her_report_and_nowhere_else(town: Town) -> None:
    async with Tool() as tool:
        tool.usual = (200, {})
        hooks = f"{{name: pager, url: '{tool.url}/told', secrets: [{SECRET}], allow_private_addresses: true}}"
        await town.relay("one", f"hooks: {{webhooks: [{hooks}]}}\n")
        mod = await desk(town)
        alice, bob = await town.users("alice@one", "bob@one")
        room = await alice.creates_room(with_=bob)
        session = Session()
        said = await bob.sends(room, session.says(room, "an ugly word"))
        assert await alice.sees(said)
        assert not named_in(mod.house, alice.id)

        await reports(alice, room, said, "he does this every day")
        thanks = await hears(alice, "Your report has the number 1")
        work = casework(mod.house)
        link = await work.links.look(token_in(thanks))
        await work.reports.attach_proof(link, alice.id, disclosure(Item(said, 0, session.prk(0))))
        await work.reports.answer(link, alice.id, "and again today")
        [case] = await mod.queue()
        await mod.asks("POST", f"reports/{case['id']}/note", {"text": "a note"})
        await mod.decides(case["id"], {"measure": "suspend"})
        await hears(alice, "was decided: a measure was taken")
        await work.appeals.file(case["id"], alice.id, "that is too mild")
        await hears(mod.person, "Somebody objects to decision 1")
        assert await until(lambda: any(one["type"] == "report.appealed" for one in tool.told("told")))
        tools = "/_synapse/admin/v1/event_reports"
        listed = (await mod.person.calls("GET", tools))["event_reports"]
        shown = [await mod.asks("GET", where) for where in (f"reports/{case['id']}", "audit", "reports?state=all")]

        assert [one["event_id"] for one in listed] == [said]
        assert alice.id not in str(listed) + str(shown) + str(tool.heard), "nobody who works on it reads it"
        assert not [one for one in [*notices_of(mod.person), *notices_of(bob)] if alice.id in one or alice.name in one]
        management = await work.own_rooms.room_of("moderators")
        assert management is not None and alice.id not in str(await mod.person.history(management))

        places = named_in(mod.house, alice.id)
        assert {("cases", "reporter")} <= places <= HERS, "and no other row of the moderation names her"
