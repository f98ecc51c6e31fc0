"""Sets up `.venv` for the other scripts: a virtual environment with the locked dependencies, checked by their hashes.

`set_up.py run` installs what the relay needs, `set_up.py test` what the tests need as well. Only the standard library,
any Python from 3.11; called again with nothing changed it returns at once. Two that run together wait for one another.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
LOCKS = ROOT / "requirements"

# A shell line first, which Python reads as a string: the path may be long, or hold spaces.
COMMAND = """\
#!/bin/sh
'''exec' "{python}" "$0" "$@"
' '''
import sys

from relay.__main__ import main

sys.exit(main())
"""


def main(kind: str) -> int:
    # The lock stands beside the environment, which may be made anew meanwhile.
    with (ROOT / ".venv.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # The tests' environment holds the relay's versions too, so either will do for running.
        if (VENV / "bin" / "python").exists() and any(_is_stamped(enough) for enough in {kind, "test"}):
            return 0
        try:
            _set_up(kind)
        except subprocess.CalledProcessError as failed:
            print(
                f"\nThe environment .venv could not be set up (step: {' '.join(map(str, failed.cmd[1:5]))} …).\n"
                "Above stands why. Most often it is the network: try again. A fresh start: rm -rf .venv",
                file=sys.stderr,
            )
            return 1
    return 0


def _set_up(kind: str) -> None:
    python = VENV / "bin" / "python"
    print("Setting up .venv (once; takes a minute or two) …", file=sys.stderr)
    if not _usable(python):
        subprocess.run([sys.executable, "-m", "venv", "--clear", VENV], check=True, stdout=sys.stderr)
    for old in VENV.glob("*.stamp"):
        old.unlink()
    install: list[str | Path] = [python, "-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check"]
    subprocess.run(
        [*install, "--require-hashes", "-r", LOCKS / f"{kind}.lock"],
        check=True,
        stdout=sys.stderr,
        env={"PIP_DEFAULT_TIMEOUT": "60", **os.environ},
    )
    # The relay itself runs from this folder; a .pth file does that without a build step that would need more packages.
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    Path(site, "sealed_relay.pth").write_text(f"{ROOT}\n")
    command = VENV / "bin" / "relay"
    command.write_text(COMMAND.format(python=python))
    command.chmod(0o755)
    _stamp(kind).write_text(_wanted(kind))


def _usable(python: Path) -> bool:
    """Whether the environment that is there works where it stands, with whatever good Python it was made."""
    if not python.exists():
        return False
    asked = "import sys, pip; print(sys.version_info >= (3, 11), sys.prefix)"
    answer = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=False)
    return answer.returncode == 0 and answer.stdout.strip() == f"True {VENV}"


def _stamp(kind: str) -> Path:
    return VENV / f"{kind}.stamp"


def _is_stamped(kind: str) -> bool:
    return _stamp(kind).is_file() and _stamp(kind).read_text() == _wanted(kind)


def _wanted(kind: str) -> str:
    lock = hashlib.sha256((LOCKS / f"{kind}.lock").read_bytes()).hexdigest()
    return f"{lock}\n{ROOT}\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
