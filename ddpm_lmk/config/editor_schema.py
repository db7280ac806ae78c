"""JSON schemas of settings files, for editors: completion, descriptions, and mistakes underlined while one types.

Made of the pydantic models, and as lenient as files are: a file may be a part (`extends` and `key=value` give the
rest), a section may leave its `kind` to its default or to what is extended, a number may stand for text, and one value
for a list of one where the model takes it. What settings exclude one another only loading says.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from ddpm_lmk.config.explain import explain, sections_of
from ddpm_lmk.config.run_file import RunConfig

DIALECT = "https://json-schema.org/draft/2020-12/schema"  # what pydantic writes
EXTENDS = {
    "description": "files that this one is laid over, relative to it, or shipped",
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
}
NOT_FOR_FILES = ("title", "discriminator", "required", "advanced")


def editor_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of files of this kind (RunConfig, SweepFile, LaunchFile), with `extends`."""
    schema = model.model_json_schema()
    definitions = schema.get("$defs", {})
    for section in dict.fromkeys(_sections(model)):
        definition = schema if section is model else definitions[section.__name__]
        _let_one_stand_for_a_list(section, definition["properties"])
        if "set" in section.model_fields:
            definition["properties"]["set"]["propertyNames"] = {"enum": _run_keys()}
    if "scales" in model.model_fields:  # a scale is a part of a sweep file, laid over the rest
        schema["properties"]["scales"] |= {"additionalProperties": {"$ref": "#"}, "patternProperties": {}}
    schema["properties"]["extends"] = EXTENDS
    return {"$schema": DIALECT, "title": model.__doc__} | _lenient(schema)


def _sections(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield model
    for field in model.model_fields.values():
        for section in sections_of(field.annotation):
            yield from _sections(section)


def _run_keys() -> list[str]:
    """Dotted keys of a run file, and the sections they are in."""
    keys = [row[0] for row in explain(RunConfig)]
    parts = [".".join(key.split(".")[:count]) for key in keys for count in range(1, key.count(".") + 2)]
    return sorted(dict.fromkeys(parts))


def _let_one_stand_for_a_list(section: type[BaseModel], properties: dict[str, Any]) -> None:
    """The validators that run before a field's own type are those that make a list of one value."""
    for validator in section.__pydantic_decorators__.field_validators.values():
        for name in validator.info.fields if validator.info.mode == "before" else ():
            field = properties[name]
            choices = field.pop("anyOf", None) or [{key: field.pop(key) for key in ("type", "items") if key in field}]
            field["anyOf"] = [*choices, *(choice["items"] for choice in choices if "items" in choice)]


def _lenient(node: Any) -> Any:
    """Without what only whole files have, and with numbers where text is wanted."""
    if isinstance(node, list):
        return [_lenient(item) for item in node]
    if not isinstance(node, dict):
        return node
    found: dict[str, Any] = {}
    for key, value in node.items():
        if key in ("properties", "$defs"):  # whose keys are names
            found[key] = {name: _lenient(item) for name, item in value.items()}
        elif key == "oneOf":  # without its `kind` a section may be several
            found["anyOf"] = _lenient(value)
        elif key in ("default", "const", "enum"):
            found[key] = value
        elif key not in NOT_FOR_FILES:
            found[key] = _lenient(value)
    if found.get("type") == "string" and not found.keys() & {"const", "enum"}:
        found["type"] = ["string", "number"]
    return found
