"""What another server answers when the relay asks: as little to be trusted as what it sends by itself."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.protocol.versions import VERSIONS
from tests.fuzz.answers import ask, require_proper
from tests.fuzz.oddities import NO_BODIES, ROOT, as_json, bounded, values, words_of
from tests.fuzz.scene import Scene
from tests.fuzz.stranger import ENCRYPTED, FEDERATION, resigned
from tests.people import CLIENT, ciphertext, path

WORDS = tuple(
    sorted(
        {
            word
            for name in ("client", "keyring", "server_keys", "media", "queries", "joins")
            for word in words_of(ROOT / f"federation/{name}.py")
        }
    )
)
ODD = st.one_of(
    st.sampled_from(NO_BODIES),
    st.dictionaries(st.sampled_from(WORDS), values(WORDS, ("localhost:1",)), max_size=6).map(as_json),
    values(WORDS).map(as_json),
)


async def _asks(scene: Scene, method: str, where: str, body: Any = None) -> None:
    raw = None if body is None else orjson.dumps(body)
    answer = await ask(
        scene.town.http, method, f"{scene.house.url}{where}", raw, Authorization=f"Bearer {scene.alice.token}"
    )
    require_proper(answer, f"{method} {where}")
    scene.ears.nothing_broke()


@bounded(200)
@given(data=st.data())
async def test_no_odd_answer_reaches_a_client_as_an_error_of_ours(scene: Scene, data: st.DataObject) -> None:
    stranger = scene.stranger
    questions = {
        f"{FEDERATION}/query/profile": ("GET", f"{CLIENT}/profile/{path(stranger.user)}", None),
        f"{FEDERATION}/query/directory": ("GET", f"{CLIENT}/directory/room/{path(f'#x:{stranger.name}')}", None),
        f"{FEDERATION}/publicRooms": ("GET", f"{CLIENT}/publicRooms?server={stranger.name}", None),
        f"{FEDERATION}/user": ("POST", f"{CLIENT}/keys/query", {"device_keys": {stranger.user: []}}),
        f"{FEDERATION}/user/keys/claim": (
            "POST",
            f"{CLIENT}/keys/claim",
            {"one_time_keys": {stranger.user: {"D": "signed_curve25519"}}},
        ),
        f"{FEDERATION}/make_join": (
            "POST",
            f"{CLIENT}/join/{path('!nowhere:' + stranger.name)}?via={stranger.name}",
            {},
        ),
        f"{FEDERATION}/make_knock": (
            "POST",
            f"{CLIENT}/knock/{path('!nowhere:' + stranger.name)}?via={stranger.name}",
            {},
        ),
        f"{FEDERATION}/media": (
            "GET",
            f"/_matrix/client/v1/media/download/{stranger.name}/abc{data.draw(st.integers(0, 9**9))}",
            None,
        ),
    }
    asked = data.draw(st.sampled_from(sorted(questions)), "asked")
    stranger.holds = {asked: data.draw(ODD, "answer")}
    stranger.asked.clear()
    await _asks(scene, *questions[asked])
    assert any(where.startswith(asked) for where in stranger.asked), (
        "the relay asks anew, however bad the answer before was"
    )


@bounded(120)
@given(data=st.data())
async def test_no_template_makes_us_sign_what_is_not_ours(scene: Scene, data: st.DataObject) -> None:
    """A mutated make_join answer: whatever comes back in send_join is a join of alice's, or nothing."""
    stranger, room_id = scene.stranger, f"!far:{scene.stranger.name}"
    template: dict[str, Any] = {
        "type": "m.room.member", "room_id": room_id, "sender": scene.alice.id, "state_key": scene.alice.id, "content": {"membership": "join"},
        "prev_events": ["$" + "a" * 43], "auth_events": ["$" + "b" * 43], "depth": 7, "origin_server_ts": 1,
    }  # fmt: skip
    odd = values(WORDS, scene.known)
    for _ in range(data.draw(st.integers(0, 2), "changes")):
        template[data.draw(st.sampled_from((*template, "hashes", "signatures", "unsigned", "x")), "key")] = data.draw(
            odd, "value"
        )
    version = data.draw(st.sampled_from((*VERSIONS, "99", 12, None)), "version")
    stranger.holds = {f"{FEDERATION}/make_join": as_json({"room_version": version, "event": template})}
    stranger.holds["/_matrix/federation/v2/send_join"] = data.draw(ODD, "send_join")
    await _asks(scene, "POST", f"{CLIENT}/join/{path(room_id)}?via={stranger.name}", {})
    assert room_id not in (await scene.alice.calls("GET", "joined_rooms"))["joined_rooms"], (
        "nobody joins a room that can't be shown"
    )


