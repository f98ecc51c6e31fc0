"""The list of moderators' keys in a running relay: a new key waits a day and is announced, the old ones rewrap for it, a removed
one opens nothing a day later, and every key has to show now and then that it still works."""

from __future__ import annotations

import json
from typing import Any

import pytest

from relay.clock import DAY
from relay.errors import ApiError
from relay.moderation import envelope, key_list
from relay.moderation.envelope import Envelope, NotOpened, Recipient
from relay.moderation.moderator_keys import proof_of
from relay.moderation.moderator_secret import ModeratorSecret
from relay.moderation.proving import Proving
from relay.protocol.canonical import to_base64
from tests.people import Person, until
from tests.town import Town, Within


class Desk:
    """Alice runs the relay and has the first key; the recovery key is hers too."""

    def __init__(self, town: Town, house: Within, alice: Person) -> None:
        self.town, self.house, self.alice = town, house, alice
        self.own, self.recovery = ModeratorSecret.make(), ModeratorSecret.make()

    @property
    def parts(self) -> Proving:
        assert self.house.server is not None
        return self.house.server.moderation.proving

    def now(self) -> int:
        return self.town.clock.now()

    async def begins(self) -> None:
        await self.house.command("user.admin", user=self.alice.id, admin=True)
        keys = ((self.alice.id, "moderator", self.own.public), (self.alice.id, "recovery", self.recovery.public))
        first = key_list.first(self.house.name, keys, self.recovery, self.now())  # type: ignore[arg-type]
        await self.parts.keys.take(first.statement, "operator")

    async def current(self) -> key_list.KeyList:
        current = await self.parts.keys.current()
        assert current is not None
        return current

    async def adds(self, person: Person, key: ModeratorSecret) -> None:
        after = key_list.added(await self.current(), person.id, "moderator", key.public, self.own, self.now())
        await self.parts.keys.take(after.statement, self.alice.id)

    async def seals(self, case_id: str, text: bytes, kind: str = "words", *about: str) -> dict[str, Any] | None:
        sealed = await self.parts.envelopes.prepare(case_id, kind, text, about)
        if sealed is None:
            return None
        assert self.house.server is not None
        with self.house.server.db.write() as tx:
            self.parts.envelopes.store(tx, sealed)
        await tx
        return (await self.parts.envelopes.of_case(case_id))[-1]


@pytest.fixture
async def desk(town: Town) -> Desk:
    alice = await town.user("alice@one")
    house = await town.relay("one")
    desk = Desk(town, house, alice)
    assert not await desk.parts.envelopes.can_seal() and await desk.seals("c", b"x") is None, "no key, no text"
    assert "no moderators' keys" in (await desk.parts.keys.check())[0]["what"]
    await desk.begins()
    return desk


def opened(one: dict[str, Any], secret: ModeratorSecret) -> bytes:
    return envelope.open_with(secret, Envelope.read(one), case_id=one["case_id"], version=one["version"])


async def test_a_new_moderator(desk: Desk) -> None:
    bob = await desk.town.user("bob@one")
    keys, hers = desk.parts.keys, ModeratorSecret.make()
    old = await desk.seals("case-1", b"before her time")
    about_her = await desk.seals("case-2", b"about bob", "words", bob.id)
    assert old is not None and about_her is not None
    await desk.adds(bob, hers)
    assert not await keys.is_moderator(bob.id), "not before somebody could object"
    meanwhile = await desk.seals("case-1", b"while she waits")
    assert meanwhile is not None and hers.public.key_id not in meanwhile["wraps"]
    assert [one["state"] for one in await keys.listing()] == ["counts", "counts", "waits"]
    assert any("counts from tomorrow on" in one["what"] for one in await keys.check()), "the operator is told too"
    refused = await bob.is_refused(bob.calls("GET", "/_relay/safety/v1/keys"))
    assert refused.errcode == "M_FORBIDDEN"

    desk.town.clock.forward(hours=24)
    assert await keys.is_moderator(bob.id) and (await keys.enrolled_ts(bob.id) or 0) <= desk.now()
    assert {one.user_id: one.admin for one in await keys.moderators()} == {desk.alice.id: True, bob.id: False}
    now = await desk.seals("case-1", b"from now on")
    assert now is not None and opened(now, hers) == b"from now on"
    with pytest.raises(NotOpened):
        opened(old, hers)
    assert any("can't be opened yet" in one["what"] for one in await desk.parts.envelopes.check())

    # Alice's browser looks what is to be rewrapped, for keys of a list that it has checked itself.
    answer = await desk.alice.calls("GET", "/_relay/safety/v1/keys")
    pinned = key_list.follow_chain(None, answer["chain"])
    waiting = await desk.alice.calls("GET", f"/_relay/safety/v1/keys/{desk.own.public.key_id}/unwrapped")
    assert {one["case_id"] for one in waiting["envelopes"]} == {"case-1", "case-2"}
    for one in waiting["envelopes"]:
        lacks = [Recipient(k.key_id, k.user_id, k.public) for k in pinned.keys if k.key_id in one["lacks"]]
        wraps = {
            key_id: to_base64(wrap) for key_id, wrap in envelope.rewrap(desk.own, Envelope.read(one), lacks).items()
        }
        await desk.alice.calls("POST", f"/_relay/safety/v1/envelopes/{one['id']}/wraps", {"wraps": wraps})
    assert opened((await desk.parts.envelopes.of_case("case-1"))[0], hers) == b"before her time"
    assert not await desk.parts.envelopes.check()
    stranger = {ModeratorSecret.make().public.key_id: to_base64(bytes(80))}
    for wraps in (stranger, {hers.public.key_id: "AAAA"}):
        where = f"/_relay/safety/v1/envelopes/{old['id']}/wraps"
        assert (await desk.alice.is_refused(desk.alice.calls("POST", where, {"wraps": wraps}))).status == 400


