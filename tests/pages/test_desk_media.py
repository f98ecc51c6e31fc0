"""Pictures at the desk: none is fetched by itself, by a second click blurred, never where a minor may be concerned."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import struct
import sys
import zlib

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from relay.moderation.disclosure_form import KEY, Item, item_json
from tests.moderation.sessions import Session, b64
from tests.pages.browsers import Browsers
from tests.pages.desk_people import has_keys, makes_moderator, opens_evidence, puts_key_in, reports
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
