"""The form for everybody: one flooder shuts it for herself only, and no address is kept."""

from __future__ import annotations

import pytest

from relay.clock import HOUR
from relay.errors import LimitExceeded
from relay.moderation import form_limits
from relay.moderation.form_limits import BUSY, OF_ALL, OF_ONE_NETWORK, OF_ONE_UNTOLD, OF_ONE_WHILE_BUSY, FormLimits
from tests.moderation.casehouse import desk, hears
from tests.pages.visitors import Visitor
from tests.people import until
from tests.town import Clock, Town

NOTICE = {
    "category": "ncii",
    "where": "@bob:else.example",
    "why": "quillon-marzipan",
    "contact": "me@example.org",
    "good_faith": "yes",
}


async def test_one_flooder_shuts_the_form_for_herself_only(town: Town) -> None:
    mod = await desk(town)
    floods = [Visitor(town, mod.house, **{"X-Forwarded-For": f"81.2.69.{number}"}) for number in range(1, 4)]
    statuses = []
    for number in range(OF_ONE_NETWORK + 3):
        answer, text = await floods[number % 3].sends("/_relay/notice", NOTICE)
        statuses.append(answer.status)
    assert statuses == [200] * OF_ONE_NETWORK + [429] * 3, "many addresses of one network are one"
    assert "Retry-After" in answer.headers and "<form" not in text.partition("<main")[2], "she is told when, on a page"
    for address in ("81.2.70.1", "2a02:1:2:300::1", "81.2.69.200, 81.2.71.9"):
        answer, _ = await Visitor(town, mod.house, **{"X-Forwarded-For": address}).sends("/_relay/notice", NOTICE)
        assert answer.status == 200, "everybody else comes through"
    assert len(await mod.queue()) == OF_ONE_NETWORK + 3
    for file in mod.house.files():
        raw = file.read_bytes()
        for told in (b"81.2.", b"2a02:1", b"quillon", b"me@example.org"):
            assert told not in raw, f"{told!r} lies in {file.name}"
    town.clock.forward(minutes=61)
    assert (await floods[0].sends("/_relay/notice", NOTICE))[0].status == 200


async def test_moderators_hear_of_a_flood_from_many_places(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    mod = await desk(town)
    for name, number in (("OF_ALL", 4), ("BUSY", 2), ("OF_ONE_WHILE_BUSY", 1)):
        monkeypatch.setattr(form_limits, name, number)
    statuses = []
    for number in (1, 1, 1, 2, 3, 4, 5):
        stranger = Visitor(town, mod.house, **{"X-Forwarded-For": f"81.2.{number}.1"})
        statuses.append((await stranger.sends("/_relay/notice", NOTICE))[0].status)
    assert statuses == [200, 200, 429, 200, 200, 429, 429]
    await hears(mod.person, "2 notices have come over the form for everybody")
    await hears(mod.person, "4 notices have come over the form for everybody")

    async def none_waits() -> bool:
        waiting = await mod.house.server.db.read(lambda query: query.value("SELECT count(*) FROM notices_due"))  # type: ignore[union-attr]
        return bool(waiting == 0)

    assert await until(none_waits)
    said = [
        event["content"]["body"]
        for events in mod.person.timeline.values()
        for event in events
        if "form for" in event["content"].get("body", "")
    ]
    assert len(said) == 2, "each once an hour"
    assert not (await mod.house.command("audit"))["findings"], "and the relay knows its own words"


def test_what_counts_as_one_place() -> None:
    for one, other in (
        ("81.2.69.1", "81.2.69.254"), ("::ffff:81.2.69.1", "81.2.69.9"), ("2a02:1:2:300::1", "2a02:1:2:3ff:a::1"),
        ("127.0.0.1", "10.0.0.1"), ("fe80::1%eth0", "::1"), ("nonsense", ""),
    ):  # fmt: skip
        assert form_limits.network_of(one) == form_limits.network_of(other)
    for one, other in (("81.2.69.1", "81.2.70.1"), ("2a02:1:2:300::1", "2a02:1:2:400::1"), ("81.2.69.1", "10.0.0.1")):
        assert form_limits.network_of(one) != form_limits.network_of(other)


def test_each_place_has_its_share() -> None:
    clock = Clock()
    limits = FormLimits(clock)

    def admitted(address: str) -> bool:
        try:
            limits.admit(address)
        except LimitExceeded as no:
            assert 0 < no.body()["retry_after_ms"] <= HOUR + 1
            return False
        return True

    assert sum(admitted("81.2.69.1") for _ in range(30)) == OF_ONE_NETWORK
    assert sum(admitted("10.0.0.1") for _ in range(OF_ONE_UNTOLD + 9)) == OF_ONE_UNTOLD, "a proxy that tells nothing"
    number = 0
    while limits.number < BUSY:
        number += 1
        assert admitted(f"80.1.{number}.1")
    assert not admitted("81.2.69.77") and sum(admitted("82.2.69.1") for _ in range(9)) == OF_ONE_WHILE_BUSY
    while limits.number < OF_ALL:
        number += 1
        assert admitted(f"80.{number // 250}.{number % 250}.1"), "while it is busy, newcomers are let in"
    assert not admitted("83.1.1.1")
    clock.forward(minutes=61)
    assert admitted("83.1.1.1") and limits.number == 1, "an hour later all is forgotten"
