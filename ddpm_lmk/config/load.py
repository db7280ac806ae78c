"""Run files: reading, composing, checking, explaining, comparing and writing them.

Order of precedence, weakest first: field defaults, the files named by `extends` (relative to the file that names them,
or shipped; resolved first, deep-merged in order), the file itself, `key=value` words of the command line. A value
remembers where it came from, so that a mistake is reported with key, value, source line and the nearest known name.
`config` says what the keys are; paths inside a run file are relative to the current directory.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ddpm_lmk.config import RunConfig, yaml
from ddpm_lmk.config.explain import default_kind, explain, kind_of, sections_of
from ddpm_lmk.config.renamed import RENAMED, moved_origins, under_new_names, under_old_names, warn_of
from ddpm_lmk.config.yaml import KeyPath, Origins
from ddpm_lmk.errors import ConfigError
from ddpm_lmk.system.shipped import find

__all__ = [
    "config_hash",
    "diff_runs",
    "dump_run",
    "explain",
    "is_hash_of",
    "load_run",
    "load_stored",
    "load_yaml",
    "validate",
]

COMMAND_LINE = "command line"
ABSENT = "(absent)"
# What other trainers call a setting, too unlike its name here to be found by its letters.
OTHER_TOOLS = {
    "learning_rate": "optim.lr",
    "batch_size": "train.global_batch_size",
    "epochs": "train.duration",
    "num_workers": "runtime.workers",
    "resolution": "data.image_size",
}

Model = TypeVar("Model", bound=BaseModel)


def load_run(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read and check a run file with its `extends` and `key=value` overrides.

    Raises:
        ConfigError: anything the user can mend in the file or on the command line (exit code 2).
        CheckpointError: a file refused for safety (exit code 4).
    """
    renamed: dict[str, str] = {}
    cfg = _load(path, overrides or [], renamed)
    warn_of(renamed, str(path))
    return cfg


def load_stored(folder: Path) -> RunConfig:
    """The run file that a run directory holds. No warning of old names: this program wrote them. Raises as `load_run`."""
    return _load(folder / "config.yaml", [], {})


