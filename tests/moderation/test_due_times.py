"""When a report has to be decided, by what it is about; and who is told, once, when that time is over."""

from __future__ import annotations

from relay.clock import HOUR
from tests.moderation.casehouse import Desk, desk, hears, notices_of, reports
from tests.moderation.tools import SECRET, Tool
from tests.people import until
from tests.town import Town

DUE = {"minor": 1, "threat": 4, "ncii": 48, "harassment": 72, "spam": 72, "fraud": 72, "other": 72}


async def test_what_is_late_is_told_once(town: Town) -> None:
    async with Tool() as tool:
        tool.usual = (200, {})
        hooks = f"hooks: {{webhooks: [{{name: pager, url: '{tool.url}/told', secrets: [{SECRET}], allow_private_addresses: true}}]}}"
        await town.relay("one", f"{hooks}\n")
        mod = await desk(town)
        alice, bob = await town.users("alice@one", "bob@one")
        room = await alice.creates_room(with_=bob)
        for category in DUE:
            await reports(alice, room, await bob.sends(room), **{"org.relay.category": category})
        queue = await mod.queue()
        assert {row["category"]: (row["due"] - row["created"]) / HOUR for row in queue} == DUE
        assert [row["category"] for row in queue][:3] == ["minor", "threat", "ncii"], (
            "the queue goes by when they are due"
        )
        assert not await is_late(mod, 1), "none of them is late yet"

        town.clock.forward(hours=5)
        late = {row["number"]: row["id"] for row in queue if row["category"] in ("minor", "threat")}
        for number in late:
            assert "it was due by" in await hears(mod.person, f"Report {number} is late")
        assert await is_late(mod, 2), "the operator's check says so as well"

        def told() -> list[str]:
            return [one["data"]["report_id"] for one in tool.told("told") if one["type"] == "report.sla_breach"]

        threat = [row["id"] for row in queue if row["category"] == "threat"]
        assert await until(lambda: told() == threat), "and a program, but of what may show a minor nothing more"
        town.clock.forward(hours=2)
        await mod.person.syncs()
        for number in late:
            assert len([one for one in notices_of(mod.person) if f"Report {number} is late" in one]) == 1, "once"
        for case_id in late.values():
            await mod.decides(case_id)
        assert not await is_late(mod, 1), "what is decided is late no more"


async def is_late(mod: Desk, number: int) -> bool:
    found = await mod.house.command("check")
    return any(one["what"].startswith(f"{number} reports are late") for one in found)
