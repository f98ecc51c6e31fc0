"""A wire from one server to another: a port that passes on every byte after a while, until it is cut, stands still, or breaks."""

from __future__ import annotations

import asyncio
from contextlib import suppress


class Wire:
    def __init__(self, port: int, target_port: int, delay_s: float) -> None:
        self.port = port
        self._delay_s = delay_s
        self._target_port = target_port
        self._cut = False
        self._flows = asyncio.Event()
        self._flows.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def opens(self) -> None:
        self._listening = await asyncio.start_server(self._serves, "127.0.0.1", self.port)

    async def closes(self) -> None:
        self._listening.close()
        self.breaks()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # --- the weather

    def cut(self) -> None:
        """What runs breaks off, and nobody gets through."""
        self._cut = True
        self.breaks()

    def stands_still(self) -> None:
        """Who talks waits for an answer, and nothing says that none will come."""
        self._flows.clear()

    def breaks(self) -> None:
        """What runs breaks off in the middle; the next attempt gets through."""
        for writer in self._writers:
            writer.transport.abort()

    def mend(self) -> None:
        self._cut = False
        self._flows.set()

    # --- what runs through it

    async def _serves(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        far: asyncio.StreamWriter | None = None
        try:
            if self._cut:
                return
            far_reader, far = await asyncio.open_connection("127.0.0.1", self._target_port)
            self._writers.add(far)
            await asyncio.gather(self._passes(reader, far), self._passes(far_reader, writer))
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            for one in (writer, far):
                if one is not None:
                    self._writers.discard(one)
                    one.transport.abort()

    async def _passes(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while piece := await reader.read(65536):
            await asyncio.sleep(self._delay_s)
            await self._flows.wait()
            writer.write(piece)
            await writer.drain()
        with suppress(OSError):
            writer.write_eof()
