"""Files that are served to nobody: by their address, or by the hash of their bytes, whoever uploads them again.

A file is looked at as it comes in, whether somebody here uploads it or it is fetched from another server, and all that are kept
when a hash is first quarantined. The bytes stay until the case is closed; only nobody gets them. The same picture that was
encrypted anew has other bytes: that one is known by its address alone.
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
    """Also the `Inspector` of uploads: the moderators' hashes first, then `rules`. And the `Gate` of fetched files."""

    def __init__(
        self,
        db: Database,
        restrictions: Restrictions,
        store: Store,
        copies: Store,
        server_name: str,
        rules: Sequence[Inspector] = (),
    ) -> None:
        self._db = db
        self._restrictions = restrictions
        self._store = store
        self._copies = copies
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

    @property
    def wants_copies(self) -> bool:
        return self._restrictions.any(MEDIA_HASH)

    async def copy(self, mxc_uri: str, sha256: str) -> None:
        if self._restrictions.find(MEDIA_HASH, sha256) is not None:
            await self.keep_from_all(mxc_uri)
            raise NotFound("There is no such file.")

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
        while ids := await self._db.read(_uploaded_after, last):
            last = ids[-1]
            for media_id in ids:
                if await self._hash(self._store, media_id) in hashes:
                    await self.keep_from_all(f"mxc://{self._server_name}/{media_id}")
        after = ("", "")
        while rows := await self._db.read(_copied_after, after):
            after = rows[-1][:2]
            for server, media_id, file in rows:
                if await self._hash(self._copies, file) in hashes:
                    await self.keep_from_all(f"mxc://{server}/{media_id}")

    async def _hash(self, store: Store, name: str) -> str | None:
        digest = hashlib.sha256()
        try:
            async for block in store.read(name):
                digest.update(block)
        except NotFound:
            return None
        return digest.hexdigest()


def _uploaded_after(query: Query, last: str) -> list[str]:
    rows = query.all(
        "SELECT media_id FROM media WHERE size >= 0 AND media_id > $1 ORDER BY media_id LIMIT $2",
        last,
        MAX_FILES_A_PAGE,
    )
    return [media_id for (media_id,) in rows]


def _copied_after(query: Query, after: tuple[str, str]) -> list[tuple[str, str, str]]:
    rows = query.all(
        "SELECT server, media_id, file FROM remote_media WHERE (server, media_id) > ($1, $2) ORDER BY server, media_id LIMIT $3",
        *after,
        MAX_FILES_A_PAGE,
    )
    return [(server, media_id, file) for server, media_id, file in rows]
