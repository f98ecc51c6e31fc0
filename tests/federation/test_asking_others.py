"""What one server asks of another: both ends of each question, and answers that can't be used."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from federation.media import THUMBNAIL, ServesMedia
from federation.queries import Queries
from relay.errors import ApiError, Forbidden, NotFound, RemoteError
from relay.media.files import Reader
from relay.media.routes import LocalMedia
from relay.protocol import event as events
from relay.web import Request, Route
from tests.federation.neighbours import V11, Neighbour, two_servers

ROOM = "!room:two.test"


class Answers:
    """In place of the parts that own what is asked for."""

    async def local_alias(self, alias: str) -> tuple[str, list[str]] | None:
        return (ROOM, ["two.test", "bad name"]) if alias.startswith("#here:") else None

    async def public_rooms_here(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"chunk": [{"room_id": ROOM, "asked": dict(body)}], "total_room_count_estimate": 1}

    async def query_profile(self, user_id: str, field: str | None, origin: str | None = None) -> dict[str, Any]:
        if user_id.startswith("@shy"):
            raise Forbidden("Not for you.")
        return {"displayname": "Bob", "asked_by": origin} if field is None else {field: "Bob"}

    async def query_local(self, wanted: Mapping[str, list[str]]) -> Mapping[str, Any]:
        return {"device_keys": {user: {"D": {"asked": devices}} for user, devices in wanted.items()}}

    async def user_devices(self, user_id: str) -> Mapping[str, Any]:
        return {"user_id": user_id, "stream_id": 3, "devices": []}

    async def claim_local(self, wanted: Mapping[str, Mapping[str, str]]) -> Mapping[str, Any]:
        return {user: {device: {"signed_curve25519:A": {}} for device in devices} for user, devices in wanted.items()}


async def test_every_question_has_its_answer(tmp_path: Path) -> None:
    async with two_servers(tmp_path) as (one, two):
        answers = Answers()
        two.more_routes = list(Queries(two.name, "1.0", answers, answers, answers, answers).routes())
        await two.stop()
        await two.start()
        bob, server = f"@bob:{two.name}", two.name
        ask = one.client
        assert await ask.directory(server, f"#here:{server}") == (ROOM, ["two.test"]), "an address, without bad names"
        with pytest.raises(RemoteError) as refused:
            await ask.directory(server, f"#gone:{server}")
        assert (refused.value.status, refused.value.errcode) == (404, "M_NOT_FOUND"), "what is not there is not there"
        assert one.backoff.wait_left(server) == 0, "and a refusal is no reason to leave a server alone"
        with pytest.raises(RemoteError, match="ask the server"):
            await ask.directory(server, "#here:elsewhere.test")
        assert await ask.profile(server, bob, None) == {"displayname": "Bob", "asked_by": one.name}
        assert await ask.profile(server, bob, "avatar_url") == {"avatar_url": "Bob"}
        with pytest.raises(RemoteError, match="Not for you"):
            await ask.profile(server, f"@shy:{server}", None)
        listed = await ask.public_rooms(server, {"limit": 3, "filter": {}})
        assert listed["chunk"][0]["asked"] == {"limit": 3, "filter": {}}, "the question arrives whole"
        plain = await one.connections.get(server, "/_matrix/federation/v1/publicRooms?limit=5&since=abc")
        assert plain["chunk"][0]["asked"] == {"limit": 5, "since": "abc"}, "by GET as well"
        assert await ask.query_keys(server, {bob: ["D"]}) == {"device_keys": {bob: {"D": {"asked": ["D"]}}}}
        claimed = await ask.claim_keys(server, {bob: {"D": "signed_curve25519"}})
        assert claimed == {"one_time_keys": {bob: {"D": {"signed_curve25519:A": {}}}}}
        assert (await ask.user_devices(server, bob))["stream_id"] == 3
        for wrong in ({"@eve:elsewhere.test": []}, {bob: "all"}, {bob: [1]}):
            with pytest.raises(RemoteError):
                await ask.query_keys(server, wrong)  # type: ignore[arg-type]
        with pytest.raises(RemoteError) as unknown:
            await one.connections.get(server, "/_matrix/federation/v1/query/else?x=1")
        assert (unknown.value.status, unknown.value.errcode) == (404, "M_UNRECOGNIZED")
        version = await one.connections.get(server, "/_matrix/federation/v1/version")
        assert version == {"server": {"name": "Sealed Relay", "version": "1.0"}}


class Shelf:
    def __init__(self, folder: Path) -> None:
        self._file = folder / "file"
        self._file.write_bytes(b"ciphertext" * 50_000)
        self._threads = ThreadPoolExecutor(1)

    async def local_media(self, media_id: str) -> LocalMedia:
        if media_id == "late":
            raise ApiError("Not yet.", status=504, errcode="M_NOT_YET_UPLOADED")
        if media_id not in ("blob", "avatar"):
            raise NotFound("There is no such file.")
        reader = Reader(FileIO(self._file), self._file.stat().st_size, self._threads)
        return LocalMedia(reader, "image/png" if media_id == "avatar" else "application/octet-stream", "na\r\nme")


async def test_our_files_reach_other_servers(tmp_path: Path) -> None:
    async with two_servers(tmp_path) as (one, two):
        two.more_routes = list(ServesMedia(Shelf(tmp_path)).routes())
        await two.stop()
        await two.start()
        found = await one.client.media(two.name, "blob", 10**7)
        assert b"".join([chunk async for chunk in found.chunks]) == b"ciphertext" * 50_000, "byte for byte"
        assert found.content_type == "application/octet-stream"
        assert found.disposition is not None and "\n" not in found.disposition, "a name can't begin another header"
        for media_id, expected in (("gone", (404, "M_NOT_FOUND")), ("late", (504, "M_NOT_YET_UPLOADED"))):
            with pytest.raises(RemoteError) as refused:
                await one.client.media(two.name, media_id, 10**7)
            assert (refused.value.status, refused.value.errcode) == expected
        assert one.backoff.wait_left(two.name) == 0, "and says nothing about the server"
        answer = await one.connections.open(two.name, "GET", f"{THUMBNAIL}/avatar?width=32&height=32")
        assert b"image/png" in await answer.read(), "the thumbnail of an avatar is the avatar"
        answer.release()
        with pytest.raises(RemoteError, match="no thumbnail"):
            await one.connections.open(two.name, "GET", f"{THUMBNAIL}/blob?width=32&height=32")


async def _two_answers(two: Neighbour, value: Any) -> None:
    async def take(request: Request) -> Any:
        return value if isinstance(value, web.StreamResponse) else web.json_response(value)

    prefix = "/_matrix/federation"
    two.more_routes = [
        Route(method, f"{prefix}/{path}", take, auth="server", serves="federation", max_body=10**6)
        for method, path in (
            ("GET", "v1/make_join/{r}/{u}"),
            ("PUT", "v2/send_join/{r}/{e}"),
            ("PUT", "v2/send_leave/{r}/{e}"),
            ("PUT", "v1/send_knock/{r}/{e}"),
            ("PUT", "v2/invite/{r}/{e}"),
            ("POST", "v1/get_missing_events/{r}"),
            ("GET", "v1/state_ids/{r}"),
            ("GET", "v1/state/{r}"),
            ("GET", "v1/event/{e}"),
            ("GET", "v1/event_auth/{r}/{e}"),
            ("GET", "v1/backfill/{r}"),
            ("GET", "v1/hierarchy/{r}"),
            ("GET", "v1/user/devices/{u}"),
        )
    ]
    await two.stop()
    await two.start()


EVENT_ID = "$" + "x" * 43
USER = "@u:two.test"

ASKED: list[tuple[str, Any, Any, Any]] = [
    ("make_join", lambda c, s, e: c.make("join", s, ROOM, USER), {"room_version": "11", "event": {"a": 1}}, {"room_version": "77", "event": {}}),
    ("send_join", lambda c, s, e: c.send_join(s, e), {"state": [{}], "auth_chain": []}, {"state": [1], "auth_chain": []}),
    ("members left out", lambda c, s, e: c.send_join(s, e), {"state": [], "auth_chain": [], "members_omitted": False}, {"state": [], "auth_chain": [], "members_omitted": True}),
    ("send_leave", lambda c, s, e: c.send_leave(s, e), {}, []),
    ("send_knock", lambda c, s, e: c.send_knock(s, e), {"knock_room_state": []}, {}),
    ("invite", lambda c, s, e: c.invite(s, e, []), {"event": {}}, {"event": []}),
    ("get_missing_events", lambda c, s, e: c.missing_events(s, ROOM, [], [EVENT_ID], 10, 0), {"events": []}, {"events": {}}),
    ("state_ids", lambda c, s, e: c.state_ids(s, ROOM, EVENT_ID), {"pdu_ids": [EVENT_ID], "auth_chain_ids": []}, {"pdu_ids": ["x"], "auth_chain_ids": []}),
    ("state", lambda c, s, e: c.state(s, ROOM, EVENT_ID), {"pdus": [], "auth_chain": []}, {"pdus": []}),
    ("event", lambda c, s, e: c.event(s, EVENT_ID), {"pdus": [{}]}, {"pdus": [{}, {}]}),
    ("event_auth", lambda c, s, e: c.event_auth(s, ROOM, EVENT_ID), {"auth_chain": []}, {"auth_chain": None}),
    ("backfill", lambda c, s, e: c.backfill(s, ROOM, [EVENT_ID], 5), {"pdus": []}, {"pdus": "x"}),
    ("hierarchy", lambda c, s, e: c.hierarchy(s, ROOM, True), {"room": {}, "children": []}, {"room": {}, "children": [1]}),
    ("user_devices", lambda c, s, e: c.user_devices(s, USER), {"user_id": USER, "stream_id": 1, "devices": []}, {"user_id": "@x:y", "stream_id": 1, "devices": []}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "ask", "good", "bad"), ASKED, ids=[row[0] for row in ASKED])
async def test_answers_that_can_be_used_and_such_that_cannot(
    tmp_path: Path, name: str, ask: Any, good: Any, bad: Any
) -> None:
    async with two_servers(tmp_path) as (one, two):
        event: events.Event = one.ledger.build(ROOM, "x", type="m.room.member", state_key=f"@alice:{one.name}")
        assert event.version is V11
        await _two_answers(two, good)
        await ask(one.client, two.name, event)
        deep: dict[str, Any] = {}
        for _ in range(300):
            deep = {"x": deep}
        for useless in (
            bad,
            deep,
            web.Response(body=b"{", content_type="application/json"),
            web.Response(body=b"<html>"),
        ):
            await _two_answers(two, useless)
            with pytest.raises(RemoteError):
                await ask(one.client, two.name, event)


async def test_answers_are_bounded_and_a_dead_server_is_left_alone(tmp_path: Path) -> None:
    async with two_servers(tmp_path) as (one, two):
        await _two_answers(two, {"pdus": ["x" * 1_000]})
        with pytest.raises(RemoteError, match="larger"):
            await one.connections.get(two.name, f"/_matrix/federation/v1/event/{EVENT_ID}", most_bytes=100)
        await two.listening.stop()
        with pytest.raises(RemoteError, match=r"could not be reached|broke off"):
            await one.client.event(two.name, EVENT_ID)
        with pytest.raises(RemoteError, match="next attempt"):
            await one.client.event(two.name, EVENT_ID)
        await two.stop()
        await two.start()
        await one.connections.send(two.name, "POST", "/_matrix/federation/v1/echo", {}, forced=True)
        with pytest.raises(RemoteError, match="not a list of objects"):
            await one.client.event(two.name, EVENT_ID)
