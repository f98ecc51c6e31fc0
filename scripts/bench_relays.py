"""The relays that the bench measures: its own, on loopback, in a temporary folder, with open registration and no limits.

One alone, or two that federate as `scripts/dev` sets them up, on ports the system has free.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from scripts import certificates
from scripts.bench_client import BenchError
from scripts.dev_relays import CONFIG as FEDERATING

# structlog loads both where they are installed, as the tests' libraries are: 3 MB that an operator's relay does not have.
AS_INSTALLED = (
    "import sys; sys.modules.update(twisted=None, greenlet=None); from relay.__main__ import main; sys.exit(main())"
)
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 20.0
LOG_TAIL = 3000

ALONE = """\
# Made by scripts/bench: for measuring on loopback, never for real use.
server_name: localhost
listeners:
  - {{address: "127.0.0.1", port: {client}, serves: [client]}}
registration: {{mode: open_to_everyone}}
limits: {{enabled: false}}
"""


@dataclass(frozen=True)
class Running:
    url: str
    pid: int


@contextlib.contextmanager
def alone(folder: Path, more: str = "") -> Iterator[Running]:
    """`more` is added to its config."""
    client, *_ = _free_ports(1)
    folder.mkdir(mode=0o700)
    (folder / "relay.yaml").write_text(ALONE.format(client=client) + more)
    with _started(folder, client) as running:
        yield running


@contextlib.contextmanager
def federating(folder: Path) -> Iterator[tuple[Running, Running]]:
    folder.mkdir(mode=0o700)
    authority = certificates.authority(folder)
    ports = _free_ports(4)
    with contextlib.ExitStack() as stack:
        both = []
        for name, federation, client in (("one", ports[0], ports[1]), ("two", ports[2], ports[3])):
            home = folder / name
            home.mkdir(mode=0o700)
            (home / "relay.yaml").write_text(FEDERATING.format(federation=federation, client=client))
            (home / "ca.crt").write_bytes(authority.certificate_file.read_bytes())
            authority.certify(home, "localhost", "127.0.0.1", "::1")
            both.append(stack.enter_context(_started(home, client)))
        yield both[0], both[1]


@contextlib.contextmanager
def _started(folder: Path, port: int) -> Iterator[Running]:
    command = [sys.executable, "-c", AS_INSTALLED, "serve", "--data", str(folder)]
    environment = {key: value for key, value in os.environ.items() if key != "RELAY_SERVER_NAME"}
    log_file = folder / "relay.log"
    with log_file.open("ab") as log:
        # A session of its own: Ctrl-C reaches the bench alone, which then stops what it started.
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        _wait_for(process, port, log_file)
        yield Running(f"http://127.0.0.1:{port}", process.pid)
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for(process: subprocess.Popen[bytes], port: int, log_file: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
        try:
            connection.request("GET", "/_matrix/client/versions")
            if connection.getresponse().status == 200:
                return
        except OSError:
            time.sleep(0.05)
        finally:
            connection.close()
    raise BenchError(f"The relay did not start. It said:\n{log_file.read_text()[-LOG_TAIL:]}")


def _free_ports(number: int) -> list[int]:
    """Ports that nobody listens on just now; held all at once, so that they differ."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
