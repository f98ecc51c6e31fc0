"""What answers what, and a room's threads."""

from __future__ import annotations

from tests.rooms.ground import V1, V3, Ground, said


async def test_answers_are_listed_by_kind_and_page(ground: Ground) -> None:
    alice, bob, eve = ground.people("alice", "bob", "eve")
    room = await alice.creates(preset="public_chat")
    await bob.joins(room)
    root = await alice.says(room, "root")
    replies = [await bob.says(room, f"reply {n}", rel_type="m.thread", event_id=root) for n in range(7)]
    edit = await alice.says(room, "edited", rel_type="m.replace", event_id=root)
    await alice.says(room, "elsewhere")
    path = f"{V1}/rooms/{room}/relations/{root}"

    assert [e["event_id"] for e in (await bob.gets(path))["chunk"]] == [edit, *replies[::-1]], (
        "all of them, the newest first"
    )
    thread = await bob.gets(f"{path}/m.thread", limit=3)
    assert [said(e) for e in thread["chunk"]] == ["reply 6", "reply 5", "reply 4"], "by kind, a page of it"
    more = await bob.gets(f"{path}/m.thread", limit=3, **{"from": thread["next_batch"]})
    assert [said(e) for e in more["chunk"]] == ["reply 3", "reply 2", "reply 1"], "the next"
    last = await bob.gets(f"{path}/m.thread", limit=3, **{"from": more["next_batch"]})
    assert [said(e) for e in last["chunk"]] == ["reply 0"] and "next_batch" not in last, "the last"
    forward = await bob.gets(f"{path}/m.thread", dir="f", limit=4)
    assert [said(e) for e in forward["chunk"]] == [f"reply {n}" for n in range(4)], "the oldest first"
    rest = await bob.gets(f"{path}/m.thread", dir="f", limit=4, **{"from": forward["next_batch"]})
    assert [said(e) for e in rest["chunk"]] == [f"reply {n}" for n in range(4, 7)] and "next_batch" not in rest
    assert [e["event_id"] for e in (await bob.gets(f"{path}/m.replace/m.room.encrypted"))["chunk"]] == [edit], (
        "by type too"
    )
    assert (await bob.gets(f"{path}/m.replace/m.room.message"))["chunk"] == [], "of which there may be none"

    await bob.does("PUT", f"{V3}/rooms/{room}/redact/{replies[6]}/r1", {})
    assert len((await bob.gets(f"{path}/m.thread"))["chunk"]) == 6, "what was taken back answers nothing"
    assert (await bob.asks("GET", f"{V1}/rooms/{room}/relations/$none"))[0] == 404, "an unknown event has no answers"
    assert (await eve.asks("GET", path))[0] == 403, "and a stranger gets none"


async def test_recursion_follows_three_hops(ground: Ground) -> None:
    alice = ground.person("alice")
    room = await alice.creates()
    chain = [await alice.says(room, "0")]
    for n in range(1, 6):
        chain.append(await alice.says(room, f"{n}", rel_type="m.reference", event_id=chain[-1]))
    path = f"{V1}/rooms/{room}/relations/{chain[0]}"
    direct = await alice.gets(path)
    assert [said(e) for e in direct["chunk"]] == ["1"] and "recursion_depth" not in direct, (
        "without it, only direct answers"
    )
    deep = await alice.gets(path, recurse="true")
    assert [said(e) for e in deep["chunk"]] == ["3", "2", "1"] and deep["recursion_depth"] == 3, "with it, three hops"
    page = await alice.gets(path, recurse="true", limit=2)
    page = await alice.gets(path, recurse="true", limit=2, **{"from": page["next_batch"]})
    assert [said(e) for e in page["chunk"]] == ["1"], "paged as well"


async def test_threads_are_listed_by_their_latest_answer(ground: Ground) -> None:
    alice, bob = ground.people("alice", "bob")
    room = await alice.creates(preset="public_chat")
    await bob.joins(room)
    roots = [await alice.says(room, f"root {n}") for n in range(3)]
    await bob.says(room, "his own")
    for n in (0, 1, 2, 0):
        await (bob if n == 1 else alice).says(room, f"in {n}", rel_type="m.thread", event_id=roots[n])
    listed = await bob.gets(f"{V1}/rooms/{room}/threads")
    assert [said(e) for e in listed["chunk"]] == ["root 0", "root 2", "root 1"], "the one answered last comes first"
    summary = listed["chunk"][0]["unsigned"]["m.relations"]["m.thread"]
    assert summary["count"] == 2 and said(summary["latest_event"]) == "in 0", "each with its summary"
    mine = await bob.gets(f"{V1}/rooms/{room}/threads", include="participated")
    assert [said(e) for e in mine["chunk"]] == ["root 1"], "his are those he wrote in"
    first = await bob.gets(f"{V1}/rooms/{room}/threads", limit=2)
    second = await bob.gets(f"{V1}/rooms/{room}/threads", limit=2, **{"from": first["next_batch"]})
    assert [said(e) for e in second["chunk"]] == ["root 1"] and "next_batch" not in second, "page by page"
    assert (await bob.asks("GET", f"{V1}/rooms/{room}/threads", include="some"))[0] == 400


async def test_who_left_is_not_told_what_was_answered_since(ground: Ground) -> None:
    alice, bob = ground.people("alice", "bob")
    room = await alice.creates(preset="public_chat")
    await bob.joins(room)
    root = await alice.says(room, "root")
    known = await alice.says(room, "while he was there", rel_type="m.thread", event_id=root)
    path = f"{V3}/rooms/{room}/event/{root}"
    await bob.leaves(room)
    for rel_type in ("m.thread", "m.replace", "m.reference"):
        await alice.says(room, "since", rel_type=rel_type, event_id=root)
    thread = (await bob.gets(path))["unsigned"]["m.relations"]
    assert thread.keys() == {"m.thread"} and thread["m.thread"]["latest_event"]["event_id"] == known
    assert thread["m.thread"]["count"] == 1
    assert (await alice.gets(path))["unsigned"]["m.relations"].keys() == {"m.thread", "m.replace", "m.reference"}
    await bob.joins(room)
    assert (await bob.gets(path))["unsigned"]["m.relations"]["m.thread"]["count"] == 2, "until he comes again"


async def test_nobody_speaks_into_another_rooms_thread(ground: Ground) -> None:
    alice, eve = ground.people("alice", "eve")
    room, hers = await alice.creates(), await eve.creates()
    root = await alice.says(room, "root")
    await eve.says(hers, "intruder", rel_type="m.thread", event_id=root)
    event = await alice.gets(f"{V3}/rooms/{room}/event/{root}")
    assert "m.relations" not in event["unsigned"], "an event of another room adds nothing to it"
    for path in (f"relations/{root}", "threads"):
        assert (await alice.gets(f"{V1}/rooms/{room}/{path}"))["chunk"] == [], f"nor to {path}"
    assert (await alice.gets(f"{V1}/rooms/{room}/relations/{root}", recurse="true"))["chunk"] == []


async def test_a_long_chain_of_threads_does_not_break_reading(ground: Ground) -> None:
    alice = ground.person("alice")
    room = await alice.creates()
    root = latest = await alice.says(room, "0")
    for n in range(1, 40):
        latest = await alice.says(room, f"{n}", rel_type="m.thread", event_id=latest)
    event = await alice.gets(f"{V3}/rooms/{room}/event/{root}")
    shown = event["unsigned"]["m.relations"]["m.thread"]["latest_event"]
    assert said(shown) == "1" and "m.relations" not in shown.get("unsigned", {}), "threads do not nest"
