"""The sockets on which the relay answers: addresses, ports, TLS, and certificates that are renewed while it runs."""

from __future__ import annotations

import ssl
from collections.abc import Iterable
from pathlib import Path

import structlog
from aiohttp import web

from relay.clock import Clock
from relay.config import Listener
from relay.web import Web

log = structlog.get_logger("server")

CERTIFICATE_LOOK_SECONDS = 60.0
STOP_SECONDS = 5.0

# A certificate chain and its private key, PEM.
_Pair = tuple[Path, Path]


class Listeners:
    def __init__(self, answers: Web, data_dir: Path, clock: Clock) -> None:
        self._answers = answers
        self._data_dir = data_dir
        self._clock = clock
        self._runners: list[web.ServerRunner] = []
        self._certified: list[tuple[ssl.SSLContext, _Pair]] = []

    async def open(self, listeners: Iterable[Listener]) -> None:
        """Raises OSError where a port is not to be had."""
        for listener in listeners:
            await self._open(listener)

    async def close(self) -> None:
        for runner in self._runners:
            await runner.cleanup()

    async def _open(self, listener: Listener) -> None:
        server = self._answers.listener(frozenset(listener.serves), listener.trusted_proxies)
        runner = web.ServerRunner(server, shutdown_timeout=STOP_SECONDS)
        await runner.setup()
        self._runners.append(runner)
        context = None
        if listener.tls_certificate is not None and listener.tls_key is not None:
            pair = (self._data_dir / listener.tls_certificate, self._data_dir / listener.tls_key)
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(*pair)
            self._certified.append((context, pair))
        await web.TCPSite(runner, listener.address, listener.port, ssl_context=context, backlog=1024).start()

    async def renew_certificates(self) -> None:
        """A loop. New handshakes get the new certificate; a pair that does not fit leaves the old one in place."""
        seen = [_times(pair) for _, pair in self._certified]
        while self._certified:
            await self._clock.sleep(CERTIFICATE_LOOK_SECONDS)
            for place, (context, pair) in enumerate(self._certified):
                now = _times(pair)
                if now == seen[place]:
                    continue
                try:
                    context.load_cert_chain(*pair)
                    seen[place] = now
                    log.info("took up the renewed certificate", file=pair[0].name)
                except (OSError, ssl.SSLError):
                    log.warning("the renewed certificate can't be used, so the old one stays", file=pair[0].name)


def _times(pair: _Pair) -> list[int]:
    return [path.stat().st_mtime_ns if path.exists() else 0 for path in pair]
