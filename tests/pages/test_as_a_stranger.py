"""The pages, read as an attacker: hostile HTML in every field that a stranger can fill, cookies, forms of other sites, traces."""

from __future__ import annotations

import html
import re

import pytest

from relay.accounts.users import User
from relay.clock import HOUR
from relay.errors import Forbidden
from relay.pages.frame import local_path
from relay.pages.signing_in import SigningIn
from relay.people.contact_gate import MAX_HELD_OF_SERVER, Held
from tests.moderation.casehouse import desk, hears, token_in
from tests.pages.visitors import FORM, Visitor
from tests.people import path, until
from tests.people_slices.test_contact_gate import _gate, _links
from tests.town import Town

ATTACK = "\"><svg/onload=alert(1)>'{{7*7}}"
PERSON = f"@{ATTACK}:else.example"


def harmless(text: str, where: str) -> bool:
    """Whether the attack, if it stands there at all, stands there as text. Returns whether it does."""
    assert "<svg" not in text.lower(), f"{where}: a tag came through"
    assert not re.search(r"""=\s*["'][^"']*["']><svg""", text), where
    assert "'49" not in text and "49:else" not in text, f"{where}: a template was filled in by a stranger"
    for attribute in re.findall(r'\son\w+\s*=\s*"', text):
        raise AssertionError(f"{where}: {attribute} is code of somebody")
    return "svg/onload" in html.unescape(text)


async def test_hostile_text_in_every_field_that_a_stranger_can_fill(town: Town) -> None:
    mod = await desk(town)
    alice, bob = await town.users("alice@one", "bob@one")
    seen = []

    # People without an account: the form, its refusals, the receipt, the sign-in, a contact link.
    stranger = Visitor(town, mod.house)
    fields = {
        "category": "other",
        "where": f"{PERSON} {ATTACK}",
        "why": f"quillon {ATTACK}",
        "name": ATTACK,
        "contact": f"quillon@{ATTACK}",
        "good_faith": "y",
    }
    answer, text = await stranger.sends("/_relay/notice", fields)
    assert answer.status == 200 and not harmless(text, "what was sent")
    receipt = html.unescape(re.search(r'id="receipt">([^<]+)<', text)[1])  # type: ignore[index]
    for name in fields:
        _, text = await stranger.sends("/_relay/notice", {**fields, name: ATTACK * 400, "category": ATTACK})
        harmless(text, f"a refusal for {name}")
    for where, sent in (
        ("/_relay/sign-in", {"name": ATTACK, "password": ATTACK, "next": f"/_relay/{ATTACK}"}),
        ("/_relay/notice/status", {"receipt": ATTACK}),
    ):
        _, text = await stranger.sends(where, sent)
        seen.append(harmless(text, where))
    assert seen[0], "her name stands in the sign-in form again, as text"
    token = await _links(mod.house).make(bob.id, once=False)
    _, text = await stranger.sends(f"/_relay/contact/{token}", {"user_id": PERSON})
    assert harmless(text, "the contact link"), "she is told for whom it is good now"
    for where in (
        f"/_relay/contact/{path(ATTACK)}", f"/_relay/report/{path(ATTACK)}", f"/_relay/appeal/{path(ATTACK)}",
        f"/_relay/sign-in?next={path(ATTACK)}", f"/_relay/{path(ATTACK)}", f"/_relay/static/{path(ATTACK)}",
    ):  # fmt: skip
        harmless((await stranger.gets(where))[1], where)
    for word in ("answer", "appeal"):
        _, text = await stranger.sends(
            f"/_relay/report/{receipt}", {"words": f"quillon {ATTACK}"}, to=f"/_relay/report/{receipt}/{word}"
        )
        harmless(text, f"receipt, {word}")
    harmless((await stranger.gets(f"/_relay/report/{receipt}?done={path(ATTACK)}"))[1], "receipt")

    # People with one: whom and what they report, a proof, their own pages.
    await alice.calls("POST", f"users/{path(PERSON)}/report", {"reason": f"quillon {ATTACK}", "score": ATTACK})
    at_home = Visitor(town, mod.house, alice)
    await at_home.signs_in()
    link = f"/_relay/report/{token_in(await hears(alice, 'Your report has the number'))}"
    for step, sent in (
        ("proof", {"code": ATTACK}),
        ("answer", {"words": f"quillon {ATTACK}"}),
        ("consent", {"agree": ATTACK}),
        ("withdraw", {}),
    ):
        _, text = await at_home.sends(link, sent, to=f"{link}/{step}")
        harmless(text, f"report, {step}")
    harmless((await at_home.gets(link))[1], "report")

    # What the moderators see of it.
    at_desk = Visitor(town, mod.house, mod.person)
    await at_desk.signs_in()
    cases = await mod.queue(state="all")
    assert {one["user_id"] for one in cases} == {PERSON}
    pages = [
        "/_relay/desk",
        *(f"/_relay/desk/case/{one['id']}" for one in cases),
        f"/_relay/desk/person?user={path(PERSON)}",
    ]
    for where in pages:
        status, text = await at_desk.gets(where)
        assert status == 200 and harmless(text, where), f"{where}: the name stands there, as text"
    for where in (
        f"/_relay/desk/measures?target={path(ATTACK)}", "/_relay/desk/log", "/_relay/desk/lists", "/_relay/desk/figures",
        f"/_relay/desk?state={path(ATTACK)}", f"/_relay/desk/figures?month={path(ATTACK)}", f"/_relay/desk/log/{path(ATTACK)}",
        f"/_relay/desk/case/{path(ATTACK)}",
    ):  # fmt: skip
        harmless((await at_desk.gets(where))[1], where)
    await mod.decides(cases[0]["id"])
    harmless((await at_desk.gets(pages[1]))[1], "decided")
    for file in mod.house.files():
        assert b"quillon" not in file.read_bytes(), f"what they wrote lies readable in {file.name}"


