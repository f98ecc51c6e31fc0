"""Who closes her account and asks to be erased is read by those who were there, and by nobody who comes later."""

from __future__ import annotations

from tests.people import Person, ciphertext, path
from tests.town import PASSWORD, Town


async def goes_for_good(person: Person) -> None:
    auth = {"type": "m.login.password", "identifier": {"type": "m.id.user", "user": person.id}, "password": PASSWORD}
    await person.calls("POST", "account/deactivate", {"auth": auth, "erase": True})


async def test_an_erased_person_is_read_no_more_by_those_who_come_later(town: Town) -> None:
    alice, bob, early, late = await town.users("alice@one", "bob@one", "early@one", "late@one")
    before, after = await town.users("before@two", "after@three")
    room = await alice.creates_room(preset="public_chat")
    for person in (bob, early):
        await person.joins(room)
    root = await alice.sends(room)
    said = await bob.sends(room)
    threaded = await bob.sends(room, ciphertext(**{"m.relates_to": {"rel_type": "m.thread", "event_id": root}}))
    await early.leaves(room)
    await before.joins(room, alice.server)
    await goes_for_good(bob)
    await late.joins(room)
    await after.joins(room, alice.server)

    for person in (alice, early, before):
        read = {event["event_id"]: event for event in await person.history(room, "b")}
        assert read[said]["content"].get("ciphertext"), f"{person.id} could read him when he went, and still can"
    assert (await alice.event(room, said))["content"].get("ciphertext")

    for person in (late, after):
        read = {event["event_id"]: event for event in await person.history(room, "b")}
        assert read[said]["content"] == {} and read[threaded]["content"].keys() <= {"m.relates_to"}, (
            f"{person.id} came later: his words are gone for her"
        )
        assert read[root]["content"].get("ciphertext"), "others' are not"
        assert (await person.event(room, said))["content"] == {}
    answer = await late.syncs()
    timeline = {event["event_id"]: event for event in answer["rooms"]["join"][room]["timeline"]["events"]}
    assert timeline[said]["content"] == {}, "a sync shows no more"
    listed = await late.calls("GET", f"/_matrix/client/v1/{path('rooms', room, 'relations', root)}")
    assert all(not event["content"].get("ciphertext") for event in listed["chunk"]), "nor what answers to others"
    bundled = (await late.event(room, root))["unsigned"]["m.relations"]["m.thread"]
    assert not bundled["latest_event"]["content"].get("ciphertext"), "nor what stands beside their messages"
