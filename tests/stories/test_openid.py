"""Stories of OpenID tokens: a service learns who somebody is, and can do nothing else with it."""

from __future__ import annotations

from typing import Any

from tests.people import Person, path
from tests.town import Town, Within


async def shown(house: Within, token: str | None) -> tuple[int, Any]:
    """What a service is told that asks for a token's owner."""
    query = {} if token is None else {"access_token": token}
    url = f"https://127.0.0.1:{house.federation_port}/_matrix/federation/v1/openid/userinfo"
    async with house.town.http.get(url, params=query, ssl=False) as answer:
        return answer.status, await answer.json()


async def asks_for_token(person: Person) -> dict[str, Any]:
    return await person.calls("POST", path("user", person.id, "openid", "request_token"), {})


async def test_a_service_learns_who_somebody_is(town: Town) -> None:
    one = await town.relay("one")
    alice, bob = await town.users("alice@one", "bob@one")
    token = await asks_for_token(alice)
    assert (token["token_type"], token["matrix_server_name"]) == ("Bearer", one.name)
    assert await shown(one, token["access_token"]) == (200, {"sub": alice.id})
    refused = await alice.is_refused(alice.calls("GET", "account/whoami", token=token["access_token"]))
    assert refused.errcode == "M_UNKNOWN_TOKEN", "it opens nothing else"
    assert (await shown(one, alice.token))[0] == 401, "and an access token is none"
    status, body = await shown(one, None)
    assert (status, body["errcode"]) == (401, "M_MISSING_TOKEN")
    refused = await bob.is_refused(bob.calls("POST", path("user", alice.id, "openid", "request_token"), {}))
    assert refused.status == 403, "nobody gets a token for somebody else"


async def test_a_token_ends_after_its_hour_and_with_the_account(town: Town) -> None:
    one = await town.relay("one")
    alice, bob = await town.users("alice@one", "bob@one")
    hers, his = await asks_for_token(alice), await asks_for_token(bob)
    await one.command("user.deactivate", user="bob")
    assert (await shown(one, his["access_token"]))[0] == 401, "a closed account is nobody"
    town.clock.forward(seconds=hers["expires_in"] + 1)
    status, body = await shown(one, hers["access_token"])
    assert (status, body["errcode"]) == (401, "M_UNKNOWN_TOKEN"), "a late service has to ask again"
