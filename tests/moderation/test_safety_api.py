"""The API of moderation as a program uses it: scopes, versions, idempotency, signed decisions; and the command line."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import orjson
import pytest

from relay.__main__ import main
from relay.clock import HOUR
from relay.moderation import signatures
from tests.moderation.casehouse import FACTS, SAFETY, Desk, casework, desk, reports
from tests.moderation.tools import SECRET
from tests.people import Person, path
from tests.town import Town

INTEGRATION = f"""
hooks:
  integrations:
    - {{name: triage, secrets: ["{SECRET}"], scopes: ["reports:decide"]}}
"""


async def reported(town: Town, mod: Desk) -> tuple[Person, Person, str, list[str]]:
    """Three messages of Bob's that Alice reports."""
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob)
    for _ in range(3):
        await reports(alice, room, await bob.sends(room))
    return alice, bob, room, [row["id"] for row in await mod.queue()]


async def test_tokens_do_what_their_scopes_say_and_count_a_day_later(town: Town) -> None:
    mod = await desk(town)
    alice, _, _, [first, *_] = await reported(town, mod)
    assert (
        await alice.is_refused(alice.calls("POST", f"{SAFETY}/tokens", {"name": "x", "scopes": ["audit:read"]}))
    ).status == 403
    made = await mod.asks("POST", "tokens", {"name": "tickets", "scopes": ["reports:read", "reports:decide"]})

    async def as_program(method: str, where: str, body: Any = None) -> Any:
        return await mod.person.calls(method, f"{SAFETY}/{where}", body, token=made["token"])

    assert "counts a day" in (await mod.person.is_refused(as_program("GET", "reports"))).text
    town.clock.forward(hours=25)
    assert len((await as_program("GET", "reports"))["reports"]) == 3
    for method, where in (
        ("GET", "audit"),
        ("GET", f"reports/{first}/envelopes"),
        ("POST", "tokens"),
        ("GET", "tokens"),
    ):
        assert (await mod.person.is_refused(as_program(method, where, {} if method == "POST" else None))).status == 403
    statement = {"reason_code": "x", "ground": "terms:1", "facts": FACTS}
    refused = await mod.person.is_refused(
        as_program("POST", f"reports/{first}/decision", {**statement, "action": "suspend"})
    )
    assert "users:act" in refused.text
    assert (await as_program("POST", f"reports/{first}/decision", {**statement, "action": "none"}))["measures"] == []
    [shown] = (await mod.asks("GET", "tokens"))["tokens"]
    assert shown["name"] == "tickets" and made["token"] not in str(shown)
    await mod.asks("DELETE", f"tokens/{shown['id']}")
    assert (await mod.person.is_refused(as_program("GET", "reports"))).errcode == "M_UNKNOWN_TOKEN"
    assert (await mod.person.is_refused(mod.person.calls("GET", f"{SAFETY}/reports", token=""))).status == 401


