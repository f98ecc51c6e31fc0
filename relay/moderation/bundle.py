"""What is forwarded of a case to another relay: the proof of one message, sealed to that relay's moderators. Pure.

Made on a moderator's machine, since the relay can't open the evidence. Neither the reporter nor her words, the category or the
time of the report are in it; the relay there checks the proof against the event that it holds itself. When it may be sent, and
how: peers.py.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from relay.moderation import envelope
from relay.moderation.disclosure_form import VERSION
from relay.moderation.envelope import Envelope, Recipient
from relay.moderation.megolm import ALGORITHM
from relay.moderation.moderator_secret import BadKey, ModeratorPublic
from relay.protocol.canonical import encode

# What both sides call it; it tells nothing of the case.
NAME_BYTES = 16


def read_recipients(value: Mapping[str, Any]) -> tuple[str, list[Recipient]]:
    """The other server and its moderators' keys, as `/_relay/safety/v1/peers/SERVER/keys` gave them. Raises BadKey."""
    server, keys = value.get("server"), value.get("keys")
    if not isinstance(server, str) or not isinstance(keys, list):
        raise BadKey("This is no list of another relay's keys. Save what your relay answers for that server.")
    lines = [str(one.get("public")) if isinstance(one, dict) else "" for one in keys[: envelope.MAX_KEYS]]
    return server, [Recipient(public.key_id, "", public) for public in map(ModeratorPublic.read, lines)]


def sealed_to(to: Sequence[Recipient], item: Mapping[str, Any]) -> Envelope:
    """`item` is one of an opened evidence's. Raises TooFewKeys."""
    told = {
        "v": VERSION,
        "alg": ALGORITHM,
        "good_faith": True,
        "items": [{name: item[name] for name in ("event_id", "index", "prk")}],
    }
    return envelope.seal(encode(told), case_id=secrets.token_urlsafe(NAME_BYTES), version=1, to=to)