def _load(path: str | Path, overrides: list[str], renamed: dict[str, str]) -> RunConfig:
    data, origins = _compose(Path(path), RunConfig, (), renamed)
    if "grids" in data:
        raise ConfigError(f"{path} is a sweep file; use `ddpm-lmk sweep {path}`")
    words, word_origins = _read_overrides(overrides, renamed)
    _merge(data, words, RunConfig)
    origins.update(word_origins)
    return validate(RunConfig, data, source=str(path), origins=origins)


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read any YAML mapping (sweep and launch files) with its `extends`, unchecked."""
    return _compose(Path(path), None, (), {})[0]


def kinds_of(path: str | Path) -> dict[str, str]:
    """The kind of each section that names one, by dotted key; the rest of the file is not checked."""
    data = _compose(Path(path), RunConfig, (), {})[0]
    return {".".join(key[:-1]): str(value) for key, value in _leaves(data, ()) if key[-1] == "kind"}


def validate(model: type[Model], data: dict[str, Any], *, source: str, origins: Origins | None = None) -> Model:
    """Build `model` from plain data; a mistake becomes one `ConfigError` line naming key, value and place."""
    try:
        checked = model.model_validate(data)
    except ValidationError as error:
        # A typo often leaves something missing: name the typo first.
        details = sorted(error.errors(include_url=False), key=lambda detail: detail["type"] == "missing")
        more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
        raise ConfigError(_describe(model, details[0], data, source, origins or {}) + more) from None
    _refuse_odd_values(checked, data, source, origins or {})  # after the schema, whose messages are better
    return checked


def dump_run(config: RunConfig) -> str:
    """YAML of a resolved run; `load_run` of it gives the same run."""
    return yaml.dump(config.model_dump(mode="json"))


def config_hash(config: BaseModel) -> str:
    """64 bits of SHA-256 over all resolved values, as hexadecimal."""
    return _hash(config.model_dump(mode="json"))


def _hash(settings: dict[str, Any]) -> str:
    # Sorted: moving a field within the schema must not make a run directory another run's.
    text = json.dumps(settings, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_hash_of(text: str | None, config: RunConfig) -> bool:
    """Is this the hash of a run, made by this version or by the one before, whose settings had other names?"""
    return text in (config_hash(config), _hash(under_old_names(config.model_dump(mode="json"))))


def diff_runs(a: RunConfig, b: RunConfig) -> list[tuple[str, Any, Any]]:
    """Rows (dotted key, value in `a`, value in `b`) where two runs differ; "(absent)" where one has no such key."""
    left, right = flatten(a.model_dump(mode="json")), flatten(b.model_dump(mode="json"))
    keys = list(left)
    for key in right:
        if key not in left:
            keys.insert(_beside(key, keys), key)
    # 1 and 1.0 are equal in Python, true and 1 too: types are compared as well.
    rows = [(key, left.get(key, ABSENT), right.get(key, ABSENT)) for key in keys]
    return [row for row in rows if row[1] != row[2] or type(row[1]) is not type(row[2])]


def _beside(key: str, keys: list[str]) -> int:
    """Where a key belongs in a list: behind the last one of its section, or of the nearest section around it."""
    section = key
    while "." in section:
        section = section.rpartition(".")[0]
        akin = [i for i, other in enumerate(keys) if other == section or other.startswith(f"{section}.")]
        if akin:
            return akin[-1] + 1
    return len(keys)


def _compose(
    path: Path, model: type[BaseModel] | None, open_files: tuple[Path, ...], renamed: dict[str, str]
) -> tuple[dict[str, Any], Origins]:
    """The file at `path` laid over everything it extends; old names of a run file are collected in `renamed`."""
    here = path.resolve()
    if here in open_files:
        raise ConfigError(f"{path}: `extends` goes in a circle: {' -> '.join(p.name for p in (*open_files, here))}")
    own, own_origins = yaml.parse_mapping(yaml.read_text(path), str(path))
    if model is RunConfig:  # before anything is merged: a file and what it extends may use different names
        old_names: dict[str, str] = {}
        own = under_new_names(own, old_names, str(path))
        own_origins = moved_origins(own_origins, old_names)
        renamed.update(old_names)
    parents = own.pop("extends", None) or []
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise ConfigError(f"{own_origins[('extends',)]}: extends: {parents!r}; wanted a path or a list of paths")
    data: dict[str, Any] = {}
    origins: Origins = {}
    # Parents first, in their order, this file last: what is read later wins.
    for parent in parents:
        file = find(parent, path.parent)
        if not file.is_file():
            raise ConfigError(f"{own_origins[('extends',)]}: extends {parent!r}, but there is no file {file}")
        base, base_origins = _compose(file, model, (*open_files, here), renamed)
        _merge(data, base, model)
        origins.update(base_origins)
    _merge(data, own, model)
    return data, {**origins, **own_origins}


def _read_overrides(words: list[str], renamed: dict[str, str]) -> tuple[dict[str, Any], Origins]:
    """`a.b=value` words as one nested mapping; the value is as `yaml.parse_word` reads it."""
    data: dict[str, Any] = {}
    origins: Origins = {}
    for word in words:
        key, equals, text = word.partition("=")
        path = tuple(key.strip().split("."))
        if not equals or not all(path):
            raise ConfigError(f"{COMMAND_LINE}: {word!r}; wanted key=value, e.g. optim.lr=1e-4")
        value = yaml.parse_word(text, f"{COMMAND_LINE}: {key}")
        nested = value
        for part in reversed(path):
            nested = {part: nested}
        old_names: dict[str, str] = {}
        nested = under_new_names(nested, old_names)
        renamed.update(old_names)
        _merge(data, nested, None)
        placed = {path[: i + 1]: COMMAND_LINE for i in range(len(path))}
        origins.update(moved_origins(placed, old_names))
    return data, origins


def _merge(base: dict[str, Any], over: dict[str, Any], model: type[BaseModel] | None) -> None:
    """Lay `over` on `base`, in place. A changed `kind` of a tagged section drops what the old kind had set."""
    # Else `task.kind=denoise` over a landmark run would be refused for the codec that its file set.
    for key, value in over.items():
        old = base.get(key)
        field = model.model_fields.get(key) if model else None
        sections = sections_of(field.annotation) if field else ()
        switched = (
            len(sections) > 1
            and isinstance(old, dict)
            and isinstance(value, dict)
            and "kind" in value
            and old.get("kind", default_kind(field)) not in (None, value["kind"])
        )
        if not isinstance(value, dict) or not isinstance(old, dict) or switched:
            base[key] = _copied(value)
        else:
            # Inner sections are looked up in the class of the chosen kind: `codec` means something in `landmarks` only.
            kind = value.get("kind", old.get("kind"))
            chosen = [section for section in sections if len(sections) == 1 or kind_of(section) == kind]
            _merge(old, value, chosen[0] if chosen else None)


def _copied(value: Any) -> Any:
    return {key: _copied(item) for key, item in value.items()} if isinstance(value, dict) else value


def _describe(model: type[BaseModel], detail: ErrorDetails, data: dict[str, Any], source: str, origins: Origins) -> str:
    """One line for one mistake: where, key, what was found, what was wanted."""
    path = _data_path(detail, data)
    key = ".".join(path)
    place = _origin(path, source, origins)
    if detail["type"] == "extra_forbidden":
        return f"{place}: unknown key {key}{_nearest(model, key)}"
    if detail["type"] == "missing":
        example = "DIR" if path[-1] == "path" else "..."
        return f"{source}: {key} is missing; add it to the file or give {key}={example} on the command line"
    message = detail["msg"].removeprefix("Value error, ")
    if not path:
        return f"{source}: {message}"
    if detail["type"].startswith("union_tag"):
        wanted = detail.get("ctx", {}).get("expected_tags") or " or ".join(_kinds_at(model, path))
        given = detail["input"].get("kind") if isinstance(detail["input"], dict) else detail["input"]
        return f"{place}: {key}.kind={_short(given)}; wanted {wanted}"
    given = detail["input"]
    if detail["type"] == "value_error" and isinstance(given, dict):  # a section's own check, which names what it found
        return f"{place}: {key}: {message}"
    is_word = detail["type"] in ("string_type", "tuple_type") and (given is None or isinstance(given, bool))
    remedy = f"; if text is meant, quote it: {key}=\"'{json.dumps(given)}'\"" if is_word else ""
    return f"{place}: {key}={_short(given)}: {message[:1].lower()}{message[1:]}{remedy}"


def _data_path(detail: ErrorDetails, data: Any) -> KeyPath:
    """Location of an error in the data; pydantic's own also names union members, which no file contains."""
    path: list[str] = []
    for i, part in enumerate(detail["loc"]):
        last_word = i == len(detail["loc"]) - 1 and detail["type"] == "missing"
        if isinstance(part, str) and not last_word and not (isinstance(data, dict) and part in data):
            continue  # the name of a union's member
        path.append(str(part))
        if not last_word:
            data = data[part]
    return tuple(path)


