"""`relay doctor`: why other servers can't reach this relay, or it can't reach them; each finding with its cure.

It goes the way that another server goes, from the name to the key: DNS, well-known, SRV, port, certificate, the relay's own
answers. From inside it can't see everything: another server, named by the operator, is asked to look from where it is.
Spec: server-server-api/#resolving-server-names, #publishing-keys.
"""

from __future__ import annotations

import email.utils
import ssl
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import aiohttp
import orjson
from yarl import URL

from federation.addresses import AddressRule, LookupFailed, Lookups, in_order, is_literal
from federation.backoff import Backoff
from federation.connections import KEYS_PATH, Connections
from federation.discovery import SERVICES, WELL_KNOWN_PATH, Discovery, Route
from federation.outward import AnswerTooLarge, Outward, read_at_most
from federation.probing import Look, clock_is_kept, look_at, names_fit
from federation.server_keys import OWN_VALIDITY, BadKeys, read
from relay.clock import HOUR, SECOND, Clock
from relay.config import Settings
from relay.errors import ApiError, InvalidParam, RemoteError
from relay.ids import is_loopback_name, is_server_name, split_server_name
from relay.protocol.signing import SigningKey

MAX_ANSWER = 256 * 1024
ANSWER_SECONDS = 10.0
CLOCK_WARNING_S = 5
CLOCK_ERROR_S = 60
EXPIRES_SOON_DAYS = 14
DAY_S = 86_400
# A path that only comes through whole where the proxy leaves %2F as it is: what answers then is the relay itself.
_UNDECODED = "/_matrix/key/v2/query/a%2Fb"

Subject = Literal["federation", "dns", "well-known", "srv", "port", "certificate", "answers", "key", "clock", "others"]
Severity = Literal["ok", "warning", "error"]


@dataclass(frozen=True, slots=True)
class Finding:
    subject: Subject
    severity: Severity
    what: str
    todo: str = ""


