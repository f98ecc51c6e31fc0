"""Stories of what services are asked: for users and addresses that nobody knows yet, for other networks, whether they live."""

from __future__ import annotations

from pathlib import Path

import pytest

from relay.appservices.registration import load, load_all
from relay.config import ConfigError
from tests.appservices.conftest import Hires
from tests.appservices.service import Service
from tests.people import Person, path
from tests.town import Town

PING = "/_matrix/client/v1/appservice/{}/ping"


async def test_a_name_that_nobody_knows_is_asked_for(town: Town, hires: Hires) -> None:
    bridge = await hires()
    alice, bob = await town.users("alice@one", "bob@two")
    ghost, alias = bridge.ghost("new"), f"#_bridge_new:{bridge.server}"

    async def make_user() -> None:
        await bridge.makes("new")

    async def make_room() -> None:
        room = (await bridge.calls("POST", "createRoom", {"preset": "public_chat"}))["room_id"]
        await bridge.calls("PUT", path("directory", "room", alias), {"room_id": room})

    bridge.knows = {ghost: make_user, alias: make_room}
    room = await alice.creates_room()
    await alice.invites_to(room, ghost)
    assert (await alice.members(room))[ghost] == "invite", "the service made the user when it was asked"
    refused = await alice.is_refused(alice.invites_to(room, bridge.ghost("nobody")))
    assert refused.errcode == "M_NOT_FOUND"
    joined = await alice.joins(alias)
    assert joined == await bob.joins(alias), "people of other servers come by the same address"
    refused = await alice.is_refused(alice.joins(f"#_bridge_nowhere:{bridge.server}"))
    assert refused.errcode == "M_NOT_FOUND"
    count = len(bridge.asked)
    await alice.is_refused(alice.invites_to(room, f"@carol:{bridge.server}"))
    assert len(bridge.asked) == count, "names outside its namespaces are no question for it"


async def test_a_ping_says_whether_the_service_can_be_reached(town: Town, hires: Hires) -> None:
    bridge = await hires()
    where = PING.format(bridge.service)
    assert (await bridge.calls("POST", where, {"transaction_id": "meow"}))["duration_ms"] >= 0
    alice = await town.user("alice@one")
    assert (await alice.is_refused(alice.calls("POST", where, {}))).status == 403
    assert (await bridge.is_refused(bridge.calls("POST", PING.format("other"), {}))).status == 403
    bridge.refuses = 403
    refused = await bridge.is_refused(bridge.calls("POST", where, {}))
    assert (refused.status, refused.errcode, refused.body["status"]) == (502, "M_BAD_STATUS", 403)
    await bridge.closes()
    refused = await bridge.is_refused(bridge.calls("POST", where, {}))
    assert (refused.status, refused.errcode) == (502, "M_CONNECTION_FAILED")
    deaf = await hires("deaf", house="two", url=None)
    refused = await deaf.is_refused(deaf.calls("POST", PING.format("deaf"), {}))
    assert (refused.status, refused.errcode) == (400, "M_URL_NOT_SET")


async def test_clients_learn_of_other_networks(town: Town, hires: Hires) -> None:
    bridge = await hires(protocols=["irc"])
    alice = await town.user("alice@one")
    irc = {
        "user_fields": ["nick"],
        "location_fields": ["channel"],
        "icon": "",
        "field_types": {},
        "instances": [{"desc": "Net", "fields": {}, "network_id": "net"}],
    }
    place = {"alias": f"#_bridge_chat:{bridge.server}", "protocol": "irc", "fields": {"channel": "#chat"}}
    bridge.answers = {"/thirdparty/protocol/irc": irc, "/thirdparty/location/irc": [place], "/thirdparty/user": []}
    known = await alice.calls("GET", "thirdparty/protocols")
    assert known["irc"]["instances"] == [{**irc["instances"][0], "instance_id": "bridge|net"}]
    assert await alice.calls("GET", "thirdparty/protocol/irc") == known["irc"]
    assert await alice.calls("GET", "thirdparty/location/irc", channel="#chat") == [place]
    assert bridge.asked[-1] == "/thirdparty/location/irc?channel=#chat", "the fields are the network's own"
    assert await alice.calls("GET", "thirdparty/user", userid="@x:y") == []
    assert (await alice.is_refused(alice.calls("GET", "thirdparty/protocol/gitter"))).errcode == "M_NOT_FOUND"


