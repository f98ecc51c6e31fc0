"""The operator writes to one person: her invite can't be turned down, and every notice comes to the same room."""

from __future__ import annotations

from tests.people import Refused
from tests.town import Town

PATH = "/_synapse/admin/v1/send_server_notice"


async def test_a_notice_reaches_a_person_in_a_room_of_its_own(town: Town) -> None:
    await town.relay("one", "privacy: {seal: open}")
    operator, alice = await town.users("operator@one", "alice@one")
    notice = {"user_id": alice.id, "content": {"msgtype": "m.text", "body": "The server moves on Sunday."}}
    refused = await alice.is_refused(alice.calls("POST", PATH, notice))
    assert (refused.status, refused.errcode) == (403, "M_FORBIDDEN"), "only the operator writes notices"
    await town.houses["one"].command("user.admin", user=operator.id, admin=True)
    await operator.signs_in()
    sent = (await operator.calls("PUT", f"{PATH}/1", notice))["event_id"]
    assert (await operator.calls("PUT", f"{PATH}/1", notice))["event_id"] == sent, "a retry writes no second one"
    room = next(iter((await alice.syncs())["rooms"]["invite"]))
    refused = await alice.is_refused(alice.leaves(room))
    assert (refused.status, refused.errcode) == (403, "M_CANNOT_LEAVE_SERVER_NOTICE_ROOM"), "she has to look at it"
    await alice.joins(room)
    seen = await alice.sees(sent)
    assert seen is not None and seen["content"]["body"] == notice["content"]["body"], "there is the notice"
    tags = await alice.calls("GET", f"user/{alice.id}/rooms/{room}/tags")
    assert "m.server_notice" in tags["tags"], "and the room is marked as what it is"
    refused = await alice.is_refused(alice.sends(room))
    assert isinstance(refused, Refused) and refused.status == 403, "nobody answers there"
    await alice.leaves(room)
    await operator.calls("POST", PATH, notice)
    assert await alice.is_invited_to(room), "the next notice comes to the same room"


async def test_a_sealed_relay_sends_no_readable_notices(town: Town) -> None:
    operator = await town.user("operator@one")
    await town.houses["one"].command("user.admin", user=operator.id, admin=True)
    await operator.signs_in()
    notice = {"user_id": operator.id, "content": {"msgtype": "m.text", "body": "hello"}}
    refused = await operator.is_refused(operator.calls("POST", PATH, notice))
    assert refused.status == 403 and "privacy.seal" in refused.text, "and says why"