@bounded(80)
@given(data=st.data())
async def test_no_answer_about_what_is_missing_breaks_the_room(scene: Scene, data: st.DataObject) -> None:
    """An event that builds on something unknown: the relay asks, and gets nonsense. The next good event is taken all the same."""
    stranger = scene.stranger
    orphan = scene.room.event(content=ciphertext(), prev_events=["$" + "c" * 43])
    odd = values((*WORDS, "pdu_ids", "auth_chain_ids", "pdus", "auth_chain", "events"), scene.known)
    real = scene.room.event(content=ENCRYPTED, prev_events=["$" + "d" * 43]).pdu
    pdus = st.lists(st.one_of(odd, st.just(real), st.just(resigned({**real, "depth": 0}, stranger))), max_size=4)
    missing = data.draw(st.one_of(ODD, pdus.map(lambda found: as_json({"events": found}))), "missing")
    ids = st.lists(st.one_of(st.sampled_from(scene.known), odd), max_size=4)
    state_ids = data.draw(
        st.one_of(ODD, ids.map(lambda found: as_json({"pdu_ids": found, "auth_chain_ids": found}))), "state_ids"
    )
    stranger.holds = {
        f"{FEDERATION}/get_missing_events": missing, f"{FEDERATION}/state_ids": state_ids, f"{FEDERATION}/state": data.draw(ODD),
        f"{FEDERATION}/event_auth": data.draw(ODD), f"{FEDERATION}/event": data.draw(st.one_of(ODD, pdus.map(lambda f: as_json({"pdus": f})))),
        f"{FEDERATION}/backfill": data.draw(ODD),
    }  # fmt: skip
    await scene.sends_with_a_good_one([orphan.pdu])


@pytest.mark.parametrize("spoiled", ["nothing", "signature", "name", "expired", "keys", "no JSON"])
async def test_a_server_with_bad_keys_is_not_believed(scene: Scene, spoiled: str) -> None:
    other = await type(scene.stranger)(scene.town).opens()
    good = other.key_answer()
    other.key_answer = {  # type: ignore[method-assign]
        "nothing": lambda: good,
        "signature": lambda: {**good, "signatures": {other.name: {other.key.key_id: "A" * 86}}},
        "name": lambda: {**good, "server_name": scene.stranger.name},
        "expired": lambda: {**good, "valid_until_ts": 1},
        "keys": lambda: {**good, "verify_keys": {other.key.key_id: {"key": 7}}},
        "no JSON": lambda: "text",
    }[spoiled]
    try:
        answer = await other.asks(scene.house, "GET", f"{FEDERATION}/query/profile?user_id={path(scene.alice.id)}")
        require_proper(answer, spoiled)
        assert (answer.status == 401) is (spoiled != "nothing"), (
            f"a server whose key answer has a bad {spoiled}: {answer.status}"
        )
    finally:
        await other.leaves_town()
    scene.ears.nothing_broke()


@bounded(60)
@given(data=st.data())
async def test_no_key_answer_breaks_the_keyring(scene: Scene, data: st.DataObject) -> None:
    other = await type(scene.stranger)(scene.town).opens()
    good = other.key_answer()
    try:
        odd = data.draw(
            st.dictionaries(
                st.sampled_from((*good, "ed25519:a")), values(WORDS, (other.name, other.key.key_id)), max_size=3
            )
        )
        other.key_answer = lambda: orjson.loads(as_json({**good, **odd}))  # type: ignore[method-assign]
        require_proper(
            await other.asks(scene.house, "GET", f"{FEDERATION}/query/profile?user_id={path(scene.alice.id)}"), str(odd)
        )
    finally:
        await other.leaves_town()
    scene.ears.nothing_broke()
