"""The texts of config files: the full example, and the first config of a new relay.

Both come from the structs of `relay/config/`: values from the defaults, explanations from the docstrings below the fields.
Not here: reading a file.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import re
import sys
import textwrap
from collections.abc import Iterator
from typing import get_type_hints

import msgspec

from relay.config import Listener, Rate, Section, Settings, choices_of

EXAMPLE_SERVER_NAME = "example.org"
_WIDTH = 110
_SAMPLE = re.compile(r"\s*Example: (\S+)\Z")


def first_config(
    server_name: str, listener: Listener, *, performer: bool = False, public_base_url: str | None = None
) -> str:
    """The config that `relay init` and the first start write; `performer` closes the contact gate to strangers."""
    lines = [
        "# Sealed Relay. `relay config example` prints every setting with its explanation; what is left out has its default.",
        "",
        "# Part of every user ID. It can never be changed later.",
        f"server_name: {_scalar(server_name)}",
        "",
        "listeners:",
        f"  - address: {_scalar(listener.address)}",
        f"    port: {listener.port}",
    ]
    if listener.trusted_proxies != Listener().trusted_proxies:
        lines.append(f"    trusted_proxies: {_scalar(listener.trusted_proxies)}")
    if public_base_url is not None:
        lines += ["", "# Where apps reach the relay.", f"public_base_url: {_scalar(public_base_url)}"]
    if performer:
        lines += [
            "",
            "# Strangers' invites are held back at /_relay/contact; people you share a room with, or who have your contact",
            "# link, come through. Everybody here can choose something else there.",
            "contact:",
            "  invites_from: shared_rooms",
        ]
    return "\n".join(lines) + "\n"


def example() -> str:
    """Every setting with its explanation and its default: the text of config.example.yaml."""
    lines = [
        "# Sealed Relay: every setting. Only server_name is required; what is left out has the value shown here.",
        "# Times are written 30s, 10m, 48h, 7d; sizes 512 KiB, 50 MiB, 2 GiB. File names are relative to the data folder.",
        "# This file is generated: relay config example > config.example.yaml",
        "",
        *_block(Settings(server_name=EXAMPLE_SERVER_NAME), ""),
    ]
    return "\n".join(lines).rstrip() + "\n"


@functools.cache
def _explanations(module: str) -> dict[tuple[str, str], str]:
    # Python keeps no docstrings for fields, so they are read from the source: one place for value and meaning.
    found = {}
    for block in ast.parse(inspect.getsource(sys.modules[module])).body:
        if isinstance(block, ast.ClassDef):
            for field, text in itertools.pairwise(block.body):
                if (
                    isinstance(field, ast.AnnAssign)
                    and isinstance(text, ast.Expr)
                    and isinstance(text.value, ast.Constant)
                ):
                    found[block.name, ast.unparse(field.target)] = " ".join(str(text.value.value).split())
    return found


def _block(section: Section, indent: str) -> Iterator[str]:
    hints = get_type_hints(type(section))
    for field in msgspec.structs.fields(section):
        value = getattr(section, field.name)
        text = _explanations(type(section).__module__)[type(section).__name__, field.name]
        sample = _SAMPLE.search(text)
        choices = choices_of(hints[field.name])
        if not all(choice in text for choice in choices):
            text += f" One of: {', '.join(choices)}."
        yield from _comment(_SAMPLE.sub("", text), indent)
        if isinstance(value, Rate):
            yield f"{indent}{field.name}: {{per_second: {value.per_second:g}, burst: {value.burst}}}"
        elif isinstance(value, Section):
            yield f"{indent}{field.name}:"
            yield from _block(value, indent + "  ")
        elif isinstance(value, tuple) and value and isinstance(value[0], Section):
            yield f"{indent}{field.name}:"
            for item in value:
                yield f"{indent}  -"
                yield from _block(item, indent + "    ")
        elif value is None:
            yield f"{indent}# {field.name}: {sample[1] if sample else ''}"
        else:
            yield f"{indent}{field.name}: {_scalar(value)}"
        if not indent:
            yield ""


def _scalar(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + ", ".join(_scalar(item) for item in value) + "]"
    if isinstance(value, str) and not re.match(r"[A-Za-z][A-Za-z0-9_./-]*\Z", value):
        return f'"{value}"'
    return str(value)


def _comment(text: str, indent: str) -> Iterator[str]:
    for line in textwrap.wrap(text, _WIDTH - len(indent)):
        yield f"{indent}# {line}"
