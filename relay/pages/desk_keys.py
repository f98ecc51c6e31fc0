"""The desk's page of keys: to whom evidence is sealed, and the key that this browser holds (`static/keys.js`).

The key itself never comes here: it is made or pasted in the browser, and kept there under a passphrase. The browser also
keeps which list of keys it saw last, and proves now and then that its key still opens something.
"""

from __future__ import annotations

from collections.abc import Iterable

from relay.clock import Clock
from relay.moderation.envelopes import Envelopes
from relay.moderation.moderator_keys import TEST_EVERY, ModeratorKeys
from relay.pages.forms import Form
from relay.pages.frame import Frame
from relay.pages.visits import Visit
from relay.part import Part
from relay.web import Answer, Request, Route, parse_object

PAGE = "/_relay/desk/keys"
# 64 wraps, as JSON in a form.
MAX_FORM_BYTES = 32 * 1024
MAX_WRAPS = 16 * 1024
MAX_KEY_ID, MAX_ANSWER = 64, 200


class DeskKeys(Part):
    def __init__(self, frame: Frame, clock: Clock, keys: ModeratorKeys, envelopes: Envelopes) -> None:
        self._frame = frame
        self._clock = clock
        self._keys = keys
        self._envelopes = envelopes

    def routes(self) -> Iterable[Route]:
        frame = self._frame
        # Also for somebody who is about to become a moderator: she makes her key before anybody can add it.
        yield Route("GET", PAGE, frame.open_to("signed in", self._page), auth="none")
        yield Route("GET", f"{PAGE}/list", frame.open_to("moderator", self._list), auth="none")
        steps = (("test", self._test), ("tested", self._tested), ("unwrapped", self._unwrapped), ("wraps", self._wraps))
        for name, function in steps:
            take = frame.taking("moderator", function)
            yield Route("POST", f"{PAGE}/{name}", take, auth="none", max_body=MAX_FORM_BYTES)

    async def _page(self, request: Request, visit: Visit) -> Answer:
        now = self._clock.now()
        return await self._frame.page(
            request, visit, "desk_keys.html", keys=await self._keys.listing() if await self._frame.moderates(visit) else [],
            now=now, test_due_before=now - TEST_EVERY,
            enrolled_ts=await self._keys.enrolled_ts(visit.user_id),
        )  # fmt: skip

    async def _list(self, request: Request, visit: Visit) -> Answer:
        return {"lists": [dict(one.statement) for one in await self._keys.chain()]}

    async def _own(self, visit: Visit, form: Form) -> str:
        return await self._keys.require_own(visit.user_id, form.required("key_id", MAX_KEY_ID, "the key"))

    async def _test(self, request: Request, visit: Visit, form: Form) -> Answer:
        return await self._keys.test(await self._own(visit, form))

    async def _tested(self, request: Request, visit: Visit, form: Form) -> Answer:
        await self._keys.tested(await self._own(visit, form), form.required("answer", MAX_ANSWER, "the answer"))
        return {}

    async def _unwrapped(self, request: Request, visit: Visit, form: Form) -> Answer:
        """What was sealed before some key counted, for her browser to wrap it."""
        return {"envelopes": await self._envelopes.unwrapped_for(visit.user_id, await self._own(visit, form))}

    async def _wraps(self, request: Request, visit: Visit, form: Form) -> Answer:
        wraps = parse_object(form.required("wraps", MAX_WRAPS, "the wraps").encode())
        envelope_id = form.required("envelope_id", MAX_KEY_ID, "the envelope")
        return {"added": await self._envelopes.take_wraps(envelope_id, wraps, visit.user_id)}
