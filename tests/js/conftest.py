"""Where matrix-js-sdk is tried, unmodified: `npm ci` installs the lock's packages into `.cache/js` of the repository.

That folder is ignored by git, and made once for each state of the lock. Skipped where Node 20, npm or the packages can't
be had.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.town import ROOT

HERE = Path(__file__).parent
CACHE = ROOT / ".cache" / "js"
OLDEST_NODE = 20
INSTALL_SECONDS = 120


@pytest.fixture(scope="session")
def workshop() -> Path:
    """A folder with the packages of the lock, and our scripts beside them."""
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
    for script in HERE.glob("*.mjs"):
        shutil.copy(script, folder)
    return folder
