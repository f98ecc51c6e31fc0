"""Figures for a monitoring program: what they count, what they never say, and who is answered."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from relay import checkup, config
from relay.config import ConfigError
from tests.moderation.casehouse import desk, reports
from tests.moderation.tools import SECRET, Tool
from tests.people import until
from tests.town import Town, Within, free_port

LINE = re.compile(r'([a-z_]+(?:\{[a-z_]+="[^"]*"(?:,[a-z_]+="[^"]*")*\})?) (\S+)')
TOKEN = "a token that nobody can guess"


async def with_figures(town: Town, settings: str = "") -> tuple[Within, int]:
    """A relay with one more listener, and that one's port."""
    house, port = await town.relay("one", settings), free_port()
    await house.stop()
    file = house.folder / config.CONFIG_NAME
    more = f'listeners:\n  - {{address: "127.0.0.1", port: {port}, serves: [metrics]}}\n'
    file.write_text(file.read_text().replace("listeners:\n", more, 1))
    await house.start()
    return house, port


class Figures:
    def __init__(self, town: Town, port: int) -> None:
        self._town, self._url = town, f"http://127.0.0.1:{port}/metrics"
        self.text = ""

    async def status(self, **headers: str) -> int:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self._town.http.get(self._url, headers=named) as answer:
            self.text = await answer.text()
            assert answer.headers["Server"] == "Sealed Relay", "which library serves it is nobody's business"
            return answer.status

    async def reads(self, **headers: str) -> dict[str, float]:
        assert await self.status(**headers) == 200, self.text
        found = {}
        for line in self.text.splitlines():
            if not line.startswith("# "):
                one = LINE.fullmatch(line)
                assert one is not None, line
                found[one[1]] = float(one[2])
        return found


async def test_what_is_counted_names_nobody(town: Town) -> None:
    async with Tool() as tool:
        hooks = (
            f"hooks: {{http: [{{name: gate, url: '{tool.url}/ask', points: [message], budget: 20s, secrets: [{SECRET}]}}], "
            f"webhooks: [{{name: pager, url: '{tool.url}/told', secrets: [{SECRET}], allow_private_addresses: true}}]}}\n"
        )
        house, port = await with_figures(town, hooks)
        mod = await desk(town)
        alice, bob = await town.users("alice@one", "bob@two")
        room = await alice.creates_room(with_=bob)
        figures = Figures(town, port)
        before = await figures.reads()
        tool.answers["ask"] = (200, {"decision": "deny"})
        assert (await alice.is_refused(alice.sends(room))).status == 403
        tool.answers["ask"] = (500, {})
        town.clock.forward(minutes=2)
        for _ in range(5):
            await alice.sends(room)
        tool.answers["ask"] = (200, {"decision": "allow"})
        town.clock.forward(minutes=2)
        heard = await bob.sends(room)
        assert await alice.sees(heard)
        tool.answers["told"] = (500, {})
        await reports(alice, room, heard, "a reason", **{"org.relay.category": "threat"})

        async def has_failed() -> bool:
            return (await figures.reads())['relay_webhook_messages_total{webhook="pager",outcome="failed"}'] >= 1

        assert await until(has_failed)
        after = await figures.reads()

        def grown(name: str) -> float:
            return after[name] - before[name]

        assert (
            grown('relay_hook_refusals_total{hook="gate"}') == 1
            and grown('relay_hook_failures_total{hook="gate"}') == 5
        )
        assert grown('relay_hook_calls_total{hook="gate"}') >= 7, "asked for each message, also for that from elsewhere"
        assert after['relay_hook_seconds_total{hook="gate"}'] > 0
        assert grown('relay_events_total{way="sent"}') >= 5 and grown('relay_events_total{way="received"}') >= 1
        assert grown('relay_cases_open{category="threat"}') == 1 and after['relay_cases_open{category="minor"}'] == 0
        assert after['relay_webhook_waiting{webhook="pager"}'] >= 1
        assert after["relay_database_bytes"] > 0 and after["process_resident_memory_bytes"] > 1e6
        assert len(after) < 60, "few series, however many people and rooms there are"
        for told in (alice.id, bob.id, mod.person.id, room, house.name, bob.server, "localhost", heard, "a reason"):
            assert told not in figures.text, f"{told!r} stands in the figures"

        town.cut("one", "two")
        await alice.sends(room)

        async def is_failing() -> bool:
            now = await figures.reads()
            return now['relay_outbox_servers{state="waiting"}'] == now['relay_outbox_servers{state="failing"}'] == 1

        assert await until(is_failing)
        tool.answers["ask"] = (500, {})
        for _ in range(6):
            await alice.sends(room)
        assert (await figures.reads())['relay_hook_resting{hook="gate"}'] == 1, "it is left alone for a minute"


async def test_who_is_answered(town: Town) -> None:
    house, port = await with_figures(town)
    figures = Figures(town, port)
    assert await figures.status() == 200
    for headers in (
        {"X_Forwarded_For": "81.2.69.1"}, {"Forwarded": "for=81.2.69.1"}, {"Host": "evil.example"}, {"Host": "evil.example:9100"},
    ):  # fmt: skip
        assert await figures.status(**headers) == 403 and "relay_" not in figures.text, headers
    alice = await town.user("alice@one")
    assert (await alice.is_refused(alice.calls("GET", "/metrics"))).status == 404, "not where apps ask"
    async with town.http.get(f"http://127.0.0.1:{port}/_matrix/client/versions") as answer:
        assert answer.status == 404, "and nothing else there"
    await house.stop()
    file = house.folder / config.CONFIG_NAME
    file.write_text(file.read_text() + f'\nmetrics: {{token: "{TOKEN}"}}\n')
    await house.start()
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": "Bearer ö"},
    ):
        assert await figures.status(**headers) == 403
    assert await figures.status(Authorization=f"Bearer {TOKEN}", X_Forwarded_For="81.2.69.1") == 200


@pytest.mark.parametrize(
    ("listener", "token", "said"),
    [
        ('{address: "0.0.0.0", port: 1, serves: [metrics]}', None, "to nobody but this machine"),
        ('{address: "0.0.0.0", port: 1, serves: [metrics]}', TOKEN, "to whoever has the token"),
        ('{address: "127.0.0.1", port: 1, serves: [client, metrics]}', None, "beside what a proxy hands on"),
        ('{address: "127.0.0.1", port: 1, serves: [metrics]}', None, None),
    ],
)
def test_the_operator_hears_where_figures_can_be_reached_from_elsewhere(
    tmp_path: Path, listener: str, token: str | None, said: str | None
) -> None:
    text = f"server_name: relay.example\nlisteners: [{listener}]\n" + (
        f'metrics: {{token: "{token}"}}\n' if token else ""
    )
    settings = config.parse(text)
    found: list[Any] = [one for one in checkup._openness(settings) if "Figures" in one.what]
    assert [one.severity for one in found] == (["warning"] if said else ["ok"])
    assert said is None or said in found[0].what


def test_a_token_is_long() -> None:
    with pytest.raises(ConfigError, match=r"metrics\.token"):
        config.parse('server_name: relay.example\nmetrics: {token: "short"}\n')
