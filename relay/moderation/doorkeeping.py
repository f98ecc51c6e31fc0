"""Builds what stands at the doors, and who is told: restrictions, the operator's rules, webhooks, integrations.

It is built before the rooms, since the doors are asked by all of them; `finish` gives it what comes later. Plug-ins are
installed Python packages with an entry point in the group `relay.hooks` that names a `Hook` class; only those named in
the config are loaded.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from relay.clock import Clock
from relay.config import ConfigError
from relay.config.hooks import Hooks as HookSettings
from relay.db import Database
from relay.doors import Doors
from relay.media.files import Store
from relay.media.remote_copies import RemoteCopies
from relay.moderation.classifiers import Classifiers
from relay.moderation.flags import FlagDoors, Flags
from relay.moderation.hook_points import Failing, Hook
from relay.moderation.hooks import HookDoors, Hooks, Plugin
from relay.moderation.http_hooks import Antispam, HttpHook
from relay.moderation.integrations import Integrations
from relay.moderation.policy_lists import PolicyListDoors, PolicyLists
from relay.moderation.quarantine import Quarantine
from relay.moderation.restrictions import RestrictionDoors, Restrictions
from relay.moderation.webhooks import Webhooks
from relay.part import Part
from relay.remote import Posts
from relay.rooms.rooms import Rooms

GROUP = "relay.hooks"
_AS_SET: dict[str, Failing | None] = {"default": None, "open": "open", "closed": "closed"}


class Doorkeeping:
    def __init__(
        self,
        settings: HookSettings,
        db: Database,
        clock: Clock,
        rooms: Rooms,
        outside: Posts,
        anywhere: Posts,
        data_dir: Path,
    ) -> None:
        """`outside` reaches public addresses only, `anywhere` also this machine and private networks. Raises ConfigError."""
        self._db = db
        self._server_name = server_name = rooms.server_name
        self.restrictions = Restrictions(db, clock)
        self.flags = Flags(settings.flags, db, clock, rooms)
        model = data_dir / settings.classifier_model if settings.classifier_model else None
        self.classifiers = Classifiers(self.flags, settings.classifiers, model)
        self.lists = PolicyLists(db, clock, rooms, settings.policy_lists)
        self.restrictions.further.append(self.lists.server_rule)
        self.lists.on_change.append(self.restrictions.changed)
        self.lists.on_review.append(self.flags.listed_by_others)
        rooms.is_closed = lambda room_id: self.restrictions.closes(room_id) or self.lists.closes(room_id)
        self.hooks = Hooks(clock)
        for name in settings.plugins:
            self.hooks.add(Plugin(name, loaded(name)))
        self.antispam = antispam = Antispam(settings.antispam, anywhere)
        if settings.antispam.url is not None:
            self.hooks.add(antispam, on_failure="closed")
        for one in settings.http:
            self.hooks.add(HttpHook(one, anywhere, clock), on_failure=_AS_SET[one.on_failure], budget_ms=one.budget)
        self._hook_doors = HookDoors(self.hooks, server_name)
        self.webhooks = Webhooks(db, clock, settings.webhooks, outside, anywhere)
        self.integrations = Integrations(db, clock, server_name, settings.integrations)
        self._hook_doors.is_invited = lambda user_id, room_id: rooms.membership(room_id, user_id) == "invite"
        self.parts: list[Part] = [self.restrictions, self.lists, antispam, self.webhooks, self.integrations]

    @property
    def doors(self) -> list[Doors]:
        """In the order in which they are asked: what costs nothing first, and what only looks on last. What is not configured
        is not there."""
        # Moderators may begin to follow a list at any time.
        doors: list[Doors] = [RestrictionDoors(self.restrictions), PolicyListDoors(self.lists, self._server_name)]
        if self.hooks:
            doors.append(self._hook_doors)
        if self.flags:
            doors.append(FlagDoors(self.flags))
        return doors

    def finish(self, store: Store, copies: RemoteCopies) -> Quarantine:
        """The inspector of uploads."""
        quarantine = Quarantine(
            self._db, self.restrictions, store, copies.store, self._server_name, [self._hook_doors]
        )  # fmt: skip
        copies.gate = quarantine
        self._hook_doors.quarantine = quarantine.keep_from_all
        self.parts.append(quarantine)
        return quarantine

    async def open(self) -> None:
        """After the database, before anybody is let in."""
        await self.restrictions.open()
        await self.lists.open()
        await self.webhooks.open()
        await self.integrations.open()

    def commands(self) -> Mapping[str, Callable[..., Awaitable[Any]]]:
        return {"hooks.status": self._status, **self.webhooks.commands()}

    async def _status(self) -> dict[str, Any]:
        return {"hooks": await self.hooks.status(), "webhooks": await self.webhooks.status()}


def loaded(name: str) -> Hook:
    """An installed plug-in. Raises ConfigError."""
    found = list(entry_points(group=GROUP, name=name))
    if not found:
        installed = ", ".join(sorted(entry_points(group=GROUP).names)) or "none"
        raise ConfigError(
            f"hooks.plugins: no plug-in {name} is installed (installed are: {installed}). Install its package into the "
            "relay's Python, or take the name out."
        )
    try:
        hook = found[0].load()()
    except Exception as error:
        raise ConfigError(
            f"hooks.plugins: the plug-in {name} can't be started ({type(error).__name__}). Ask who made it."
        ) from error
    if not isinstance(hook, Hook):
        raise ConfigError(
            f"hooks.plugins: the plug-in {name} is no relay.moderation.hook_points.Hook. Ask who made it."
        )
    return hook
