"""The keys of one device, made and signed as a client does: identity keys, one-time keys, a fallback key, cross-signing."""

from __future__ import annotations

import base64
import itertools
import os
from typing import Any

from relay.protocol.signing import SigningKey, sign_json
from tests.people import Json, Person

_numbers = itertools.count(1)


def _curve() -> str:
    return base64.b64encode(os.urandom(32)).decode().rstrip("=")


class Wallet:
    def __init__(self, person: Person) -> None:
        self.person = person
        self.key = SigningKey.generate(f"ed25519:{person.device.replace('-', '_')}")
        self.device_keys: Json = {}
        self.master: Json = {}
        self.self_signing: Json = {}
        self._ids: set[str] = set()

    def uploaded_ids(self) -> set[str]:
        return self._ids

    def _signed(self, body: Json) -> Json:
        return sign_json(body, self.person.id, self.key)

    def _one_time_key(self, **more: Any) -> Json:
        key_id = f"signed_curve25519:AAAA{next(_numbers)}"
        self._ids.add(key_id)
        return {key_id: self._signed({"key": _curve(), **more})}

    async def uploads_device(self, one_time_keys: int = 0, fallback: bool = False) -> None:
        device = self.person.device
        self.device_keys = self._signed(
            {
                "user_id": self.person.id,
                "device_id": device,
                "algorithms": ["m.olm.v1.curve25519-aes-sha2", "m.megolm.v1.aes-sha2"],
                "keys": {f"curve25519:{device}": _curve(), f"ed25519:{device}": self.key.verify_key_base64},
            }
        )
        body: Json = {"device_keys": self.device_keys, "one_time_keys": {}}
        for _ in range(one_time_keys):
            body["one_time_keys"].update(self._one_time_key())
        if fallback:
            body["fallback_keys"] = self._one_time_key(fallback=True)
        await self.person.calls("POST", "keys/upload", body)

    async def uploads_cross_signing(self) -> None:
        master, own, others = (SigningKey.generate("ed25519:x") for _ in range(3))
        self.master = self._cross_signing_key("master", master)
        # The key that signs is named by its own public part.
        signer = SigningKey.load(f"ed25519 k {master.dump().split()[2]}")
        self.self_signing = self._signed_by(master, signer, self._cross_signing_key("self_signing", own))
        user_signing = self._signed_by(master, signer, self._cross_signing_key("user_signing", others))
        body = {"master_key": self.master, "self_signing_key": self.self_signing, "user_signing_key": user_signing}
        await self.person.calls("POST", "keys/device_signing/upload", body)

    def _cross_signing_key(self, usage: str, key: SigningKey) -> Json:
        public = key.verify_key_base64
        return {"user_id": self.person.id, "usage": [usage], "keys": {f"ed25519:{public}": public}}

    def _signed_by(self, master: SigningKey, signer: SigningKey, key: Json) -> Json:
        signature = sign_json(key, self.person.id, signer)["signatures"][self.person.id][signer.key_id]
        return {**key, "signatures": {self.person.id: {f"ed25519:{master.verify_key_base64}": signature}}}
