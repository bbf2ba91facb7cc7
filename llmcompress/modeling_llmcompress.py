"""Models whose decoder blocks differ in size, built from stock transformers classes. Part of a compressed checkpoint.

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

config.json says under `per_layer_config` what is different in which block, in the terms of its own architecture:

    {"3": {"intermediate_size": 1024},
     "7": {"num_attention_heads": 6, "num_key_value_heads": 2},
     "9": {"skip": ["mlp"]}}

`skip` names modules of a block that are gone. The class of any stock model is there under its name with the prefix
`PerLayer`, such as `PerLayerLlamaForCausalLM`. Needs transformers and torch, and nothing else.
"""

from typing import Any

import torch
import transformers
from torch import Tensor, nn

PREFIX = "PerLayer"


class PerLayer:
    """What makes a stock model one whose blocks differ: each is built again from the configuration of its own."""

    def __init__(self, config: Any, *args: Any, **options: Any) -> None:
        super().__init__(config, *args, **options)  # type: ignore[call-arg]  # of the stock class beside this one
        if getattr(config, "is_heterogeneous", False):
            blocks = decoder_blocks(self, config.num_hidden_layers)
            for index in range(config.num_hidden_layers):
                own = config.per_layer_config[index]
                own._attn_implementation = config._attn_implementation
                blocks[index] = type(blocks[index])(own, layer_idx=index)
                for name in own.skip:
                    setattr(blocks[index], name, Gone(attention="att" in name, layer_idx=index))

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: tensors have the names of the stock class, so its renaming of those in old checkpoints is wanted."""
        return False


class Gone(nn.Module):
    """In the place of an attention or an MLP that was removed: adds nothing to the residual stream."""

    def __init__(self, *, attention: bool, layer_idx: int) -> None:
        super().__init__()
        self.attention, self.layer_idx = attention, layer_idx

    def forward(self, hidden_states: Tensor, *args: Any, **options: Any) -> Any:
        """Zeros like hidden_states [batch, tokens, width]; an attention also tells the cache how many tokens passed."""
        nothing = torch.zeros_like(hidden_states)
        if not self.attention:
            return nothing
        cache = options.get("past_key_values", options.get("layer_past"))  # GPT-NeoX has another name for it
        if cache is not None:
            passed = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            cache.update(passed, passed, self.layer_idx)
        return nothing, None


def decoder_blocks(model: Any, count: int) -> nn.ModuleList:
    """The outermost list of `count` modules."""
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    return min(found, key=lambda item: item[0].count("."))[1]


def __getattr__(name: str) -> Any:
    """The class for a stock one, made when it is first asked for.

    It keeps the stock class's own name, by which transformers finds the renaming of tensors in older checkpoints.
    """
    stock = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if stock is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = type(stock.__name__, (PerLayer, stock), {"__module__": __name__})
    globals()[name] = made
    return made
