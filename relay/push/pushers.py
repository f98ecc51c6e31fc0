"""Where a person wants to be woken: the push gateways that their devices named, as rows and in memory.

A pusher belongs to the device that made it and goes with it. `gateway` delivers; here is only who has which. Only HTTP
gateways exist: a relay that keeps no e-mail addresses sends no e-mail. Spec: client-server-api/#push-notifications.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import orjson

from relay.accounts.devices import Devices
from relay.clock import SECOND, Clock
from relay.db import Database, Query, Row, Tx
from relay.errors import BadJson, Forbidden, InvalidParam, MissingParam, TooLarge, UnknownToken
from relay.part import Part
from relay.tables import Schema, Table
from relay.web import Answer, Request, Route, get_bool, get_object, get_optional_string, get_string

GATEWAY_PATH = "/_matrix/push/v1/notify"
MAX_PUSHKEY_BYTES = 512
MAX_APP_ID = 64
MAX_TEXT = 255
MAX_DATA_BYTES = 8 * 1024
MAX_PUSHERS_PER_USER = 100
NO_BADGE = ("org.matrix.msc4076.disable_badge_count", "disable_badge_count")

_LIFE = "until its device signs out, the gateway rejects it or it is removed"


@dataclass(slots=True, frozen=True)
class Pusher:
    user_id: str
    app_id: str
    pushkey: str
    device_id: str
    url: str
    set_ts: int
    shown: Mapping[str, Any]

    @property
    def key(self) -> tuple[str, str, str]:
        return self.user_id, self.app_id, self.pushkey

    @property
    def event_id_only(self) -> bool:
        return bool(self.shown["data"].get("format") == "event_id_only")

    @property
    def wants_badge(self) -> bool:
        return not any(self.shown.get(name) is True for name in NO_BADGE)

    def device(self, tweaks: Mapping[str, Any]) -> dict[str, Any]:
        """How a gateway is told about it. Spec: push-gateway-api/#post_matrixpushv1notify"""
        data = {key: value for key, value in self.shown["data"].items() if key != "url"}
        return {
            "app_id": self.app_id,
            "pushkey": self.pushkey,
            "pushkey_ts": self.set_ts // SECOND,
            "data": data,
            **({"tweaks": dict(tweaks)} if tweaks else {}),
        }