async def test_cookies_and_forms_of_other_sites(town: Town) -> None:
    house = await town.relay("one", "public_base_url: https://relay.example\n")
    alice = await town.user("alice@one")
    planted = Visitor(town, house, alice)
    planted.cookie = "a-cookie-that-somebody-else-has-chosen-and-knows"
    await planted.signs_in()
    assert planted.cookie != "a-cookie-that-somebody-else-has-chosen-and-knows", "signing in takes a cookie of its own"
    assert (await planted.gets("/_relay/"))[0] == 200
    signed_in = planted.cookie
    for host, secure in (("relay.example", True), ("127.0.0.1", False)):
        answer, _ = await Visitor(town, house, Host=host).asks("GET", "/_relay/sign-in")
        cookie = answer.cookies["relay_visit"]
        assert bool(cookie["secure"]) is secure and cookie["httponly"] and cookie["path"] == "/_relay/"
        assert ("Strict-Transport-Security" in answer.headers) is secure, (
            "over https also where the proxy does not say so"
        )
    # A form of another site has her cookie at most (an old browser), and never the token.
    other = Visitor(town, house)
    other.cookie = signed_in
    for headers in ({}, {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}):
        body = b"invites_from=nobody&form=guessed"
        answer, _ = await other.asks("POST", "/_relay/contact/choose", body, **FORM, **headers)
        assert answer.status == 403, headers
    assert await _gate(house).choice(alice.id) == "everybody"
    # Signing out ends it, also for whoever has kept the cookie.
    await planted.sends("/_relay/", {}, to="/_relay/sign-out")
    assert (await other.gets("/_relay/"))[0] == 303