async def test_nothing_is_sealed_to_the_person_it_is_about_not_even_later(desk: Desk) -> None:
    bob = await desk.town.user("bob@one")
    assert await desk.seals("case-1", b"about the only moderator", "words", desk.alice.id) is None
    hers = ModeratorSecret.make()
    about = await desk.seals("case-2", b"about bob", "words", bob.id)
    assert about is not None

    async def persons() -> dict[str, set[str]]:
        return {"case-2": {bob.id}}

    desk.parts.envelopes.persons_of = persons
    await desk.adds(bob, hers)
    desk.town.clock.forward(hours=24)
    again = await desk.seals("case-2", b"still about bob", "words", bob.id)
    assert again is not None and set(again["wraps"]) == {desk.own.public.key_id, desk.recovery.public.key_id}
    assert not await desk.parts.envelopes.unwrapped(desk.own.public.key_id), "nobody is asked to rewrap it for him"
    assert not await desk.parts.envelopes.check()
    # A third key lacks it: those who have it are asked, and he neither hears of it nor spoils it.
    carol, hers_too = await desk.town.user("carol@one"), ModeratorSecret.make()
    await desk.adds(carol, hers_too)
    desk.town.clock.forward(hours=24)
    where = f"/_relay/safety/v1/keys/{desk.own.public.key_id}/unwrapped"
    assert {one["case_id"] for one in (await desk.alice.calls("GET", where))["envelopes"]} == {"case-2"}
    his = where.replace(desk.own.public.key_id, hers.public.key_id)
    assert not (await bob.calls("GET", his))["envelopes"]
    with pytest.raises(ApiError, match="no such envelope"):
        await desk.parts.envelopes.take_wraps(about["id"], {hers_too.public.key_id: to_base64(bytes(80))}, bob.id)
    with pytest.raises(ApiError, match="may not open this case"):
        await desk.parts.envelopes.take_wraps(about["id"], {hers.public.key_id: to_base64(bytes(80))}, desk.alice.id)


async def test_a_removed_key_gets_nothing_new_and_opens_nothing_a_day_later(desk: Desk) -> None:
    bob = await desk.town.user("bob@one")
    hers = ModeratorSecret.make()
    await desk.adds(bob, hers)
    desk.town.clock.forward(hours=24)
    old = await desk.seals("case-1", b"shared")
    assert old is not None and opened(old, hers) == b"shared"
    after = key_list.removed(await desk.current(), [hers.public.key_id], desk.recovery, desk.now())
    await desk.parts.keys.take(after.statement, desk.alice.id)
    new = await desk.seals("case-1", b"without her")
    assert new is not None and hers.public.key_id not in new["wraps"]
    await desk.parts.envelopes.sweep()
    [kept, _] = await desk.parts.envelopes.of_case("case-1")
    assert hers.public.key_id in kept["wraps"], "a removal can be taken back for a day"
    desk.town.clock.forward(hours=25)

    async def gone() -> bool:
        return hers.public.key_id not in (await desk.parts.envelopes.of_case("case-1"))[0]["wraps"]

    assert await until(gone), "the wraps are deleted by themselves"
    assert opened((await desk.parts.envelopes.of_case("case-1"))[0], desk.own) == b"shared"
    assert not await desk.parts.keys.is_moderator(bob.id)


