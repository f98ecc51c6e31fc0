"""What the relay does not do is answered as the standard says, so that apps go on without it."""

from __future__ import annotations

import pytest

from tests.town import Town

REFUSED = [
    ("POST", "account/3pid", 400, "M_THREEPID_MEDIUM_NOT_SUPPORTED"),
    ("POST", "account/3pid/add", 400, "M_THREEPID_MEDIUM_NOT_SUPPORTED"),
    ("POST", "account/3pid/bind", 400, "M_THREEPID_MEDIUM_NOT_SUPPORTED"),
    ("POST", "account/3pid/email/requestToken", 400, "M_THREEPID_MEDIUM_NOT_SUPPORTED"),
    ("POST", "search", 404, "M_UNRECOGNIZED"),
    ("GET", "thirdparty/protocol/irc", 404, "M_NOT_FOUND"),
    ("GET", "thirdparty/user", 404, "M_NOT_FOUND"),
    ("GET", "/_matrix/client/v1/media/preview_url", 404, "M_UNRECOGNIZED"),
    ("GET", "/_matrix/media/v3/preview_url", 404, "M_UNRECOGNIZED"),
    ("GET", "initialSync", 404, "M_UNRECOGNIZED"),
]


async def test_apps_are_told_what_is_not_here(town: Town) -> None:
    alice = await town.user("alice@one")
    for method, where, status, errcode in REFUSED:
        refused = await alice.is_refused(alice.calls(method, where, {} if method == "POST" else None))
        assert (refused.status, refused.errcode) == (status, errcode), where
    assert await alice.calls("GET", "account/3pid") == {"threepids": []}
    assert await alice.calls("GET", "thirdparty/protocols") == {}
    gone = {"id_server_unbind_result": "no-support"}
    assert await alice.calls("POST", "account/3pid/delete", {"medium": "email", "address": "a@example"}) == gone


@pytest.mark.parametrize("what", ["m.3pid_changes", "m.get_login_token", "m.forget_forced_upon_leave"])
async def test_and_that_it_is_off(town: Town, what: str) -> None:
    alice = await town.user("alice@one")
    told = (await alice.calls("GET", "capabilities"))["capabilities"]
    assert told[what] == {"enabled": False}
