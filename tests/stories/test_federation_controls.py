"""The operator's lists of servers: whoever is shut out gets nothing in and nothing out, by no path, from the reload on."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import pytest

from relay import config
from relay.__main__ import main
from relay.control import CommandFailed
from relay.errors import RemoteError
from tests.forger import Forger
from tests.people import ciphertext, path, until
from tests.town import Town, Within


async def sets_lists(house: Within, **lists: list[str]) -> dict[str, Any]:
    """Writes them into the config of a relay that runs, and has it read."""
    file = house.folder / config.CONFIG_NAME
    lines = [line for line in file.read_text().splitlines() if not line.startswith("federation:")]
    said = "".join(f", {name}: {patterns}" for name, patterns in lists.items())
    lines.append(f"federation: {{extra_ca_file: ca.crt, outbox_backoff_min: 1s, request_timeout: 10s{said}}}")
    file.write_text("\n".join(lines) + "\n")
    answer: dict[str, Any] = await house.command("reload")
    return answer


async def rows(house: Within, table: str) -> int:
    assert house.server is not None
    return int(await house.server.db.read(lambda query: query.value(f"SELECT count(*) FROM {table}")))


async def test_a_server_is_shut_out_and_let_in_again(town: Town) -> None:
    alice, bob, carol = await town.users("alice@one", "bob@two", "carol@three")
    one = await town.relay("one")
    room = await alice.creates_room(with_=[bob, carol])
    await alice.syncs()
    assert await bob.sees(await alice.sends(room)) and await alice.sees(await bob.sends(room))
    picture = await bob.uploads(os.urandom(300))
    await alice.downloads(picture)

    answer = await sets_lists(one, deny=[bob.server])
    assert answer["taken_up"] == ["federation.deny"], "without a restart"

    # In: nothing that it signs is taken, and what others hand on is not shown.
    forger = Forger(town.houses["two"], one.name)  # type: ignore[arg-type]
    with pytest.raises(RemoteError, match="shut that server out"):
        await forger.asks("GET", f"/_matrix/federation/v1/query/profile?user_id={alice.id}")
    with pytest.raises(RemoteError, match="shut that server out"):
        await forger.transaction([(await forger.builds(room, bob.id, "m.room.encrypted", ciphertext())).pdu])
    unseen = await bob.sends(room)
    assert await carol.sees(unseen), "others hear it"
    after = await carol.sends(room)
    assert await alice.sees(after), "others are heard"
    assert await alice.does_not_see(unseen), "also by way of another server"

    # Out: no event, no key, no file, no question.
    silent = await alice.sends(room)
    assert await carol.sees(silent)
    assert await until(lambda: _is_zero(one, "destinations")), "nor is it kept for later"
    await alice.tells_devices("m.room.encrypted", {bob.id: {"*": _olm()}})
    assert await until(lambda: _is_zero(one, "departing_edus")), "nothing waits for it"
    for doing in (
        alice.invites_to(await alice.creates_room(), bob),
        alice.joins(f"#anywhere:{bob.server}"),
        alice.downloads(picture),
        alice.calls("GET", path("profile", bob.id)),
    ):
        assert (await alice.is_refused(doing)).status in (403, 404, 502)

    # A mistake in the file changes nothing.
    good = (one.folder / config.CONFIG_NAME).read_text()
    (one.folder / config.CONFIG_NAME).write_text(good.replace("deny:", "denny:"))
    with pytest.raises(CommandFailed, match="Did you mean deny"):
        await one.command("reload")
    (one.folder / config.CONFIG_NAME).write_text(good)

    await sets_lists(one)
    heard = await bob.sends(room)
    assert await alice.sees(heard), "let in again, it is heard"
    assert await bob.sees(await alice.sends(room)), "and hears"


async def test_only_those_on_the_list_pass(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@two")
    one = await town.relay("one")
    await sets_lists(one, allow=["*.example.org", "localhost:1"])
    refused = await alice.is_refused(alice.joins("#anywhere:" + bob.server))
    assert "shut that server out" in refused.text
    await sets_lists(one, allow=["*.example.org", "localhost*"])
    room = await alice.creates_room(with_=bob)
    assert await bob.sees(await alice.sends(room))


async def test_a_signal_has_the_lists_read_again(town: Town) -> None:
    """SIGHUP, as `systemctl reload` sends it; a file with a mistake changes nothing, and ends nothing."""
    one = await town.relay_apart("one")
    alice = await town.user("alice@one")
    file = one.folder / config.CONFIG_NAME
    good = file.read_text()

    async def signals(text: str, answer: str) -> bool:
        assert one.process is not None
        file.write_text(text)
        before = len(one.log.read_text())
        one.process.send_signal(signal.SIGHUP)
        return await until(lambda: answer in one.log.read_text()[before:], 30)

    denied = good.replace("federation: {", 'federation: {deny: ["localhost:9"], ')
    assert await signals(denied, "Taken up: federation.deny."), "it says what it did"
    assert "shut that server out" in (await alice.is_refused(alice.joins("#anywhere:localhost:9"))).text
    assert await signals(denied.replace("deny:", "denny:"), "Nothing was changed")
    assert "shut that server out" in (await alice.is_refused(alice.joins("#anywhere:localhost:9"))).text
    assert await signals(good, "Taken up: federation.deny.")
    assert "shut that server out" not in (await alice.is_refused(alice.joins("#anywhere:localhost:9"))).text
    assert one.process is not None and one.process.poll() is None


async def _is_zero(house: Within, table: str) -> bool:
    return await rows(house, table) == 0


def _olm() -> dict[str, Any]:
    return {
        "algorithm": "m.olm.v1.curve25519-aes-sha2",
        "sender_key": "k" * 43,
        "ciphertext": {"k" * 43: {"type": 0, "body": "QUJD" * 8}},
    }


async def test_a_server_is_forgotten(town: Town, capsys: pytest.CaptureFixture[str]) -> None:
    alice, bob = await town.users("alice@one", "bob@two")
    one = await town.relay("one")
    room = await alice.creates_room(with_=bob)
    mine, note = await alice.sends(room), ciphertext(120)
    his = await bob.sends(room, note)
    reported = await bob.sends(room, evidence := ciphertext(120))
    assert await bob.sees(mine) and await alice.sees(his) and await alice.sees(reported)
    await alice.calls("POST", path("rooms", room, "report", reported), {"reason": "this one"})
    picture = await bob.uploads(os.urandom(300))
    await alice.downloads(picture)
    unwanted = await bob.creates_room()
    await bob.invites_to(unwanted, alice)
    assert await alice.notices(lambda: unwanted in alice.invites)
    await bob.tells_devices("m.room.encrypted", {alice.id: {"*": _olm()}})
    assert await until(lambda: _is(one, "to_device_messages", 1))
    await bob.has_read(room, mine)
    assert await until(lambda: _is(one, "receipts", 1))

    await alice.history(room)  # whatever is kept in memory is there
    town.cut("one", "two")
    unsent = await alice.sends(room)
    await alice.tells_devices("m.room.encrypted", {bob.id: {"*": _olm()}})
    assert await until(lambda: _is(one, "destinations", 1)) and await until(lambda: _is(one, "departing_edus", 1))

    assert one.server is not None
    assert await one.server.rooms.shares_with(bob.server) and not await one.server.rooms.shares_with("far.example")

    # While she goes on.
    forgetting = asyncio.create_task(one.command("server.forget", server=bob.server))
    several = [await alice.sends(room) for _ in range(3)]
    removed = (await forgetting)["removed"]
    assert removed["Events and invites"] >= 2 and removed["Departures"] == 1
    assert await alice.notices(lambda: unwanted not in alice.invites), "the invite is gone at once"
    for table in ("to_device_messages", "receipts", "remote_media", "device_lists", "published_devices"):
        left = await _columns(one, table)
        assert bob.server not in left, f"{table} still knows of it"
    assert not any(path.is_file() for path in (one.folder / "media" / "remote").rglob("*")), "no copy of a file"
    kept = await _columns(one, "events")
    assert note["ciphertext"] not in kept, "nor of what was said"
    assert evidence["ciphertext"] in kept, "what was reported stays while its case lasts"
    shown = [e["event_id"] for e in await alice.history(room) if e["type"] == "m.room.encrypted"]
    assert set(shown) == {mine, reported, unsent, *several}
    assert not (await one.command("audit"))["findings"]
    town.mend("one", "two")
    assert await bob.sees(await alice.sends(room)) and await alice.sees(await bob.sends(room)), "the room goes on"

    # The same while it does not run.
    await one.stop()
    assert await asyncio.to_thread(main, ["server", "forget", one.name, "--data", str(one.folder)]) == 1
    assert "this relay itself" in capsys.readouterr().err
    assert await asyncio.to_thread(main, ["server", "forget", bob.server, "--data", str(one.folder)]) == 0
    assert "federation.deny" in capsys.readouterr().out
    await one.start()
    assert await bob.sees(await alice.sends(room)) and await alice.sees(await bob.sends(room))


async def _columns(house: Within, table: str) -> str:
    assert house.server is not None
    rows = await house.server.db.read(lambda query: query.all(f"SELECT * FROM {table}"))
    return repr(rows)


async def _is(house: Within, table: str, expected: int) -> bool:
    return await rows(house, table) == expected
