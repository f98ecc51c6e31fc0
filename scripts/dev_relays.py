"""Two relays that federate with each other on loopback, to try out and to test against: what `scripts/dev` runs.

Server names localhost:8441 and localhost:8442 with TLS of a throw-away CA on those ports, the client API on
127.0.0.1:8101 and :8102, open registration, no rate limits. Never for real use.
"""

from __future__ import annotations

import argparse
import http.client
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from scripts import certificates

RELAYS = (("one", 8441, 8101), ("two", 8442, 8102))
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 20.0

CONFIG = """\
# Made by scripts/dev: for trying out on loopback, never for real use.
server_name: localhost:{federation}
public_base_url: http://127.0.0.1:{client}
listeners:
  - {{address: "127.0.0.1", port: {client}, serves: [client]}}
  - {{address: "127.0.0.1", port: {federation}, serves: [federation], tls_certificate: tls.crt, tls_key: tls.key}}
registration: {{mode: open_to_everyone}}
limits: {{enabled: false}}
federation:
  extra_ca_file: ca.crt
  outbox_backoff_min: 1s
  outbox_backoff_max: 10s
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/dev", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="keep the data here (default: a temporary folder, deleted)"
    )
    arguments = parser.parse_args()
    # A polite end, also for whoever sends SIGTERM: the relays are ours to stop.
    signal.signal(signal.SIGTERM, _interrupted)
    if arguments.data is not None:
        arguments.data.mkdir(mode=0o700, parents=True, exist_ok=True)
        return _run(arguments.data.absolute())
    with tempfile.TemporaryDirectory(prefix="sealed-relay-dev-") as folder:
        return _run(Path(folder))


def _run(folder: Path) -> int:
    authority = certificates.authority(folder)
    running: list[subprocess.Popen[bytes]] = []
    try:
        for name, federation, client in RELAYS:
            data = folder / name
            _furnish(data, authority, federation, client)
            log = (data / "relay.log").open("ab")
            command = [sys.executable, "-m", "relay", "serve", "--data", str(data)]
            environment = {key: value for key, value in os.environ.items() if key != "RELAY_SERVER_NAME"}
            # A session of its own: Ctrl-C reaches us alone, and we stop both in order.
            running.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True))
            log.close()
        for process, (name, federation, client) in zip(running, RELAYS, strict=True):
            if not _answers(process, client):
                print((folder / name / "relay.log").read_text()[-4000:], file=sys.stderr)
                print(f"Relay {name} did not start; above stands what it said.", file=sys.stderr)
                return 1
            print(f"localhost:{federation}  client API http://127.0.0.1:{client}  federation https://localhost:{federation}  "
                  f"process {process.pid}  log {folder / name / 'relay.log'}", flush=True)  # fmt: skip
        print(f"Registration is open on both. The CA: {authority.certificate_file}. Ctrl-C stops both.", flush=True)
        while all(process.poll() is None for process in running):
            time.sleep(0.2)
        print("A relay ended by itself; its log says why. Stopping the other.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _stop(running)
        print("Both are stopped.", flush=True)


def _furnish(data: Path, authority: certificates.Authority, federation: int, client: int) -> None:
    data.mkdir(mode=0o700, exist_ok=True)
    if not (data / "relay.yaml").exists():
        (data / "relay.yaml").write_text(CONFIG.format(federation=federation, client=client))
    (data / "ca.crt").write_bytes(authority.certificate_file.read_bytes())
    if not (data / "tls.crt").exists():
        authority.certify(data, "localhost", "127.0.0.1", "::1")


def _answers(process: subprocess.Popen[bytes], port: int) -> bool:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
        try:
            connection.request("GET", "/_matrix/client/versions")
            if connection.getresponse().status == 200:
                return True
        except OSError:
            time.sleep(0.1)
        finally:
            connection.close()
    return False


def _stop(running: list[subprocess.Popen[bytes]]) -> None:
    for process in running:
        if process.poll() is None:
            process.terminate()
    for process in running:
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