async def test_what_is_not_signed_right_is_refused(desk: Desk) -> None:
    bob = await desk.town.user("bob@one")
    current = await desk.current()
    stranger, now = ModeratorSecret.make(), desk.now()
    bad = {
        "a stranger's signature": key_list.added(current, bob.id, "moderator", stranger.public, stranger, now).statement,
        "an account that is not here": key_list.added(current, "@x:elsewhere", "moderator", stranger.public, desk.own, now).statement,
        "a time long ago": key_list.added(current, bob.id, "moderator", stranger.public, desk.own, now - DAY).statement,
        "a time to come": key_list.added(current, bob.id, "moderator", stranger.public, desk.own, now + DAY).statement,
        "nothing": {},
        "a list": [],
    }  # fmt: skip
    for name, statement in bad.items():
        refused = await desk.alice.is_refused(desk.alice.calls("POST", "/_relay/safety/v1/keys", statement))
        assert refused.status == 400 and refused.text[0].isupper(), f"{name}: {refused}"
    assert (await desk.current()).digest == current.digest
    right = key_list.added(current, bob.id, "moderator", stranger.public, desk.own, now).statement
    assert (await bob.is_refused(bob.calls("POST", "/_relay/safety/v1/keys", right))).status == 403, (
        "only a moderator hands it in"
    )
    told = await desk.alice.calls("POST", "/_relay/safety/v1/keys", right)
    assert told["seq"] == 1
    twice = await desk.alice.is_refused(desk.alice.calls("POST", "/_relay/safety/v1/keys", right))
    assert "changed meanwhile" in twice.text
    rows = [one for one in await log(desk) if one["action"] == "keys.changed"]
    assert [row["actor"] for row in rows] == [desk.alice.id, "operator"], "each change stands in the audit log"
    assert rows[0]["detail"]["digest"] == told["digest"]


async def log(desk: Desk) -> list[dict[str, Any]]:
    assert desk.house.server is not None
    return [entry.as_json() for entry in await desk.house.server.moderation.audit_log.page()]


async def test_each_key_shows_every_ninety_days_that_it_opens_something(desk: Desk) -> None:
    keys = desk.parts.keys
    assert (await keys.check())[0]["severity"] == "ok"
    desk.town.clock.forward(hours=24 * 91)
    silent = [one for one in await keys.check() if "proved nothing for 90 days" in one["what"]]
    assert len(silent) == 2
    where = f"/_relay/safety/v1/keys/{desk.own.public.key_id}/test"
    test = await desk.alice.calls("GET", where)
    with pytest.raises(NotOpened):
        opened(test, desk.recovery)
    nonce = opened(test, desk.own)
    wrong = await desk.alice.is_refused(desk.alice.calls("POST", where, {"answer": to_base64(proof_of(b"guessed"))}))
    assert wrong.status == 403
    await desk.alice.calls("POST", where, {"answer": to_base64(proof_of(nonce))})
    again = await desk.alice.is_refused(desk.alice.calls("POST", where, {"answer": to_base64(proof_of(nonce))}))
    assert again.status == 403, "an answer is good once"
    silent = [one for one in await keys.check() if "proved nothing for 90 days" in one["what"]]
    assert len(silent) == 1 and "recovery" in silent[0]["what"], "the other one still has to"


async def test_what_is_sealed_is_named_in_the_log_by_its_hash(desk: Desk) -> None:
    one = await desk.seals("case-1", b"a text")
    other = await desk.seals("case-1", b"another")
    assert one is not None and other is not None and (one["version"], other["version"]) == (1, 2)
    rows = [row for row in await log(desk) if row["action"] == "envelope.sealed"]
    assert {row["detail"]["sha256"] for row in rows} == {one["sha256"], other["sha256"]}
    assert json.dumps(rows).count("a text") == 0
    with pytest.raises(ApiError, match="MiB"):
        await desk.parts.envelopes.prepare("case-1", "words", bytes(5 * 2**20))


async def test_nobody_spoils_the_test_that_another_is_answering_nor_what_she_will_open(desk: Desk) -> None:
    bob, hers, carol, carols = (
        await desk.town.user("bob@one"), ModeratorSecret.make(), await desk.town.user("carol@one"), ModeratorSecret.make(),
    )  # fmt: skip
    await desk.adds(bob, hers)
    desk.town.clock.forward(hours=24)
    where = f"/_relay/safety/v1/keys/{desk.own.public.key_id}"
    nonce = opened(await desk.alice.calls("GET", f"{where}/test"), desk.own)
    for method, name, body in (("GET", "test", None), ("POST", "test", {"answer": "x"}), ("GET", "unwrapped", None)):
        assert "not yours" in (await bob.is_refused(bob.calls(method, f"{where}/{name}", body))).text
    await desk.alice.calls("POST", f"{where}/test", {"answer": to_base64(proof_of(nonce))})

    # Whoever can't open an envelope puts nothing in the place of what would open it; what is fetched to rewrap is logged.
    old = await desk.seals("case-1", b"before his key counted")
    await desk.adds(carol, carols)
    desk.town.clock.forward(hours=24)
    assert old is not None
    dan, dans = await desk.town.user("dan@one"), ModeratorSecret.make()
    await desk.adds(dan, dans)
    desk.town.clock.forward(hours=24)
    wraps = {"wraps": {dans.public.key_id: to_base64(bytes(80))}}
    refused = await carol.is_refused(carol.calls("POST", f"/_relay/safety/v1/envelopes/{old['id']}/wraps", wraps))
    assert "no key that opens this" in refused.text
    assert (await bob.calls("GET", f"/_relay/safety/v1/keys/{hers.public.key_id}/unwrapped"))["envelopes"]
    assert ("evidence.fetched", bob.id, "rewrap") in [
        (e["action"], e["actor"], e["reason_code"]) for e in await log(desk)
    ]
