"""Signatures of Standard Webhooks 1.0: three headers beside a JSON body, an HMAC with a shared secret.

The signature covers the ID, the time and the body. Times more than five minutes off are refused; whoever takes a message
uses its ID up, so that it counts once. Spec: Standard Webhooks 1.0, "Signature scheme".
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from standardwebhooks.webhooks import Webhook

from relay.clock import MINUTE, SECOND
from relay.errors import ApiError, Unauthorized

ID, TIMESTAMP, SIGNATURE = "webhook-id", "webhook-timestamp", "webhook-signature"
TOLERANCE_MS = 5 * MINUTE
MAX_ID = 100
MAX_SIGNATURES = 10


def headers(secrets: Sequence[str], message_id: str, now: int, body: bytes) -> dict[str, str]:
    """One signature for each secret, so that the other side may change from one to the next."""
    return {
        ID: message_id,
        TIMESTAMP: str(now // SECOND),
        SIGNATURE: " ".join(_sign(secret, message_id, now // SECOND, body) for secret in secrets),
    }


def _sign(secret: str, message_id: str, seconds: int, body: bytes) -> str:
    return Webhook(secret).sign(message_id, datetime.fromtimestamp(seconds, UTC), body.decode())


def verified_id(given: Mapping[str, str], secrets: Sequence[str], now: int, body: bytes) -> tuple[str, int]:
    """(the message's ID, which of the secrets signed it). Raises Unauthorized."""
    message_id, stamp, signatures = given.get(ID, ""), given.get(TIMESTAMP, ""), given.get(SIGNATURE, "")
    if not message_id or len(message_id) > MAX_ID or not message_id.isprintable():
        raise Unauthorized(f"The header {ID} is missing, or longer than {MAX_ID} characters.")
    if not stamp.isascii() or not stamp.isdigit() or len(stamp) > 12:
        raise Unauthorized(f"The header {TIMESTAMP} is missing; it is the time in seconds.")
    if abs(int(stamp) * SECOND - now) > TOLERANCE_MS:
        raise Unauthorized("The message was signed too long ago, or a clock is wrong. Sign it again.")
    try:
        body.decode()
    except UnicodeDecodeError:
        raise ApiError("The body is not UTF-8.", errcode="M_NOT_JSON") from None
    given_ones = [one.encode() for one in signatures.split(" ")[:MAX_SIGNATURES]]
    for number, secret in enumerate(secrets):
        expected = _sign(secret, message_id, int(stamp), body).encode()
        if any(hmac.compare_digest(expected, one) for one in given_ones):
            return message_id, number
    raise Unauthorized("No signature of this message was made with a secret that counts here.")
