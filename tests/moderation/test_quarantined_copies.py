"""Files of other servers and the hashes that moderators have quarantined: whoever has the bytes under another address gets nothing."""

from __future__ import annotations

import hashlib
import os

import aiohttp
import pytest

from tests.moderation.test_actions import moderators, takes
from tests.people import Person, Refused, until
from tests.town import Town


async def gets(person: Person, uri: str) -> bytes | None:
    """The whole file; None where it is refused, or breaks off."""
    try:
        return (await person.downloads(uri))[1]
    except (Refused, aiohttp.ClientError):
        return None


@pytest.mark.parametrize("size", [1_000, 300_000])
async def test_a_quarantined_hash_holds_for_files_of_others(town: Town, size: int) -> None:
    _, [mod] = await moderators(town, "mod")
    alice, bob = await town.users("alice@one", "bob@two")
    blob, other = os.urandom(size), os.urandom(size)
    fetched, unfetched, fine = [await bob.uploads(one) for one in (blob, blob, other)]
    assert await gets(alice, fetched) == blob, "while nobody has anything against it"
    await takes(mod, "quarantine", f"sha256:{hashlib.sha256(blob).hexdigest()}")

    async def is_gone() -> bool:
        return await gets(alice, fetched) is None

    assert await until(is_gone), "the copy that lies here is found"
    assert await gets(alice, unfetched) is None, (
        "and the same bytes under an address that nobody here has asked for yet"
    )
    refused = await alice.is_refused(alice.downloads(unfetched))
    assert refused.status == 404, "from then on it is known by that address"
    assert await gets(alice, fine) == other, "others are not touched"
    assert (await alice.is_refused(alice.uploads(blob))).status == 403, "nor is it taken in here"
