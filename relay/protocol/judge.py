"""The verdict on an event from another server: PDU checks 4, 5 and 6, in the standard's order.

Checks 1 to 3 (format, signatures, hash) come before: `event.parse`, whoever has the keys, `event.hash_matches`.
Check 7 (policy server) comes after. Spec: server-server-api/#checks-performed-on-receipt-of-a-pdu
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Literal

from relay.errors import NotAllowed
from relay.protocol.auth import check, check_auth_events
from relay.protocol.event import Event
from relay.protocol.membership import State


@dataclass(frozen=True, slots=True)
class Verdict:
    """`rule` is the PDU check and the authorization rule under it: `5/6.3.4`. Both texts are empty if accepted."""

    outcome: Literal["accepted", "rejected", "soft_failed"]
    rule: str = ""
    reason: str = ""


ACCEPTED = Verdict("accepted")


def judge(
    event: Event,
    auth_events: Sequence[Event],
    rejected_auth: Container[str],
    state_before: State,
    current: State | None,
    create: Event | None = None,
) -> Verdict:
    """`auth_events` are all that the event cites; `current` is None where the room has no state of its own yet."""
    try:
        check_auth_events(event, auth_events, rejected_auth, create)
        check(event, {cited.key: cited for cited in auth_events if cited.key is not None}, create)
    except NotAllowed as no:
        return Verdict("rejected", f"4/{no.rule}", no.reason)
    try:
        check(event, state_before, create)
    except NotAllowed as no:
        return Verdict("rejected", f"5/{no.rule}", no.reason)
    if current is not None:
        try:
            check(event, current, create)
        except NotAllowed as no:
            return Verdict("soft_failed", f"6/{no.rule}", no.reason)
    return ACCEPTED
