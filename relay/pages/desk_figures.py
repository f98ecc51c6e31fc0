"""The desk's page of the month's figures: numbers only, no names, so that they can be published as they are."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime

from relay.clock import Clock
from relay.moderation.transparency import Transparency
from relay.pages import desk_words
from relay.pages.frame import Frame
from relay.pages.visits import Visit
from relay.part import Part
from relay.web import Answer, Request, Route

PAGE = "/_relay/desk/figures"
MONTHS_SHOWN = 12


class DeskFigures(Part):
    def __init__(self, frame: Frame, clock: Clock, transparency: Transparency) -> None:
        self._frame = frame
        self._clock = clock
        self._transparency = transparency

    def routes(self) -> Iterable[Route]:
        yield Route("GET", PAGE, self._frame.open_to("moderator", self._page), auth="none")

    async def _page(self, request: Request, visit: Visit) -> Answer:
        months = _latest_months(self._clock.now())
        month = request.query.get("month", months[0])
        return await self._frame.page(
            request, visit, "desk_figures.html", figures=await self._transparency.month(month), month=month,
            months=months, words=desk_words,
        )  # fmt: skip


def _latest_months(now: int) -> list[str]:
    today = datetime.fromtimestamp(now / 1000, UTC)
    number = today.year * 12 + today.month - 1
    return [f"{at // 12}-{at % 12 + 1:02}" for at in range(number, number - MONTHS_SHOWN, -1)]
