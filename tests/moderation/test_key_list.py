"""Moderators' keys, the signed list of them, and envelopes sealed to them: pure rules."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.clock import DAY
from relay.moderation import envelope, key_list
from relay.moderation.envelope import Envelope, NotOpened, Recipient, TooFewKeys
from relay.moderation.key_list import BadList, KeyList
from relay.moderation.moderator_secret import BadKey, ModeratorPublic, ModeratorSecret, lock, unlock

NOW = 1_700_000_000_000
ALICE, BOB = "@alice:one", "@bob:one"


class Desk:
    """Alice's key and the recovery key, and the first list, as `relay user add --admin` makes them."""

    def __init__(self) -> None:
        self.alice, self.recovery, self.bob = (ModeratorSecret.make() for _ in range(3))
        keys = ((ALICE, "moderator", self.alice.public), (ALICE, "recovery", self.recovery.public))
        self.first = key_list.first("one", keys, self.recovery, NOW)  # type: ignore[arg-type]

    def recipients(self, *others: ModeratorSecret) -> list[Recipient]:
        return [Recipient(one.public.key_id, ALICE, one.public) for one in (self.alice, self.recovery, *others)]


@pytest.fixture
def desk() -> Desk:
    return Desk()


# --- keys ----------------------------------------------------------------------------------------------------------


def test_a_key_can_be_written_down_and_read_again() -> None:
    secret = ModeratorSecret.make()
    assert ModeratorSecret.read(secret.text.upper().replace("-", " - ", 3)).raw == secret.raw, (
        "blanks and capitals do no harm"
    )
    assert ModeratorPublic.read(secret.public.text) == secret.public
    with pytest.raises(BadKey, match="begins with rmk1-"):
        ModeratorSecret.read(secret.public.text)


@given(st.integers(5, 40), st.sampled_from("abcdefgh234567"))
def test_a_slip_in_a_copied_key_is_noticed(at: int, letter: str) -> None:
    text = ModeratorSecret(bytes(range(32))).text
    if text[at] in ("-", letter):
        return
    with pytest.raises(BadKey):
        ModeratorSecret.read(text[:at] + letter + text[at + 1 :])


def test_a_key_is_kept_under_a_passphrase() -> None:
    secret = ModeratorSecret.make()
    kept = lock(secret, "a good passphrase", iterations=1000)
    assert secret.text not in str(kept) and base64.b64encode(secret.raw).decode() not in str(kept)
    assert unlock(kept, "a good passphrase") == secret
    with pytest.raises(BadKey, match="passphrase does not open"):
        unlock(kept, "another one")
    with pytest.raises(BadKey):
        unlock({**kept, "iterations": 10**12}, "a good passphrase")
    with pytest.raises(BadKey):
        unlock({**kept, "locked": 5}, "a good passphrase")
    assert "raw" not in repr(secret), "a key never shows itself by accident"


# --- the list ------------------------------------------------------------------------------------------------------


def test_the_first_list_is_signed_by_its_recovery_key(desk: Desk) -> None:
    key_list.follow(None, key_list.read(desk.first.statement))
    keys = ((ALICE, "moderator", desk.alice.public), (ALICE, "recovery", desk.recovery.public))
    by_another = key_list.first("one", keys, desk.alice, NOW)  # type: ignore[arg-type]
    with pytest.raises(BadList, match="own recovery key"):
        key_list.follow(None, by_another)


def test_a_new_key_is_signed_by_one_that_counts_and_waits_a_day(desk: Desk) -> None:
    second = key_list.added(desk.first, BOB, "moderator", desk.bob.public, desk.alice, NOW)
    key_list.follow(desk.first, key_list.read(second.statement))
    assert len(second.active(NOW + DAY - 1)) == 2 and len(second.active(NOW + DAY)) == 3
    too_early = key_list.added(second, BOB, "moderator", ModeratorSecret.make().public, desk.bob, NOW + 1)
    with pytest.raises(BadList, match="no key that counts now"):
        key_list.follow(second, too_early)
    key_list.follow(second, key_list.removed(second, [desk.bob.public.key_id], desk.recovery, NOW + 1))


