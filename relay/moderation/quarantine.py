"""Files that are served to nobody: by their address, or by the hash of their bytes, whoever uploads them again.

A file here is looked at as it comes in, and all files that are kept when a hash is first quarantined. The bytes stay until
the case is closed; only nobody gets them. Files of other servers are known by their address alone.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence

from relay.db import Database, Query
from relay.doors import Inspector
from relay.errors import Forbidden, NotFound
from relay.media.files import Store
from relay.moderation.restrictions import MEDIA, MEDIA_HASH, Restrictions
from relay.part import Part

MAX_FILES_A_PAGE = 500


class Quarantine(Part):
    """Also the `Inspector` of uploads: the moderators' hashes first, then `rules`."""

    def __init__(
        self, db: Database, restrictions: Restrictions, store: Store, server_name: str, rules: Sequence[Inspector] = ()
    ) -> None:
        self._db = db
        self._restrictions = restrictions
        self._store = store
        self._server_name = server_name
        self._rules = rules
        self._known: set[str] = set()
        self._changed = asyncio.Event()
        restrictions.on_change.append(self._changed.set)

    @property
    def wants_files(self) -> bool:
        return self._restrictions.any(MEDIA_HASH) or any(rule.wants_files for rule in self._rules)

    async def file(self, user_id: str, mxc_uri: str, size: int, sha256: str) -> None:
        if self._restrictions.find(MEDIA_HASH, sha256) is not None:
            raise Forbidden("The moderators of this server do not let this file be shared here.")
        for rule in self._rules:
            if rule.wants_files:
                await rule.file(user_id, mxc_uri, size, sha256)

    async def keep_from_all(self, mxc_uri: str) -> None:
        """For a rule that wants a person to look first."""
        with self._db.write() as tx:
            self._restrictions.put(tx, MEDIA, mxc_uri)
        await tx

    async def run(self) -> None:
        """Finds kept files with a hash that is new on the list."""
        while True:
            self._changed.clear()
            listed = {one.subject: one for one in await self._restrictions.listed(MEDIA_HASH)}
            if listed.keys() - self._known:
                await self._search(set(listed))
            self._known = set(listed)
            await self._changed.wait()

    async def _search(self, hashes: set[str]) -> None:
        last = ""
        while True:
            ids = await self._db.read(_kept_after, last)
            if not ids:
                return
            last = ids[-1]
            for media_id in ids:
                if await self._hash(media_id) in hashes:
                    await self.keep_from_all(f"mxc://{self._server_name}/{media_id}")

    async def _hash(self, media_id: str) -> str | None:
        digest = hashlib.sha256()
        try:
            async for block in self._store.read(media_id):
                digest.update(block)
        except NotFound:
            return None
        return digest.hexdigest()


def _kept_after(query: Query, last: str) -> list[str]:
    rows = query.all(
        "SELECT media_id FROM media WHERE size >= 0 AND media_id > $1 ORDER BY media_id LIMIT $2",
        last,
        MAX_FILES_A_PAGE,
    )
    return [media_id for (media_id,) in rows]
