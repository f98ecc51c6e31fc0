"""With which other servers the relay has to do: the operator's allow-list and deny-list, and whoever else has a say.

One answer for every path, in and out: `server()` is a door at each request, `allows` the same for those who can't wait.
An entry is a server name or a pattern with * and ?, compared with the whole name and with the host alone. `deny` wins over
`allow`; with an empty `allow` everybody else passes. Others (a moderators' list) join with `also_ask`. Spec:
appendices/#glob-style-matching.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from relay.doors import OpenDoors
from relay.errors import Forbidden, InvalidParam
from relay.ids import server_of, split_server_name
from relay.protocol.event import Event
from relay.protocol.globs import Glob, compile_glob

# Whether a server (its name) is to be shut out. Asked for every request and event: answers from memory.
Refuses = Callable[[str], bool]

MAX_REMEMBERED = 10_000


class ServerControls(OpenDoors):
    def __init__(self, server_name: str, allow: Sequence[str] = (), deny: Sequence[str] = ()) -> None:
        self._server_name = server_name
        self._allow: tuple[Glob, ...] = ()
        self._deny: tuple[Glob, ...] = ()
        self._others: list[Refuses] = []
        self._admitting: list[Refuses] = []
        self._answers: dict[str, bool] = {}
        # Called, with nothing, after the answers may have changed.
        self.on_change: list[Callable[[], None]] = []
        self.set_lists(allow, deny)

    def set_lists(self, allow: Sequence[str], deny: Sequence[str]) -> None:
        """The operator's lists, at the start and whenever they are read anew."""
        self._allow = tuple(compile_glob(pattern) for pattern in allow)
        self._deny = tuple(compile_glob(pattern) for pattern in deny)
        self.changed()

    def also_ask(self, refuses: Refuses) -> None:
        """From now on a server passes only if this has nothing against it, either. Whoever's mind changes calls `changed`."""
        self._others.append(refuses)
        self.changed()

    def also_admit(self, admits: Callable[[str], bool]) -> None:
        """From now on a server also passes `allow` if this is for it; `deny` still wins."""
        self._admitting.append(admits)
        self.changed()

    def changed(self) -> None:
        self._answers.clear()
        for callback in self.on_change:
            callback()

    def allows(self, server: str) -> bool:
        if server == self._server_name:
            return True
        known = self._answers.get(server)
        if known is None:
            while len(self._answers) >= MAX_REMEMBERED:
                del self._answers[next(iter(self._answers))]
            known = self._answers[server] = self._judge(server)
        return known

    def _judge(self, server: str) -> bool:
        names = {server}
        try:
            names.add(split_server_name(server)[0])
        except InvalidParam:
            return False
        if any(glob.matches(name) for glob in self._deny for name in names):
            return False
        if self._allow and not any(glob.matches(name) for glob in self._allow for name in names):
            if not any(admits(server) for admits in self._admitting):
                return False
        return not any(refuses(server) for refuses in self._others)

    # --- the doors at which a server's name is known

    async def server(self, server_name: str) -> None:
        if not self.allows(server_name):
            raise Forbidden(f"This relay has nothing to do with {server_name}: its operator has shut that server out.")

    async def invite(self, sender: str, target: str, room_id: str) -> None:
        await self.server(server_of(sender))
        await self.server(server_of(target))

    async def receive(self, origin: str, event: Event) -> None:
        """Also what others hand on: an event of a server that is shut out is kept for the room's graph and shown to nobody."""
        await self.server(event.server)

    async def download(self, user_id: str | None, server_name: str, media_id: str) -> None:
        await self.server(server_name)
