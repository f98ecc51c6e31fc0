"""Rule 6 of the authorization rules: m.room.member events. The other rules are in `auth.py`, which numbers them.

A member event is judged by the memberships of its sender and its target, the join rule and the power levels.
Spec: rooms/v12/#authorisation-rules (there rule 5), server-server-api/#third-party-invites for the signed part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from relay.errors import BadJson, NotAllowed
from relay.ids import is_user_id, server_of
from relay.protocol.canonical import from_base64
from relay.protocol.power import Levels, creators
from relay.protocol.signing import ALGORITHM, verify_json

if TYPE_CHECKING:
    from relay.protocol.event import Event

JOIN = "join"
INVITE = "invite"
LEAVE = "leave"
BAN = "ban"
KNOCK = "knock"
MEMBERSHIPS = frozenset({JOIN, INVITE, LEAVE, BAN, KNOCK})

DEFAULT_JOIN_RULE = "invite"

# Each pair of a key and a signature costs a verification; identity servers name one or two keys.
MAX_THIRD_PARTY_CHECKS = 64

State = Mapping[tuple[str, str], "Event"]


def membership_of(state: State, user_id: str) -> str | None:
    member = state.get(("m.room.member", user_id))
    return None if member is None else member.membership


def check_member(event: Event, state: State, create: Event, levels: Levels) -> None:
    """Raises NotAllowed with the number under rule 6."""
    target = event.state_key
    wanted = event.membership
    if target is None:
        raise NotAllowed("6.1", "a membership needs a state key: the user whose membership it is")
    if wanted is None:
        raise NotAllowed("6.1", "the event names no membership")
    # The standard asks for this signature whatever the membership is; servers in use ask only where it means something.
    if wanted == JOIN and event.version.restricted and "join_authorised_via_users_server" in event.content:
        _check_authoriser_signed(event)
    if wanted == JOIN:
        _check_join(event, target, state, create, levels)
    elif wanted == INVITE:
        _check_invite(event, target, state, levels)
    elif wanted == LEAVE:
        _check_leave(event, target, state, levels)
    elif wanted == BAN:
        _check_ban(event, target, state, levels)
    elif wanted == KNOCK and event.version.knock:
        _check_knock(event, target, state)
    else:
        raise NotAllowed("6.8", f"the membership {wanted[:32]!r} is not known in this room version")


def _check_authoriser_signed(event: Event) -> None:
    """Only that the signature is there: whether it holds was asked before, with the key at hand (PDU check 2)."""
    authoriser = event.content["join_authorised_via_users_server"]
    if not is_user_id(authoriser) or server_of(authoriser) not in event.pdu["signatures"]:
        raise NotAllowed("6.2.1", "the server of the user who authorised the join has not signed it")


def _check_join(event: Event, target: str, state: State, create: Event, levels: Levels) -> None:
    version = event.version
    if event.prev_events == (create.id,) and (
        target in creators(create) if version.create_creator else target == create.sender
    ):
        return
    if event.sender != target:
        raise NotAllowed("6.3.2", "nobody can make another user join")
    membership = membership_of(state, target)
    if membership == BAN:
        raise NotAllowed("6.3.3", "the user is banned from the room")
    rule = _join_rule(state)
    if rule == "public":
        return
    if rule == "invite" or (rule == "knock" and version.knock):
        if membership in (INVITE, JOIN):
            return
        raise NotAllowed("6.3.4", "the room is open to invited users only")
    if (rule == "restricted" and version.restricted) or (rule == "knock_restricted" and version.knock_restricted):
        if membership in (INVITE, JOIN):
            return
        authoriser = event.content.get("join_authorised_via_users_server")
        if not isinstance(authoriser, str):
            raise NotAllowed("6.3.5.2", "the room is restricted, and nobody in it authorised the join")
        if membership_of(state, authoriser) != JOIN:
            raise NotAllowed("6.3.5.2", "the user who authorised the join is not in the room")
        if levels.user(authoriser) < levels.invite:
            raise NotAllowed("6.3.5.2", "the user who authorised the join may not invite")
        return
    raise NotAllowed("6.3.7", "the room's join rule lets nobody join")


def _check_invite(event: Event, target: str, state: State, levels: Levels) -> None:
    if "third_party_invite" in event.content:
        _check_third_party(event, target, state)
        return
    if membership_of(state, event.sender) != JOIN:
        raise NotAllowed("6.4.2", "only members can invite")
    membership = membership_of(state, target)
    if membership == JOIN:
        raise NotAllowed("6.4.3", "the user is in the room already")
    if membership == BAN:
        raise NotAllowed("6.4.3", "the user is banned from the room; lift the ban first")
    if levels.user(event.sender) < levels.invite:
        raise NotAllowed("6.4.5", "the sender's power level is too low to invite")


def _check_third_party(event: Event, target: str, state: State) -> None:
    if membership_of(state, target) == BAN:
        raise NotAllowed("6.4.1.1", "the user is banned from the room")
    third_party = event.content["third_party_invite"]
    signed = third_party.get("signed") if isinstance(third_party, dict) else None
    if not isinstance(signed, dict):
        raise NotAllowed("6.4.1.2", "the third-party invite has no signed part")
    mxid, token = signed.get("mxid"), signed.get("token")
    if not isinstance(mxid, str) or not isinstance(token, str):
        raise NotAllowed("6.4.1.3", "the third-party invite names no user or no token")
    if mxid != target:
        raise NotAllowed("6.4.1.4", "the third-party invite is for another user")
    offer = state.get(("m.room.third_party_invite", token))
    if offer is None:
        raise NotAllowed("6.4.1.5", "the room has no third-party invite with this token")
    if offer.sender != event.sender:
        raise NotAllowed("6.4.1.6", "the third-party invite is another user's")
    if not _signed_by_any(signed, offer.content):
        raise NotAllowed("6.4.1.8", "the third-party invite is not signed with a key that the room names")


def _signed_by_any(signed: dict[str, Any], offer: dict[str, Any]) -> bool:
    left = MAX_THIRD_PARTY_CHECKS
    for key in _offered_keys(offer):
        for server, key_id in _signature_names(signed):
            if left == 0:
                return False
            left -= 1
            if verify_json(signed, server, key_id, key):
                return True
    return False


def _offered_keys(offer: dict[str, Any]) -> Iterator[bytes]:
    texts = [offer.get("public_key")]
    several = offer.get("public_keys")
    if isinstance(several, list):
        texts += [entry.get("public_key") for entry in several if isinstance(entry, dict)]
    for text in texts:
        if isinstance(text, str):
            try:
                yield from_base64(text)
            except BadJson:
                continue


def _signature_names(signed: dict[str, Any]) -> Iterator[tuple[str, str]]:
    signatures = signed.get("signatures")
    if isinstance(signatures, dict):
        for server, of_one in signatures.items():
            if isinstance(of_one, dict):
                yield from ((server, key_id) for key_id in of_one if key_id.startswith(ALGORITHM + ":"))


def _check_leave(event: Event, target: str, state: State, levels: Levels) -> None:
    own = membership_of(state, event.sender)
    if event.sender == target:
        if own in (INVITE, JOIN) or (own == KNOCK and event.version.knock):
            return
        raise NotAllowed("6.5.1", "the user is not in the room, nor invited")
    if own != JOIN:
        raise NotAllowed("6.5.2", "only members can remove others")
    power = levels.user(event.sender)
    if membership_of(state, target) == BAN and power < levels.ban:
        raise NotAllowed("6.5.3", "the sender's power level is too low to lift a ban")
    if power < levels.kick:
        raise NotAllowed("6.5.5", "the sender's power level is too low to remove others")
    if levels.user(target) >= power:
        raise NotAllowed("6.5.5", "the user's power level is not below the sender's")


def _check_ban(event: Event, target: str, state: State, levels: Levels) -> None:
    if membership_of(state, event.sender) != JOIN:
        raise NotAllowed("6.6.1", "only members can ban")
    power = levels.user(event.sender)
    if power < levels.ban:
        raise NotAllowed("6.6.3", "the sender's power level is too low to ban")
    if levels.user(target) >= power:
        raise NotAllowed("6.6.3", "the user's power level is not below the sender's")


def _check_knock(event: Event, target: str, state: State) -> None:
    rule = _join_rule(state)
    if rule != "knock" and not (rule == "knock_restricted" and event.version.knock_restricted):
        raise NotAllowed("6.7.1", "the room does not let people knock")
    if event.sender != target:
        raise NotAllowed("6.7.2", "nobody can knock for another user")
    if membership_of(state, target) in (BAN, INVITE, JOIN):
        raise NotAllowed("6.7.4", "the user is banned, invited or in the room already")


def _join_rule(state: State) -> str:
    rules = state.get(("m.room.join_rules", ""))
    rule = DEFAULT_JOIN_RULE if rules is None else rules.content.get("join_rule", DEFAULT_JOIN_RULE)
    return rule if isinstance(rule, str) else ""
