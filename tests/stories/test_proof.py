"""A report with proof from end to end, over the wire and the command line: what the moderator reads is what was sent, and no byte
of it lies readable on any disk, neither while the relays run nor after one was killed."""

from __future__ import annotations

import asyncio
import base64
import json
import resource
import sys

from relay.moderation import megolm
from relay.moderation.disclosure_form import KEY, Item, item_json
from tests.canaries import Canaries
from tests.moderation.sessions import Session
from tests.moderation.test_disclosure import needles
from tests.people import Person, path, until
from tests.town import PASSWORD, ROOT, Town


async def test_from_the_report_to_the_moderators_own_machine(town: Town) -> None:
    town.log_level = "debug"
    one, two = await town.relay_apart("one"), await town.relay_apart("two")
    status, said = await one.command(
        "user", "add", "mod", "--admin", "--password-stdin", "--json", given=PASSWORD + "\n"
    )
    assert status == 0, said
    keys = json.loads(said)
    alice, eve = await town.users("alice@one", "eve@two")
    mod = Person(town.http, one.url, one.name, "mod", PASSWORD)
    await mod.signs_in()
    canaries = Canaries()
    insult, thumbnail, why = canaries("an insult"), canaries("what was taken back"), canaries("the reporter's words")
    room = await eve.creates_room(with_=alice)
    session = Session()
    first = await eve.sends(room, session.says(room, insult))
    second = await eve.sends(room, session.says(room, thumbnail))
    assert await alice.sees(second)
    taken = await eve.redacts(room, second)
    assert await alice.sees(taken), "taken back, so no client shows it any more"

    items = [item_json(Item(first, 0, session.prk(0))), item_json(Item(second, 1, session.prk(1)))]
    body = {
        "reason": why,
        KEY: {"v": 1, "alg": megolm.ALGORITHM, "category": "harassment", "good_faith": True, "items": items},
    }
    await alice.calls("POST", path("rooms", room, "report", first), body)
    greedy = {"reason": why, KEY: {"v": 1, "ratchet": "A"}}
    refused = await alice.is_refused(alice.calls("POST", path("rooms", room, "report", second), greedy))
    assert "later messages too" in refused.text, "what would open more than one message is not even read"

    cases = (await mod.calls("GET", "/_relay/safety/v1/reports"))["reports"]
    [case] = [one for one in cases if one["disclosure"] == "verified_remote"]
    envelopes = await mod.calls("GET", f"/_relay/safety/v1/reports/{case['id']}/envelopes")
    saved, key = town.folder / "case.json", town.folder / "mod.key"
    saved.write_text(json.dumps(envelopes))
    key.write_text(keys["moderator_key"])
    opened = await on_her_own_machine("desk", "open", str(saved), "--key", str(key), "--json")
    messages = [message for one in opened for message in one.get("messages", ())]
    assert [(m["event_id"], m["result"], m["attested_by"]) for m in messages] == [
        (first, "verified_remote", eve.server), (second, "verified_remote", eve.server),
    ]  # fmt: skip
    assert insult in messages[0]["text"] and thumbnail in messages[1]["text"], "word for word, also what was taken back"
    assert all(m["checked_again"] == "holds" for m in messages), "checked again on the moderator's machine"
    assert any(why in json.dumps(one) for one in opened), "and the reporter's own words are sealed beside it"
    for file in (saved, key):
        file.unlink()

    assert one.process is not None
    if sys.platform == "linux":
        soft_and_hard = resource.prlimit(one.process.pid, resource.RLIMIT_CORE)
        assert soft_and_hard == (0, 0), "no core dump writes its memory to a disk"

    def found() -> list[str]:
        files = [*one.files(), *two.files(), *town.folder.glob("*.log")]
        hits = canaries.found_in(files)
        for file in files:
            content = file.read_bytes()
            for index in (0, 1):
                hits += [
                    f"{name} in {file.name}"
                    for name, needle in needles(session.prk(index)).items()
                    if needle in content
                ]
            for secret in (keys["moderator_key"], keys["recovery_key"]):
                raw = base64.b32decode(secret.removeprefix("rmk1-").replace("-", "").upper() + "======")[:32]
                hits += [
                    f"a private key in {file.name}"
                    for form in (secret.encode(), raw, raw.hex().encode())
                    if form in content
                ]
        return hits

    assert not found()
    await one.kill()
    assert not found(), "nor where the relay was killed"
    await one.start()
    assert await until(lambda: not found())
    status, said = await one.command("check")
    assert status == 0 and "sealed to 2 moderators' keys" in said, said


async def on_her_own_machine(*words: str) -> list[dict[str, object]]:
    """`relay …` without a data folder."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "relay", *words, cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    said, wrong = await process.communicate()
    assert process.returncode == 0, wrong.decode()
    answer: list[dict[str, object]] = json.loads(said)
    return answer
