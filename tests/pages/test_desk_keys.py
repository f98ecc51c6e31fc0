"""A moderator's key in a real browser: put in, kept under a passphrase, proved, and a list of keys that was exchanged noticed."""

from __future__ import annotations

import pytest

from tests.pages.browsers import Browsers
from tests.pages.desk_people import PASSPHRASE, has_keys, makes_moderator, puts_key_in, reports
from tests.town import Town


async def test_a_key_lives_in_the_browser_only(town: Town, browsers: Browsers) -> None:
    house = await town.relay("one")
    alice, bob = await town.users("alice@one", "bob@one")
    await makes_moderator(house, alice)
    reader = await browsers.open()
    await reader.signs_in(alice, "/_relay/desk/keys")
    assert await reader.reads("fewer than two keys")
    await reader.page.get_by_text("This browser holds no key").wait_for()
    await reader.page.get_by_label("A passphrase for this browser").fill(PASSPHRASE)
    await reader.page.get_by_label("Once more").fill(PASSPHRASE)
    await reader.page.get_by_role("button", name="Make a new key instead").click()
    await reader.page.get_by_text("Your new key").wait_for()
    made = await reader.page.locator("#made-secret").inner_text()
    assert made.startswith("rmk1-")
    await reader.shows("desk-keys-made")
    await reader.page.get_by_role("button", name="Remove it from this browser").click()
    assert await reader.page.evaluate("() => localStorage.getItem('relay.moderator.key') !== null"), "not by one slip"
    await reader.page.get_by_role("button", name="Sure? Only your written copy is left then").click()

    secret = await has_keys(house, alice)
    await puts_key_in(reader, secret)
    await reader.page.locator("#test-passphrase").fill("something else entirely")
    await reader.page.get_by_role("button", name="Prove that it still opens").click()
    await reader.page.get_by_text("The passphrase does not open this key").wait_for()
    await reader.page.locator("#test-passphrase").fill(PASSPHRASE)
    await reader.page.keyboard.press("Enter")
    await reader.page.get_by_text("It opens. The relay asks again in 90 days").wait_for()
    await reader.shows("desk-keys")
    await reader.page.wait_for_function("localStorage.getItem('relay.moderator.list') !== null")
    kept = await reader.page.evaluate("JSON.stringify(localStorage)")
    assert secret.text not in kept and "locked" in kept, "the key lies there under the passphrase only"
    assert made.replace("-", "") not in kept
    await reader.is_content()
    soon = await browsers.open()
    await soon.signs_in(bob, "/_relay/desk/keys")
    assert await soon.reads("You are no moderator yet") and not await soon.reads("Audit log")
    assert not await soon.reads(alice.id), "who moderates here is not for everybody"
    await soon.page.get_by_label("A passphrase for this browser").fill(PASSPHRASE)
    await soon.page.get_by_label("Once more").fill(PASSPHRASE)
    await soon.page.get_by_role("button", name="Make a new key instead").click()
    await soon.page.get_by_text("rmp1-", exact=False).last.wait_for()
    await reader.page.evaluate("localStorage.setItem('relay.moderator.list', 'another list')")
    await reader.page.reload()
    await reader.page.get_by_text("does not follow from the one you saw last").wait_for()
    on_disk = b"".join(file.read_bytes() for file in house.files())
    for text in (secret.text, made):
        assert text.encode() not in on_disk and text.replace("-", "").encode() not in on_disk, "the relay never had it"


NO_CURVE = """const usual = crypto.subtle.generateKey.bind(crypto.subtle);
crypto.subtle.generateKey = (how, ...more) =>
  how.name === "X25519" ? Promise.reject(new DOMException("Unrecognized name.", "NotSupportedError")) : usual(how, ...more);"""
NO_HTTPS = "Object.defineProperty(crypto, 'subtle', { value: undefined });"


@pytest.mark.parametrize(("lacks", "cure"), [(NO_CURVE, "Take Firefox 130"), (NO_HTTPS, "by its https:// address")])
async def test_a_browser_that_can_not_open_keys_says_what_to_do(
    town: Town, browsers: Browsers, lacks: str, cure: str
) -> None:
    house = await town.relay("one")
    alice, victim, mallory = await town.users("alice@one", "victim@one", "mallory@one")
    await makes_moderator(house, alice)
    secret = await has_keys(house, alice)
    room = await victim.creates_room(with_=mallory)
    await reports(victim, room, await mallory.sends(room), "please look")
    reader = await browsers.open()
    await reader.signs_in(alice, "/_relay/desk/keys")
    await puts_key_in(reader, secret)
    await reader.context.add_init_script(lacks)
    await reader.goes_to("/_relay/desk/keys")
    await reader.page.locator("#list-warning", has_text=cure).wait_for()
    await reader.page.locator("#test-passphrase").fill(PASSPHRASE)
    await reader.page.keyboard.press("Enter")
    await reader.page.locator("#key-says", has_text=cure).wait_for()
    await reader.goes_to("/_relay/desk")
    await reader.follows("No. 1")
    await reader.page.locator("#passphrase").fill(PASSPHRASE)
    await reader.page.keyboard.press("Enter")
    await reader.page.get_by_text(cure).wait_for()
    await reader.goes_to("/_relay/desk/keys")
    await reader.page.get_by_role("button", name="Remove it from this browser").click()
    await reader.page.get_by_role("button", name="Sure? Only your written copy is left then").click()
    await reader.page.get_by_text("This browser holds no key").wait_for()
    await reader.is_content()
