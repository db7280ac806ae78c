"""YAML as this project reads it: a small, harmless subset, with the line every value stands on.

Refused for safety, before anything is built: files over 1 MiB, object tags, aliases (the road of alias bombs) and
absurd nesting. Refused as mistakes: duplicate keys, and the bare words yes, no, on and off, which YAML 1.1 turns into
booleans behind one's back. Numbers are left to the schema that knows what it wants: `1e-5` and `2024.10` stay text
here, since a number would not give the text back where a field wants text. It does not know what a run file is
(`runfile`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from ddpm_lmk.errors import CheckpointError, ConfigError
from ddpm_lmk.system.shipped import advice

# The largest file that ships has 90 lines; these stop a mistake (a checkpoint named as a run file) and an attack alike.
MAX_BYTES = 2**20
MAX_EVENTS = 20_000
MAX_DEPTH = 32
QUOTED = {"'", '"', "|", ">"}
YAML_BEGINS = tuple("[{'\"&*!|>")  # a list, a mapping, a quote; or what is refused
AMBIGUOUS = {"y", "n", "yes", "no", "on", "off"}
NULLS = {"", "~", "null", "Null", "NULL"}
CORE_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "map", "seq")} | {"!"}
# No octal, no underscores, no sexagesimals: YAML 1.1 reads 010 as 8 and 12:30 as 750.
INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
DECIMAL = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml where the wheel has it: ten times faster

_SURROGATE = re.compile(r"\\u[dD][c-fC-F]|[\ud800-\udfff]")

KeyPath = tuple[str, ...]
Origins = dict[KeyPath, str]


def read_text(path: Path) -> str:
    """Text of a YAML file of at most 1 MiB; `ConfigError` when it cannot be read, `CheckpointError` when too large."""
    try:
        with open(path, "rb") as file:  # one byte more than allowed: its size is known without reading all of it
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise CheckpointError(f"{path}: refused for safety: larger than 1 MiB, which no run file is")
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}); save the file as UTF-8") from None
    except FileNotFoundError:
        raise ConfigError(f"{path}: cannot be read: there is no such file; {advice(path)}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: cannot be read: it is a folder; name a file in it") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check its rights") from None


def parse(text: str, source: str) -> tuple[Any, Origins]:
    """Values of a YAML text, and where each key path stands ("file, line 3").

    Raises:
        ConfigError: broken YAML, duplicate keys, ambiguous words.
        CheckpointError: tags, aliases or nesting refused for safety.
    """
    try:
        _refuse_unsafe(text, source)
        node = yaml.compose(text, Loader=_loader(text))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{source}{place}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    origins: Origins = {}
    return (None if node is None else _build(node, (), source, origins)), origins


def parse_word(text: str, source: str) -> Any:
    """Value of a word of the command line: YAML where it opens a list, a mapping or a quote, else one plain value.

    So a path may hold what means something in a YAML document, such as ` #` or `: `, and begin with `~/`, which shells
    leave as it is behind an equals sign. Raises as `parse` does.
    """
    text = text.strip()
    if text.startswith("~/"):
        return str(Path(text).expanduser())
    if text[:1] not in YAML_BEGINS:
        return _scalar(yaml.ScalarNode("tag:yaml.org,2002:str", text), (), source)
    try:
        return parse(text, source)[0]
    except ConfigError as error:
        raise ConfigError(f"{error}; text that begins with {text[0]} has to be quoted: \"'{text}'\"") from None


def parse_mapping(text: str, source: str) -> tuple[dict[str, Any], Origins]:
    """Like `parse`, for a text that must be a mapping (an empty one counts)."""
    value, origins = parse(text, source)
    if value is None:
        return {}, origins
    if not isinstance(value, dict):
        raise ConfigError(f"{source}: wanted `key: value` lines, found a {type(value).__name__}")
    return value, origins


def _loader(text: str) -> Any:
    """Lone surrogates, which stand for names that are no UTF-8 and become `\\uDCFF`, are unknown to libyaml."""
    return yaml.SafeLoader if _SURROGATE.search(text) else LOADER


def _refuse_unsafe(text: str, source: str) -> None:
    """Walk the event stream (no recursion, nothing built) and refuse what could hurt."""
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=_loader(text))):
        line = event.start_mark.line + 1 if event.start_mark else 1
        place = f"{source}, line {line}: refused for safety"
        if isinstance(event, yaml.AliasEvent):
            raise CheckpointError(f"{place}: YAML alias *{event.anchor}; repeat the value, or use `extends`")
        tag = getattr(event, "tag", None)
        if tag is not None and tag not in CORE_TAGS:
            raise CheckpointError(f"{place}: YAML tag {tag!r}; write plain values only")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH or count > MAX_EVENTS:
            raise CheckpointError(f"{place}: deeper than {MAX_DEPTH} levels or more than {MAX_EVENTS} items")


def _build(node: yaml.Node, path: KeyPath, source: str, origins: Origins) -> Any:
    origins.setdefault(path, f"{source}, line {node.start_mark.line + 1}")
    if isinstance(node, yaml.MappingNode):
        return _build_mapping(node, path, source, origins)
    if isinstance(node, yaml.SequenceNode):
        return [_build(item, (*path, str(i)), source, origins) for i, item in enumerate(node.value)]
    assert isinstance(node, yaml.ScalarNode)
    return _scalar(node, path, origins[path])


def _build_mapping(node: yaml.MappingNode, path: KeyPath, source: str, origins: Origins) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key_node, value_node in node.value:
        origin = f"{source}, line {key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{origin}: a key must be a word, found a list or mapping")
        key = key_node.value
        child = (*path, key)
        if key in found:
            raise ConfigError(f"{origin}: duplicate key {'.'.join(child)!r}, first at {origins[child]}; remove one")
        origins[child] = origin
        found[key] = _build(value_node, child, source, origins)
    return found


class _Dumper(yaml.SafeDumper):
    """Writes text so that this module reads the same text: quoted where a bare word would be something else."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    plain = yaml.ScalarNode("tag:yaml.org,2002:str", text)
    try:
        is_read_back = _scalar(plain, (), "") == text
    except ConfigError:
        is_read_back = False
    return dumper.represent_scalar(plain.tag, text, style=None if is_read_back else "'")


_Dumper.add_representer(str, _represent_text)


def dump(data: Any) -> str:
    """YAML text of plain values, which `parse_mapping` reads back as they were."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)


def _scalar(node: yaml.ScalarNode, path: KeyPath, origin: str) -> Any:
    text = node.value
    if node.style in QUOTED or node.tag == "!":
        return text
    if text.lower() in AMBIGUOUS:
        key = ".".join(path) or "value"
        raise ConfigError(
            f"{origin}: {key}: {text} is ambiguous in YAML; write true or false, or quote it for text: '{text}', and "
            f"\"'{text}'\" on the command line"
        )
    if text in NULLS:
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if NOT_FINITE.fullmatch(text):
        return float(text.replace(".", ""))
    # Text that a number would not give back (2024.10, 1e-5) stays text: it may name a folder, and pydantic parses it
    # where a number is wanted.
    number = int(text) if INTEGER.fullmatch(text) else float(text) if DECIMAL.fullmatch(text) else text
    return number if str(number) == text else text
