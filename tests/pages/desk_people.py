"""What stories at the desk share."""

from __future__ import annotations

from relay.moderation import key_list
from relay.moderation.moderator_secret import ModeratorSecret
from tests.pages.browsers import Reader
from tests.people import Person, path
from tests.town import Within


async def makes_moderator(house: Within, person: Person) -> None:
    await house.command("user.admin", user=person.name, admin=True)


async def has_keys(house: Within, person: Person) -> ModeratorSecret:
    """Her moderator key; the recovery key is made with it. The relay gets the public halves only."""
    own, recovery = ModeratorSecret.make(), ModeratorSecret.make()
    now = house.town.clock.now()
    made = key_list.first(
        house.name, [(person.id, "moderator", own.public), (person.id, "recovery", recovery.public)], recovery, now
    )
    await house.command("moderator.change", statement=dict(made.statement))
    return own


PASSPHRASE = "a passphrase for this browser"


async def puts_key_in(reader: Reader, secret: ModeratorSecret) -> None:
    """At the page Keys, where she is signed in."""
    await reader.goes_to("/_relay/desk/keys")
    await reader.page.get_by_label("Your moderator key").fill(secret.text)
    await reader.page.get_by_label("A passphrase for this browser").fill(PASSPHRASE)
    await reader.page.get_by_label("Once more").fill(PASSPHRASE)
    await reader.page.get_by_role("button", name="Keep it here").click()
    await reader.page.get_by_text("Kept in this browser").wait_for()


async def reports(person: Person, room: str, event_id: str, reason: str, **more: object) -> None:
    await person.calls("POST", path("rooms", room, "report", event_id), {"reason": reason, **more})


async def opens_evidence(reader: Reader) -> None:
    await reader.page.locator("#passphrase").fill(PASSPHRASE)
    await reader.page.keyboard.press("Enter")
    await reader.page.locator("#opened .opened").first.wait_for()


async def opens_case(reader: Reader, moderator: Person, secret: ModeratorSecret, case_id: str) -> None:
    """In a new browser, from her sign-in to the opened evidence."""
    await reader.signs_in(moderator, "/_relay/desk/keys")
    await puts_key_in(reader, secret)
    await reader.goes_to(f"/_relay/desk/case/{case_id}")
    await opens_evidence(reader)


async def notice_link(person: Person, which: str) -> str:
    """The newest link of this kind in her notice room."""
    found: list[str] = []

    def look() -> bool:
        bodies = [event["content"].get("body", "") for events in person.timeline.values() for event in events]
        found[:] = [word for body in bodies for word in body.split() if f"/_relay/{which}/" in word]
        return bool(found)

    assert await person.notices(look), "a link comes to her notice room"
    return "/_relay/" + found[-1].partition("/_relay/")[2].rstrip(".,")
