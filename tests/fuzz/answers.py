"""What an answer to bad input has to look like, whatever the input was: the standard's error form and CORS, or a page that is
closed to everything foreign; never a traceback."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson
from yarl import URL

# About another server, or an upload, that did not come in time; never about ourselves.
OTHERS_FAULT = (502, 504)


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Any
    body: bytes

    @property
    def json(self) -> dict[str, Any]:
        found: dict[str, Any] = orjson.loads(self.body)
        return found

    @property
    def errcode(self) -> str:
        return str(self.json.get("errcode", ""))


async def ask(http: aiohttp.ClientSession, method: str, url: str, body: bytes | None = None, **headers: str) -> Answer:
    """`url` goes out as it stands, whatever is in it."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    async with http.request(method, URL(url, encoded=True), data=body or None, headers=headers) as answer:
        return Answer(answer.status, answer.headers, await answer.read())


def _require_calm(answer: Answer, what: str) -> None:
    """Every answer is fit for a stranger; those that refuse say why, in the standard's form or on a page."""
    assert b"Traceback" not in answer.body and b".py" not in answer.body, (
        f"{what}: the answer shows what the program looks like inside"
    )
    assert answer.status < 500 or answer.status in OTHERS_FAULT, (
        f"{what}: bad input is the sender's fault, got {answer.status}"
    )


def require_proper_page(answer: Answer, what: str) -> None:
    """What a browser shows: nobody else's script reads it, frames it or runs in it."""
    _require_calm(answer, what)
    assert "Access-Control-Allow-Origin" not in answer.headers, f"{what}: other sites may read a page with a cookie"
    assert answer.headers["X-Frame-Options"] == "DENY", f"{what}: other sites may frame it"
    if answer.status == 303:
        return
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"], f"{what}: it lets in what is foreign"
    if answer.status >= 400:
        assert answer.headers["Content-Type"].startswith("text/html"), f"{what}: a refusal is a page"


def require_proper(answer: Answer, what: str) -> None:
    """What a client or a server gets."""
    _require_calm(answer, what)
    assert answer.headers.get("Access-Control-Allow-Origin") == "*", (
        f"{what}: an answer without CORS can't be read by a web client"
    )
    if answer.status < 400:
        return
    assert answer.headers["Content-Type"].startswith("application/json"), f"{what}: an error is JSON"
    body = answer.json
    if answer.status == 401 and "flows" in body:
        return
    assert str(body.get("errcode", "")).startswith("M_"), f"{what}: an error has an errcode, got {body}"
    assert isinstance(body.get("error"), str) and body["error"], f"{what}: an error has a text for a person, got {body}"
