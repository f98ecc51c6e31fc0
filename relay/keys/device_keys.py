"""Uploading a device's keys, querying everybody's, and what other servers may ask of ours.

Answers are spliced from stored bytes, nothing is parsed on the way, but for one's own list (names of devices are for
their owner only) and for master keys that the asker has signed. Spec: client-server-api/#key-distribution,
server-server-api/#device-management, #end-to-end-encryption.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import orjson

from relay.accounts.devices import Devices
from relay.db import Database, Tx
from relay.errors import BadJson, Forbidden, MissingParam
from relay.ids import is_user_id, server_of
from relay.keys import shapes
from relay.keys.cross_signing import CrossSigning
from relay.keys.device_lists import DeviceLists
from relay.keys.one_time_keys import MAX_FALLBACK_KEYS, MAX_KEYS_PER_DEVICE, Key, OneTimeKeys, parse, timeout_of
from relay.keys.published import KeyList, Published
from relay.keys.remote_lists import RemoteLists
from relay.keys.to_device import ToDevice
from relay.keys.user_signatures import UserSignatures, Vouched
from relay.part import Part
from relay.web import Answer, Request, Route, get_object

Fragment = orjson.Fragment


class DeviceKeys(Part):
    def __init__(
        self,
        db: Database,
        published: Published,
        lists: DeviceLists,
        remote_lists: RemoteLists,
        one_time_keys: OneTimeKeys,
        cross_signing: CrossSigning,
        signatures: UserSignatures,
        to_device: ToDevice,
        devices: Devices,
        server_name: str,
    ) -> None:
        self._db = db
        self._published = published
        self._lists = lists
        self._remote_lists = remote_lists
        self._one_time_keys = one_time_keys
        self._cross_signing = cross_signing
        self._signatures = signatures
        self._to_device = to_device
        self._devices = devices
        self._server_name = server_name

    def routes(self) -> Iterable[Route]:
        keys = "/_matrix/client/v3/keys"
        yield Route("POST", f"{keys}/upload", self._upload_route, limit="keys")
        # Old clients repeat their device's ID in the path.
        yield Route("POST", f"{keys}/upload/{{device_id}}", self._upload_route, limit="keys")
        yield Route("POST", f"{keys}/query", self._query_route, limit="keys")

    # --- uploading

    async def _upload_route(self, request: Request) -> Answer:
        body, user_id, device_id = request.json(), request.user_id, request.who.device_id
        if not device_id:
            raise MissingParam(
                "Keys belong to a device, and this request is of none: name it in the parameter device_id."
            )
        if request.params.get("device_id", device_id) != device_id:
            raise Forbidden("A device can only upload its own keys.")
        one_time = parse(body, "one_time_keys", MAX_KEYS_PER_DEVICE)
        fallback = parse(body, "fallback_keys", MAX_FALLBACK_KEYS)
        if len({key.algorithm for key in fallback}) < len(fallback):
            raise BadJson("There can only be one fallback key of each algorithm.")
        given = body.get("device_keys")
        if given:
            keys = shapes.device_keys(given, user_id, device_id)
            if await self._cross_signing.is_signing_key(user_id, device_id):
                raise Forbidden(
                    "This device's ID is the name of one of your cross-signing keys. Sign in as another one."
                )
            counts = await self._publish(user_id, device_id, keys, one_time, fallback)
        elif one_time or fallback:
            with self._db.write() as tx:
                self._one_time_keys.upload(tx, user_id, device_id, one_time, fallback)
            counts = await tx
        else:
            counts = (await self._one_time_keys.supply(user_id, device_id)).counts
        return {"one_time_key_counts": counts}

    async def _publish(
        self, user_id: str, device_id: str, keys: bytes, one_time: list[Key], fallback: list[Key]
    ) -> dict[str, int]:
        audience = await self._lists.audience(user_id)
        async with self._lists.lock(user_id):
            known = await self._published.of(user_id)
            old = known.devices.get(device_id)
            if old is not None and old != keys:
                keys = _still_signed(keys, old, user_id)
            with self._db.write() as tx:
                self._one_time_keys.upload(tx, user_id, device_id, one_time, fallback)
                if old != keys:
                    self._published.put_device(tx, user_id, device_id, keys)
                    self._lists.announce_device(tx, audience, user_id, device_id, keys, known.stream)
            counts: dict[str, int] = await tx
        return counts

    def device_deleted(self, tx: Tx, user_id: str, device_id: str) -> None:
        """For `Devices.on_device_deleted`: nothing that was kept for the device stays, and others hear of it."""
        self._lists.device_deleted(tx, user_id, device_id)
        self._one_time_keys.device_deleted(tx, user_id, device_id)
        self._to_device.device_deleted(tx, user_id, device_id)

    # --- querying

    async def _query_route(self, request: Request) -> Answer:
        body = request.json()
        wanted = _wanted(get_object(body, "device_keys"))
        local = [user_id for user_id in wanted if server_of(user_id) == self._server_name]
        remote = [user_id for user_id in wanted if server_of(user_id) != self._server_name]
        found = await self._published.lists(local)
        failures: dict[str, Any] = {}
        if remote:
            from_others, failures = await self._remote_lists.lists(remote, timeout_of(body))
            found = found | from_others
        answer = _answer(found, wanted)
        answer["failures"] = failures
        me = request.user_id
        if me in found:
            answer["device_keys"][me] = await self._with_names(found[me], me, wanted[me])
            if "user_signing" in found[me].signing:
                answer["user_signing_keys"][me] = Fragment(found[me].signing["user_signing"])
        if any(user_id != me and "master" in one.signing for user_id, one in found.items()):
            for user_id, vouched in (await self._signatures.made_by(me)).items():
                if user_id in found and "master" in found[user_id].signing:
                    answer["master_keys"][user_id] = _vouched_for(found[user_id].signing["master"], me, vouched)
        return answer

    async def _with_names(self, own: KeyList, user_id: str, wanted: Collection[str]) -> dict[str, Any]:
        names = await self._devices.names(user_id)
        found: dict[str, Any] = {}
        for device_id, raw in own.devices.items():
            if not wanted or device_id in wanted:
                name = names.get(device_id)
                unsigned = {} if name is None else {"device_display_name": name}
                found[device_id] = {**orjson.loads(raw), "unsigned": unsigned}
        return found

    # --- for other servers

    async def query_local(self, device_keys: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to `POST /federation/v1/user/keys/query`, its keys as ready JSON. Raises BadJson."""
        wanted = _wanted(device_keys)
        local = [user_id for user_id in wanted if server_of(user_id) == self._server_name]
        answer = _answer(await self._published.lists(local), wanted)
        del answer["user_signing_keys"]
        return answer

    async def user_devices(self, user_id: str) -> dict[str, Any]:
        """The answer to `GET /federation/v1/user/devices/{userId}`."""
        known = await self._published.of(user_id)
        answer: dict[str, Any] = {
            "user_id": user_id,
            "stream_id": known.stream,
            "devices": [{"device_id": device_id, "keys": Fragment(raw)} for device_id, raw in known.devices.items()],
        }
        if "master" in known.signing:
            answer["master_key"] = Fragment(known.signing["master"])
        if "self_signing" in known.signing:
            answer["self_signing_key"] = Fragment(known.signing["self_signing"])
        return answer


