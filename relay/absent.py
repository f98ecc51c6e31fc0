"""What this relay does not do and never will, answered in the words of the standard: with a reason instead of silence.

Nothing here is kept or looked up. E-mail addresses and phone numbers as a way to an account stand in `accounts/account.py`.
Spec: client-server-api/#adding-account-administrative-contact-information, #server-side-search.
"""

from __future__ import annotations

from collections.abc import Iterable

from relay.errors import ApiError, Unrecognized
from relay.part import Part
from relay.web import Answer, Request, Route

V3 = "/_matrix/client/v3"


class Absent(Part):
    def routes(self) -> Iterable[Route]:
        for name in ("3pid", "3pid/add", "3pid/bind"):
            yield Route("POST", f"{V3}/account/{name}", self._no_threepids)
        for name in ("3pid/delete", "3pid/unbind"):
            yield Route("POST", f"{V3}/account/{name}", self._nothing_bound)
        yield Route("POST", f"{V3}/search", self._no_search)
        for path in ("/_matrix/client/v1/media/preview_url", "/_matrix/media/v3/preview_url"):
            yield Route("GET", path, self._no_previews)

    async def _no_threepids(self, request: Request) -> Answer:
        raise ApiError(
            "This relay keeps no e-mail addresses and no phone numbers.",
            errcode="M_THREEPID_MEDIUM_NOT_SUPPORTED",
        )

    async def _nothing_bound(self, request: Request) -> Answer:
        return {"id_server_unbind_result": "no-support"}

    async def _no_search(self, request: Request) -> Answer:
        raise Unrecognized(
            "This relay can't read messages, so it can't search them. Apps that keep what they decrypted can, such as Element on a desktop computer."
        )

    async def _no_previews(self, request: Request) -> Answer:
        raise Unrecognized("This relay makes no previews of links: it would have to be told what you write about.")
