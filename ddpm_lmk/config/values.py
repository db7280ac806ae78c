"""What every section of a run file is made of: bounded numbers, durations, and frozen sections."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
# A key that is rarely set: `--explain` shows it only with --all, or where its section is asked for by name.
ADVANCED: dict[str, Any] = {"advanced": True}
Stage = Literal["pretrain", "finetune"]  # the command a task belongs to: without labels, or with them


def is_null(value: Any) -> bool:
    """Whether a setting is left out where it is written: a new one that is null, so that hashes of old runs stay."""
    return value is None


class Duration:
    """A length of training: `6000 steps`, `200 epochs` or `171000 images`; a bare number means steps."""

    UNITS = ("steps", "epochs", "images")
    WRITTEN = re.compile(r"\s*([0-9][0-9_]*(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?)\s*(step|epoch|image)?s?\s*")

    def __init__(self, count: float, unit: str = "steps") -> None:
        if unit not in self.UNITS:
            raise ValueError(f"unknown unit {unit!r}, wanted one of {', '.join(self.UNITS)}")
        if not 0 <= count < 1e15:  # above, a float no longer counts single steps; not a number fails too
            raise ValueError(f"a duration must be finite and not negative, found {count}")
        self.count, self.unit = count, unit

    @classmethod
    def parse(cls, value: Any) -> Duration:
        """Read `'200 epochs'`, `'1 epoch'`, `6000` or another Duration."""
        if isinstance(value, cls):
            return value
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return cls(value)
        match = cls.WRITTEN.fullmatch(str(value))
        if match is None:
            raise ValueError(f"{value!r} is not a duration; write e.g. '6000 steps', '200 epochs' or '171000 images'")
        return cls(float(match[1].replace("_", "")), (match[2] or "step") + "s")

    def steps(self, batch: int, num_images: int, steps_per_epoch: int | None = None) -> int:
        """Optimizer steps of global batches of `batch`, at least 1 unless zero; epochs of `steps_per_epoch` if given."""
        if self.unit == "steps":
            count = self.count
        elif self.unit == "images":
            count = self.count / batch
        else:
            count = self.count * (steps_per_epoch or num_images / batch)
        return 0 if count == 0 else max(1, round(count))  # half an epoch of a tiny set is still a step

    def __str__(self) -> str:
        return f"{self.count:g} {self.unit}" if self.count != int(self.count) else f"{int(self.count)} {self.unit}"

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Duration) and (self.count, self.unit) == (other.count, other.unit)

    def __hash__(self) -> int:
        return hash((self.count, self.unit))

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(cls.parse, serialization=core_schema.to_string_ser_schema())

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        # The bound is for numbers, which editors' schemas let stand for any text.
        text = {"type": "string", "minimum": 0, "pattern": f"^(?:{cls.WRITTEN.pattern})$"}
        examples = ["6000 steps", "200 epochs"]
        return {"anyOf": [{"type": "number", "minimum": 0}, text], "examples": examples}


class Section(BaseModel):
    """A part of a run file: frozen, unknown keys refused, a number taken as text where the field is text."""

    # Numbers become text where text is wanted: folders and splits are often called 2024 or 0.
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), coerce_numbers_to_str=True)
