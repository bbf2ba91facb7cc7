"""What a step minimizes: the losses of its recipe, weighted, on windows of text."""

from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.arch import find_blocks, first
from llmcompress.training.losses import cross_entropy, distillation, hidden_error
from llmcompress.training.step import Train
from llmcompress.training.teacher import Lessons


class TextLoss:
    """The weighted sum of a recipe's losses on some windows."""

    def __init__(self, options: Train, windows: Tensor, lessons: Lessons) -> None:
        self.options, self.windows, self.lessons = options, windows, lessons

    def __call__(self, model: Any, rows: Tensor) -> Tensor:
        """For windows [n] int64, with its graph."""
        tokens, weights = self.windows[rows].to(next(model.parameters()).device), self.options.loss
        seen: list[Tensor] = []
        wanted = "hidden" in weights
        hook = last_block(model).register_forward_hook(lambda m, a, o: seen.append(first(o))) if wanted else None
        try:
            logits = model(tokens, use_cache=False).logits
        finally:
            if hook:
                hook.remove()
        total = torch.zeros((), device=logits.device)
        if "cross_entropy" in weights:
            total = total + weights["cross_entropy"] * cross_entropy(logits, tokens)
        if self.options.has_teacher:
            taught = self.lessons.read(rows, logits.device)
            if "distillation" in weights:
                total = total + weights["distillation"] * distillation(logits, taught, self.options.temperature)
            if "hidden" in weights:
                total = total + weights["hidden"] * hidden_error(seen[-1], taught)
        return total


def last_block(model: Any) -> nn.Module:
    """The last decoder block, however the model is wrapped."""
    inner = getattr(model, "module", model)
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    blocks: Any = find_blocks(inner)[1]
    return blocks[-1]
