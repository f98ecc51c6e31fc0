"""Other servers' users: their public keys are asked for at the first need, kept, and kept up to date by their EDUs.

A list stays here only as long as its server tells us of changes: someone here shares a room with its owner, and no update
was missed. Otherwise it is forgotten, and asked for again when a client wants it; nothing is fetched ahead.
Spec: server-server-api/#device-management, #end-to-end-encryption.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any
from weakref import WeakValueDictionary

import structlog

from relay.db import Database
from relay.errors import ApiError, BadJson, Forbidden, RemoteError
from relay.ids import server_of
from relay.keys import shapes
from relay.keys.device_lists import DEVICE_EDU, SIGNING_EDU, TOPIC, DeviceLists
from relay.keys.one_time_keys import MAX_SERVERS_AT_ONCE, REMOTE_TIMEOUT_MS, failure
from relay.keys.published import KeyList, Published
from relay.part import Part, TakesEdu
from relay.remote import Remote
from relay.rooms.room import Room
from relay.rooms.rooms import Rooms

log = structlog.get_logger("remote_lists")

# So many users of one server are asked for one by one, which brings the numbers of their lists; more in one request.
MAX_ASKED_SINGLY = 3
MAX_DEVICES = 1_000
MAX_PREVIOUS = 100
MAX_STREAM = 2**63 - 1
LEGACY_SIGNING_EDU = "org.matrix.signing_key_update"


class RemoteLists(Part):
    def __init__(
        self, db: Database, published: Published, lists: DeviceLists, rooms: Rooms, remote: Remote, server_name: str
    ) -> None:
        self._db = db
        self._published = published
        self._lists = lists
        self._rooms = rooms
        self._remote = remote
        self._server_name = server_name
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        # A fetch that began before an update of the same user must not be kept: the update tears up its ticket.
        self._tickets: dict[str, object] = {}
        # Whose lists are being forgotten, until that is on disk: a client may ask in that very moment.
        self._doomed: Counter[str] = Counter()
        rooms.on_membership.append(self._take_move)

    def edus(self) -> Mapping[str, TakesEdu]:
        return {
            DEVICE_EDU: self._take_device,
            SIGNING_EDU: self._take_signing_keys,
            LEGACY_SIGNING_EDU: self._take_signing_keys,
        }

    # --- asking

    async def lists(
        self, user_ids: Collection[str], seconds: float = REMOTE_TIMEOUT_MS / 1000
    ) -> tuple[dict[str, KeyList], dict[str, Any]]:
        """(the lists that could be had, the servers that could not be asked, with the reason)."""
        found: dict[str, KeyList] = {}
        missing: dict[str, list[str]] = {}
        for user_id, known in (await self._kept(user_ids)).items():
            if known.held:
                found[user_id] = known
            else:
                missing.setdefault(server_of(user_id), []).append(user_id)
        failures: dict[str, Any] = {}
        if missing:
            at_once = asyncio.Semaphore(MAX_SERVERS_AT_ONCE)

            async def ask(server: str, wanted: list[str]) -> None:
                try:
                    async with asyncio.timeout(seconds), at_once:
                        found.update(await self._fetch(server, wanted))
                except (RemoteError, ApiError, TimeoutError) as error:
                    failures[server] = failure(error)

            async with asyncio.TaskGroup() as group:
                for server, wanted in missing.items():
                    group.create_task(ask(server, wanted))
        return found, failures

    async def _fetch(self, server: str, wanted: list[str]) -> dict[str, KeyList]:
        lock = self._locks.get(server)
        if lock is None:
            lock = self._locks[server] = asyncio.Lock()
        # Everybody here asks at once when a performer elsewhere has a new device: one of them goes, the others wait.
        async with lock:
            found = {user_id: known for user_id, known in (await self._kept(wanted)).items() if known.held}
            missing = [user_id for user_id in wanted if user_id not in found]
            keep = {user_id: object() for user_id in missing if await self._rooms.local_neighbours(user_id)}
            self._tickets.update(keep)
            try:
                if len(missing) <= MAX_ASKED_SINGLY:
                    fetched = {user_id: await self._user_devices(server, user_id) for user_id in missing}
                else:
                    answer = await self._remote.query_keys(server, {user_id: [] for user_id in missing})
                    fetched = {user_id: _of_query(answer, user_id) for user_id in missing}
                valid = [user_id for user_id, ticket in keep.items() if self._tickets.get(user_id) is ticket]
                if valid:
                    with self._db.write() as tx:
                        for user_id in valid:
                            self._published.put_list(tx, user_id, fetched[user_id])
                    await tx
            finally:
                for user_id, ticket in keep.items():
                    if self._tickets.get(user_id) is ticket:
                        del self._tickets[user_id]
            return found | fetched

    async def _kept(self, user_ids: Collection[str]) -> dict[str, KeyList]:
        # What is doomed when they are asked for may be gone when they are read, or not yet.
        doomed = [user_id for user_id in user_ids if user_id in self._doomed]
        return {**await self._published.lists(user_ids), **{user_id: KeyList(held=False) for user_id in doomed}}

    async def _user_devices(self, server: str, user_id: str) -> KeyList:
        try:
            return _of_user_devices(await self._remote.user_devices(server, user_id), user_id)
        except RemoteError as error:
            if error.status == 404:
                return KeyList()  # nobody of this name
            raise

    # --- what other servers tell us

    async def _take_device(self, origin: str, content: dict[str, Any]) -> None:
        user_id, local = await self._whose(origin, content)
        device_id, stream = content.get("device_id"), content.get("stream_id")
        previous = content.get("prev_id") or []
        if not shapes.is_name(device_id) or not _is_stream(stream):
            raise BadJson("The device list update has no device_id or no stream_id.")
        if not isinstance(previous, list) or len(previous) > MAX_PREVIOUS:
            raise BadJson("The prev_id of a device list update is a short array.")
        if not local:
            return
        async with self._lists.lock(user_id):
            known = await self._published.of(user_id)
            if known.held and known.stream and known.stream == stream:
                return  # sent twice, or already part of what we fetched
            keys = None
            if not content.get("deleted") and content.get("keys"):
                keys = _device(content["keys"], user_id, str(device_id))
            follows = known.held and bool(known.stream) and bool(previous) and all(p == known.stream for p in previous)
            if len(known.devices) >= MAX_DEVICES and str(device_id) not in known.devices:
                follows = False  # asked for anew when it is needed, and cut there
            self._tickets.pop(user_id, None)
            with self._db.write() as tx:
                pos = tx.pos()
                if not follows:
                    self._published.forget(tx, (user_id,))
                elif keys is not None:
                    self._published.put_device(tx, user_id, str(device_id), keys)
                else:
                    self._published.remove_device(tx, user_id, str(device_id))
                self._published.moved(tx, user_id, pos, int(stream) if follows and stream else 0, held=follows)
                tx.ring(local, TOPIC)
            await tx

    async def _take_signing_keys(self, origin: str, content: dict[str, Any]) -> None:
        user_id, local = await self._whose(origin, content)
        new = {
            usage: shapes.signing_key(content[name], user_id, usage)
            for usage, name in (("master", "master_key"), ("self_signing", "self_signing_key"))
            if content.get(name)
        }
        if not local or not new:
            return
        async with self._lists.lock(user_id):
            known = await self._published.of(user_id)
            self._tickets.pop(user_id, None)
            with self._db.write() as tx:
                pos = tx.pos()
                if known.held:
                    for usage, raw in new.items():
                        self._published.put_signing_key(tx, user_id, usage, raw)
                self._published.moved(tx, user_id, pos, known.stream, held=known.held)
                tx.ring(local, TOPIC)
            await tx

    async def _whose(self, origin: str, content: dict[str, Any]) -> tuple[str, set[str]]:
        """(the user, who here shares a room with them). Raises Forbidden where they are not of this server."""
        user_id = content.get("user_id")
        if not isinstance(user_id, str) or server_of(user_id) != origin or origin == self._server_name:
            raise Forbidden("A server can only announce the keys of its own users.")
        return user_id, await self._rooms.local_neighbours(user_id)

    # --- when nobody tells us any more

    def _take_move(self, room: Room, user_id: str, before: str | None, now: str, pos: int) -> None:
        if (before == "join") == (now == "join"):
            return
        if server_of(user_id) != self._server_name:
            doomed = {user_id} if before == "join" else set()
        elif room.local_joined - {user_id}:
            return
        else:
            # The last of us left, or the first came: what changed while nobody was here went past us.
            doomed = {who for who, membership in room.members.items() if membership == "join"}
            doomed = {who for who in doomed if server_of(who) != self._server_name}
        if doomed:
            for who in doomed:
                self._tickets.pop(who, None)
            self._doomed.update(doomed)
            with self._db.write() as tx:
                self._published.forget(tx, doomed)
                tx.after(lambda: self._forgotten(doomed))
                tx.failed(lambda: self._forgotten(doomed))

    def _forgotten(self, doomed: set[str]) -> None:
        self._doomed.subtract(doomed)
        for who in doomed:
            if not self._doomed[who]:
                del self._doomed[who]

    async def run(self) -> None:
        """After a crash between a last departure and the forgetting: what nobody shares is dropped now."""
        alone = [who for who in await self._published.held_elsewhere() if not await self._rooms.local_neighbours(who)]
        if alone:
            with self._db.write() as tx:
                self._published.forget(tx, alone)
            log.info("forgot device lists of people who share no room any more", number=len(alone))


def _is_stream(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_STREAM


def _device(value: object, user_id: str, device_id: str) -> bytes | None:
    """What a client could use; a device that names itself wrongly does not exist."""
    try:
        return shapes.device_keys(value, user_id, device_id)
    except ApiError:
        return None


def _devices(pairs: Iterable[tuple[object, object]], user_id: str) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for device_id, value in pairs:
        if isinstance(device_id, str) and shapes.is_name(device_id) and len(found) < MAX_DEVICES:
            keys = _device(value, user_id, device_id)
            if keys is not None:
                found[device_id] = keys
    return found


def _signing(pairs: Iterable[tuple[str, object]], user_id: str) -> dict[str, bytes]:
    found = {}
    for usage, value in pairs:
        if value is not None:
            try:
                found[usage] = shapes.signing_key(value, user_id, usage)
            except ApiError as bad:
                log.info("another server sent an unusable cross-signing key", server=server_of(user_id), exc_info=bad)
    return found


def _of_user_devices(answer: Mapping[str, Any], user_id: str) -> KeyList:
    devices, stream = answer.get("devices"), answer.get("stream_id")
    entries = [one for one in devices if isinstance(one, dict)] if isinstance(devices, list) else []
    return KeyList(
        devices=_devices(((one.get("device_id"), one.get("keys")) for one in entries), user_id),
        signing=_signing(
            (("master", answer.get("master_key")), ("self_signing", answer.get("self_signing_key"))), user_id
        ),
        stream=int(stream) if _is_stream(stream) and stream else 0,
    )


def _of_query(answer: Mapping[str, Any], user_id: str) -> KeyList:
    devices = _inner(answer, "device_keys", user_id)
    return KeyList(
        devices=_devices(devices.items() if isinstance(devices, dict) else (), user_id),
        signing=_signing(
            (
                ("master", _inner(answer, "master_keys", user_id)),
                ("self_signing", _inner(answer, "self_signing_keys", user_id)),
            ),
            user_id,
        ),
    )


def _inner(answer: Mapping[str, Any], name: str, user_id: str) -> Any:
    part = answer.get(name)
    return part.get(user_id) if isinstance(part, dict) else None
