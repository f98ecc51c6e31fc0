"""Handing a report's proof to another server's moderators from the desk, and checking what they handed over.

The evidence is sealed to their keys in the moderator's browser (`static/evidence.js`); the relay passes on what it can't open.
Only with the reporter's consent, never for `minor`: `moderation/peers.py` sees to that.
"""

from __future__ import annotations

from typing import Any

from relay.errors import ApiError, InvalidParam, RemoteError
from relay.moderation.case_rows import Case
from relay.moderation.disclosure_form import parse_disclosure
from relay.moderation.peers import Peers
from relay.moderation.reports import Reports
from relay.pages.forms import Form
from relay.pages.visits import Visit
from relay.web import Answer, Request, parse_object

MAX_SERVER, MAX_ID, MAX_ENVELOPE = 260, 300, 48 * 1024


class DeskForwarding:
    def __init__(self, peers: Peers, reports: Reports) -> None:
        self._peers = peers
        self._reports = reports

    async def shown(self, case: Case) -> dict[str, Any]:
        """What the case's page shows of it."""
        return {
            "may_forward": case.consent and case.category != "minor" and self._is_on(),
            "forwards": await self._peers.of_case(case.case_id),
            "answers": await self._peers.answers(case.case_id),
        }

    def _is_on(self) -> bool:
        try:
            self._peers.require_forwarding()
        except ApiError:
            return False
        return True

    async def peer_keys(self, request: Request, visit: Visit, form: Form, case: Case) -> Answer:
        self._peers.require_forwarding()
        try:
            keys = await self._peers.keys_of(form.required("server", MAX_SERVER, "the server"))
        except RemoteError as no:
            raise ApiError(
                f"The server {no.server} gave no keys of its moderators. Try again later.", status=502
            ) from no
        return {"keys": [{"key_id": one.key_id, "public": one.text} for one in keys]}

    async def forward(self, request: Request, visit: Visit, form: Form, case: Case) -> Answer:
        given = parse_object(form.required("envelope", MAX_ENVELOPE, "the sealed proof").encode())
        event_id = form.required("event_id", MAX_ID, "the message")
        try:
            return await self._peers.forward(case.case_id, visit.user_id, event_id, given)
        except RemoteError as no:
            raise ApiError(f"The server {no.server} did not take it: {no.text}", status=502) from no

    async def proof(self, request: Request, visit: Visit, form: Form, case: Case) -> Answer:
        if case.kind != "forwarded":
            raise InvalidParam("Only what another server handed over is checked here. Load the case again.")
        given = parse_object(form.required("disclosure", MAX_ENVELOPE, "the proof").encode())
        proof = await self._reports.prove_forwarded(case, visit.user_id, parse_disclosure(given))
        return {"result": proof.result}
