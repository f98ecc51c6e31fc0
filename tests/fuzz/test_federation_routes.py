"""Every federation endpoint, found by itself, asked by a stranger's server with properly signed nonsense."""

from __future__ import annotations

import copy
from typing import Any
from urllib.parse import quote

import orjson
from hypothesis import given
from hypothesis import strategies as st

from relay.protocol import event as events
from relay.protocol.versions import VERSIONS
from relay.web import Route
from tests.fuzz.answers import require_proper
from tests.fuzz.oddities import NO_BODIES, NUMBERS, ROOT, TEXTS, as_json, bodies, bounded, values, words_of
from tests.fuzz.scene import Scene, refusal
from tests.fuzz.stranger import FEDERATION, resigned
from tests.people import path

PATH_TEXTS = tuple(text for text in TEXTS if len(text) < 1000)
WORDS = tuple(
    sorted(
        {
            word
            for name in ("answers", "invites", "joins", "queries", "notary", "inbound")
            for word in words_of(ROOT / f"federation/{name}.py")
        }
    )
)


def routes_of(scene: Scene) -> list[Route]:
    assert scene.house.server is not None
    return list(scene.house.server.web.routers["federation"].routes)


def fits(scene: Scene, parameter: str) -> str | None:
    known = {
        "room": scene.room_id,
        "user": scene.stranger.user,
        "event": scene.room.last.id,
        "server": scene.house.name,
        "key": "ed25519:a",
    }
    return next((value for word, value in known.items() if word in parameter.lower()), None)


async def test_what_is_no_object_is_refused_by_every_endpoint(scene: Scene) -> None:
    for route in routes_of(scene):
        if route.method == "GET":
            continue
        where = "/".join(
            quote(fits(scene, s[1:]) or "x", safe="") if s.startswith("{") else s for s in route.path.split("/")
        )
        for body in NO_BODIES:
            answer = await scene.stranger.asks(scene.house, route.method, where, body)
            require_proper(answer, f"{route.method} {where} {body[:60]!r}")
        scene.ears.nothing_broke()
    await scene.nothing_is_lost()


@bounded(250)
@given(data=st.data())
async def test_no_odd_request_breaks_an_endpoint(scene: Scene, data: st.DataObject) -> None:
    route = data.draw(st.sampled_from(routes_of(scene)), "route")
    segments = []
    for segment in route.path.split("/"):
        fit = fits(scene, segment[1:]) if segment.startswith("{") else None
        odd = st.sampled_from((*PATH_TEXTS, *scene.known))
        value = (
            segment
            if not segment.startswith("{")
            else data.draw(st.one_of(*[st.just(fit)] * 3, odd) if fit else odd, segment)
        )
        segments.append(quote(value, safe=""))
    odd_query = st.dictionaries(st.sampled_from(("ver", "v", "limit", "event_id", "field", "user_id", "room_alias", "since", *WORDS)),
                                st.sampled_from((*PATH_TEXTS, *scene.known, *VERSIONS)), max_size=4)  # fmt: skip
    pairs = [
        f"{quote(name)}={quote(value)}"
        for name, value in data.draw(odd_query, "query").items()
        if "timeout" not in name
    ]
    where = "/".join(segments) + ("?" + "&".join(pairs) if pairs else "")
    body = data.draw(bodies(WORDS, scene.known), "body") if route.method != "GET" else None
    answer = await scene.stranger.asks(scene.house, route.method, where, body)
    require_proper(answer, f"{route.method} {where} {body!r}")
    scene.ears.nothing_broke()


@bounded(150)
@given(data=st.data())
async def test_no_mutated_join_leave_or_knock_breaks_anything(scene: Scene, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(("join", "leave", "knock")), "kind")
    user = f"@someone{data.draw(st.integers(0, 3))}:{scene.stranger.name}"
    event = scene.room.event("m.room.member", {"membership": kind}, state_key=user, sender=user)
    pdu: dict[str, Any] = copy.deepcopy(event.pdu)
    odd = values(WORDS, scene.known)
    for _ in range(data.draw(st.integers(0, 2), "changes")):
        where = data.draw(
            st.sampled_from((pdu, pdu["content"])) if isinstance(pdu.get("content"), dict) else st.just(pdu)
        )
        name = data.draw(
            st.sampled_from(
                (*where, "join_authorised_via_users_server", "third_party_invite", "membership", "redacts")
            ),
            "key",
        )
        where[name] = _read(data.draw(odd, "value"))
    if data.draw(st.booleans(), "signed anew"):
        pdu = resigned(pdu, scene.stranger)
    try:
        event_id = events.parse(pdu, scene.room.version).id
    except Exception:
        event_id = event.id
    version = {"join": "v2", "leave": "v2", "knock": "v1"}[kind]
    target = f"/_matrix/federation/{version}/{path(f'send_{kind}', scene.room_id, event_id)}"
    require_proper(await scene.stranger.asks(scene.house, "PUT", target, as_json(pdu)), f"send_{kind} {pdu}")
    scene.ears.nothing_broke()


