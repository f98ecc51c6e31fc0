"""`relay check`: looks at what the operator is responsible for, and says of everything amiss what to do about it.

Config, folder, signing key, ports, certificates, disk and clock are looked at here, from outside; the database is asked by
the relay itself (the command `check`), running or not. Nothing is changed.
"""

from __future__ import annotations

import ipaddress
import os
import shutil
import socket
import ssl
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from yarl import URL

from relay import folder
from relay.appservices.registration import load_all
from relay.config import CONFIG_NAME, ConfigError, Listener, Settings
from relay.proof_line import proof_page_hash

DISK_ERROR_BYTES = 100 * 1024**2
DISK_WARNING_BYTES = 1024**3
CLOCK_TOLERANCE_S = 60
# No honest clock shows an earlier time than the one at which this was written.
EARLIEST_S = 1_767_225_600

Severity = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    severity: Severity
    what: str
    todo: str = ""


def look(data_dir: Path, *, running: bool) -> tuple[list[Finding], Settings | None]:
    """Everything that can be seen from outside the database; the settings, where they are good."""
    if not data_dir.is_dir():
        missing = Finding(
            "error", f"There is no data folder {data_dir}.", "Make one: relay init --server-name NAME --data DIR"
        )
        return [missing], None
    found = list(_permissions(data_dir))
    try:
        settings = folder.load_settings(data_dir)
    except ConfigError as bad:
        return [*found, Finding("error", str(bad), "Change the config and run relay check again.")], None
    found.append(Finding("ok", f"The config is good; the server name is {settings.server_name}."))
    found += _name(settings)
    found += _key(data_dir, settings)
    found += _openness(settings)
    found += _services(data_dir, settings)
    for listener in settings.listeners:
        found += _certificate(data_dir, listener)
        found += _port(listener, running=running)
    found += _disk(data_dir)
    found += _clock(data_dir, settings)
    found.append(Finding("ok", f"The offline proof tool (proof.html) has the SHA-256 {proof_page_hash()}."))
    return found, settings


def _permissions(data_dir: Path) -> Iterator[Finding]:
    if not os.access(data_dir, os.R_OK | os.W_OK | os.X_OK):
        yield Finding(
            "error", f"The data folder {data_dir} can't be written.", "Run this as the user that runs the relay."
        )
    open_to = stat.S_IMODE(data_dir.stat().st_mode) & 0o077
    if open_to:
        yield Finding(
            "warning", f"Other users of this machine can look into {data_dir}.", f"Close it: chmod 700 {data_dir}"
        )
    else:
        yield Finding("ok", f"Only its owner can look into {data_dir}.")


def _name(settings: Settings) -> Iterator[Finding]:
    if settings.on_loopback:
        yield Finding(
            "warning",
            f"The server name {settings.server_name} is for trying out: it does not federate outside loopback.",
            "For real use make a new relay with a name of your own; a name can't be changed later.",
        )
    elif settings.public_base_url is None:
        yield Finding(
            "warning",
            "public_base_url is not set, so apps have to be told the relay's address by hand.",
            f"Set it in {CONFIG_NAME}, for example: public_base_url: https://{settings.server_name}",
        )
    if settings.federation.enabled and not any("federation" in listener.serves for listener in settings.listeners):
        yield Finding(
            "warning",
            "Federation is enabled, but no listener serves it, so other servers can't reach this one.",
            "Add federation to the serves of a listener, or set federation.enabled to false.",
        )


def _key(data_dir: Path, settings: Settings) -> Iterator[Finding]:
    path = data_dir / settings.federation.key_file
    try:
        key = folder.load_key(data_dir, settings)
    except folder.FolderError as bad:
        yield Finding("error", str(bad), "A relay that never ran makes its key with: relay init")
        return
    yield Finding("ok", f"The signing key is good ({key.key_id}).")
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        yield Finding("error", f"Others can read the signing key {path}.", f"Close it: chmod 600 {path}")


def _openness(settings: Settings) -> Iterator[Finding]:
    reachable = any(not ipaddress.ip_address(listener.address).is_loopback for listener in settings.listeners)
    if settings.registration.mode == "open_to_everyone" and not settings.on_loopback:
        yield Finding(
            "warning",
            "Anybody can make an account here, robots included.",
            "If that is not wanted, set registration.mode to token or closed.",
        )
    if not settings.limits.enabled and (reachable or not settings.on_loopback):
        yield Finding(
            "warning",
            "Rate limits are off, so passwords can be guessed at full speed.",
            "Set limits.enabled to true, or leave it out.",
        )
    for listener in settings.listeners:
        if "metrics" in listener.serves:
            yield from _figures(listener, with_token=bool(settings.metrics.token))
    if settings.privacy.seal == "open":
        yield Finding(
            "warning",
            "The seal is open: messages without encryption are stored readable.",
            "For a sealed relay set privacy.seal to standard, or leave it out.",
        )


