"""What this server says of itself: versions, capabilities, and where it is to be found.

Spec: client-server-api/#get_matrixclientversions, #capabilities-negotiation, #well-known-uris.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from relay.errors import NotFound
from relay.part import Part
from relay.protocol.versions import VERSIONS
from relay.web import Request, Route

SPEC_VERSIONS = [
    "r0.6.1", "v1.1", "v1.2", "v1.3", "v1.4", "v1.5", "v1.6", "v1.7", "v1.8", "v1.9", "v1.10", "v1.11", "v1.12",
    "v1.13", "v1.14", "v1.15", "v1.16", "v1.17", "v1.18", "v1.19",
]  # fmt: skip


class Advertised(Part):
    def __init__(
        self,
        server_name: str,
        public_base_url: str | None,
        default_room_version: str,
        *,
        sealed: bool = True,
        transports: Sequence[Mapping[str, Any]] = (),
        capabilities: Mapping[str, Any] | None = None,
    ) -> None:
        """`sealed`: every new room is encrypted. `transports` are those of MatrixRTC; `capabilities` what other parts can do beside those listed here."""
        self._server_name = server_name
        self._base_url = public_base_url
        self._default_room_version = default_room_version
        # Element then shows its switch for encryption as on, and lets nobody turn it off in vain.
        self._forced = {
            f"io.element.e2ee_forced.{preset}": sealed for preset in ("public", "private", "trusted_private")
        }
        self._transports = list(transports)
        self._more = dict(capabilities or {})

    def routes(self) -> Iterable[Route]:
        return (
            Route("GET", "/_matrix/client/versions", self._versions, auth="none"),
            Route("GET", "/_matrix/client/v3/capabilities", self._capabilities),
            Route("GET", "/.well-known/matrix/client", self._client, auth="none"),
            Route("GET", "/.well-known/matrix/server", self._server, auth="none", serves="both"),
            Route("GET", "/_relay/health", self._health, auth="none", serves="both"),
        )

    async def _versions(self, request: Request) -> dict[str, Any]:
        return {
            "versions": SPEC_VERSIONS,
            "unstable_features": {
                **self._forced,
                "org.matrix.e2e_cross_signing": True,
                "org.matrix.msc3030": True,
                "org.matrix.msc3030.stable": True,
                "org.matrix.msc3814": True,
                "org.matrix.msc3827.stable": True,
                "org.matrix.msc3916.stable": True,
                "org.matrix.msc4140": True,
                "org.matrix.msc4143": True,
                "org.matrix.msc4222": True,
                "org.matrix.msc4380": True,
                "org.matrix.msc4380.stable": True,
                "org.matrix.simplified_msc3575": True,
                "uk.half-shot.msc2666.query_mutual_rooms": True,
                "uk.half-shot.msc2666.query_mutual_rooms.stable": True,
                "uk.tcpip.msc4133.stable": True,
            },
        }

    async def _capabilities(self, request: Request) -> dict[str, Any]:
        # Whoever may not lock and suspend accounts is not told of it.
        rank = {"m.account_moderation": {"lock": True, "suspend": True}} if request.who.admin else {}
        return {
            "capabilities": {
                "m.change_password": {"enabled": True},
                "m.room_versions": {
                    "default": self._default_room_version,
                    "available": dict.fromkeys(VERSIONS, "stable"),
                },
                "m.set_displayname": {"enabled": True},
                "m.set_avatar_url": {"enabled": True},
                "m.profile_fields": {"enabled": True},
                "m.3pid_changes": {"enabled": False},
                "m.get_login_token": {"enabled": False},
                "m.forget_forced_upon_leave": {"enabled": False},
                **self._more,
                **rank,
            }
        }

    async def _client(self, request: Request) -> dict[str, Any]:
        if self._base_url is None:
            raise NotFound("This server's operator has not set public_base_url, so there is no address to tell.")
        return {
            "m.homeserver": {"base_url": self._base_url},
            # Element turns encryption on by itself where it reads this.
            "io.element.e2ee": {"default": True, "secure_backup_required": False},
            **({"org.matrix.msc4143.rtc_foci": self._transports} if self._transports else {}),
        }

    async def _server(self, request: Request) -> dict[str, Any]:
        if self._base_url is None:
            raise NotFound("This server's operator has not set public_base_url, so there is no address to tell.")
        host = self._base_url.split("://", 1)[-1].rstrip("/")
        return {"m.server": host if ":" in host.rpartition("]")[2] else f"{host}:443"}

    async def _health(self, request: Request) -> dict[str, Any]:
        return {"status": "ok"}
