"""The house rules of docs/architecture.md, enforced: who may import whom, no file above 500 lines, a docstring first,
a pure protocol/, one owner for each table, engine names in one file, and only known fields in the log.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from relay.log import FIELDS

ROOT = Path(__file__).parent.parent
MAX_LINES = 500
MAX_DOCSTRING_LINES = 12

# Read from top to bottom: a module imports only from its own line and the lines above.
ORDER = (
    ("relay.ids", "relay.errors", "relay.clock"),
    ("relay.protocol",),
    ("relay.config", "relay.config_example", "relay.db", "relay.bell", "relay.web", "relay.callers", "relay.wire", "relay.limits", "relay.log",
     "relay.remote", "relay.doors", "relay.server_controls", "relay.part", "relay.departures", "relay.tables", "relay.upgrade", "relay.advertised", "relay.absent", "relay.listeners"),
    ("relay.accounts",),
    ("relay.rooms",),
    ("relay.people", "relay.keys", "relay.ephemeral", "relay.media", "relay.push"),
    ("relay.moderation", "relay.privacy"),
    ("relay.sync", "relay.appservices"),
    ("federation", "relay.pages"),
    ("relay.control", "relay.folder", "relay.checkup", "relay.answers", "relay.inspection", "relay.moderating", "relay.moderator_line", "relay.proof_line", "relay.reloading", "relay.forgetting", "relay.own_keys", "relay.peer_commands", "relay.hook_commands", "relay.classifier_line", "relay.metrics", "relay.server", "relay.serving", "relay.__main__"),
)  # fmt: skip
# What protocol/ may use beside itself and most of the standard library.
PURE_PACKAGES = {"orjson", "canonicaljson", "nacl"}
IMPURE = {
    "asyncio", "concurrent", "datetime", "io", "logging", "multiprocessing", "os", "pathlib", "queue", "random", "secrets",
    "shutil", "socket", "sqlite3", "ssl", "subprocess", "tempfile", "threading", "time",
}  # fmt: skip
ENGINES = re.compile(r"sqlite3|aiosqlite|asyncpg|psycopg|sqlcipher")
LOG_LEVELS = {"debug", "info", "warning", "error", "critical", "exception"}
# The database's own bookkeeping is declared beside the form of all declarations.
DECLARATIONS = ROOT / "relay/tables.py"
BOOKKEEPERS = (ROOT / "relay/db.py", ROOT / "relay/upgrade.py")
PRODUCT = sorted(path for folder in ("relay", "federation") for path in (ROOT / folder).rglob("*.py"))
EVERY = PRODUCT + sorted(path for folder in ("tests", "scripts") for path in (ROOT / folder).rglob("*.py"))


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _line_of(module: str) -> int | None:
    for number, line in enumerate(ORDER):
        for name in line:
            if module == name or module.startswith(name + "."):
                return number
    return None


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and module of each import, also those inside functions and those for types only."""
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.relative_to(ROOT)}:{node.lineno} imports relatively; write the whole name"
            assert node.module is not None
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                file = ROOT / whole.replace(".", "/")
                is_module = file.with_suffix(".py").exists() or file.is_dir()
                yield node.lineno, whole if is_module else node.module


@pytest.mark.parametrize("path", PRODUCT, ids=_module)
def test_a_module_imports_only_from_its_own_line_and_above(path: Path) -> None:
    module = _module(path)
    if module == "relay":
        assert not list(_imports(path)), "relay/__init__.py is a map: a docstring and nothing else"
        return
    mine = _line_of(module)
    assert mine is not None, f"{module} has no place in the order: add it to ORDER here and to docs/architecture.md"
    for line, name in _imports(path):
        top = name.partition(".")[0]
        assert top not in ("tests", "scripts"), f"{module}:{line} imports {name}, which is no part of the product"
        if top not in ("relay", "federation"):
            continue
        theirs = _line_of(name)
        assert theirs is not None, f"{module}:{line} imports {name}, which has no place in the order"
        assert theirs <= mine, f"{module}:{line} imports {name}, which stands further down in the order"
        if top == "federation":
            allowed = module.startswith("federation") or module == "relay.server"
            assert allowed, f"{module}:{line} imports {name}; rooms reach other servers through relay/remote.py"


