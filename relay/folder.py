"""The data folder: what the first start puts into it, and what a later start must find there.

`relay.yaml`, `signing.key` (mode 0600), the database, `media/`, `lock` and `relay.sock`. Nothing is ever made anew beside
an existing database: a lost key or config has to come back from the operator's copy. Not here: what the database holds.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from relay import config, config_example
from relay.config import Listener, Settings
from relay.errors import BadJson
from relay.ids import is_server_name, random_string
from relay.protocol.signing import SigningKey

DEFAULT_SERVER_NAME = "localhost"
FOLDER_MODE = 0o700
SECRET_MODE = 0o600


class FolderError(Exception):
    """The data folder can't be used as it is. The text says what to do."""


@dataclass(frozen=True)
class Prepared:
    """A folder that is ready, and in sentences what was done to make it so."""

    settings: Settings
    done: tuple[str, ...]


def make(data_dir: Path) -> list[str]:
    """The folder itself, readable by nobody else. Says what was done."""
    if data_dir.is_dir():
        return []
    try:
        data_dir.mkdir(mode=FOLDER_MODE, parents=True)
    except FileExistsError:
        raise FolderError(f"{data_dir} is a file, and a folder is needed. Give another name with --data.") from None
    except OSError as bad:
        raise FolderError(
            f"The data folder {data_dir} can't be made: {bad.strerror}. Give another with --data, or make it yourself."
        ) from bad
    return [f"made the data folder {data_dir}"]


def prepare(
    data_dir: Path,
    server_name: str | None,
    listener: Listener,
    *,
    performer: bool = False,
    public_base_url: str | None = None,
) -> Prepared:
    """Config (with this listener) and signing key, made where this is the first start. The caller holds the folder's lock."""
    done: list[str] = []
    path = data_dir / config.CONFIG_NAME
    if not path.exists():
        if any(data_dir.glob("*.db")):
            raise FolderError(
                f"{data_dir} holds a database but no {config.CONFIG_NAME}. Put your copy of it back: a new one could carry another server name."
            )
        name = server_name or DEFAULT_SERVER_NAME
        text = config_example.first_config(name, listener, performer=performer, public_base_url=public_base_url)
        config.parse(text, "the new config")  # a bad name or address is refused before anything is written
        write_durably(path, text.encode(), SECRET_MODE)
        done.append(f"wrote the config {path} for the server name {name}")
    settings = config.load(path)
    if server_name is not None and server_name != settings.server_name:
        raise FolderError(
            f"This relay is {settings.server_name} (in {path}), not {server_name}. A server name can't be changed: it is part of every "
            "user ID and signature. Start without a name to go on, or give --data a new folder for another relay."
        )
    key_path = data_dir / settings.federation.key_file
    if not key_path.exists():
        if (data_dir / settings.database.path).exists():
            raise FolderError(
                f"The signing key {key_path} is missing although there is a database. Put your copy of it back: with a new key other servers "
                "would refuse this relay in the rooms it is in. If it is lost for good: relay key rotate --lost"
            )
        key = SigningKey.generate(f"ed25519:a_{random_string(4)}")
        write_durably(key_path, key.dump().encode() + b"\n", SECRET_MODE)
        done.append(f"made the signing key {key_path} ({key.key_id}): keep a copy of it in a safe place")
    load_key(data_dir, settings)
    return Prepared(settings, tuple(done))


def load_settings(data_dir: Path) -> Settings:
    """For everything but a first start. Raises ConfigError."""
    return config.load(data_dir / config.CONFIG_NAME)


def load_key(data_dir: Path, settings: Settings) -> SigningKey:
    path = data_dir / settings.federation.key_file
    try:
        return SigningKey.load(path.read_text("ascii"))
    except OSError as bad:
        raise FolderError(
            f"The signing key {path} can't be read: {bad.strerror}. Put your copy back, or check who owns it."
        ) from bad
    except (BadJson, ValueError) as bad:
        raise FolderError(
            f"The signing key {path} is damaged: it holds one line, ed25519 NAME SEED. Put your copy back."
        ) from bad


def user_id(name: str, settings: Settings) -> str:
    """`name` as the operator writes it, with or without @ and server, as a user ID of this relay."""
    if not name.startswith("@"):
        return f"@{name}:{settings.server_name}"
    server = name.partition(":")[2]
    if server != settings.server_name:
        where = f"of {server}" if is_server_name(server) else "without a server name"
        raise FolderError(f"{name} is a user {where}, and this relay is {settings.server_name}. Write just the name.")
    return name


def write_durably(path: Path, content: bytes, mode: int) -> None:
    """The file stands whole on the disk, or not at all."""
    beside = path.with_name(f".{path.name}.new")
    try:
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as bad:
        raise FolderError(f"{path} can't be written: {bad.strerror}. Check the disk and who owns the folder.") from bad