def _figures(listener: Listener, *, with_token: bool) -> Iterator[Finding]:
    place = f"port {listener.port} on {listener.address}"
    if not ipaddress.ip_address(listener.address).is_loopback:
        others = (
            "to whoever has the token" if with_token else "to nobody but this machine, since metrics.token is not set"
        )
        yield Finding(
            "warning",
            f"Figures are served on {place}, which can be reached from elsewhere ({others}).",
            "They tell how busy this relay is and how many reports wait. Listen on 127.0.0.1, or let only your monitoring in.",
        )
    elif len(listener.serves) > 1:
        yield Finding(
            "warning",
            f"Figures are served on {place} beside what a proxy hands on to others.",
            "Give metrics a listener of its own, on a port that no proxy knows.",
        )
    else:
        yield Finding("ok", f"Figures are served on {place}, to this machine.")


def _services(data_dir: Path, settings: Settings) -> Iterator[Finding]:
    files = settings.appservices.registration_files
    try:
        registrations = load_all(data_dir, files)
    except ConfigError as bad:
        yield Finding("error", str(bad), "The relay does not start with it. Mend it and run relay check again.")
        return
    for one in registrations:
        yield Finding("ok", f"The registration of the application service {one.id} is good.")
        if stat.S_IMODE(Path(one.file).stat().st_mode) & 0o077:
            yield Finding(
                "warning",
                f"Other users of this machine can read the tokens in {one.file}.",
                f"Close it: chmod 600 {one.file}, owned by the relay's user.",
            )
        if one.url is None:
            yield Finding(
                "warning",
                f"The application service {one.id} has no url, so it is told of nothing.",
                "If that is not wanted, have its program write the registration anew with its address.",
            )
        elif not _answers(one.url):
            yield Finding(
                "warning",
                f"The application service {one.id} does not answer at {one.url}.",
                "Start it, or correct the url in its registration. What happens meanwhile waits for it.",
            )
    if registrations and settings.privacy.seal != "open":
        yield Finding(
            "ok",
            f"The seal is {settings.privacy.seal}: bridges and bots have to encrypt what they send; what they send readable is refused.",
        )


def _answers(url: str) -> bool:
    target = URL(url)
    try:
        with socket.create_connection((target.host or "", target.port or 0), timeout=3):
            return True
    except OSError:
        return False


def _certificate(data_dir: Path, listener: Listener) -> Iterator[Finding]:
    if listener.tls_certificate is None:
        if listener.address not in ("127.0.0.1", "::1"):
            yield Finding(
                "warning",
                f"Port {listener.port} on {listener.address} has no TLS.",
                "Let only a reverse proxy with TLS reach it, or set tls_certificate and tls_key.",
            )
        return
    certificate, key = data_dir / listener.tls_certificate, data_dir / (listener.tls_key or "")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=lambda: "")
    except OSError as bad:
        reason = "they do not belong together, or are not PEM" if isinstance(bad, ssl.SSLError) else bad.strerror
        yield Finding(
            "error",
            f"The certificate {certificate} with the key {key} can't be used: {reason}.",
            "Check both files, and that the relay's user may read them.",
        )
    else:
        yield Finding("ok", f"The certificate {certificate} and its key are good.")


def _port(listener: Listener, *, running: bool) -> Iterator[Finding]:
    place = f"port {listener.port} on {listener.address}"
    if running:
        family = socket.AF_INET6 if ":" in listener.address else socket.AF_INET
        target = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(listener.address, listener.address)
        with socket.socket(family) as probe:
            probe.settimeout(3)
            if probe.connect_ex((target, listener.port)) == 0:
                yield Finding("ok", f"The relay listens on {place}.")
            else:
                yield Finding(
                    "error",
                    f"The relay runs, but nothing answers on {place}.",
                    "Restart it: listeners are read at the start.",
                )
        return
    try:
        with socket.create_server(
            (listener.address, listener.port),
            family=socket.AF_INET6 if ":" in listener.address else socket.AF_INET,
        ):
            yield Finding("ok", f"The {place} is free.")
    except PermissionError:
        yield Finding(
            "error",
            f"The {place} may not be opened by this user.",
            "Take a port above 1023 and put a reverse proxy before it.",
        )
    except OSError as bad:
        yield Finding(
            "error",
            f"The {place} can't be opened: {bad.strerror}.",
            f"Stop what uses it, or set another address or port in {CONFIG_NAME}.",
        )


def _disk(data_dir: Path) -> Iterator[Finding]:
    free = shutil.disk_usage(data_dir).free
    text = f"{free // 1024**2} MiB are free on the disk of {data_dir}."
    if free < DISK_ERROR_BYTES:
        yield Finding("error", text, "Make room now: with a full disk nobody can send.")
    elif free < DISK_WARNING_BYTES:
        yield Finding("warning", text, "Make room soon.")
    else:
        yield Finding("ok", text)


def _clock(data_dir: Path, settings: Settings) -> Iterator[Finding]:
    now = time.time()
    written = [path.stat().st_mtime for path in data_dir.glob(settings.database.path + "*")]
    ahead = max(written, default=0.0) - now
    if now < EARLIEST_S or ahead > CLOCK_TOLERANCE_S:
        seen = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
        reason = f", {int(ahead)} s before the database was last written" if ahead > CLOCK_TOLERANCE_S else ""
        yield Finding(
            "error",
            f"The clock shows {seen}{reason}.",
            "Set it, and let the machine keep it right (NTP): other servers refuse keys and events of a wrong time.",
        )
    else:
        yield Finding("ok", "The clock is plausible.")
