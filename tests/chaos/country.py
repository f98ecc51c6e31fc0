"""Three relays, each a process of its own, and a Synapse if there is one; between any two of them a wire each way.

Everything that the story decides, it decides by the seed: what people do, which wires break and when, who is killed, by how
much each clock is off. What the machine does in between is its own affair.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from pathlib import Path

from relay.clock import HOUR
from tests.chaos.wires import Wire
from tests.interop.neighbour import Synapse
from tests.people import Person
from tests.town import PASSWORD, Apart, Town, free_port

RELAYS = ("one", "two", "three")
SYNAPSE = "synapse"
MAX_SKEW = HOUR
# One way; a question and its answer take twice as long, a new connection several times.
MAX_DELAY_S = 0.15

# Whoever was away is tried again soon: the story has no patience for hours.
SETTINGS = "federation: {extra_ca_file: ca.crt, outbox_backoff_min: 500ms, outbox_backoff_max: 3s, request_timeout: 5s}"


class Tossed(Apart):
    """A relay behind wires, with a clock that is off by something else after each start."""

    module = "tests.chaos.launch"

    def __init__(self, town: Town, nickname: str, known_port: int) -> None:
        super().__init__(town, nickname, SETTINGS, known_port=known_port)
        self.ways: dict[int, int] = {}
        self.skew_ms = 0
        # One at a time kills, stops or starts it.
        self.hand = asyncio.Lock()

    def environment(self) -> dict[str, str]:
        return {**super().environment(), "CHAOS": json.dumps({"ways": self.ways, "skew_ms": self.skew_ms})}


class Country:
    def __init__(self, town: Town, seed: int) -> None:
        self.town = town
        self.chance = random.Random(seed)
        self.relays: dict[str, Tossed] = {}
        self.synapse: Synapse | None = None
        self.wires: dict[tuple[str, str], Wire] = {}

    @property
    def names(self) -> list[str]:
        return [*self.relays, *([SYNAPSE] if self.synapse is not None else [])]

    async def opens(self, synapse_folder: Path | None) -> None:
        known = {name: free_port() for name in (*RELAYS, SYNAPSE)}
        for name in RELAYS:
            self.relays[name] = Tossed(self.town, name, known[name])
            self.town.houses[name] = self.relays[name]
        if synapse_folder is not None:
            self.synapse = Synapse(synapse_folder, self.town.authority, known_port=known[SYNAPSE])
        for source, target in itertools.permutations(self.names, 2):
            behind = self.relays.get(target, self.synapse)
            assert behind is not None
            # Synapse knows no wires: what is known of the others leads it to its own.
            port = known[target] if source == SYNAPSE else free_port()
            wire = self.wires[source, target] = Wire(
                port, behind.federation_port, self.chance.uniform(0.0, MAX_DELAY_S)
            )
            await wire.opens()
            if source in self.relays:
                self.relays[source].ways[known[target]] = port
        for relay in self.relays.values():
            relay.skew_ms = self.chance.randint(-MAX_SKEW, MAX_SKEW)
        starts = [relay.start() for relay in self.relays.values()]
        if self.synapse is not None:
            await asyncio.gather(*starts, asyncio.to_thread(self.synapse.start))
        else:
            await asyncio.gather(*starts)

    async def closes(self) -> None:
        for wire in self.wires.values():
            await wire.closes()
        if self.synapse is not None:
            await asyncio.to_thread(self.synapse.stop)

    async def user(self, name: str, server: str) -> Person:
        if server == SYNAPSE:
            assert self.synapse is not None
            return await self.synapse.user(self.town.http, name)
        relay = self.relays[server]
        person = Person(self.town.http, relay.url, relay.name, name, PASSWORD)
        await person.registers()
        return person

    # --- the weather

    async def weather(self, seconds: float) -> None:
        """Bad for so long, and then it clears."""
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        falls: list[asyncio.Task[None]] = []
        while loop.time() < until:
            self._something_breaks(falls)
            await asyncio.sleep(self.chance.uniform(0.1, 0.6))
        await asyncio.gather(*falls)
        for wire in self.wires.values():
            wire.mend()

    def _something_breaks(self, falls: list[asyncio.Task[None]]) -> None:
        what = self.chance.random()
        pair = self.chance.choice(sorted(self.wires))
        relay = self.relays[self.chance.choice(RELAYS)]
        pause_s, skew_ms = self.chance.uniform(0.0, 1.5), self.chance.randint(-MAX_SKEW, MAX_SKEW)
        if what < 0.2:
            self.wires[pair].cut()
        elif what < 0.3:
            self.wires[pair].cut()
            self.wires[pair[::-1]].cut()
        elif what < 0.4:
            self.wires[pair].stands_still()
        elif what < 0.55:
            self.wires[pair].breaks()
        elif what < 0.8:
            for other in self.chance.sample(sorted(self.wires), len(self.wires) // 3):
                self.wires[other].mend()
        else:
            falls.append(asyncio.create_task(self._falls(relay, pause_s, skew_ms, gently=what > 0.92)))

    async def _falls(self, relay: Tossed, pause_s: float, skew_ms: int, *, gently: bool) -> None:
        if relay.hand.locked():
            return
        async with relay.hand:
            if gently:
                await relay.stop()
            else:
                await relay.kill()
            await asyncio.sleep(pause_s)
            relay.skew_ms = skew_ms
            await relay.start()

    def logs(self) -> str:
        """The end of what each said, for a story that fails."""
        said = {name: relay.log.read_text(errors="replace")[-2000:] for name, relay in self.relays.items()}
        if self.synapse is not None:
            said[SYNAPSE] = self.synapse.said()
        return "\n".join(f"--- {name}\n{text}" for name, text in said.items())