def forgeries(desk: Desk) -> dict[str, Callable[[KeyList], Any]]:
    stranger = ModeratorSecret.make()

    def resigned(one: KeyList, **change: Any) -> dict[str, Any]:
        """With the right key, but saying something that may not be."""
        statement = {**one.statement, **change}
        from relay.moderation.moderator_secret import signed_bytes
        from relay.protocol.canonical import to_base64

        return {**statement, "signature": to_base64(desk.alice.sign(signed_bytes(statement)))}

    return {
        "signed by a stranger": lambda one: key_list.added(desk.first, BOB, "moderator", stranger.public, stranger, NOW).statement,
        "changed after it was signed": lambda one: {**one.statement, "made_ts": NOW + 5},
        "a key that counts at once": lambda one: resigned(one, keys=[*one.statement["keys"][:2], {**one.statement["keys"][2], "active_ts": NOW}]),
        "a version left out": lambda one: resigned(one, seq=2),
        "another history": lambda one: resigned(one, prev="x"),
        "another relay": lambda one: resigned(one, server="two"),
        "without a recovery key": lambda one: resigned(one, keys=[k for k in one.statement["keys"] if k["kind"] != "recovery"]),
        "with a single key": lambda one: resigned(one, keys=one.statement["keys"][:1]),
        "a listed key was changed": lambda one: resigned(one, keys=[{**one.statement["keys"][0], "user_id": BOB}, *one.statement["keys"][1:]]),
        "an ID that is not the key's": lambda one: resigned(one, keys=[{**one.statement["keys"][0], "key_id": "0" * 32}, *one.statement["keys"][1:]]),
        "from before": lambda one: resigned(one, made_ts=NOW - 1),
        "no list at all": lambda one: [],
    }  # fmt: skip


def test_no_forged_list_follows(desk: Desk) -> None:
    second = key_list.added(desk.first, BOB, "moderator", desk.bob.public, desk.alice, NOW)
    for name, forge in forgeries(desk).items():
        with pytest.raises(BadList):
            key_list.follow(desk.first, key_list.read(forge(second)))
            pytest.fail(f"this list was taken: {name}")


def test_whoever_opens_pins_the_list(desk: Desk) -> None:
    second = key_list.added(desk.first, BOB, "moderator", desk.bob.public, desk.alice, NOW)
    assert key_list.follow_chain(None, [desk.first.statement, second.statement]).seq == 1
    assert key_list.follow_chain(desk.first, [desk.first.statement, second.statement]).seq == 1
    other = Desk()
    with pytest.raises(BadList, match="does not follow from the one you saw last"):
        key_list.follow_chain(desk.first, [other.first.statement])
    with pytest.raises(BadList, match="no list"):
        key_list.follow_chain(desk.first, [])


# --- envelopes -----------------------------------------------------------------------------------------------------


def test_every_listed_key_opens_an_envelope_and_no_other_does(desk: Desk) -> None:
    made = envelope.seal(b"a text", case_id="c", version=1, to=desk.recipients())
    for secret in (desk.alice, desk.recovery):
        assert envelope.open_with(secret, Envelope.read(made.json()), case_id="c", version=1) == b"a text"
    with pytest.raises(NotOpened, match="not sealed to your key"):
        envelope.open_with(desk.bob, made, case_id="c", version=1)
    assert b"a text" not in str(made.json()).encode() + repr(made).encode()


def test_nothing_is_sealed_to_a_single_key(desk: Desk) -> None:
    with pytest.raises(TooFewKeys):
        envelope.seal(b"a text", case_id="c", version=1, to=desk.recipients()[:1])
    with pytest.raises(TooFewKeys):
        envelope.seal(b"a text", case_id="c", version=1, to=[desk.recipients()[0]] * 2)


def test_case_key_and_version_are_all_checked(desk: Desk) -> None:
    made = envelope.seal(b"a text", case_id="c", version=1, to=desk.recipients())
    alice, recovery = desk.alice.public.key_id, desk.recovery.public.key_id
    swapped = {alice: made.wraps[recovery], recovery: made.wraps[alice]}
    forged = {
        "asked as another case": (made, "d", 1),
        "asked as another version": (made, "c", 2),
        "relabelled as another case": (replace(made, case_id="d"), "d", 1),
        "relabelled as another version": (replace(made, version=2), "c", 2),
        "the wrap of another key": (replace(made, wraps=swapped), "c", 1),
        "a changed text": (replace(made, body=bytes([made.body[0] ^ 1]) + made.body[1:]), "c", 1),
        "a changed wrap": (replace(made, wraps={alice: b"\0" + made.wraps[alice][1:]}), "c", 1),
        "a wrap of nothing": (replace(made, wraps={alice: b""}), "c", 1),
    }
    for name, (one, case_id, version) in forged.items():
        with pytest.raises(NotOpened):
            envelope.open_with(desk.alice, one, case_id=case_id, version=version)
            pytest.fail(f"this was opened: {name}")


def test_a_moderator_rewraps_for_a_key_that_came_later(desk: Desk) -> None:
    made = envelope.seal(b"a text", case_id="c", version=1, to=desk.recipients())
    more = envelope.rewrap(desk.alice, made, desk.recipients(desk.bob)[2:])
    after = replace(made, wraps={**made.wraps, **more})
    assert envelope.open_with(desk.bob, after, case_id="c", version=1) == b"a text"
    assert after.digest == made.digest, "the log names the same sealed text"


@pytest.mark.parametrize("value", [{}, {"v": 1}, {"v": 2}, {"v": 1, "case_id": "c", "version": 1, "iv": "!", "body": "", "wraps": {}}, {"v": 1, "case_id": "c", "version": "1"}])  # fmt: skip
def test_what_is_no_envelope_is_refused(value: dict[str, Any]) -> None:
    with pytest.raises(NotOpened):
        Envelope.read(value)
