"""Somebody at the relay's pages without a browser: a cookie, forms, and what comes back."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlencode

from tests.people import Person
from tests.town import Town, Within

FORM = {"Content-Type": "application/x-www-form-urlencoded"}


class Visitor:
    def __init__(self, town: Town, house: Within, person: Person | None = None, **headers: str) -> None:
        """`headers` go with each request."""
        self._http = town.http
        self._url = house.url
        self.person = person
        self.cookie = ""
        self.headers = headers

    async def asks(self, method: str, where: str, body: bytes | None = None, **headers: str) -> tuple[Any, str]:
        """(the answer, its text). The cookie is kept as a browser keeps it."""
        sent = {**self.headers, **headers, **({"Cookie": f"relay_visit={self.cookie}"} if self.cookie else {})}
        async with self._http.request(
            method, self._url + where, data=body, headers=sent, allow_redirects=False
        ) as answer:
            if "relay_visit" in answer.cookies:
                self.cookie = answer.cookies["relay_visit"].value
            return answer, await answer.text()

    async def gets(self, where: str) -> tuple[int, str]:
        answer, text = await self.asks("GET", where)
        return answer.status, text

    async def sends(self, page: str, fields: dict[str, str], to: str | None = None) -> tuple[Any, str]:
        """A form of `page`, sent as the page would send it."""
        _, text = await self.asks("GET", page)
        token = re.search(r'name="form" value="([\w-]+)"', text)
        return await self.posts(to or page, {"form": token[1] if token else "", **fields})

    async def posts(self, where: str, fields: dict[str, str]) -> tuple[Any, str]:
        return await self.asks("POST", where, urlencode(fields).encode(), **FORM)

    async def signs_in(self) -> None:
        assert self.person is not None
        answer, text = await self.sends("/_relay/sign-in", {"name": self.person.id, "password": self.person.password})
        assert answer.status == 303, text
