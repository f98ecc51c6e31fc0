"""Password hashes: argon2id with 19 MiB, two passes, one lane, in threads of their own, so that a small machine holds.

An unknown account costs the same time as a wrong password. What makes a password acceptable stands here too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from nacl import pwhash
from nacl.exceptions import InvalidkeyError

from relay.errors import ApiError, InvalidParam, LimitExceeded

T = TypeVar("T")

MEMORY_BYTES = 19 * 1024 * 1024
PASSES = 2
# A hash takes some 40 ms of a core; who would wait longer than this queue had better come back later.
MAX_WAITING = 100
RETRY_AFTER_SECONDS = 5.0
MIN_PASSWORD_CHARACTERS = 8
MAX_PASSWORD_BYTES = 1024
_NOBODYS_SALT = bytes(pwhash.argon2id.SALTBYTES)


class WeakPassword(ApiError):
    errcode = "M_WEAK_PASSWORD"


def require_acceptable(password: str) -> None:
    """Raises WeakPassword or InvalidParam."""
    if len(password) < MIN_PASSWORD_CHARACTERS:
        raise WeakPassword(f"This password is too short. Take at least {MIN_PASSWORD_CHARACTERS} characters.")
    if len(password.encode()) > MAX_PASSWORD_BYTES:
        raise InvalidParam(f"This password is longer than {MAX_PASSWORD_BYTES} bytes. Take a shorter one.")


class Passwords:
    """At most `parallel` hashes at once: each needs 19 MiB of memory."""

    def __init__(self, parallel: int) -> None:
        self._threads = ThreadPoolExecutor(parallel, thread_name_prefix="password")
        self._waiting = 0

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def hash(self, password: str) -> str:
        return (await self._in_thread(_hash, password.encode())).decode()

    async def matches(self, stored: str | None, password: str) -> bool:
        """Whether the password belongs to the stored hash; takes as long where there is none."""
        given = password.encode()
        if len(given) > MAX_PASSWORD_BYTES:
            return False
        return await self._in_thread(_matches, stored.encode() if stored else b"", given)

    async def _in_thread(self, function: Callable[..., T], *args: bytes) -> T:
        if self._waiting >= MAX_WAITING:
            raise LimitExceeded(RETRY_AFTER_SECONDS)
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)
        finally:
            self._waiting -= 1


def _hash(password: bytes) -> bytes:
    return pwhash.argon2id.str(password, opslimit=PASSES, memlimit=MEMORY_BYTES)


def _matches(stored: bytes, password: bytes) -> bool:
    if not stored:
        pwhash.argon2id.kdf(32, password, _NOBODYS_SALT, opslimit=PASSES, memlimit=MEMORY_BYTES)
        return False
    try:
        return pwhash.argon2id.verify(stored, password)
    except InvalidkeyError:
        return False
