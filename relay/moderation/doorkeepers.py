"""Builds the operator's rules as the config names them: plug-ins first, then the antispam tool, then HTTP hooks.

Plug-ins are installed Python packages with an entry point in the group `relay.hooks` that names a `Hook` class; only those
named in the config are loaded.
"""

from __future__ import annotations

from importlib.metadata import entry_points

from relay.clock import Clock
from relay.config import ConfigError
from relay.config.hooks import Hooks as HookSettings
from relay.moderation.hook_points import Failing, Hook
from relay.moderation.hooks import Hooks, Plugin
from relay.moderation.http_hooks import Antispam, HttpHook
from relay.remote import Posts

GROUP = "relay.hooks"
_AS_SET: dict[str, Failing | None] = {"default": None, "open": "open", "closed": "closed"}


def doorkeepers(settings: HookSettings, posts: Posts, clock: Clock) -> tuple[Hooks, Antispam]:
    """Raises ConfigError where a plug-in is not to be had."""
    hooks = Hooks(clock)
    for name in settings.plugins:
        hooks.add(Plugin(name, loaded(name)))
    antispam = Antispam(settings.antispam, posts)
    if settings.antispam.url is not None:
        hooks.add(antispam, on_failure="closed")
    for one in settings.http:
        hooks.add(HttpHook(one, posts, clock), on_failure=_AS_SET[one.on_failure], budget_ms=one.budget)
    return hooks, antispam


def loaded(name: str) -> Hook:
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
