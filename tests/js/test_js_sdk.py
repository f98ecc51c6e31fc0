"""matrix-js-sdk with its Rust crypto, unmodified, through a full life on two relays; `life.mjs` is that life."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from pathlib import Path

from tests.town import Town

LIFE_SECONDS = 240

STEPS = [
    "register",
    "cross-signing",
    "secret storage and key backup",
    "encrypted room between two relays",
    "100 messages in order",
    "encrypted attachment",
    "edit",
    "reaction refused under the seal",
    "reaction where privacy.allow lists it",
    "redaction",
    "second device, verified by emoji",
    "second device restores history from backup",
    "both devices hear what is said next",
    "device removed",
    "kick",
    "logout",
]


async def test_a_life_of_matrix_js_sdk(town: Town, workshop: Path) -> None:
    one = await town.relay_apart("one")
    two = await town.relay_apart("two", "privacy: {allow: [m.reaction]}\n")
    process = await asyncio.create_subprocess_exec(
        "node", "life.mjs", one.url, two.url, cwd=workshop,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "NODE_ENV": "test"},
    )  # fmt: skip
    late = False
    reading = asyncio.create_task(process.communicate())
    try:
        await asyncio.wait_for(asyncio.shield(reading), LIFE_SECONDS)
    except TimeoutError:
        late = True
        process.kill()
    said, complained = await reading
    steps = [json.loads(line) for line in said.splitlines() if line.startswith(b"{")]
    for step in steps:
        assert step["ok"], f"matrix-js-sdk stumbled over “{step['step']}”: {step.get('error')}"
    got = [step["step"] for step in steps]
    assert not late, f"the life did not end within {LIFE_SECONDS} s; it went as far as {got[-1:]}"
    assert got == STEPS, f"every step was taken; the last was {got[-1:]}, and then: {complained.decode()[-2000:]}"
    assert process.returncode == 0, f"the client ended well: {complained.decode()[-2000:]}"