async def test_working_on_cases(town: Town) -> None:
    mod = await desk(town)
    _, bob, room, [first, second, third] = await reported(town, mod)
    other = await town.user("other@one")
    await mod.house.command("user.admin", user="other", admin=True)

    answer, shown = await mod.person.asks("GET", f"{SAFETY}/reports/{first}")
    assert answer.headers["ETag"] == '"1"' and shown["history"][0]["action"] == "report.created"
    assert [row["id"] for row in await mod.queue(limit=1)] == [first] and (await _page(mod, first))["next"] == 1
    await mod.asks("POST", f"reports/{first}/assign", {}, If_Match='"1"')
    taken = await other.is_refused(other.calls("POST", f"{SAFETY}/reports/{first}/assign", {"take": True}))
    assert taken.status == 409 and "Another moderator" in taken.text
    town.clock.forward(minutes=31)
    await other.calls("POST", f"{SAFETY}/reports/{first}/assign", {"take": True})  # the lease is over
    await other.calls("POST", f"{SAFETY}/reports/{first}/assign", {"take": False})

    # Sorting by category changes when it is due; two reports of the same are decided together.
    sorted_ = await mod.asks("POST", f"reports/{second}/sort", {"category": "threat", "state": "escalated"})
    assert sorted_["due"] - sorted_["created"] == 4 * HOUR
    assert next(row["id"] for row in await mod.queue()) == second, "what is due first comes first"
    await mod.asks("POST", f"reports/{third}/join", {"into": first})
    assert [row["id"] for row in await mod.queue()] == [second, first]
    for odd in ({"into": third}, {"into": "x" * 22}):
        assert (await mod.person.is_refused(mod.asks("POST", f"reports/{second}/join", odd))).status in (404, 409)
    await mod.asks("POST", f"reports/{first}/note", {"text": "ask her for a proof"})
    assert (await mod.reads(first))["note"] == [{"by": mod.person.id, "words": "ask her for a proof"}]

    # The same key twice is one decision; closing comes after it.
    assert (await mod.person.is_refused(mod.asks("POST", f"reports/{first}/close", {}))).status == 409
    body = {"action": "warn", "reason_code": "harassment", "law_ref": "§ 185", "facts": FACTS}
    once = await mod.asks("POST", f"reports/{first}/decision", body, Idempotency_Key="k1")
    again = await mod.asks("POST", f"reports/{first}/decision", body, Idempotency_Key="k1")
    assert once == again and once["ground"] == "law:§ 185" and once["measures"][0]["target"] == bob.id
    assert (
        await mod.person.is_refused(mod.asks("POST", f"reports/{first}/decision", body, Idempotency_Key="k2"))
    ).status == 409
    assert (await mod.asks("GET", f"reports/{third}"))["state"] == "decided"
    assert (await mod.asks("POST", f"reports/{first}/close", {}))["state"] == "closed"
    unknown = await mod.person.is_refused(mod.asks("POST", f"reports/{second}/decision", {**body, "mistake": 1}))
    assert "safety-api" in unknown.text

    # A report that may show a minor: due at once, for a year, told with no more than that it is urgent.
    await mod.asks("POST", f"reports/{second}/sort", {"category": "minor"})
    work = casework(mod.house)
    case = await work.cases.get(second)
    assert case.keep_until - case.created_ts >= 365 * 24 * HOUR
    town.clock.forward(hours=5)
    await work.keeping.look()
    assert (await work.cases.get(second)).late_told
    assert (await mod.person.is_refused(mod.asks("GET", "transparency/2026-13"))).status == 400
    assert (await mod.asks("GET", "audit", None))["restored"] is None
    del room


async def _page(mod: Desk, _: str) -> Any:
    return await mod.person.calls("GET", f"{SAFETY}/reports", limit=1)


async def test_a_signed_decision_counts_once_and_only_for_what_it_names(town: Town) -> None:
    house = await town.relay("one", INTEGRATION)
    mod = await desk(town)
    _, bob, _, [first, second, _] = await reported(town, mod)

    async def signed(case_id: str, message_id: str, **changed: Any) -> Any:
        body = {
            "aud": house.name, "purpose": "decision", "report_id": case_id, "version": 1, "action": "suspend",
            "reason_code": "spam", "ground": "terms:3", "facts": FACTS, **changed,
        }  # fmt: skip
        raw = orjson.dumps(body)
        headers = signatures.headers([SECRET], message_id, int(time.time() * 1000), raw)
        return await mod.person.calls("POST", f"{SAFETY}/reports/{case_id}/decision", raw, token="", headers=headers)

    for message_id, changed in (
        ("m1", {"aud": "else.example"}),
        ("m2", {"version": 2}),
        ("m3", {"report_id": second}),
        ("m4", {"purpose": "x"}),
    ):
        assert (await mod.person.is_refused(signed(first, message_id, **changed))).status in (400, 403, 409, 412)
    refused = await mod.person.is_refused(signed(first, "m5", action="deactivate"))
    assert refused.status == 403, "a machine takes only what can be taken back"
    made = await signed(first, "m6", lasts_ms=30 * 24 * HOUR)
    assert made["automated"] and made["decider"] == "integration:triage"
    assert made["measures"][0]["until"] <= made["decided"] + 25 * HOUR, "for a day at most"
    assert (await mod.person.is_refused(signed(second, "m6"))).status == 409, "its ID is used up"
    history = (await mod.asks("GET", f"reports/{first}"))["history"]
    assert all(entry["automated"] for entry in history if entry["actor"] == "integration:triage")
    assert (await bob.is_refused(bob.creates_room())).errcode == "M_USER_SUSPENDED"


