"""One look at a TLS server, as another Matrix server would take it: is it reached, and what is its certificate worth?

For `doctor.py`: it names what is wrong, where an ordinary connection would only fail.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import ipaddress
import ssl
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

CONNECT_SECONDS = 10.0
_UNSYNCHRONISED = 0x40

_SAID = {
    errno.ECONNREFUSED: "nothing listens there, or a firewall turns it away",
    errno.ECONNRESET: "the connection is cut as soon as it is made",
    errno.ENETUNREACH: "no way leads there from this machine",
    errno.EHOSTUNREACH: "no way leads there from this machine",
    errno.EADDRNOTAVAIL: "no way leads there from this machine",
    errno.ETIMEDOUT: "nothing answers",
}
_NO_ROUTE = frozenset({errno.ENETUNREACH, errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT})

Outcome = Literal["good", "unreachable", "no TLS", "bad certificate"]


@dataclass(frozen=True, slots=True)
class Look:
    """`why` is for people. `expires` in seconds since the epoch, None where no certificate was shown."""

    outcome: Outcome
    why: str = ""
    expires: float | None = None
    names: tuple[str, ...] = ()
    self_signed: bool = False
    # This machine has no way to such addresses at all, so it can't tell.
    no_route: bool = False


async def look_at(address: str, port: int, tls_name: str, trusted: ssl.SSLContext) -> Look:
    """Connects to one address. `trusted` holds the authorities that are believed."""
    try:
        certificate = await _handshake(address, port, tls_name, trusted)
    except ssl.SSLCertVerificationError as bad:
        return await _what_is_wrong(address, port, tls_name, bad)
    except ssl.SSLError:
        return Look("no TLS", "what answers there does not speak TLS")
    except TimeoutError:
        return Look("unreachable", "nothing answers within 10 s")
    except OSError as bad:
        return Look("unreachable", _SAID.get(bad.errno or 0, "the connection failed"), no_route=bad.errno in _NO_ROUTE)
    return _read(certificate, "good")


async def _handshake(address: str, port: int, tls_name: str, context: ssl.SSLContext) -> bytes:
    async with asyncio.timeout(CONNECT_SECONDS):
        _, writer = await asyncio.open_connection(address, port, ssl=context, server_hostname=tls_name)
    try:
        shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        return bytes(shown) if shown else b""
    finally:
        writer.close()
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(1.0):
                await writer.wait_closed()


async def _what_is_wrong(address: str, port: int, tls_name: str, bad: ssl.SSLCertVerificationError) -> Look:
    """The same once more without asking whether it is good, to see which certificate it is."""
    blind = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    blind.check_hostname = False
    blind.verify_mode = ssl.CERT_NONE
    try:
        return _read(await _handshake(address, port, tls_name, blind), "bad certificate", bad.verify_message)
    except (OSError, TimeoutError):
        return Look("bad certificate", bad.verify_message)


def _read(certificate: bytes, outcome: Outcome, why: str = "") -> Look:
    # Loaded here: 2 MB of memory that a relay needs only while its operator asks for the doctor.
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    try:
        read = x509.load_der_x509_certificate(certificate)
    except ValueError:
        return Look(outcome, why)
    try:
        alternatives = read.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        names = [
            *alternatives.get_values_for_type(x509.DNSName),
            *map(str, alternatives.get_values_for_type(x509.IPAddress)),
        ]
    except (x509.ExtensionNotFound, ValueError):
        names = [str(name.value) for name in read.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    return Look(outcome, why, read.not_valid_after_utc.timestamp(), tuple(names[:10]), read.issuer == read.subject)


def names_fit(look: Look, tls_name: str) -> bool:
    """Whether the certificate bears the name; `*` stands for one label."""
    wanted = tls_name.lower()
    with suppress(ValueError):
        wanted = str(ipaddress.ip_address(wanted))
    for name in (name.lower() for name in look.names):
        if name == wanted or (name.startswith("*.") and wanted.partition(".")[2] == name[2:]):
            return True
    return False


def clock_is_kept() -> bool | None:
    """Whether the kernel says that something keeps its clock right; None where it does not tell."""

    class Timex(ctypes.Structure):
        # Only `modes`, which asks, and `status` are of interest; the rest is room for what the kernel writes.
        _fields_ = (
            ("modes", ctypes.c_uint), ("offset", ctypes.c_long), ("frequency", ctypes.c_long), ("maximum", ctypes.c_long),
            ("estimated", ctypes.c_long), ("status", ctypes.c_int), ("rest", ctypes.c_byte * 512),
        )  # fmt: skip

    try:
        asked = Timex()
        state = ctypes.CDLL(None).adjtimex(ctypes.byref(asked))
    except (OSError, AttributeError):
        return None
    return None if state < 0 else not asked.status & _UNSYNCHRONISED
