"""Stories of waking phones: a small push gateway on loopback, and what it is told, how often, and what it never learns."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web

from federation.addresses import AddressRule, SystemLookups
from federation.outward import Outward, Posting, tls_context
from relay.errors import RemoteError
from tests.people import Person, path, until
from tests.town import PASSWORD, Town

NOTIFY = "/_matrix/push/v1/notify"


class Gateway:
    """Takes everything down. `down` makes it fail; `rejects` are pushkeys that it does not know any more."""

    def __init__(self) -> None:
        self.heard: list[dict[str, Any]] = []
        self.down = False
        self.asked = 0
        self.rejects: list[str] = []
        self.url = ""

    async def open(self) -> None:
        app = web.Application()
        app.router.add_post(NOTIFY, self._notify)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}{NOTIFY}"

    async def close(self) -> None:
        await self._runner.cleanup()

    async def _notify(self, request: web.Request) -> web.Response:
        self.asked += 1
        if self.down:
            return web.Response(status=502)
        self.heard.append((await request.json())["notification"])
        return web.json_response({"rejected": self.rejects})

    def events(self, pushkey: str = "key") -> list[str]:
        """The events that this device was told of, in order."""
        return [one["event_id"] for one in self.heard if "event_id" in one and one["devices"][0]["pushkey"] == pushkey]

    async def hears_of(self, *events: str, pushkey: str = "key") -> bool:
        return await until(lambda: self.events(pushkey) == list(events))

    async def shows(self, number: int) -> bool:
        """Whether the number on the app's icon becomes this."""
        return await until(lambda: bool(self.heard) and self.heard[-1].get("counts") == {"unread": number})


@pytest.fixture
async def gateway() -> AsyncIterator[Gateway]:
    gateway = Gateway()
    await gateway.open()
    try:
        yield gateway
    finally:
        await gateway.close()


async def wants_pushes(person: Person, gateway: Gateway | str, pushkey: str = "key", **more: Any) -> None:
    url = gateway if isinstance(gateway, str) else gateway.url
    pusher = {
        "kind": "http",
        "app_id": "org.example.app",
        "pushkey": pushkey,
        "app_display_name": "App",
        "device_display_name": "Phone",
        "lang": "en",
        "data": {"url": url, "format": "event_id_only", "brand": "blue"},
        **more,
    }
    assert await person.calls("POST", "pushers/set", pusher) == {}


async def pushkeys(person: Person) -> list[str]:
    return [one["pushkey"] for one in (await person.calls("GET", "pushers"))["pushers"]]


async def test_a_phone_is_woken_and_told_nothing_but_an_id(town: Town, gateway: Gateway) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob, name="Our secret club")
    await wants_pushes(bob, gateway)
    sent = await alice.sends(room)
    assert await gateway.hears_of(sent), "the gateway is told of the message"
    [told] = gateway.heard
    assert set(told) == {"event_id", "room_id", "prio", "counts", "devices"}, "nothing else leaves the house"
    assert (told["prio"], told["counts"], told["room_id"]) == ("high", {"unread": 1}, room)
    [device] = told["devices"]
    assert device["data"] == {"format": "event_id_only", "brand": "blue"}, (
        "what the app gave for its gateway, without the URL"
    )
    assert device["tweaks"] == {"sound": "default"}, "two people talk: the rules say with a sound"
    await bob.sends(room)
    await alice.is_typing(room)
    later = await alice.sends(room)
    assert await gateway.hears_of(sent, later), "her own messages wake nobody"
    await bob.calls("PUT", path("pushrules", "global", "room", room), {"actions": []})
    await alice.sends(room)
    assert await bob.sees(await alice.sends(room)) and gateway.events() == [sent, later], "a muted room is quiet"


async def test_the_icon_shows_what_waits_until_it_is_read(town: Town, gateway: Gateway) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob)
    await wants_pushes(bob, gateway)
    await wants_pushes(bob, gateway, "counts itself", **{"org.matrix.msc4076.disable_badge_count": True})
    sent = [await alice.sends(room) for _ in range(3)]
    assert await gateway.hears_of(*sent) and await gateway.hears_of(*sent, pushkey="counts itself")
    told = [one for one in gateway.heard if one["devices"][0]["pushkey"] == "counts itself"]
    assert all("counts" not in one for one in told), "an app that counts itself is told no number"
    before = len(gateway.heard)
    await bob.has_read(room, sent[-1])
    assert await gateway.shows(0), "what was read on another device no longer shows"
    assert len(gateway.heard) == before + 1 and "event_id" not in gateway.heard[-1], "a number, and no event"


async def test_a_gateway_that_is_down_loses_nothing_and_keeps_nobody_waiting(town: Town, gateway: Gateway) -> None:
    one = await town.relay("one")
    alice, bob, carol = await town.users("alice@one", "bob@one", "carol@one")
    room = await alice.creates_room(with_=[bob, carol])
    other = Gateway()
    await other.open()
    await wants_pushes(bob, gateway)
    await wants_pushes(carol, other, "carol's")
    gateway.down = True
    sent = [await alice.sends(room) for _ in range(3)]
    assert await other.hears_of(*sent, pushkey="carol's"), "carol's gateway is told at once"
    assert await until(lambda: gateway.asked > 0) and not gateway.heard
    asked = gateway.asked
    sent.append(await alice.sends(room))
    assert await other.hears_of(*sent, pushkey="carol's") and gateway.asked <= asked + 4, "it is left alone for a while"
    await bob.has_read(room, sent[0])
    await alice.redacts(room, sent[1])
    await one.restart()
    gateway.down = False
    town.clock.forward(hours=1)
    told = "it is told after all, when it is back, but not of what was read or taken back meanwhile"
    assert await until(lambda: sorted(gateway.events()) == sorted(sent[2:])), told
    await other.close()


