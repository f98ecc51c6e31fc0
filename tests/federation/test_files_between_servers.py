"""Files of other servers: fetched in pieces, bounded, and whatever is malformed is their mistake, not ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from federation import media
from relay.errors import RemoteError
from relay.web import Request, Route
from tests.federation.neighbours import Neighbour, two_servers


def multipart(boundary: str, *parts: tuple[dict[str, str], bytes], end: bool = True) -> bytes:
    text = b""
    for headers, body in parts:
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        text += f"--{boundary}\r\n{lines}\r\n".encode() + body + b"\r\n"
    return text + (f"--{boundary}--\r\n".encode() if end else b"")


async def serving(two: Neighbour, answer: Any) -> None:
    async def take(request: Request) -> Any:
        return answer(request) if callable(answer) else answer

    two.more_routes = [
        Route("GET", f"{media.DOWNLOAD}/{{id}}", take, auth="server", serves="federation"),
        Route("GET", f"{media.LEGACY_DOWNLOAD}/{{server}}/{{id}}", take, auth="none", serves="federation"),
        Route("GET", "/elsewhere", take, auth="none", serves="federation"),
    ]
    await two.stop()
    await two.start()


async def whole(one: Neighbour, two: Neighbour, most: int = 10**6) -> tuple[bytes, str, str | None]:
    found = await one.client.media(two.name, "abc", most)
    return b"".join([chunk async for chunk in found.chunks]), found.content_type, found.disposition


JSON = ({"Content-Type": "application/json"}, b"{}")


def mixed(body: bytes, boundary: str = "b0") -> web.Response:
    return web.Response(body=body, headers={"Content-Type": f"multipart/mixed; boundary={boundary}"})


async def test_a_file_comes_through(tmp_path: Path) -> None:
    async with two_servers(tmp_path) as (one, two):
        content = bytes(range(256)) * 2_000 + b"\r\n--c0 is no end\r\n--"
        part = ({"Content-Type": "image/png", "Content-Disposition": 'inline; filename="a"'}, content)
        await serving(two, lambda _: mixed(multipart("b0", JSON, part)))
        assert await whole(one, two) == (content, "image/png", 'inline; filename="a"'), "byte for byte"
        with pytest.raises(RemoteError, match="larger"):
            await whole(one, two, most=1_000)
        empty = ({"Content-Type": "application/octet-stream"}, b"")
        await serving(two, lambda _: mixed(multipart("b0", JSON, empty)))
        assert (await whole(one, two))[0] == b"", "an empty file is a file"


async def test_a_file_that_lies_elsewhere(tmp_path: Path) -> None:
    async with two_servers(tmp_path) as (one, two):

        def answer(request: Request) -> web.Response:
            if request.http.path == "/elsewhere":
                assert "Authorization" not in request.http.headers, "the other place gets no signature"
                return web.Response(body=b"there", content_type="text/plain")
            return mixed(multipart("b0", JSON, ({"Location": f"https://two.test:{two.listening.port}/elsewhere"}, b"")))

        await serving(two, answer)
        assert (await whole(one, two))[0] == b"there", "the place is asked"
        await serving(two, lambda _: mixed(multipart("b0", JSON, ({"Location": "https://10.0.0.1/private"}, b""))))
        with pytest.raises(RemoteError, match="could not be reached"):
            await whole(one, two)
        await serving(two, lambda _: mixed(multipart("b0", JSON, ({"Location": "file:///etc/passwd"}, b""))))
        with pytest.raises(RemoteError):
            await whole(one, two)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"--b0",
        b"no boundary at all",
        multipart("b0", JSON),
        multipart("b0", JSON, end=False),
        multipart("b0", ({"Content-Type": "application/json"}, b"x" * 100_000), ({}, b"y")),
        multipart("b0", JSON, ({"Content-Type": "multipart/mixed; boundary=c"}, b"--c\r\n\r\nx\r\n--c--")),
        multipart("b0", JSON, ({"Content-Type": "text/plain"}, b"half"), end=False)[:-2],
        b"--b0\r\n" + b"x" * 50_000 + b"\r\n\r\n",
    ],
)
async def test_malformed_answers_are_their_mistake(tmp_path: Path, body: bytes) -> None:
    async with two_servers(tmp_path) as (one, two):
        await serving(two, lambda _: mixed(body))
        with pytest.raises(RemoteError):
            await whole(one, two)
        await serving(two, lambda _: web.Response(body=body, content_type="text/html"))
        with pytest.raises(RemoteError, match="multipart"):
            await whole(one, two)


async def test_a_server_from_before_authenticated_media(tmp_path: Path) -> None:
    async with two_servers(tmp_path) as (one, two):

        def answer(request: Request) -> web.Response:
            if request.http.path.startswith(media.DOWNLOAD):
                return web.json_response({"errcode": "M_UNRECOGNIZED", "error": "?"}, status=404)
            assert request.query["allow_remote"] == "false", "it must not ask anybody else"
            return web.Response(body=b"old", content_type="text/plain")

        await serving(two, answer)
        assert (await whole(one, two))[0] == b"old", "the older endpoint is asked"
        with pytest.raises(RemoteError, match="larger"):
            await whole(one, two, most=2)
        await serving(two, lambda _: web.json_response({"errcode": "M_NOT_FOUND", "error": "gone"}, status=404))
        with pytest.raises(RemoteError) as refused:
            await whole(one, two)
        assert (refused.value.status, refused.value.errcode) == (404, "M_NOT_FOUND"), "what is gone is gone"
