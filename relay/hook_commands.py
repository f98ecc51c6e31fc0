"""The command line about the operator's own rules and programs: how they do, and secrets for them.

`__main__.py` has the rest and the means: how a command is asked for, and how its answer is told.
"""

from __future__ import annotations

import argparse
import base64
import secrets
from typing import Any

from relay.config.hooks import MAX_SECRET_BYTES, SECRET_PREFIX
from relay.moderation.policy_lists import EFFECTS, REVIEW
from relay.peer_commands import Ask, Grammar, Tell


def grow(grammar: Grammar, tell: Tell, ask: Ask) -> None:
    """`ask` reaches the running relay or, where none runs, the data folder."""

    def status(arguments: argparse.Namespace) -> int:
        return tell(arguments, ask(arguments.data, "hooks.status", {}), _status)

    def enable(arguments: argparse.Namespace) -> int:
        result = ask(arguments.data, "webhooks.enable", {"webhook": arguments.name})
        return tell(arguments, result, lambda _: f"The webhook {arguments.name} is told again.")

    def secret(_: argparse.Namespace) -> int:
        print(f"{SECRET_PREFIX}{base64.b64encode(secrets.token_bytes(MAX_SECRET_BYTES)).decode()}")
        return 0

    def management(arguments: argparse.Namespace) -> int:
        return tell(arguments, ask(arguments.data, "rooms.management", {"user": arguments.name}), _made)

    hooks = grammar.group("hooks", "rules and programs of your own (docs/hooks.md)")
    hooks.add("status", status, "who is asked and who is told, and how it goes since the start", "--data data")
    enabling = hooks.add("enable", enable, "tell a webhook again that wanted to be told no more", "NAME --data data")
    enabling.add_argument("name", metavar="NAME", help="its name in the config")
    making = hooks.add(
        "management-room",
        management,
        "make a readable room for a moderation bot that can't decrypt",
        "NAME --data data",
    )
    making.add_argument("name", metavar="NAME", help="whose room it is: yours, not the bot's")
    hooks.add("secret", secret, "make a secret for the config", "")
    _grow_lists(grammar.group("list", "ban lists of others that this relay follows (docs/hooks.md)"), tell, ask)


def _grow_lists(lists: Grammar, tell: Tell, ask: Ask) -> None:
    def show(arguments: argparse.Namespace) -> int:
        return tell(arguments, ask(arguments.data, "lists.show", {}), _lists)

    def follow(arguments: argparse.Namespace) -> int:
        what = {"room": arguments.room, "effect": arguments.effect, "via": arguments.via}
        return tell(arguments, ask(arguments.data, "lists.follow", what), lambda one: _lists([one]))

    def unfollow(arguments: argparse.Namespace) -> int:
        return tell(arguments, ask(arguments.data, "lists.unfollow", {"room": arguments.room}), _unfollowed)

    lists.add("show", show, "which are followed, and what they do", "--data data")
    following = lists.add(
        "follow", follow, "follow one, or follow it in another way", "'#bans:example.org' --effect review --data data"
    )
    following.add_argument("room", metavar="ROOM", help="its address (#name:server) or its room ID")
    following.add_argument(
        "--effect", choices=EFFECTS, default=REVIEW,
        help="apply: what it names is turned away; review: it raises a flag; ignore (default: review)",
    )  # fmt: skip
    following.add_argument(
        "--via", action="append", metavar="SERVER", help="a server that is in its room; may be given again"
    )
    leaving = lists.add("unfollow", unfollow, "follow one no longer", "'#bans:example.org' --data data")
    leaving.add_argument("room", metavar="ROOM", help="its address or its room ID")


def _lists(result: Any) -> str:
    lines = [
        f"{one['room_id']}  {one['effect']}, {one['rules']} rules, by the {one['chosen_by']}"
        + (
            ""
            if one["heard"]
            else "; NOT HEARD: nobody of this relay is in its room, follow it again with --via SERVER"
        )
        for one in result
    ]
    return "\n".join(lines) or "No list is followed."


def _unfollowed(result: Any) -> str:
    if result["effect"] is None:
        return f"{result['room_id']} is followed no longer."
    return f"What the config says counts again: {_lists([result])}"


def _made(result: Any) -> str:
    return (
        f"{result['creator']} has the room {result['room_id']}, which is not encrypted and never leaves this server. Now write it "
        "into the config under privacy: clear_rooms, restart the relay, and invite the bot."
    )


def _status(result: Any) -> str:
    lines = []
    for hook in result["hooks"]:
        state = "is left alone for a while" if hook["resting"] else "is asked"
        lines.append(
            f"{hook['name']} {state} at {', '.join(hook['points'])}: {hook['asked']} times, {hook['refused']} refusals, "
            f"{hook['failed']} failures"
        )
    for webhook in result["webhooks"]:
        state = "wants to be told no more" if webhook["off"] else "is told"
        lines.append(
            f"{webhook['name']} {state}: {webhook['delivered']} delivered, {webhook['waiting']} waiting, "
            f"{webhook['failed']} failed attempts, {webhook['given_up']} given up"
        )
    return "\n".join(lines) or "The config names no rules and no programs."
