"""Stories of services that act for their users: accounts without passwords, names that are theirs, times that they give."""

from __future__ import annotations

from tests.appservices.conftest import Hires
from tests.people import path
from tests.town import Town

SERVICE = "m.login.application_service"


async def test_a_service_acts_for_the_users_of_its_namespace(town: Town, hires: Hires) -> None:
    bridge = await hires()
    assert (await bridge.calls("GET", "account/whoami"))["user_id"] == bridge.id, "its own user is there from the start"
    ghost = await bridge.makes("tom")
    assert ghost == bridge.ghost("tom"), "names with an underscore are for services"
    assert (await bridge.acts(ghost, "GET", "account/whoami")) == {"user_id": ghost, "is_guest": False}
    taken = await bridge.is_refused(bridge.makes("tom"))
    assert taken.errcode == "M_USER_IN_USE"
    unknown = await bridge.is_refused(bridge.acts(bridge.ghost("nobody"), "GET", "account/whoami"))
    assert (unknown.status, unknown.errcode) == (403, "M_FORBIDDEN"), "an account is registered first"
    alice = await town.user("alice@one")
    stranger = await bridge.is_refused(bridge.acts(alice.id, "GET", "account/whoami"))
    assert (stranger.status, stranger.errcode) == (403, "M_FORBIDDEN"), "nobody else can be acted for"
    loud = {"type": SERVICE, "username": "_bridge_Tom", "inhibit_login": True}
    assert (await bridge.is_refused(bridge.calls("POST", "register", loud))).errcode == "M_INVALID_USERNAME"
    outside = {"type": SERVICE, "username": "carol", "inhibit_login": True}
    assert (await bridge.is_refused(bridge.calls("POST", "register", outside))).errcode == "M_EXCLUSIVE"

    room = await alice.creates_room()
    await alice.invites_to(room, ghost)
    await bridge.acts(ghost, "POST", path("join", room), {})
    await bridge.acts(ghost, "PUT", path("profile", ghost, "displayname"), {"displayname": "Tom"})
    sent = await bridge.acts(
        ghost, "PUT", path("rooms", room, "send", "m.room.encrypted", "t1"), CIPHERTEXT, ts=1_600_000_000_000
    )
    seen = await alice.sees(sent["event_id"])
    assert seen is not None and seen["sender"] == ghost
    assert seen["origin_server_ts"] == 1_600_000_000_000, "the service knows when it was said"
    again = await bridge.acts(ghost, "PUT", path("rooms", room, "send", "m.room.encrypted", "t1"), CIPHERTEXT)
    assert again == sent, "a transaction ID holds for a user without a device too"
    hers = await alice.calls("PUT", path("rooms", room, "send", "m.room.encrypted", "t2"), CIPHERTEXT, ts=1)
    assert (await alice.event(room, hers["event_id"]))["origin_server_ts"] > 1_600_000_000_000, (
        "people have no such say"
    )
    state = path("rooms", room, "state", "m.room.member", ghost)
    left = await bridge.acts(ghost, "PUT", state, {"membership": "leave"}, ts=1_600_000_001_000)
    assert (await alice.sees(left["event_id"]) or {})["origin_server_ts"] == 1_600_000_001_000


CIPHERTEXT = {
    "algorithm": "m.megolm.v1.aes-sha2",
    "ciphertext": "AwgA",
    "session_id": "c2Vzc2lvbg",
    "device_id": "D",
    "sender_key": "a2V5",
}


async def test_names_of_a_service_are_not_for_others(town: Town, hires: Hires) -> None:
    bridge = await hires()
    alice = await town.user("alice@one")
    for name in ("=", bridge.name):
        body = {"username": name, "password": "correct horse battery", "auth": {"type": "m.login.dummy"}}
        if name == bridge.name:
            refused = await alice.is_refused(alice.calls("POST", "register", body, token=""))
            assert refused.errcode == "M_EXCLUSIVE", "the service's own name is its own"
    room = await alice.creates_room()
    alias = f"#_bridge_place:{alice.server}"
    refused = await alice.is_refused(alice.calls("PUT", path("directory", "room", alias), {"room_id": room}))
    assert refused.errcode == "M_EXCLUSIVE"
    mine = await bridge.calls("POST", "createRoom", {})
    await bridge.calls("PUT", path("directory", "room", alias), {"room_id": mine["room_id"]})
    found = await alice.calls("GET", path("directory", "room", alias))
    assert found["room_id"] == mine["room_id"]
    other = f"#other:{alice.server}"
    outside = await bridge.is_refused(
        bridge.calls("PUT", path("directory", "room", other), {"room_id": mine["room_id"]})
    )
    assert outside.errcode == "M_EXCLUSIVE", "a service makes addresses of its own kind only"
    another = f"#_bridge_elsewhere:{alice.server}"
    await bridge.calls("PUT", path("directory", "room", another), {"room_id": room})
    found = await alice.calls("GET", path("directory", "room", another))
    assert found["room_id"] == room, "an address of its own leads to whatever room of this server it likes"
    unknown = bridge.calls(
        "PUT", path("directory", "room", f"#_bridge_x:{alice.server}"), {"room_id": "!none:x.example"}
    )
    assert (await bridge.is_refused(unknown)).status == 404, "but to one that is here"
    outside = await bridge.is_refused(bridge.calls("POST", "createRoom", {"room_alias_name": "other"}))
    assert outside.errcode == "M_EXCLUSIVE"
    await bridge.calls("POST", "createRoom", {"room_alias_name": "_bridge_another"})


