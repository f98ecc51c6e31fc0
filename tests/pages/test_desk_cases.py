"""The desk in a real browser: a report comes in, its evidence is opened there and nowhere else, it is decided, appealed, answered."""

from __future__ import annotations

from relay.moderation.disclosure_form import Item, code_of
from tests.moderation.sessions import Session
from tests.pages.browsers import Browsers
from tests.pages.desk_people import has_keys, makes_moderator, notice_link, opens_evidence, puts_key_in, reports
from tests.people import Person, until
from tests.town import Town, Within

HOSTILE = "<script>document.title='owned'</script><img src=x onerror=alert(1)>{{7*7}}"
WORDS = f"He wrote this to me {HOSTILE} and would not stop writing"
MESSAGE = f"I know exactly where you live tonight {HOSTILE}"


def on_disk(house: Within) -> bytes:
    return b"".join(file.read_bytes() for file in house.files())


async def test_from_the_report_to_the_answered_appeal(town: Town, browsers: Browsers) -> None:
    house = await town.relay("one")
    alice, victim, mallory = await town.users("alice@one", "victim@one", "mallory@one")
    await makes_moderator(house, alice)
    secret = await has_keys(house, alice)
    room = await victim.creates_room(with_=mallory)
    session = Session()
    sent = await mallory.sends(room, session.says(room, MESSAGE))
    await reports(victim, room, sent, WORDS)

    # The reporter adds her proof over the link, signed in.
    at_home = await browsers.open()
    await at_home.signs_in(victim, await notice_link(victim, "report"))
    await at_home.page.get_by_label("Proof code").fill(code_of([Item(sent, 0, session.prk(0))]))
    await at_home.page.get_by_text("I report this in good faith").click()
    await at_home.presses("Hand in the proof")
    assert await at_home.reads("The proof holds")
    await at_home.shows("report")
    await at_home.is_content()
    other = await browsers.open()
    await other.signs_in(mallory, at_home.page.url.removesuffix("/proof").removeprefix(house.url))
    assert await other.reads("belongs to another account"), "the link alone opens nothing"

    # The moderator.
    reader = await browsers.open()
    await reader.signs_in(alice, "/_relay/desk/keys")
    await puts_key_in(reader, secret)
    await reader.page.keyboard.press("q")
    await reader.page.get_by_text("1 in this list").wait_for()
    await reader.shows("desk-queue")
    await reader.page.keyboard.press("j")
    await reader.page.keyboard.press("Enter")
    await reader.page.get_by_role("heading", name="Case no. 1").wait_for()
    assert not await reader.reads(victim.id), "who reported is nobody's business"
    async with reader.page.expect_navigation():
        await reader.page.keyboard.press("t")
    assert await reader.reads("Yours until")
    await opens_evidence(reader)
    assert await reader.reads(MESSAGE) and await reader.reads(WORDS), "shown as text, whatever stands in it"
    assert await reader.page.title() != "owned"
    await reader.shows("desk-case")

    await reader.page.get_by_label("Suspend").check()
    await reader.page.locator("select[name=reason]").select_option("threat")
    await reader.page.get_by_label("Which one").fill("rule 1: no threats")
    facts = reader.page.get_by_label("What happened")
    await facts.fill("He wrote: I know exactly where you live, and more like it.")
    await reader.page.get_by_role("button", name="Go on …").click()
    await reader.page.get_by_text("stands in the evidence").wait_for()
    await facts.fill("A threat against another person's safety, sent in a private room.")
    await reader.presses("Go on …")
    assert await reader.reads("Decide so?") and not await reader.reads("Your words")
    await reader.shows("desk-decide-sure")
    await reader.presses("Yes, decide so")
    assert await reader.reads("decided")
    assert (await mallory.is_refused(mallory.sends(room))).errcode == "M_USER_SUSPENDED"
    await reader.is_content()

    # The person decided on reads why, and objects; the moderator, who is alone, answers.
    accused = await browsers.open(scripts=False)
    await accused.signs_in(mallory, await notice_link(mallory, "appeal"))
    assert await accused.reads("rule 1: no threats") and await accused.reads("A threat against another person")
    await accused.page.get_by_text("Object to it").click()
    await accused.page.get_by_label("Why is it wrong?").fill("It was meant as a joke between friends.")
    await accused.presses("Object")
    assert await accused.reads("has reached the moderators")
    await accused.shows("appeal")
    await reader.page.reload()
    assert await reader.reads("objects to the decision")
    await opens_evidence(reader)
    assert await reader.reads("meant as a joke")
    await reader.page.get_by_label("is taken back").check()
    await reader.page.get_by_label("Why").fill("On a second look it was banter that both sides joined in.")
    await reader.presses("Go on …")
    await reader.presses("Yes, decide so")
    assert await until(lambda: _may_send(mallory, room)), "what was done is lifted"
    await reader.shows("desk-case-answered")
    await reader.goes_to("/_relay/desk/figures")
    assert await reader.reads("of the answered overturned") and await reader.reads("100 %")
    await reader.shows("desk-figures")
    await reader.is_content()
    written = on_disk(house)
    for text in (MESSAGE, WORDS, "meant as a joke", session.prk(0)):
        raw = text if isinstance(text, bytes) else text.encode()
        assert raw not in written, "what was opened in the browser is nowhere on the relay's disk"


async def test_the_public_form_without_scripts_and_what_strangers_write(town: Town, browsers: Browsers) -> None:
    house = await town.relay("one")
    alice = await town.user("alice@one")
    await makes_moderator(house, alice)
    secret = await has_keys(house, alice)
    stranger = await browsers.open(scripts=False)
    await stranger.goes_to("/_relay/notice")
    await stranger.shows("notice")
    page = stranger.page
    await page.locator("select[name=category]").select_option("ncii")
    await page.locator("textarea[name=where]").fill(f"@{HOSTILE[:40]}:evil.example\nmxc://evil.example/abc")
    await page.locator("textarea[name=why]").fill(f"Pictures of me {HOSTILE}")
    await page.get_by_label("Your name").fill(HOSTILE)
    await page.get_by_text("To the best of my knowledge").click()
    await stranger.presses("Send the notice")
    assert await stranger.reads("Received")
    await stranger.shows("notice-sent")
    receipt = await page.locator("#receipt").inner_text()
    await stranger.goes_to("/_relay/notice/status")
    await page.get_by_label("Receipt code").fill(receipt)
    await stranger.presses("Look it up")
    assert await stranger.reads("received")
    await stranger.shows("notice-status")
    await page.get_by_label("To the moderators").fill(f"One more thing {HOSTILE}")
    await stranger.presses("Send")
    assert await stranger.reads("reached the moderators, sealed")
    assert f"Pictures of me {HOSTILE}".encode() not in on_disk(house)

    reader = await browsers.open()
    await reader.signs_in(alice, "/_relay/desk/keys")
    await puts_key_in(reader, secret)
    await reader.goes_to("/_relay/desk")
    await reader.follows("No. 1")
    await opens_evidence(reader)
    assert await reader.reads(f"Pictures of me {HOSTILE}") and await reader.reads(f"One more thing {HOSTILE}")
    assert await reader.page.evaluate("document.querySelectorAll('main img, main script').length") == 0
    async with reader.page.expect_navigation():
        await reader.page.keyboard.press("x")
    assert await reader.reads("This may show a minor.") and await reader.page.locator("#opened .opened").count() == 0
    await reader.shows("desk-case-minor")
    await reader.is_content()


async def _may_send(person: Person, room: str) -> bool:
    from tests.people import Refused

    try:
        await person.sends(room)
    except Refused:
        return False
    return True
