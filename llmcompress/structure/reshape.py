"""config.json of a model that has lost width or depth, in the terms that stock engines read.

Which key holds a size differs between architectures; the class of the config knows (`attribute_map`). Whether the keys
say enough is not assumed: `build_smaller` builds the smaller model without weights and compares every parameter with
what was cut out.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from llmcompress.arch import Heads, Module, layer_config, skeleton
from llmcompress.errors import PlanError
from llmcompress.source import CODE, PREFIX
from llmcompress.structure.groups import ATTENTION_LAYER, KV, MLP, MLP_LAYER, QUERY, Group, modules_of

HEADS = (KV, QUERY)
SUBLAYERS = (ATTENTION_LAYER, MLP_LAYER)
BIAS_KEYS = {MLP: "mlp_bias", KV: "attention_bias", QUERY: "attention_bias"}
PER_LAYER = ("per_layer_config", "allow_global_per_layer_attribute_access", "auto_map")
MLP_KEYS = ("intermediate_size", "ffn_dim", "n_inner")
REFUSED = "does not take its sizes from config.json alone"
DERIVED_HEADS = (
    "probably computes the size of a head from the width of the model, so that heads cannot be removed; use "
    "mlp_channel or block"
)


def narrower(
    config: Mapping[str, Any], model: Module, kind: str, groups: Mapping[int, Group], widths: Mapping[int, int]
) -> dict[str, Any]:
    """config.json after every block keeps so many units of a kind; model: the one that it describes.

    Where blocks differ then, the sizes at the top are the largest, and `per_layer_config` says the others'.
    """
    count = model.config.num_hidden_layers
    own = {index: own_sizes(config, index) for index in range(count)}
    for index, group in groups.items():
        own[index] |= new_sizes(layer_config(model.config, index), type(model).__name__, group, widths[index])
    head = {"head_dim": Heads.of(model.config).size} if kind in HEADS else {}
    return settled(edited(config, model, head), model, own)


def new_sizes(config: Any, model: str, group: Group, kept: int) -> dict[str, Any]:
    """What a block's configuration says after all but `kept` units of a group are gone; config: its own."""
    heads = Heads.of(config)
    if group.kind == KV:
        return {"num_attention_heads": kept * (heads.query // heads.kv), "num_key_value_heads": kept}
    if group.kind == QUERY:
        return {"num_attention_heads": kept * heads.kv, "num_key_value_heads": heads.kv}
    if group.kind in SUBLAYERS:
        return {} if kept else {"skip": sorted({*getattr(config, "skip", []), *modules_of(group.linears)})}
    return {mlp_key(config, model): kept}


def mlp_key(config: Any, model: str) -> str:
    """What the width of an MLP is called."""
    key = next((key for key in MLP_KEYS if hasattr(config, key)), None)
    if key is None:
        raise PlanError(f"{model}: its config has none of {', '.join(MLP_KEYS)}, so its MLPs have one width; use block")
    return key


def own_sizes(config: Mapping[str, Any], index: int) -> dict[str, Any]:
    """What `per_layer_config` says of a block."""
    return dict(config.get("per_layer_config", {}).get(str(index), {}))


def settled(config: Mapping[str, Any], model: Module, own: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """config with the sizes of every block: at the top the largest, and block by block what differs from these.

    own: of every block, what was said of it; what was not is at the top of `model.config`.
    """
    stock = type(model).__name__.removeprefix(PREFIX)
    keys = sorted({key for sizes in own.values() for key in sizes} - {"skip"})
    known = {key: [sizes.get(key, getattr(model.config, key, None)) for sizes in own.values()] for key in keys}
    top = {key: max(size for size in sizes if size is not None) for key, sizes in known.items()}
    left = edited({key: value for key, value in config.items() if key not in PER_LAYER}, model, top)
    if "architectures" in config:
        left["architectures"] = [stock]
    differs: dict[str, dict[str, Any]] = {}
    for place, (index, sizes) in enumerate(own.items()):
        values = {key: known[key][place] for key in keys if known[key][place] not in (None, top[key])}
        values |= {"skip": sizes["skip"]} if sizes.get("skip") else {}
        differs |= {str(index): values} if values else {}
    if not differs:
        return left
    return left | {
        "architectures": [PREFIX + stock],
        "auto_map": {"AutoModelForCausalLM": f"{CODE.removesuffix('.py')}.{PREFIX}{stock}"},
        "allow_global_per_layer_attribute_access": True,  # stock code reads the sizes at the top
        "per_layer_config": differs,
    }


def bias_key(model: Module, kind: str) -> str | None:
    """The setting that gives the consumer of a kind's units a bias, where it has none yet."""
    key = BIAS_KEYS.get(kind, "")
    return key if getattr(model.config, key, None) is False else None


def with_biases(
    config: Mapping[str, Any], model: Module, kind: str, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """config with the setting switched on, and the shapes of the biases that it brings, by name; shapes: without."""
    from transformers import AutoConfig

    changed = {**config, str(bias_key(model, kind)): True}
    wanted = skeleton(AutoConfig.for_model(**changed)).named_parameters()
    return changed, {name: tuple(p.shape) for name, p in wanted if name not in shapes}


def shallower(config: Mapping[str, Any], model: Module, kept: Sequence[int]) -> dict[str, Any]:
    """config.json after all blocks but those with these numbers are gone; settings by layer go with their layers."""
    count = model.config.num_hidden_layers
    changes: dict[str, Any] = {"num_hidden_layers": len(kept)}
    for key, value in {**config, "layer_types": getattr(model.config, "layer_types", None)}.items():
        if isinstance(value, list) and len(value) == count and ("layer" in key or "block" in key):
            changes[key] = [value[i] for i in kept]
    if "per_layer_config" in config:
        own = {new: own_sizes(config, old) for new, old in enumerate(kept)}
        return settled(edited(config, model, changes), model, own)
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
