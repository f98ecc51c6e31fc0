"""The words of the desk: what measures, reasons, categories and states are called, and what a measure does in one sentence."""

from __future__ import annotations

from relay.moderation.audit_log import Entry

CATEGORIES = {
    "minor": "May show or involve a minor",
    "ncii": "Intimate images without consent",
    "threat": "Threat",
    "harassment": "Harassment",
    "fraud": "Fraud",
    "spam": "Spam",
    "other": "Other",
}

# (what it is called, what it does, what it is against)
MEASURES = {
    "warn": ("Warn", "They get a notice, and a strike that counts for 180 days.", "a user ID"),
    "suspend": ("Suspend", "They can read, leave rooms and take back their messages, and nothing else.", "a user ID"),
    "lock": ("Lock", "The account can't be used at all until it is unlocked.", "a user ID"),
    "shadow": ("Mute silently", "What they send goes nowhere, for a day at most. They still get a notice with the reasons.", "a user ID"),
    "kick": ("Remove from a room", "They may come back if the room lets them.", "a user ID"),
    "ban": ("Ban from a room", "They are out of one room and stay out.", "a user ID"),
    "redact": ("Take back one message", "Its content goes for everybody whose server follows the rules.", "an event ID"),
    "hide": ("Hide one message", "People here see it as taken back, until it is shown again. Elsewhere nothing changes.", "an event ID"),
    "redact_all": ("Take back all messages", "All their messages in rooms that you can moderate. Can't be undone.", "a user ID"),
    "quarantine": ("Quarantine a file", "Nobody gets it any more; it is kept sealed for appeals.", "mxc://server/ID or sha256:HEX"),
    "block_room": ("Block a room", "Nobody here can join it or be invited to it.", "a room ID"),
    "shut_room": ("Shut a room", "It is blocked at once; when that is confirmed, everybody here is taken out of it. Can't be undone.", "a room ID"),
    "block_server": ("Block a server", "No traffic with it, in either direction.", "a server name, or a pattern such as *.example.org"),
    "allow_server": ("Allow a server", "It passes an allow list, whatever the config says.", "a server name"),
    "deactivate": ("Close the account", "For good: it can't be opened again.", "a user ID"),
}  # fmt: skip
FOR_PEOPLE = ("warn", "suspend", "lock", "shadow", "kick", "ban", "redact_all", "deactivate")
IN_A_ROOM = ("kick", "ban", "redact")
FINAL = ("redact_all", "shut_room", "deactivate")

REASONS = {
    "harassment": "Harassment",
    "threat": "Threats",
    "ncii": "Intimate images without consent",
    "minor": "Protection of minors",
    "spam": "Spam",
    "fraud": "Fraud",
    "house_rules": "Against the rules of this relay",
    "law": "Against the law",
    "abuse_of_reports": "Abuse of reports",
    "protection": "To protect people while this is looked into",
}

# What only programs and other servers give.
OTHER_REASONS = {"mistake": "A mistake", "other": "Another reason", "by_hand": "By hand, without a reason"}

LASTS = {
    "": "until it is lifted",
    "1d": "for a day",
    "3d": "for 3 days",
    "7d": "for a week",
    "30d": "for 30 days",
    "180d": "for 180 days",
}
LASTS_DAYS = {"1d": 1, "3d": 3, "7d": 7, "30d": 30, "180d": 180}

RESTRICTIONS = {
    "suspend": "Suspended",
    "lock": "Locked",
    "shadow": "Silently muted",
    "kept_out": "Banned from a room",
    "server_block": "Blocked server",
    "server_allow": "Allowed server",
    "room_block": "Blocked room",
    "room_shutting": "Room blocked until its shutting is decided",
    "media": "Quarantined file",
    "media_hash": "Quarantined file, by its hash",
    "hidden": "Hidden message",
}
# By which measure each is taken back.
UNDONE_BY = {
    "suspend": "suspend", "lock": "lock", "shadow": "shadow", "kept_out": "ban", "server_block": "block_server",
    "server_allow": "allow_server", "room_block": "block_room", "media": "quarantine", "media_hash": "quarantine",
    "hidden": "hide",
}  # fmt: skip

SUBJECTS = {
    "event": "A message",
    "room": "A room",
    "user": "A person",
    "notice": "Notice from outside",
    "forwarded": "Handed over by another server",
    "elsewhere": "Decided on another server",
    "direct": "A measure without a report",
}
STATES = {
    "new": "new", "triaged": "looked at", "in_review": "in work", "awaiting_disclosure": "waits for proof",
    "escalated": "with the lawyers", "decided": "decided", "appealed": "appealed",
    "re_review": "appeal in work", "closed": "closed",
}  # fmt: skip
PROOFS = {
    "verified": "verified", "verified_remote": "verified, by their server", "invalid": "does not fit",
    "needs_human": "needs a person", "undisclosed": "none yet", "": "none yet",
}  # fmt: skip
PROOF_TONES = {"verified": "good", "verified_remote": "good", "invalid": "bad", "needs_human": "warn"}
PROOFS_EXPLAINED = {
    "verified": "Sent by this person, exactly so. Whoever reports can't have forged it.",
    "verified_remote": "Sent by this person, on the word of the sender's own server.",
    "invalid": "The proof does not fit. That alone is no proof of a lie: it may be the wrong file.",
    "needs_human": "Something is odd: a broken app, or a trick. Look before you believe either side.",
    "undisclosed": "The relay can't read the message, and nobody has opened it yet.",
}


