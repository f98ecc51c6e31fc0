"""The config file: what is accepted, how a mistake is explained, and that the example in the repository is the true one."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from relay import config, config_example
from relay.clock import DAY, HOUR, MINUTE
from relay.config import ConfigError, Duration, Listener, Settings, Size

ROOT = Path(__file__).parent.parent


def test_a_server_name_is_enough() -> None:
    settings = config.parse("server_name: example.org")
    assert settings == Settings(server_name="example.org"), "everything else has a default"
    assert settings.registration.mode == "closed", "nobody registers unless the operator says so"
    assert settings.privacy.seal == "standard", "the seal is on"
    assert settings.privacy.redacted_grace == 48 * HOUR, "two days to report what was taken back"
    assert [(one.address, one.port) for one in settings.listeners] == [("127.0.0.1", 8008)], "only this machine"


def test_the_example_in_the_repository_is_the_generated_one() -> None:
    written = (ROOT / "config.example.yaml").read_text(encoding="utf-8")
    assert written == config_example.example(), "scripts/format makes config.example.yaml anew"


def test_the_example_shows_the_defaults() -> None:
    settings = config.parse(config_example.example())
    assert settings == Settings(server_name=config_example.EXAMPLE_SERVER_NAME), (
        "what it shows is what one gets without it"
    )


def test_the_first_config_is_good() -> None:
    settings = config.parse(config_example.first_config("localhost:8441", Listener(port=8101)))
    assert settings.server_name == "localhost:8441", "a name with a port stays one text"
    assert settings.listeners[0].port == 8101, "the port that was asked for"
    assert settings.on_loopback, "localhost can only mean this machine"


def test_times_and_sizes_are_written_for_people() -> None:
    text = (
        "server_name: a.example\nprivacy: {redacted_grace: 10m}\nmedia: {max_upload_bytes: 2 GiB, remote_retention: 0}"
    )
    settings = config.parse(text)
    assert settings.privacy.redacted_grace == 10 * MINUTE, "10m is ten minutes"
    assert settings.media.max_upload_bytes == 2 * 1024**3, "GiB is a power of two"
    assert settings.media.remote_retention == 0, "0 needs no unit"


@given(st.integers(min_value=0, max_value=10_000 * DAY))
def test_every_time_reads_back_as_it_was_written(milliseconds: int) -> None:
    assert Duration.parse(str(Duration(milliseconds)) if milliseconds else 0) == milliseconds, "nothing is rounded"


@given(st.integers(min_value=1, max_value=2**39))
def test_every_size_reads_back_as_it_was_written(size: int) -> None:
    assert Size.parse(str(Size(size))) == size, "nothing is rounded"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["server_name: example.org"]),
        ("- a", ["server_name: example.org"]),
        ("log: {level: info}", ["server_name is missing"]),
        ("server_name: [", ["line 1", "not YAML"]),
        ("server_name: a.example\nserver_name: b.example", ["line 2", "second time", "line 1"]),
        ("server_name: a.example\nmedia:\n  max_uplod_bytes: 1 MiB", ["line 3", "Did you mean max_upload_bytes?"]),
        ("server_name: a.example\nlisteners:\n  - prot: 1", ["line 3", "listeners.1.prot", "Did you mean port?"]),
        ("server_name: a.example\nbananas: 3", ["line 2", "no setting bananas", "Known here are"]),
        ("server_name: a.example\nmedia:\n  max_upload_bytes: 50000000", ["line 3", "50 MiB"]),
        ("server_name: a.example\nprivacy:\n  redacted_grace: 2 days", ["line 3", "48h"]),
        ("server_name: a.example\nprivacy:\n  seal: loose", ["line 3", "strict, standard, open"]),
        ("server_name: a.example\nregistration:\n  mode: open", ["line 3", "open_to_everyone"]),
        ("server_name: a.example\nlisteners:\n  - port: 70000", ["line 3", "<= 65535"]),
        ("server_name: a.example\nlisteners:\n  - port: '80'", ["line 3", "type int"]),
        ("server_name: a.example\nlisteners:\n  - address: localhost", ["line 3", "IP address"]),
        ("server_name: a.example\nlisteners:\n  - tls_key: x.pem", ["line 3", "belong together"]),
        ("server_name: a.example\nlisteners: []", ["nobody could reach"]),
        ("server_name: a.example\nlimits:\n  login: {per_second: 0, burst: 1}", ["line 3", "limits.login.per_second"]),
        ("server_name: Example.org", ["small letters: example.org"]),
        ("server_name: https://example.org", ["is not a server name"]),
        ("server_name: a.example\npublic_base_url: example.org", ["https://matrix.example.org"]),
        ("server_name: a.example\nprivacy:\n  clear_rooms: ['#a:b.example']", ["line 2", "begin with '!'"]),
        ("server_name: a.example\nfederation:\n  outbox_backoff_max: 1s", ["line 2", "outbox_backoff_min"]),
        ("[" * 5000, ["relay.yaml"]),
    ],
)
def test_a_mistake_is_explained(text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        config.parse(text)
    for word in words:
        assert word in str(refused.value), f"the operator is told about {word!r}, and got: {refused.value}"


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["server_name", "listeners", "media", "limits", "login", "x"]) | st.text(max_size=3),
                inner,
                max_size=3,
            )
        ),
        max_leaves=10,
    )
)
def test_whatever_stands_in_the_file_the_operator_gets_a_sentence(content: object) -> None:
    try:
        config.parse(yaml.safe_dump(content, allow_unicode=True))
    except ConfigError as refused:
        assert str(refused), "a refusal has words"


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="relay init"):
        config.load(tmp_path / "relay.yaml")


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "relay.yaml").write_bytes(b"server_name: \xff")
    with pytest.raises(ConfigError, match="UTF-8"):
        config.load(tmp_path / "relay.yaml")
