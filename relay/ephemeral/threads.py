"""In which thread an event stands, as far as its readable relation tells. Spec: client-server-api/#threaded-read-receipts."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from relay.protocol.event import Event

MAIN = "main"
# An event that relates to one in a thread is in that thread too. The standard recommends this many steps.
MAX_HOPS = 3

FindsEvent = Callable[[str], Awaitable[Event | None]]


def relation_of(event: Event) -> tuple[str, str] | None:
    """(rel_type, target event ID)."""
    relation = event.content.get("m.relates_to")
    if type(relation) is not dict:
        return None
    rel_type, target = relation.get("rel_type"), relation.get("event_id")
    return (rel_type, target) if type(rel_type) is str and type(target) is str else None


async def thread_of(event: Event, find: FindsEvent) -> str:
    """The thread root's event ID, or `main`."""
    current: Event | None = event
    for _ in range(MAX_HOPS):
        relation = relation_of(current) if current is not None else None
        if relation is None:
            return MAIN
        if relation[0] == "m.thread":
            return relation[1]
        current = await find(relation[1])
    return MAIN


async def is_in_thread(event: Event, thread: str, find: FindsEvent) -> bool:
    """Whether a receipt for `event` may name `thread`. A thread's root, and what relates to it, stands in both."""
    if event.id == thread:
        return True
    found = await thread_of(event, find)
    if found == thread:
        return True
    relation = relation_of(event)
    return found == MAIN and relation is not None and relation[1] == thread
