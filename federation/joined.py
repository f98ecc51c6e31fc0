"""Callers who want the same thing at the same time share one attempt, its answer and its failure."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

V = TypeVar("V")


class Joined(Generic[V]):
    def __init__(self) -> None:
        self._under_way: dict[str, asyncio.Future[V]] = {}

    async def get(self, key: str, attempt: Callable[[], Awaitable[V]]) -> V:
        while (running := self._under_way.get(key)) is not None:
            try:
                return await asyncio.shield(running)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if not running.cancelled() or (task is not None and task.cancelling()):
                    raise
                # Whoever made the attempt hung up, so somebody else makes it.
        future: asyncio.Future[V] = asyncio.get_running_loop().create_future()
        self._under_way[key] = future
        try:
            value = await attempt()
        except asyncio.CancelledError:
            future.cancel()
            raise
        except BaseException as error:
            future.set_exception(error)
            future.exception()  # nobody else may have waited; that is no second error
            raise
        finally:
            del self._under_way[key]
        future.set_result(value)
        return value