@bounded(150)
@given(data=st.data())
async def test_no_mutated_invite_breaks_anything(scene: Scene, data: st.DataObject) -> None:
    room_id = f"!stranger{data.draw(st.integers(0, 3))}:{scene.stranger.name}"
    version = VERSIONS[data.draw(st.sampled_from(("3", "10", "11", "12")), "version")]
    event = events.build(
        version, room_id=room_id, type="m.room.member", sender=scene.stranger.user, state_key=scene.bob.id, content={"membership": "invite"},
        prev_events=["$" + "a" * 43], auth_events=["$" + "b" * 43], depth=5, origin_server_ts=1, server_name=scene.stranger.name,
        key=scene.stranger.key,
    )  # fmt: skip
    stripped = {
        "type": "m.room.encryption",
        "state_key": "",
        "sender": scene.stranger.user,
        "content": {"algorithm": "m.megolm.v1.aes-sha2"},
    }
    body: dict[str, Any] = {
        "room_version": version.name,
        "event": copy.deepcopy(event.pdu),
        "invite_room_state": [stripped],
    }
    odd = values(WORDS, scene.known)
    for _ in range(data.draw(st.integers(0, 2), "changes")):
        where = (
            data.draw(st.sampled_from((body, body["event"], body["invite_room_state"][0])), "where")
            if _whole(body)
            else body
        )
        where[data.draw(st.sampled_from((*where, "third_party_invite")), "key")] = _read(data.draw(odd, "value"))
    target = f"/_matrix/federation/v2/{path('invite', room_id, event.id)}"
    require_proper(await scene.stranger.asks(scene.house, "PUT", target, as_json(body)), f"invite {body}")
    scene.ears.nothing_broke()
    assert (await scene.bob.syncs(timeout=0))["next_batch"], "what was let in can be told to the one it is for"
    scene.ears.nothing_broke()


def _whole(body: dict[str, Any]) -> bool:
    told = body.get("invite_room_state")
    return isinstance(body.get("event"), dict) and isinstance(told, list) and bool(told) and isinstance(told[0], dict)


def _read(value: Any) -> Any:
    return orjson.loads(as_json(value))


async def test_a_room_version_that_nobody_knows_is_refused_by_its_name(scene: Scene) -> None:
    where = f"{FEDERATION}/{path('make_join', scene.room_id, scene.stranger.user)}"
    for query in ("", "?ver=1", "?ver=99&ver=org.example", "?ver="):
        answer = await scene.stranger.asks(scene.house, "GET", where + query)
        assert refusal(answer, f"make_join{query}") == "M_INCOMPATIBLE_ROOM_VERSION", (
            "a server that does not know the room's version can't join"
        )
        assert answer.json["room_version"] == scene.room.version.name, "and is told which one it is"
    event = scene.room.event("m.room.member", {"membership": "invite"}, state_key=scene.bob.id)
    for version in ("1", "2", "99", "", "x" * 1000):
        body = {"room_version": version, "event": event.pdu, "invite_room_state": []}
        answer = await scene.stranger.asks(
            scene.house, "PUT", f"/_matrix/federation/v2/{path('invite', scene.room_id, event.id)}", body
        )
        assert refusal(answer, f"an invite to version {version:.10}") == "M_INCOMPATIBLE_ROOM_VERSION"
    for number in NUMBERS:
        body = {"room_version": number, "event": event.pdu, "invite_room_state": []}
        answer = await scene.stranger.asks(
            scene.house, "PUT", f"/_matrix/federation/v2/{path('invite', scene.room_id, event.id)}", as_json(body)
        )
        refusal(answer, f"an invite to version {number}")
    created = await scene.alice.is_refused(scene.alice.creates_room(room_version="99"))
    assert created.errcode == "M_UNSUPPORTED_ROOM_VERSION", "a client that asks for one is told so too"
    scene.ears.nothing_broke()


HEADER_TEXTS = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=80)


@bounded(150)
@given(data=st.data())
async def test_no_header_lets_a_stranger_in(scene: Scene, data: st.DataObject) -> None:
    name = scene.stranger.name
    parts = st.sampled_from(
        ("X-Matrix", "x-matrix", "Bearer", "origin", "destination", "key", "sig", "=", ",", '"', "\\", " ", f'"{name}"', f'"{scene.house.name}"',
         "ed25519:stranger", "ed25519:", "A" * 86, "origin=", f"origin={name}", "sig=AAAA", 'key="ed25519:stranger"', "," * 3000)
    )  # fmt: skip
    header = data.draw(
        st.one_of(
            HEADER_TEXTS, st.lists(parts, max_size=14).map("".join), HEADER_TEXTS.map(lambda text: "X-Matrix " + text)
        )
    )
    answer = await scene.stranger.asks(
        scene.house, "GET", f"{FEDERATION}/event/{quote(scene.room.last.id)}", header=header.strip() or "X-Matrix"
    )
    assert refusal(answer, header) == "M_UNAUTHORIZED" and answer.status == 401, f"{header!r} proves nothing"
    scene.ears.nothing_broke()


async def test_nobody_speaks_for_another_server(scene: Scene) -> None:
    where, house = f"{FEDERATION}/event/{quote(scene.room.last.id)}", scene.house
    assert (await scene.stranger.asks(house, "GET", where)).status == 200, "as itself it may ask"
    for origin in (house.name, "localhost:1", "elsewhere.example:1", "LOCALHOST", "", "a b", "[::1", "x" * 300):
        answer = await scene.stranger.asks(house, "GET", where, origin=origin)
        assert answer.status == 401 and refusal(answer, origin) == "M_UNAUTHORIZED", f"the stranger is not {origin!r}"
    scene.ears.nothing_broke()
