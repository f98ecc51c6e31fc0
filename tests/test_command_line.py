"""The command line as an operator meets it: first start, accounts, a second start, a stop, and every mistake in words.

The relay runs as a process of its own on a loopback port, as `scripts/run` starts it.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from relay import config, control
from relay.__main__ import main

START_TIMEOUT_S = 60.0
ROOT = Path(__file__).parent.parent


def _environment() -> dict[str, str]:
    bare = {key: value for key, value in os.environ.items() if not key.startswith("RELAY_")}
    return {**bare, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


def _relay(*arguments: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "relay", *arguments],
        input="" if given is None else given,
        capture_output=True,
        text=True,
        env=_environment(),
        timeout=START_TIMEOUT_S,
        check=False,
    )


class Running:
    """A relay in the foreground of a terminal that is not there."""

    def __init__(self, data: Path, *arguments: str) -> None:
        self.data = data
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "relay", "serve", "--data", str(data), "--port", str(self.port), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=_environment(),
        )
        self.said = ""

    def is_up(self) -> bool:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self.process.poll() is None:
            if control.is_running(self.data):
                return True
            time.sleep(0.05)
        return False

    def ends(self, number: signal.Signals = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            self.said += self.process.communicate(timeout=START_TIMEOUT_S)[0]
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.said += self.process.communicate()[0]
        return self.process.returncode

    def gives_up(self) -> int:
        """Waits for a relay that can't start."""
        self.said += self.process.communicate(timeout=START_TIMEOUT_S)[0]
        return self.process.returncode

    def login(self, user: str, password: str) -> tuple[int, dict[str, Any]]:
        body = {"type": "m.login.password", "identifier": {"type": "m.id.user", "user": user}, "password": password}
        return self.asks("POST", "/_matrix/client/v3/login", body)

    def asks(self, method: str, path: str, body: object = None, token: str = "") -> tuple[int, dict[str, Any]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        connection.request(method, path, json.dumps(body) if body is not None else None, headers)
        try:
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()


@pytest.fixture
def relays() -> Iterator[list[Running]]:
    started: list[Running] = []
    yield started
    for relay in started:
        relay.ends()


def test_a_newcomer_starts_a_relay_and_makes_the_first_account(tmp_path: Path, relays: list[Running]) -> None:
    data = tmp_path / "data"
    relay = Running(data)
    relays.append(relay)
    assert relay.is_up(), f"the first start needs no preparation, and said: {relay.ends()} {relay.said}"
    for name in ("relay.yaml", "signing.key", "relay.db"):
        assert (data / name).exists(), f"the first start makes {name}"
    for name in ("signing.key", "relay.yaml", "relay.sock"):
        assert stat.S_IMODE((data / name).stat().st_mode) == 0o600, f"{name} is nobody else's business"
    assert stat.S_IMODE(data.stat().st_mode) == 0o700, "nor is the folder"

    added = _relay("user", "add", "alice", "--admin", "--password-stdin", "--data", str(data), given="wonderland 7\n")
    assert added.returncode == 0, f"the first account is made on the running relay: {added.stderr}"
    assert "@alice:localhost" in added.stdout, "and its whole name is told"
    listed = json.loads(_relay("user", "list", "--json", "--data", str(data)).stdout)
    people = [(user["user_id"], user["admin"]) for user in listed if user["has_password"]]
    assert people == [("@alice:localhost", True)], "she is there, as admin, and nobody else could sign in"

    status, signed_in = relay.login("alice", "wonderland 7")
    assert status == 200, f"and she can sign in: {signed_in}"
    status, _ = relay.login("alice", "wonderland 8")
    assert status == 403, "but not with another password"

    assert relay.ends() == 0, "SIGTERM is a clean end"
    for words in (
        "First start",
        f"http://127.0.0.1:{relay.port}",
        "user add NAME --admin",
        "for trying out",
        "Stopped.",
    ):
        assert words in relay.said, f"the relay says {words!r}, and said: {relay.said}"
    assert not (data / "relay.sock").exists(), "the socket is gone with the relay"
    assert "Traceback" not in relay.said, "nothing went wrong on the way"


def test_a_second_start_goes_on_with_the_same_data(tmp_path: Path, relays: list[Running]) -> None:
    data = tmp_path / "data"
    first = Running(data)
    relays.append(first)
    assert first.is_up(), "the first start"
    _relay("user", "add", "alice", "--password-stdin", "--data", str(data), given="wonderland 7\n")
    assert first.ends(signal.SIGINT) == 0, "Ctrl-C is a clean end too"
    key = (data / "signing.key").read_text()

    second = Running(data)
    relays.append(second)
    assert second.is_up(), "the second start"
    assert second.login("alice", "wonderland 7")[0] == 200, "the account is still there"
    assert second.ends() == 0, "a clean end"
    assert (data / "signing.key").read_text() == key, "the relay is still itself"
    assert "First start" not in second.said, "nothing was made anew"
    assert "for trying out" in second.said, "a relay named localhost says so at every start"


def test_two_relays_cannot_share_a_folder(tmp_path: Path, relays: list[Running]) -> None:
    data = tmp_path / "data"
    first = Running(data)
    relays.append(first)
    assert first.is_up(), "the first one"
    second = Running(data)
    assert second.gives_up() == 1, "the second is refused"
    assert f"in use by process {first.process.pid}" in second.said, f"and told by whom, and said: {second.said}"
    assert "Traceback" not in second.said, "in words"
    assert control.is_running(data), "the first goes on"


def test_after_a_kill_the_folder_is_free_again(tmp_path: Path, relays: list[Running]) -> None:
    data = tmp_path / "data"
    first = Running(data)
    relays.append(first)
    assert first.is_up(), "the first one"
    assert first.ends(signal.SIGKILL) == -signal.SIGKILL, "killed without a chance to tidy up"
    assert (data / "relay.sock").exists(), "its socket is left behind"
    second = Running(data)
    relays.append(second)
    assert second.is_up(), "neither the socket nor the lock of the dead stands in the way"


def test_accounts_are_kept_without_a_running_relay_too(tmp_path: Path, relays: list[Running]) -> None:
    data = tmp_path / "data"
    assert _relay("init", "--server-name", "localhost", "--data", str(data)).returncode == 0, "config and key are made"
    added = _relay("user", "add", "bob", "--password-stdin", "--data", str(data), given="builder 12345\n")
    assert added.returncode == 0, f"no relay has to run for it: {added.stderr}"
    relay = Running(data)
    relays.append(relay)
    assert relay.is_up(), "now it starts"
    assert relay.login("bob", "builder 12345")[0] == 200, "and knows him"
    changed = _relay(
        "user", "password", "@bob:localhost", "--password-stdin", "--data", str(data), given="another 12345\n"
    )
    assert changed.returncode == 0, f"a password is set on the running relay: {changed.stderr}"
    assert relay.login("bob", "builder 12345")[0] == 403, "the old one is worth nothing at once"
    status, signed_in = relay.login("bob", "another 12345")
    assert status == 200, "the new one opens"
    closed = _relay("user", "deactivate", "bob", "--data", str(data))
    assert closed.returncode == 0, f"he is deactivated while signed in: {closed.stderr}"
    status, refusal = relay.asks("GET", "/_matrix/client/v3/account/whoami", token=signed_in["access_token"])
    assert (status, refusal["errcode"]) == (401, "M_UNKNOWN_TOKEN"), "and his session ends at once"
    assert relay.login("bob", "another 12345")[0] == 403, "and can't be begun again"


def test_a_performers_relay_begins_with_its_contact_gate_closed(tmp_path: Path) -> None:
    for name, flags, expected in (("plain", (), "everybody"), ("hers", ("--performer",), "shared_rooms")):
        data = tmp_path / name
        assert _relay("init", *flags, "--server-name", "her.example", "--data", str(data)).returncode == 0
        settings = config.load(data / config.CONFIG_NAME)
        assert settings.contact.invites_from == expected, f"whose invites come through on a {name} relay"
        assert settings.federation.enabled and not settings.federation.allow, "the doors to other servers stand open"


def test_where_apps_reach_a_relay_behind_a_proxy_is_said_once(tmp_path: Path) -> None:
    data = tmp_path / "data"
    made = ("init", "--server-name", "her.example", "--data", str(data), "--public-base-url")
    wrong = _relay(*made, "matrix.her.example")
    assert wrong.returncode != 0 and "https://" in wrong.stderr, "a whole address, it says"
    assert not (data / config.CONFIG_NAME).exists()
    assert _relay(*made, "https://matrix.her.example").returncode == 0
    assert config.load(data / config.CONFIG_NAME).public_base_url == "https://matrix.her.example"


def test_registration_tokens(tmp_path: Path) -> None:
    data = str(tmp_path / "data")
    _relay("init", "--server-name", "localhost", "--data", data)
    made = _relay("token", "create", "--token", "come-in", "--uses", "2", "--expires", "7d", "--json", "--data", data)
    assert made.returncode == 0 and json.loads(made.stdout)["token"] == "come-in", f"a token is made: {made.stderr}"
    listed = json.loads(_relay("token", "list", "--json", "--data", data).stdout)
    assert [token["token"] for token in listed] == ["come-in"], "and listed"
    assert _relay("token", "revoke", "come-in", "--data", data).returncode == 0, "and taken back"
    assert _relay("token", "revoke", "come-in", "--data", data).returncode == 1, "once"


def test_the_check_finds_what_is_wrong_and_says_what_to_do(tmp_path: Path) -> None:
    data = tmp_path / "data"
    _relay("init", "--server-name", "localhost", "--data", str(data), "--port", "0")
    good = _relay("check", "--data", str(data))
    assert good.returncode == 0, f"a new folder is in order: {good.stdout}"
    assert "for trying out" in good.stdout, "what it is not good for is a warning"

    (data / "signing.key").chmod(0o644)
    bad = _relay("check", "--json", "--data", str(data))
    errors = [one for one in json.loads(bad.stdout) if one["severity"] == "error"]
    assert bad.returncode == 1, "an error is an exit status"
    assert any("chmod 600" in one["todo"] for one in errors), f"and has its remedy: {errors}"

    (data / "relay.yaml").write_text("server_name: localhost\nbananas: 3\n")
    assert "no setting bananas" in _relay("check", "--data", str(data)).stdout, "the config is looked at"
    assert _relay("check", "--data", str(tmp_path / "nowhere")).returncode == 1, (
        "a folder that is not there is an error"
    )


def test_a_relay_keeps_its_name(tmp_path: Path) -> None:
    data = tmp_path / "data"
    _relay("init", "--server-name", "localhost", "--data", str(data))
    renamed = _relay("serve", "--server-name", "example.org", "--data", str(data))
    assert renamed.returncode == 1 and "can't be changed" in renamed.stderr, "not with an option"
    _relay("user", "list", "--data", str(data))
    (data / "relay.yaml").write_text("server_name: example.org\n")
    renamed = _relay("serve", "--data", str(data))
    assert renamed.returncode == 1, "nor in the config once there is a database"
    assert "localhost" in renamed.stderr and "Traceback" not in renamed.stderr, f"in words: {renamed.stderr}"


def test_a_lost_key_is_never_made_anew_beside_a_database(tmp_path: Path) -> None:
    data = tmp_path / "data"
    _relay("init", "--server-name", "localhost", "--data", str(data))
    _relay("user", "list", "--data", str(data))
    assert (data / "relay.db").exists(), "any command makes the database"
    (data / "signing.key").unlink()
    refused = _relay("serve", "--data", str(data))
    assert refused.returncode == 1 and "Put your copy of it back" in refused.stderr, "the operator has to bring it back"
    assert not (data / "signing.key").exists(), "a new one would make other servers refuse this relay"


def test_a_taken_port_is_told_in_words(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        refused = _relay("serve", "--port", port, "--data", str(tmp_path / "data"))
    assert refused.returncode == 1, "it can't start"
    assert f"127.0.0.1:{port}" in refused.stderr and "--port" in refused.stderr, (
        f"and says what to do: {refused.stderr}"
    )
    assert "Traceback" not in refused.stderr, "without a traceback"


# --- without a relay -----------------------------------------------------------------------------------------------


def test_every_command_has_help_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (
        "serve", "init", "check", "status", "audit", "user add", "user list", "user password", "user admin",
        "user deactivate", "token create", "token list", "token revoke", "config example",
    ):  # fmt: skip
        with pytest.raises(SystemExit) as ended:
            main([*command.split(), "--help"])
        assert ended.value.code == 0, f"relay {command} --help works"
        assert f"example: relay {command}" in capsys.readouterr().out, f"relay {command} --help shows how"


def test_the_example_config_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "example"]) == 0, "it needs no data folder"
    assert capsys.readouterr().out == (ROOT / "config.example.yaml").read_text(), "and is the one in the repository"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["user", "add", "alice", "--data", "DIR"], "relay init"),
        (["user", "list", "--data", "DIR"], "relay init"),
        (["status", "--data", "DIR"], "No relay runs"),
        (["init", "--data", "DIR"], "Which server name?"),
        (["init", "--server-name", "Example.Org", "--data", "DIR"], "small letters"),
        (["init", "--server-name", "localhost", "--address", "localhost", "--data", "DIR"], "IP address"),
    ],
)
def test_a_mistake_gets_a_sentence(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RELAY_SERVER_NAME", raising=False)
    data = str(tmp_path / "data")
    assert main([data if word == "DIR" else word for word in arguments]) == 1, "exit status 1"
    assert words in capsys.readouterr().err, "and what to do"


def test_a_user_of_another_server_is_not_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = str(tmp_path / "data")
    assert main(["init", "--server-name", "localhost", "--data", data]) == 0, "a relay"
    assert main(["user", "deactivate", "@eve:example.org", "--data", data]) == 1, "can't close a foreign account"
    assert "this relay is localhost" in capsys.readouterr().err, "and says why"