class Pushers(Part):
    schema = Schema(
        "pushers",
        tables=(
            Table(
                "pushers",
                "where a person's device wants to be woken, as its app said",
                {
                    "user_id": ("whose device", _LIFE),
                    "app_id": ("which app", _LIFE),
                    "pushkey": ("the app's address at the gateway", _LIFE),
                    "device_id": ("which device made it, so that it goes with it", _LIFE),
                    "url": ("the gateway", _LIFE),
                    "set_ts": ("when it was set, which gateways ask for", _LIFE),
                    "shown": ("names, language and options, for the list of pushers and the gateway", _LIFE),
                },
            ),
        ),
        steps=(
            """
            CREATE TABLE pushers (
                user_id TEXT NOT NULL, app_id TEXT NOT NULL, pushkey TEXT NOT NULL, device_id TEXT NOT NULL,
                url TEXT NOT NULL, set_ts BIGINT NOT NULL, shown BYTES NOT NULL, PRIMARY KEY (user_id, app_id, pushkey));
            CREATE INDEX pushers_by_key ON pushers (app_id, pushkey)
            """,
        ),
    )

    def __init__(self, db: Database, clock: Clock, devices: Devices, *, plain_http: bool) -> None:
        """`plain_http`: gateways may be named without TLS, for those on the operator's own machine."""
        self._db = db
        self._clock = clock
        self._devices = devices
        self._schemes = ("https", "http") if plain_http else ("https",)
        # All of them, by user; taken anew for each user that a write changed. None until the first need.
        self._all: dict[str, tuple[Pusher, ...]] | None = None
        # Called in the write that ends a pusher: (tx, user, app_id, pushkey).
        self.on_gone: list[Callable[[Tx, str, str, str], None]] = []

    def routes(self) -> Iterable[Route]:
        yield Route("GET", "/_matrix/client/v3/pushers", self._list_route)
        yield Route("POST", "/_matrix/client/v3/pushers/set", self._set_route, limit="messages")

    # --- asking

    async def load(self) -> None:
        if self._all is None:
            rows = await self._db.read(lambda query: query.all(f"SELECT {_COLUMNS} FROM pushers ORDER BY set_ts"))
            if self._all is None:
                self._all = {}
                for row in rows:
                    one = _pusher(row)
                    self._all[one.user_id] = (*self._all.get(one.user_id, ()), one)

    def users(self) -> Collection[str]:
        """Who has any; only after `load`."""
        return self._all.keys() if self._all is not None else ()

    def of(self, user_id: str) -> tuple[Pusher, ...]:
        return self._all.get(user_id, ()) if self._all is not None else ()

    # --- changing

    def _remove(self, tx: Tx, user_id: str, app_id: str, pushkey: str) -> None:
        tx.run("DELETE FROM pushers WHERE user_id = $1 AND app_id = $2 AND pushkey = $3", user_id, app_id, pushkey)
        for told in self.on_gone:
            told(tx, user_id, app_id, pushkey)
        tx.after(lambda: self._take(user_id, lambda one: (one.app_id, one.pushkey) != (app_id, pushkey)))

    def _take(self, user_id: str, stays: Callable[[Pusher], bool], *more: Pusher) -> None:
        if self._all is None:
            return
        now = (*(one for one in self._all.get(user_id, ()) if stays(one)), *more)
        if now:
            self._all[user_id] = now
        else:
            self._all.pop(user_id, None)

    async def rejected(self, app_id: str, pushkeys: Collection[str]) -> None:
        """The gateway knows these no longer: they go, whosever they are."""
        await self.load()
        gone = [one for user_id in list(self.users()) for one in self.of(user_id)]
        gone = [one for one in gone if one.app_id == app_id and one.pushkey in pushkeys]
        if gone:
            with self._db.write() as tx:
                for one in gone:
                    self._remove(tx, *one.key)
            await tx

    def device_deleted(self, tx: Tx, user_id: str, device_id: str) -> None:
        """For `Devices.on_device_deleted`."""
        for one in self.of(user_id):
            if one.device_id == device_id:
                self._remove(tx, *one.key)
        # What may not be in memory yet.
        tx.run("DELETE FROM pushers WHERE user_id = $1 AND device_id = $2", user_id, device_id)

    def forget(self, tx: Tx, user_id: str, erase: bool) -> None:
        """For `Account.on_deactivated`."""
        for one in self.of(user_id):
            self._remove(tx, *one.key)
        tx.run("DELETE FROM pushers WHERE user_id = $1", user_id)

    # --- endpoints

    async def _list_route(self, request: Request) -> Answer:
        await self.load()
        return {
            "pushers": [
                {"app_id": one.app_id, "pushkey": one.pushkey, "kind": "http", **one.shown}
                for one in self.of(request.user_id)
            ]
        }

    async def _set_route(self, request: Request) -> Answer:
        body, user_id = request.json(), request.user_id
        app_id, pushkey = get_string(body, "app_id"), get_string(body, "pushkey")
        if not 0 < len(app_id) <= MAX_APP_ID:
            raise InvalidParam(f"An app_id has 1 to {MAX_APP_ID} characters.")
        if not 0 < len(pushkey.encode(errors="surrogatepass")) <= MAX_PUSHKEY_BYTES:
            raise InvalidParam(f"A pushkey has 1 to {MAX_PUSHKEY_BYTES} bytes.")
        if "kind" not in body:
            raise MissingParam("The key kind is missing: http, or null to remove the pusher.")
        await self.load()
        if body["kind"] is None:
            with self._db.write() as tx:
                self._remove(tx, user_id, app_id, pushkey)
            await tx
            return {}
        if body["kind"] != "http":
            raise InvalidParam("The kind of a pusher is http here. This server knows no e-mail addresses.")
        await self._set(
            self._parsed(request.who.device_id, user_id, app_id, pushkey, body), get_bool(body, "append", False)
        )
        return {}

    def _parsed(self, device_id: str, user_id: str, app_id: str, pushkey: str, body: dict[str, Any]) -> Pusher:
        shown: dict[str, Any] = {}
        for name in ("app_display_name", "device_display_name", "lang"):
            shown[name] = get_string(body, name)
        profile_tag = get_optional_string(body, "profile_tag")
        if profile_tag is not None:
            shown["profile_tag"] = profile_tag
        if any(len(text) > MAX_TEXT for text in shown.values()):
            raise InvalidParam(f"The names of a pusher have at most {MAX_TEXT} characters. Take shorter ones.")
        shown["data"] = data = get_object(body, "data")
        for name in NO_BADGE:
            # MSC4076; Element iOS puts it beside `data`.
            if name in body:
                shown[name] = get_bool(body, name, False)
        if len(orjson.dumps(data)) > MAX_DATA_BYTES:
            raise TooLarge(f"The data of a pusher is larger than {MAX_DATA_BYTES} bytes.")
        url = get_string(data, "url")
        self._require_gateway(url)
        return Pusher(user_id, app_id, pushkey, device_id, url, self._clock.now(), shown)

    def _require_gateway(self, url: str) -> None:
        try:
            parts = urlsplit(url)
            good = (
                len(url) <= MAX_DATA_BYTES
                and parts.scheme in self._schemes
                and bool(parts.hostname)
                and parts.username is None
                and (parts.port is None or 0 < parts.port < 65536)
                and not parts.fragment
            )
        except ValueError:
            good = False
        if not good:
            raise InvalidParam(
                f"The url in data is not the address of a push gateway: it begins with {self._schemes[0]}://"
            )
        if parts.path != GATEWAY_PATH:
            raise InvalidParam(f"The url in data does not end in {GATEWAY_PATH}, as that of every push gateway does.")

    async def _set(self, one: Pusher, append: bool) -> None:
        try:
            raw = orjson.dumps(one.shown)
        except TypeError as bad:
            raise BadJson("The pusher has no JSON form.") from bad
        others = [user_id for user_id in self.users() if user_id != one.user_id]
        with self._db.write() as tx:
            if not append:
                for user_id in others:
                    if any((it.app_id, it.pushkey) == (one.app_id, one.pushkey) for it in self.of(user_id)):
                        self._remove(tx, user_id, one.app_id, one.pushkey)

            def put(query: Query) -> None:
                if one.device_id not in self._devices.ids(query, one.user_id):
                    raise UnknownToken("This device has signed out. Sign in again.")
                query.run(
                    "INSERT INTO pushers (user_id, app_id, pushkey, device_id, url, set_ts, shown)"
                    " VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT (user_id, app_id, pushkey) DO UPDATE SET"
                    " device_id = excluded.device_id, url = excluded.url, set_ts = excluded.set_ts, shown = excluded.shown",
                    *one.key,
                    one.device_id,
                    one.url,
                    one.set_ts,
                    raw,
                )
                number = query.value("SELECT count(*) FROM pushers WHERE user_id = $1", one.user_id)
                if number > MAX_PUSHERS_PER_USER:
                    raise Forbidden(f"You have {MAX_PUSHERS_PER_USER} pushers. Remove some of them first.")

            tx.call(put)
            tx.after(lambda: self._take(one.user_id, lambda it: it.key != one.key, one))
        await tx


_COLUMNS = "user_id, app_id, pushkey, device_id, url, set_ts, shown"


def _pusher(row: Row) -> Pusher:
    user_id, app_id, pushkey, device_id, url, set_ts, shown = row
    return Pusher(user_id, app_id, pushkey, device_id, url, set_ts, orjson.loads(shown))
