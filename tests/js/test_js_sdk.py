"""matrix-js-sdk with its Rust crypto, unmodified, through a full life on two relays; `life.mjs` is that life.

The packages are installed by `npm ci` from the lock into `.cache/js` of the repository (ignored by git), once for each
state of the lock. Skipped where Node 20, npm or the packages can't be had.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.town import ROOT, Town

HERE = Path(__file__).parent
CACHE = ROOT / ".cache" / "js"
OLDEST_NODE = 20
INSTALL_SECONDS = 120
LIFE_SECONDS = 120

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


@pytest.fixture(scope="module")
def workshop() -> Path:
    """A folder with the packages of the lock, and `life.mjs` beside them."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("matrix-js-sdk was not tried: node and npm are not installed")
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    if int(version.lstrip("v").split(".")[0]) < OLDEST_NODE:
        pytest.skip(f"matrix-js-sdk was not tried: it needs Node {OLDEST_NODE} or later, here is {version}")
    lock = (HERE / "package-lock.json").read_bytes()
    folder = CACHE / hashlib.sha256(lock).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "installed").exists():
        for name in ("package.json", "package-lock.json"):
            shutil.copy(HERE / name, folder)
        command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=INSTALL_SECONDS)
        except subprocess.TimeoutExpired:
            pytest.skip(f"matrix-js-sdk was not tried: npm did not install it within {INSTALL_SECONDS} s")
        if done.returncode:
            # Only a registry that can't be reached excuses: a lock that does not fit is our own fault.
            unreachable = ("ENOTFOUND", "ECONNREFUSED", "ECONNRESET", "ETIMEDOUT", "EAI_AGAIN", "ERR_SOCKET_TIMEOUT")
            if any(code in done.stderr for code in unreachable):
                pytest.skip("matrix-js-sdk was not tried: the package registry can't be reached")
            pytest.fail(f"npm ci failed:\n{done.stderr[-2000:]}")
        (folder / "installed").touch()
    shutil.copy(HERE / "life.mjs", folder)
    return folder


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
