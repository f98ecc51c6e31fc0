"""Where real clients are tried, unmodified: `npm ci` installs the lock's packages into `.cache/js` of the repository.

That folder is ignored by git, and made once for each state of the lock. Pages are bundled there and served on loopback, to a
real Chromium. Skipped where Node 20, npm, the packages or a Chromium can't be had.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web
from playwright.async_api import Browser, async_playwright

from tests.town import ROOT

HERE = Path(__file__).parent
CACHE = ROOT / ".cache" / "js"
OLDEST_NODE = 20
INSTALL_SECONDS = 120
BUNDLE_SECONDS = 60
# A browser of the town asks nobody outside it.
QUIET = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="session")
def workshop() -> Path:
    return workshop_of(HERE, "*.mjs")


def workshop_of(here: Path, scripts: str) -> Path:
    """A folder with the packages of the lock that lies `here`, and the scripts from there beside them."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("web clients were not tried: node and npm are not installed")
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    if int(version.lstrip("v").split(".")[0]) < OLDEST_NODE:
        pytest.skip(f"web clients were not tried: they need Node {OLDEST_NODE} or later, here is {version}")
    lock = (here / "package-lock.json").read_bytes()
    folder = CACHE / hashlib.sha256(lock).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as mine:
        # Tests run in several processes, and this is there once.
        fcntl.flock(mine, fcntl.LOCK_EX)
        _install(npm, here, folder)
        for script in here.glob(scripts):
            there = folder / script.name
            if not there.exists() or there.read_bytes() != script.read_bytes():
                shutil.copy(script, folder)
    return folder


def _install(npm: str, here: Path, folder: Path) -> None:
    if (folder / "installed").exists():
        return
    for name in ("package.json", "package-lock.json"):
        shutil.copy(here / name, folder)
    command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=INSTALL_SECONDS)
    except subprocess.TimeoutExpired:
        pytest.skip(f"web clients were not tried: npm did not install them within {INSTALL_SECONDS} s")
    if done.returncode:
        # Only a registry that can't be reached excuses: a lock that does not fit is our own fault.
        unreachable = ("ENOTFOUND", "ECONNREFUSED", "ECONNRESET", "ETIMEDOUT", "EAI_AGAIN", "ERR_SOCKET_TIMEOUT")
        if any(code in done.stderr for code in unreachable):
            pytest.skip("web clients were not tried: the package registry can't be reached")
        pytest.fail(f"npm ci failed:\n{done.stderr[-2000:]}")
    (folder / "installed").touch()


async def bundled(workshop: Path, script: str, *options: str) -> Path:
    """The folder of a page with its script in it, bundled; what else it needs is for the caller to put there."""
    name = script.removesuffix(".mjs")
    served = workshop / "served" / name
    served.mkdir(parents=True, exist_ok=True)
    command = [
        "node_modules/.bin/esbuild",
        script,
        "--bundle",
        "--format=esm",
        f"--outfile={served / name}.js",
        *options,
    ]
    done = await asyncio.to_thread(
        subprocess.run, command, cwd=workshop, capture_output=True, text=True, timeout=BUNDLE_SECONDS
    )
    assert done.returncode == 0, f"the page is bundled: {done.stderr[-2000:]}"
    return served


@asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[str]:
    """Its address on loopback, as long as it is handed out."""
    app = web.Application()
    app.router.add_static("/", folder)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no web client was tried: there is no Chromium here (apt-get install chromium)")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium, args=QUIET)
        yield browser
        await browser.close()
