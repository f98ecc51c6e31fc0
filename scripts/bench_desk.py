"""The rows of moderation: a report reaches a program and the moderators' room, and the desk answers with 1,000 reports in it.

A relay of its own, with a moderator who has a key, a webhook receiver on loopback, and people who report one message each time
with words, which the relay seals.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import aiohttp
from aiohttp import web

from scripts.bench_client import BenchError, Homeserver, Person
from scripts.bench_ground import Figures, Size, Stopwatch, named, spread
from scripts.bench_machine import Meter

ARRIVAL_TIMEOUT_S = 30.0
REPORTS_OF_ONE = 10  # in an hour, by the relay's own limit
# Each answer waits a little by itself, so that its time tells nothing.
REPORTERS_AT_ONCE = 20
MODERATOR, PASSWORD = "bench-moderator", "Correct-horse-9-moderator"
SECRET = "whsec_" + base64.b64encode(os.urandom(32)).decode()


class Receiver:
    """Takes webhooks and notes when each came."""

    def __init__(self) -> None:
        self.came: list[float] = []
        self.url = ""

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[Receiver]:
        app = web.Application()
        app.router.add_post("/told", self._told)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}/told"
        try:
            yield self
        finally:
            await runner.cleanup()

    async def _told(self, request: web.Request) -> web.Response:
        body = await request.json()
        if body.get("type") == "report.created":
            self.came.append(time.perf_counter())
        return web.Response(status=204)

    @property
    def config(self) -> str:
        return (
            f"hooks: {{webhooks: [{{name: bench, url: '{self.url}', secrets: ['{SECRET}'], "
            "allow_private_addresses: true, types: [report.created]}]}\n"
        )


@dataclass
class Office:
    """The relay, its moderator and its people."""

    homeserver: Homeserver
    meter: Meter
    size: Size
    receiver: Receiver
    moderator: Person
    pages: aiohttp.ClientSession
    room_id: str = ""
    sender: Person | None = None
    reporters: list[Person] = field(default_factory=list)
    filed: int = 0

    async def reports(self) -> None:
        """The next message and its report, by somebody who may still report."""
        assert self.sender is not None
        event_id = await self.sender.sends(self.room_id)
        await self.files(self.reporters[-1 - self.filed // REPORTS_OF_ONE], event_id)
        self.filed += 1

    async def files(self, reporter: Person, event_id: str) -> None:
        where = f"/v3/rooms/{quote(self.room_id)}/report/{quote(event_id)}"
        await reporter.call(
            "POST", where, {"reason": "They threatened me in this message, and not for the first time."}
        )


@contextlib.asynccontextmanager
async def office(url: str, pid: int, folder: Path, size: Size, receiver: Receiver) -> AsyncIterator[Office]:
    command = [
        sys.executable,
        "-m",
        "relay",
        "user",
        "add",
        MODERATOR,
        "--admin",
        "--password-stdin",
        "--data",
        str(folder),
    ]
    made = await asyncio.to_thread(subprocess.run, command, input=PASSWORD.encode(), capture_output=True, check=False)
    if made.returncode:
        raise BenchError(f"no moderator could be made: {made.stderr.decode(errors='replace')[-500:]}")
    homeserver = Homeserver(url)
    async with aiohttp.ClientSession(url, cookie_jar=aiohttp.CookieJar(unsafe=True)) as pages:
        moderator = await _signed_in(url, pages)
        yield Office(homeserver, Meter(pid), size, receiver, moderator, pages)
        moderator.hangs_up()


async def _signed_in(url: str, pages: aiohttp.ClientSession) -> Person:
    login = {"type": "m.login.password", "identifier": {"type": "m.id.user", "user": MODERATOR}, "password": PASSWORD}
    async with pages.post("/_matrix/client/v3/login", json=login) as answer:
        told = await answer.json()
        if answer.status != 200:
            raise BenchError(f"the moderator could not sign in: {told}")
    async with pages.get("/_relay/sign-in") as answer:
        token = re.search(r'name="form" value="([\w-]+)"', await answer.text())
    fields = {"form": token[1] if token else "", "name": MODERATOR, "password": PASSWORD, "next": "/_relay/desk"}
    async with pages.post("/_relay/sign-in", data=fields) as answer:
        if answer.status != 200 or not answer.url.path.startswith("/_relay/desk"):
            raise BenchError("the moderator could not sign in at the desk")
    host, _, port = url.removeprefix("http://").partition(":")
    return Person(host, int(port), told["user_id"], told["access_token"], told["device_id"])


async def desk(office: Office) -> Figures:
    """Fills the queue, then times the pages, then reports one after the other until program and room have each."""
    size = office.size
    people = -(-size.reports // REPORTS_OF_ONE) + -(-size.timed_reports // REPORTS_OF_ONE)
    office.sender, *office.reporters = await office.homeserver.people(people + 1)
    office.room_id = await office.sender.creates_room(office.reporters)
    begun, cpu = time.perf_counter(), office.meter.cpu_s()
    await _fill(office)
    filed = {
        "reports_per_s": size.reports / (time.perf_counter() - begun),
        "report_cpu_ms": (office.meter.cpu_s() - cpu) / size.reports * 1e3,
    }
    await _until(lambda: len(office.receiver.came) >= size.reports, "webhooks")
    queue, case = await _paged(office, "queue", "/_relay/desk"), await _first_case(office)
    opened = await _paged(office, "case", f"/_relay/desk/case/{case}")
    listed = await _paged(office, "list", "/_relay/safety/v1/reports", token=office.moderator.token)
    told, heard = await _heard(office)
    return {
        **filed, **queue, **opened, **listed,
        "webhook_p50_ms": statistics.median(told) * 1e3, "webhook_p95_ms": spread(told)["p95_ms"],
        "room_p50_ms": statistics.median(heard) * 1e3, "room_p95_ms": spread(heard)["p95_ms"],
    }  # fmt: skip


async def _fill(office: Office) -> None:
    few = asyncio.Semaphore(REPORTERS_AT_ONCE)
    assert office.sender is not None
    events = [await office.sender.sends(office.room_id) for _ in range(office.size.reports)]

    async def by(reporter: Person, mine: list[str]) -> None:
        async with few:
            for event_id in mine:
                await office.files(reporter, event_id)

    shares = [events[at : at + REPORTS_OF_ONE] for at in range(0, len(events), REPORTS_OF_ONE)]
    await asyncio.gather(*(by(reporter, mine) for reporter, mine in zip(office.reporters, shares, strict=False)))


async def _paged(office: Office, what: str, path: str, token: str = "") -> Figures:
    headers = {"Authorization": f"Bearer {token}"} if token else {}

    async def once() -> None:
        async with office.pages.get(path, headers=headers) as answer:
            await answer.read()
            if answer.status != 200:
                raise BenchError(f"{path} was answered {answer.status}")

    await once()
    watch = Stopwatch(office.meter)
    for _ in range(office.size.desk_pages):
        await watch.time(once())
    return {f"{what}_cpu_ms": watch.cpu_ms(), **named(what, watch.took)}


async def _first_case(office: Office) -> str:
    async with office.pages.get("/_relay/desk") as answer:
        found = re.search(r"/_relay/desk/case/([\w-]+)", await answer.text())
    if found is None:
        raise BenchError("the queue shows no case")
    return found[1]


async def _heard(office: Office) -> tuple[list[float], list[float]]:
    """From the report to the program, and to the moderator's long poll."""
    moderator, told, heard = office.moderator, [], []
    await moderator.sync()
    for timed in range(office.size.timed_reports):
        before = len(office.receiver.came)
        # Reports are numbered as they come.
        arrives = asyncio.create_task(_notice_of(moderator, office.size.reports + timed + 1))
        begun = time.perf_counter()
        await office.reports()
        heard.append(await arrives - begun)
        await _until(lambda before=before: len(office.receiver.came) > before, "a webhook")  # type: ignore[misc]
        told.append(office.receiver.came[before] - begun)
    return told, heard


async def _notice_of(moderator: Person, number: int) -> float:
    begins = f"Report {number} has come"
    async with asyncio.timeout(ARRIVAL_TIMEOUT_S):
        while True:
            answer = await moderator.sync(timeout_ms=10_000)
            now = time.perf_counter()
            rooms = answer.get("rooms", {}).get("join", {}).values()
            events = [event for room in rooms for event in room.get("timeline", {}).get("events", ())]
            if any(str(event.get("content", {}).get("body", "")).startswith(begins) for event in events):
                return now


async def _until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.perf_counter() + ARRIVAL_TIMEOUT_S
    while not holds():
        if time.perf_counter() > deadline:
            raise BenchError(f"{what} did not come in time")
        await asyncio.sleep(0.002)


SCENARIOS: dict[str, Callable[[Office], Awaitable[Figures]]] = {"desk": desk}
