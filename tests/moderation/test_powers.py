"""Who has a moderator's powers, and when they end: suspended and locked moderators, tokens, services that act for people."""

from __future__ import annotations

from typing import Any

import pytest

from relay.moderation import key_list
from relay.moderation.moderator_secret import ModeratorSecret
from tests.appservices.service import Service
from tests.moderation.casehouse import SAFETY, Desk, casework, desk, notices_of
from tests.pages.visitors import Visitor
from tests.people import Person, ciphertext, path, until
from tests.town import Town

REASONS = {"ground": "terms:3", "facts": "Sent the same advertisement to many people."}
TOKEN = {"name": "tickets", "scopes": ["reports:read", "reports:decide"]}


async def second_admin(town: Town, mod: Desk, name: str = "second") -> Person:
    second = await town.user(f"{name}@one")
    await mod.house.command("user.admin", user=name, admin=True)
    return second


async def test_a_suspended_moderator_does_nothing_as_a_moderator(town: Town) -> None:
    mod = await desk(town)
    second, bob, alice = await second_admin(town, mod), await town.user("bob@one"), await town.user("alice@one")
    room = await alice.creates_room(with_=bob)
    token = (await second.calls("POST", f"{SAFETY}/tokens", TOKEN))["token"]
    town.clock.forward(hours=25)
    visit = Visitor(town, mod.house, second)
    await visit.signs_in()
    one = path("users", bob.id)
    admin, lock = "/_synapse/admin", path("admin", "lock", bob.id)
    asks: list[tuple[str, str, Any, str | None]] = [
        ("GET", f"{admin}/v1/{one}/admin", None, None), ("GET", f"{admin}/v2/{one}", None, None),
        ("PUT", f"{admin}/v1/{path('suspend', bob.id)}", {"suspend": False}, None), ("GET", f"{admin}/v1/rooms", None, None),
        ("GET", f"{admin}/v1/event_reports", None, None), ("DELETE", f"{admin}/v1/{one}/shadow_ban", None, None),
        ("GET", f"/_matrix/client/v1/{lock}", None, None), ("PUT", f"/_matrix/client/v1/{lock}", {"locked": False}, None),
        ("GET", f"/_matrix/client/v3/admin/whois/{path(bob.id)}", None, None),
        ("GET", f"{SAFETY}/reports", None, None), ("GET", f"{SAFETY}/reports", None, token), ("GET", f"{SAFETY}/keys", None, None),
        ("POST", f"{SAFETY}/acts", {"measure": "warn", "target": bob.id, "reason_code": "spam", **REASONS}, None),
    ]  # fmt: skip
    for method, where, body, by in asks:
        await second.calls(method, where, body, token=by)
    assert (await visit.gets("/_relay/desk"))[0] == 200
    waits = {"measure": "deactivate", "target": bob.id, "reason_code": "spam", **REASONS}
    asked = await second.calls("POST", f"{SAFETY}/acts", waits)
    work = casework(mod.house)

    await mod.house.command("user.suspend", user="second")
    for method, where, body, by in asks:
        refused = await second.is_refused(second.calls(method, where, body, token=by))
        assert refused.status == 403, f"{method} {where}: suspended, she has no rank"
    assert (await visit.gets("/_relay/desk"))[0] == 403, "nor is the desk hers"
    assert second.id not in await work.cases.moderators_for(None)

    # What she had asked for while she could goes with her rank; and she hears nothing of new reports.
    async def is_cancelled() -> bool:
        town.clock.forward(hours=1)
        return not (await mod.asks("GET", "acts"))["acts"]

    assert await until(is_cancelled)
    town.clock.forward(hours=25)
    await alice.calls("POST", f"rooms/{path(room)}/report/{path(await bob.sends(room))}", {"reason": ""})
    assert await mod.person.notices(lambda: any("has come" in one for one in notices_of(mod.person)))
    await second.syncs()
    assert not [one for one in notices_of(second) if "has come" in one]
    history = [(e["action"], e["actor"]) for e in (await mod.asks("GET", "audit"))["entries"]]
    assert ("cancelled.deactivate", "rule:asker-moderates-no-more") in history
    assert asked["waits"] and await bob.syncs(), "his account is open"

    await mod.house.command("user.suspend", user="second", suspended=False)
    for method, where, body, by in asks:
        await second.calls(method, where, body, token=by)
    assert (await visit.gets("/_relay/desk"))[0] in (200, 303), "as before, after the daily question for the password"


@pytest.mark.parametrize("why", ["password", "logout", "rank", "closed"])
async def test_a_token_ends_with_what_stood_behind_it(town: Town, why: str) -> None:
    mod = await desk(town)
    second = await second_admin(town, mod)
    token = (await second.calls("POST", f"{SAFETY}/tokens", TOKEN))["token"]
    other = (await mod.asks("POST", "tokens", TOKEN))["token"]
    visit = Visitor(town, mod.house, second)
    await visit.signs_in()
    town.clock.forward(hours=25)
    assert await second.calls("GET", f"{SAFETY}/reports", token=token)
    password = {
        "type": "m.login.password",
        "identifier": {"type": "m.id.user", "user": "second"},
        "password": second.password,
    }
    if why == "password":
        body = {"new_password": "a new password of hers", "logout_devices": False, "auth": password}
        await second.calls("POST", "account/password", body)
    elif why == "logout":
        await second.calls("POST", "logout/all", {})
    elif why == "rank":
        await mod.house.command("user.admin", user="second", admin=False)
        await mod.house.command("user.admin", user="second", admin=True)
    else:
        await second.calls("POST", "account/deactivate", {"auth": password})
    refused = await second.is_refused(second.calls("GET", f"{SAFETY}/reports", token=token))
    assert refused.errcode == "M_UNKNOWN_TOKEN", "it is gone, also where her rank came back"
    if why != "rank":
        assert (await visit.gets("/_relay/"))[0] == 303, "and so are the pages that she was signed in to"
    assert await mod.person.calls("GET", f"{SAFETY}/reports", token=other), "nobody else's"
    assert [
        one["reason_code"] for one in (await mod.asks("GET", "audit"))["entries"] if one["action"] == "token.taken_back"
    ]
    assert (await mod.house.command("moderation.verify"))["sound"]


