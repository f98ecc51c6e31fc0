"""A key that came later: what was sealed before is opened and wrapped for it in an older moderator's browser, by itself."""

from __future__ import annotations

from relay.moderation import envelope, key_list
from relay.moderation.envelope import Envelope
from relay.moderation.moderator_secret import ModeratorSecret
from tests.pages.browsers import Browsers
from tests.pages.desk_people import PASSPHRASE, has_keys, makes_moderator, puts_key_in
from tests.town import Town


async def test_older_evidence_is_opened_to_a_newer_key(town: Town, browsers: Browsers) -> None:
    house = await town.relay("one")
    assert house.server is not None
    proving = house.server.moderation.proving
    alice, bob = await town.users("alice@one", "bob@one")
    await makes_moderator(house, alice)
    secret, later, waits = await has_keys(house, alice), ModeratorSecret.make(), ModeratorSecret.make()
    for text in (b"one", b"two"):
        sealed = await proving.envelopes.prepare("case-1", "words", text)
        assert sealed is not None
        with house.server.db.write() as tx:
            proving.envelopes.store(tx, sealed)
        await tx
    for key, hours in ((later, 24), (waits, 0)):
        current = await proving.keys.current()
        assert current is not None
        after = key_list.added(current, bob.id, "moderator", key.public, secret, town.clock.now())
        await proving.keys.take(after.statement, alice.id)
        town.clock.forward(hours=hours)

    reader = await browsers.open()
    await reader.page.clock.set_fixed_time(town.clock.now())
    await reader.signs_in(alice, "/_relay/desk/keys")
    await puts_key_in(reader, secret)
    await reader.page.locator("#test-passphrase").fill(PASSPHRASE)
    await reader.page.get_by_role("button", name="Prove that it still opens").click()
    await reader.page.get_by_text("2 older texts can now be opened with keys that came later").wait_for()
    envelopes = await proving.envelopes.of_case("case-1")
    texts = [
        envelope.open_with(later, Envelope.read(one), case_id="case-1", version=one["version"]) for one in envelopes
    ]
    assert texts == [b"one", b"two"]
    assert all(waits.public.key_id not in one["wraps"] for one in envelopes), "not to the key that still waits"
    await reader.is_content()
