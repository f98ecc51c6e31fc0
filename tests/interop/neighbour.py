"""A real Synapse as a neighbour on loopback: one process with a SQLite file, TLS of the tests' authority, open registration.

Nothing of it is imported: it runs as anybody would run it. People on it are the same `Person` as on our relays, and
their names are new for each story, since one Synapse serves them all.
"""

from __future__ import annotations

import asyncio
import http.client
import importlib.util
import itertools
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from relay.protocol.signing import SigningKey
from scripts.certificates import Authority
from tests.people import Json, Person
from tests.town import PASSWORD, free_port

START_SECONDS = 40.0
STOP_SECONDS = 15.0
ENCRYPTION = {"type": "m.room.encryption", "state_key": "", "content": {"algorithm": "m.megolm.v1.aes-sha2"}}
# A type of state that no standard knows.
NOTE = "com.example.note"
# As good as none, for each of its rate limits.
UNLIMITED = {"per_second": 100_000, "burst_count": 100_000}

_people = itertools.count(1)


def why_not() -> str | None:
    """Why there can't be a Synapse here, in a sentence; None where there can."""
    if importlib.util.find_spec("synapse") is None:
        return f"Synapse is not installed for {sys.executable}; `pip install matrix-synapse` brings it."
    return None


class Synapse:
    def __init__(self, folder: Path, authority: Authority, *, known_port: int | None = None) -> None:
        """`known_port`: where others find it, if something stands between them and it."""
        self.folder = folder
        self.client_port, self.federation_port = free_port(), free_port()
        self.name = f"localhost:{known_port or self.federation_port}"
        self.url = f"http://127.0.0.1:{self.client_port}"
        self.process: subprocess.Popen[bytes] | None = None
        authority.certify(folder, "localhost", "127.0.0.1")
        (folder / "log.yaml").write_text(yaml.safe_dump(self._log_config()))
        (folder / "signing.key").write_text(SigningKey.generate("ed25519:a_try").dump() + "\n")
        (folder / "homeserver.yaml").write_text(yaml.safe_dump(self._config(authority)))

    def _config(self, authority: Authority) -> dict[str, Any]:
        def listener(port: int, tls: bool, resource: str) -> dict[str, Any]:
            return {
                "port": port, "tls": tls, "type": "http", "bind_addresses": ["127.0.0.1"],
                "resources": [{"names": [resource], "compress": False}],
            }  # fmt: skip

        pairs = ("local", "remote")
        return {
            "server_name": self.name,
            "public_baseurl": self.url + "/",
            "pid_file": str(self.folder / "synapse.pid"),
            "signing_key_path": str(self.folder / "signing.key"),
            "media_store_path": str(self.folder / "media"),
            "log_config": str(self.folder / "log.yaml"),
            "database": {"name": "sqlite3", "args": {"database": str(self.folder / "synapse.db")}},
            "listeners": [
                listener(self.client_port, False, "client"),
                listener(self.federation_port, True, "federation"),
            ],
            "tls_certificate_path": str(self.folder / "tls.crt"),
            "tls_private_key_path": str(self.folder / "tls.key"),
            "federation_custom_ca_list": [str(authority.certificate_file)],
            "ip_range_blacklist": [],
            "federation_ip_range_blacklist": [],
            "trusted_key_servers": [],
            "suppress_key_server_warning": True,
            "serve_server_wellknown": False,
            "presence": {"enabled": True},
            "report_stats": False,
            "enable_registration": True,
            "enable_registration_without_verification": True,
            "registration_shared_secret": secrets.token_hex(),
            "macaroon_secret_key": secrets.token_hex(),
            "form_secret": secrets.token_hex(),
            "bcrypt_rounds": 4,
            "allow_public_rooms_over_federation": True,
            "allow_public_rooms_without_auth": True,
            "room_list_publication_rules": [{"action": "allow"}],
            # Told to invited and knocking people, beside what the standard names.
            "room_prejoin_state": {"additional_event_types": [NOTE]},
            # It gives up on nobody for long, as our relays come and go.
            "federation": {
                "client_timeout": "10s",
                "max_short_retries": 1,
                "max_long_retries": 1,
                "max_long_retry_delay": "1s",
                "destination_min_retry_interval": 500,
                "destination_retry_multiplier": 2,
                "destination_max_retry_interval": "1m",
            },
            "rc_message": UNLIMITED,
            "rc_registration": UNLIMITED,
            "rc_room_creation": UNLIMITED,
            "rc_key_requests": UNLIMITED,
            "rc_3pid_validation": UNLIMITED,
            "rc_admin_redaction": UNLIMITED,
            "rc_media_create": UNLIMITED,
            "rc_presence": {"per_user": UNLIMITED},
            "rc_joins_per_room": UNLIMITED,
            "rc_login": dict.fromkeys(("address", "account", "failed_attempts"), UNLIMITED),
            "rc_joins": dict.fromkeys(pairs, UNLIMITED),
            "rc_invites": dict.fromkeys(("per_room", "per_user", "per_issuer"), UNLIMITED),
            "rc_federation": {
                "window_size": 1000, "sleep_limit": 100_000, "sleep_delay": 1, "reject_limit": 100_000, "concurrent": 100,
            },
        }  # fmt: skip

    def _log_config(self) -> dict[str, Any]:
        return {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"plain": {"format": "%(asctime)s %(levelname)s %(name)s %(request)s %(message)s"}},
            "handlers": {
                "file": {"class": "logging.FileHandler", "filename": str(self.log), "formatter": "plain"},
            },
            "root": {"level": "INFO", "handlers": ["file"]},
        }

    @property
    def log(self) -> Path:
        return self.folder / "synapse.log"

    def said(self) -> str:
        """The end of what it said, for a story that fails."""
        files = [self.folder / "output.log", self.log]
        return "\n".join(file.read_text(errors="replace")[-3000:] for file in files if file.exists())

    def start(self) -> None:
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("SYNAPSE_", "PYTEST_"))}
        with (self.folder / "output.log").open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "synapse.app.homeserver", "-c", str(self.folder / "homeserver.yaml")],
                stdout=output, stderr=output, cwd=self.folder, env=environment, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"Synapse ended at its start:\n{self.said()}")
            connection = http.client.HTTPConnection("127.0.0.1", self.client_port, timeout=2)
            try:
                connection.request("GET", "/_matrix/client/versions")
                if connection.getresponse().status == 200:
                    return
            except OSError:
                time.sleep(0.05)
            finally:
                connection.close()
        self.stop()
        raise AssertionError(f"Synapse did not start within {START_SECONDS:.0f} s:\n{self.said()}")

    def stop(self) -> None:
        process, self.process = self.process, None
        if process is None or process.poll() is not None:
            return
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    async def restarts_after(self, doing: Callable[[], Awaitable[None]]) -> None:
        """Is away while that is done."""
        await asyncio.to_thread(self.stop)
        try:
            await doing()
        finally:
            await asyncio.to_thread(self.start)

    async def user(self, http_session: aiohttp.ClientSession, name: str) -> Person:
        """A new account; its name gets a number, since other stories have people of that name too."""
        person = Person(http_session, self.url, self.name, f"{name}{next(_people)}", PASSWORD)
        await person.registers()
        return person


def encrypted(**body: Any) -> Json:
    """What createRoom is asked for, wherever it is asked: an encrypted room."""
    return {**body, "initial_state": [ENCRYPTION, *body.get("initial_state", [])]}
