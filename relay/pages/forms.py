"""What a browser sends with a form: its fields, bounded, and the proof that it was our own page that sent it.

The proof is a token made from the visit's cookie, and the browser's word (`Sec-Fetch-Site`) where it gives one.
"""

from __future__ import annotations

import base64
import hmac
from hashlib import sha256
from urllib.parse import parse_qsl

from relay.errors import ApiError, BadJson, MissingParam
from relay.web import Request

MAX_FIELDS = 400
FORM_TYPE = "application/x-www-form-urlencoded"
TOKEN_FIELD = "form"
OUR_OWN = ("same-origin", "none")


class NotOurForm(ApiError):
    status = 403
    errcode = "M_FORBIDDEN"

    def __init__(self) -> None:
        super().__init__(
            "This form did not come from a page of this relay, or the page lay open for too long. Nothing was done. "
            "Go back, load the page again, and send it once more."
        )


class Form:
    """The fields of a sent form."""

    def __init__(self, fields: list[tuple[str, str]]) -> None:
        self._fields = fields

    def text(self, name: str, most: int) -> str:
        """A field without the blanks around it; empty where it is missing. Raises ApiError where it is too long."""
        value = next((value for key, value in self._fields if key == name), "").strip()
        if len(value) > most:
            raise ApiError(f"What you wrote is longer than {most} characters. Go back and make it shorter.")
        return value.replace("\r\n", "\n")

    def required(self, name: str, most: int, what: str) -> str:
        """`what` names the field to the person, as in "your reason"."""
        value = self.text(name, most)
        if not value:
            raise MissingParam(f"One thing is missing: {what}. Go back and fill it in.")
        return value

    def ticked(self, name: str) -> bool:
        return any(key == name for key, _ in self._fields)

    def every(self, name: str) -> list[str]:
        return [value for key, value in self._fields if key == name]


def parse(request: Request) -> Form:
    """Raises BadJson."""
    if request.http.content_type != FORM_TYPE:
        raise BadJson("This page takes forms only.")
    try:
        text = request.body.decode("ascii")
        fields = parse_qsl(text, keep_blank_values=True, max_num_fields=MAX_FIELDS, errors="strict")
    except ValueError:
        raise BadJson("This form can't be read. Load the page again and send it once more.") from None
    if any("\x00" in value for _, value in fields):
        raise BadJson("This form holds characters that no text has. Load the page again and send it once more.")
    return Form(fields)


def token_for(cookie: str) -> str:
    """What stands hidden in each form of a visit."""
    return base64.urlsafe_b64encode(hmac.digest(cookie.encode(), b"form", sha256)).decode().rstrip("=")


def require_ours(request: Request, form: Form, cookie: str, *, guest: bool) -> None:
    """Raises NotOurForm. A guest whose browser keeps no cookies is believed where it says that the form is ours."""
    said = request.http.headers.get("Sec-Fetch-Site")
    if said is not None and said not in OUR_OWN:
        raise NotOurForm
    if guest and said == "same-origin":
        return
    given = form.text(TOKEN_FIELD, 100)
    if not cookie or not hmac.compare_digest(given.encode(), token_for(cookie).encode()):
        raise NotOurForm
