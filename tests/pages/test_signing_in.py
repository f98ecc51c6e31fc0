"""The relay's pages in general: signing in and out, what a page lets in, and who is kept out."""

from __future__ import annotations

import re

from tests.pages.browsers import Browsers
from tests.town import Town

FORM = {"Content-Type": "application/x-www-form-urlencoded"}


async def test_a_person_signs_in_and_out(town: Town, browsers: Browsers) -> None:
    alice = await town.user("alice@one")
    reader = await browsers.open()
    await reader.goes_to("/_relay/")
    assert await reader.reads("Sign in"), "who is not signed in is asked to"
    await reader.shows("sign-in")
    await reader.page.get_by_label("User name").fill("alice")
    await reader.page.get_by_label("Password").fill("wrong")
    await reader.page.keyboard.press("Enter")
    await reader.page.get_by_text("The user name or the password is wrong").wait_for()
    assert await reader.page.get_by_label("User name").input_value() == "alice", "her name need not be typed again"
    # She can go on typing: a browser moves to the field that asks for it when the page is drawn.
    await reader.page.wait_for_function("document.activeElement.name === 'password'")
    await reader.signs_in(alice)
    assert await reader.reads(f"You are signed in as {alice.id}")
    await reader.shows("home")
    await reader.is_content()
    cookie = next(cookie for cookie in await reader.context.cookies() if cookie["name"] == "relay_visit")
    assert cookie["httpOnly"] and cookie["sameSite"] == "Lax"
    await alice.calls("POST", "account/password", {
        "new_password": "a new password of hers",
        "auth": {"type": "m.login.password", "identifier": {"type": "m.id.user", "user": "alice"}, "password": alice.password},
    })  # fmt: skip
    await reader.goes_to("/_relay/")
    assert await reader.reads("Sign in"), "a new password ends what was signed in with the old one"
    alice.password = "a new password of hers"
    await reader.signs_in(alice)
    await reader.presses("Sign out")
    await reader.goes_to("/_relay/")
    assert await reader.reads("With the user name and password")


async def test_a_page_lets_nothing_in(town: Town) -> None:
    house = await town.relay("one")
    alice = await town.user("alice@one")
    answer, body = await alice.asks("GET", "/_relay/sign-in?next=https://elsewhere.example/", token="")
    text = body.decode()
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
    nonce = re.search(r"'nonce-([\w-]+)'", policy)
    assert nonce and text.count(f'nonce="{nonce[1]}"') == text.count("<script") + text.count('rel="stylesheet"')
    assert 'name="next" value="/_relay/"' in text, "a link can't send her elsewhere after the sign-in"
    assert "Access-Control-Allow-Origin" not in answer.headers and answer.headers["Cache-Control"] == "no-store"
    token = re.search(r'name="form" value="([\w-]+)"', text)
    assert token
    sent = f"form={token[1]}&name=alice&password={alice.password.replace(' ', '+')}".encode()
    cookie = {"Cookie": f"relay_visit={answer.cookies['relay_visit'].value}"}
    for why, body_sent, headers in (
        ("without the cookie that belongs to it", sent, FORM),
        ("with another token", sent.replace(token[1].encode(), b"x" * 43), {**FORM, **cookie}),
        ("from another site", sent, {**FORM, **cookie, "Sec-Fetch-Site": "cross-site"}),
        ("as JSON", b"{}", {"Content-Type": "application/json", **cookie}),
        ("as no text", b"form=%ff%00", {**FORM, **cookie}),
    ):
        refused = await alice.is_refused(alice.calls("POST", "/_relay/sign-in", body_sent, token="", headers=headers))
        assert refused.status in (400, 403), f"a form {why} is refused"
    async with town.http.post(
        f"{house.url}/_relay/sign-in", data=sent, headers={**FORM, **cookie}, allow_redirects=False
    ) as done:
        assert done.status == 303 and done.headers["Location"] == "/_relay/"
        assert done.cookies["relay_visit"].value != answer.cookies["relay_visit"].value, "signing in takes a new cookie"


async def test_locked_accounts_get_no_further_than_their_appeal(town: Town, browsers: Browsers) -> None:
    alice = await town.user("alice@one")
    house = await town.relay("one")
    before = await browsers.open()
    await before.signs_in(alice)
    await house.command("user.lock", user="alice")
    await before.goes_to("/_relay/")
    assert await before.reads("With the user name and password"), "what was signed in is so no more"
    await before.signs_in(alice)
    assert before.page.url.endswith("/_relay/appeal")
