"""The relay's signing keys: the one in use, those that were put away, and the change from one to the next.

Beside the key file lies a list of the public halves of former keys (`signing.key.old`): they are published, so that what was
signed with them stays good. The database remembers which key was used last: with another one, that nobody announced, the
relay does not start, since others would refuse it. Spec: server-server-api/#publishing-keys.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from relay import folder
from relay.clock import Clock
from relay.config import Settings
from relay.control import CommandFailed
from relay.db import Database
from relay.errors import BadJson
from relay.ids import random_string
from relay.protocol.canonical import from_base64
from relay.protocol.signing import KEY_BYTES, OldKey, SigningKey

NOTE = "signing_key"


class WrongKey(Exception):
    """The key is not the one that this relay had. The text says what to do."""


def old_path(data_dir: Path, settings: Settings) -> Path:
    return data_dir / f"{settings.federation.key_file}.old"


def load_old(data_dir: Path, settings: Settings) -> tuple[OldKey, ...]:
    """Raises FolderError where the list is damaged."""
    path = old_path(data_dir, settings)
    if not path.exists():
        return ()
    found = []
    try:
        for line in path.read_text("ascii").splitlines():
            algorithm, name, public, expired_at = line.split()
            if len(from_base64(public)) != KEY_BYTES:
                raise ValueError
            found.append(OldKey(f"{algorithm}:{name}", public, int(expired_at)))
    except OSError as bad:
        raise folder.FolderError(
            f"The list of old keys {path} can't be read: {bad.strerror}. Check who owns it."
        ) from bad
    except (ValueError, BadJson) as bad:
        raise folder.FolderError(
            f"The list of old keys {path} is damaged: each line is ed25519 NAME PUBLIC_KEY TIME. Put your copy back."
        ) from bad
    return tuple(found)


class OwnKeys:
    def __init__(self, data_dir: Path, settings: Settings, key: SigningKey, db: Database, clock: Clock) -> None:
        self._data_dir = data_dir
        self._settings = settings
        self._key = key
        self._db = db
        self._clock = clock
        listed = load_old(data_dir, settings)
        # A change that broke off half-way has listed the key that is still in use.
        self.old = [one for one in listed if (one.key_id, one.verify_key_base64) != _id(key)]

    def commands(self) -> dict[str, Callable[..., Awaitable[Any]]]:
        return {"key.list": self.list, "key.rotate": self.rotate, "key.lost": self.lost}

    async def require_known(self) -> None:
        """Raises WrongKey where the key is another than before, and nobody said so."""
        noted = await self._noted()
        if noted is None or noted in [(one.key_id, one.verify_key_base64) for one in self.old]:
            await self._note(self._key)
        elif noted != _id(self._key):
            path = self._data_dir / self._settings.federation.key_file
            raise WrongKey(
                f"The signing key {path} ({self._key.key_id}) is not the one that this relay used before ({noted[0]}). Put your copy of that "
                "back. If it is lost for good: relay key rotate --lost"
            )

    async def list(self) -> list[dict[str, Any]]:
        present = {"key_id": self._key.key_id, "verify_key": self._key.verify_key_base64, "until": None}
        return [
            present,
            *({"key_id": o.key_id, "verify_key": o.verify_key_base64, "until": o.expired_at} for o in self.old),
        ]

    async def rotate(self) -> dict[str, Any]:
        """A new key for whatever is signed from now on; the present one is put away."""
        path = self._data_dir / self._settings.federation.key_file
        if path.exists() and _id(folder.load_key(self._data_dir, self._settings)) != _id(self._key):
            raise CommandFailed(
                f"{path} holds another key than {self._key.key_id}, with which the relay signs. Move it away, or put your copy back, and try again."
            )
        noted = await self._noted()
        if noted is not None and noted != _id(self._key) and noted[0] not in [one.key_id for one in self.old]:
            raise CommandFailed(
                f"The key on disk ({self._key.key_id}) is not the one that this relay used last ({noted[0]}). Put your copy of that back "
                "first, or say that it is lost: relay key rotate --lost"
            )
        new, before = SigningKey.generate(f"ed25519:a_{random_string(4)}"), self._key.key_id
        # Nothing is awaited between the moment until which the old key holds and the one from which the new one signs.
        put_away = self._put_away(*_id(self._key))
        folder.write_durably(path, new.dump().encode() + b"\n", folder.SECRET_MODE)
        self.old.append(put_away)
        self._key.become(new)
        await self._note(new)
        return {"key_id": new.key_id, "before": before}

    async def lost(self) -> dict[str, Any]:
        """The key on disk takes the place of one that is gone; of that the database knows the public half."""
        noted = await self._noted()
        if noted == _id(self._key):
            raise CommandFailed(f"The key {self._key.key_id} is not lost. To change it: relay key rotate")
        if noted is not None and noted not in [(one.key_id, one.verify_key_base64) for one in self.old]:
            self._put_away(*noted)
        await self._note(self._key)
        return {"key_id": self._key.key_id, "before": noted[0] if noted is not None else None}

    def _put_away(self, key_id: str, verify_key: str) -> OldKey:
        put_away = OldKey(key_id, verify_key, self._clock.now())
        lines = [f"{o.key_id.replace(':', ' ')} {o.verify_key_base64} {o.expired_at}\n" for o in (*self.old, put_away)]
        folder.write_durably(old_path(self._data_dir, self._settings), "".join(lines).encode(), folder.SECRET_MODE)
        return put_away

    async def _noted(self) -> tuple[str, str] | None:
        text = await self._db.note(NOTE)
        if text is None:
            return None
        key_id, _, public = text.partition(" ")
        return key_id, public

    async def _note(self, key: SigningKey) -> None:
        await self._db.take_note(NOTE, " ".join(_id(key)))


def make_new(data_dir: Path, settings: Settings) -> str | None:
    """For a relay whose key is lost: a new one where none lies there. Its ID, None where there is a key already."""
    path = data_dir / settings.federation.key_file
    if path.exists():
        return None
    key = SigningKey.generate(f"ed25519:a_{random_string(4)}")
    folder.write_durably(path, key.dump().encode() + b"\n", folder.SECRET_MODE)
    return key.key_id


def _id(key: SigningKey) -> tuple[str, str]:
    return key.key_id, key.verify_key_base64
