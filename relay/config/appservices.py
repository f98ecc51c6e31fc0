"""Which application services (bridges, bots) there are: their registration files. What stands in one: `relay/appservices/`."""

from __future__ import annotations

from relay.config.values import FileName, Section


class Appservices(Section, frozen=True):
    registration_files: tuple[FileName, ...] = ()
    """Registration files of bridges and bots, as their programs write them, relative to the data folder; read at the
    start. They may act for the users of their namespaces and learn what happens in the rooms of these."""

    def __post_init__(self) -> None:
        twice = {name for name in self.registration_files if self.registration_files.count(name) > 1}
        if twice:
            raise ValueError(f"registration_files names {min(twice)!r} twice: write it once")
