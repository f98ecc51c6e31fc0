"""Starts a relay whose clock is off and whose ways to others lead through the story's wires; all else is the relay as it is.

`CHAOS` in the environment is JSON: `skew_ms`, and `ways`, from the port by which a server is known to that of the wire.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from yarl import URL

from federation.exchange import Reply
from federation.outward import Outward
from relay.__main__ import main
from relay.clock import SystemClock

told = json.loads(os.environ["CHAOS"])
ways = {int(known): wire for known, wire in told["ways"].items()}
now, request = SystemClock.now, Outward.request


def off(clock: SystemClock) -> int:
    return now(clock) + int(told["skew_ms"])


async def through_the_wire(outward: Outward, method: str, url: URL, **rest: Any) -> Reply:
    return await request(outward, method, url.with_port(ways.get(url.port or 0, url.port)), **rest)


if __name__ == "__main__":
    SystemClock.now = off  # type: ignore[method-assign]
    Outward.request = through_the_wire  # type: ignore[method-assign,assignment]
    sys.exit(main())
