"""What stories at the desk share."""

from __future__ import annotations

from tests.people import Person
from tests.town import Within


async def makes_moderator(house: Within, person: Person) -> None:
    await house.command("user.admin", user=person.name, admin=True)