async def test_the_old_password_opens_nothing_while_it_is_changed(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    house = await town.relay("one")
    alice = await town.user("alice@one")
    assert house.server is not None
    signing_in = next(part for part in house.server._parts if isinstance(part, SigningIn))
    authenticate = signing_in._users.authenticate

    async def and_meanwhile(user_id: str, password: str) -> User | None:
        found = await authenticate(user_id, password)
        await house.command("user.password", user="alice", password="a new password of hers")
        return found

    monkeypatch.setattr(signing_in._users, "authenticate", and_meanwhile)
    thief = Visitor(town, house, alice)
    answer, text = await thief.sends("/_relay/sign-in", {"name": alice.id, "password": alice.password})
    assert answer.status == 403 and "just been changed" in text
    monkeypatch.undo()
    assert (await thief.gets("/_relay/"))[0] == 303, "nobody is signed in with it"
    alice.password = "a new password of hers"
    await thief.signs_in()


@pytest.mark.parametrize(
    "where",
    ["https://else.example/", "//else.example", "/\\else.example", "/_relay/\\else", "/_relay//else.example", "javascript:alert(1)",
     "/_relay/../../else", "/_relay/\r\nSet-Cookie: x=y", "/_relay/\x00", "/_relay/ö", "/_relay/" + "x" * 400, ""],
)  # fmt: skip
def test_a_link_leads_nowhere_else_after_the_sign_in(where: str) -> None:
    assert local_path(where) == "/_relay/"


async def test_passwords_are_not_guessed_at_full_speed(town: Town) -> None:
    house = await town.relay("one", "limits: {login: {per_second: 0.001, burst: 4}}\n")
    alice = await town.user("alice@one")
    statuses = []
    for number in range(6):
        guesser = Visitor(town, house, **{"X-Forwarded-For": f"81.2.{number}.1"})
        sent = {"name": alice.id, "password": f"guess {number}"}
        statuses.append((await guesser.sends("/_relay/sign-in", sent))[0].status)
    assert statuses == [403] * 4 + [429] * 2, "of one account few are tried, from wherever they come"
    one_place = Visitor(town, house, **{"X-Forwarded-For": "81.3.1.1"})
    statuses = []
    for number in range(5):
        statuses.append(
            (await one_place.sends("/_relay/sign-in", {"name": f"user{number}", "password": "guess"}))[0].status
        )
    assert statuses == [403] * 4 + [429], "and of one place, whatever accounts it tries"
    statuses = []
    for number in range(5):
        spread = Visitor(town, house, **{"X-Forwarded-For": f"2a02:1:2:3{number:02x}::{number + 1}"})
        statuses.append(
            (await spread.sends("/_relay/sign-in", {"name": f"other{number}", "password": "guess"}))[0].status
        )
    assert statuses == [403] * 4 + [429], "whoever has a /56 has all addresses in it"


async def test_what_is_over_leaves_no_trace(town: Town) -> None:
    mod = await desk(town)
    alice, fan = await town.users("alice@one", "fan@one")
    visitor = Visitor(town, mod.house, alice)
    await visitor.signs_in()
    await mod.asks("POST", "tokens", {"name": "x", "scopes": ["audit:read"]})
    await _links(mod.house).use(await _links(mod.house).make(alice.id, once=False), fan.id)
    await alice.calls("POST", f"users/{path(fan.id)}/report", {"reason": ""})
    [case] = await mod.queue()
    body = {"measures": [], "reason_code": "spam", "tos_clause": "1", "facts": "Nothing of this breaks a rule here."}
    await mod.asks("POST", f"reports/{case['id']}/decision", body, Idempotency_Key="k")
    assert mod.house.server is not None
    tables = ("visits", "safety_tokens", "contact_passes", "safety_requests")

    async def counts() -> list[int]:
        return await mod.house.server.db.read(  # type: ignore[union-attr]
            lambda query: [query.value(f"SELECT count(*) FROM {table}") for table in tables]
        )

    assert await counts() == [1, 1, 1, 1]

    async def gone() -> bool:
        town.clock.forward(hours=24 * 40)  # a sweep that was under way is followed by another one
        return await counts() == [0, 0, 0, 0]

    assert await until(gone), "by itself, as the tables say"


async def test_no_single_server_shuts_the_contact_gate(town: Town) -> None:
    home = await town.relay("one", "contact: {invites_from: shared_rooms}\n")
    eve, fan = await town.users("eve@one", "fan@one")
    gate = _gate(home)
    await gate.held(eve.id)
    now = town.clock.now()
    for number in range(MAX_HELD_OF_SERVER):
        room = f"!{number}:flood.example"
        gate._held.setdefault(eve.id, {})[room] = Held(room, "$x", f"@{number}:flood.example", now, now + HOUR)
    with pytest.raises(Forbidden, match="too many"):
        await gate.invite("@another:flood.example", eve.id, "!r:flood.example")
    await gate.invite(fan.id, eve.id, "!r:x")
    await gate.invite("@somebody:else.example", eve.id, "!r:else.example")


async def test_a_contact_link_takes_names_and_no_texts(town: Town) -> None:
    home = await town.relay("one")
    eve = await town.user("eve@one")
    token = await _links(home).make(eve.id, once=False)
    stranger = Visitor(town, home)
    for text in (
        "@you are ugly:else.example",
        "@ты:else.example",
        "you",
        "@:else.example",
        "@" + "x" * 200 + ":else.example",
    ):
        answer, _ = await stranger.sends(f"/_relay/contact/{token}", {"user_id": text})
        assert answer.status == 400, text
    answer, _ = await stranger.sends(f"/_relay/contact/{token}", {"user_id": "@Fan_1=a:else.example"})
    assert answer.status == 200
