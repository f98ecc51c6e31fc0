"""Measures the speed budget over the client API: what `scripts/bench` runs.

It starts a relay of its own on loopback, in a temporary folder, with open registration and no rate limits, and shows
throughput, latency and the CPU time of its process tree beside the budget. Machines, and hours on one machine, differ
by a factor of two: what counts is the ratio to another homeserver measured in the same run, and the CPU time.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop

from scripts import bench_desk, bench_federation, bench_relays, bench_report, bench_scenarios
from scripts.bench_client import BenchError, Homeserver
from scripts.bench_federation import TwoSides
from scripts.bench_ground import FULL, QUICK, Bench, Figures, Size
from scripts.bench_machine import Meter, disk_mb_per_s, python_us

EXAMPLES = """\
examples:
  scripts/bench                                    every row that one relay can show
  scripts/bench --federation                       those of two relays as well
  scripts/bench --scenarios send,hot --rounds 3    two rows, the median of three
  scripts/bench --json before.json                 keeps the figures …
  scripts/bench --compare before.json              … and holds later ones against them
  scripts/bench --against http://127.0.0.1:8448 --pid 4242
                                                   another homeserver beside ours, taking turns
  scripts/bench --quick                            does everything still work? (no measurement)

Another homeserver has to listen on plain HTTP, let everybody register (or with --registration-token), and have its rate
limits off. Its CPU time needs --pid, the process ID of its main process.
"""


@dataclass
class Subject:
    """A server under measurement, and what was found so far: scenario, figure, one value a round."""

    name: str
    bench: Bench
    found: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, scenario: str, figures: Figures) -> None:
        for name, value in figures.items():
            self.found.setdefault(scenario, {}).setdefault(name, []).append(value)

    def medians(self) -> dict[str, dict[str, float]]:
        return {
            scenario: {name: statistics.median(values) for name, values in figures.items()}
            for scenario, figures in self.found.items()
        }


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    names = _chosen(options)
    try:
        earlier = None if options.compare is None else _read(options.compare)
        with tempfile.TemporaryDirectory(prefix="sealed-relay-bench-", dir=options.folder) as folder:
            return uvloop.run(_measure(options, names, Path(folder), earlier))
    except BenchError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped; nothing was written.", file=sys.stderr)
        return 130


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = ", ".join([*bench_scenarios.SCENARIOS, *bench_desk.SCENARIOS, *bench_federation.SCENARIOS])
    parser.add_argument("--scenarios", metavar="LIST", help=f"only these, with commas: {every}")
    parser.add_argument("--federation", action="store_true", help="two relays that federate, after the rows of one")
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="run each N times and take the median")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that all works, measures nothing")
    parser.add_argument("--against", metavar="URL", help="another homeserver, measured in turns with ours")
    parser.add_argument("--pid", type=int, help="the process ID of that homeserver, for its CPU time and memory")
    parser.add_argument("--registration-token", metavar="TOKEN", help="what that homeserver wants for registration")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="show an earlier file's figures beside these")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where the temporary folder goes (default: the system's)")  # fmt: skip
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error("--rounds is at least 1")
    if options.pid is not None and options.against is None:
        parser.error("--pid belongs to --against URL")
    return options


def _chosen(options: argparse.Namespace) -> list[str]:
    of_one = [*bench_scenarios.SCENARIOS, *bench_desk.SCENARIOS]
    known = [*of_one, *bench_federation.SCENARIOS]
    if options.scenarios is None:
        return known if options.federation else of_one
    names = [name.strip() for name in options.scenarios.split(",") if name.strip()]
    for name in names:
        if name not in known:
            print(f"There is no scenario {name}. Known are: {', '.join(known)}.", file=sys.stderr)
            sys.exit(2)
    return [name for name in known if name in names]


def _read(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        bench_report.earlier_figures(record)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as bad:
        raise BenchError(f"{path} is no file that scripts/bench --json wrote ({bad}).") from bad
    return record


async def _measure(options: argparse.Namespace, names: list[str], folder: Path, earlier: dict[str, Any] | None) -> int:
    size = QUICK if options.quick else FULL
    record: dict[str, Any] = {
        "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "quick": options.quick,
        "rounds": options.rounds,
        "machine": {"cores": os.cpu_count(), "python_us": round(python_us(), 2)},
    }
    print(
        f"machine: {os.cpu_count()} cores, {record['machine']['python_us']} us for the fixed piece of work", flush=True
    )
    if earlier is not None:
        print(
            f"compared with a run of {earlier.get('made')}, {earlier.get('machine', {}).get('python_us')} us",
            flush=True,
        )
    subjects: list[Subject] = []
    failures: list[str] = []
    single = [name for name in names if name in bench_scenarios.SCENARIOS]
    if single:
        with bench_relays.alone(folder / "relay") as running:
            subjects.append(_subject("relay", running.url, running.pid, size))
            if options.against is not None:
                subjects.append(_subject("other", options.against, options.pid, size, options.registration_token))
            for subject in subjects:
                idle = subject.bench.meter.memory_mb()
                subject.add("memory", {"idle_mb": idle})
            for _ in range(options.rounds):
                for name in single:
                    for subject in subjects:  # in turns, so that a slow hour is slow for both
                        await _one(subject, name, bench_scenarios.SCENARIOS[name](subject.bench), failures)
            if "media" in single:
                disk = disk_mb_per_s(folder)
                for subject in subjects:
                    subject.add("media", {"disk_mb_per_s": disk})
    relay = subjects[0].medians() if subjects else {}
    relay |= await _at_the_desk(options, names, folder, size, failures)
    double = [name for name in names if name in bench_federation.SCENARIOS]
    if double:
        with bench_relays.federating(folder / "two") as (here, there):
            pair = TwoSides(Homeserver(here.url), Homeserver(there.url), Meter(here.pid), Meter(there.pid), size)
            two = Subject("relays", Bench(pair.here, pair.meter_here, size))
            for _ in range(options.rounds):
                for name in double:
                    await _one(two, name, bench_federation.SCENARIOS[name](pair), failures)
            relay |= two.medians()
    other = subjects[1].medians() if len(subjects) > 1 else None
    record |= {"relay": relay, "failures": failures}
    if other is not None:
        record["other"] = other
    print()
    before = None if earlier is None else bench_report.earlier_figures(earlier)
    print(bench_report.table(relay, other, before, judged=not options.quick))
    if options.quick:
        print("\nThat was --quick: everything was tried, with sizes far too small to measure anything.")
    if options.json is not None:
        options.json.write_text(json.dumps(_rounded(record), indent=1) + "\n")
        print(f"\nThe figures are in {options.json}.")
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


async def _at_the_desk(
    options: argparse.Namespace, names: list[str], folder: Path, size: Size, failures: list[str]
) -> dict[str, dict[str, float]]:
    """Moderation is this relay's own: no other homeserver is measured beside it."""
    found: dict[str, dict[str, float]] = {}
    for name in [name for name in names if name in bench_desk.SCENARIOS]:
        subject = None
        for number in range(options.rounds):
            home = folder / f"{name}-{number}"
            async with bench_desk.Receiver().listening() as receiver:
                with bench_relays.alone(home, receiver.config) as running:
                    async with bench_desk.office(running.url, running.pid, home, size, receiver) as office:
                        subject = subject or Subject("desk", Bench(office.homeserver, office.meter, size))
                        await _one(subject, name, bench_desk.SCENARIOS[name](office), failures)
        found |= subject.medians() if subject is not None else {}
    return found


def _subject(name: str, url: str, pid: int | None, size: Size, token: str | None = None) -> Subject:
    return Subject(name, Bench(Homeserver(url, token), Meter(pid), size))


async def _one(subject: Subject, name: str, under_way: Awaitable[Figures], failures: list[str]) -> None:
    """A scenario that fails is told, and the others go on."""
    begun = time.perf_counter()
    try:
        figures = await under_way
    except (BenchError, OSError, ExceptionGroup) as error:
        told = "; ".join(str(one) for one in error.exceptions) if isinstance(error, ExceptionGroup) else str(error)
        failures.append(f"{subject.name}: {name} failed: {told}")
        print(failures[-1], file=sys.stderr, flush=True)
        return
    figures["memory_mb"] = subject.bench.meter.memory_mb()
    subject.add(name, figures)
    shown = "  ".join(f"{key} {value:.4g}" for key, value in figures.items())
    print(f"{subject.name:6} {name:12} [{time.perf_counter() - begun:5.1f} s]  {shown}", flush=True)


def _rounded(value: Any) -> Any:
    """Five figures are enough, and NaN is no JSON."""
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, float):
        return None if math.isnan(value) else float(f"{value:.5g}")
    return value


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())