async def test_no_service_acts_for_somebody_who_moderates(town: Town) -> None:
    bridge = Service(town.http, "bridge")
    await bridge.opens()
    try:
        folder = town.folder / "one"
        folder.mkdir(mode=0o700, exist_ok=True)
        greedy = {"users": [{"exclusive": False, "regex": "@.*"}], "aliases": [], "rooms": []}
        bridge.settles(await town.relay("one", bridge.registers_at(folder, namespaces=greedy)))
        mod = await desk(town)
        bob = await town.user("bob@one")
        for method, where, body in (
            ("GET", f"/_synapse/admin/v2/{path('users', bob.id)}", None),
            ("PUT", f"/_matrix/client/v1/{path('admin', 'lock', bob.id)}", {"locked": True}),
            ("GET", f"{SAFETY}/keys", None),
            ("GET", f"{SAFETY}/keys/{mod.secret.public.key_id}/unwrapped", None),
            ("POST", f"{SAFETY}/keys", {}),
        ):
            refused = await bridge.is_refused(bridge.acts(mod.person.id, method, where, body))
            assert refused.status == 403, f"{method} {where}"
        assert (await bridge.is_refused(bridge.acts(mod.person.id, "GET", f"{SAFETY}/reports"))).status == 401
        hers = await mod.person.creates_room()
        for method, where, body in (
            ("GET", "account/whoami", None),
            ("GET", "sync", None),
            ("GET", f"{path('rooms', hers)}/messages?dir=b", None),
            ("PUT", f"{path('rooms', hers)}/send/m.room.encrypted/1", ciphertext()),
            ("POST", "createRoom", {}),
            ("PUT", f"{path('profile', mod.person.id)}/displayname", {"displayname": "not her"}),
        ):
            refused = await bridge.is_refused(bridge.acts(mod.person.id, method, where, body))
            assert (refused.status, refused.errcode) == (403, "M_FORBIDDEN"), f"{method} {where}"
            assert "moderates here" in refused.text and "namespaces.users" in refused.text, "it says what to do"
        assert (await bridge.acts(bob.id, "GET", "account/whoami"))["user_id"] == bob.id, "for others as before"
        sign_in = {"type": "m.login.application_service", "identifier": {"type": "m.id.user", "user": "mod"}}
        assert (await bridge.is_refused(bridge.calls("POST", "login", sign_in))).errcode == "M_EXCLUSIVE"
        sign_in["identifier"] = {"type": "m.id.user", "user": "bob"}
        assert (await bridge.calls("POST", "login", sign_in))["user_id"] == bob.id, "others as the standard says"
        his, shared = await bob.creates_room(), await mod.person.creates_room(with_=bob)
        for room in (hers, his, shared):
            await (bob if room == his else mod.person).sends(room)

        async def is_told(*rooms: str) -> bool:
            return {event["room_id"] for event in bridge.told() if event["type"] == "m.room.encrypted"} >= set(rooms)

        assert await until(lambda: is_told(his, shared)) and not await is_told(hers), (
            "nor is it told of what is hers alone"
        )

        # Who becomes one, and who is one no more.
        assert (await bridge.acts(bob.id, "GET", "account/whoami"))["user_id"] == bob.id
        await mod.house.command("user.admin", user="bob", admin=True)
        assert (await bridge.is_refused(bridge.acts(bob.id, "GET", "account/whoami"))).status == 403
        await mod.house.command("user.admin", user="bob", admin=False)
        assert (await bridge.acts(bob.id, "GET", "account/whoami"))["user_id"] == bob.id
        found = [one["what"] for one in await mod.house.command("check") if one["severity"] == "warning"]
        assert any("bridge covers @mod:" in one for one in found) and not any("covers @bob" in one for one in found)

        # Its own user may be made an administrator by the operator, as Draupnir needs it.
        await mod.house.command("user.admin", user="bridgebot", admin=True)
        assert (await bridge.calls("GET", f"/_synapse/admin/v2/{path('users', bob.id)}"))["name"] == bob.id
        await mod.house.command("user.suspend", user="bridgebot")
        assert (await bridge.is_refused(bridge.calls("GET", "/_synapse/admin/v1/rooms"))).status == 403
    finally:
        await bridge.closes()


async def test_a_key_that_leaves_the_list_takes_her_tokens_along(town: Town) -> None:
    mod = await desk(town)
    bob, his = await town.user("bob@one"), ModeratorSecret.make()
    assert mod.house.server is not None
    keys = mod.house.server.moderation.proving.keys
    before = await keys.current()
    assert before is not None
    after = key_list.added(before, bob.id, "moderator", his.public, mod.secret, town.clock.now())
    await keys.take(after.statement, mod.person.id)
    town.clock.forward(hours=25)
    assert await keys.is_moderator(bob.id)
    token = (await bob.calls("POST", f"{SAFETY}/tokens", TOKEN))["token"]
    town.clock.forward(hours=25)
    assert await bob.calls("GET", f"{SAFETY}/reports", token=token)
    gone = key_list.removed(after, [his.public.key_id], mod.secret, town.clock.now())
    await keys.take(gone.statement, mod.person.id)
    refused = await bob.is_refused(bob.calls("GET", f"{SAFETY}/reports", token=token))
    assert refused.errcode == "M_UNKNOWN_TOKEN"
