"""Cross-signing: a person's master, self-signing and user-signing keys, and the signatures that she adds to keys.

Every signature is verified before it is stored. New keys over old ones need the password once more. Who sees which
signature: `shapes.packed` (the owner's own, everybody) and `user_signatures` (on others, the signer only).
Spec: client-server-api/#cross-signing, #key-and-signature-security.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import orjson

from relay.accounts.devices import Devices
from relay.accounts.reauth import Reauth
from relay.db import Database, Tx
from relay.errors import ApiError, BadJson, Forbidden, InvalidParam, MissingParam, NotFound
from relay.ids import is_user_id, server_of
from relay.keys import shapes
from relay.keys.device_lists import TOPIC, DeviceLists
from relay.keys.published import KeyList, Published
from relay.keys.remote_lists import RemoteLists
from relay.keys.shapes import Json
from relay.keys.user_signatures import UserSignatures, Vouched
from relay.part import Part
from relay.protocol.canonical import from_base64
from relay.protocol.signing import verify_json
from relay.web import Answer, Request, Route

MAX_SIGNED_KEYS = 1_000
FIELDS = {"master_key": "master", "self_signing_key": "self_signing", "user_signing_key": "user_signing"}


class InvalidSignature(ApiError):
    errcode = "M_INVALID_SIGNATURE"


class CrossSigning(Part):
    def __init__(
        self,
        db: Database,
        published: Published,
        lists: DeviceLists,
        remote_lists: RemoteLists,
        signatures: UserSignatures,
        devices: Devices,
        reauth: Reauth,
        server_name: str,
    ) -> None:
        self._db = db
        self._published = published
        self._lists = lists
        self._remote_lists = remote_lists
        self._signatures = signatures
        self._devices = devices
        self._reauth = reauth
        self._server_name = server_name

    def routes(self) -> Iterable[Route]:
        keys = "/_matrix/client/v3/keys"
        yield Route("POST", f"{keys}/device_signing/upload", self._upload_route, limit="keys")
        yield Route("POST", f"{keys}/signatures/upload", self._signatures_route, limit="keys")
        # The name under which clients knew it before it was stable.
        unstable = "/_matrix/client/unstable/keys"
        yield Route("POST", f"{unstable}/device_signing/upload", self._upload_route, limit="keys")
        yield Route("POST", f"{unstable}/signatures/upload", self._signatures_route, limit="keys")

    async def is_signing_key(self, user_id: str, text: str) -> bool:
        """Whether a device of this name could be taken for one of the user's cross-signing keys."""
        known = await self._published.of(user_id)
        return f"ed25519:{text}" in {_key_id(raw) for raw in known.signing.values()}

    def forget(self, tx: Tx, user_id: str, erase: bool) -> None:
        """For `account.on_deactivated`: nobody owns these keys any more. Devices go by their own way."""
        for usage in shapes.USAGES:
            self._published.remove_signing_key(tx, user_id, usage)
        self._signatures.clear(tx, user_id)

    # --- the three keys

    async def _upload_route(self, request: Request) -> Answer:
        user_id, body, confirmed = request.user_id, request.json(), False
        if set(body) == {"auth"}:
            # Only the proof is repeated; the keys came with the first request.
            body, confirmed = (await self._reauth.require(request)).body, True
        given = {usage: body[name] for name, usage in FIELDS.items() if body.get(name) is not None}
        if not given:
            raise MissingParam("There is no master_key, self_signing_key or user_signing_key to upload.")
        raw = {usage: shapes.signing_key(value, user_id, usage) for usage, value in given.items()}
        audience = await self._lists.audience(user_id)
        async with self._lists.lock(user_id):
            known = await self._published.of(user_id)
            new = {usage: one for usage, one in raw.items() if not _same(known.signing.get(usage), one)}
            if not new and "master" in known.signing:
                return {}
            self._check_signed(user_id, raw, known)
            await self._check_names(user_id, raw)
            if "master" in known.signing and not confirmed:
                await self._reauth.require(request)
            with self._db.write() as tx:
                self._replace(tx, user_id, new, known)
                if new.keys() == {"user_signing"}:
                    # Nobody else ever sees it.
                    self._published.moved(tx, user_id, tx.pos(), known.stream)
                    tx.ring((user_id,), TOPIC)
                else:
                    signing = {**({} if "master" in new else known.signing), **raw}
                    self._lists.announce_signing_keys(
                        tx, audience, user_id, signing.get("master"), signing.get("self_signing"), known.stream
                    )
            await tx
        return {}

    def _replace(self, tx: Tx, user_id: str, new: dict[str, bytes], known: KeyList) -> None:
        if "master" in new:
            for usage in known.signing.keys() - new.keys():
                # The old master key signed it; under the new one it means nothing.
                self._published.remove_signing_key(tx, user_id, usage)
        if "master" in new or "user_signing" in new:
            self._signatures.clear(tx, user_id)
        for usage, one in new.items():
            self._published.put_signing_key(tx, user_id, usage, one)

    def _check_signed(self, user_id: str, raw: dict[str, bytes], known: KeyList) -> None:
        master = raw.get("master") or known.signing.get("master")
        if master is None:
            raise MissingParam("There is no master key yet. Upload a master_key together with the others.")
        key_id, public = shapes.public_part(orjson.loads(master))
        for usage in ("self_signing", "user_signing"):
            if usage in raw and not verify_json(orjson.loads(raw[usage]), user_id, key_id, public):
                raise InvalidSignature(
                    f"The {usage} key has no valid signature of the master key. Sign it and try again."
                )

    async def _check_names(self, user_id: str, raw: dict[str, bytes]) -> None:
        names = set(await self._devices.names(user_id))
        if any(_key_id(one).removeprefix("ed25519:") in names for one in raw.values()):
            raise Forbidden("One of these public keys is the ID of a device of yours. Make other keys.")

    # --- signatures

    async def _signatures_route(self, request: Request) -> Answer:
        body, user_id = request.json(), request.user_id
        failures: dict[str, dict[str, Any]] = {}
        number = 0
        for whose, objects in body.items():
            if not is_user_id(whose) or not isinstance(objects, dict):
                raise BadJson("The body maps user IDs to objects of signed keys.")
            number += len(objects)
        if number > MAX_SIGNED_KEYS:
            raise InvalidParam(f"More than {MAX_SIGNED_KEYS} keys were signed at once. Send them in several requests.")
        others = {whose: objects for whose, objects in body.items() if whose != user_id}
        if user_id in body:
            _put(failures, user_id, await self._sign_own(user_id, body[user_id]))
        if others:
            for whose, failed in (await self._sign_others(user_id, others)).items():
                _put(failures, whose, failed)
        return {"failures": failures}

    async def _sign_own(self, user_id: str, objects: Json) -> Json:
        """Devices by the self-signing key, the master key by devices."""
        failed: Json = {}
        audience = await self._lists.audience(user_id)
        async with self._lists.lock(user_id):
            known = await self._published.of(user_id)
            signed: dict[str, bytes] = {}
            master = None
            for name, value in objects.items():
                try:
                    if name in known.devices:
                        signed[name] = self._signed_device(user_id, known, name, value)
                    else:
                        master = self._signed_master(user_id, known, name, value)
                except ApiError as bad:
                    failed[name] = bad.body()
            signed = {name: raw for name, raw in signed.items() if raw != known.devices[name]}
            if master == known.signing.get("master"):
                master = None
            if not signed and master is None:
                return failed
            with self._db.write() as tx:
                stream = known.stream
                for name, raw in signed.items():
                    self._published.put_device(tx, user_id, name, raw)
                    stream = self._lists.announce_device(tx, audience, user_id, name, raw, stream)
                if master is not None:
                    self._published.put_signing_key(tx, user_id, "master", master)
                    self._lists.announce_signing_keys(
                        tx, audience, user_id, master, known.signing.get("self_signing"), stream
                    )
            await tx
        return failed

    def _signed_device(self, user_id: str, known: KeyList, device_id: str, value: object) -> bytes:
        own = known.signing.get("self_signing")
        if own is None:
            raise NotFound("You have no self-signing key. Upload one first.")
        key_id, public = shapes.public_part(orjson.loads(own))
        return _added(value, known.devices[device_id], user_id, user_id, {key_id: public})

    def _signed_master(self, user_id: str, known: KeyList, name: str, value: object) -> bytes:
        master = known.signing.get("master")
        if master is None or _key_id(master) != f"ed25519:{name}":
            raise NotFound("You have no device and no master key of this name.")
        signers: dict[str, bytes] = {}
        for key_id in shapes.own_signatures(value, user_id) if isinstance(value, dict) else ():
            device = known.devices.get(key_id.removeprefix("ed25519:"))
            if device is not None:
                public = orjson.loads(device)["keys"].get(key_id)
                try:
                    signers[key_id] = from_base64(public)
                except BadJson:
                    continue  # a device without an ed25519 key signs nothing
        return _added(value, master, user_id, user_id, signers)

    async def _sign_others(self, user_id: str, others: dict[str, Json]) -> dict[str, Json]:
        """Other people's master keys, by the user-signing key. Nobody but the signer will see it."""
        here = [whose for whose in others if server_of(whose) == self._server_name]
        elsewhere = [whose for whose in others if server_of(whose) != self._server_name]
        known = await self._published.lists(here)
        if elsewhere:
            known |= (await self._remote_lists.lists(elsewhere))[0]
        failed: dict[str, Json] = {}
        vouched: dict[str, Vouched] = {}
        async with self._lists.lock(user_id):
            own = (await self._published.of(user_id)).signing.get("user_signing")
            for whose, objects in others.items():
                for name, value in objects.items():
                    try:
                        vouched[whose] = _vouched(user_id, own, whose, known.get(whose), name, value)
                    except ApiError as bad:
                        failed.setdefault(whose, {})[name] = bad.body()
            if vouched:
                with self._db.write() as tx:
                    pos = tx.pos()
                    for whose, one in vouched.items():
                        self._signatures.put(tx, user_id, whose, one, pos)
                    tx.ring((user_id,), TOPIC)
                await tx
        return failed