@pytest.mark.parametrize("path", [path for path in PRODUCT if "protocol" in path.parts], ids=_module)
def test_protocol_is_pure(path: Path) -> None:
    module = _module(path)
    for node in ast.walk(_tree(path)):
        waits = isinstance(node, ast.AsyncFunctionDef | ast.AsyncFor | ast.AsyncWith | ast.Await)
        assert not waits, f"{module} waits for something; protocol/ judges without I/O"
    for line, name in _imports(path):
        top = name.partition(".")[0]
        if top == "relay":
            allowed = name.startswith(("relay.protocol", "relay.errors", "relay.ids"))
            assert allowed, f"{module}:{line} imports {name}; protocol/ knows only relay.errors, relay.ids and itself"
            continue
        assert top not in IMPURE, f"{module}:{line} imports {name}: no clock, files, threads or chance in protocol/"
        known = top in PURE_PACKAGES or top in sys.stdlib_module_names
        assert known, f"{module}:{line} imports {name}, which is not on the list of pure packages"


@pytest.mark.parametrize("path", EVERY, ids=_module)
def test_a_file_is_short_and_begins_with_what_it_is_about(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    name = path.relative_to(ROOT)
    assert text.count("\n") <= MAX_LINES, f"{name} has more than {MAX_LINES} lines: split it by concept"
    if not text.strip():
        assert path.name == "__init__.py", f"{name} is empty"
        return
    about = ast.get_docstring(_tree(path), clean=False)
    assert about, f"{name} begins without a docstring that says what it is about"
    short = about.rstrip().count("\n") < MAX_DOCSTRING_LINES
    assert short, f"the docstring of {name} is longer than {MAX_DOCSTRING_LINES} lines"


@pytest.mark.parametrize("path", PRODUCT, ids=_module)
def test_engine_names_stand_in_one_file(path: Path) -> None:
    if path == ROOT / "relay" / "db.py":
        return
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        place = f"{path.relative_to(ROOT)}:{number}"
        assert not ENGINES.search(line), f"{place} names a database engine; only relay/db.py may"


_CREATES = re.compile(r"CREATE TABLE (?:IF NOT EXISTS )?(\w+)", re.IGNORECASE)
_WRITES = re.compile(r"\b(?:INSERT INTO|UPDATE|DELETE FROM) ([a-z_]+)\b")


def _strings(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def _owners() -> dict[str, list[Path]]:
    owners: dict[str, list[Path]] = {}
    for path in PRODUCT:
        for table in {table for _, text in _strings(path) for table in _CREATES.findall(text)}:
            owners.setdefault(table, []).append(path)
    return owners


def test_each_table_has_one_owner_who_declares_it() -> None:
    for table, paths in _owners().items():
        names = ", ".join(str(path.relative_to(ROOT)) for path in paths)
        assert len(paths) == 1, f"the table {table} is made in {names}; one part owns a table"
        declared = re.search(rf"Table\(\s*[\"']{table}[\"']", paths[0].read_text(encoding="utf-8"))
        assert declared, f"{names} makes the table {table} without declaring it in its schema's tables"


def test_only_the_owner_writes_to_a_table() -> None:
    owners = _owners()
    for path in PRODUCT:
        for line, text in _strings(path):
            for table in _WRITES.findall(text):
                if table not in owners:
                    continue
                owner = owners[table][0]
                if owner == DECLARATIONS and path in BOOKKEEPERS:
                    continue
                # The files of one folder are one slice and share its tables.
                slice_ = path.parent == owner.parent and path.parent.name not in ("relay", "federation")
                place = f"{path.relative_to(ROOT)}:{line}"
                allowed = path == owner or slice_
                assert allowed, f"{place} writes to {table}, which {owner.relative_to(ROOT)} owns: ask it to"


@pytest.mark.parametrize("path", PRODUCT, ids=_module)
def test_the_log_gets_only_fields_it_writes(path: Path) -> None:
    for node in ast.walk(_tree(path)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        target = node.func.value
        if not (isinstance(target, ast.Name) and target.id in ("log", "_log") and node.func.attr in LOG_LEVELS):
            continue
        place = f"{path.relative_to(ROOT)}:{node.lineno}"
        fixed = bool(node.args) and isinstance(node.args[0], ast.Constant)
        assert fixed, f"{place} logs a text that is put together; write a fixed text and give values as fields"
        for keyword in node.keywords:
            known = keyword.arg in FIELDS or keyword.arg == "exc_info"
            assert known, f"{place} logs the field {keyword.arg}, which relay/log.py would leave out: see FIELDS there"