async def test_the_command_line_lists_shows_and_decides(town: Town, capsys: pytest.CaptureFixture[str]) -> None:
    house = await town.relay("one")
    alice, bob = await town.users("alice@one", "bob@one")
    room = await alice.creates_room(with_=bob)
    said = await bob.sends(room)
    await alice.calls("POST", f"rooms/{path(room)}/report/{path(said)}", {"reason": "unpleasant"})
    await house.stop()  # the commands open the folder themselves

    async def line(*words: str) -> tuple[int, str]:
        status = await asyncio.to_thread(main, [*words, "--data", str(house.folder)])
        told = capsys.readouterr()
        return status, told.out + told.err

    status, out = await line("report", "list", "--json")
    [row] = json.loads(out)
    assert status == 0 and {k: row[k] for k in ("event_id", "room_id", "user_id", "category", "state", "disclosure")} == {
        "event_id": said, "room_id": room, "user_id": bob.id, "category": "other", "state": "new", "disclosure": "undisclosed",
    }  # fmt: skip
    assert "1  other" in (await line("report", "list"))[1]
    decide = [
        "report",
        "decide",
        "1",
        "--measure",
        "suspend",
        "--reason-code",
        "harassment",
        "--terms",
        "4.2",
        "--facts",
    ]
    status, out = await line(*decide, "short")
    assert status == 1 and "in your own words" in out
    status, out = await line(*decide, FACTS, "--hours", "24")
    assert status == 0 and f"suspend {bob.id}: done" in out
    assert "decided" in (await line("report", "show", row["id"]))[1]
    since = town.folder / "last.json"
    status, out = await line("moderation", "verify", "--since", str(since))
    assert status == 0 and "nothing was changed" in out
    assert (await line("moderation", "verify", "--since", str(since)))[0] == 0, "it extends what is held"
    held = json.loads(since.read_text())
    since.write_text(json.dumps({**held, "hash": "A" * 43}))
    status, out = await line("moderation", "verify", "--since", str(since))
    assert status == 1 and "rewritten" in out


async def test_a_token_takes_nothing_back_and_shuts_out_no_server_without_the_scope(town: Town) -> None:
    mod = await desk(town)
    _, bob, _, [first, second, _] = await reported(town, mod)
    other = await town.user("other@one")
    await mod.house.command("user.admin", user="other", admin=True)
    tokens = [
        (await other.calls("POST", f"{SAFETY}/tokens", {"name": "x", "scopes": scopes}))["token"]
        for scopes in (["reports:read", "reports:decide"], ["reports:decide", "users:act"])
    ]
    town.clock.forward(hours=25)
    await mod.decides(first, {"measure": "suspend"})
    await casework(mod.house).appeals.file(first, bob.id, "It was a joke.")
    why = {"reason_code": "mistake", "ground": "terms:1", "facts": FACTS}
    for more in ({}, {"measures": [{"measure": "lock"}]}):
        answer = {"verdict": "reversed", **why, **more}
        refused = await other.is_refused(
            other.calls("POST", f"{SAFETY}/reports/{first}/appeal", answer, token=tokens[0])
        )
        assert "users:act" in refused.text
    assert (await bob.is_refused(bob.creates_room())).errcode == "M_USER_SUSPENDED", "nothing was taken back"
    blocks = {**why, "action": "block_server", "target": "else.example"}
    refused = await other.is_refused(
        other.calls("POST", f"{SAFETY}/reports/{second}/decision", blocks, token=tokens[1])
    )
    assert "federation:write" in refused.text

    # The operator stops a moderator: her tokens stop with her.
    assert await other.calls("GET", f"{SAFETY}/reports", token=tokens[0])
    await mod.house.command("user.lock", user="other")
    assert (await mod.person.is_refused(mod.person.calls("GET", f"{SAFETY}/reports", token=tokens[0]))).status == 403
