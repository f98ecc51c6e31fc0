"""`relay reload` and SIGHUP: takes up what may change in the config while the relay runs, and says what needs a restart.

Only the lists of servers are taken up; everything else was handed to its part when the relay was built.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from relay import folder
from relay.config import ConfigError, Settings
from relay.control import CommandFailed
from relay.server_controls import ServerControls

AT_ONCE = frozenset({"federation.allow", "federation.deny"})


class Reloading:
    def __init__(self, data_dir: Path, settings: Settings, controls: ServerControls) -> None:
        self._data_dir = data_dir
        self._began_with = settings
        self._now = settings
        self._controls = controls

    def commands(self) -> dict[str, Callable[..., Awaitable[Any]]]:
        return {"reload": self.reload}

    async def reload(self) -> dict[str, Any]:
        """{taken_up, needs_restart}: names of settings. Raises CommandFailed where the file can't be used."""
        try:
            settings = folder.load_settings(self._data_dir)
        except ConfigError as bad:
            raise CommandFailed(f"{bad} Nothing was changed.") from bad
        taken_up = [name for name in _differing(self._now, settings) if name in AT_ONCE]
        self._controls.set_lists(settings.federation.allow, settings.federation.deny)
        self._now = settings
        left = [name for name in _differing(self._began_with, settings) if name not in AT_ONCE]
        return {"taken_up": taken_up, "needs_restart": left}


def _differing(one: Any, other: Any, prefix: str = "") -> Iterator[str]:
    for field in msgspec.structs.fields(one):
        before, now = getattr(one, field.name), getattr(other, field.name)
        if before == now:
            continue
        if isinstance(before, msgspec.Struct) and isinstance(now, msgspec.Struct):
            yield from _differing(before, now, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"
