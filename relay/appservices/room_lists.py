"""The room directories of other networks: which rooms a service lists for each, beside this server's own list.

A client names one by the `instance_id` that the service's network has here. Whoever is in no such room sees what the
directory shows of any published one. Spec: application-service-api/#published-room-directories.
"""

from __future__ import annotations

from collections.abc import Iterable

from relay.appservices.services import Services
from relay.db import Database, Query
from relay.errors import Forbidden, InvalidParam, NotFound
from relay.ids import is_room_id
from relay.part import Part
from relay.rooms.rooms import Rooms
from relay.tables import Schema, Table
from relay.web import Answer, Request, Route, get_string

MAX_NETWORK = 255
MAX_LISTED = 10_000

_LIFE = "until the service takes it out"


def instance_id(service: str, network: str) -> str:
    """How clients call a network of a service, which need not be the only one with this network."""
    return f"{service}|{network}"


class RoomLists(Part):
    schema = Schema(
        "appservice_room_lists",
        tables=(
            Table(
                "network_rooms",
                "a room that a bridge lists",
                {
                    "instance": ("which service and network", _LIFE),
                    "room_id": ("the room", _LIFE),
                },
            ),
        ),
        steps=(
            "CREATE TABLE network_rooms (instance TEXT NOT NULL, room_id TEXT NOT NULL, PRIMARY KEY (instance, room_id)) CLUSTERED",
        ),
    )

    def __init__(self, services: Services, db: Database, rooms: Rooms) -> None:
        self._services = services
        self._db = db
        self._rooms = rooms

    def routes(self) -> Iterable[Route]:
        path = "/_matrix/client/v3/directory/list/appservice/{networkId}/{roomId}"
        yield Route("PUT", path, self._put_route)

    def listed(self, query: Query, instance: str | None) -> list[str]:
        """The rooms of one network, or of all that there are."""
        known = tuple(one.id for one in self._services.all)
        rows = query.all("SELECT instance, room_id FROM network_rooms WHERE $1 IN ('', instance)", instance or "")
        return [room_id for of, room_id in rows if of.rpartition("|")[0] in known]

    async def _put_route(self, request: Request) -> Answer:
        service = request.who.service
        if not service:
            raise Forbidden("Only an application service keeps lists of rooms of other networks.")
        network, room_id = request.params["networkId"], request.params["roomId"]
        visibility = get_string(request.json(), "visibility")
        if visibility not in ("public", "private"):
            raise InvalidParam("The visibility is public or private.")
        if not 0 < len(network) <= MAX_NETWORK:
            raise InvalidParam(f"The name of a network has 1 to {MAX_NETWORK} characters.")
        room = await self._rooms.get(room_id) if is_room_id(room_id) else None
        if room is None or not room.known:
            raise NotFound("This room is not known here.")
        instance = instance_id(service, network)

        def put(query: Query) -> None:
            if visibility == "private":
                query.run("DELETE FROM network_rooms WHERE instance = $1 AND room_id = $2", instance, room_id)
                return
            if query.value("SELECT count(*) FROM network_rooms WHERE instance = $1", instance) >= MAX_LISTED:
                raise Forbidden(f"A network's list holds {MAX_LISTED} rooms. Take some out first.")
            query.run(
                "INSERT INTO network_rooms (instance, room_id) VALUES ($1, $2) ON CONFLICT (instance, room_id) DO NOTHING",
                instance,
                room_id,
            )

        with self._db.write() as tx:
            tx.call(put)
        await tx
        return {}
