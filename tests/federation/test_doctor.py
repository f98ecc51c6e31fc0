"""What `relay doctor` finds: each thing that can be wrong between the name and the key, with its cure."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from federation import probing
from federation.addresses import SrvRecord
from federation.doctor import Doctor
from federation.outward import tls_context
from federation.server_keys import own_answer
from relay import peer_commands
from relay.config import Federation, Settings
from relay.protocol.signing import SigningKey
from tests.federation.neighbours import Authority, Listening, Names, Neighbour, two_servers

Found = list[dict[str, str]]


def doctor(server: Neighbour, name: str | None = None, *, well_known_port: int = 443, **federation: Any) -> Doctor:
    settings = Settings(server_name=name or server.name, federation=Federation(**federation))
    return Doctor(
        settings, server.key, server.clock, server._names, tls_context(server._authority.file), server.connections,
        server.backoff, well_known_port=well_known_port,
    )  # fmt: skip


def of(found: Found, subject: str, severity: str | None = None) -> str:
    """What is said of a subject, with its cures."""
    chosen = [one for one in found if one["subject"] == subject and severity in (None, one["severity"])]
    return " ".join(f"{one['what']} {one['todo']}" for one in chosen)


def worst(found: Found) -> set[str]:
    return {one["subject"] for one in found if one["severity"] == "error"}


@pytest.fixture(autouse=True)
def kept_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("federation.doctor.clock_is_kept", lambda: True)


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[tuple[Neighbour, Neighbour]]:
    async with two_servers(tmp_path, Names()) as both:
        yield both


async def test_a_relay_that_is_well_is_told_so(pair: tuple[Neighbour, Neighbour]) -> None:
    one, two = pair
    found = await doctor(one).examine()
    assert not worst(found), found
    assert "30" in of(found, "certificate") or "29" in of(found, "certificate"), "the days that are left"
    assert one.key.key_id in of(found, "key", "ok") and "as they are" in of(found, "answers", "ok")
    assert "an address that nobody outside can use" in of(found, "dns", "warning"), "loopback is not the world"
    found = await doctor(one).examine(ask=two.name)
    assert "reaches this relay, from outside" in of(found, "others", "ok")
    assert (await doctor(one, enabled=False).examine())[0]["subject"] == "federation"


@dataclass
class Place:
    """What lies at the place that the name leads to, when it is not the relay."""

    status: int = 200
    body: Any = None

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        return web.json_response(self.body, status=self.status)


async def test_what_is_wrong_with_port_certificate_and_answers(pair: tuple[Neighbour, Neighbour]) -> None:
    one, _ = pair
    host = one.name.partition(":")[0]
    authority = one._authority
    place = Place()

    async def at(listening: Listening) -> Found:
        await listening.start()
        try:
            return await doctor(one, f"{host}:{listening.port}").examine()
        finally:
            await listening.stop()

    def listens(*names: str, days: int = 30, by: Authority = authority) -> Listening:
        return Listening(web.Server(place.answer), by.issue(*names, days=days))

    found = await doctor(one, f"{host}:9").examine()
    assert worst(found) == {"port"} and "Open port 9 in the firewall" in of(found, "port")
    assert "nothing listens there" in of(found, "port"), "in words, not in the system's"
    found = await at(listens(host, days=-3))
    assert "expired 3 day(s) ago" in of(found, "certificate", "error") and "Renew it" in of(found, "certificate")
    found = await at(listens("elsewhere.test", "*.elsewhere.test"))
    said = of(found, "certificate", "error")
    assert "for elsewhere.test, *.elsewhere.test, not for one.test" in said and "Get a certificate" in said
    (one.folder / "stranger").mkdir()
    found = await at(listens(host, by=Authority(one.folder / "stranger")))
    assert "not made by an authority" in of(found, "certificate", "error")
    assert "fullchain.pem" in of(found, "certificate", "error")
    found = await at(listens(host, days=5))
    assert "expires in" in of(found, "certificate", "warning")

    place.status = 404
    found = await at(listens(host))
    assert "status 404" in of(found, "answers", "error") and "pass /_matrix on" in of(found, "answers")
    place.status, place.body = 200, {"server_name": "somebody.else"}
    assert "keys of another server" in of(await at(listens(host)), "key", "error")
    listening = listens(host)
    place.body = own_answer(f"{host}:{listening.port}", SigningKey.generate("other"), (), one.clock.now())
    assert "another signing key" in of(await at(listening), "key", "error")
    listening = listens(host)
    place.body = own_answer(f"{host}:{listening.port}", one.key, (), one.clock.now())
    found = await at(listening)
    assert "publishes this relay's signing key" in of(found, "key", "ok")
    assert "changes what stands in addresses" in of(found, "answers", "error"), "a proxy that undoes %2F"
    assert "nocanon" in of(found, "answers", "error")


async def test_what_is_wrong_with_names_and_files(pair: tuple[Neighbour, Neighbour]) -> None:
    one, _ = pair
    names = one._names
    place = Place(body={"m.server": one.name})
    site = Listening(web.Server(place.answer), one._authority.issue("h.test"))
    await site.start()
    try:
        examined = doctor(one, "h.test", well_known_port=site.port)
        found = await examined.examine()
        assert f"says {one.name}" in of(found, "well-known", "ok")
        assert "keys of another server" in of(found, "key", "error"), "that relay has another name"
        place.body = {"m.server": "not a name"}
        assert "names no server" in of(await examined.examine(), "well-known", "error")
        place.status = 404
        names.services["_matrix._tcp.h.test"] = (SrvRecord(1, 1, "one.test", one.listening.port),)
        found = await examined.examine()
        assert "status 404" in of(found, "well-known", "warning")
        assert "going out of use" in of(found, "srv", "warning")
        assert "for one.test, not for h.test" in of(found, "certificate", "error"), "SRV changes no certificate's name"
        names.silent = True
        assert "resolv.conf" in of(await examined.examine(), "srv", "warning")
        one.clock.forward(5 * 60_000)
        said = of(await examined.examine(), "clock", "error")
        assert "300 s apart" in said or "299 s apart" in said
    finally:
        await site.stop()
    found = await examined.examine()
    assert "can't be fetched" in of(found, "well-known", "warning")
    names.hosts["h.test"] = ()
    said = of(await examined.examine(), "dns", "error")
    assert "has no address" in said and "Add an A record" in said


async def test_a_server_that_does_not_reach_us_says_so(pair: tuple[Neighbour, Neighbour]) -> None:
    one, two = pair
    await one.listening.stop()
    found = await doctor(one).examine(ask=two.name)
    assert "does not reach this relay" in of(found, "others", "error") and "firewall" in of(found, "others")
    await two.listening.stop()
    found = await doctor(one).examine(ask=two.name)
    assert "can't be asked" in of(found, "others", "error")
    assert f"could not be reached lately: {two.name}" in of(found, "others", "ok")


async def test_a_machine_without_ipv6_does_not_judge_it(
    pair: tuple[Neighbour, Neighbour], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _ = pair
    usual = probing.look_at

    async def look_at(address: str, *more: Any) -> probing.Look:
        return probing.Look("unreachable", no_route=True) if ":" in address else await usual(address, *more)

    monkeypatch.setattr("federation.doctor.look_at", look_at)
    one._names.hosts["one.test"] = ("2001:db8::1", "127.0.0.1")
    found = await doctor(one).examine()
    assert not worst(found) and "remove the AAAA record" in of(found, "port", "warning")


def test_what_is_found_is_told_in_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    long = "Let it answer with the place of your relay, " * 4
    found = [
        {"subject": "dns", "severity": "ok", "what": "All is well there.", "todo": ""},
        {"subject": "port", "severity": "error", "what": "It can't be reached.", "todo": long},
    ]
    assert peer_commands._findings(found).count("\n") == 4, "a line each for programs that read along"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    told = peer_commands._findings(found)
    assert max(map(len, told.splitlines())) <= 60 and told.count("\n") > 6, "no wider than the terminal"
    assert "1 error, 0 warnings." in told and "Begin with the first error" in told


def test_the_kernel_is_asked_about_its_clock() -> None:
    assert probing.clock_is_kept() in (True, False, None)
