"""The scripts and locks that everything starts with: they parse, are described, and agree with pyproject.toml."""

from __future__ import annotations

import os
import re
import ssl
import subprocess
import tomllib
from pathlib import Path

from scripts import certificates

ROOT = Path(__file__).parent.parent
SCRIPTS = ("run", "test", "check", "format", "dev", "bench")
_PINNED = re.compile(r"^([A-Za-z0-9._-]+)==(\S+)(.*)$", re.MULTILINE)


def _locked(name: str) -> dict[str, str]:
    text = (ROOT / "requirements" / f"{name}.lock").read_text()
    return {found[1].lower(): found[2] for found in _PINNED.finditer(text)}


def test_every_script_parses_and_has_its_line_in_the_readme() -> None:
    readme = (ROOT / "scripts" / "README.md").read_text()
    for path in (*(ROOT / "scripts" / name for name in SCRIPTS), ROOT / ".ci" / "run"):
        assert os.access(path, os.X_OK), f"{path.name} can be called"
        assert subprocess.run(["sh", "-n", path], check=False).returncode == 0, f"{path.name} is good shell"
    for name in SCRIPTS:
        assert f"| `{name}` |" in readme, f"scripts/README.md has a line for {name}"


def test_the_locks_hold_what_pyproject_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    run, test = _locked("run"), _locked("test")
    for asked, locked in ((project["dependencies"], run), (project["optional-dependencies"]["test"], test)):
        for line in asked:
            name = re.split(r"[\[>=<~! ]", line, maxsplit=1)[0].lower()
            assert name in locked, f"{name} is locked; requirements/README.md says how to make the locks anew"
    for name, version in run.items():
        assert test.get(name) == version, f"the tests run with the {name} that the relay runs with"


def test_every_locked_package_has_its_hash_and_no_index() -> None:
    for name in ("run", "test"):
        text = (ROOT / "requirements" / f"{name}.lock").read_text()
        for entry in re.split(r"\n(?=[A-Za-z])", text.split("\n", 1)[1]):
            assert "--hash=sha256:" in entry, f"{entry.splitlines()[0]} has a hash"
        assert "://" not in text, "no address of an index: whoever installs has their own"


def test_the_throw_away_authority_certifies(tmp_path: Path) -> None:
    authority = certificates.authority(tmp_path)
    certificate, key = certificates.authority(tmp_path).certify(tmp_path, "localhost", "127.0.0.1")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate, key)
    client = ssl.create_default_context(cafile=str(authority.certificate_file))
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    here = client.wrap_bio(to_client, to_server, server_hostname="localhost")
    there = server.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(4):
        for side in (here, there):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    assert here.version() == "TLSv1.3", "a client that trusts the authority is content"
    assert (tmp_path / "ca.key").stat().st_mode & 0o077 == 0, "its key is nobody else's"
