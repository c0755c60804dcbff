"""What every section of the configuration is made of."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Section(BaseModel):
    """A frozen part of the tree that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Duration(Section):
    """A length of training: `count` of `unit`. Written "500 steps", "2 epochs" or "10000 examples"."""

    count: float = Field(ge=0)
    unit: Literal["epochs", "steps", "examples"]

    def steps(self, steps_per_epoch: int, batch_size: int) -> int:
        """The number of optimizer steps, rounded to the nearest; at least 1 unless the count is 0."""
        per_unit = {"epochs": float(steps_per_epoch), "steps": 1.0, "examples": 1.0 / batch_size}[self.unit]
        return max(round(self.count * per_unit), 1 if self.count > 0 else 0)


def _read_duration(value: Any) -> Any:
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9.eE+]+)\s*(epoch|step|example)s?\s*", value)
        if not match:
            raise ValueError('write it as "500 steps", "2 epochs" or "10000 examples"')
        return {"count": float(match[1]), "unit": match[2] + "s"}
    if isinstance(value, int | float) and not isinstance(value, bool):
        return {"count": float(value), "unit": "steps"}
    return value


SomeDuration = Annotated[Duration, BeforeValidator(_read_duration)]
