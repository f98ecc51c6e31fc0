"""Every sentence that the relay itself ever writes into a room: fixed words with numbers and links, nothing that anybody wrote.

`relay audit` asks `is_own` about the readable messages of the relay's own user, so that the seal holds for them as well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

MESSAGE = "m.room.message"

_FIELDS = {
    "number": r"\d{1,12}",
    "link": r"https?://[^\s<>\"]{1,400}",
    "category": "ncii|minor|threat|harassment|spam|fraud|other",
    "state": "verified|verified_remote|needs_human|invalid|undisclosed",
    "day": r"\d{4}-\d\d-\d\d \d\d:\d\d UTC",
    "count": r"\d{1,6}",
    "hash": r"[A-Za-z0-9+/]{43}",
    "key_id": r"ed25519:\w{1,60}",
    "signature": r"[A-Za-z0-9+/]{86}",
}

# To the person who reported, or about whom was decided.
RECEIVED = "received"
RECEIVED_NOT_KEPT = "received_words_not_kept"
DECIDED_MEASURE = "decided_measure"
DECIDED_NONE = "decided_none"
ABOUT_YOU = "about_you"
WARNED = "warned"
ABOUT_YOU_ELSEWHERE = "about_you_elsewhere"
APPEAL_RECEIVED = "appeal_received"
APPEAL_UPHELD = "appeal_upheld"
APPEAL_REVERSED = "appeal_reversed"
OTHER_SIDE_APPEALED = "other_side_appealed"
NO_OTHER_MODERATOR = "no_other_moderator"
REASONS_STATED = "reasons_stated"
PEER_ANSWERED = "peer_answered"
# To the moderators.
NEW_REPORT = "new_report"
URGENT_REPORT = "urgent_report"
PROOF_CAME = "proof_came"
LATE = "late"
APPEALED = "appealed"
ANSWERED = "answered"
DECIDED = "decided"
WAITS = "waits"
KEYS_CHANGED = "keys_changed"
CHECKPOINT = "checkpoint"
RESTORED = "restored"
ANSWER_FROM_PEER = "answer_from_peer"
NO_REASONS = "no_reasons"
FORM_BUSY = "form_busy"
FORM_FULL = "form_full"

SENTENCES: Mapping[str, str] = {
    RECEIVED: "Thank you. Your report has the number {number}. You will hear here what was decided. To add something to it, or "
    "a proof that nobody can dispute: {link}",
    RECEIVED_NOT_KEPT: "Thank you. Your report has the number {number}, but your words were not kept: the moderators have no key "
    "yet to which they could be sealed. Send them again later, here: {link}",
    NO_OTHER_MODERATOR: "Your report has the number {number}. The person whom you name is the only moderator here, and will not "
    "see it here. Please turn to somebody outside this server as well: {link}",
    DECIDED_MEASURE: "Your report number {number} was decided: a measure was taken. To read the decision, or to object to it: {link}",
    DECIDED_NONE: "Your report number {number} was decided: no measure was taken. To read why, or to object to it: {link}",
    ABOUT_YOU: "The moderators have decided something about you (number {number}). To read what and why, or to object to it: {link}",
    ABOUT_YOU_ELSEWHERE: "The moderators of another server have decided something about you there (here it has the number {number}). "
    "To read what and why, or to object to it: {link}",
    WARNED: "The moderators have warned you (number {number}). To read why, or to object to it: {link}",
    PEER_ANSWERED: "The moderators of the other server have answered what they decided about your report number {number}. "
    "To read it: {link}",
    REASONS_STATED: "The moderators have now given the reasons for decision number {number}. To read them, or to object: {link}",
    APPEAL_RECEIVED: "Your objection to decision number {number} has arrived. Somebody looks at it again, and you will hear here "
    "what came of it.",
    OTHER_SIDE_APPEALED: "Somebody has objected to decision number {number}. It is looked at again; until then it holds.",
    APPEAL_UPHELD: "Decision number {number} was looked at again, and it stays as it is. To read why: {link}",
    APPEAL_REVERSED: "Decision number {number} was looked at again, and it was changed. To read how: {link}",
    NEW_REPORT: "Report {number} has come ({category}), due by {day}: {link}",
    URGENT_REPORT: "Report {number} has come and is urgent: {link}",
    PROOF_CAME: "Report {number} now has a proof ({state}): {link}",
    ANSWERED: "The reporter has added something to report {number}: {link}",
    LATE: "Report {number} is late: it was due by {day}. {link}",
    APPEALED: "Somebody objects to decision {number}: {link}",
    DECIDED: "Report {number} is decided: {link}",
    WAITS: "A measure waits for a second person, or for its time: {link}",
    KEYS_CHANGED: "The list of the moderators' keys has changed; this is its version {number}. It counts from a day later on: {link}",
    CHECKPOINT: "Audit log up to row {number}: {hash} signed by {key_id}: {signature}",
    RESTORED: "This relay was restored from a backup: the audit log goes on from row {number}. Acknowledge it: {link}",
    NO_REASONS: "A measure was taken without a report and without reasons (number {number}). Whoever is concerned was told of it: "
    "state the reasons here: {link}",
    FORM_BUSY: "{count} notices have come over the form for everybody within an hour: from now on it takes few of each place. {link}",
    FORM_FULL: "{count} notices have come over the form for everybody within an hour, from many places: it takes no more until there "
    "are fewer. Whoever is kept out hears it, and is asked to come back later. {link}",
    ANSWER_FROM_PEER: "The other server has answered what it decided about report {number}: {link}",
}  # fmt: skip

_PATTERNS = {
    name: re.compile(
        "".join(
            f"(?:{_FIELDS[part[1:-1]]})" if part.startswith("{") else re.escape(part)
            for part in re.split(r"(\{\w+\})", sentence)
        )
    )
    for name, sentence in SENTENCES.items()
}


def say(name: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The content of the message. Raises ValueError where a field is not of its shape: then a word of somebody might slip in."""
    content = {"msgtype": "m.text", "body": SENTENCES[name].format(**fields), "org.relay.notice": name}
    if not is_own(content):
        raise ValueError(f"the notice {name} was given something that is no number and no link")
    return content


def is_own(content: Any) -> bool:
    """Whether these are the relay's own words, whole and alone."""
    if not isinstance(content, dict) or set(content) != {"msgtype", "body", "org.relay.notice"}:
        return False
    name, body = content["org.relay.notice"], content["body"]
    pattern = _PATTERNS.get(name) if isinstance(name, str) else None
    return (
        content["msgtype"] == "m.text"
        and pattern is not None
        and isinstance(body, str)
        and pattern.fullmatch(body) is not None
    )
