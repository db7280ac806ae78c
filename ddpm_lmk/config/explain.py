"""What the keys of a settings file are: every dotted key with its type, default, bound and description.

Derived from the pydantic models alone, so that `--explain`, the error messages and the documentation cannot disagree.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from ddpm_lmk.config.renamed import RENAMED
from ddpm_lmk.errors import ConfigError

ExplainRow = tuple[str, str, str, str, str]
INDENT = "    "
SIGNS = {
    "gt": ">",
    "ge": ">=",
    "lt": "<",
    "le": "<=",
    "min_length": "length >=",
    "max_length": "length <=",
    "pattern": "matches",
}


def explain(model: type[BaseModel], prefix: str = "") -> list[ExplainRow]:
    """Rows (dotted key, type, default, bound, description) of every field, sections opened in place."""
    rows: list[ExplainRow] = []
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        sections = sections_of(field.annotation)
        rows += _own_row(key, field, sections)
        for section in sections:
            label = f"[{kind_of(section)}] " if len(sections) > 1 else ""
            rows += [(*row[:4], label + row[4]) for row in explain(section, f"{key}.")]
    return rows


def overview(model: type[BaseModel], kinds: Mapping[str, str], prefix: str = "") -> list[ExplainRow]:
    """The rows of one kind of each section, by dotted key in `kinds` or else the default one, less rarely set fields."""
    rows: list[ExplainRow] = []
    for name, field in model.model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("advanced"):
            continue
        key = f"{prefix}{name}"
        sections = sections_of(field.annotation)
        rows += _own_row(key, field, sections)
        wanted = kinds.get(key, default_kind(field))
        # A key that is new in one kind only has no business in an overview of another.
        for section in [each for each in sections if kind_of(each) == wanted] or sections[:1]:
            inner = overview(section, kinds, f"{key}.")
            if len(sections) > 1:  # the others are named where they are chosen
                names = " | ".join(repr(kind_of(each)) for each in sections)
                inner = [(row[0], names, *row[2:]) if row[0] == f"{key}.kind" else row for row in inner]
            rows += inner
    return rows


def page(model: type[BaseModel], wanted: Sequence[str], *, width: int, kinds: Mapping[str, str] | None = None) -> str:
    """The settings as text, a heading per section: key = default, type and bound; below it what it is.

    Args:
        wanted: beginnings of dotted keys, e.g. `train` or `optim.clip`, of which all is shown; empty: no choice.
        width: columns of a line.
        kinds: without a choice, an overview with these kinds; None: everything.

    Raises:
        ConfigError: nothing begins with one of them.
    """
    everything = explain(model)
    for word in wanted:
        if not any(row[0].startswith(word) for row in everything):
            now = RENAMED.get(word)
            known = f"it is now {now}" if now else f"there are {', '.join(model.model_fields)}"
            raise ConfigError(f"no setting begins with {word!r}; {known}")
    rows = everything if wanted or kinds is None else overview(model, kinds)
    lines: list[str] = []
    heading = None
    for key, kind, default, bound, text in rows:
        if wanted and not key.startswith(tuple(wanted)):
            continue
        section = key.partition(".")[0]
        if "." in key and section != heading:
            title = f"## {section}: {_what_for(model.model_fields[section])}"
            lines += ["", *textwrap.wrap(title, width, subsequent_indent=INDENT), ""]
        heading = section
        facts = f"{key} = {default}{INDENT}{kind}{f'; {bound}' if bound else ''}"
        lines += textwrap.wrap(facts, width, subsequent_indent=2 * INDENT, break_long_words=False)
        lines += textwrap.wrap(text, width, initial_indent=INDENT, subsequent_indent=INDENT)
    if len(rows) < len(everything):
        more = f"Rarely set keys and other kinds are left out: `--explain --all` shows {len(everything)} settings, "
        more += "`--explain SECTION` all of a section, e.g. `--explain task`."
        lines += ["", *textwrap.wrap(more, width)]
    return "\n".join(lines).strip("\n")


def _own_row(key: str, field: FieldInfo, sections: Sequence[type[BaseModel]]) -> list[ExplainRow]:
    """The row of a field that is a value, or a section that may be null."""
    if sections and _default_text(field) != "null":
        return []
    return [(key, _type_text(field), _default_text(field), _bound_text(field), field.description or "")]


def descriptions(section: BaseModel, prefix: str = "") -> dict[str, str]:
    """What every key of these settings is, by dotted key; a bare `kind` is what its section says of itself."""
    told: dict[str, str] = {}
    for name, field in type(section).model_fields.items():
        own = field.description or (type(section).__doc__ or "").splitlines()[0]
        told[f"{prefix}{name}"] = own
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            told |= descriptions(value, f"{prefix}{name}.")
        elif isinstance(value, dict):
            told |= {f"{prefix}{name}.{key}": own for key in value}
    return told


def _what_for(field: FieldInfo) -> str:
    sections = sections_of(field.annotation)
    text = field.description or (sections[0].__doc__ or "").splitlines()[0]
    return text if len(sections) == 1 else f"{text} ({', '.join(map(kind_of, sections))})"


def sections_of(annotation: Any) -> tuple[type[BaseModel], ...]:
    """Section classes inside an annotation: one for a plain section, several for a tagged union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return (annotation,)
    return tuple(section for part in get_args(annotation) for section in sections_of(part))


def kind_of(section: type[BaseModel]) -> str:
    """The value of `kind` that chooses a section, whether or not it is the field's default too; else its name."""
    field = section.model_fields.get("kind")
    if field is None:
        return section.__name__
    return str(get_args(field.annotation)[0] if field.is_required() else field.default)


def default_kind(field: FieldInfo | None) -> str | None:
    """The kind of a section that does not say it, where that has a default."""
    default = None if field is None else field.get_default(call_default_factory=True, validated_data={})
    return kind_of(type(default)) if isinstance(default, BaseModel) else None


def _type_text(field: FieldInfo) -> str:
    choices = [repr(choice) for choice in get_args(field.annotation) if isinstance(choice, (str, int))]
    return " | ".join(choices) if choices else _annotation_text(field.annotation)


def _annotation_text(annotation: Any) -> str:
    if isinstance(annotation, type) and not get_args(annotation):
        return {"NoneType": "null", "str": "text"}.get(
            annotation.__name__, annotation.__name__.removesuffix("Config").lower()
        )
    arguments = get_args(annotation)
    if getattr(annotation, "__metadata__", None):
        return _annotation_text(arguments[0])
    if getattr(annotation, "__origin__", None) is tuple:
        return f"list of {_annotation_text(arguments[0])}"
    return " | ".join(dict.fromkeys(_annotation_text(argument) for argument in arguments)) or str(annotation)


def _default_text(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True, validated_data={})
    if default is PydanticUndefined:
        return "(required)"
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]
    return str(list(default) if isinstance(default, tuple) else default)


def _bound_text(field: FieldInfo) -> str:
    """Bounds of a field, also of those inside unions, e.g. ">= 0, < 1"."""
    bounds: dict[str, None] = {}  # a dict keeps the order, and each bound once

    def collect(metadata: Any, annotation: Any) -> None:
        for item in metadata:
            inner = getattr(item, "metadata", [item])
            for bound in inner if isinstance(inner, list) else [item]:
                for name, sign in SIGNS.items():
                    if getattr(bound, name, None) is not None:
                        bounds[f"{sign} {getattr(bound, name)}"] = None
        for argument in get_args(annotation):
            collect(getattr(argument, "__metadata__", ()), argument)

    collect(field.metadata, field.annotation)
    return ", ".join(bounds)
