"""Where a relay listens: what is answered on which port, and a renewed certificate that is taken up while it runs."""

from __future__ import annotations

import asyncio
import hashlib
import ssl
from pathlib import Path

from tests.people import until
from tests.town import Town


async def _certificate_of(port: int, ca_file: Path) -> str:
    """The fingerprint of the certificate that a new connection is shown."""
    context = ssl.create_default_context(cafile=str(ca_file))
    _, writer = await asyncio.open_connection("localhost", port, ssl=context)
    try:
        shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        return hashlib.sha256(shown).hexdigest()
    finally:
        writer.close()


async def test_each_listener_serves_what_the_config_says(town: Town) -> None:
    relay = await town.relay("one")
    context = ssl.create_default_context(cafile=str(relay.folder / "ca.crt"))
    federation = f"https://localhost:{relay.federation_port}"
    async with town.http.get(f"{relay.url}/_matrix/client/versions") as answer:
        assert answer.status == 200, "the client listener knows the client API"
    async with town.http.get(f"{relay.url}/_matrix/key/v2/server") as answer:
        assert answer.status == 404, "and nothing of federation"
        assert (await answer.json())["errcode"] == "M_UNRECOGNIZED"
    async with town.http.get(f"{federation}/_matrix/key/v2/server", ssl=context) as answer:
        assert answer.status == 200, "the federation listener knows the server-server API"
    async with town.http.get(f"{federation}/_matrix/client/versions", ssl=context) as answer:
        assert answer.status == 404, "and nothing of the clients'"


async def test_a_renewed_certificate_is_taken_up_without_a_restart(town: Town) -> None:
    relay = await town.relay("one")
    ca_file = relay.folder / "ca.crt"
    before = await _certificate_of(relay.federation_port, ca_file)
    town.authority.certify(relay.folder, "localhost", "127.0.0.1")
    town.clock.forward(minutes=2)

    async def is_new() -> bool:
        return await _certificate_of(relay.federation_port, ca_file) != before

    assert await until(is_new), "a new connection is shown the new certificate"
    renewed = await _certificate_of(relay.federation_port, ca_file)
    (relay.folder / "tls.crt").write_text("not a certificate")
    town.clock.forward(minutes=2)
    await asyncio.sleep(0.1)
    assert await _certificate_of(relay.federation_port, ca_file) == renewed, "a broken file leaves the last good one"
