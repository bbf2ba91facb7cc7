"""Gradients of a whole model's loss, one decoder block at a time: backpropagation through a stream.

Forward, the inputs of every block are written to disk. Then the loss of each window is taken back through the head, and
through block after block from the last to the first: each is loaded, run again on its stored inputs, and gives the
gradients of its weights and of its inputs, which are what the block before it needs.

    dL/dx_i = (dy_i/dx_i)ᵀ dL/dy_i          y_i = x_(i+1)

Memory holds one block, its statistics and one window's graph, whatever the depth; the disk holds one set of hidden
states per block. Everything is kept in float32, since sums of small products partly cancel; CPUs with bfloat16 matrix
units round the factors of products.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from llmcompress.arch import first, is_transposed
from llmcompress.checkpoint import read_tensors, write_tensors
from llmcompress.errors import CalibrationError
from llmcompress.stats import GradientMean, bfloat16_products
from llmcompress.stream import Block, StreamedModel, is_finite, stream_blocks

Sums = TypeVar("Sums", bound=GradientMean)


def stream_gradients(
    model: StreamedModel, tokens: Tensor, folder: Path, statistics: Callable[[Block], dict[str, Sums]]
) -> Iterator[tuple[Block, dict[str, Sums]]]:
    """Yield every block, last to first, with the statistics of its gradients over all windows.

    model: a float32 stream of the dense model.  tokens: [samples, length] int64.  folder: for hidden states; made here
    and removed at the end.  statistics: empty accumulators for some linears of a block, by name below it.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    hidden = model.embed(tokens)
    model.prepare(tokens[:1])  # windows go back one by one
    with bfloat16_products():
        for block in stream_blocks(model, hidden):
            write_tensors(folder / f"{block.index:05d}.safetensors", {"inputs": hidden})
        slopes = loss_gradients(model, hidden, tokens)
        del hidden
        for index in reversed(range(model.architecture.count)):
            path = folder / f"{index:05d}.safetensors"
            block = model.load_block(index, read_tensors(path)["inputs"])
            found = statistics(block)
            for row in range(len(tokens)):
                slopes[row] = backward(block, row, slopes[row], found)
            yield block, found
            model.free_block(index)
            path.unlink()
    shutil.rmtree(folder)


def loss_gradients(model: StreamedModel, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Gradient of each window's mean next-token loss with respect to what the last block puts out.

    hidden, returned: [samples, length, width] float32, written over.  tokens: [samples, length] int64.
    """
    with model.head() as logits_of, torch.enable_grad():
        for row in range(len(tokens)):
            x = hidden[row : row + 1].to(model.device).requires_grad_()
            logits = logits_of(x)[0, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits, tokens[row, 1:].to(model.device))
            hidden[row] = torch.autograd.grad(loss, x)[0][0].to(hidden.device)
    return hidden


def backward(block: Block, row: int, slope: Tensor, statistics: Mapping[str, GradientMean]) -> Tensor:
    """One window through a block and back: adds to the statistics, returns dL/dx [length, width].

    slope: dL/dy [length, width] of the block's output.
    """
    weights = {name: block.module.get_submodule(name).weight for name in statistics}
    x = block.hidden[row : row + 1].to(next(block.module.parameters()).device).requires_grad_()
    args, kwargs = block.arguments[1]
    with torch.enable_grad():
        for weight in weights.values():
            weight.requires_grad_()
        y = first(block.module(x, *args, **kwargs))
        gradients = torch.autograd.grad(y, [x, *weights.values()], slope[None].to(y.device))
    for name, gradient in zip(weights, gradients[1:], strict=True):
        if not is_finite(gradient):
            raise CalibrationError(
                f"{block.name}.{name}: the gradient of the loss holds NaN or infinity on window {row}; look at that "
                "text, or use a score without gradients"
            )
        statistics[name].update(gradient.T if is_transposed(block.module.get_submodule(name)) else gradient)
    return gradients[0][0].to(slope.device)