class Doctor:
    def __init__(
        self,
        settings: Settings,
        key: SigningKey,
        clock: Clock,
        lookups: Lookups,
        trusted: ssl.SSLContext,
        connections: Connections,
        backoff: Backoff,
        *,
        well_known_port: int = 443,
    ) -> None:
        self._settings = settings
        self._name = settings.server_name
        self._key = key
        self._clock = clock
        self._lookups = lookups
        self._trusted = trusted
        self._connections = connections
        self._backoff = backoff
        self._well_known_port = well_known_port

    def commands(self) -> dict[str, Callable[..., Awaitable[Any]]]:
        return {"doctor": self.examine}

    async def examine(self, ask: str | None = None) -> list[dict[str, str]]:
        """`ask` is a server that is asked to look at this one from outside."""
        if ask is not None and (not is_server_name(ask) or ask == self._name):
            raise InvalidParam("Name another Matrix server that may be asked to look at this one, such as matrix.org.")
        federation = self._settings.federation
        if not federation.enabled:
            cure = "To let others reach you set federation.enabled to true."
            return [asdict(Finding("federation", "warning", "Federation is switched off in the config.", cure))]
        found: list[Finding] = []
        if federation.allow:
            what = f"Only servers on a list of {len(federation.allow)} entries are dealt with (federation.allow)."
            found.append(Finding("federation", "ok", what))
        # Connections of its own, that may lead to this machine: nobody but the operator names where to.
        outward = Outward(self._lookups, AddressRule(private=True), self._trusted)
        try:
            found += await self._name_and_route(outward)
        finally:
            await outward.close()
        found += self._clock_kept()
        if ask is not None:
            found += await self._from_outside(ask)
        found.append(self._others())
        return [asdict(one) for one in dict.fromkeys(found)]

    # --- from the name to the place

    async def _name_and_route(self, outward: Outward) -> list[Finding]:
        host, port = split_server_name(self._name)
        found: list[Finding] = []
        if is_loopback_name(host):
            what = f"The name {self._name} means this machine only: no other machine can reach it."
            found.append(Finding("dns", "warning", what, "For real use make a relay with a name of your own."))
        elif not is_literal(host):
            found += await self._addresses(host, "dns")
        if port is None and not is_literal(host):
            found += await self._well_known(outward, host)
            found += await self._srv(host)
        discovery = Discovery(self._lookups, outward, self._clock, well_known_port=self._well_known_port)
        route = await discovery.route(self._name)
        places = ", ".join(f"{host}:{port}" for host, port in route.targets)
        what = f"Other servers look for this relay at {places}, with a certificate for {route.tls_name} (step {route.step} of the standard)."
        found.append(Finding("dns", "ok", what))
        for target in route.targets:
            found += await self._place(outward, route, *target)
        return found

    async def _addresses(self, host: str, subject: Subject) -> list[Finding]:
        try:
            addresses = await self._lookups.addresses(host)
        except OSError:
            cure = f"Add an A record (and AAAA, if you have IPv6) for {host} where your domain is managed; it can take an hour to be known."
            return [Finding(subject, "error", f"The name {host} has no address.", cure)]
        private = [address for address in addresses if not AddressRule().allows(address)]
        if private:
            cure = "Point the name to the public address. On this machine: look at /etc/hosts."
            return [
                Finding(
                    subject,
                    "warning",
                    f"The name {host} has an address that nobody outside can use, as seen from here.",
                    cure,
                )
            ]
        return [Finding(subject, "ok", f"The name {host} has {len(addresses)} public address(es).")]

    async def _well_known(self, outward: Outward, host: str) -> list[Finding]:
        url = URL.build(scheme="https", host=host, port=self._well_known_port, path=WELL_KNOWN_PATH)
        place = f"https://{host}{WELL_KNOWN_PATH}"
        cure = f'Let it answer {{"m.server": "matrix.{host}:443"}} with the place of your relay; without it others try {host}:8448.'
        try:
            answer = await outward.request("GET", url, timeout=ANSWER_SECONDS)
            try:
                body = await read_at_most(answer, MAX_ANSWER)
                date = answer.headers.get("Date", "")
            finally:
                answer.release()
        except (aiohttp.ClientError, OSError, TimeoutError, AnswerTooLarge, ValueError):
            return [
                Finding("well-known", "warning", f"{place} can't be fetched: no answer, or a bad certificate.", cure)
            ]
        found = self._clock_beside(host, date)
        if 300 <= answer.status < 400:
            return [*found, Finding("well-known", "ok", f"{place} leads to another address, which others follow.")]
        if answer.status != 200:
            return [*found, Finding("well-known", "warning", f"{place} answers with the status {answer.status}.", cure)]
        try:
            value = orjson.loads(body)
            delegated = value.get("m.server") if isinstance(value, dict) else None
        except orjson.JSONDecodeError:
            delegated = None
        if not is_server_name(delegated):
            return [
                *found,
                Finding("well-known", "error", f"{place} answers with something that names no server.", cure),
            ]
        return [*found, Finding("well-known", "ok", f"{place} says {delegated}.")]

    async def _srv(self, host: str) -> list[Finding]:
        found = []
        for service in SERVICES:
            try:
                records = in_order(await self._lookups.srv(f"{service}.{host}"))
            except LookupFailed:
                cure = "Look at /etc/resolv.conf: other servers may get an answer where this machine gets none."
                found.append(Finding("srv", "warning", f"The name servers do not answer about {service}.{host}.", cure))
                continue
            if records and service == SERVICES[1]:
                cure = f"Call the record {SERVICES[0]}.{host}, or use the well-known file instead."
                found.append(
                    Finding(
                        "srv", "warning", f"The SRV record {service}.{host} has a name that is going out of use.", cure
                    )
                )
        return found

    # --- at the place

    async def _place(self, outward: Outward, route: Route, host: str, port: int) -> list[Finding]:
        if is_literal(host):
            addresses = [host]
        else:
            try:
                addresses = list(await self._lookups.addresses(host))
            except OSError:
                return await self._addresses(host, "dns")
        found = []
        good = False
        for address in addresses:
            look = await look_at(address, port, route.tls_name, self._trusted)
            good = good or look.outcome == "good"
            found.append(_of_look(look, host, port, route.tls_name, "IPv6" if ":" in address else "IPv4"))
        if good:
            found += await self._answers(outward, route, host, port)
        return found

    async def _answers(self, outward: Outward, route: Route, host: str, port: int) -> list[Finding]:
        where = f"{host}:{port}"
        proxy = f"Let the proxy at {where} pass /_matrix on to the relay (docs/operating.md has examples)."
        status, body = await self._get(outward, route, host, port, KEYS_PATH)
        if status != 200:
            what = f"{where} does not answer for this relay's federation: {'no answer' if status is None else f'status {status}'}."
            return [Finding("answers", "error", what, proxy)]
        try:
            keys = read(self._name, orjson.loads(body), self._clock.now())
        except (BadKeys, orjson.JSONDecodeError, AttributeError):
            what = f"{where} answers, but with the keys of another server, or with none."
            return [Finding("key", "error", what, f"The place that {self._name} leads to must be this relay. {proxy}")]
        mine = keys.get(self._key.key_id)
        if mine is None or mine.raw != self._key.verify_key:
            what = f"{where} answers in this relay's name, but with another signing key than {self._key.key_id}."
            cure = "Another relay runs under the same name, or a cache before it keeps an old answer: stop it, or empty that."
            return [Finding("key", "error", what, cure)]
        found = [Finding("key", "ok", f"{where} publishes this relay's signing key, {self._key.key_id}.")]
        status, body = await self._get(outward, route, host, port, _UNDECODED)
        if status != 400 or b"M_INVALID_PARAM" not in body:
            cure = "In nginx write proxy_pass without a path or slash behind the port; in Apache use AllowEncodedSlashes NoDecode and nocanon."
            found.append(
                Finding("answers", "error", f"The proxy at {where} changes what stands in addresses (%2F).", cure)
            )
        else:
            found.append(Finding("answers", "ok", f"{where} passes requests on as they are."))
        return found

    async def _get(self, outward: Outward, route: Route, host: str, port: int, path: str) -> tuple[int | None, bytes]:
        url = URL(f"https://{f'[{host}]' if ':' in host else host}:{port}{path}", encoded=True)
        headers = {"Host": route.host_header}
        try:
            answer = await outward.request("GET", url, headers=headers, tls_name=route.tls_name, timeout=ANSWER_SECONDS)
            try:
                return answer.status, await read_at_most(answer, MAX_ANSWER)
            finally:
                answer.release()
        except (aiohttp.ClientError, OSError, TimeoutError, AnswerTooLarge, ValueError):
            return None, b""

    # --- the clock, and the others

    def _clock_kept(self) -> list[Finding]:
        kept = clock_is_kept()
        if kept is None:
            return []
        if kept:
            return [Finding("clock", "ok", "Something keeps this machine's clock right.")]
        cure = "Switch time synchronisation on, for example: timedatectl set-ntp true (or install chrony)."
        return [
            Finding("clock", "warning", "Nothing keeps this machine's clock right, as far as its kernel knows.", cure)
        ]

    def _clock_beside(self, server: str, date: str) -> list[Finding]:
        try:
            theirs = email.utils.parsedate_to_datetime(date).timestamp()
        except (ValueError, TypeError):
            return []
        apart = int(abs(self._clock.now() / SECOND - theirs))
        if apart < CLOCK_WARNING_S:
            return [Finding("clock", "ok", f"The clocks of this machine and of {server} agree.")]
        severity: Severity = "error" if apart > CLOCK_ERROR_S else "warning"
        cure = (
            "Find out which is right, and let time synchronisation set it: keys and events of a wrong time are refused."
        )
        return [Finding("clock", severity, f"The clocks of this machine and of {server} are {apart} s apart.", cure)]

    async def _from_outside(self, server: str) -> list[Finding]:
        """A notary fetches our keys itself, if it is asked for fresher ones than it can have."""
        fresh = self._clock.now() + OWN_VALIDITY - HOUR
        wanted = {"server_keys": {self._name: {self._key.key_id: {"minimum_valid_until_ts": fresh}}}}
        try:
            answer = await self._connections.send(server, "POST", "/_matrix/key/v2/query", wanted, forced=True)
        except (RemoteError, ApiError) as error:
            why = error.text
            cure = "If that server works for others: let this machine connect to the internet on ports 443 and 8448."
            return [Finding("others", "error", f"{server} can't be asked: {why}.", cure)]
        found = [Finding("others", "ok", f"This relay reaches {server}.")]
        given = answer.get("server_keys")
        for keys in given if isinstance(given, list) else ():
            until = keys.get("valid_until_ts") if isinstance(keys, dict) else None
            if keys.get("server_name") == self._name and isinstance(until, int) and until >= fresh:
                return [*found, Finding("others", "ok", f"{server} reaches this relay, from outside.")]
        cure = "What is wrong stands above; if nothing is: a firewall, or a router that forwards no port, lets nobody in from outside."
        return [
            *found,
            Finding("others", "error", f"{server} does not reach this relay, or has not asked it lately.", cure),
        ]

    def _others(self) -> Finding:
        failing = self._backoff.failing()
        if not failing:
            return Finding("others", "ok", "No server is known to be out of reach.")
        shown = ", ".join(failing[:5])
        more = f" and {len(failing) - 5} more" if len(failing) > 5 else ""
        cure = "Some are always away. If all are: this machine may not be allowed to connect to the internet."
        return Finding("others", "ok", f"{len(failing)} server(s) could not be reached lately: {shown}{more}.", cure)


