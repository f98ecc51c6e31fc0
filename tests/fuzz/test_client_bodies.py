"""Every client endpoint, found by itself, against bodies and parameters of the wrong type: refused in the standard's form.

One example is one request; the endpoints of a folder share a relay. The words that fill the bodies come from the part's source.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.web import Route
from tests.fuzz.decent import Decent, decent_requests
from tests.fuzz.oddities import NO_BODIES, ROOT, TEXTS, bodies, bounded, values, words_of
from tests.fuzz.overheard import Ears
from tests.fuzz.place import Place

# The parts by folder; those that stand beside the folders are one more.
SLICES = sorted(
    {
        path.parent.name
        for path in (ROOT / "relay").rglob("*.py")
        if path.name != "web.py" and "Route(" in path.read_text(encoding="utf-8")
    }
)
PATH_TEXTS = tuple(text for text in TEXTS if len(text) < 1000)


def paths(data: st.DataObject, route: Route, place: Place, words: tuple[str, ...]) -> str:
    """The route's path, each parameter mostly one that exists, and a query of odd values under known names."""
    known = {
        "room": place.room,
        "user": place.thrower.id,
        "event": place.event,
        "device": place.thrower.device,
        "server": place.thrower.server,
    }
    segments = []
    for segment in route.path.split("/"):
        if not segment.startswith("{"):
            segments.append(segment)
            continue
        fits = next((value for word, value in known.items() if word in segment.lower()), None)
        value = data.draw(
            st.sampled_from([fits, fits, fits] if fits else ["x"])
            | st.sampled_from(PATH_TEXTS)
            | st.sampled_from(words)
        )
        segments.append(quote(value, safe=""))
    query = data.draw(
        st.dictionaries(st.sampled_from(words), st.sampled_from(PATH_TEXTS) | st.sampled_from(place.known), max_size=4)
    )
    # Nobody waits for long here.
    pairs = [f"{quote(key)}={quote(value)}" for key, value in query.items() if "timeout" not in key]
    return "/".join(segments) + ("?" + "&".join(pairs) if pairs else "")


async def test_what_is_no_object_is_refused_everywhere(place: Place, ears: Ears) -> None:
    assert len(place.routes) > 100, "the endpoints are found by themselves"
    for route in place.routes:
        path = "/".join(quote(place.room, safe="") if s.startswith("{") else s for s in route.path.split("/"))
        for body in NO_BODIES if route.method != "GET" else ():
            await place.throws(route, path, body)
        ears.nothing_broke()
    await place.quiet_noticed_nothing()


@pytest.mark.parametrize("slice_", SLICES)
@bounded(150)
@given(data=st.data())
async def test_no_odd_value_breaks_an_endpoint(place: Place, ears: Ears, slice_: str, data: st.DataObject) -> None:
    routes = place.routes_of(slice_)
    if not routes:
        pytest.skip("no client asks for anything here")
    route = data.draw(st.sampled_from(routes), "route")
    words = words_of(Path(route.function.__code__.co_filename))
    path = paths(data, route, place, words)
    body = data.draw(bodies(words, place.known), "body") if route.method != "GET" else None
    await place.throws(route, path, body)
    ears.nothing_broke()


AREAS = ("accounts", "rooms", "reading", "people", "keys", "ephemeral", "push", "media")


@pytest.mark.parametrize("area", AREAS)
async def test_decent_requests_are_answered(place: Place, area: str) -> None:
    """So that what is changed in them below comes as far as possible."""
    for one in decent_requests(place, area):
        answer = await place.throws_at(one.method, one.where(), one.raw())
        assert answer.status in (200, 401), f"{one}: {answer.status} {answer.body[:300]!r}"


@pytest.mark.parametrize("area", AREAS)
@bounded(200)
@given(data=st.data())
async def test_no_request_that_is_nearly_decent_breaks_an_endpoint(
    place: Place, ears: Ears, area: str, data: st.DataObject
) -> None:
    requests = decent_requests(place, area)
    one: Decent = requests[data.draw(st.integers(0, len(requests) - 1), "request")]
    odd = values(one.words(), place.known)
    for _ in range(data.draw(st.integers(1, 2), "changes")):
        kind = data.draw(
            st.sampled_from(("body", "body", "query", "path") if one.body is not None else ("query", "path"))
        )
        if kind == "body":
            one = one.with_body(lambda spot: data.draw(st.sampled_from(spot)), data.draw(odd, "value"))
        elif kind == "query":
            name = data.draw(st.sampled_from((*one.query, "limit", "from", "since", "ts")), "parameter")
            one = one.with_query(name, data.draw(st.sampled_from((*PATH_TEXTS, *place.known)), "value"))
        else:
            number = data.draw(st.integers(0, len(one.segments) - 1), "segment")
            one = one.with_segment(number, data.draw(st.sampled_from((*PATH_TEXTS, *place.known)), "value"))
    await place.throws_at(one.method, one.where(), one.raw())
    ears.nothing_broke()