def _vouched(signer: str, own: bytes | None, whose: str, known: KeyList | None, name: str, value: object) -> Vouched:
    if own is None:
        raise NotFound("You have no user-signing key. Upload one first.")
    master = known.signing.get("master") if known is not None else None
    if master is None or _key_id(master) != f"ed25519:{name}":
        raise NotFound("This person has no master key of this name. Only master keys of others can be signed.")
    key_id, public = shapes.public_part(orjson.loads(own))
    signed = orjson.loads(_added(value, master, whose, signer, {key_id: public}))
    return Vouched(_key_id(master), key_id, shapes.own_signatures(signed, signer)[key_id])


def _added(value: object, stored: bytes, owner: str, signer: str, signers: dict[str, bytes]) -> bytes:
    """The stored key with the new signatures of `signers` that are valid. Raises BadJson, InvalidParam, InvalidSignature."""
    if not isinstance(value, dict):
        raise BadJson("A signed key is an object.")
    old = orjson.loads(stored)
    if shapes.unsigned_form(value) != shapes.unsigned_form(old):
        raise InvalidParam(
            "This is not the key that the server knows. Ask for it again with /keys/query, then sign that."
        )
    given = shapes.own_signatures(value, signer)
    before = shapes.own_signatures(old, signer)
    new = {key_id: signature for key_id, signature in given.items() if before.get(key_id) != signature}
    valid = {
        key_id: s
        for key_id, s in new.items()
        if key_id in signers and verify_json(value, signer, key_id, signers[key_id])
    }
    if len(valid) < len(new) or not given:
        raise InvalidSignature("A signature is not valid, or not of a key that may sign this one.")
    signed = shapes.with_signatures(old, signer, valid)
    return shapes.packed(signed, owner) if signer == owner else orjson.dumps(signed)


def _same(old: bytes | None, new: bytes) -> bool:
    return old is not None and shapes.unsigned_form(orjson.loads(old)) == shapes.unsigned_form(orjson.loads(new))


def _key_id(raw: bytes) -> str:
    return shapes.public_part(orjson.loads(raw))[0]


def _put(failures: dict[str, dict[str, Any]], user_id: str, failed: Json) -> None:
    if failed:
        failures[user_id] = failed