def _wanted(device_keys: Mapping[str, Any]) -> dict[str, list[str]]:
    """`{user: [device, …]}`, where no device means all of them."""
    wanted: dict[str, list[str]] = {}
    for user_id, devices in device_keys.items():
        # Clients of the first days sent an empty object, or null, for "all".
        devices = devices or []
        if not is_user_id(user_id) or type(devices) is not list or not all(type(one) is str for one in devices):
            raise BadJson("The key device_keys maps user IDs to arrays of device IDs.")
        wanted[user_id] = devices
    return wanted


def _answer(found: Mapping[str, KeyList], wanted: Mapping[str, list[str]]) -> dict[str, Any]:
    device_keys: dict[str, Any] = {}
    masters: dict[str, Any] = {}
    self_signing: dict[str, Any] = {}
    for user_id, one in found.items():
        only = wanted[user_id]
        device_keys[user_id] = {
            device_id: Fragment(raw) for device_id, raw in one.devices.items() if not only or device_id in only
        }
        if one.signing:
            if "master" in one.signing:
                masters[user_id] = Fragment(one.signing["master"])
            if "self_signing" in one.signing:
                self_signing[user_id] = Fragment(one.signing["self_signing"])
    return {
        "device_keys": device_keys,
        "master_keys": masters,
        "self_signing_keys": self_signing,
        "user_signing_keys": {},
    }


def _vouched_for(master: bytes, signer: str, vouched: Vouched) -> Any:
    value = orjson.loads(master)
    if shapes.public_part(value)[0] != vouched.master_key:
        return Fragment(master)  # the signature was made for an earlier key
    return shapes.with_signatures(value, signer, {vouched.signer_key: vouched.signature})


def _still_signed(new: bytes, old: bytes, user_id: str) -> bytes:
    """A device that uploads the same keys again keeps the signatures that were added to them meanwhile."""
    a, b = orjson.loads(new), orjson.loads(old)
    if shapes.unsigned_form(a) != shapes.unsigned_form(b):
        return new
    return shapes.packed(
        shapes.with_signatures(a, user_id, {**shapes.own_signatures(b, user_id), **shapes.own_signatures(a, user_id)}),
        user_id,
    )
