"""Stories of programs that are told (webhooks) and of programs that decide (integrations): signatures, retries, replays."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import make_mocked_request
from standardwebhooks.webhooks import Webhook

from federation.addresses import AddressRule, SystemLookups
from federation.outward import Outward, Posting, tls_context
from relay.bell import Bell
from relay.clock import DAY, HOUR, SECOND
from relay.config.hooks import Integration, WebhookTarget
from relay.db import Database
from relay.errors import ApiError, Unauthorized
from relay.moderation import signatures
from relay.moderation.case_rows import SCHEMA as CASES
from relay.moderation.integrations import Integrations, Signed
from relay.moderation.webhooks import WAITS_MS, Webhooks
from relay.web import Request, Route
from tests.moderation.test_actions import moderators, takes
from tests.moderation.tools import OTHER_SECRET, SECRET, Tool
from tests.people import until
from tests.town import Clock, Town


async def announce(webhooks: Webhooks, db: Database, type: str, **more: Any) -> None:
    with db.write() as tx:
        webhooks.announce(tx, type, **more)
    await tx


async def test_a_program_is_told_signed_thin_and_until_it_has_taken_it(town: Town) -> None:
    async with Tool() as tool:
        settings = (
            f"hooks: {{webhooks: [{{name: pager, url: '{tool.url}/told', secrets: [{SECRET}, {OTHER_SECRET}], "
            "allow_private_addresses: true, types: ['report.*', action.taken]}]}"
        )
        await town.relay("one", settings)
        house, [mod] = await moderators(town, "mod")
        bob = await town.user("bob@one")
        assert house.server is not None
        webhooks, db = house.server._keeping.webhooks, house.server.db
        tool.answers["told"] = (500, {})
        await takes(mod, "suspend", bob.id, report_id="case-1")
        assert await until(lambda: len(tool.told("told")) == 1), "it is told at once"
        await house.restart()
        tool.answers["told"] = (204, {})
        town.clock.forward(seconds=6)
        assert await until(lambda: len(tool.told("told")) == 2), "and again after a restart, until it has taken it"
        first, second = tool.heard[0], tool.heard[1]
        assert first[2]["webhook-id"] == second[2]["webhook-id"], "under the same ID"
        assert first[1]["type"] == "action.taken"
        assert first[1]["data"] == {"report_id": "case-1", "action": "suspend", "automated": False}, "and nothing else"
        assert bob.id not in b"".join(tool.raw).decode(), "nobody is named"
        for secret in (SECRET, OTHER_SECRET):
            verify(secret, tool.raw[0], first[2], town.clock)
        webhooks, db = house.server._keeping.webhooks, house.server.db
        await announce(webhooks, db, "report.created", case_id="a", category="minor", state="new")
        await announce(webhooks, db, "report.decided", case_id="a", category="minor", state="decided")
        await announce(webhooks, db, "report.created", case_id="b", category="spam", state="new")
        await announce(webhooks, db, "audit.checkpoint", detail={"seq": 5})
        assert await until(lambda: len(tool.told("told")) == 4)
        told = [(body["type"], body["data"]) for body in tool.told("told")[2:]]
        assert told == [
            ("report.urgent", {"report_id": "a"}),
            ("report.created", {"report_id": "b", "category": "spam", "state": "new"}),
        ], "of the worst cases only that there is one; what it did not ask for is not told"
        tool.answers["told"] = (410, {})
        await announce(webhooks, db, "report.created", case_id="c", category="spam", state="new")
        await announce(webhooks, db, "report.created", case_id="d", category="spam", state="new")

        async def is_off() -> bool:
            [status] = (await house.command("hooks.status"))["webhooks"]
            return bool(status["off"]) and status["waiting"] == 0

        assert await until(is_off), "410 ends it"
        await announce(webhooks, db, "report.created", case_id="e", category="spam", state="new")
        await house.restart()
        assert await is_off(), "also after a restart"
        tool.answers["told"] = (200, {})
        await house.command("webhooks.enable", webhook="pager")
        assert house.server is not None
        await announce(
            house.server._keeping.webhooks, house.server.db, "report.created", case_id="f", category="spam", state="new"
        )
        assert await until(lambda: tool.told("told")[-1]["data"]["report_id"] == "f"), "until it is switched on"


def verify(secret: str, raw: bytes, headers: dict[str, str], clock: Clock) -> None:
    stamp = datetime.fromtimestamp(int(headers["webhook-timestamp"]), UTC)
    signed = Webhook(secret).sign(headers["webhook-id"], stamp, raw.decode())
    assert signed in headers["webhook-signature"].split(" "), "each secret of the config signs"
    assert abs(int(headers["webhook-timestamp"]) * SECOND - clock.now()) < HOUR


async def test_private_addresses_are_not_told_and_long_silence_ends_it(tmp_path: Path) -> None:
    """Without the relay around it: what the guard keeps out, and the whole schedule, that of Standard Webhooks 1.0."""
    assert [wait / SECOND for wait in WAITS_MS] == [
        5,
        5 * 60,
        30 * 60,
        *(hours * 3_600 for hours in (2, 5, 10, 14, 20, 24)),
    ]
    async with Tool() as tool:
        clock, db = Clock(), Database(tmp_path / "db", Bell())
        targets = [
            WebhookTarget(name="outside", url=f"{tool.url.replace('http:', 'https:')}/x", secrets=(SECRET,)),
            WebhookTarget(name="inside", url=f"{tool.url}/x", secrets=(SECRET,), allow_private_addresses=True),
        ]
        guarded = Outward(SystemLookups(), AddressRule(), tls_context())
        free = Outward(SystemLookups(), AddressRule(private=True), tls_context(), plain=True)
        webhooks = Webhooks(db, clock, targets, Posting(guarded), Posting(free))
        assert webhooks.schema is not None
        await db.open([webhooks.schema, CASES], "x.example")
        await webhooks.open()
        await announce(webhooks, db, "report.created", case_id="a", category="spam", state="new")
        loop = asyncio.create_task(webhooks.run())
        try:
            assert await until(lambda: len(tool.told("x")) == 1), "who may be inside is told"

            async def tried(name: str, times: int) -> bool:
                status = {one["name"]: one for one in await webhooks.status()}
                return bool(status[name]["failed"] + status[name]["given_up"] == times)

            assert await until(lambda: tried("outside", 1)), "loopback is no address for the other"
            for attempt, wait in enumerate(WAITS_MS):
                clock.forward(seconds=wait / SECOND + 1)
                assert await until(lambda attempt=attempt: tried("outside", attempt + 2)), (
                    "tried again, later and later"
                )

            async def is_given_up() -> bool:
                # It is counted a moment before its row is gone.
                status = {one["name"]: one for one in await webhooks.status()}
                return bool(status["outside"]["given_up"] == 1 and status["outside"]["waiting"] == 0)

            assert await until(is_given_up), "three days, then no more"
            assert len(tool.told("x")) == 1, "the guard let nothing through"
        finally:
            loop.cancel()
            await asyncio.gather(loop, return_exceptions=True)
            await guarded.close()
            await free.close()
            await db.close()


# --- decisions of programs


async def nothing(_: Request) -> dict[str, Any]:
    return {}


class Desk:
    """Takes signed decisions about the case `case-1` in version 3."""

    def __init__(self, path: Path, clock: Clock) -> None:
        self.clock = clock
        self.db = Database(path, Bell())

    async def opens(self, *known: Integration) -> None:
        self.integrations = Integrations(self.db, self.clock, "relay.example", known)
        assert self.integrations.schema is not None
        await self.db.open([self.integrations.schema], "relay.example")
        await self.integrations.open()

    async def takes(
        self, body: Any, *, secret: str = SECRET, message: str = "msg_1", at: int | None = None, **more: Any
    ) -> Signed:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        signed = raw.decode(errors="replace").encode()
        headers = signatures.headers([secret], message, self.clock.now() if at is None else at, signed) | more
        request = Request(
            make_mocked_request("POST", "/", headers=headers), Route("POST", "/", nothing, auth="none"), {}
        )
        request.body = raw
        assert self.integrations.is_signed(request)
        return await self.integrations.accept(
            request, purpose="decision", report_id="case-1", version=3, scope="reports:decide"
        )

    async def uses_up(self, signed: Signed) -> None:
        with self.db.write() as tx:
            signed.use_up(tx)
        await tx


GOOD = {"aud": "relay.example", "purpose": "decision", "report_id": "case-1", "version": 3, "measures": []}


async def test_a_signed_decision_counts_once_for_one_case_in_one_state(tmp_path: Path) -> None:
    desk = Desk(tmp_path / "db", Clock())
    triage = Integration(name="triage", secrets=(SECRET,), scopes=("reports:decide",))
    reader = Integration(name="reader", secrets=(OTHER_SECRET,), scopes=("reports:read",))
    await desk.opens(triage, reader)
    signed = await desk.takes(GOOD)
    assert signed.actor == "integration:triage" and signed.body["measures"] == []
    await desk.uses_up(signed)
    with pytest.raises(ApiError) as again:
        await desk.uses_up(await desk.takes(GOOD))
    assert again.value.status == 409, "the same message counts once"
    await desk.uses_up(await desk.takes(GOOD, message="msg_2"))
    for change, status in (
        ({"aud": "other.example"}, 403),
        ({"purpose": "report"}, 403),
        ({"report_id": "case-2"}, 403),
        ({"version": 2}, 409),
        ({"version": None}, 409),
    ):
        with pytest.raises(ApiError) as refused:
            await desk.takes({**GOOD, **change})
        assert refused.value.status == status, f"a decision with {change} is refused"
    with pytest.raises(ApiError) as refused:
        await desk.takes(GOOD, secret=OTHER_SECRET)
    assert refused.value.status == 403 and "scopes" in refused.value.text, "reading is not deciding"
    strange = "whsec_" + "QUJD" * 10
    for forged in (
        desk.takes(GOOD, secret=strange),
        desk.takes(GOOD, at=desk.clock.now() - 6 * 60 * SECOND),
        desk.takes(GOOD, at=desk.clock.now() + 6 * 60 * SECOND),
        desk.takes(GOOD, **{"webhook-signature": ""}),
        desk.takes(GOOD, **{"webhook-signature": "v1,é v1a,x v1"}),
        desk.takes(GOOD, **{"webhook-timestamp": "-1"}),
        desk.takes(GOOD, **{"webhook-timestamp": "9" * 400}),
        desk.takes(GOOD, **{"webhook-id": "x" * 101}),
    ):
        with pytest.raises(Unauthorized):
            await forged
    for body in (b"[]", b"\xff\xfe", b"{", b"{}"):
        with pytest.raises(ApiError):
            await desk.takes(body)
    await desk.db.close()


async def test_a_new_secret_waits_a_day(tmp_path: Path) -> None:
    clock = Clock()
    desk = Desk(tmp_path / "db", clock)
    await desk.opens(Integration(name="triage", secrets=(SECRET,)))
    assert (await desk.takes(GOOD)).actor == "integration:triage", "the first counts at once"
    await desk.db.close()
    again = Desk(tmp_path / "db", clock)
    await again.opens(Integration(name="triage", secrets=(SECRET, OTHER_SECRET)))
    assert await again.takes(GOOD), "it still does"
    with pytest.raises(ApiError) as refused:
        await again.takes(GOOD, secret=OTHER_SECRET)
    assert "a day" in refused.value.text, "whoever can write into the config must wait, and be seen"
    clock.forward(hours=DAY / HOUR + 1)
    assert await again.takes(GOOD, secret=OTHER_SECRET)
    await again.db.close()
