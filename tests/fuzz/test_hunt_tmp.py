"""Every client endpoint, found by itself, against bodies and parameters of the wrong type: refused in the standard's form.

One example is one request; a part's endpoints share a relay. The words that fill the bodies come from the part's source.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.web import Route
from tests.fuzz.answers import Answer, ask, require_proper
from tests.fuzz.oddities import NO_BODIES, ROOT, TEXTS, bodies, bounded, words_of
from tests.fuzz.overheard import Ears
from tests.people import Person
from tests.town import Town

PARTS = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "relay").rglob("*.py")
    if path.name != "web.py" and "Route(" in path.read_text(encoding="utf-8")
)
import collections, atexit
STAT = collections.Counter()
atexit.register(lambda: open("/tmp/stat.txt","w").write("\n".join(f"{k} {v}" for k,v in sorted(STAT.items(), key=str))))
PATH_TEXTS = tuple(text for text in TEXTS if "\ud800" not in text and len(text) < 1000)
# What ends her session is done by somebody who can sign in again.
ENDS = ("logout", "deactivate", "delete_devices", "account/password", "/devices/", "/refresh")


class Place:
    """A relay with a room, a person who throws and one who must not notice."""

    def __init__(self, town: Town) -> None:
        self.town = town
        self.number = 0

    async def opens(self) -> Place:
        house = await self.town.relay("one")
        assert house.server is not None
        self.url = house.url
        self.routes: list[Route] = list(house.server.web.routers["client"].routes)
        self.quiet = await self.town.user("quiet@one")
        await self.new_thrower()
        return self

    async def new_thrower(self) -> None:
        self.number += 1
        self.thrower: Person = await self.town.user(f"thrower{self.number}@one")
        self.room = await self.thrower.creates_room(with_=self.quiet)
        self.event = await self.thrower.sends(self.room)
        self.known = (self.thrower.id, self.quiet.id, self.room, self.event, self.thrower.device, self.thrower.server, "global")

    def routes_of(self, part: str) -> list[Route]:
        return [route for route in self.routes if route.function.__code__.co_filename == str(ROOT / part)]

    async def throws(self, route: Route, path: str, body: bytes | None) -> Answer:
        what = f"{route.method} {path[:200]} {(body or b'')[:300]!r}"
        answer = await ask(
            self.town.http, route.method, self.url + path, body,
            Authorization=f"Bearer {self.thrower.token}", Content_Type="application/json",
        )  # fmt: skip
        STAT[(route.method+" "+route.path, answer.status, answer.errcode if answer.status>=400 and b"flows" not in answer.body else "")] += 1
        require_proper(answer, what)
        if any(word in route.path for word in ENDS):
            whoami = await ask(self.town.http, "GET", f"{self.url}/_matrix/client/v3/account/whoami", Authorization=f"Bearer {self.thrower.token}")
            if whoami.status == 401:
                await self.new_thrower()
        return answer

    async def quiet_noticed_nothing(self) -> None:
        room = await self.thrower.creates_room(with_=self.quiet)
        sent = await self.thrower.sends(room)
        assert await self.quiet.sees(sent), "whoever did nothing is still signed in and hears what is said"


def paths(data: st.DataObject, route: Route, place: Place, words: tuple[str, ...]) -> str:
    """The route's path, each parameter mostly one that exists, and a query of odd values under known names."""
    known = {"room": place.room, "user": place.thrower.id, "event": place.event, "device": place.thrower.device, "server": place.thrower.server}
    segments = []
    for segment in route.path.split("/"):
        if not segment.startswith("{"):
            segments.append(segment)
            continue
        fits = next((value for word, value in known.items() if word in segment.lower()), None)
        value = data.draw(st.sampled_from([fits, fits, fits] if fits else ["x"]) | st.sampled_from(PATH_TEXTS) | st.sampled_from(words))
        segments.append(quote(value, safe=""))
    query = data.draw(st.dictionaries(st.sampled_from(words), st.sampled_from(PATH_TEXTS) | st.sampled_from(place.known), max_size=4))
    # Nobody waits for long here.
    pairs = [f"{quote(key)}={quote(value)}" for key, value in query.items() if "timeout" not in key]
    return "/".join(segments) + ("?" + "&".join(pairs) if pairs else "")


def test_every_part_with_endpoints_is_thrown_at() -> None:
    assert len(PARTS) > 20, "the parts are found by their routes"


@pytest.fixture
async def place(town: Town) -> Place:
    return await Place(town).opens()


@pytest.mark.parametrize("part", PARTS)
async def test_what_is_no_object_is_refused_everywhere(place: Place, ears: Ears, part: str) -> None:
    for route in place.routes_of(part):
        segments = (quote(place.room, safe="") if s.startswith("{") else s for s in route.path.split("/"))
        path = "/".join(segments)
        for body in NO_BODIES if route.method != "GET" else ():
            await place.throws(route, path, body)
    ears.nothing_broke()
    await place.quiet_noticed_nothing()


@pytest.mark.parametrize("part", PARTS)
@bounded(int(__import__("os").environ.get("N","100")))
@given(data=st.data())
async def test_no_odd_value_breaks_an_endpoint(place: Place, ears: Ears, part: str, data: st.DataObject) -> None:
    words = words_of(ROOT / part)
    route = data.draw(st.sampled_from(place.routes_of(part)), "route")
    path = paths(data, route, place, words)
    body = data.draw(bodies(words, place.known), "body") if route.method != "GET" else None
    await place.throws(route, path, body)
    ears.nothing_broke()
