"""The rows of the speed budget that one homeserver alone can show. Each scenario returns its figures by name.

Names end in their unit: `_per_s`, `_ms` (of the clock), `cpu_ms` (the server's own time for one operation), `_mb_per_s`,
`_mb`. `per_s` and p50, p95, p99 are seen from outside; on a shared machine the CPU time is the steadier figure.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Awaitable, Callable

from scripts.bench_client import BenchError, Person, random_base64
from scripts.bench_ground import Bench, Figures, Stopwatch, named, spread
from scripts.bench_machine import BLOB_BYTES
from scripts.bench_sliding import sliding

DELIVERY_TIMEOUT_S = 30.0
SENDERS = 20


# --- sending


async def _closed_loop(bench: Bench, seconds: float, seats: list[tuple[Person, str]]) -> Figures:
    """Everybody sends the next message as soon as the last one was answered."""
    took: list[float] = []
    cpu, begun = bench.meter.cpu_s(), time.perf_counter()

    async def one(person: Person, room_id: str) -> None:
        while (now := time.perf_counter()) < begun + seconds:
            await person.sends(room_id)
            took.append(time.perf_counter() - now)

    await asyncio.gather(*(one(*seat) for seat in seats))
    elapsed, spent = time.perf_counter() - begun, bench.meter.cpu_s() - cpu
    return {"per_s": len(took) / elapsed, "cpu_ms": spent / len(took) * 1e3, **spread(took)}


async def send(bench: Bench) -> Figures:
    people = await bench.homeserver.people(SENDERS)
    seats = [(person, await person.creates_room()) for person in people]
    await _closed_loop(bench, bench.size.warm_up_seconds, seats)
    return await _closed_loop(bench, bench.size.seconds, seats)


async def hot(bench: Bench) -> Figures:
    people = await bench.homeserver.people(SENDERS)
    room_id = await people[0].creates_room(people[1:])
    seats = [(person, room_id) for person in people]
    await _closed_loop(bench, bench.size.warm_up_seconds, seats)
    return await _closed_loop(bench, bench.size.seconds, seats)


# --- long polls


async def _audience(bench: Bench, viewers: int, messages: int) -> Figures:
    """One sends, all others wait on a long poll: until each, and until the last, has the message."""
    sender, *others = await bench.homeserver.people(viewers + 1)
    room_id = await sender.creates_room(others)
    for person in others:
        await person.sync()
    arrivals: dict[str, list[float]] = {}

    async def watches(person: Person) -> None:
        while True:
            answer = await person.sync(timeout_ms=10_000)
            now = time.perf_counter()
            room = answer.get("rooms", {}).get("join", {}).get(room_id, {})
            for event in room.get("timeline", {}).get("events", ()):
                arrivals.setdefault(event["event_id"], []).append(now)

    async with asyncio.TaskGroup() as group:
        watching = [group.create_task(watches(person)) for person in others]
        await asyncio.sleep(min(1.0, bench.size.seconds))
        each, last, cpu = [], [], bench.meter.cpu_s()
        for _ in range(messages):
            begun = time.perf_counter()
            event_id = await sender.sends(room_id)
            while len(arrivals.get(event_id, ())) < viewers:
                if time.perf_counter() > begun + DELIVERY_TIMEOUT_S:
                    raise BenchError(
                        f"only {len(arrivals.get(event_id, ()))} of {viewers} viewers got a message in time"
                    )
                await asyncio.sleep(0.0005 if viewers < 10 else 0.002)
            got = arrivals[event_id]
            each += [moment - begun for moment in got]
            last.append(max(got) - begun)
            await asyncio.sleep(0.02)
        spent = bench.meter.cpu_s() - cpu
        for task in watching:
            task.cancel()
    for person in others:
        person.hangs_up()
    return {
        "last_ms": statistics.median(last) * 1e3,
        "cpu_ms": spent / messages / viewers * 1e3,
        **spread(each),
    }


async def pair(bench: Bench) -> Figures:
    return await _audience(bench, 1, bench.size.pair_messages)


async def fan100(bench: Bench) -> Figures:
    return await _audience(bench, bench.size.viewers, bench.size.viewers_messages)


async def fan500(bench: Bench) -> Figures:
    return await _audience(bench, bench.size.crowd, bench.size.crowd_messages)


# --- /sync


async def _in_many_rooms(bench: Bench) -> Person:
    (person,) = await bench.homeserver.people(1)
    for _ in range(bench.size.rooms):
        room_id = await person.creates_room()
        for _ in range(bench.size.messages_a_room):
            await person.sends(room_id)
    return person


async def initial(bench: Bench) -> Figures:
    person = await _in_many_rooms(bench)
    watch = Stopwatch(bench.meter)
    size = 0

    async def whole() -> None:
        nonlocal size
        # unparsed: only the server's part is to be seen
        _, answer = await person.polls.request("GET", "/_matrix/client/v3/sync?timeout=0", person.token)
        size = len(answer)

    for _ in range(bench.size.initial_syncs):
        await watch.time(whole())
    return {"first_ms": watch.took[0] * 1e3, "cpu_ms": watch.cpu_ms(), "answer_mb": size / 1e6, **spread(watch.took)}


async def empty(bench: Bench) -> Figures:
    person = await _in_many_rooms(bench)
    await person.sync()
    watch = Stopwatch(bench.meter)
    for _ in range(bench.size.empty_syncs):
        await watch.time(person.sync())
    return {"cpu_ms": watch.cpu_ms(), **spread(watch.took)}


# --- devices and keys


async def to_device(bench: Bench) -> Figures:
    sender, *others = await bench.homeserver.people(bench.size.devices + 1)
    for person in others:
        await person.sync()
    envelope = {
        "algorithm": "m.olm.v1.curve25519-aes-sha2",
        "sender_key": random_base64(32),
        "ciphertext": {random_base64(32): {"type": 0, "body": random_base64(680)}},
    }
    body = {"messages": {person.id: {person.device_id: envelope} for person in others}}
    watch, begun = Stopwatch(bench.meter), time.perf_counter()
    for number in range(bench.size.to_device_requests):
        await watch.time(sender.call("PUT", f"/v3/sendToDevice/m.room.encrypted/{begun}-{number}", body))
    elapsed, cpu_ms = time.perf_counter() - begun, watch.cpu_ms() / len(others)
    sent, got = bench.size.to_device_requests * len(others), 0
    for person in others:
        for _ in range(5):
            arrived = len((await person.sync()).get("to_device", {}).get("events", ()))
            got += arrived
            if not arrived:
                break
    if got != sent:
        raise BenchError(f"{got} of {sent} to-device messages arrived")
    return {"per_s": sent / elapsed, "cpu_ms": cpu_ms, **spread(watch.took)}


def _device_keys(person: Person) -> dict[str, object]:
    return {
        "user_id": person.id,
        "device_id": person.device_id,
        "algorithms": ["m.olm.v1.curve25519-aes-sha2", "m.megolm.v1.aes-sha2"],
        "keys": {f"{kind}:{person.device_id}": random_base64(32) for kind in ("curve25519", "ed25519")},
        "signatures": {person.id: {f"ed25519:{person.device_id}": random_base64(64)}},
    }


def _one_time_keys(person: Person, number: int) -> dict[str, object]:
    return {
        f"signed_curve25519:AAAA{index:02d}": {
            "key": random_base64(32),
            "signatures": {person.id: {f"ed25519:{person.device_id}": random_base64(64)}},
        }
        for index in range(number)
    }


async def keys(bench: Bench) -> Figures:
    asker, *others = await bench.homeserver.people(bench.size.devices + 1)
    uploads = [{"device_keys": _device_keys(person), "one_time_keys": _one_time_keys(person, 50)} for person in others]
    watch = Stopwatch(bench.meter)
    for person, upload in zip(others, uploads, strict=True):
        await watch.time(person.call("POST", "/v3/keys/upload", upload))
    figures = {"upload_cpu_ms": watch.cpu_ms(), **named("upload", watch.took)}
    wanted = {
        "query": {"device_keys": {person.id: [] for person in others}},
        "claim": {"one_time_keys": {person.id: {person.device_id: "signed_curve25519"} for person in others}},
    }
    for what, body in wanted.items():
        watch = Stopwatch(bench.meter)
        for _ in range(bench.size.key_requests):
            await watch.time(asker.call("POST", f"/v3/keys/{what}", body))
        figures |= {f"{what}_cpu_ms": watch.cpu_ms(), **named(what, watch.took)}
    return figures


# --- media and memory


async def media(bench: Bench) -> Figures:
    (person,) = await bench.homeserver.people(1)
    blob = os.urandom(BLOB_BYTES)
    up, down = Stopwatch(bench.meter), []
    for _ in range(bench.size.uploads):
        begun = time.perf_counter()
        status, answer = await person.requests.request(
            "POST", "/_matrix/media/v3/upload", person.token, blob, "application/octet-stream"
        )
        up.took.append(time.perf_counter() - begun)
        if status != 200:
            raise BenchError(f"an upload was answered {status}: {answer[:300].decode(errors='replace')}")
        place = answer.decode().split("mxc://", 1)[1].split('"', 1)[0]
        begun = time.perf_counter()
        status, answer = await person.requests.request(
            "GET", f"/_matrix/client/v1/media/download/{place}", person.token
        )
        down.append(time.perf_counter() - begun)
        if status != 200 or answer != blob:
            raise BenchError(f"a download was answered {status} with {len(answer)} bytes, which are not those uploaded")
    size = BLOB_BYTES / 1e6
    return {
        "up_mb_per_s": size / statistics.median(up.took),
        "down_mb_per_s": size / statistics.median(down),
        "cpu_ms": up.cpu_ms(),
        **named("up", up.took),
        **named("down", down),
    }


async def memory(bench: Bench) -> Figures:
    """After this many people, each with a session and a first /sync; run it last."""
    missing = bench.size.people_in_all - bench.homeserver.people_made
    for person in await bench.homeserver.people(max(0, missing)):
        await person.sync()
        person.hangs_up()
    return {"after_mb": bench.meter.memory_mb(), "people": float(bench.homeserver.people_made)}


SCENARIOS: dict[str, Callable[[Bench], Awaitable[Figures]]] = {
    "send": send,
    "hot": hot,
    "pair": pair,
    "fan100": fan100,
    "fan500": fan500,
    "initial": initial,
    "empty": empty,
    "sliding": sliding,
    "to_device": to_device,
    "keys": keys,
    "media": media,
    "memory": memory,
}
