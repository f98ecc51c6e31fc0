"""A town of relays: several in one process (or each in its own) on real loopback sockets, with a throw-away authority.

`cut` and `mend` take away and give back the network between two of them; `clock.forward` moves everybody's time; a
relay can be stopped and started on the same folder, or killed where it runs as a process of its own (`Apart`).
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp

from federation.exchange import Reply
from relay import config, folder
from relay.clock import DAY, HOUR, MINUTE, SECOND
from relay.config import Listener
from relay.server import Server
from scripts.certificates import Authority
from tests.people import Person

ROOT = Path(__file__).parent.parent
PASSWORD = "correct horse battery staple"
START_SECONDS = 30.0

CONFIG = """\
server_name: {name}
listeners:
  - {{address: "127.0.0.1", port: {client_port}, serves: [client]}}
  - {{address: "127.0.0.1", port: {federation_port}, serves: [federation], tls_certificate: tls.crt, tls_key: tls.key}}
registration: {{mode: open_to_everyone}}
log: {{level: {log_level}}}
"""


FEDERATION = "federation: {extra_ca_file: ca.crt, outbox_backoff_min: 1s, outbox_backoff_max: 1h, request_timeout: 10s}"


class Clock:
    """The real time and what it was moved forward by. Whoever sleeps is woken when her time has come."""

    def __init__(self) -> None:
        self._ahead_s = 0.0
        self._moved = asyncio.Event()

    def now(self) -> int:
        return time.time_ns() // 1_000_000 + int(self._ahead_s * SECOND)

    def monotonic(self) -> float:
        return time.monotonic() + self._ahead_s

    def sleep(self, seconds: float) -> Coroutine[Any, Any, None]:
        """Counts from this call on, not from the first step of what it returns: time may be moved between the two."""
        return self._until(self.monotonic() + seconds)

    async def _until(self, then: float) -> None:
        while (left := then - self.monotonic()) > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._moved.wait()

    def forward(self, *, seconds: float = 0, minutes: float = 0, hours: float = 0) -> None:
        self._ahead_s += seconds + (minutes * MINUTE + hours * HOUR) / SECOND
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()

    def to_the_next_day(self) -> None:
        """Just after midnight UTC: for stories of an hour that must lie within one day."""
        self.forward(seconds=(DAY - self.now() % DAY) / SECOND + 1)


# Below what the system gives to outgoing connections: a relay that is down keeps its port, and nobody takes it meanwhile.
PORTS = range(12_000, 32_000)
# Each worker of a test run has ports of its own; other test runs on this machine begin elsewhere.
_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
_own = PORTS[int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _workers :: _workers]
_ports = itertools.islice(itertools.cycle(_own), random.randrange(len(_own)), None)


def free_port() -> int:
    """A port that nobody has, and that this process has not given out for a long time."""
    for port in itertools.islice(_ports, len(_own)):
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no port is free on this machine")


class House:
    """What relays in the same process and in one of their own have alike: a folder, a name, ports."""

    def __init__(self, town: Town, nickname: str, settings: str, *, known_port: int | None = None) -> None:
        """`known_port`: where others find it, if something stands between them and it."""
        self.town = town
        self.nickname = nickname
        self.client_port, self.federation_port = free_port(), free_port()
        self.name = f"localhost:{known_port or self.federation_port}"
        self.url = f"http://127.0.0.1:{self.client_port}"
        self.folder = town.folder / nickname
        self.folder.mkdir(mode=0o700, exist_ok=True)
        (self.folder / "ca.crt").write_bytes(town.authority.certificate_file.read_bytes())
        town.authority.certify(self.folder, "localhost", "127.0.0.1")
        if "limits:" not in settings:
            settings += "\nlimits: {enabled: false}\n"
        if "federation:" not in settings:
            settings += f"\n{FEDERATION}\n"
        text = CONFIG.format(
            name=self.name, client_port=self.client_port, federation_port=self.federation_port, log_level=town.log_level
        )
        (self.folder / config.CONFIG_NAME).write_text(text + settings)

    async def start(self) -> None:
        raise NotImplementedError

    async def stop(self) -> None:
        raise NotImplementedError

    async def restart(self) -> None:
        await self.stop()
        await self.start()

    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.rglob("*") if path.is_file() and not path.is_symlink())


class Within(House):
    """A relay in this process."""

    server: Server | None = None

    async def start(self) -> None:
        settings = folder.prepare(self.folder, None, Listener()).settings
        server = Server(settings, self.folder, self.town.clock)
        # The rim of the network: what the town has cut is as unreachable as a pulled cable.
        outward = server.outbox._connections._outward
        request = outward.request

        async def through_the_wire(method: str, url: Any, **rest: Any) -> Reply:
            if self.town.is_cut(self.nickname, url.port):
                raise aiohttp.ClientConnectionError("the wire is cut")
            return await request(method, url, **rest)

        outward.request = through_the_wire  # type: ignore[method-assign]
        self.server = server
        await server.open()
        await server.start()

    async def stop(self) -> None:
        server, self.server = self.server, None
        if server is not None:
            await server.stop()

    async def command(self, name: str, **what: Any) -> Any:
        """What the command line would carry out in the running relay."""
        assert self.server is not None, "the relay runs"
        return await self.server.commands[name](**what)


class Apart(House):
    """A relay as a process of its own, which can be killed. Its log is `relay.log` in the town's folder."""

    process: subprocess.Popen[bytes] | None = None
    file_limit_bytes: int | None = None

    module = "relay"

    def environment(self) -> dict[str, str]:
        return {key: value for key, value in os.environ.items() if key != "RELAY_SERVER_NAME"}

    async def start(self) -> None:
        with self.log.open("ab") as log:
            # Waited for by hand: asyncio's own children can't be waited for from a later event loop.
            self.process = subprocess.Popen(  # noqa: ASYNC220
                [sys.executable, "-m", self.module, "serve", "--data", str(self.folder)],
                stdout=log, stderr=log, cwd=ROOT, env=self.environment(), start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"the relay ended at its start:\n{self.log.read_text()[-3000:]}"
            try:
                async with self.town.http.get(f"{self.url}/_matrix/client/versions") as answer:
                    if answer.status == 200:
                        # Its listeners are opened one after the other.
                        _, writer = await asyncio.open_connection("127.0.0.1", self.federation_port)
                        writer.transport.abort()
                        return
            except (aiohttp.ClientError, OSError):
                await asyncio.sleep(0.02)
        raise AssertionError(f"the relay did not start:\n{self.log.read_text()[-3000:]}")

    @property
    def log(self) -> Path:
        return self.town.folder / f"{self.nickname}.log"

    async def kill(self) -> None:
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGKILL)
        await asyncio.to_thread(self.process.wait)

    async def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                await asyncio.to_thread(self.process.wait, 20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    async def command(self, *words: str, given: str = "") -> tuple[int, str]:
        """`relay …` against this folder: exit status and everything it said."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "relay", *words, "--data", str(self.folder), cwd=ROOT,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        said, _ = await process.communicate(given.encode())
        return process.returncode or 0, said.decode()


class Town:
    def __init__(self, folder: Path, authority: Authority) -> None:
        self.folder = folder
        self.authority = authority
        self.clock = Clock()
        self.log_level = "warning"
        self.houses: dict[str, House] = {}
        self._cuts: set[tuple[str, int]] = set()
        self.http = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))

    async def relay(self, nickname: str = "one", settings: str = "") -> Within:
        """A new relay, or the one of this name. `settings` is YAML that is added to its config."""
        house = self.houses.get(nickname)
        if house is None:
            house = self.houses[nickname] = Within(self, nickname, settings)
            await house.start()
        assert isinstance(house, Within)
        return house

    async def relay_apart(self, nickname: str = "one", settings: str = "") -> Apart:
        house = self.houses[nickname] = Apart(self, nickname, settings)
        await house.start()
        return house

    async def user(self, address: str) -> Person:
        """`alice@one`: a new account on the relay of that name, which is made if it is not there."""
        name, _, nickname = address.partition("@")
        house = self.houses.get(nickname) or await self.relay(nickname)
        person = Person(self.http, house.url, house.name, name, PASSWORD)
        await person.registers()
        return person

    async def users(self, *addresses: str) -> list[Person]:
        return [await self.user(address) for address in addresses]

    def cut(self, one: str, two: str) -> None:
        self._cuts |= {(one, self.houses[two].federation_port), (two, self.houses[one].federation_port)}

    def cut_one_way(self, one: str, two: str) -> None:
        """From now on `one` does not reach `two`; the other way round all is well."""
        self._cuts.add((one, self.houses[two].federation_port))

    def mend(self, one: str, two: str) -> None:
        self._cuts -= {(one, self.houses[two].federation_port), (two, self.houses[one].federation_port)}

    def is_cut(self, nickname: str, port: int | None) -> bool:
        return (nickname, port) in self._cuts

    async def close(self) -> None:
        await self.http.close()
        for house in self.houses.values():
            await house.stop()