async def test_a_pusher_goes_with_its_device_and_when_it_is_rejected(town: Town, gateway: Gateway) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    phone, tablet = await bob.on_another_device(), await bob.on_another_device()
    room = await alice.creates_room(with_=bob)
    await wants_pushes(bob, gateway, "laptop")
    await wants_pushes(phone, gateway, "phone")
    await wants_pushes(tablet, gateway, "tablet")
    await phone.signs_out()
    assert await pushkeys(bob) == ["laptop", "tablet"], "who signs out is not woken any more"
    auth = {"type": "m.login.password", "identifier": {"type": "m.id.user", "user": bob.name}, "password": PASSWORD}
    await bob.calls("POST", "account/password", {"new_password": PASSWORD + "!", "auth": auth})
    assert await pushkeys(bob) == ["laptop"], "a new password ends the other devices"
    gateway.rejects = ["laptop"]
    await alice.sends(room)

    async def is_gone() -> bool:
        return await pushkeys(bob) == []

    assert await until(is_gone), "the gateway knows it no longer"


async def test_an_invitation_wakes_and_says_who_where_the_app_wants_that(town: Town, gateway: Gateway) -> None:
    alice, bob = await town.users("alice@one", "bob@two")
    await wants_pushes(bob, gateway, data={"url": gateway.url})
    room = await alice.creates_room(name="The club", power_level_content_override={"users_default": 50})
    await alice.invites_to(room, bob)
    assert await until(lambda: bool(gateway.heard)), "an invitation from another server wakes, too"
    told = gateway.heard[0]
    assert (told["type"], told["sender"], told["user_is_target"]) == ("m.room.member", alice.id, True)
    assert told["counts"] == {"unread": 1} and told["content"]["membership"] == "invite"
    assert told["room_name"] == "The club", "and where to, as the invitation says it"
    await bob.joins(room, alice.server)
    sent = await alice.sends(room)
    assert await until(lambda: sent in gateway.events()), "and then her messages do"
    told = gateway.heard[-1]
    assert told["type"] == "m.room.encrypted" and "content" not in told, "no gateway has a use for ciphertext"


async def test_what_is_no_gateway_is_refused(town: Town, gateway: Gateway) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    for url in (
        "https://push.example.org/notify",
        "ftp://push.example.org" + NOTIFY,
        "https://me:secret@push.example.org" + NOTIFY,
        "https://" + NOTIFY,
        "no url",
    ):
        refused = await alice.is_refused(wants_pushes(alice, url))
        assert refused.errcode == "M_INVALID_PARAM", url
    for more in ({"kind": "email"}, {"pushkey": "x" * 513}, {"app_id": "x" * 65}, {"data": {}}, {"lang": None}):
        assert (await alice.is_refused(wants_pushes(alice, gateway, **{"pushkey": "k", **more}))).status == 400, more
    await wants_pushes(alice, gateway, "shared")
    await wants_pushes(bob, gateway, "shared", append=True)
    assert (await pushkeys(alice), await pushkeys(bob)) == (["shared"], ["shared"]), "one phone, two accounts"
    await wants_pushes(bob, gateway, "shared")
    assert (await pushkeys(alice), await pushkeys(bob)) == ([], ["shared"]), "a phone that changed hands"
    await bob.calls("POST", "pushers/set", {"kind": None, "app_id": "org.example.app", "pushkey": "shared"})
    assert await pushkeys(bob) == [], "null removes it"


async def test_what_may_not_be_reached_is_not_reached_through_a_pusher(town: Town, gateway: Gateway) -> None:
    await town.relay("one", "public_base_url: https://matrix.example.org")
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob)
    await wants_pushes(bob, gateway.url.replace("127.0.0.1", "169.254.169.254"), "inside")
    await wants_pushes(bob, gateway)
    assert await gateway.hears_of(await alice.sends(room)), "an address that may not be reached keeps nobody waiting"


@pytest.mark.parametrize(("rule", "plain"), [(AddressRule(), True), (AddressRule(here=True), False)])
async def test_on_the_internet_no_pusher_reaches_this_machine(gateway: Gateway, rule: AddressRule, plain: bool) -> None:
    outward = Outward(SystemLookups(), rule, tls_context(), plain=plain)
    for url in (gateway.url, gateway.url.replace("127.0.0.1", "localhost")):
        with pytest.raises(RemoteError):
            await Posting(outward).post(url, b"{}", timeout=5, most_bytes=1000)
    await outward.close()
    assert gateway.asked == 0, "neither by its address nor by a name that leads here, and never without TLS"


async def test_one_can_look_up_what_one_was_notified_of(town: Town, gateway: Gateway) -> None:
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob)
    sent = [await alice.sends(room) for _ in range(5)]
    await bob.sends(room)
    loud = await alice.sends(room, {**(await alice.event(room, sent[0]))["content"]})
    await bob.has_read(room, sent[4])
    first = await bob.calls("GET", "notifications", limit=2)
    assert [one["event"]["event_id"] for one in first["notifications"]] == [loud, sent[4]], "the newest first"
    assert [one["read"] for one in first["notifications"]] == [False, True]
    assert first["notifications"][0]["actions"] == ["notify", {"set_tweak": "sound", "value": "default"}]
    rest = await bob.calls("GET", "notifications", **{"from": first["next_token"], "limit": 100})
    assert [one["event"]["event_id"] for one in rest["notifications"]] == list(reversed(sent[:4])), (
        "then the older ones"
    )
    assert "next_token" not in rest, "that was all"
    only = await bob.calls("GET", "notifications", only="highlight")
    assert only["notifications"] == [], "nobody spoke of her"
