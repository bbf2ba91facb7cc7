"""Calibration data: windows of tokens, packed without padding, the same ones for the same seed.

The rows of a source are joined, tokenized once and cut into windows of `length` tokens; `samples` of them are drawn
without replacement and kept in order. Padding would teach the statistics about padding, and one row per window would
teach them about beginnings only. A tokenizer that begins every text with a BOS token has it at the head of every window
too, in place of one token of text, as evaluation does: some models compute nonsense without it.

A mix draws from each source in proportion to its weight; the counts add up to `samples` exactly.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator, model_validator

from llmcompress.errors import CalibrationError
from llmcompress.options import Options
from llmcompress.text import DataSource, Text, load_text

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Calibration", "CalibrationOptions", "DataSource", "Text", "load_calibration", "load_text"]

CHARACTERS_PER_TOKEN = 32  # text read from big sources, per token needed: about eight times what English takes


class CalibrationOptions(Options):
    """Text that methods gather statistics on: `samples` windows of `length` tokens, packed, without padding."""

    data: str | list[DataSource]  # a list is a weighted mix
    name: str | None = None  # this and the next four: as in a source; not next to a list
    revision: str | None = None
    split: str = "train"
    column: str | None = None
    weight: float = Field(1.0, gt=0)
    samples: int = Field(128, ge=1)
    length: int = Field(512, ge=2)  # tokens per sample
    seed: int = Field(0, ge=0)

    @field_validator("data", mode="before")
    @classmethod
    def parse_sources(cls, value: Any) -> Any:
        """Make each entry of a mix a record of its own, so that a bad key is named with its place."""
        if isinstance(value, list):
            if not value:
                raise ValueError("expected at least one source")
            return [
                item if isinstance(item, DataSource) else DataSource.parse(item, f"calibration.data[{i}]")
                for i, item in enumerate(value)
            ]
        if not isinstance(value, str):
            raise ValueError("expected a name, a path or a list of sources")
        return value

    @model_validator(mode="after")
    def refuse_options_beside_a_mix(self) -> "CalibrationOptions":
        """With a list of sources, options of a source belong inside it."""
        given = (self.model_fields_set & DataSource.model_fields.keys()) - {"data"}
        if isinstance(self.data, list) and given:
            raise ValueError(f"{', '.join(sorted(given))} beside a list of sources; set it inside each source")
        return self

    def sources(self) -> list[DataSource]:
        """The mix as a list, a single source included."""
        if isinstance(self.data, list):
            return self.data
        given = self.model_fields_set & DataSource.model_fields.keys()
        return [DataSource(**{key: getattr(self, key) for key in given})]


@dataclass(frozen=True, eq=False, slots=True)
class Calibration:
    """The tokens of a run, and where they came from."""

    tokens: "Tensor"  # [samples, length] int64
    sha256: str  # of the tokens as little-endian int64
    sources: list[dict[str, Any]]  # {"data", "revision", "split", "rows"} as results.json has them


def load_calibration(options: CalibrationOptions, tokenizer: Any) -> Calibration:
    """Read, tokenize, cut and draw; the same options, data and tokenizer give the same tokens.

    tokenizer: of the model, as transformers loads it.
    Raises CalibrationError: data not found, a column missing, or too little text for `samples` windows of `length`.
    """
    import torch

    sources = options.sources()
    shares = split_samples(options.samples, [source.weight for source in sources])
    generator = torch.Generator().manual_seed(options.seed)
    drawn, records = [], []
    for source, share in zip(sources, shares, strict=True):
        if share == 0:
            raise CalibrationError(
                f"{source.data}: its weight {source.weight:g} gives it none of {options.samples} samples; "
                "raise the weight or `samples`, or remove it"
            )
        text, windows = _windows(source, tokenizer, share, options)
        drawn.append(draw_windows(windows, share, generator))
        records.append({"data": source.data, "revision": text.revision, "split": text.split, "rows": len(text.rows)})
    tokens = torch.cat(drawn)
    return Calibration(tokens, tokens_sha256(tokens), records)


def split_samples(samples: int, weights: Sequence[float]) -> list[int]:
    """Share `samples` in proportion to `weights` by largest remainder: they add up, and none is off by one."""
    total = sum(weights)
    exact = [samples * weight / total for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: samples - sum(counts)]:
        counts[i] += 1
    return counts


def cut_windows(tokens: Sequence[int], length: int, head: Sequence[int] = ()) -> "Tensor":
    """Cut tokens into whole windows [n, length] int64, each led by `head`; what does not fill a window is left over."""
    import torch

    step = length - len(head)
    count = len(tokens) // step
    body = torch.tensor(tokens[: count * step], dtype=torch.int64).view(count, step)
    return torch.cat([torch.tensor(list(head), dtype=torch.int64).expand(count, -1), body], dim=1)


def draw_windows(windows: "Tensor", count: int, generator: "torch.Generator") -> "Tensor":
    """`count` different rows of windows [n, length], n >= count, in their order."""
    import torch

    chosen = torch.randperm(len(windows), generator=generator)[:count].sort().values
    return windows[chosen]


def tokens_sha256(tokens: "Tensor") -> str:
    """Fingerprint of a token tensor: sha256 over its values as little-endian int64, row by row."""
    return hashlib.sha256(tokens.cpu().numpy().astype("<i8").tobytes()).hexdigest()


def leading_token(tokenizer: Any) -> list[int]:
    """The BOS token, if the tokenizer puts one in front of every text."""
    first: list[int] = tokenizer("")["input_ids"][:1]
    return first if first and first[0] == tokenizer.bos_token_id else []


def _windows(source: DataSource, tokenizer: Any, needed: int, options: CalibrationOptions) -> tuple[Text, "Tensor"]:
    """All windows of a source, or of enough of its documents; raises CalibrationError if there are too few."""
    head = leading_token(tokenizer)
    characters = CHARACTERS_PER_TOKEN * needed * options.length
    while True:
        text = load_text(source, tokenizer, characters=characters, seed=options.seed)
        tokens = tokenizer(text.joined, add_special_tokens=False, verbose=False)["input_ids"]
        windows = cut_windows(tokens, options.length, head)
        if len(windows) >= needed:
            return text, windows
        if text.complete:
            break
        characters *= 4
    if len(windows) == 0:
        found = f"its {len(tokens)} tokens do not fill one window of {options.length}; lower `length`"
    else:
        found = (
            f"its {len(tokens)} tokens fill {len(windows)} windows of {options.length}, {needed} were asked for; "
            "lower `samples` or `length`"
        )
    raise CalibrationError(f"{source.data}: too little text: {found}, or give more text")
