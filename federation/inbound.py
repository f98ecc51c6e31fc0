"""What other servers send by themselves: transactions of events (PDUs) and ephemeral units (EDUs).

Each room's events are received in their order, the rooms beside each other; a refused event is an entry in the answer, not
a failure of the transaction. An EDU goes to the part that takes its type; one that goes wrong is logged and lost. The same
transaction, sent again, gets the same answer. Whether an event is good is `relay/rooms/receive.py`'s business.
Spec: server-server-api/#transactions.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

import orjson
import structlog

from federation.joined import Joined
from relay.doors import Doors
from relay.errors import ApiError, BadEvent, BadJson, Forbidden, InvalidParam, LimitExceeded, StorageFull
from relay.ids import MAX_ID_BYTES, is_room_id
from relay.part import Part, TakesEdu
from relay.protocol import event as events
from relay.protocol.canonical import exact
from relay.rooms.rooms import Rooms
from relay.web import MAX_FEDERATION_BODY, Request, Route, get_list, get_optional_string

log = structlog.get_logger("inbound")

# Spec: server-server-api/#transactions
MAX_PDUS = 50
MAX_EDUS = 100
# Of one server: the standard wants one, and a retry may meet the attempt before it.
MAX_AT_ONCE = 4
RETRY_AFTER_SECONDS = 1.0
MAX_ANSWERS_KEPT = 2_000
# Rooms that one receipt EDU speaks of.
MAX_RECEIPT_ROOMS = 100

Pdus = list[dict[str, Any]]


class Receives(Protocol):
    """`relay/rooms/receive.py`."""

    async def receive(self, origin: str, room_id: str, pdus: Sequence[Mapping[str, Any]]) -> dict[str, str | None]: ...


class EndsInvites(Protocol):
    """`invites.py`."""

    async def ended(self, room_id: str, pdus: Sequence[Mapping[str, Any]]) -> dict[str, str | None]: ...


class Inbound(Part):
    """`edus` maps each type of EDU to the part's function that takes it."""

    def __init__(
        self, rooms: Rooms, receiver: Receives, invites: EndsInvites, edus: Mapping[str, TakesEdu], doors: Doors
    ) -> None:
        self._doors = doors
        self._rooms = rooms
        self._receiver = receiver
        self._invites = invites
        self._edus = dict(edus)
        self._under_way: Joined[bytes] = Joined()
        self._busy: dict[str, int] = {}
        # (origin, transaction ID) -> the answer. Lost at a restart: events are known by their IDs, messages to devices by
        # their own, so that taking them twice is taking them once.
        self._answers: OrderedDict[tuple[str, str], bytes] = OrderedDict()

    def routes(self) -> Iterable[Route]:
        yield Route(
            "PUT",
            "/_matrix/federation/v1/send/{txnId}",
            self._send,
            auth="server",
            limit="federation",
            serves="federation",
            max_body=MAX_FEDERATION_BODY,
        )

    async def _send(self, request: Request) -> bytes:
        origin, txn_id = request.origin, request.params["txnId"]
        if len(txn_id) > MAX_ID_BYTES:
            raise InvalidParam(f"The transaction ID is longer than {MAX_ID_BYTES} characters.")
        known = self._answers.get((origin, txn_id))
        if known is not None:
            return known
        await self._doors.transaction(origin)
        body = request.json()
        if get_optional_string(body, "origin") not in (None, origin):
            raise Forbidden("The transaction names another origin than the server that signed the request.")
        pdus, edus = _units(body, "pdus", MAX_PDUS), _units(body, "edus", MAX_EDUS)
        return await self._under_way.get(f"{origin} {txn_id}", lambda: self._take(origin, txn_id, pdus, edus))

    async def _take(self, origin: str, txn_id: str, pdus: Pdus, edus: Pdus) -> bytes:
        busy = self._busy.get(origin, 0)
        if busy >= MAX_AT_ONCE:
            raise LimitExceeded(RETRY_AFTER_SECONDS)
        self._busy[origin] = busy + 1
        try:
            answer = await self._taken(origin, pdus, edus)
        finally:
            self._busy[origin] -= 1
            if not self._busy[origin]:
                del self._busy[origin]
        self._answers[(origin, txn_id)] = answer = exact(answer)
        while len(self._answers) > MAX_ANSWERS_KEPT:
            self._answers.popitem(last=False)
        return answer

    async def _taken(self, origin: str, pdus: Pdus, edus: Pdus) -> bytes:
        rooms: dict[str, Pdus] = {}
        for pdu in pdus:
            room_id = pdu.get("room_id")
            if is_room_id(room_id):
                rooms.setdefault(str(room_id), []).append(pdu)
        kinds: dict[str, Pdus] = {}
        for edu in edus:
            edu_type, content = edu.get("edu_type"), edu.get("content")
            if isinstance(edu_type, str) and edu_type in self._edus and isinstance(content, dict):
                kinds.setdefault(edu_type, []).append(content)
        taking = [self._edus_of_kind(origin, edu_type, contents) for edu_type, contents in kinds.items()]
        taking += [self._room(origin, room_id, its) for room_id, its in rooms.items()]
        if len(taking) == 1:
            return orjson.dumps({"pdus": await taking[0]})
        results: dict[str, dict[str, str]] = {}
        for outcome in await asyncio.gather(*taking, return_exceptions=True):
            if isinstance(outcome, BaseException):
                # Only what makes the whole transaction worth another attempt comes this far.
                raise outcome
            results.update(outcome)
        return orjson.dumps({"pdus": results})

    # --- events

    async def _room(self, origin: str, room_id: str, pdus: Pdus) -> dict[str, dict[str, str]]:
        try:
            found = await self._receiver.receive(origin, room_id, pdus)
            if not found:
                found = await self._invites.ended(room_id, pdus)
        except StorageFull:
            raise
        except Exception as error:
            # One room's trouble must not hold up everything else that this server has to say.
            log.error("events could not be received", origin=origin, room_id=room_id, exc_info=error)
            found = await self._failed(room_id, pdus)
        return {event_id: {} if why is None else {"error": why} for event_id, why in found.items()}

    async def _failed(self, room_id: str, pdus: Pdus) -> dict[str, str | None]:
        room = await self._rooms.get(room_id)
        failed: dict[str, str | None] = {}
        if room is None:
            return failed
        for pdu in pdus:
            with suppress(BadEvent):
                failed[events.parse(pdu, room.version).id] = "Something went wrong inside the server."
        return failed

    # --- ephemeral units

    async def _edus_of_kind(self, origin: str, edu_type: str, contents: Pdus) -> dict[str, dict[str, str]]:
        """Those of one type, in their order."""
        taker = self._edus[edu_type]
        for content in contents:
            try:
                admitted = await self._admitted(origin, edu_type, content)
                if admitted is not None:
                    await taker(origin, admitted)
            except StorageFull:
                raise
            except ApiError as refusal:
                log.info("refused an EDU", origin=origin, edu_type=edu_type, errcode=refusal.errcode)
            except Exception as error:
                log.error("an EDU could not be taken", origin=origin, edu_type=edu_type, exc_info=error)
        return {}

    async def _admitted(self, origin: str, edu_type: str, content: dict[str, Any]) -> dict[str, Any] | None:
        """What the rooms' access lists leave of it. Spec: server-server-api/#server-access-control-lists-acls"""
        if edu_type == "m.typing":
            return content if await self._admits(origin, content.get("room_id")) else None
        if edu_type == "m.receipt":
            rooms = list(content.items())[:MAX_RECEIPT_ROOMS]
            return {room_id: each for room_id, each in rooms if await self._admits(origin, room_id)} or None
        return content

    async def _admits(self, origin: str, room_id: object) -> bool:
        if not isinstance(room_id, str) or not is_room_id(room_id):
            return False
        room = await self._rooms.get(room_id)
        return room is not None and bool(room.local_joined) and room.acl.allows(origin)


def _units(body: Mapping[str, Any], name: str, most: int) -> Pdus:
    given = get_list(body, name, [])
    if len(given) > most:
        raise BadJson(
            f"A transaction has at most {most} {name}; this one has {len(given)}. Send the others in another."
        )
    return [unit for unit in given if type(unit) is dict]
