"""From a source to a model without weights, with what it is made of."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from llmcompress.arch import Architecture, discover, random_model, skeleton
from llmcompress.errors import LLMCompressError, SourceError
from llmcompress.source import ModelSource

Built = tuple[Any, Architecture]

UNBUILDABLE = "transformers cannot build a model from its config.json"


def build(source: ModelSource, dtype: torch.dtype, *, trust_remote_code: bool = False) -> Built:
    """The model without its weights, and what it is made of; needs no more of the source than its config.json.

    dtype: of its parameters.
    """
    from transformers import AutoConfig

    with stock_errors(source, UNBUILDABLE):
        foreign = trust_remote_code and source.needs_remote_code
        if foreign and source.folder:  # the class of the configuration may be code in the folder
            config = AutoConfig.from_pretrained(
                str(source.folder), local_files_only=True, trust_remote_code=trust_remote_code
            )
        else:  # and not that of the folder, which an earlier stage of the plan may be going to change
            config = AutoConfig.for_model(**source.config)
        model = skeleton(config, dtype, trust_remote_code=trust_remote_code)
    return model, discover(model)


def build_random(source: ModelSource, seed: int) -> Any:
    """The model in float32 with the random weights that its class begins with, the same ones for the same seed."""
    from transformers import AutoConfig

    with stock_errors(source, UNBUILDABLE):
        return random_model(AutoConfig.for_model(**source.config), seed)


@contextmanager
def stock_errors(source: ModelSource, what: str) -> Iterator[None]:
    """Say in one message what transformers makes of files that somebody else wrote."""
    try:
        yield
    except LLMCompressError:
        raise
    except Exception as exc:  # it raises whatever its many loaders happen to: the cause is kept and shown
        raise SourceError(
            f"{source.name}: {what}: {' '.join(str(exc).split())[:300] or type(exc).__name__}; check the files in "
            f"{source.folder}, or fetch the model again"
        ) from exc
