"""The speed budget as a table, and the figures held against it: as text for people, as JSON for a later comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Scenario, then figure.
Measured = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Line:
    """One figure of the table. Without a budget it is shown for what it tells beside the others."""

    scenario: str
    figure: str
    label: str
    unit: str
    budget: float | None = None
    more_is_better: bool = False


def _spread(scenario: str, prefix: str = "", what: str = "") -> tuple[Line, ...]:
    return tuple(
        Line(scenario, f"{prefix}p{share}_ms", f"  {what}p{share}", "ms") for share in (50, 95, 99)
    )  # fmt: skip


LINES: tuple[Line, ...] = (
    Line("send", "per_s", "send, 20 senders in 20 rooms", "/s", 2800, True),
    Line("send", "cpu_ms", "  CPU a message", "ms", 0.35),
    *_spread("send"),
    Line("hot", "per_s", "send, 20 senders in one room", "/s", 2800, True),
    Line("hot", "cpu_ms", "  CPU a message", "ms", 0.35),
    *_spread("hot"),
    Line("pair", "p50_ms", "one sender to one long poll, p50", "ms", 2),
    Line("pair", "p95_ms", "  p95", "ms"),
    Line("pair", "p99_ms", "  p99", "ms"),
    Line("pair", "cpu_ms", "  CPU a message", "ms"),
    Line("fan100", "last_ms", "to 100 viewers, the last has it, p50", "ms", 15),
    Line("fan100", "cpu_ms", "  CPU a delivery", "ms"),
    *_spread("fan100", what="each viewer, "),
    Line("fan500", "last_ms", "to 500 viewers, the last has it, p50", "ms", 60),
    Line("fan500", "cpu_ms", "  CPU a delivery", "ms", 0.14),
    *_spread("fan500", what="each viewer, "),
    Line("initial", "first_ms", "initial /sync, 100 rooms of 10, cold", "ms", 40),
    Line("initial", "cpu_ms", "  CPU", "ms", 25),
    Line("initial", "answer_mb", "  size of the answer", "MB"),
    *_spread("initial"),
    Line("empty", "cpu_ms", "empty incremental /sync, CPU", "ms", 0.2),
    *_spread("empty"),
    Line("sliding", "window_p50_ms", "sliding sync, window of 20 of 500 rooms, p50", "ms", 15),
    Line("sliding", "window_first_ms", "  cold", "ms"),
    Line("sliding", "window_p95_ms", "  p95", "ms"),
    Line("sliding", "window_p99_ms", "  p99", "ms"),
    Line("sliding", "window_cpu_ms", "  CPU", "ms"),
    Line("sliding", "answer_mb", "  size of the answer", "MB"),
    Line("sliding", "change_p50_ms", "sliding sync, a step with one change, p50", "ms", 2),
    Line("sliding", "change_p95_ms", "  p95", "ms"),
    Line("sliding", "change_p99_ms", "  p99", "ms"),
    Line("sliding", "change_cpu_ms", "  CPU", "ms"),
    Line("to_device", "cpu_ms", "to-device, 100 a request, CPU each", "ms", 0.020),
    Line("to_device", "per_s", "  messages", "/s"),
    *_spread("to_device", what="a request, "),
    Line("keys", "upload_cpu_ms", "keys/upload of 50 one-time keys, CPU", "ms", 0.6),
    *_spread("keys", "upload_"),
    Line("keys", "query_p50_ms", "keys/query for 100 devices, p50", "ms", 2.0),
    Line("keys", "query_p95_ms", "  p95", "ms"),
    Line("keys", "query_p99_ms", "  p99", "ms"),
    Line("keys", "query_cpu_ms", "  CPU", "ms"),
    Line("keys", "claim_p50_ms", "keys/claim for 100 devices, p50", "ms", 2.5),
    Line("keys", "claim_p95_ms", "  p95", "ms"),
    Line("keys", "claim_p99_ms", "  p99", "ms"),
    Line("keys", "claim_cpu_ms", "  CPU", "ms"),
    Line("media", "up_mb_per_s", "media of 8 MiB up", "MB/s", 500, True),
    Line("media", "disk_mb_per_s", "  the disk's own synced write", "MB/s", None, True),
    Line("media", "down_mb_per_s", "media of 8 MiB down", "MB/s", 1000, True),
    Line("media", "cpu_ms", "  CPU, up and down", "ms"),
    *_spread("media", "up_", "up, "),
    *_spread("media", "down_", "down, "),
    Line("memory", "idle_mb", "memory idle", "MB", 60),
    Line("memory", "after_mb", "memory after 700 users", "MB", 110),
    Line("desk", "queue_p50_ms", "the desk's queue, 1,000 reports in it, p50", "ms", 100),
    Line("desk", "queue_p95_ms", "  p95", "ms"),
    Line("desk", "queue_p99_ms", "  p99", "ms"),
    Line("desk", "queue_cpu_ms", "  CPU", "ms"),
    Line("desk", "case_p50_ms", "  a case's page, p50", "ms", 100),
    Line("desk", "case_p95_ms", "  p95", "ms"),
    Line("desk", "case_cpu_ms", "  CPU", "ms"),
    Line("desk", "list_p50_ms", "  the same list over the API, p50", "ms"),
    Line("desk", "list_cpu_ms", "  CPU", "ms"),
    Line("desk", "webhook_p50_ms", "a report reaches the webhook, p50", "ms", 1000),
    Line("desk", "webhook_p95_ms", "  p95", "ms"),
    Line("desk", "room_p50_ms", "  the moderators' room, p50", "ms", 1000),
    Line("desk", "room_p95_ms", "  p95", "ms"),
    Line("desk", "reports_per_s", "reports, 20 at a time", "/s", None, True),
    Line("desk", "report_cpu_ms", "  CPU a message and its report", "ms"),
    Line("remote_pair", "p50_ms", "federation, to a long poll there, p50", "ms", 4),
    Line("remote_pair", "p95_ms", "  p95", "ms"),
    Line("remote_pair", "p99_ms", "  p99", "ms"),
    Line("remote_pair", "here_cpu_ms", "  CPU of the sending side", "ms", 0.8),
    Line("remote_pair", "there_cpu_ms", "  CPU of the receiving side", "ms", 1.0),
    Line("remote_flow", "arrived_per_s", "federation, 20 senders in 10 rooms", "/s", 900, True),
    Line("remote_flow", "sent_per_s", "  sent meanwhile", "/s", None, True),
    Line("remote_flow", "lag_ms", "  the last arrives after the end by", "ms"),
    Line("remote_flow", "here_cpu_ms", "  CPU of the sending side", "ms", 0.6),
    Line("remote_flow", "there_cpu_ms", "  CPU of the receiving side", "ms", 0.8),
    Line("remote_join", "answer_ms", "join of a 1,000-member room, answer", "ms", 120),
    Line("remote_join", "all_members_ms", "  all members known", "ms", 600),
    Line("remote_join", "first_send_ms", "  the newcomer's first send", "ms"),
    Line("remote_join", "here_cpu_ms", "  CPU of the resident side", "ms"),
    Line("remote_join", "there_cpu_ms", "  CPU of the joining side", "ms"),
    Line("remote_large", "answer_ms", "join of a room of 50,000 state events, answer", "ms"),
    Line("remote_large", "first_send_ms", "  the newcomer's first send", "ms"),
    Line("remote_large", "all_members_s", "  all members known", "s"),
    Line("remote_large", "meanwhile_p99_ms", "  others wait meanwhile, p99", "ms"),
    Line("remote_large", "there_memory_mb", "  most memory of the joining side", "MB"),
    Line("remote_large", "here_cpu_ms", "  CPU of the resident side", "ms"),
    Line("remote_large", "there_cpu_ms", "  CPU of the joining side", "ms"),
)


def table(relay: Measured, other: Measured | None, earlier: Measured | None, *, judged: bool) -> str:
    """One line a figure: ours, the budget and whether it is kept, then the other server's and the earlier run's.

    `judged` False leaves the verdict out, where the sizes were too small for one.
    """
    head = ["work", "relay", "budget", ""]
    if other is not None:
        head += ["other", "ratio"]
    if earlier is not None:
        head += ["before", "change"]
    rows: list[list[str]] = []
    for line in LINES:
        values = [one.get(line.scenario, {}).get(line.figure) for one in (relay, other or {}, earlier or {})]
        ours, theirs, before = values
        if ours is None and theirs is None:
            continue
        row = [
            line.label,
            _shown(ours, line.unit),
            _shown(line.budget, line.unit),
            _verdict(line, ours) if judged else "",
        ]
        if other is not None:
            row += [_shown(theirs, line.unit), _ratio(line, ours, theirs)]
        if earlier is not None:
            row += [_shown(before, line.unit), _change(ours, before)]
        rows.append(row)
    return _aligned(head, rows)


def _shown(value: float | None, unit: str) -> str:
    if value is None or math.isnan(value):
        return ""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 0.1 else 4
    return f"{value:,.{digits}f} {unit}"


def _verdict(line: Line, value: float | None) -> str:
    if line.budget is None or value is None or math.isnan(value):
        return ""
    if value >= line.budget if line.more_is_better else value <= line.budget:
        return "kept"
    return f"missed, {value / line.budget:.2f} of it"


def _ratio(line: Line, ours: float | None, theirs: float | None) -> str:
    """How many times better we are, whichever way better is."""
    if not ours or not theirs:
        return ""
    return f"{ours / theirs if line.more_is_better else theirs / ours:.2f}x"


def _change(ours: float | None, before: float | None) -> str:
    return f"{(ours / before - 1) * 100:+.0f} %" if ours and before else ""


def _aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    words = {0, 3}  # aligned to the left; the other columns are numbers

    def written(row: Sequence[str]) -> str:
        cells = [
            text.ljust(width) if column in words else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join([written(head), "  ".join("-" * width for width in widths), *map(written, rows)])


def earlier_figures(record: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The relay's figures in an earlier JSON file. Raises KeyError or TypeError where it is no such file."""
    return {str(name): dict(figures) for name, figures in record["relay"].items()}
