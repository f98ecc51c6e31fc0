"""The bench itself: a quick run over both kinds of rows gives a table and figures that a later run can be held against.

No figure is judged here: the machine that runs the tests is nobody's yardstick.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from scripts import bench_report
from scripts.bench_desk import SCENARIOS as OF_THE_DESK
from scripts.bench_federation import SCENARIOS as OF_TWO
from scripts.bench_scenarios import SCENARIOS as OF_ONE

ROOT = Path(__file__).parent.parent


def _bench(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "scripts.bench_main", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def test_a_quick_run_measures_every_row_and_a_later_one_is_held_against_it(tmp_path: Path) -> None:
    first = tmp_path / "first.json"
    ran = _bench("--quick", "--federation", "--json", str(first))
    assert ran.returncode == 0, f"every scenario comes to its end: {ran.stderr[-3000:]}"
    record = json.loads(first.read_text())
    assert set(record["relay"]) == {*OF_ONE, *OF_THE_DESK, *OF_TWO}, "the file holds every scenario"
    for line in bench_report.LINES:
        assert line.label in ran.stdout, f"the table has a line for: {line.label.strip()}"
        assert line.figure in record["relay"][line.scenario], f"{line.scenario} measures {line.figure}"

    again = _bench("--quick", "--scenarios", "empty,media", "--compare", str(first))
    assert again.returncode == 0, f"a few scenarios can be run alone: {again.stderr[-3000:]}"
    assert "before" in again.stdout and "change" in again.stdout, "the earlier figures stand beside the new ones"


def test_a_wrong_word_is_told_before_anything_is_started(tmp_path: Path) -> None:
    ran = _bench("--scenarios", "send,teleport")
    assert ran.returncode == 2 and "teleport" in ran.stderr, "an unknown scenario is named, with those that are known"
    strange = tmp_path / "strange.json"
    strange.write_text("[]")
    ran = _bench("--quick", "--compare", str(strange))
    assert ran.returncode == 1 and "strange.json" in ran.stderr, (
        "a file that is not the bench's own is not compared with"
    )


def test_the_table_says_what_is_kept_and_what_is_missed() -> None:
    ours = {"send": {"per_s": 3000.0, "cpu_ms": 0.42}}
    theirs = {"send": {"per_s": 100.0, "cpu_ms": 8.4}}
    table = bench_report.table(ours, theirs, None, judged=True).splitlines()
    rate, cpu = table[2], table[3]
    assert "kept" in rate and "30.00x" in rate, "more messages are better"
    assert "missed, 1.20 of it" in cpu and "20.00x" in cpu, "less CPU is better"
    assert "before" not in table[0], "nothing is compared where no earlier file was given"
