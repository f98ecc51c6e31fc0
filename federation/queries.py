"""What other servers may ask beside rooms: addresses, profiles, the directory, device lists and keys, our version.

Each answer is made by the part that owns it; here stand the shapes of the questions and their bounds.
Spec: server-server-api/#querying-for-information, #public-room-directory, #device-management, #end-to-end-encryption.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from relay.errors import BadJson, InvalidParam, MissingParam, NotFound, TooLarge, Unrecognized
from relay.ids import is_alias, is_user_id, server_of
from relay.part import Part
from relay.web import Answer, Request, Route, get_object

V1 = "/_matrix/federation/v1"
MAX_USERS_ASKED = 500
MAX_DEVICES_ASKED = 2_000
MAX_DEVICE_ID = 255


class Directory(Protocol):
    async def local_alias(self, alias: str) -> tuple[str, list[str]] | None:
        """(room ID, servers in it) of an address of this server."""
        ...

    async def public_rooms_here(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """The standard's answer to limit, since and filter; only rooms published here."""
        ...


class Profiles(Protocol):
    async def query_profile(self, user_id: str, field: str | None, origin: str | None = None) -> dict[str, Any]: ...


class DeviceKeys(Protocol):
    async def query_local(self, wanted: Mapping[str, list[str]]) -> Mapping[str, Any]:
        """{"device_keys", "master_keys", "self_signing_keys"} of users of this server, as other servers may see them."""
        ...

    async def user_devices(self, user_id: str) -> Mapping[str, Any]:
        """The standard's list of one user's devices. Raises NotFound."""
        ...


class OneTimeKeys(Protocol):
    async def claim_local(self, wanted: Mapping[str, Mapping[str, str]]) -> Mapping[str, Any]:
        """{user: {device: {key ID: key}}}"""
        ...


class Queries(Part):
    def __init__(
        self,
        server_name: str,
        version: str,
        directory: Directory,
        profiles: Profiles,
        device_keys: DeviceKeys,
        one_time_keys: OneTimeKeys,
    ) -> None:
        self._server_name = server_name
        self._version = version
        self._directory = directory
        self._profiles = profiles
        self._device_keys = device_keys
        self._one_time_keys = one_time_keys

    def routes(self) -> Iterable[Route]:
        yield Route("GET", f"{V1}/version", self._say_version, auth="none", limit="federation", serves="federation")
        for method, name, function in (
            ("GET", "query/directory", self._alias),
            ("GET", "query/profile", self._profile),
            ("GET", "query/{queryType}", self._unknown),
            ("GET", "publicRooms", self._public_rooms),
            ("POST", "publicRooms", self._public_rooms),
            ("GET", "user/devices/{userId}", self._devices),
            ("POST", "user/keys/query", self._keys),
            ("POST", "user/keys/claim", self._claim),
        ):
            yield Route(method, f"{V1}/{name}", function, auth="server", limit="federation", serves="federation")

    async def _say_version(self, request: Request) -> Answer:
        return {"server": {"name": "Sealed Relay", "version": self._version}}

    async def _alias(self, request: Request) -> Answer:
        alias = _asked(request, "room_alias")
        if not is_alias(alias) or server_of(alias) != self._server_name:
            raise InvalidParam("That is no address of this server; ask the server that stands after its colon.")
        found = await self._directory.local_alias(alias)
        if found is None:
            raise NotFound("There is no room with this address.")
        return {"room_id": found[0], "servers": found[1]}

    async def _profile(self, request: Request) -> Answer:
        user_id = self._ours(_asked(request, "user_id"))
        return await self._profiles.query_profile(user_id, request.query.get("field"), request.origin)

    async def _unknown(self, request: Request) -> Answer:
        raise Unrecognized("This server does not know this kind of query.")

    async def _public_rooms(self, request: Request) -> Answer:
        if request.http.method == "POST":
            body = request.optional_json()
        else:
            body = {key: request.query[key] for key in ("since",) if key in request.query}
            if "limit" in request.query:
                body["limit"] = request.query_int("limit", 0)
        return await self._directory.public_rooms_here(body)

    async def _devices(self, request: Request) -> Answer:
        return await self._device_keys.user_devices(self._ours(request.params["userId"]))

    async def _keys(self, request: Request) -> Answer:
        wanted: dict[str, list[str]] = {}
        asked = get_object(request.json(), "device_keys")
        if len(asked) > MAX_USERS_ASKED:
            raise TooLarge(f"Ask for at most {MAX_USERS_ASKED} users at once.")
        for user_id, devices in asked.items():
            if not isinstance(devices, list) or not all(isinstance(device, str) for device in devices):
                raise BadJson("device_keys is an object of user IDs and lists of device IDs.")
            wanted[self._ours(user_id)] = devices[:MAX_DEVICES_ASKED]
        return await self._device_keys.query_local(wanted)

    async def _claim(self, request: Request) -> Answer:
        wanted: dict[str, dict[str, str]] = {}
        asked = get_object(request.json(), "one_time_keys")
        count = 0
        for user_id, devices in asked.items():
            if not isinstance(devices, dict) or not all(isinstance(algorithm, str) for algorithm in devices.values()):
                raise BadJson("one_time_keys is an object of user IDs, device IDs and names of algorithms.")
            count += len(devices)
            if count > MAX_DEVICES_ASKED or len(wanted) >= MAX_USERS_ASKED:
                raise TooLarge(f"Ask for at most {MAX_DEVICES_ASKED} devices at once.")
            wanted[self._ours(user_id)] = {
                device: name for device, name in devices.items() if len(device) <= MAX_DEVICE_ID
            }
        return {"one_time_keys": await self._one_time_keys.claim_local(wanted)}

    def _ours(self, user_id: str) -> str:
        if not is_user_id(user_id) or server_of(user_id) != self._server_name:
            raise InvalidParam("That is no user of this server; ask the server that stands after the colon.")
        return user_id


def _asked(request: Request, name: str) -> str:
    value = request.query.get(name)
    if value is None:
        raise MissingParam(f"The parameter {name} is missing.")
    return value
