"""Figures for a monitoring program (Prometheus)."""

from __future__ import annotations

from relay.config.values import Section

MIN_TOKEN = 16


class Metrics(Section, frozen=True):
    token: str = ""
    """What the monitoring program sends as a bearer token, 16 characters at least. Without one only this machine is answered, and
    no proxy. Figures are served only where a listener serves metrics."""

    def __post_init__(self) -> None:
        if self.token and (len(self.token) < MIN_TOKEN or not self.token.isascii()):
            raise ValueError(f"metrics.token is too short: write at least {MIN_TOKEN} characters that nobody can guess")
