"""Dehydrated devices: one of each person sleeps here and takes in keys while no other is signed in; the next one wakes it.

It is a device like others, with keys and a queue, but nobody is signed in on it, and its messages are read page by page
and stay until it is deleted. Its own secrets are ciphertext to which the relay has no key. Spec: MSC3814.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import orjson

from relay.accounts.devices import MAX_DISPLAY_NAME, Devices
from relay.db import Database, Query, Row, Tx
from relay.errors import BadJson, Forbidden, InvalidParam, MissingParam, NotFound, Refused, TooLarge
from relay.keys import shapes
from relay.keys.cross_signing import CrossSigning
from relay.keys.device_lists import DeviceLists
from relay.keys.one_time_keys import MAX_FALLBACK_KEYS, MAX_KEYS_PER_DEVICE, OneTimeKeys, parse
from relay.keys.published import Published
from relay.part import Part
from relay.protocol.shapes import is_base64
from relay.tables import Schema, Table
from relay.web import Answer, Request, Route, get_object, get_optional_string, get_string

MAX_DATA_BYTES = 256 * 1024
MAX_PAGE = 100
MAX_DATA_KEYS = 10

_LIFE = "until another one replaces it, or it is deleted"


class Dehydrated(Part):
    schema = Schema(
        "dehydrated_devices",
        tables=(
            Table(
                "dehydrated_devices",
                "a sleeping device, encrypted by its owner",
                {
                    "user_id": ("whose device it is", _LIFE),
                    "device_id": ("which device", _LIFE),
                    "data": ("its secrets, encrypted with a key that only the owner has", _LIFE),
                },
            ),
        ),
        steps=(
            "CREATE TABLE dehydrated_devices (user_id TEXT PRIMARY KEY, device_id TEXT NOT NULL, data BYTES NOT NULL)",
        ),
    )

    def __init__(
        self,
        db: Database,
        devices: Devices,
        published: Published,
        lists: DeviceLists,
        one_time_keys: OneTimeKeys,
        cross_signing: CrossSigning,
    ) -> None:
        self._db = db
        self._devices = devices
        self._published = published
        self._lists = lists
        self._one_time_keys = one_time_keys
        self._cross_signing = cross_signing

    def routes(self) -> Iterable[Route]:
        where = "/_matrix/client/unstable/org.matrix.msc3814.v1/dehydrated_device"
        yield Route("PUT", where, self._put, limit="keys")
        yield Route("GET", where, self._get, limit="keys")
        yield Route("DELETE", where, self._delete, limit="keys")
        yield Route("GET", f"{where}/{{deviceId}}/events", self._events, limit="keys")
        # As it was before June 2026.
        yield Route("POST", f"{where}/{{deviceId}}/events", self._events, limit="keys")

    # --- putting it to sleep

    async def _put(self, request: Request) -> Answer:
        body, user_id = request.json(), request.user_id
        device_id = get_string(body, "device_id")
        if not shapes.is_name(device_id) or not device_id.isprintable():
            raise InvalidParam("A device_id has 1 to 255 printable characters.")
        data = _encrypted(get_object(body, "device_data"))
        if not body.get("device_keys"):
            raise MissingParam("The key device_keys is missing: a device without keys can take in nothing.")
        keys = shapes.device_keys(body["device_keys"], user_id, device_id)
        one_time = parse(body, "one_time_keys", MAX_KEYS_PER_DEVICE)
        fallback = parse(body, "fallback_keys", MAX_FALLBACK_KEYS)
        if len({key.algorithm for key in fallback}) < len(fallback):
            raise BadJson("There can only be one fallback key of each algorithm.")
        name = get_optional_string(body, "initial_device_display_name")
        if await self._cross_signing.is_signing_key(user_id, device_id):
            raise Forbidden("This device_id is the name of one of your cross-signing keys.")
        audience = await self._lists.audience(user_id)
        async with self._lists.lock(user_id):
            before = await self._db.read(_find, user_id)
            old = before[0] if before is not None else None
            if device_id != old and await self._devices.get(user_id, device_id) is not None:
                raise Forbidden("This device_id is that of a device on which you are signed in. Make a new one.")
            known = await self._published.of(user_id)
            with self._db.write() as tx:
                if old is not None:
                    # Also where it has the same name: its queue and one-time keys belong to the one before.
                    self._devices.delete(tx, user_id, (old,))
                self._devices.add(tx, user_id, device_id, name[:MAX_DISPLAY_NAME] if name else None)
                tx.run(
                    "INSERT INTO dehydrated_devices (user_id, device_id, data) VALUES ($1, $2, $3)"
                    " ON CONFLICT (user_id) DO UPDATE SET device_id = excluded.device_id, data = excluded.data",
                    user_id,
                    device_id,
                    data,
                )
                self._published.put_device(tx, user_id, device_id, keys)
                self._lists.announce_device(tx, audience, user_id, device_id, keys, known.stream)
                self._one_time_keys.upload(tx, user_id, device_id, one_time, fallback)
            await tx
        return {"device_id": device_id}

    # --- waking it

    async def _existing(self, user_id: str) -> tuple[str, bytes]:
        found = await self._db.read(_find, user_id)
        if found is None:
            raise NotFound("You have no dehydrated device.")
        return found

    async def _get(self, request: Request) -> Answer:
        device_id, data = await self._existing(request.user_id)
        return {"device_id": device_id, "device_data": orjson.Fragment(data)}

    async def _events(self, request: Request) -> Answer:
        device_id = request.params["deviceId"]
        found = await self._db.read(_find, request.user_id)
        if found is None or found[0] != device_id:
            raise Forbidden("This is not your dehydrated device. Ask for its ID first.")
        body = request.optional_json()
        # `from` is the name of today, `next_batch` the one that clients in use send.
        token = request.query.get("from") or request.query.get("next_batch") or get_optional_string(body, "next_batch")
        after = 0
        if token is not None:
            if not (token.isascii() and token.isdigit() and len(token) < 19):
                raise InvalidParam("This is not a next_batch of this endpoint.")
            after = int(token)
        rows = await self._db.read(_messages, request.user_id, device_id, after)
        answer: dict[str, Any] = {
            "events": [
                {"sender": sender, "type": event_type, "content": orjson.Fragment(content)}
                for _, sender, event_type, content in rows
            ]
        }
        if rows:
            # Also after the last page: clients in use go on until a page is empty.
            answer["next_batch"] = str(rows[-1][0])
        return answer

    # --- going

    async def _delete(self, request: Request) -> Answer:
        device_id, _ = await self._existing(request.user_id)
        with self._db.write() as tx:
            self._devices.delete(tx, request.user_id, (device_id,))
        await tx
        return {"device_id": device_id}

    def device_deleted(self, tx: Tx, user_id: str, device_id: str) -> None:
        """For `Devices.on_device_deleted`."""
        tx.run("DELETE FROM dehydrated_devices WHERE user_id = $1 AND device_id = $2", user_id, device_id)


def _encrypted(data: dict[str, Any]) -> bytes:
    """The device's data as bytes. Raises MissingParam, Refused, TooLarge."""
    get_string(data, "algorithm")
    for key, value in data.items():
        # Beside the algorithm's name there are ciphertext, nonces and numbers, whatever the algorithm.
        fits = (
            shapes.is_name(value)
            if key == "algorithm"
            else type(value) is int or (type(value) is str and is_base64(value))
        )
        if not shapes.is_name(key) or not fits or len(data) > MAX_DATA_KEYS:
            raise Refused("The device_data are not encrypted. A dehydrated device is kept here only as ciphertext.")
    raw = orjson.dumps(data)
    if len(raw) > MAX_DATA_BYTES:
        raise TooLarge(f"The device_data are larger than {MAX_DATA_BYTES} bytes. Upload fewer one-time keys.")
    return raw


def _find(query: Query, user_id: str) -> tuple[str, bytes] | None:
    row = query.one("SELECT device_id, data FROM dehydrated_devices WHERE user_id = $1", user_id)
    return (row[0], bytes(row[1])) if row is not None else None


def _messages(query: Query, user_id: str, device_id: str, after: int) -> list[Row]:
    return query.all(
        "SELECT pos, sender, type, content FROM to_device_messages"
        " WHERE user_id = $1 AND device_id = $2 AND pos > $3 ORDER BY pos LIMIT $4",
        user_id,
        device_id,
        after,
        MAX_PAGE,
    )
