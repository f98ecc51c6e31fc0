"""What the relay counts, for Prometheus: how busy it is, what waits, how its hooks behave. Numbers, and names of the config.

No person, no room, no other server and no word of anybody stands in it, and as few series as there are hooks and categories. It
is off until a listener serves `metrics`, and answers this machine only, or whoever has the token. Format: Prometheus text 0.0.4.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
import resource
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from aiohttp import web

from relay.clock import SECOND, Clock
from relay.config.metrics import Metrics as MetricsSettings
from relay.db import Database, Query
from relay.errors import Forbidden
from relay.moderation.case_rules import CATEGORIES
from relay.moderation.doorkeeping import Doorkeeping
from relay.part import Part
from relay.rooms.append import Appender
from relay.web import Answer, Request, Route

PATH = "/metrics"
FORMAT = "text/plain; version=0.0.4"

Values = Sequence[tuple[Mapping[str, str], float]]


@dataclass(frozen=True, slots=True)
class Figure:
    name: str
    kind: Literal["counter", "gauge"]
    about: str
    values: Values

    def lines(self) -> Iterator[str]:
        yield f"# HELP {self.name} {self.about}"
        yield f"# TYPE {self.name} {self.kind}"
        for labels, value in self.values:
            inside = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
            yield f"{self.name}{{{inside}}} {value:.15g}" if inside else f"{self.name} {value:.15g}"


@dataclass(frozen=True, slots=True)
class Backlog:
    """How many other servers something waits for, and how many of them could not be reached."""

    servers: int
    failing: int


class Metrics(Part):
    def __init__(
        self,
        settings: MetricsSettings,
        db: Database,
        clock: Clock,
        appender: Appender,
        keeping: Doorkeeping,
        backlog: Callable[[], Backlog],
    ) -> None:
        self._token = settings.token
        self._db = db
        self._appender = appender
        self._keeping = keeping
        self._backlog = backlog
        self._began = clock.now() / SECOND

    def routes(self) -> Iterable[Route]:
        yield Route("GET", PATH, self._show, auth="none", serves="metrics")

    async def _show(self, request: Request) -> Answer:
        self._require_allowed(request)
        figures = [*self._of_the_house(), *await self._of_the_doors(), *await self._db.read(_of_the_desk)]
        text = "\n".join(line for figure in figures for line in figure.lines()) + "\n"
        return web.Response(
            text=text, headers={"Server": "Sealed Relay", "Content-Type": FORMAT, "Cache-Control": "no-store"}
        )

    def _require_allowed(self, request: Request) -> None:
        kind, _, given = request.http.headers.get("Authorization", "").partition(" ")
        if self._token:
            if kind.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self._token.encode()):
                return
            raise Forbidden("These figures are for whoever has metrics.token of the relay's config.")
        # A proxy on this machine speaks for others, and says so; a page in a browser here names the host that it came from.
        headers, host = request.http.headers, request.http.host.rpartition(":")[0] or request.http.host
        direct = "X-Forwarded-For" not in headers and "Forwarded" not in headers
        if (
            direct
            and _is_loopback(request.http.remote or "")
            and (host == "localhost" or _is_loopback(host.strip("[]")))
        ):
            return
        raise Forbidden("These figures are for this machine only, as long as metrics.token is not set in the config.")

    def _of_the_house(self) -> Iterator[Figure]:
        used = resource.getrusage(resource.RUSAGE_SELF)
        yield Figure("process_start_time_seconds", "gauge", "When the relay began.", [({}, self._began)])
        yield Figure("process_cpu_seconds_total", "counter", "Processor time.", [({}, used.ru_utime + used.ru_stime)])
        yield Figure("process_resident_memory_bytes", "gauge", "Memory.", [({}, _memory_bytes())])
        yield Figure(
            "relay_database_pos", "gauge", "The number of the latest durable change.", [({}, self._db.stable_pos())]
        )
        size = self._db.path.stat().st_size if self._db.path.exists() else 0
        yield Figure("relay_database_bytes", "gauge", "Size of the database file.", [({}, size)])
        yield Figure(
            "relay_events_total", "counter", "Events that came into rooms: made by people here, or received from other servers.",
            [({"way": "sent"}, self._appender.sent), ({"way": "received"}, self._appender.received)],
        )  # fmt: skip
        backlog = self._backlog()
        yield Figure(
            "relay_outbox_servers", "gauge", "Other servers for which something waits, and those that can't be reached.",
            [({"state": "waiting"}, backlog.servers), ({"state": "failing"}, backlog.failing)],
        )  # fmt: skip

    async def _of_the_doors(self) -> list[Figure]:
        """Counts since the start of the relay."""
        hooks = await self._keeping.hooks.status()
        told = await self._keeping.webhooks.status()

        def of_hooks(name: str, kind: Literal["counter", "gauge"], about: str, key: str) -> Figure:
            return Figure(name, kind, about, [({"hook": one["name"]}, one[key]) for one in hooks])

        outcomes = ("delivered", "failed", "given_up")
        return [
            of_hooks("relay_hook_calls_total", "counter", "How often a hook was asked.", "asked"),
            of_hooks("relay_hook_refusals_total", "counter", "How often it did not let pass.", "refused"),
            of_hooks("relay_hook_failures_total", "counter", "How often it failed or was too slow.", "failed"),
            of_hooks("relay_hook_seconds_total", "counter", "How long was waited for it.", "seconds"),
            of_hooks("relay_hook_resting", "gauge", "1 where it has failed so often that it is left alone.", "resting"),
            Figure("relay_webhook_messages_total", "counter", "What became of attempts to tell a webhook.",
                   [({"webhook": one["name"], "outcome": what}, one[what]) for one in told for what in outcomes]),
            Figure("relay_webhook_waiting", "gauge", "What a webhook is still to be told.",
                   [({"webhook": one["name"]}, one["waiting"]) for one in told]),
            Figure("relay_webhook_off", "gauge", "1 where it has asked to be told no more.",
                   [({"webhook": one["name"]}, one["off"]) for one in told]),
        ]  # fmt: skip


def _of_the_desk(query: Query) -> list[Figure]:
    by_category: dict[str, int] = dict(
        query.all("SELECT category, count(*) FROM cases WHERE is_open = 1 AND duplicate_of IS NULL GROUP BY category")
    )
    late = query.value("SELECT count(*) FROM cases WHERE is_open = 1 AND duplicate_of IS NULL AND late_told = 1")
    notices = query.value("SELECT count(*) FROM notices_due")
    acts = query.value("SELECT count(*) FROM waiting_acts WHERE state = 0")
    categories = [({"category": one}, float(by_category.get(one, 0))) for one in CATEGORIES]
    return [
        Figure("relay_cases_open", "gauge", "Cases that wait for a moderator.", categories),
        Figure("relay_cases_late", "gauge", "Those of them whose time is over.", [({}, late)]),
        Figure(
            "relay_acts_waiting", "gauge", "Measures that wait for a second person, or for their time.", [({}, acts)]
        ),
        Figure(
            "relay_notices_waiting", "gauge", "The relay's own sentences that are still to be said.", [({}, notices)]
        ),
    ]


def _is_loopback(address: str) -> bool:
    try:
        one = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = getattr(one, "ipv4_mapped", None)
    return bool(one.is_loopback or (mapped is not None and mapped.is_loopback))


def _memory_bytes() -> float:
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return float(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return float("nan")


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