def _of_look(look: Look, host: str, port: int, tls_name: str, family: str) -> Finding:
    where = f"{host}:{port} ({family})"
    if look.no_route and family == "IPv6":
        cure = "If it is right, ask from outside: --ask SERVER. If you have no IPv6 at all, remove the AAAA record: others try it first."
        what = f"{host}:{port} has an IPv6 address, and this machine has no IPv6, so whether others get there can't be seen from here."
        return Finding("port", "warning", what, cure)
    if look.outcome == "unreachable":
        cure = (
            f"Open port {port} in the firewall, forward it in the router, and let the proxy or the relay listen there. Some routers do not let "
            "a network reach itself from inside: then ask from outside with --ask SERVER."
        )
        return Finding("port", "error", f"{where} can't be reached: {look.why}.", cure)
    if look.outcome == "no TLS":
        cure = "Give the listener tls_certificate and tls_key, or put a proxy with TLS before it."
        return Finding("certificate", "error", f"{where}: {look.why}.", cure)
    days = None if look.expires is None else int((look.expires - time.time()) / DAY_S)
    if look.outcome == "bad certificate":
        if look.expires is not None and days is not None and look.expires < time.time():
            cure = "Renew it, and look why that did not happen by itself."
            return Finding("certificate", "error", f"{where}: the certificate expired {-days} day(s) ago.", cure)
        if look.names and not names_fit(look, tls_name):
            names = ", ".join(look.names)
            cure = f"Get a certificate that bears {tls_name}, the name that others ask for; or let well-known name the other one."
            return Finding(
                "certificate", "error", f"{where}: the certificate is for {names}, not for {tls_name}.", cure
            )
        cure = "Use one that everybody trusts, such as Let's Encrypt gives, with its intermediate certificates (fullchain.pem)."
        made = (
            "made by itself"
            if look.self_signed
            else "not made by an authority that is trusted, or its chain is not whole"
        )
        return Finding("certificate", "error", f"{where}: the certificate is {made} ({look.why}).", cure)
    if days is not None and days < EXPIRES_SOON_DAYS:
        cure = "Renew it. What renews it by itself may be broken."
        return Finding("certificate", "warning", f"{where}: the certificate expires in {days} day(s).", cure)
    left = "" if days is None else f" for {days} more days"
    return Finding("certificate", "ok", f"{where} is reached, and its certificate for {tls_name} is good{left}.")
