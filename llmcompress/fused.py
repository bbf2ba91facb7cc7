"""Parameters that a model fuses from several checkpoint tensors, or names differently: experts, above all.

Transformers keeps, per model type, the renamings and merges that turn a checkpoint into a model. They are used here as
they are, for the parameters that no tensor of the checkpoint matches by name. What is fused is never compressed, only
loaded to run the block; the checkpoint's own tensors are passed on untouched.
"""

import copy
from collections.abc import Iterable
from typing import Any

from llmcompress.lazy import Tensor

Module = Any  # an nn.Module; what attributes a model has, no type checker can know


def fused_sources(model: Module, stored: Iterable[str]) -> dict[str, list[str]]:
    """Parameter -> the checkpoint tensors that make it, for every tensor that transformers renames or merges."""
    from transformers.core_model_loading import rename_source_key

    renamings, converters = transforms(model)
    known = dict(model.named_parameters())
    sources: dict[str, list[str]] = {}
    for key in sorted(stored, key=natural):  # the order in which experts are stacked
        target, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
        if target in known and target != key:
            sources.setdefault(target, []).append(key)
    return sources


def fuse(model: Module, parameter: str, tensors: dict[str, Tensor]) -> Tensor:
    """The parameter from its checkpoint tensors, by their names."""
    from transformers.core_model_loading import rename_source_key

    renamings, converters = transforms(model)
    known = dict(model.named_parameters())
    for key, tensor in tensors.items():
        target, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
        if pattern is None:
            return tensor
        chosen = next(c for c in converters if pattern in c.source_patterns)
        chosen.add_tensor(target, key, pattern, lambda tensor=tensor: tensor)
    made = chosen.convert(parameter, model=model, config=model.config)
    found = made[parameter]
    return found[0] if isinstance(found, list) else found


def natural(name: str) -> list[str | int]:
    """Sort key under which expert 10 comes after expert 9."""
    return [int(part) if part.isdigit() else part for part in name.split(".")]


def transforms(model: Module) -> tuple[list[Any], list[Any]]:
    """Fresh renamings and converters of a model's type."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    mapping = copy.deepcopy(get_model_conversion_mapping(model))
    converters = [transform for transform in mapping if isinstance(transform, WeightConverter)]
    return [transform for transform in mapping if transform not in converters], converters
