"""Sealed Relay, in reading order.

`server.py` builds every part by hand: the map. `protocol/` is the standard's rules, pure. `db.py`, `bell.py`, `web.py` and
`part.py` are the ground. `accounts/`, `rooms/` (the heart), `people/`, `keys/`, `ephemeral/`, `media/`, `push/` are slices,
each a `Part` with its own tables, routes, EDUs and share of /sync. `sync/` gathers. `federation/`, beside this package,
speaks with other servers. docs/architecture.md follows a message through all of it.
"""