HAPPENED = {
    "report.created": "Report came in", "report.added": "Reporter added something", "report.answered": "Reporter wrote more",
    "case.taken": "Taken", "case.released": "Given back", "case.sorted": "Sorted", "case.closed": "Closed",
    "case.joined": "Joined to another case", "decided": "Decided", "appeal.filed": "Objection", "appeal.upheld": "Appeal answered: stands",
    "appeal.reversed": "Appeal answered: taken back", "appeal.same_person": "Appeal answered by the same person",
    "envelope.sealed": "Sealed", "evidence.fetched": "Evidence opened", "envelope.rewrapped": "Evidence made readable for a new key", "case.minor": "May show a minor",
    "withheld": "Not shown to you", "case.withdrawn": "Reporter asked for removal", "case.emptied": "Emptied: its time was over", "restored": "A backup was restored",
    "restored.seen": "Restore acknowledged", "slowed": "Slowed down", "media.handed_out": "File looked at",
    "keys.changed": "List of keys changed", "signer.introduced": "The log's own key is used for the first time", "admin": "Made an administrator",
    "signer.changed": "The log's own key was replaced", "media.fetched": "File fetched from another server, by hand",
    "reasons.stated": "Reasons stated", "untold": "Person not told", "forwarded": "Handed to another server's moderators",
    "peer.answered": "The other server answered", "peer.decided": "Another server decided", "appeal.sent": "Objection sent on",
    "list.apply": "Ban list applied", "list.review": "Ban list followed for review",
    "list.ignore": "Ban list ignored", "list.unfollow": "Ban list followed no longer",
}  # fmt: skip
MOVES = {"undo": "Took back: {}", "asked": "Asked for: {}", "confirmed": "Confirmed: {}", "cancelled": "Cancelled: {}"}


ENVELOPES = {
    "evidence": "proof", "words": "the reporter's words", "answer": "an answer", "appeal": "an appeal", "note": "a moderator's note",
    "forward": "proof from another server",
}  # fmt: skip


def ground(text: str) -> str:
    kind, _, which = text.partition(":")
    if text == "terms:not stated":
        return "Not stated yet"
    return {"terms": f"Rule of this relay: {which}", "law": f"Law: {which}"}.get(kind, text)


UNTOLD = {
    "": "is told, with how to object",
    "bulk": "isn't told: only advertises in bulk",
    "law": "isn't told: a law forbids it",
}


OUTCOMES = {"done": "done", "waits": "waits for a second person", "failed": "did not work", "undone": "taken back"}
VERDICTS = {"upheld": "the decision stands", "reversed": "the decision is taken back"}
SIDES = {"reporter": "Whoever reported", "subject": "The person decided on"}

STATES_FOR_REPORTERS = {
    "new": "received", "triaged": "received", "in_review": "a moderator looks at it", "re_review": "the objection is looked at",
    "awaiting_disclosure": "the moderators would like a proof", "escalated": "waits for advice from outside", "decided": "decided",
    "appealed": "somebody objected to the decision", "closed": "closed",
}  # fmt: skip
PROOFS_FOR_REPORTERS = {
    "verified": "The proof holds. The moderators can now read these messages.",
    "verified_remote": "The proof holds. The moderators can now read these messages.",
    "needs_human": "Something about this proof needs a person to look at it. It was handed in.",
    "invalid": "This proof does not fit the message. You may have chosen another message or an older key file: try again.",
    "undisclosed": "No message was opened with this code. Try again.",
}

MEASURE_NAMES = {name: title for name, (title, _, _) in MEASURES.items()}

VERDICTS_DONE = {"upheld": "as decided", "reversed": "what was done is lifted"}


def action(word: str) -> str:
    """A word of the audit log, as a person reads it."""
    stem, dot, measure = word.partition(".")
    if dot and measure in MEASURES and stem in MOVES:
        return MOVES[stem].format(MEASURES[measure][0].lower())
    if word in MEASURES:
        return MEASURES[word][0]
    return HAPPENED.get(word) or word.replace(".", " ").replace("_", " ").capitalize()


FLAGS = {
    "invite-wave": "A new account invites many", "refused-invites": "Most of the invites are refused", "server-wave": "A server invites many people here",
    "fan-out": "Writes to many, hardly anybody answers", "join-wave": "Many join at once", "uploads": "Uploads a lot",
    "policy-list": "Named by a ban list of others", "token-wave": "Makes many accounts within an hour",
    "token-misused": "Accounts made with it are reported, flagged or restricted", "disclosed-text": "A classifier thinks badly of what was proved",
}  # fmt: skip


_SAID_ALREADY = frozenset(
    {
        "objection",
        "first_use",
        "lease",
        "released",
        "closed",
        "duplicate",
        "by_link",
        "looked_at",
        "by_hand",
        "bulk",
        "consented",
        "",
    }
)


def why(row: Entry) -> str:
    """The reason code of a row, as a person reads it: of a report it is the category."""
    code = row.reason_code
    # Where the word says nothing that the action has not said.
    if row.action in ("envelope.sealed", "evidence.fetched") and code in ENVELOPES:
        return ENVELOPES[code]
    if code in _SAID_ALREADY:
        return ""
    names = (
        (CATEGORIES, REASONS)
        if row.action in ("report.created", "case.sorted", "evidence.fetched")
        else (REASONS, CATEGORIES)
    )
    return names[0].get(code) or names[1].get(code) or OTHER_REASONS.get(code) or code.replace("_", " ")
