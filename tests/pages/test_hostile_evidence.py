"""The browser's side of the desk, read as an attacker: what somebody sealed into the evidence runs nowhere, hides nothing and breaks
nothing; key and passphrase lie nowhere; no other page frames the desk, listens to it or works for it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from tests.moderation.browser import chromium
from tests.moderation.sessions import b64
from tests.pages.browsers import Browsers
from tests.pages.desk_people import PASSPHRASE, has_keys, makes_moderator, opens_case, reports
from tests.town import ROOT, Town

TAG = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"


def message(**content: Any) -> str:
    return b64(json.dumps({"type": "m.room.message", "room_id": "!r:one", "content": content}).encode())


def hostile() -> list[Any]:
    """Items of an envelope as no honest relay makes them."""
    file = {"url": f"mxc://else.example/{TAG}", "hashes": {"sha256": 5}, "key": None, "iv": {}}
    deep = b64(b'{"type":"t","content":' + b'{"a":' * 4000 + b"1" + b"}" * 4000 + b',"room_id":"!r:one"}')
    return [
        None,
        7,
        TAG,
        [],
        {},
        {"plaintext": 5, "sender": {"toString": "x"}, "origin_server_ts": "9e999", "media": "all"},
        {"plaintext": "no base64 %%%", "sender": TAG, "event_id": TAG, "result": "__proto__", "step": "constructor"},
        {"plaintext": deep, "sender": "@deep:one", "pdu": {"content": {}, "hashes": {}}, "room_version": "12"},
        {
            "plaintext": message(body=TAG, file=file, info={"mimetype": "image/png"}),
            "media": [None, {"role": "file", "state": {}}],
        },
        {
            "plaintext": message(body="svg", file={"url": "mxc://else.example/a"}, info={"mimetype": "image/svg+xml"}),
            "sender": "@svg:one",
        },
        {"plaintext": message(body="x" * 300_000), "sender": "@long:one"},
        {"plaintext": message(body="\u202e\u2066\u200b" * 5_000 + "end"), "sender": "@marks:one"},
        {"plaintext": message(body="the last one"), "sender": "@last:one", "result": "verified"},
    ]


async def test_hostile_evidence_runs_nowhere_and_hides_nothing(town: Town, browsers: Browsers) -> None:
    house = await town.relay("one")
    alice, victim, mallory = await town.users("alice@one", "victim@one", "mallory@one")
    await makes_moderator(house, alice)
    secret = await has_keys(house, alice)
    room = await victim.creates_room(with_=mallory)
    await reports(victim, room, await mallory.sends(room), "please look")
    assert house.server is not None
    moderation = house.server.moderation
    [case], _ = await moderation.casework.cases.queue()
    polluting = b'{"__proto__":{"polluted":"yes"},"constructor":{"prototype":{"polluted":"yes"}},"words":"w"}'
    texts = [
        ("evidence", json.dumps({"relay.evidence": 1, "items": hostile()}).encode()),
        ("evidence", polluting),
        ("answer", polluting),
        ("note", b'{"by": {"a": 1}, "words": ' + json.dumps(TAG).encode() + b"}"),
        ("words", b"\xff\xfe not a text"),
    ]
    for kind, text in texts:
        sealed = await moderation.proving.envelopes.prepare(case.case_id, kind, text)
        assert sealed is not None
        with house.server.db.write() as tx:
            moderation.proving.envelopes.store(tx, sealed, actor="relay")
        await tx

    reader = await browsers.open()
    page = reader.page
    await opens_case(reader, alice, secret, case.case_id)
    await page.get_by_text("the last one").first.wait_for()
    assert await page.title() != "owned"
    tags = await page.evaluate("() => [...document.querySelectorAll('#opened *')].map((one) => one.localName)")
    assert set(tags) <= {"div", "p", "span", "pre", "details", "summary", "ul", "li", "code", "button"}, set(tags)
    assert await page.evaluate("() => [typeof {}.polluted, typeof [].polluted]") == ["undefined"] * 2
    opened = await page.locator("#opened").inner_text()
    assert TAG in opened and "further characters are left out" in opened
    assert "\u202e" not in opened and "[202E]" in opened, "nothing turns the text round"
    assert "The message names a file by an address that is none" in opened
    assert "A file of this kind is not shown here, and not fetched" in opened
    assert opened.count("it does not hold") >= 5, "none of them is taken for proved"
    assert "The two disagree" in opened, "also where the relay calls it verified"

    # Neither key nor passphrase lies anywhere, and what was opened goes with the page.
    bare = secret.text.replace("-", "").removeprefix("rmk1")
    lying = await page.evaluate(
        "() => JSON.stringify([localStorage, sessionStorage, location.href, document.cookie, history.state, window.name, "
        "[...document.querySelectorAll('input, textarea')].map((one) => one.value)])"
    )
    assert PASSPHRASE not in lying and bare not in lying.replace("-", "")
    assert await page.evaluate("async () => (await caches.keys()).length + (await indexedDB.databases()).length") == 0
    await page.goto("/_relay/desk")
    await page.go_back()
    assert await page.locator("#opened .opened").count() == 0, "going back shows it no more"

    # Nobody works for the page, and nobody frames it.
    worker = await page.evaluate(
        "() => navigator.serviceWorker.register('/_relay/static/relay.js').then(() => 'works', () => 'refused')"
    )
    assert worker == "refused"
    other = await browsers.open()
    await other.page.route(
        "https://evil.example/**",
        lambda route: route.fulfill(
            content_type="text/html", body=f"<iframe src='{house.url}/_relay/sign-in'></iframe>"
        ),
    )
    await other.page.goto("https://evil.example/")
    await other.page.wait_for_load_state("networkidle")
    framed = [await frame.content() for frame in other.page.frames]
    assert len(framed) == 2 and not any("User name" in text for text in framed), "no other page frames ours"


async def test_the_proof_tool_reaches_no_network_at_all() -> None:
    """By its own policy, also where code in it were somebody else's."""
    asked: list[bytes] = []

    async def hears(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Chromium opens a connection for a frame or a form before it asks the policy; it sends nothing over it.
        if line := await reader.readline():
            asked.append(line)
        writer.close()

    outside = await asyncio.start_server(hears, "127.0.0.1", 0)
    port = outside.sockets[0].getsockname()[1]
    async with outside, chromium() as browser:
        page = await browser.new_page()
        await page.goto((ROOT / "relay" / "pages" / "static" / "proof.html").as_uri())
        assert await page.locator("#tool").is_visible()
        went = await page.evaluate(
            """async (port) => {
              const target = `http://127.0.0.1:${port}/x`, tried = {};
              const attempt = async (name, what) => { try { tried[name] = String(await what()); } catch (error) { tried[name] = "refused"; } };
              await attempt("fetch", () => fetch(target).then(() => "went"));
              await attempt("beacon", () => navigator.sendBeacon(target, "x") ? "queued" : "refused");
              await attempt("socket", () => new Promise((done, no) => { const s = new WebSocket(`ws://127.0.0.1:${port}`); s.onopen = () => done("went"); s.onerror = no; }));
              await attempt("events", () => new Promise((done, no) => { const s = new EventSource(target); s.onopen = () => done("went"); s.onerror = no; }));
              for (const [name, tag, key] of [["image", "img", "src"], ["script", "script", "src"], ["frame", "iframe", "src"], ["media", "video", "src"], ["object", "object", "data"]]) {
                const made = document.createElement(tag); made[key] = target; document.body.append(made);
              }
              const link = document.createElement("link"); link.rel = "stylesheet"; link.href = target; document.head.append(link);
              const form = document.createElement("form"); form.action = target; document.body.append(form); form.submit();
              const style = document.createElement("div"); style.style.backgroundImage = `url(${target})`; document.body.append(style);
              await attempt("worker", () => { new Worker(URL.createObjectURL(new Blob([`fetch("${target}")`]))); return "works"; });
              await attempt("eval", () => { const made = document.createElement("script"); made.textContent = "window.ran = 1"; document.body.append(made); return window.ran ? "went" : "refused"; });
              await new Promise((done) => setTimeout(done, 200));
              return tried;
            }""",
            port,
        )
        assert "went" not in went.values(), went
        assert went["eval"] == "refused" and went["fetch"] == "refused"
        assert page.url.startswith("file:"), "no form leads away"
    assert not asked, f"asked of the network: {asked}"
