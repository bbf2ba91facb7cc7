"""The recipe: what to do, in YAML; strict, frozen and known by its fingerprint.

    model: smollm2-135m
    calibration: {data: boolq-calibration, samples: 128, length: 512}
    steps:
      - method: gptq
        bits: 4
        group_size: 64
    output: {format: pack-quantized}
"""

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from llmcompress.errors import RecipeError
from llmcompress.formats import FORMATS
from llmcompress.methods import METHODS, Method
from llmcompress.options import Options

BYTES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


class DataSource(Options):
    """One source of text: a Hub dataset, a local .txt, .raw, .jsonl or .parquet file, or a name from `list datasets`."""

    data: str
    name: str | None = None          # configuration of a Hub dataset
    revision: str | None = None      # of a Hub dataset; resolved to a commit in the manifest
    split: str = "train"
    column: str | None = None        # default: "text", or "messages" through the chat template
    weight: float = Field(1.0, gt=0)  # share of the samples, relative to the other sources of a mix


class Calibration(DataSource):
    """Text that methods gather statistics on: `samples` windows of `length` tokens, packed, without padding."""

    data: str | list[DataSource]     # type: ignore[assignment]  # a list is a weighted mix
    samples: int = Field(128, ge=1)
    length: int = Field(512, ge=2)   # tokens per sample
    seed: int = 0

    def sources(self) -> list[DataSource]:
        """The mix as a list, a single source included."""
        if isinstance(self.data, list):
            return self.data
        return [DataSource(**self.model_dump(include=set(DataSource.model_fields)))]


class Step(Options):
    """One method on the linears whose module names match `targets` (globs)."""

    method: Annotated[Method, Field()]
    name: str                        # the key in METHODS
    targets: list[str] = ["*"]

    model_config = {"arbitrary_types_allowed": True}


class Output(Options):
    """How the result is stored."""

    format: str = "auto"             # a key of FORMATS; "auto": the smallest that stock engines load

    @field_validator("format")
    @classmethod
    def known(cls, value: str) -> str:
        if value != "auto" and value not in FORMATS:
            raise ValueError(f"unknown format; known: auto, {', '.join(FORMATS)}")
        return value


class Evaluate(Options):
    """Scores taken on the reloaded checkpoint, and on the base model for comparison."""

    suite: str = "quick"             # evals/suites/<suite>.yaml, or a path


class Publish(Options):
    """Where the finished folder goes."""

    repo_id: str
    private: bool = True


class Recipe(Options):
    """The whole recipe."""

    model: str
    revision: str | None = None
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    device: str = "auto"             # "auto": cuda when there is one, else cpu
    max_memory: int | None = None    # bytes of host memory the run may use; YAML takes "8GiB"
    trust_remote_code: bool = False
    calibration: Calibration | None = None
    steps: list[Any] = Field(min_length=1)
    keep: list[str] = ["lm_head"]    # globs on module names that are left alone on purpose
    output: Output = Output()
    evaluate: Evaluate | None = None
    publish: Publish | None = None
