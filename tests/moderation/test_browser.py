"""In a real browser: the offline proof tool, from an unmodified client's key export to a proof that the relay accepts; and
WebCrypto on envelopes and lists that the relay made, and the other way round."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nio
import pytest

from relay.moderation import envelope, key_list, megolm
from relay.moderation.disclosure_form import parse_code
from relay.moderation.envelope import Envelope, Recipient
from relay.moderation.megolm import Unproven, prk_of
from relay.moderation.moderator_secret import ModeratorSecret, lock, unlock
from relay.moderation.proof import Proof, ProvedItem
from relay.proof_line import checked_again
from relay.protocol import event as events
from relay.protocol.signing import SigningKey
from relay.protocol.versions import VERSIONS
from scripts.proof_page import PAGE, with_hashes
from tests.moderation.browser import chromium
from tests.moderation.sessions import Forged, Session, b64, inner
from tests.moderation.test_megolm import ODD
from tests.nio_people import Nio, good
from tests.town import Town

STATIC = PAGE.parent
PASSPHRASE = "the passphrase of the export"


def test_the_proof_tool_is_one_file_that_may_load_nothing() -> None:
    page = PAGE.read_text("utf-8")
    assert with_hashes(page) == page, "its policy names another script or style: run scripts/format"
    assert "default-src 'none'" in page and "connect-src" not in page
    for outside in (
        "src=",
        "href=",
        "import ",
        "@import",
        "url(",
        "fetch(",
        "XMLHttpRequest",
        "WebSocket",
        "innerHTML",
        "eval(",
    ):
        assert outside not in page, f"proof.html holds {outside}"


async def test_what_bob_read_in_an_unmodified_client_is_proved_by_his_key_export(town: Town) -> None:
    alice, bob = await town.users("alice@one", "bob@two")
    devices = [Nio(one, town.folder / "nio" / one.name, f"{one.name.upper()}LAPTOP") for one in (alice, bob)]
    hers, his = devices
    try:
        for one in devices:
            await one.signs_in()
        made = await hers.client.room_create(invite=[bob.id], preset=nio.RoomPreset.private_chat)
        room = good(made, nio.RoomCreateResponse).room_id
        assert await his.notices(lambda: room in his.client.invited_rooms), "the invitation arrives"
        good(await his.client.join(room), nio.JoinResponse)
        assert await hers.notices(lambda: hers.room(room) is not None and bob.id in hers.room(room).users)
        first, second = [await hers.says(room, text) for text in ("you will regret this", "<b>and</b> soon")]
        assert await his.hears("<b>and</b> soon")
        export = town.folder / "element-keys.txt"
        await his.client.export_keys(str(export), PASSPHRASE, count=1000)
        events = [await bob.event(room, event_id) for event_id in (second, first)]

        async with chromium() as browser:
            code = await in_the_proof_tool(browser, export, events, town.folder)
        relay = await town.relay("two")
        assert relay.server is not None
        disclosures = relay.server.moderation.proving.disclosures
        proof = await disclosures.verify(bob.id, parse_code(code, category="threat", good_faith=True))
        assert [one.result for one in proof.items] == ["verified_remote"] * 2, proof.items
        assert proof.items[0].attested_by == alice.server
        texts = [json.loads(one.plaintext or b"")["content"]["body"] for one in proof.items]
        assert texts == ["<b>and</b> soon", "you will regret this"], "word for word"
    finally:
        for one in devices:
            await one.closes()


async def test_the_proof_tool_does_nothing_where_it_came_over_the_network() -> None:
    async with chromium() as browser:
        page = await (await browser.new_context()).new_page()
        await page.route("**/*", lambda route: route.fulfill(body=PAGE.read_text("utf-8"), content_type="text/html"))
        for address in ("http://relay.example/proof.html", "https://relay.example/proof.html"):
            await page.goto(address)
            assert await page.is_visible("#refused") and not await page.is_visible("#tool"), address
        await page.unroute_all()
        await page.goto(PAGE.as_uri())
        assert await page.is_visible("#tool") and not await page.is_visible("#refused")


async def in_the_proof_tool(browser: Any, export: Path, events: list[Any], folder: Path) -> str:
    """A person at the page: the export, the passphrase, the messages; what it says where she errs; the code."""
    context = await browser.new_context(viewport={"width": 900, "height": 1400})
    page = await context.new_page()
    asked: list[str] = []
    problems: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda line: problems.append(line.text) if line.type == "error" else None)
    await page.goto(PAGE.as_uri())

    async def is_told(words: str) -> None:
        await page.click("#make")
        await page.wait_for_function("() => !document.querySelector('#make').disabled")
        said = await page.text_content("#said")
        assert words in said, f"it says {said!r}"

    await is_told("Choose the exported file")
    await page.set_input_files("#keys", str(export))
    await is_told("Paste the message")
    await page.fill("#events", "hello")
    await is_told("not JSON")
    await page.fill("#events", json.dumps({"event_id": "$x", "content": {"body": "decrypted"}}))
    await is_told("Original event source")
    text = "\n".join(json.dumps(one, indent=2) for one in events)
    await page.fill("#events", text)
    await page.fill("#passphrase", "a wrong one")
    await is_told("The passphrase does not open this file")
    await page.fill("#passphrase", PASSPHRASE)
    strange = {**events[0], "content": {**events[0]["content"], "session_id": "A" * 43}}
    await page.fill("#events", json.dumps(strange))
    await is_told("no key for a message")
    await page.fill("#events", text)
    await is_told("Done.")
    shown = await page.eval_on_selector_all(".message pre", "all => all.map(one => one.textContent)")
    assert shown == ["<b>and</b> soon", "you will regret this"], "she sees what she discloses, as text"
    assert await page.eval_on_selector_all(".message b", "all => all.length") == 0, (
        "nothing that was written becomes markup"
    )
    await page.screenshot(path=str(folder / "proof.png"), full_page=True)
    code = await page.input_value("#code")
    assert not problems, problems
    outside = [url for url in asked if not url.startswith("file:")]
    assert not outside, f"it asked for {outside}"
    blocked = await page.evaluate("() => fetch('http://127.0.0.1:9/').then(() => 'went out', () => 'blocked')")
    assert blocked == "blocked"
    # From anywhere but a file it does nothing.
    await page.route("http://relay.test/*", lambda route: route.fulfill(path=str(PAGE), content_type="text/html"))
    await page.goto("http://relay.test/proof.html")
    assert await page.is_visible("#refused") and not await page.is_visible("#tool"), (
        "over the network it refuses to run"
    )
    await context.close()
    return str(code)


@pytest.fixture
def desk_page(tmp_path: Path) -> Path:
    page = tmp_path / "desk.html"
    scripts = "".join(f"<script>{(STATIC / name).read_text('utf-8')}</script>" for name in ("envelope.js", "verify.js"))
    page.write_text(f"<!doctype html><title>t</title>{scripts}", "utf-8")
    return page


async def test_webcrypto_opens_what_the_relay_sealed(desk_page: Path) -> None:
    alice, recovery, later = (ModeratorSecret.make() for _ in range(3))
    to = [Recipient(one.public.key_id, "@alice:one", one.public) for one in (alice, recovery)]
    text = '{"relay.evidence":1,"umlaut":"ü"}'
    sealed = envelope.seal(text.encode(), case_id="case-1", version=3, to=to).json()
    now = 1_700_000_000_000
    keys = (("@alice:one", "moderator", alice.public), ("@alice:one", "recovery", recovery.public))
    first = key_list.first("one", keys, recovery, now)  # type: ignore[arg-type]
    second = key_list.added(first, "@bob:one", "moderator", later.public, alice, now)
    stranger = key_list.added(first, "@eve:one", "moderator", later.public, ModeratorSecret.make(), now)
    given = {
        "secret": alice.text, "sealed": sealed, "later": second.keys[2].json(), "publicLine": later.public.text, "now": now,
        "chain": [first.statement, second.statement], "forged": [first.statement, stranger.statement],
        "locked": lock(alice, "pass", iterations=1000), "pinned": first.digest,
    }  # fmt: skip
    async with chromium() as browser:
        page = await browser.new_page()
        await page.goto(desk_page.as_uri())
        got = await page.evaluate(
            """async (given) => {
                const refused = async (doing) => { try { await doing(); return "taken"; } catch (error) { return error.message; } };
                const key = await relayKeys.readSecret(given.secret), read = (bytes) => new TextDecoder().decode(bytes);
                const sealed = given.sealed, wraps = sealed.wraps;
                const [mine, other] = [key.keyId, Object.keys(wraps).find((one) => one !== key.keyId)];
                const fresh = await relayKeys.makeKey();
                const list = await relayKeys.followChain(given.pinned, given.chain);
                return {
                    keyId: key.keyId, publicLine: await relayKeys.publicText(key),
                    text: read(await relayKeys.openEnvelope(key, sealed, "case-1", 3)),
                    unlocked: (await relayKeys.unlockKey(given.locked, "pass")).keyId,
                    wrongPassphrase: await refused(() => relayKeys.unlockKey(given.locked, "nope")),
                    otherCase: await refused(() => relayKeys.openEnvelope(key, sealed, "case-2", 3)),
                    otherVersion: await refused(() => relayKeys.openEnvelope(key, sealed, "case-1", 4)),
                    relabelled: await refused(() => relayKeys.openEnvelope(key, { ...sealed, version: 4 }, "case-1", 4)),
                    otherWrap: await refused(() => relayKeys.openEnvelope(key, { ...sealed, wraps: { [mine]: wraps[other] } }, "case-1", 3)),
                    changed: await refused(() => relayKeys.openEnvelope(key, { ...sealed, body: "A" + sealed.body.slice(1) }, "case-1", 3)),
                    strangers: await refused(() => relayKeys.openEnvelope(fresh, sealed, "case-1", 3)),
                    rewrapped: await relayKeys.rewrapEnvelope(key, sealed, [given.later]),
                    seq: list.seq, digest: await relayKeys.listDigest(list),
                    waits: relayKeys.counting(list, given.now).length,
                    forged: await refused(() => relayKeys.followChain(null, given.forged)),
                    unpinned: await refused(() => relayKeys.followChain("another", given.chain)),
                    madeHere: await relayKeys.lockKey(fresh, "pass", 1000), itsSecret: await relayKeys.secretText(fresh),
                    signed: await relayKeys.addToList(key, list, "@carol:one", "moderator", await relayKeys.publicText(fresh), given.now + 1),
                };
            }""",
            given,
        )
    assert got["text"] == text, "the same text that was sealed"
    assert got["keyId"] == alice.public.key_id == got["unlocked"] and got["publicLine"] == alice.public.text
    assert "passphrase" in got["wrongPassphrase"]
    for name in ("otherCase", "otherVersion", "relabelled", "otherWrap", "changed", "strangers"):
        assert got[name] != "taken" and "." in got[name], f"{name} is refused with a sentence: {got[name]}"
    more = {**sealed["wraps"], **got["rewrapped"]}
    reopened = envelope.open_with(later, Envelope.read({**sealed, "wraps": more}), case_id="case-1", version=3)
    assert reopened == text.encode(), "a key that came later opens what the browser wrapped for it"
    assert (got["seq"], got["digest"], got["waits"]) == (1, second.digest, 2)
    assert "signature is wrong" in got["forged"] or "no listed key" in got["forged"]
    assert "does not follow" in got["unpinned"]
    made = unlock(got["madeHere"], "pass")
    assert made.text == got["itsSecret"], "a key that the browser made is the same key here"
    third = key_list.read(got["signed"])
    key_list.follow(second, third)
    assert third.keys[3].public == made.public, "and a list that it signed follows here"


def proved(**change: Any) -> dict[str, Any]:
    """An item of opened evidence, as the relay seals it."""
    session, room = Session(), "!room:one"
    content = change.pop("content", None) or session.says(room, "ünd so weiter")
    pdu = {
        "room_id": room, "type": "m.room.encrypted", "sender": "@eve:one", "content": content, "depth": 5,
        "prev_events": [], "auth_events": [], "origin_server_ts": 1, **change.pop("more", {}),
    }  # fmt: skip
    version, prk = change.pop("version", "11"), change.pop("prk", None) or session.prk(0)
    event = events.sign(pdu, VERSIONS[version], "one", SigningKey.generate("ed25519:a"))
    try:
        plaintext = megolm.open_message(content, prk, 0, room).plaintext
    except Unproven as not_so:
        plaintext = not_so.plaintext or b""
    item = ProvedItem(
        event.id, "verified", sender="@eve:one", room_id=room, index=0, room_version=version, pdu=event.pdu, plaintext=plaintext, prk=prk
    )  # fmt: skip
    return {**json.loads(Proof((item,)).evidence())["items"][0], **change}


async def test_a_moderators_browser_checks_again_what_it_opened(desk_page: Path) -> None:
    sender = Forged()
    odd = {"x": {"ä": 1, "\U0001f600": 2, "\uff5e": 3}, "origin": "one"}
    oddly_written = sender.builds(inner("!room:one", "odd"), payload=ODD["the other order"])
    twice = sender.builds(b'{"type":"t","content":{"a":1,"a":2},"room_id":"!room:one"}')
    good = proved()
    cases: list[tuple[str, dict[str, Any], str | None]] = [
        *((f"version {v}", proved(version=v, more=odd), None) for v in ("3", "6", "10", "11", "12")),
        *((name, proved(content=sender.builds(inner("!room:one", name), payload=form), prk=sender.prk(0)), None) for name, form in ODD.items()),
        ("the raw form", proved(content=sender.builds(inner("!room:one", "x"), payload=ODD["no index"], canonical=False), prk=sender.prk(0)), None),
        ("changed content", {**good, "pdu": {**good["pdu"], "content": oddly_written}}, "V3"),
        ("another sender", {**good, "sender": "@alice:one"}, "V4"),
        ("another event", {**good, "event_id": "$" + "a" * 43}, "V4"),
        ("another version", {**good, "room_version": "x"}, "V3"),
        ("another index", {**good, "index": 1}, "V6"),
        ("another key", {**good, "prk": b64(bytes(32))}, "V8"),
        ("no signature", proved(content=sender.builds(inner("!room:one", "x"), sign=False), prk=sender.prk(0)), "V7"),
        ("another text than the one that opens", {**good, "plaintext": b64(b'{"type":"t","content":{},"room_id":"!room:one"}')}, "V9"),
        ("a key twice", proved(content=twice, prk=sender.prk(0)), "V10"),
        ("a wrong room", proved(content=sender.builds(inner("!other:one", "x")), prk=sender.prk(0)), "V10"),
        ("nothing", {}, "V3"),
    ]  # fmt: skip
    recipients = [ModeratorSecret.make() for _ in range(2)]
    lines = [one.public.text for one in recipients]
    async with chromium() as browser:
        page = await browser.new_page()
        await page.goto(desk_page.as_uri())
        for name, item, expected in cases:
            assert await page.evaluate("(item) => relayVerify.item(item)", item) == expected, name
            if expected is None:
                assert checked_again(item) is None, f"{name}: and so says the command line"
        sealed = await page.evaluate(
            "async (lines) => relayKeys.sealEnvelope(new TextEncoder().encode('sealed in a browser'), 'forward', 1, "
            "await Promise.all(lines.map(relayKeys.readPublic)))",
            lines,
        )
    assert (
        envelope.open_with(recipients[1], Envelope.read(sealed), case_id="forward", version=1) == b"sealed in a browser"
    )


async def test_the_ratchet_of_the_page_is_the_one_of_clients(desk_page: Path) -> None:
    """Across every wrap of its four parts, from keys that begin early or late."""
    session = Session()
    page_text = PAGE.read_text("utf-8")
    tools = page_text[page_text.index("  const ratchetTo") : page_text.index("  const openWith")]
    helpers = page_text[page_text.index("  const join =") : page_text.index("  // --- the export")]
    script = "const PART_BYTES = 32; class Refused extends Error {}; const utf8 = new TextEncoder();" + helpers + tools
    cases = [
        (0, 0),
        (0, 1),
        (0, 255),
        (0, 256),
        (3, 700),
        (255, 256),
        (256, 65_536),
        (70_000, 16_777_217),
        (16_777_215, 16_777_216),
    ]
    async with chromium() as browser:
        page = await browser.new_page()
        await page.goto(desk_page.as_uri())
        await page.evaluate(script + "; window.ratchetTo = ratchetTo; window.hmacOf = hmac; undefined")
        for begins, to in cases:
            made = await page.evaluate(
                "async ([start, from, to]) => [...await ratchetTo(Uint8Array.from(start), from, to)]",
                [list(session.ratchet(begins)), begins, to],
            )
            assert prk_of(bytes(made)) == session.prk(to), f"from {begins} to {to}"
