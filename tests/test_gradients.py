"""Gradients block by block: the same as backpropagation through the whole model, for every architecture."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, tiny_model
from tiny_runs import streamed

from llmcompress.arch import is_transposed
from llmcompress.errors import CalibrationError
from llmcompress.gradients import stream_gradients
from llmcompress.stats import GradientMean, GradientSquare


def whole_model(model: Any, tokens: torch.Tensor, names: list[str]) -> dict[str, torch.Tensor]:
    """Gradients [windows, out, in] of linears by plain autograd, window by window."""
    found: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for window in tokens:
        model.zero_grad()
        model(input_ids=window[None], labels=window[None], use_cache=False).loss.backward()
        for name, gradients in found.items():
            module = model.get_submodule(name)
            gradients.append((module.weight.grad.T if is_transposed(module) else module.weight.grad).clone())
    return {name: torch.stack(gradients) for name, gradients in found.items()}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_as_in_the_whole_model(kind, tmp_path: Path):
    model, tokens = tiny_model(kind), torch.randint(3, 128, (3, 24), generator=torch.Generator().manual_seed(0))
    stream = streamed(model)
    names = list(stream.architecture.at(0).linears)
    linears = [f"{stream.architecture.block(i)}.{name}" for i in (0, 1) for name in names]
    gradients: dict[str, torch.Tensor] = {}
    for statistic in (GradientMean, GradientSquare):

        def empty(block: Any, statistic: Any = statistic) -> dict[str, GradientMean]:
            return {
                n: statistic(torch.Size((x.out_features, x.in_features)))
                for n, x in stream.architecture.at(0).linears.items()
            }

        seen = []
        for block, found in stream_gradients(stream, tokens, tmp_path / "inputs", empty):
            seen.append(block.index)
            gradients = gradients or whole_model(model, tokens, linears)  # here, as products are exact meanwhile
            for name in names:
                expected = gradients[f"{block.name}.{name}"]
                expected = (expected.square() if statistic is GradientSquare else expected).mean(0)
                error = (found[name].mean - expected).norm() / expected.norm()
                assert error < 2e-2 if statistic is GradientSquare else error < 1e-2, (block.name, name)
        assert seen == [1, 0]
    assert not (tmp_path / "inputs").exists()


def test_a_gradient_that_is_not_finite_is_refused(tmp_path: Path):
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e38)
    stream = streamed(model)
    tokens = torch.randint(3, 128, (1, 16), generator=torch.Generator().manual_seed(0))

    def empty(block: Any) -> dict[str, GradientMean]:
        return {"self_attn.q_proj": GradientMean(torch.Size((96, 96)))}

    with pytest.raises(CalibrationError, match=r"gradient of the loss holds NaN or infinity on window 0"):
        list(stream_gradients(stream, tokens, tmp_path / "inputs", empty))
