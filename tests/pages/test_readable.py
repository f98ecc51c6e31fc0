"""Every page as somebody reads it on a phone, in the light and in the dark, and without a mouse: nothing is cut off or too pale,
each field has a name, each button is large enough for a finger, and what can't be undone asks first."""

from __future__ import annotations

from typing import Any

from relay.moderation.statements import Chosen, Statement
from tests.pages.browsers import PHONE, Browsers
from tests.pages.desk_people import has_keys, makes_moderator, notice_link, puts_key_in, reports
from tests.town import Town

LEAST_CONTRAST = 4.5
# What is wrong with a page: wider than the screen, fields and buttons without a name, pale text, small targets.
LOOK = """
(least) => {
  const wrong = [];
  const name = (one) => `${one.tagName.toLowerCase()}${one.className && typeof one.className === "string" ? "." + one.className : ""} “${(one.innerText || one.value || one.name || "").trim().slice(0, 40)}”`;
  if (document.documentElement.scrollWidth > innerWidth) {
    const wide = [...document.querySelectorAll("main *")].find((one) => one.getBoundingClientRect().right > innerWidth + 1);
    wrong.push(`wider than the screen: ${wide ? name(wide) : "?"}`);
  }
  const seen = (one) => one.getClientRects().length > 0 && getComputedStyle(one).visibility !== "hidden";
  for (const field of document.querySelectorAll("input:not([type=hidden]), select, textarea")) {
    if (!field.labels?.length && !field.getAttribute("aria-label")) wrong.push(`no label: ${name(field)}`);
  }
  for (const button of document.querySelectorAll("button, a[href]")) {
    if (!seen(button)) continue;
    if (!(button.innerText.trim() || button.getAttribute("aria-label"))) wrong.push(`no name: ${name(button)}`);
    const box = button.getBoundingClientRect();
    if (button.tagName === "BUTTON" && box.height < 31) wrong.push(`too small for a finger: ${name(button)}`);
  }
  const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const behind = (one) => {
    for (let at = one; at; at = at.parentElement) {
      const colour = numbers(getComputedStyle(at).backgroundColor);
      if (colour.length < 4 || colour[3] > 0.99) return colour;
    }
    return [255, 255, 255];
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const one = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !seen(one) || one.closest("script, style, noscript, :disabled, .skip")) continue;
    const [ink, paper] = [light(numbers(getComputedStyle(one).color)), light(behind(one))];
    const ratio = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
    if (ratio < least) wrong.push(`pale (${ratio.toFixed(1)}): ${name(one)}`);
  }
  if (document.querySelectorAll("h1").length !== 1) wrong.push("not one heading of the page");
  return [...new Set(wrong)].slice(0, 8);
}
"""


async def test_every_page_can_be_read_on_a_phone_and_used_by_everybody(town: Town, browsers: Browsers) -> None:
    house = await town.relay("one")
    alice, victim, mallory = await town.users("alice@one", "victim@one", "mallory@one")
    await makes_moderator(house, alice)
    secret = await has_keys(house, alice)
    room = await victim.creates_room(with_=mallory)
    await reports(victim, room, await mallory.sends(room), "please look")
    await reports(victim, room, await mallory.sends(room), "and at this")
    assert house.server is not None
    casework = house.server.moderation.casework
    [case, other], _ = await casework.cases.queue()
    statement = Statement(
        "threat",
        "terms:rule 1",
        "Repeated threats in a private room.",
        (Chosen("suspend", mallory.id), Chosen("quarantine", f"mxc://{'long.' * 30}example/{'a' * 60}")),
    )
    await casework.decisions.decide(case.case_id, alice.id, case.version, statement)
    await casework.appeals.file(case.case_id, mallory.id, "No.")
    pages = {
        alice: [
            "/_relay/", "/_relay/contact", "/_relay/appeal", "/_relay/desk", "/_relay/desk?show=closed", f"/_relay/desk/case/{case.case_id}",
            f"/_relay/desk/case/{other.case_id}", "/_relay/desk/measures", "/_relay/desk/lists", "/_relay/desk/log",
            "/_relay/desk/figures", "/_relay/desk/keys", "/_relay/desk/person?user=mallory", "/_relay/desk/case/none",
        ],
        victim: [await notice_link(victim, "report")],
        mallory: ["/_relay/appeal"],
        None: ["/_relay/notice", "/_relay/notice/status", "/_relay/sign-in"],
    }  # fmt: skip
    wrong: dict[str, Any] = {}
    for person, addresses in pages.items():
        # Colours change at once.
        reader = await browsers.open(viewport=PHONE, reduced_motion="reduce")
        if person is not None:
            await reader.signs_in(person)
        if person is alice:
            await puts_key_in(reader, secret)
        for address in addresses:
            await reader.goes_to(address)
            await reader.page.evaluate(
                "() => document.querySelectorAll('details').forEach((one) => { one.open = true; })"
            )
            for scheme in ("light", "dark"):
                await reader.page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
                if found := await reader.page.evaluate(LOOK, LEAST_CONTRAST):
                    wrong[f"{address} {scheme}"] = found
            await reader.shows(
                "look" + address.replace("/", "_").replace(case.case_id, "decided").replace(other.case_id, "open")[:40]
            )
            await reader.page.set_viewport_size(PHONE)  # type: ignore[arg-type]
        await reader.is_content()
    assert not wrong, "\n".join(f"{where}: {'; '.join(what)}" for where, what in wrong.items())


async def test_the_desk_without_a_mouse(town: Town, browsers: Browsers) -> None:
    house = await town.relay("one")
    alice, victim, mallory = await town.users("alice@one", "victim@one", "mallory@one")
    await makes_moderator(house, alice)
    await has_keys(house, alice)
    room = await victim.creates_room(with_=mallory)
    await reports(victim, room, await mallory.sends(room), "please look")
    reader = await browsers.open(viewport=PHONE, scripts=False)
    await reader.signs_in(alice, "/_relay/desk")
    page = reader.page

    async def tabs_to(what: str, most: int = 60) -> None:
        """Until the focus is there; and it can be seen where it is."""
        for _ in range(most):
            await page.keyboard.press("Tab")
            here = await page.evaluate(
                "() => { const one = document.activeElement; return [one.labels?.[0]?.innerText || one.innerText || one.name || '', "
                "getComputedStyle(one).outlineStyle, one.getClientRects().length] }"
            )
            if here[0].strip().startswith(what):
                assert here[1] != "none" and here[2], f"nobody sees that the focus is at {what}"
                return
        raise AssertionError(f"no key leads to {what}")

    await page.keyboard.press("Tab")
    assert await page.locator(":focus").inner_text() == "Skip to the content"
    await page.keyboard.press("Enter")
    await tabs_to("No. 1")
    async with page.expect_navigation():
        await page.keyboard.press("Enter")
    await tabs_to("Take it")
    async with page.expect_navigation():
        await page.keyboard.press("Enter")
    await tabs_to("Warn")
    await page.keyboard.press("Space")
    await tabs_to("Reason")
    await page.keyboard.type("Harassment")
    await tabs_to("Which one")
    await page.keyboard.type("rule 1")
    await tabs_to("What happened")
    await page.keyboard.type("Wrote again after he had been asked to stop.")
    await tabs_to("Go on")
    async with page.expect_navigation():
        await page.keyboard.press("Enter")
    assert await reader.reads("Decide so?"), "nothing is done by one slip"
    await tabs_to("Yes, decide so")
    async with page.expect_navigation():
        await page.keyboard.press("Enter")
    assert await reader.reads("decided")
    assert await notice_link(mallory, "appeal")