async def test_a_service_signs_in_as_its_users_without_a_password(town: Town, hires: Hires) -> None:
    bridge = await hires()
    ghost = await bridge.makes("tom")
    flows = await bridge.calls("GET", "login", token="")
    assert {"type": SERVICE} in flows["flows"]
    body = {"type": SERVICE, "identifier": {"type": "m.id.user", "user": ghost}, "device_id": "PHONE"}
    answer = await bridge.calls("POST", "login", body)
    assert (answer["user_id"], answer["device_id"]) == (ghost, "PHONE")
    assert (await bridge.calls("GET", "account/whoami", token=answer["access_token"]))["device_id"] == "PHONE"
    alice = await town.user("alice@one")
    for token, wanted in (("", "M_MISSING_TOKEN"), ("wrong", "M_UNKNOWN_TOKEN"), (alice.token, "M_UNKNOWN_TOKEN")):
        refused = await bridge.is_refused(bridge.calls("POST", "login", body, token=token))
        assert (refused.status, refused.errcode) == (401, wanted), "only the service's own token opens this door"
        refused = await bridge.is_refused(
            bridge.calls("POST", "register", {"type": SERVICE, "username": "_bridge_x"}, token=token)
        )
        assert (refused.status, refused.errcode) == (401, wanted)
    body["identifier"] = {"type": "m.id.user", "user": alice.name}
    refused = await bridge.is_refused(bridge.calls("POST", "login", body))
    assert refused.errcode == "M_EXCLUSIVE", "nobody else can be signed in as"


async def test_a_service_makes_and_removes_devices(town: Town, hires: Hires) -> None:
    bridge = await hires()
    ghost = await bridge.makes("tom")
    where = path("devices", "BRIDGE")
    unknown = await bridge.is_refused(bridge.acts(ghost, "GET", "account/whoami", device_id="BRIDGE"))
    assert (unknown.status, unknown.errcode) == (400, "M_UNKNOWN_DEVICE")
    answer, _ = await bridge.asks("PUT", where, {"display_name": "A bridge"}, user_id=ghost)
    assert answer.status == 201, "it is made"
    answer, _ = await bridge.asks("PUT", where, {"display_name": "The bridge"}, user_id=ghost)
    assert answer.status == 200, "it is renamed"
    for name in ("device_id", "org.matrix.msc3202.device_id"):
        me = await bridge.acts(ghost, "GET", "account/whoami", **{name: "BRIDGE"})
        assert me["device_id"] == "BRIDGE"
    keys = {"one_time_keys": {"signed_curve25519:A": {"key": "x"}}}
    refused = await bridge.is_refused(bridge.acts(ghost, "POST", "keys/upload", keys))
    assert refused.errcode == "M_MISSING_PARAM", "keys belong to a device"
    counts = await bridge.acts(ghost, "POST", "keys/upload", keys, device_id="BRIDGE")
    assert counts["one_time_key_counts"]["signed_curve25519"] == 1
    await bridge.acts(ghost, "DELETE", where, {})
    assert (await bridge.acts(ghost, "GET", "devices"))["devices"] == [], "it goes without a password"
    refused = await bridge.is_refused(
        bridge.acts(ghost, "POST", "account/password", {"new_password": "long enough to be one"})
    )
    assert refused.errcode == "M_FORBIDDEN", "its users have no passwords, and get none"


async def test_limits_do_not_hold_for_a_service_that_is_spared_them(town: Town, hires: Hires) -> None:
    tight = "limits: {messages: {per_second: 0.01, burst: 2}, registration: {per_second: 0.01, burst: 1}}\n"
    bridge = await hires(settings=tight, rate_limited=False)
    ghosts = [await bridge.makes(name) for name in ("a", "b", "c")]
    room = (await bridge.calls("POST", "createRoom", {"preset": "public_chat"}))["room_id"]
    await bridge.acts(ghosts[0], "POST", path("join", room), {})
    for number in range(5):
        await bridge.acts(ghosts[0], "PUT", path("rooms", room, "send", "m.room.encrypted", f"n{number}"), CIPHERTEXT)
    other = await hires("slow", house="two", settings=tight)
    ghost = await other.makes("a")
    room = (await other.calls("POST", "createRoom", {"preset": "public_chat"}))["room_id"]
    await other.acts(ghost, "POST", path("join", room), {})
    for number in range(2):
        await other.acts(ghost, "PUT", path("rooms", room, "send", "m.room.encrypted", f"n{number}"), CIPHERTEXT)
    refused = await other.is_refused(
        other.acts(ghost, "PUT", path("rooms", room, "send", "m.room.encrypted", "n3"), CIPHERTEXT)
    )
    assert refused.errcode == "M_LIMIT_EXCEEDED", "unless its registration says so, they hold for its users"
    for number in range(5):
        await other.calls("PUT", path("rooms", room, "send", "m.room.encrypted", f"b{number}"), CIPHERTEXT)
