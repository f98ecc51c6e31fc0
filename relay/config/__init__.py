"""What an operator may set: one YAML file, read once at the start into frozen, typed settings.

`sections.py` has the blocks, `settings.py` the whole, `reading.py` reads the file, `values.py` is what settings are made
of; `relay/config_example.py` prints them as `config.example.yaml`. Only `server_name` is required. Nothing outside this
package reads the file, and no part looks a setting up by its name: parts get the struct they need.
"""

from __future__ import annotations

from relay.config.appservices import Appservices
from relay.config.contact import Contact
from relay.config.federation import Federation
from relay.config.hooks import Hooks
from relay.config.metrics import Metrics
from relay.config.moderation import Moderation
from relay.config.reading import CONFIG_NAME, ConfigError, choices_of, load, parse
from relay.config.sections import (
    Accounts,
    Calls,
    Database,
    Limits,
    Listener,
    Log,
    Media,
    Presence,
    Privacy,
    Rate,
    Registration,
    Rooms,
    Turn,
)
from relay.config.settings import Settings
from relay.config.values import Duration, Section, Size

__all__ = [
    "Accounts",
    "Appservices",
    "CONFIG_NAME",
    "Calls",
    "ConfigError",
    "Contact",
    "Database",
    "Duration",
    "Federation",
    "Hooks",
    "Limits",
    "Listener",
    "Log",
    "Media",
    "Metrics",
    "Moderation",
    "Presence",
    "Privacy",
    "Rate",
    "Registration",
    "Rooms",
    "Section",
    "Settings",
    "Size",
    "Turn",
    "choices_of",
    "load",
    "parse",
]
