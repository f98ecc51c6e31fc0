"""From a YAML text to `Settings`. A mistake becomes a `ConfigError` that names the line and the field and the remedy."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec
import yaml

from relay.config.settings import Settings
from relay.config.values import Duration, Size

CONFIG_NAME = "relay.yaml"
MAX_CONFIG_BYTES = 1024 * 1024


class ConfigError(Exception):
    """The operator's file can't be used. The text names the place and the remedy; there may be several lines."""


def load(path: Path) -> Settings:
    """The settings of a file. Raises ConfigError."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(
            f"There is no config at {path}. Make one with: relay init --server-name NAME --data {path.parent}"
        ) from None
    except OSError as bad:
        raise ConfigError(f"The config {path} can't be read: {bad.strerror}. Check who owns it.") from bad
    if len(raw) > MAX_CONFIG_BYTES:
        raise ConfigError(f"The config {path} is larger than 1 MiB. Is it the right file?")
    try:
        text = raw.decode()
    except UnicodeDecodeError as bad:
        raise ConfigError(f"The config {path} is not UTF-8 text (byte {bad.start}). Save it as UTF-8.") from bad
    return parse(text, str(path))


def parse(text: str, name: str = CONFIG_NAME) -> Settings:
    """The settings of a text; `name` stands in the errors. Raises ConfigError."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None:
            _refuse_doubles(root, name)
        given = yaml.safe_load(text)
    except yaml.YAMLError as bad:
        mark = getattr(bad, "problem_mark", None) or getattr(bad, "context_mark", None)
        place = f"{name}, line {mark.line + 1}" if mark else name
        problem = getattr(bad, "problem", None) or "unreadable"
        raise ConfigError(
            f"{place}: this is not YAML ({problem}). Look at the indentation and the quotes there."
        ) from None
    except RecursionError:
        raise ConfigError(f"{name}: nested too deeply. Compare it with `relay config example`.") from None
    if not isinstance(given, dict):
        raise ConfigError(
            f"{name}: the config is a list of settings such as `server_name: example.org`. See `relay config example`."
        )
    try:
        return msgspec.convert(given, Settings, dec_hook=_amounts)
    except msgspec.ValidationError as bad:
        raise ConfigError(_explain(str(bad), root, name)) from None


def _amounts(kind: type, given: Any) -> Any:
    if kind is Duration or kind is Size:
        return kind.parse(given)
    raise NotImplementedError(kind)


def _refuse_doubles(node: yaml.Node, name: str, depth: int = 0) -> None:
    # YAML loaders let the last of two equal keys win without a word; an operator who sees the first is misled.
    if depth > 50:
        raise ConfigError(f"{name}: nested too deeply. Compare it with `relay config example`.")
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise ConfigError(
                    f"{name}, line {line}: {key.value} stands here for the second time (first in line {seen[key.value]}). Keep one."
                )
            seen[str(key.value)] = line
            _refuse_doubles(value, name, depth + 1)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_doubles(item, name, depth + 1)


_PLACE = re.compile(r"(?P<text>.*?)(?: - at `(?P<path>\$[^`]*)`)?\Z", re.DOTALL)
_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+|\.\.\.)\]")


def _explain(error: str, root: yaml.Node | None, name: str) -> str:
    found = _PLACE.match(error)
    assert found is not None
    text, path = found["text"], found["path"] or "$"
    unknown = re.match(r"Object contains unknown field `(.*)`", text)
    missing = re.match(r"Object missing required field `(.*)`", text)
    steps = [key or int(index) if index != "..." else 0 for key, index in _STEP.findall(path)]
    if unknown:
        steps.append(unknown[1])
    line = _line(root, steps)
    field = ".".join(str(step) if isinstance(step, str) else str(step + 1) for step in steps)
    place = f"{name}, line {line}" if line else name
    if unknown:
        known = [field.name for field in msgspec.structs.fields(_kind_at(steps[:-1]))]
        close = difflib.get_close_matches(unknown[1], known, n=1)
        advice = f"Did you mean {close[0]}?" if close else f"Known here are: {', '.join(known)}."
        return f"{place}: there is no setting {field}. {advice}"
    if missing:
        where = f"{field}.{missing[1]}" if field else missing[1]
        return f"{place}: {where} is missing. Add it; `relay config example` shows how."
    text = text.replace("`", "")
    if enum := re.match(r"Invalid enum value (.*)", text):
        text = f"{enum[1]} is not one of its values, which are: {', '.join(choices_of(_kind_at(steps)))}"
    elif wrong := re.match(r"Expected (.*), got (.*)", text):
        text = f"this is a value of type {wrong[2]}, and one of type {wrong[1]} is needed; `relay config example` shows how it is written"
    elif bounds := re.match(r"Expected (?:int|float|str|object)(.*)", text):
        text = f"the value has to be{bounds[1]}"
    return f"{place}: {field + ': ' if field else ''}{text}."


def _line(node: yaml.Node | None, steps: list[str | int]) -> int:
    line = 0
    for step in steps:
        if isinstance(node, yaml.MappingNode):
            pair = next(((key, value) for key, value in node.value if key.value == step), None)
            if pair is None:
                break
            line, node = pair[0].start_mark.line + 1, pair[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            node = node.value[step]
            line = node.start_mark.line + 1
        else:
            break
    return line


def _kind_at(steps: list[str | int]) -> Any:
    kind: Any = Settings
    for step in steps:
        kind = get_type_hints(kind)[step] if isinstance(step, str) else get_args(kind)[0]
    return kind


def choices_of(kind: Any) -> tuple[str, ...]:
    """The values of a setting that has only a few."""
    if get_origin(kind) is tuple:
        kind = get_args(kind)[0]
    return get_args(kind) if get_origin(kind) is Literal else ()
