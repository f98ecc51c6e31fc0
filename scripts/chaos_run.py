"""What `scripts/chaos` runs: the story of tests/chaos with other seeds and for longer, one seed after another."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
EXAMPLES = """\
examples:
  scripts/chaos                              one seed that nobody chose, for a minute
  scripts/chaos --seed 7 --minutes 5         the same storm as the last time with seed 7
  scripts/chaos --seed 1 --rounds 20         seeds 1 to 20, a minute each
  scripts/chaos --only relays                without Synapse

A seed decides who says what and which wires break when; what the machine does in between is its own affair, so a failure may
take a few attempts to come again. Where one fails, the folder it names keeps all databases and logs."""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/chaos",
        description="Three relays and a Synapse: wires break, relays are killed, clocks are off, and everybody talks on. "
        "Afterwards all have to agree and nothing may be lost.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seed", type=int, help="the first seed (without it: a random one, which is printed)")
    parser.add_argument("--minutes", type=float, default=1.0, help="of bad weather for each seed (default: 1)")
    parser.add_argument("--rounds", type=int, default=1, help="how many seeds, one after another (default: 1)")
    parser.add_argument("--only", choices=("synapse", "relays"), help="only with, or only without Synapse")
    arguments = parser.parse_args()
    first = arguments.seed if arguments.seed is not None else int.from_bytes(os.urandom(3), "big")
    failed = [seed for seed in range(first, first + arguments.rounds) if not _passes(seed, arguments)]
    if failed:
        print(f"Failed: seed {', '.join(map(str, failed))} of {arguments.rounds}.", file=sys.stderr)
        return 1
    print(f"All well: {arguments.rounds} seeds from {first} on.")
    return 0


def _passes(seed: int, arguments: argparse.Namespace) -> bool:
    folder = Path(tempfile.mkdtemp(prefix=f"chaos-{seed}-"))
    seconds = arguments.minutes * 60
    print(f"== seed {seed}, {seconds:.0f} s of bad weather, in {folder}", flush=True)
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "--basetemp", str(folder / "houses"),
            "-o", "faulthandler_timeout=0", "-o", "tmp_path_retention_policy=failed", "tests/chaos",
            *(["-k", arguments.only] if arguments.only else []),
        ],
        cwd=ROOT, env={**os.environ, "CHAOS_SEED": str(seed), "CHAOS_SECONDS": str(seconds)}, check=False,
    )  # fmt: skip
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