async def test_a_network_has_a_list_of_rooms_of_its_own(town: Town, hires: Hires) -> None:
    bridge = await hires(protocols=["irc"])
    alice = await town.user("alice@one")
    listed = (await bridge.calls("POST", "createRoom", {"preset": "public_chat"}))["room_id"]
    public = (await bridge.calls("POST", "createRoom", {"preset": "public_chat", "visibility": "public"}))["room_id"]
    where = path("directory", "list", "appservice", "net", listed)
    refused = await alice.is_refused(alice.calls("PUT", where, {"visibility": "public"}))
    assert refused.errcode == "M_FORBIDDEN", "only services keep such lists"
    await bridge.calls("PUT", where, {"visibility": "public"})

    async def shown(**asked: object) -> set[str]:
        return {one["room_id"] for one in (await alice.calls("POST", "publicRooms", asked))["chunk"]}

    assert await shown() == {public}, "the server's own list is another one"
    assert await shown(third_party_instance_id="bridge|net") == {listed}
    assert await shown(include_all_networks=True) == {listed, public}
    assert await shown(third_party_instance_id="bridge|other") == set()
    await bridge.calls("PUT", where, {"visibility": "private"})
    assert await shown(third_party_instance_id="bridge|net") == set()


def _written(folder: Path, **changed: object) -> Path:
    import yaml

    service = Service.__new__(Service)
    Person.__init__(service, None, "", "", "bot", "")  # type: ignore[arg-type]
    service.service, service.token, service.hs_token, service._port = "bridge", "a", "h", 1
    given = {k: v for k, v in service.registration(**changed).items() if v is not ...}
    file = folder / f"{len(list(folder.iterdir()))}.yaml"
    file.write_text(yaml.safe_dump(given))
    return file


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"as_token": ...}, "as_token is missing"),
        ({"hs_token": "a"}, "the same"),
        ({"url": ...}, "url is missing"),
        ({"url": "ftp://x"}, "is not an address"),
        ({"sender_localpart": "Ä"}, "sender_localpart is missing"),
        ({"sender_localpart": "Bot"}, "is not a user name"),
        ({"namespaces": {"users": [{"regex": "@_(", "exclusive": True}]}}, "is none"),
        ({"namespaces": {"users": {"regex": "@x"}}}, "is a list"),
        ({"namespaces": {"rooms": [{"exclusive": True}]}}, "has a regex"),
        ({"rate_limited": "no"}, "true or false"),
    ],
)
def test_a_wrong_registration_says_what_to_do(tmp_path: Path, changed: dict[str, object], says: str) -> None:
    file = _written(tmp_path, **changed)
    with pytest.raises(ConfigError) as wrong:
        load(file)
    assert says in str(wrong.value) and str(file) in str(wrong.value)


def test_two_registrations_must_be_told_apart(tmp_path: Path) -> None:
    one, two = _written(tmp_path), _written(tmp_path, id="other", sender_localpart="other")
    with pytest.raises(ConfigError, match="as_token"):
        load_all(tmp_path, [one.name, two.name])
    with pytest.raises(ConfigError, match="can't be read"):
        load_all(tmp_path, ["missing.yaml"])


async def test_the_check_looks_at_registrations(town: Town, hires: Hires) -> None:
    bridge = await hires(apart=True)
    house = town.houses["one"]
    status, said = await house.command("check")
    assert "does not answer" not in said
    await bridge.closes()
    _, later = await house.command("check")
    assert "The application service bridge does not answer" in later and "waits for it" in later
    assert "The registration of the application service bridge is good." in said
    assert "bridges and bots have to encrypt" in said, "the seal's consequence is told"
    (house.folder / "bridge.yaml").write_text("id: bridge\n")
    status, said = await house.command("check")
    assert status == 1 and "as_token is missing" in said
    await house.stop()
    with pytest.raises(AssertionError, match="as_token is missing"):
        await house.start()