def _origin(path: KeyPath, source: str, origins: Origins) -> str:
    """Where the value at `path` was written, or the nearest section around it."""
    return next((origins[path[:n]] for n in range(len(path), 0, -1) if path[:n] in origins), source)


def _nearest(model: type[BaseModel], key: str) -> str:
    """The ending "; did you mean ...?" for an unknown key: beside it, then by last word, then by full path."""
    if model is RunConfig and (ours := OTHER_TOOLS.get(key.rpartition(".")[2])):
        return f"; did you mean {ours}?"
    known = list(dict.fromkeys(row[0] for row in explain(model)))
    known += [part for part in dict.fromkeys(name.rpartition(".")[0] for name in known) if part]
    section, _, leaf = key.rpartition(".")
    beside = {name.rpartition(".")[2]: name for name in reversed(known) if name.rpartition(".")[0] == section}
    here = list(beside)
    leaves = {name.rpartition(".")[2]: name for name in reversed(known)}
    full = {name: name for name in known}
    if model is RunConfig:  # old names are still read, so a misspelt one is likelier than any name like it
        full |= RENAMED
        beside = {
            old.rpartition(".")[2]: new for old, new in RENAMED.items() if old.rpartition(".")[0] == section
        } | beside
    # `sigma` for `sigma_px` is likelier than any name of the same number of different letters.
    akin = {name: path for name, path in beside.items() if leaf.startswith(name) or name.startswith(leaf)}
    for names, word, cutoff in ((akin, leaf, 0.3), (beside, leaf, 0.6), (leaves, leaf, 0.8), (full, key, 0.7)):
        found = difflib.get_close_matches(word, names, n=1, cutoff=cutoff)
        if found and names[found[0]] == key:
            return f" here: it belongs to another {section}.kind"
        if found:
            return f"; did you mean {names[found[0]]}?"
    return f"; known here: {', '.join(here)}" if here else ""


def _refuse_odd_values(checked: BaseModel, data: dict[str, Any], source: str, origins: Origins) -> None:
    """Refuse what pydantic's lax mode lets through: booleans taken for numbers, and numbers that are not finite."""
    for path, value in _leaves(checked.model_dump(), ()):
        given: Any = data
        for part in path:
            given = (
                given.get(part) if isinstance(given, dict) else given[int(part)] if isinstance(given, list) else given
            )
        key = f"{_origin(path, source, origins)}: {'.'.join(path)}"
        if isinstance(given, bool) and not isinstance(
            value, bool
        ):  # pydantic takes true for 1, YAML gives true for yes
            raise ConfigError(f"{key}={str(given).lower()}: wanted a number, not true or false")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{key}={value}: wanted a finite number")


def _leaves(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, (*path, key))
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _leaves(item, (*path, str(i)))
    else:
        yield path, value


def flatten(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key; lists stay as they are."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def _kinds_at(model: type[BaseModel], path: KeyPath) -> list[str]:
    sections: tuple[type[BaseModel], ...] = (model,)
    for part in path:
        fields = [section.model_fields[part] for section in sections if part in section.model_fields]
        sections = tuple(inner for field in fields for inner in sections_of(field.annotation))
    return [repr(kind_of(section)) for section in sections]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
