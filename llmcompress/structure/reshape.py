"""config.json of a model that has lost width or depth, in the terms that stock engines read.

Which key holds a size differs between architectures; the class of the config knows (`attribute_map`). Whether the keys
say enough is not assumed: `check_shapes` builds the smaller model without weights and compares every parameter with
what was cut out.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from llmcompress.arch import Heads, Module, skeleton
from llmcompress.errors import PlanError
from llmcompress.structure.groups import KV, MLP, QUERY

MLP_KEYS = ("intermediate_size", "ffn_dim", "n_inner")
REFUSED = "does not take its sizes from config.json alone"
DERIVED_HEADS = (
    "probably computes the size of a head from the width of the model, so that heads cannot be removed; use "
    "mlp_channel or block"
)


def narrower(config: Mapping[str, Any], model: Module, kind: str, kept: int) -> dict[str, Any]:
    """config.json after all but `kept` units of a kind are gone from every block; model: the one that it describes."""
    heads = Heads.of(model.config)
    if kind == MLP:
        key = next((key for key in MLP_KEYS if hasattr(model.config, key)), None)
        if key is None:
            raise PlanError(
                f"{type(model).__name__}: its config has none of {', '.join(MLP_KEYS)}, so its MLPs have one "
                "width; use block"
            )
        return edited(config, model, {key: kept})
    sizes = {"head_dim": heads.size}
    if kind == KV:
        sizes |= {"num_attention_heads": kept * (heads.query // heads.kv), "num_key_value_heads": kept}
    elif kind == QUERY:
        sizes |= {"num_attention_heads": kept * heads.kv, "num_key_value_heads": heads.kv}
    return edited(config, model, sizes)


def shallower(config: Mapping[str, Any], model: Module, kept: Sequence[int]) -> dict[str, Any]:
    """config.json after all blocks but those with these numbers are gone; settings by layer go with their layers."""
    count = model.config.num_hidden_layers
    changes: dict[str, Any] = {"num_hidden_layers": len(kept)}
    for key, value in {**config, "layer_types": getattr(model.config, "layer_types", None)}.items():
        if isinstance(value, list) and len(value) == count and ("layer" in key or "block" in key):
            changes[key] = [value[i] for i in kept]
    return edited(config, model, changes)


def edited(config: Mapping[str, Any], model: Module, changes: Mapping[str, Any]) -> dict[str, Any]:
    """config with some attributes changed, under the keys that its own architecture stores them."""
    names = getattr(model.config, "attribute_map", {})
    return {**config, **{names.get(key, key): value for key, value in changes.items()}}


def build_smaller(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], name: str, *, heads: bool = True
) -> Module:
    """The skeleton of the smaller model. Raises PlanError if stock code gives its parameters other shapes.

    shapes: of every parameter, by name, as cut.  name: of the model, for messages.  heads: whether heads went.
    """
    why = DERIVED_HEADS if heads else REFUSED
    model = stock_model(config, name, why)
    for parameter, tensor in model.named_parameters():
        if tuple(tensor.shape) != shapes.get(parameter):
            raise PlanError(
                f"{name}: {type(model).__name__} cannot have this shape: it wants {list(tensor.shape)} for "
                f"{parameter}, where {list(shapes.get(parameter, ()))} are left; it {why}"
            )
    return model


def stock_model(config: Mapping[str, Any], name: str, why: str) -> Module:
    """The skeleton that stock code makes of config.json, or a PlanError with `why`, which says what it does not do."""
    from transformers import AutoConfig

    try:
        return skeleton(AutoConfig.for_model(**config))
    except Exception as exc:  # configs are validated in many ways: the cause is shown
        raise PlanError(f"{name}: its stock code {why} ({' '.join(str(exc).split())[:200]})") from None
