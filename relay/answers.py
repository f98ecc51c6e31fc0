"""The words in which the command line tells what a command answered. Not here: the commands, or `--json`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def shown(path: Path) -> str:
    """A path as one would type it here."""
    absolute = path.absolute()
    here = Path.cwd()
    return str(absolute.relative_to(here)) if absolute.is_relative_to(here) else str(absolute)


def user_added(result: Any) -> str:
    return f"{result['user_id']} can sign in now."


def password_set(user: str) -> Callable[[Any], str]:
    return lambda _: f"{user} has a new password. Every old session is ended."


def admin_set(user: str, admin: bool) -> Callable[[Any], str]:
    return lambda _: f"{user} may {'now' if admin else 'no longer'} administer the relay."


def deactivated(user: str) -> Callable[[Any], str]:
    return lambda _: f"{user} is closed for good and signed out everywhere. The name can't be used again."


def locked(user: str) -> Callable[[Any], str]:
    return lambda _: f"{user} is locked. Its sessions stay and work again after: relay user unlock {user}"


def unlocked(user: str) -> Callable[[Any], str]:
    return lambda _: f"{user} can be used again."


def suspended(user: str) -> Callable[[Any], str]:
    return lambda _: f"{user} can read, leave rooms and take back messages, and nothing else."


def unsuspended(user: str) -> Callable[[Any], str]:
    return lambda _: f"{user} is no longer suspended."


def users(result: Any) -> str:
    if not result:
        return "There are no accounts yet. Make one with: relay user add NAME"
    rows = [
        (
            user["user_id"],
            "admin" if user.get("admin") else "",
            "deactivated" if user.get("deactivated") else "" if user.get("has_password", True) else "no password",
            "locked" if user.get("locked") else "",
            "suspended" if user.get("suspended") else "",
            f"since {_day(user['created'])}" if user.get("created") else "",
        )
        for user in result
    ]
    return _columns(rows)


def token_created(result: Any) -> str:
    return f"{result['token']}\nWhoever has this token can make an account where registration.mode is token."


def tokens(result: Any) -> str:
    if not result:
        return "There are no registration tokens. Make one with: relay token create"
    rows = []
    for token in result:
        uses = token.get("uses")
        used = f"used {token.get('used', 0)} times" if uses is None else f"used {token.get('used', 0)} of {uses} times"
        expires = token.get("expires_ms")
        rows.append(
            (
                token["token"],
                used,
                "never expires" if expires is None else f"expires {_day(expires)}",
                f"called {token['name']} where it is flagged",
            )
        )
    return _columns(rows)


def audit(result: Any) -> str:
    lines = [f"{count:>10}  {rule}" for rule, count in sorted(result["counts"].items())]
    findings = result["findings"]
    lines.extend(f"FINDING  {one['table']} {one['row']}: {one['text']}" for one in findings)
    lines.append(
        f"{len(findings)} rows without a rule." if findings else "Every row has a rule under which it may exist."
    )
    return "\n".join(lines)


def columns(result: Any) -> str:
    lines = []
    for table in result:
        lines.append(f"{table['table']}: {table['rule']}")
        lines += [f"    {c['column']}: {c['purpose']} - kept: {c['kept']}" for c in table["columns"]]
    return "\n".join(lines)


def sealed(result: Any) -> str:
    changed = sum(result["changed"].values())
    return f"{changed} rows were redacted or removed." if changed else "Nothing had to be redacted."


def reloaded(result: Any) -> str:
    taken, left = result["taken_up"], result["needs_restart"]
    lines = [f"Taken up: {', '.join(taken)}." if taken else "Nothing that can be taken up at once has changed."]
    if left:
        lines.append(f"Changed as well, and taken up at the next start: {', '.join(left)}.")
    return "\n".join(lines)


def status(result: Any) -> str:
    return "\n".join(f"{key}: {value}" for key, value in result.items())


def _day(ms: int) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(ms / 1000))


def _columns(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
