"""Options of a structure step: what goes, by which score, how much, and what makes up for it.

- structure: mlp_channel
  score: taylor                # or {method: taylor, order: mixed}
  ratio: 0.2                   # of the model's parameters, unless `of` says otherwise
  multiple: 128
  compensate: least_squares
- structure: mlp_channel
  zeros: true                  # instead of a score and a budget: what training has left at zero
"""

import difflib
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from llmcompress.errors import RecipeError
from llmcompress.options import Options, parse_bytes
from llmcompress.structure.scores import BLOCK_SCORES, CHANNEL_SCORES, UNIT_SCORES, BlockScore, ChannelScore, UnitScore

Denominator = Literal["model", "decoder", "group"]
BUDGETS = ("ratio", "parameters", "bytes", "zeros")
ZEROS = {"score": "magnitude", "widths": "global", "compensate": "none"}  # what follows from `zeros`


class Structure(Options):
    """What all structure steps have: a budget and rounds."""

    score: Any
    ratio: float | None = Field(None, gt=0, lt=1, description="share of `of` to remove")
    parameters: int | None = Field(None, gt=0, description="parameters of `of` that stay")
    bytes: int | None = Field(None, gt=0, description="bytes of `of` that stay, in the recipe's dtype; such as 200MiB")
    of: Denominator = Field("model", description="what the budget is a share of: model, decoder or group")
    rounds: int = Field(1, ge=1, le=100, description="score, remove a part, and score again, so many times")

    @field_validator("bytes", mode="before")
    @classmethod
    def _size(cls, value: Any) -> Any:
        return parse_bytes(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        *known, last = [name for name in BUDGETS if name in type(self).model_fields]
        given = [name for name in (*known, last) if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"expected one of {', '.join(known)} and {last}, found {' and '.join(given) if given else 'none'}"
            )
        return self


class Blockwise(Structure):
    """What structures have whose units belong to one block."""

    protect_first: int = Field(0, ge=0, description="blocks at the start that stay as they are")
    protect_last: int = Field(0, ge=0, description="blocks at the end that stay as they are")


class OfUnits(Blockwise):
    """What structures have whose units are coupled rows and columns."""

    zeros: Literal[True] | None = Field(
        None, description="instead of a score and a budget: exactly the units that are zero go, which changes no output"
    )

    @model_validator(mode="before")
    @classmethod
    def _zeros(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("zeros") is not True:
            return values
        if settled := [name for name in (*ZEROS, "rounds") if name in values]:
            raise ValueError(f"with `zeros` there is nothing to choose, so leave out `{settled[0]}`")
        return {name: value for name, value in ZEROS.items() if name in cls.model_fields} | values


class Width(OfUnits):
    """Options of `structure: mlp_channel`, `kv_group` and `query_head`: blocks become narrower."""

    fewest: ClassVar[int] = 1  # units that stay in every block

    score: UnitScore
    widths: Literal["uniform", "global"] = Field(
        "uniform", description="the same in every block, or by one ranking of the units of all blocks"
    )
    multiple: int = Field(1, ge=1, description="widths are multiples of this; kernels like 64 or 128")
    compensate: Literal["least_squares", "mean", "none"] = Field(
        "least_squares", description="how the kept weights make up for the removed ones"
    )

    @field_validator("score", mode="before")
    @classmethod
    def _score(cls, value: Any) -> Any:
        return parse_score(value, UNIT_SCORES)


class Sublayer(OfUnits):
    """Options of `structure: attention` and `mlp`: some blocks lose theirs, and pass on what comes in."""

    fewest: ClassVar[int] = 0
    widths: ClassVar[str] = "global"
    multiple: ClassVar[int] = 1
    compensate: ClassVar[str] = "none"

    score: UnitScore

    @field_validator("score", mode="before")
    @classmethod
    def _score(cls, value: Any) -> Any:
        return parse_score(value, {name: score for name, score in UNIT_SCORES.items() if not score.within_block})


class Depth(Blockwise):
    """Options of `structure: block`: some blocks go as a whole."""

    score: BlockScore

    @field_validator("score", mode="before")
    @classmethod
    def _score(cls, value: Any) -> Any:
        return parse_score(value, BLOCK_SCORES)


class Hidden(Structure):
    """Options of `structure: hidden`: the residual stream of the whole model becomes narrower."""

    score: ChannelScore
    multiple: int = Field(1, ge=1, description="hidden sizes are multiples of this; kernels like 64 or 128")

    @field_validator("score", mode="before")
    @classmethod
    def _score(cls, value: Any) -> Any:
        return parse_score(value, CHANNEL_SCORES)


def parse_score(value: Any, table: dict[str, Any]) -> Any:
    """A score from its name, or from a mapping with `method` and its options."""
    options = {"method": value} if isinstance(value, str) else dict(value) if isinstance(value, dict) else {}
    name = options.pop("method", None)
    if name not in table:
        close = difflib.get_close_matches(str(name), table, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown score {name!r}{hint} (known: {', '.join(table)})")
    try:
        return table[name].parse(options, name)
    except RecipeError as exc:
        raise ValueError(str(exc)) from None
