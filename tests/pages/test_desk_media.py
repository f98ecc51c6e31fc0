"""Pictures at the desk: none is fetched by itself, by a second click blurred, never where a minor may be concerned."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import struct
import sys
import zlib

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from relay.media.remote_copies import RemoteCopies
from relay.moderation import envelope
from relay.moderation.disclosure_form import KEY, Item, item_json
from relay.moderation.envelope import Envelope
from tests.moderation.sessions import Session, b64
from tests.pages.browsers import Browsers
from tests.pages.desk_people import has_keys, makes_moderator, opens_case, opens_evidence, puts_key_in, reports
from tests.people import Json, Person
from tests.town import ROOT, Town

SIDE = 48


def picture() -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    rows = b"".join(b"\0" + bytes(value for x in range(SIDE) for value in (x * 5, y * 5, 150)) for y in range(SIDE))
    head = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


async def sends_picture(person: Person, plain: bytes) -> Json:
    """Uploads it encrypted, as apps do; returns the `file` of the message."""
    key, iv = os.urandom(32), os.urandom(8) + bytes(8)
    encryptor = Cipher(algorithms.AES(key), modes.CTR(iv)).encryptor()
    blob = encryptor.update(plain) + encryptor.finalize()
    return {
        "url": await person.uploads(blob), "v": "v2", "iv": b64(iv), "hashes": {"sha256": b64(hashlib.sha256(blob).digest())},
        "key": {"kty": "oct", "alg": "A256CTR", "ext": True, "key_ops": ["encrypt", "decrypt"],
                "k": base64.urlsafe_b64encode(key).decode().rstrip("=")},
    }  # fmt: skip


async def test_a_picture_is_shown_by_a_second_click_and_blurred(town: Town, browsers: Browsers) -> None:
    house = await town.relay("one")
    alice, victim, mallory = await town.users("alice@one", "victim@one", "mallory@one")
    await makes_moderator(house, alice)
    secret = await has_keys(house, alice)
    room = await victim.creates_room(with_=mallory)
    session = Session()
    file = await sends_picture(mallory, picture())
    content = {"msgtype": "m.image", "body": "holiday.png", "file": file, "info": {"mimetype": "image/png"}}
    sent = await mallory.sends(room, session.says(room, "", content=content))
    proof = {"v": 1, "alg": "m.megolm.v1.aes-sha2", "category": "ncii", "good_faith": True, "items": [item_json(Item(sent, 0, session.prk(0)))]}  # fmt: skip
    await reports(victim, room, sent, "", **{KEY: proof})

    reader = await browsers.open()
    await reader.signs_in(alice, "/_relay/desk/keys")
    await puts_key_in(reader, secret)
    await reader.goes_to("/_relay/desk")
    await reader.follows("No. 1")
    fetched: list[str] = []
    reader.page.on("request", lambda asked: fetched.append(asked.url) if asked.url.endswith("/media") else None)
    await opens_evidence(reader)
    assert await reader.reads("holiday.png") and not fetched, "text first: nothing is fetched by itself"
    await reader.page.get_by_role("button", name="Show the file, blurred").click()
    shown = reader.page.get_by_role("img", name="the attached picture")
    await shown.wait_for()
    assert len(fetched) == 1 and "blurred" in (await shown.get_attribute("class") or "")
    assert await shown.evaluate("image => image.decode().then(() => image.naturalWidth)") == SIDE, (
        "it was decrypted here"
    )
    await reader.shows("desk-picture")
    await reader.page.get_by_role("button", name="Take the blur away").click()
    assert "blurred" not in (await shown.get_attribute("class") or "")
    await reader.page.keyboard.press("Escape")
    async with reader.page.expect_navigation():
        await reader.page.get_by_role("button", name="This may show a minor").click()
    refused = await mallory.is_refused(mallory.downloads(file["url"]))
    assert refused.status == 404, "one press keeps it from everybody"
    await opens_evidence(reader)
    assert await reader.reads("It is not shown: this case may concern a minor")
    assert await reader.page.get_by_role("button", name="Show the file").count() == 0
    await reader.goes_to("/_relay/desk/log")
    assert await reader.reads("File looked at") and await reader.reads("Evidence opened"), (
        "who looked stands in the log"
    )
    await reader.is_content()


HIDING = "come \u202etonight\u202c to the ga\u200bte \x1b[31mnow"


async def test_a_file_elsewhere_is_fetched_by_hand_and_a_lying_relay_is_seen(town: Town, browsers: Browsers) -> None:
    one, two = await town.relay("one"), await town.relay("two")
    alice, victim, mallory = await town.users("alice@one", "victim@one", "mallory@two")
    await makes_moderator(one, alice)
    secret = await has_keys(one, alice)
    room = await victim.creates_room(with_=mallory)
    session = Session()
    file = await sends_picture(mallory, picture())
    content = {"msgtype": "m.image", "body": HIDING, "file": file, "info": {"mimetype": "image/png"}}
    sent = await mallory.sends(room, session.says(room, "", content=content))
    assert await victim.sees(sent)
    proof = {"v": 1, "alg": "m.megolm.v1.aes-sha2", "category": "threat", "good_faith": True, "items": [item_json(Item(sent, 0, session.prk(0)))]}  # fmt: skip
    await reports(victim, room, sent, "", **{KEY: proof})
    assert one.server is not None
    moderation = one.server.moderation
    [copies] = [part for part in one.server._parts if isinstance(part, RemoteCopies)]
    [case], _ = await moderation.casework.cases.queue()
    server, media_id = file["url"].removeprefix("mxc://").split("/")

    reader = await browsers.open()
    page = reader.page
    await opens_case(reader, alice, secret, case.case_id)
    await page.get_by_text("Checked again in this browser: this text is exactly").wait_for()
    assert await reader.reads(f"is the word of its own server, {server}"), "what nobody here can check is said"
    shown = page.locator("#opened .said").first
    assert await shown.inner_text() == "come [202E]tonight[202C] to the ga[200B]te [001B][31mnow", "nothing hides"
    await page.get_by_role("button", name="Show the file, blurred").click()
    warning = page.get_by_role("group", name="The file lies elsewhere")
    await warning.wait_for()
    assert "learns that somebody here looks" in await warning.inner_text()
    await reader.shows("desk-file-elsewhere")
    await warning.get_by_role("button", name="Leave it").click()
    log = moderation.audit_log
    assert not [row for row in await log.page(limit=100) if row.action.startswith("media.")], "nobody was asked"
    await page.get_by_role("button", name="Show the file, blurred").click()
    await warning.get_by_role("button", name=f"Fetch it from {server}").click()
    image = page.get_by_role("img", name="the attached picture")
    await image.wait_for()
    assert "blurred" in (await image.get_attribute("class") or "")
    assert await image.evaluate("image => image.decode().then(() => image.naturalWidth)") == SIDE
    await page.get_by_role("button", name="Take the blur away").click()
    assert [row.target for row in await log.page(limit=100) if row.action == "media.fetched"] == [file["url"]]
    assert await copies.held(server, media_id) is None, "nobody else gets it because a moderator looked"

    # A relay that puts another text into the envelope is seen through: the ciphertext opens to something else.
    [sealed] = [row for row in await moderation.proving.envelopes.of_case(case.case_id) if row["kind"] == "evidence"]
    told = json.loads(
        envelope.open_with(secret, Envelope.read(sealed), case_id=case.case_id, version=sealed["version"])
    )
    told["items"][0]["plaintext"] = b64(
        b'{"type":"m.room.message","content":{"body":"I will kill you"},"room_id":"!x:y"}'
    )
    lie = await moderation.proving.envelopes.prepare(case.case_id, "evidence", json.dumps(told).encode())
    assert lie is not None
    with one.server.db.write() as tx:
        moderation.proving.envelopes.store(tx, lie, actor="relay")
    await tx
    await page.reload()
    await opens_evidence(reader)
    await page.get_by_text("The two disagree. Don't decide by this text").wait_for()
    assert await page.locator(".opened.doubtful").count() == 1
    await reader.shows("desk-lie")
    # Where a minor may be concerned nothing is fetched, whatever a page asks.
    async with page.expect_navigation():
        await page.get_by_role("button", name="This may show a minor").click()
    refused = await page.evaluate(
        """async ([at, url]) => (await fetch(at, {method: "POST", body: new URLSearchParams(
        {form: document.querySelector("#open-evidence").elements.form.value, url, sure: "yes"})})).status""",
        [f"/_relay/desk/case/{case.case_id}/fetch-media", file["url"]],
    )
    assert refused == 403
    await reader.is_content()
    assert two.server is not None


async def test_a_moderator_decides_without_scripts(town: Town, browsers: Browsers) -> None:
    house = await town.relay("one")
    alice, victim, mallory = await town.users("alice@one", "victim@one", "mallory@two")
    await makes_moderator(house, alice)
    secret = await has_keys(house, alice)
    room = await victim.creates_room(with_=mallory)
    sent = await mallory.sends(room)
    assert await victim.sees(sent)
    await reports(victim, room, sent, "please look at this")
    reader = await browsers.open(scripts=False)
    await reader.signs_in(alice, "/_relay/desk")
    await reader.follows("No. 1")
    assert await reader.reads("Opening needs scripts") and not await reader.reads("Suspend"), "she is not of this relay"
    async with reader.page.expect_download() as loading:
        await reader.page.get_by_role("button", name="Download sealed").click()
    saved = await (await loading.value).path()
    opener = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "relay", "desk", "open", str(saved), "--passphrase-stdin", cwd=ROOT,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    said, _ = await opener.communicate(f"{secret.text}\n".encode())
    assert "please look at this" in said.decode(), "the offline opener takes what the desk gives"
    await reader.presses("Take it")
    await reader.page.get_by_label("Block a server").check()
    await reader.page.locator("select[name=reason]").select_option("spam")
    await reader.page.get_by_label("Which one").fill("rule 2")
    facts = reader.page.get_by_label("What happened")
    await facts.fill("too short")
    assert "20" in await facts.evaluate("field => field.validationMessage"), "the browser itself says what is missing"
    await facts.evaluate("field => field.removeAttribute('minlength')")
    await reader.presses("Go on …")
    assert "at least 20 characters" in await reader.page.locator("#problem-facts").inner_text(), (
        "and so does the relay, there"
    )
    assert await facts.input_value() == "too short" and await reader.page.get_by_label("Block a server").is_checked()
    await reader.shows("desk-case-not-whole")
    await facts.fill("Many unwanted messages from this server within an hour.")
    await reader.presses("Go on …")
    await reader.presses("Yes, decide so")
    await reader.goes_to("/_relay/desk/measures")
    assert await reader.reads(town.houses["two"].name)
