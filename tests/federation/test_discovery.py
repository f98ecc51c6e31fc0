"""Where a server name lives: the standard's steps one by one, what is remembered, and what may not be connected to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from federation.addresses import AddressRule, SrvRecord
from federation.backoff import Backoff
from federation.connections import Connections
from federation.discovery import Discovery
from federation.outward import Outward, tls_context
from relay.clock import HOUR, MINUTE
from relay.doors import OpenDoors
from relay.errors import RemoteError
from relay.protocol.signing import SigningKey
from tests.federation.neighbours import Authority, Listening, Names, TestClock, two_servers

FED, OLD = "_matrix-fed._tcp.", "_matrix._tcp."


class Site:
    """A web server that holds a well-known file, for any name."""

    def __init__(self, folder: Path) -> None:
        self.names = Names()
        self.clock = TestClock()
        self.answer: Any = None
        self.asked = 0
        authority = Authority(folder)
        self.listening = Listening(web.Server(self._answer), authority.issue("h.test", "www.h.test", "127.0.0.1"))
        self.outward = Outward(self.names, AddressRule(here=True), tls_context(authority.file))
        self.discovery = Discovery(self.names, self.outward, self.clock, well_known_port=self.listening.port)

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        self.asked += 1
        if self.answer is None:
            return web.Response(status=404)
        if callable(self.answer):
            return self.answer(request)
        return web.json_response(self.answer)


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    site = Site(tmp_path)
    await site.listening.start()
    yield site
    await site.listening.stop()
    await site.outward.close()


SRV = (SrvRecord(10, 0, "target.test", 4444),)

STEPS = [
    ("1", "1.2.3.4", None, {}, ("1.2.3.4", 8448), "1.2.3.4", "1.2.3.4"),
    ("1", "1.2.3.4:99", None, {}, ("1.2.3.4", 99), "1.2.3.4:99", "1.2.3.4"),
    ("1", "[::1]:99", None, {}, ("::1", 99), "[::1]:99", "::1"),
    ("2", "h.test:99", {"m.server": "never.asked"}, {FED + "h.test": SRV}, ("h.test", 99), "h.test:99", "h.test"),
    ("3.1", "h.test", {"m.server": "1.2.3.4"}, {}, ("1.2.3.4", 8448), "1.2.3.4", "1.2.3.4"),
    ("3.1", "h.test", {"m.server": "[::1]:5"}, {}, ("::1", 5), "[::1]:5", "::1"),
    ("3.2", "h.test", {"m.server": "d.test:77"}, {FED + "d.test": SRV}, ("d.test", 77), "d.test:77", "d.test"),
    ("3.3", "h.test", {"m.server": "d.test"}, {FED + "d.test": SRV}, ("target.test", 4444), "d.test", "d.test"),
    ("3.4", "h.test", {"m.server": "d.test"}, {OLD + "d.test": SRV}, ("target.test", 4444), "d.test", "d.test"),
    ("3.5", "h.test", {"m.server": "d.test"}, {FED + "h.test": SRV}, ("d.test", 8448), "d.test", "d.test"),
    ("4", "h.test", None, {FED + "h.test": SRV, OLD + "h.test": ()}, ("target.test", 4444), "h.test", "h.test"),
    ("5", "h.test", {"m.server": 5}, {OLD + "h.test": SRV}, ("target.test", 4444), "h.test", "h.test"),
    ("6", "h.test", {"m.server": "not a name"}, {}, ("h.test", 8448), "h.test", "h.test"),
    ("6", "no-web.test", None, {}, ("no-web.test", 8448), "no-web.test", "no-web.test"),
]


@pytest.mark.parametrize(("step", "name", "file", "services", "target", "host", "certificate"), STEPS)
async def test_each_step(
    site: Site,
    step: str,
    name: str,
    file: Any,
    services: dict[str, Any],
    target: tuple[str, int],
    host: str,
    certificate: str,
) -> None:
    site.answer = file
    site.names.services = services
    site.names.hosts["no-web.test"] = ()
    route = await site.discovery.route(name)
    assert route.step == step, f"{name} is found by step {step}"
    assert route.targets == (target,), "at this place"
    assert (route.host_header, route.tls_name) == (host, certificate), "asked for, and proven, under this name"


async def test_several_records_are_tried_in_order(site: Site) -> None:
    site.names.services[FED + "h.test"] = [
        SrvRecord(20, 0, "last.test", 1),
        SrvRecord(10, 5, "first.test", 2),
        SrvRecord(30, 0, "", 3),
    ]
    route = await site.discovery.route("h.test")
    assert route.targets == (("first.test", 2), ("last.test", 1)), "by priority, without those that name no host"


async def test_redirects_are_followed_and_loops_are_not(site: Site) -> None:
    def away(request: web.BaseRequest) -> web.StreamResponse:
        if request.path == "/there":
            return web.json_response({"m.server": "d.test:1"})
        return web.Response(status=302, headers={"Location": f"https://www.h.test:{site.listening.port}/there"})

    site.answer = away
    assert (await site.discovery.route("h.test")).targets == (("d.test", 1),), "a redirect leads to the file"

    site.answer = lambda request: web.Response(status=302, headers={"Location": "/round"})
    site.asked = 0
    site.clock.forward(49 * HOUR)
    assert (await site.discovery.route("h.test")).step == "6", "a loop is no file"
    assert site.asked <= 6, "and ends"

    site.answer = lambda request: web.Response(status=302, headers={"Location": "http://www.h.test/plain"})
    site.clock.forward(49 * HOUR)
    assert (await site.discovery.route("h.test")).step == "6", "nor is one that leaves TLS"


async def test_what_is_remembered_and_for_how_long(site: Site) -> None:
    site.answer = {"m.server": "d.test:1"}
    await site.discovery.route("h.test")
    site.clock.forward(23 * HOUR)
    await site.discovery.route("h.test")
    assert site.asked == 1, "a file without a lifetime is kept for a day"
    site.clock.forward(2 * HOUR)
    await site.discovery.route("h.test")
    assert site.asked == 2, "and no longer"

    site.answer = lambda request: web.json_response({"m.server": "d.test:2"}, headers={"Cache-Control": "max-age=3600"})
    site.clock.forward(25 * HOUR)
    await site.discovery.route("h.test")
    site.clock.forward(61 * MINUTE)
    await site.discovery.route("h.test")
    assert site.asked == 4, "it may ask for less"

    site.answer = lambda request: web.json_response(
        {"m.server": "d.test:3"}, headers={"Cache-Control": "max-age=99999999"}
    )
    site.clock.forward(2 * HOUR)
    await site.discovery.route("h.test")
    site.clock.forward(47 * HOUR)
    await site.discovery.route("h.test")
    assert site.asked == 5
    site.clock.forward(2 * HOUR)
    await site.discovery.route("h.test")
    assert site.asked == 6, "but not for more than two days"

    site.answer = lambda request: web.Response(status=503)
    site.clock.forward(47 * HOUR)
    assert (await site.discovery.route("h.test")).targets == (("d.test", 3),)
    before = site.asked
    site.clock.forward(90 * MINUTE)
    await site.discovery.route("h.test")
    assert site.asked == before + 1, "an error is asked about again after a while"


async def test_an_answer_that_is_too_large_is_none(site: Site) -> None:
    site.answer = lambda request: web.Response(body=b'{"m.server":"d.test:1","x":"' + b"x" * 60_000 + b'"}')
    assert (await site.discovery.route("h.test")).step == "6", "nobody needs so much to name a host"


async def test_silent_name_servers_are_asked_again_soon(site: Site) -> None:
    site.names.silent = True
    assert (await site.discovery.route("h.test")).step == "6", "without an answer the last step is tried"
    site.names.silent = False
    site.names.services[FED + "h.test"] = SRV
    site.clock.forward(2 * MINUTE)
    assert (await site.discovery.route("h.test")).step == "4", "and the look-up is repeated soon"


async def test_bad_names_are_refused(site: Site) -> None:
    for name in ("", "a b", "h.test:99999", "h.test/x", "[::1", "@h"):
        with pytest.raises(RemoteError):
            await site.discovery.route(name)


@pytest.mark.parametrize(
    ("address", "usually", "private", "here"),
    [
        ("93.184.216.34", True, True, False),
        ("2606:2800:220:1::1", True, True, False),
        ("127.0.0.1", False, True, True),
        ("::1", False, True, True),
        ("10.1.2.3", False, True, False),
        ("192.168.0.1", False, True, False),
        ("100.64.0.1", False, True, False),
        ("169.254.169.254", False, True, False),
        ("fe80::1%eth0", False, True, False),
        ("fd00::1", False, True, False),
        ("::ffff:127.0.0.1", False, True, True),
        ("::ffff:10.0.0.1", False, True, False),
        ("64:ff9b::7f00:1", False, True, True),
        ("2002:7f00:1::", False, True, True),
        ("0.0.0.0", False, False, False),
        ("::", False, False, False),
        ("224.0.0.1", False, False, False),
        ("255.255.255.255", False, False, False),
        ("nonsense", False, False, False),
    ],
)
def test_which_addresses_may_be_connected_to(address: str, usually: bool, private: bool, here: bool) -> None:
    assert AddressRule().allows(address) is usually, "on the internet"
    assert AddressRule(private=True).allows(address) is private, "where the config allows private addresses"
    assert AddressRule(here=True).allows(address) is here, "where our own name means this machine"


async def test_the_check_stands_where_the_connection_is_made(tmp_path: Path) -> None:
    names = Names()
    async with two_servers(tmp_path, names) as (one, two):
        await one.connections.send(two.name, "POST", "/_matrix/federation/v1/echo", {})
        for address in ("10.0.0.1", "93.184.216.34"):
            names.hosts[f"moved-{address}.test"] = (address,)
            with pytest.raises(RemoteError, match="no address that may be connected to"):
                await one.client.directory(f"moved-{address}.test:{two.listening.port}", "#a:b")
        with pytest.raises(RemoteError):
            await one.client.directory(f"10.0.0.1:{two.listening.port}", "#a:b")
        # A name that first looked harmless and now means another machine gains nothing: what counts is the address
        # that the connection goes to.
        names.hosts["rebound.test"] = ("10.0.0.1", "127.0.0.1")
        with pytest.raises(RemoteError, match="certificate"):
            await one.client.directory(f"rebound.test:{two.listening.port}", "#a:b")


async def test_a_certificate_for_another_name_is_refused(tmp_path: Path) -> None:
    async with two_servers(tmp_path) as (one, two):
        with pytest.raises(RemoteError, match="certificate"):
            await one.client.directory(f"other.test:{two.listening.port}", "#a:b")
        assert two.heard == [], "nothing was said before the other side had proven its name"


async def test_a_connection_is_used_again_only_under_the_name_it_was_proven_for(tmp_path: Path) -> None:
    names = Names()
    async with two_servers(tmp_path, names) as (one, two):
        await one.connections.send(two.name, "POST", "/_matrix/federation/v1/echo", {})
        here = (SrvRecord(1, 0, "two.test", two.listening.port),)
        names.hosts["two.test"] = ("127.0.0.1",)
        names.services = {FED + "other.test": here, FED + "two.test": here}
        with pytest.raises(RemoteError, match="certificate"):
            await one.client.directory("other.test", "#a:b")
        with pytest.raises(RemoteError, match=r"meant for two\.test;"):
            # The other side is reached, and says that it has another name than this one without a port.
            await one.connections.send("two.test", "POST", "/_matrix/federation/v1/echo", {})


class Inner:
    """A machine inside: whoever connects to it has gone where nobody may lead us."""

    def __init__(self) -> None:
        self.callers = 0

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._called, "127.0.0.2", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]

    async def _called(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.callers += 1
        writer.close()

    async def stop(self) -> None:
        self._server.close()
        await self._server.wait_closed()


class OnlyFirst(AddressRule):
    """As the real rule is for the world: one address is outside, every other inside."""

    def allows(self, text: str) -> bool:
        return text == "127.0.0.1"


@pytest.mark.parametrize("way", ["literal", "name", "service", "redirect", "rebinding"])
async def test_nobody_leads_us_to_a_machine_inside(tmp_path: Path, way: str) -> None:
    site, inner = Site(tmp_path), Inner()
    await inner.start()
    await site.listening.start()
    site.names.hosts["inside.test"] = ("127.0.0.2",)
    site.outward._rule = OnlyFirst()
    target = "inside.test"
    if way == "literal":
        site.answer = {"m.server": f"127.0.0.2:{inner.port}"}
    elif way == "name":
        site.answer = {"m.server": f"inside.test:{inner.port}"}
    elif way == "service":
        site.names.services[FED + "h.test"] = (
            SrvRecord(1, 1, target, inner.port),
            SrvRecord(2, 1, "127.0.0.2", inner.port),
        )
    elif way == "redirect":
        where = f"https://127.0.0.2:{inner.port}/.well-known/matrix/server"
        site.answer = lambda request: web.Response(status=302, headers={"Location": where})
    else:
        site.names.hosts["h.test"] = ("127.0.0.2", "127.0.0.1")
        site.answer = {"m.server": f"h.test:{inner.port}"}
    clock = site.clock
    connections = Connections(
        "one.test",
        SigningKey.generate("a"),
        site.discovery,
        site.outward,
        Backoff(clock, least=1, most=1),
        OpenDoors(),
        timeout=2.0,
    )
    try:
        with pytest.raises(RemoteError):
            await connections.get("h.test", "/_matrix/federation/v1/version")
        assert inner.callers == 0, "no connection was made to it"
    finally:
        await site.listening.stop()
        await site.outward.close()
        await inner.stop()
