"""docs/compatibility.md says of every endpoint what this relay makes of it: it and the relay's routes have to agree."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest

from relay import config, folder
from relay.config import Listener
from relay.server import Server

PAGE = Path(__file__).parent.parent / "docs" / "compatibility.md"
_ROW = re.compile(r"\| (GET|PUT|POST|DELETE) \| `(/[^`]+)` \| (works|absent|not yet) \| ?(.*?) ?\|\Z")


class Row(NamedTuple):
    method: str
    path: str
    state: str
    why: str

    @property
    def endpoint(self) -> tuple[str, str]:
        return self.method, _plain(self.path)


def _plain(path: str) -> str:
    """Parameters may be called anything."""
    return re.sub(r"\{[^}]*\}", "{}", path)


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if re.match(r"\| [A-Z]+ \|", line)]
    found = []
    for line in lines:
        row = _ROW.match(line)
        assert row is not None, f"this line of the page is not in its form: {line}"
        found.append(Row(*row.groups()))
    return found


@pytest.fixture(scope="module")
def routes(tmp_path_factory: pytest.TempPathFactory) -> set[tuple[str, str]]:
    data = tmp_path_factory.mktemp("relay")
    data.chmod(0o700)
    (data / config.CONFIG_NAME).write_text("server_name: one.example\n")
    server = Server(folder.prepare(data, None, Listener()).settings, data)
    return {(route.method, _plain(route.path)) for route in server.web.routers["both"].routes}


def test_the_page_names_each_endpoint_once(rows: list[Row]) -> None:
    seen: set[tuple[str, str]] = set()
    for row in rows:
        assert row.endpoint not in seen, f"{row.method} {row.path} stands there twice"
        seen.add(row.endpoint)


def test_what_is_said_to_work_has_a_route(rows: list[Row], routes: set[tuple[str, str]]) -> None:
    missing = [f"{row.method} {row.path}" for row in rows if row.state == "works" and row.endpoint not in routes]
    assert not missing, f"the page says that these work, and there is no route for them: {missing}"


def test_every_route_is_named(rows: list[Row], routes: set[tuple[str, str]]) -> None:
    named = {row.endpoint for row in rows}
    unnamed = sorted(f"{method} {path}" for method, path in routes if (method, path) not in named)
    assert not unnamed, f"docs/compatibility.md does not name these routes: {unnamed}"


def test_what_is_not_there_yet_has_no_route(rows: list[Row], routes: set[tuple[str, str]]) -> None:
    there = [f"{row.method} {row.path}" for row in rows if row.state == "not yet" and row.endpoint in routes]
    assert not there, f"these have a route by now; say what they do: {there}"


def test_what_is_missing_says_why(rows: list[Row]) -> None:
    silent = [f"{row.method} {row.path}" for row in rows if row.state != "works" and not row.why]
    assert not silent, f"the page does not say why these are missing: {silent}"


SAFETY = "/_relay/safety/v1"


def test_the_page_of_the_moderation_api_names_each_of_its_requests(routes: set[tuple[str, str]]) -> None:
    page = _plain(" ".join((PAGE.parent / "safety-api.md").read_text(encoding="utf-8").split()))
    own = sorted(f"{method} {path.removeprefix(SAFETY)}" for method, path in routes if path.startswith(SAFETY))
    assert len(own) > 30
    unnamed = [one for one in own if not re.search(re.escape(one) + r"(?![\w/])", page)]
    assert not unnamed, f"docs/safety-api.md does not say what these do: {unnamed}"


def test_what_is_shipped_for_a_proxy_keeps_no_report_on_its_disk() -> None:
    """A report may hold a proof, which is the text: a proxy that spools bodies or logs paths would write it down."""
    operating = (PAGE.parent / "operating.md").read_text(encoding="utf-8")
    places = re.findall(r"location [^{]+\{.*?\}", operating, re.DOTALL)
    for begin in ("location /_matrix ", "location /_relay "):
        [place] = [place for place in places if place.startswith(begin)]
        assert "proxy_request_buffering off" in place, f"nginx writes no body to its disk: {place}"
    assert all("access_log off" in place for place in places if "proxy_pass" in place), "nor who asked for what"
    caddy = (PAGE.parent.parent / "docker" / "Caddyfile").read_text(encoding="utf-8")
    assert "reverse_proxy" in caddy and "request_buffers" not in caddy and "log" not in caddy.split()
