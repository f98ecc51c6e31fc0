"""Stories of files: what is kept, who gets it, and what the seal refuses."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import ClientError

from relay.clock import DAY, MINUTE
from relay.config import Duration, Size
from relay.config import Media as MediaSettings
from relay.errors import StorageFull
from relay.media.files import Store
from relay.media.sending import disposition, part_of
from tests.media.media_house import House
from tests.people import until

PNG = b"\x89PNG\r\n\x1a\n" + os.urandom(2000)
SECRET = os.urandom(3_000_000)


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with House(tmp_path) as house:
        yield house


async def test_an_encrypted_file_comes_back_as_it_was(house: House) -> None:
    media_id = await house.uploads(SECRET, headers={"Content-Type": "image/jpeg"}, params={"filename": "canary.jpg"})
    answer = await house.downloads(media_id, "bob")
    assert answer.body == SECRET, "the bytes are the same"
    assert answer.headers["Content-Type"] == "application/octet-stream", "what the uploader claimed is not repeated"
    assert answer.headers["Content-Disposition"] == "attachment"
    assert "sandbox" in answer.headers["Content-Security-Policy"]
    assert answer.headers["Cross-Origin-Resource-Policy"] == "cross-origin"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert house.files() == [SECRET], "one file, and no draft beside it"
    rows = await house.db.read(lambda query: query.all("SELECT content_type, file_name FROM media"))
    assert rows == [(None, None)], "neither name nor type is stored"


async def test_an_upload_survives_the_process(house: House) -> None:
    media_id = await house.uploads(SECRET)
    reopened = Store(house.folder / "media" / "local")
    found = b"".join([block async for block in reopened.read(media_id)])
    assert found == SECRET


async def test_a_part_of_a_file(house: House) -> None:
    media_id = await house.uploads(SECRET)
    for header, expected in (
        ("bytes=0-9", SECRET[:10]),
        ("bytes=2999990-", SECRET[-10:]),
        ("bytes=-5", SECRET[-5:]),
        ("bytes=1000000-1999999", SECRET[1_000_000:2_000_000]),
    ):
        answer = await house.downloads(media_id, headers={"Range": header})
        assert (answer.status, answer.body) == (206, expected), header
        assert answer.headers["Content-Range"].endswith("/3000000")
    outside = await house.downloads(media_id, headers={"Range": "bytes=3000000-"})
    assert outside.status == 416 and outside.headers["Content-Range"] == "bytes */3000000"
    several = await house.downloads(media_id, headers={"Range": "bytes=0-1,4-5"})
    assert several.status == 200 and several.body == SECRET, "several ranges get the whole file"


async def test_head_tells_the_size_without_the_bytes(house: House) -> None:
    media_id = await house.uploads(SECRET)
    answer = await house.ask("HEAD", f"/_matrix/client/v1/media/download/one/{media_id}")
    assert answer.status == 200 and answer.headers["Content-Length"] == "3000000" and not answer.body


async def test_only_people_with_a_session_get_files(house: House) -> None:
    media_id = await house.uploads(SECRET)
    assert (await house.downloads(media_id, "stranger")).status == 401
    for path in (f"download/one/{media_id}", f"download/one/{media_id}/a.png", f"thumbnail/one/{media_id}"):
        old = await house.ask("GET", f"/_matrix/media/v3/{path}")
        assert old.status == 404 and old.json["errcode"] == "M_NOT_FOUND", "the old paths are frozen"
    for path in ("/_matrix/media/v3/config", "/_matrix/client/v1/media/config"):
        assert (await house.ask("GET", path)).json == {"m.upload.size": 50 * 1024**2}


@pytest.mark.parametrize(
    "body",
    [b"%PDF-1.7 canary", b"canary text " * 10, b"canary text, long: " * 20_000, b"PK\x03\x04canary"],
    ids=["pdf", "text", "long text", "zip"],
)
async def test_what_is_readable_is_refused_and_never_on_disk(house: House, body: bytes) -> None:
    answer = await house.ask("POST", "/_matrix/media/v3/upload", data=body)
    assert answer.status == 403 and answer.json["errcode"] == "M_FORBIDDEN"
    assert await until(lambda: house.files() == [])


async def test_a_picture_waits_until_it_is_an_avatar(house: House) -> None:
    media_id = await house.uploads(PNG)
    assert house.files() == [], "it waits in memory"
    assert (await house.downloads(media_id)).body == PNG, "its uploader sees it"
    assert (await house.downloads(media_id, "bob")).status == 404, "nobody else does"
    await house.media.adopt(f"mxc://one/{media_id}")
    answer = await house.downloads(media_id, "bob")
    assert answer.body == PNG and answer.headers["Content-Type"] == "image/png"
    thumbnail = await house.ask("GET", f"/_matrix/client/v1/media/thumbnail/one/{media_id}?width=32&height=32", "bob")
    assert thumbnail.body == PNG, "an avatar is its own thumbnail"
    assert house.files() == [PNG]


async def test_a_picture_that_nobody_names_is_forgotten(house: House) -> None:
    media_id = await house.uploads(PNG)
    house.clock.ahead = 6 * MINUTE
    assert (await house.downloads(media_id)).status == 404
    await house.media.adopt(f"mxc://one/{media_id}")
    assert house.files() == []


async def test_waiting_pictures_are_bounded(house: House) -> None:
    first, *_, last = [await house.uploads(PNG) for _ in range(5)]
    assert (await house.downloads(first)).status == 404, "only the latest few of one person wait"
    assert (await house.downloads(last)).status == 200
    big = b"\x89PNG\r\n\x1a\n" + os.urandom(1024 * 1024)
    assert (await house.ask("POST", "/_matrix/media/v3/upload", data=big)).status == 403, (
        "a large picture does not wait at all"
    )
    full = [await house.ask("POST", "/_matrix/media/v3/upload", f"user{n}", data=big[:-100]) for n in range(20)]
    assert full[-1].status == 429, "memory for them has an end"


async def test_an_encrypted_file_has_no_thumbnail(house: House) -> None:
    media_id = await house.uploads(SECRET)
    path = f"/_matrix/client/v1/media/thumbnail/one/{media_id}"
    assert (await house.ask("GET", path + "?width=32&height=32")).status == 404
    assert (await house.ask("GET", path)).json["errcode"] == "M_MISSING_PARAM"


async def test_a_file_that_is_too_large(tmp_path: Path) -> None:
    async with House(tmp_path, settings=MediaSettings(max_upload_bytes=Size(100_000))) as house:

        async def stream() -> AsyncIterator[bytes]:
            for _ in range(20):
                yield os.urandom(10_000)

        for body in (os.urandom(100_001), stream()):
            try:
                answer = await house.ask("POST", "/_matrix/media/v3/upload", data=body)
                assert answer.status == 413 and answer.json["errcode"] == "M_TOO_LARGE"
            except ClientError:
                pass  # the server hung up while the client still sent
        assert await until(lambda: house.files() == [])
        assert (await house.downloads(await house.uploads(os.urandom(100_000)))).status == 200


async def test_a_full_disk(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    before = await house.uploads(SECRET)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.writev", full)
        answer = await house.ask("POST", "/_matrix/media/v3/upload", data=SECRET)
        assert answer.status == 507 and "full" in answer.json["error"]
        assert (await house.downloads(before)).body == SECRET, "reading goes on"
    assert await until(lambda: len(house.files()) == 1), "the draft is gone"
    assert (await house.downloads(await house.uploads(SECRET))).status == 200, "it works again once there is room"


async def test_a_row_that_can_not_be_written_takes_its_file_along(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(*_: object) -> None:
        raise StorageFull

    monkeypatch.setattr(house.media, "_write_row", full)
    assert (await house.ask("POST", "/_matrix/media/v3/upload", data=SECRET)).status == 507
    assert await until(lambda: house.files() == [])


async def test_an_address_before_its_file(house: House) -> None:
    created = await house.ask("POST", "/_matrix/media/v1/create")
    media_id = created.json["content_uri"].removeprefix("mxc://one/")
    assert created.json["unused_expires_at"] > house.clock.now()
    early = await house.downloads(media_id, params={"timeout_ms": "10"})
    assert early.status == 504 and early.json["errcode"] == "M_NOT_YET_UPLOADED"
    path = f"/_matrix/media/v3/upload/one/{media_id}"
    assert (await house.ask("PUT", path, "bob", data=SECRET)).status == 403, "it is alice's"
    assert (await house.ask("PUT", path, data=SECRET)).json == {}
    again = await house.ask("PUT", path, data=SECRET)
    assert again.status == 409 and again.json["errcode"] == "M_CANNOT_OVERWRITE_MEDIA"
    assert (await house.downloads(media_id)).body == SECRET
    for _ in range(20):
        await house.ask("POST", "/_matrix/media/v1/create")
    assert (await house.ask("POST", "/_matrix/media/v1/create")).status == 429, "empty addresses are bounded"


async def test_a_file_of_another_server_is_kept_if_encrypted(house: House) -> None:
    house.far.files = {"cipher": SECRET, "clear": PNG, "text": b"canary " * 50_000}
    for _ in range(3):
        answer = await house.downloads("cipher", server="two")
        assert answer.body == SECRET and answer.headers["Content-Type"] == "application/octet-stream"
    assert house.far.asked == 1, "the copy is used"
    part = await house.downloads("cipher", server="two", headers={"Range": "bytes=0-9"})
    assert part.status == 206 and part.body == SECRET[:10]
    for name in ("clear", "text"):
        assert (await house.downloads(name, server="two")).body == house.far.files[name]
    await house.copied()
    assert house.files() == [SECRET], "what is readable only passes through"


async def test_many_ask_for_one_remote_file(house: House) -> None:
    house.far.files = {"cipher": SECRET}
    answers = await asyncio.gather(*(house.downloads("cipher", f"user{n}", server="two") for n in range(12)))
    assert all(answer.body == SECRET for answer in answers)
    assert house.far.asked < 12, "those who came later got the copy"


async def test_a_remote_file_that_breaks_off(house: House) -> None:
    house.far.files = {"cipher": SECRET}
    house.far.breaks_after = 500_000
    with pytest.raises(ClientError):
        await house.downloads("cipher", server="two")
    assert await until(lambda: house.files() == []), "half a copy is none"
    house.far.breaks_after = None
    assert (await house.downloads("cipher", server="two")).body == SECRET
    assert (await house.downloads("nothing", server="two")).status == 404


async def test_copies_go_when_nobody_asks(house: House) -> None:
    house.far.files = {"old": SECRET, "new": SECRET}
    await house.downloads("old", server="two")
    await house.copied()
    house.clock.ahead = 8 * DAY
    await house.downloads("new", server="two")
    await house.copied()
    assert await house.copies.trim() == 1
    assert len(house.files()) == 1
    await house.downloads("old", server="two")
    assert house.far.asked == 3


async def test_copies_go_when_they_are_too_many(tmp_path: Path) -> None:
    settings = MediaSettings(remote_cache_bytes=Size(4_000_000), remote_retention=Duration(DAY))
    async with House(tmp_path, settings=settings) as house:
        house.far.files = {"a": SECRET, "b": SECRET, "c": SECRET}
        for name in house.far.files:
            await house.downloads(name, server="two")
            await house.copied()
        assert len(house.files()) == 1


async def test_a_remote_avatar_is_held_in_memory(house: House) -> None:
    house.far.files = {"face": PNG, "cipher": SECRET}
    for _ in range(3):
        answer = await house.ask("GET", "/_matrix/client/v1/media/thumbnail/two/face?width=32&height=32")
        assert answer.body == PNG and answer.headers["Content-Type"] == "image/png"
    assert house.far.asked == 1 and house.files() == []
    assert (await house.ask("GET", "/_matrix/client/v1/media/thumbnail/two/cipher?width=32&height=32")).status == 404


async def test_what_a_crash_left_is_swept(house: House) -> None:
    await house.uploads(SECRET)
    folder = house.folder / "media" / "local" / "ab"
    folder.mkdir(exist_ok=True)
    for name in ("abandoned", ".draft-123"):
        (folder / name).write_bytes(b"x")
        os.utime(folder / name, (1, 1))
    counts, findings = await house.db.read(house.media.audit)
    assert len(findings) == 2 and counts == {"media: not provably readable": 1}
    sweep = asyncio.create_task(house.media.run())
    assert await until(lambda: house.files() == [SECRET])
    sweep.cancel()


async def test_the_audit_finds_a_readable_file(house: House) -> None:
    media_id = await house.uploads(SECRET)
    (path,) = (house.folder / "media" / "local").rglob(media_id)
    path.write_bytes(b"%PDF" + SECRET[4:])
    _, findings = await house.db.read(house.media.audit)
    assert [finding.text for finding in findings] == ["a readable file"]


async def test_an_open_seal_takes_everything(tmp_path: Path) -> None:
    async with House(tmp_path, seal="open") as house:
        media_id = await house.uploads(PNG, headers={"Content-Type": "image/png"}, params={"filename": "me.png"})
        answer = await house.downloads(media_id, "bob")
        assert answer.headers["Content-Type"] == "image/png"
        assert answer.headers["Content-Disposition"] == 'inline; filename="me.png"'


async def test_ids_can_not_leave_the_folder(house: House) -> None:
    for bad in ("..%2f..%2frelay.db", "%2e%2e", "a", ".draft-1"):
        assert (await house.downloads(bad)).status in (400, 404)


def test_names_in_headers() -> None:
    assert disposition("image/png", "a\r\nb.png") == 'inline; filename="ab.png"'
    assert disposition("text/html", 'a"b') == "attachment; filename*=utf-8''a%22b"
    assert part_of("bytes=-", 10) is None and part_of("lines=1-2", 10) is None and part_of("bytes=5-2", 10) is None
