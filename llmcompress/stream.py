"""The stream: a model too large for memory, one decoder block at a time.

    model = StreamedModel(skeleton, architecture, read)
    hidden = model.embed(tokens)
    for block in stream_blocks(model, hidden):
        inputs = collect_inputs(block, ...)   # forward passes with hooks on the linears
        ...                                # replace weights in block.module
    logits = model.logits(hidden)

The stream knows neither methods nor formats. Peak memory is one block and the hidden states of all samples, whatever
the depth. Hidden states are kept in the dtype of the checkpoint and computed as the model itself would.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from llmcompress.arch import Architecture, Module, first, is_transposed
from llmcompress.errors import CalibrationError, FormatError
from llmcompress.heap import return_heap
from llmcompress.stats import InputGram, InputGramMean, InputMoments, Inputs, InputSizes, InputSquares

BATCH_TOKENS = 4096  # tokens of one forward pass: large enough for matrix units, small enough for memory

Read = Callable[[Iterable[str]], dict[str, Tensor]]
InputKind = type[InputGram] | type[InputSquares]
Sums = TypeVar("Sums", InputGram, InputGramMean, InputSquares, InputMoments, InputSizes, InputGram | InputSquares)
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Block:
    """A decoder block with its weights loaded, and what it is called with."""

    index: int
    name: str  # module path
    module: Module
    hidden: Tensor  # [samples, length, width]: the inputs of this block
    arguments: dict[int, Arguments]  # by batch size: what it is called with besides the hidden states

    def forward(self, rows: slice) -> Tensor:
        """Outputs for some samples, [n, length, width]; the weights are used as they are now."""
        x = self.hidden[rows].to(next(self.module.parameters()).device)
        args, kwargs = self.arguments[len(x)]
        with torch.no_grad():
            return first(self.module(x, *args, **kwargs))

    def batches(self) -> Iterator[slice]:
        """Samples that go through together."""
        yield from batches(self.hidden.shape[0], self.hidden.shape[1])


class StreamedModel:
    """A skeleton whose parameters come and go.

    model: parameters on the meta device, buffers real.  read: checkpoint tensors of these module parameter names.
    """

    def __init__(
        self, model: Module, architecture: Architecture, read: Read, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.model = model
        self.architecture = architecture
        self.read = read
        self.dtype = dtype
        self.device = device
        self.blocks = model.get_submodule(architecture.blocks)
        self.arguments: list[dict[int, Arguments]] = [{} for _ in self.blocks]

    def embed(self, tokens: Tensor) -> Tensor:
        """Inputs of the first block, [samples, length, width], for tokens [samples, length] int64.

        The model's own forward runs with every block replaced by the identity; what each block was called with
        (masks, rotary embeddings) is kept for `Block.forward`. It depends on the length only, as there is no padding.
        """
        with self._parameters(self._outside_blocks()):
            return torch.cat([self._embed_batch(tokens[rows]) for rows in batches(*tokens.shape)])

    def prepare(self, tokens: Tensor) -> None:
        """Only learn what blocks are called with; for a run that continues with stored hidden states."""
        by_size = {len(tokens[rows]): rows for rows in batches(*tokens.shape)}
        with self._parameters(self._outside_blocks()):
            for rows in by_size.values():
                self._embed_batch(tokens[rows])

    def load_block(self, index: int, hidden: Tensor) -> Block:
        """The block with its weights on the device."""
        module, name = self.blocks[index], self.architecture.block(index)
        fill(module, self.read, name + ".", self.device, self.dtype)
        return Block(index, name, module, hidden, self.arguments[index])

    def free_block(self, index: int) -> None:
        """Forget the weights of the block."""
        for name in [name for name, _ in self.blocks[index].named_parameters()]:
            release(self.blocks[index], name)
        return_heap()

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [n, length, vocabulary] for the last block's outputs [n, length, width], in the dtype of the model."""
        with self.head() as logits:
            return logits(hidden.to(self.device)).to("cpu")

    @contextmanager
    def head(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """A function from the last block's outputs [n, length, width] to logits [n, length, vocabulary], for a while.

        The model's own forward runs with every block returning what the function was given, so that the final norm,
        the head and whatever the model does to its logits are its own.
        """
        given: list[Tensor] = []

        def outputs(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return given[0]

        def logits(hidden: Tensor) -> Tensor:
            # Without token ids the model needs no embedding table, the largest tensor of all; what it gets is not used.
            unused = torch.zeros(*hidden.shape[:2], width, dtype=self.dtype, device=self.device)
            given[:] = [hidden]
            found: Tensor = self.model(inputs_embeds=unused, use_cache=False).logits
            return found

        with self._parameters(self._outside_blocks(head=True)), self._blocks_as(lambda index: outputs):
            width = self.model.get_input_embeddings().weight.shape[1]
            yield logits
            given.clear()

    def _embed_batch(self, tokens: Tensor) -> Tensor:
        """Inputs of the first block for tokens [n, length]; notes what every block was called with."""
        seen: list[Tensor] = []

        def identity(index: int) -> Callable[..., Tensor]:
            def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                self.arguments[index][len(tokens)] = (args, kwargs)
                seen.append(x)
                return x

            return forward

        body = getattr(self.model, self.model.base_model_prefix)
        with self._blocks_as(identity):
            body(tokens.to(self.device), use_cache=False)
        return seen[0].to("cpu")

    def _outside_blocks(self, *, head: bool = False) -> list[str]:
        """Parameters outside the blocks: with the head but without the embedding table, or the other way round."""
        inside = self.architecture.blocks + "."
        body = self.model.base_model_prefix + "."
        table = self.model.get_input_embeddings().weight
        tied = self.model.get_output_embeddings().weight is table
        return [
            name
            for name, parameter in self.model.named_parameters()
            if not name.startswith(inside)
            and (name.startswith(body) or head)
            and (parameter is not table or tied or not head)
        ]

    @contextmanager
    def _parameters(self, names: list[str]) -> Iterator[None]:
        """Real weights for some parameters, for a while."""
        tensors = self.read(names)
        for name in names:
            assign(self.model, name, checked(name, tensors.pop(name), self.dtype).to(self.device))
        self.model.tie_weights()
        for buffer in self.model.buffers():
            buffer.data = buffer.data.to(self.device)
        try:
            with torch.no_grad():
                yield
        finally:
            for name in names:
                release(self.model, name)
            self.model.tie_weights()

    @contextmanager
    def _blocks_as(self, forward: Callable[[int], Callable[..., Tensor]]) -> Iterator[None]:
        """Every block's forward replaced by `forward(index)`, for a while."""
        for index, block in enumerate(self.blocks):
            block.forward = forward(index)
        try:
            yield
        finally:
            for block in self.blocks:
                del block.forward


def stream_blocks(model: StreamedModel, hidden: Tensor, start: int = 0) -> Iterator[Block]:
    """Yield blocks in order from `start`, each fed by what came out of the changed blocks before it.

    hidden: [samples, length, width], the inputs of block `start`; overwritten. The caller must finish with a block
    before asking for the next: the generator then replays it to make the inputs of its successor.
    """
    for index in range(start, model.architecture.count):
        block = model.load_block(index, hidden)
        yield block
        for rows in block.batches():
            hidden[rows] = block.forward(rows).to(hidden.device)
        model.free_block(index)
        if not bool(hidden.isfinite().all()):
            raise CalibrationError(
                f"{block.name}: its output holds NaN or infinity on the calibration data; the model overflows "
                f"{str(model.dtype).removeprefix('torch.')} (try `dtype: bfloat16` or `float32`), or its weights are "
                "damaged"
            )


def collect_inputs(block: Block, kinds: Mapping[tuple[str, ...], InputKind]) -> dict[str, Inputs]:
    """The means of `collect`: one record for all linears that share an input."""
    sums = collect(block, kinds) if kinds else {}
    means: dict[str, Inputs] = {}
    for group in kinds:  # one at a time: a mean is as large as its sum, which goes at once
        total = sums[group[0]]
        for name in group:
            del sums[name]
        try:
            means |= dict.fromkeys(group, Inputs.of(total))
        except CalibrationError as exc:
            exc.add_note(f"in {block.name}.{group[0]}")
            raise
        del total
    return means


def collect(block: Block, kinds: Mapping[tuple[str, ...], type[Sums]]) -> dict[str, Sums]:
    """Statistics of the inputs of a block's linears, gathered once per group of linears that share an input.

    kinds: what to gather, by names of linears below the block. The result has one entry per linear; those of a group
    are the same object.
    """
    sums: dict[str, Sums] = {}
    hooks = []
    for names, kind in kinds.items():
        linear = block.module.get_submodule(names[0])
        total = kind(in_features(linear), next(linear.parameters()).device)
        sums |= dict.fromkeys(names, total)
        hooks.append(linear.register_forward_pre_hook(adding_to(total)))
    try:
        for rows in block.batches():
            block.forward(rows)
    finally:
        for hook in hooks:
            hook.remove()
    return sums


def adding_to(total: InputGram | InputSquares | InputMoments | InputSizes) -> Callable[[Module, tuple[Any, ...]], None]:
    """A hook that adds what a module is called with."""

    def hook(module: Module, args: tuple[Any, ...]) -> None:
        total.update(args[0])

    return hook


def checkpoint_module(stored: Mapping[str, list[str]], block: Block, linear: str) -> str:
    """Name in the checkpoint of a linear of a block; stored: parameter name -> its tensors there."""
    return stored[f"{block.name}.{linear}.weight"][0].removesuffix(".weight")


def oriented(block: Block, linear: str) -> Tensor:
    """The weight [out, in] of a linear, as it is in memory."""
    module = block.module.get_submodule(linear)
    weight: Tensor = module.weight.data
    return weight.T if is_transposed(module) else weight


def in_features(linear: Module) -> int:
    """Input features of a Linear or a Conv1D."""
    return linear.in_features if isinstance(linear, nn.Linear) else linear.weight.shape[0]


def batches(samples: int, length: int) -> Iterator[slice]:
    """Slices of about BATCH_TOKENS tokens."""
    step = max(1, BATCH_TOKENS // length)
    for start in range(0, samples, step):
        yield slice(start, min(start + step, samples))


def fill(module: Module, read: Read, prefix: str, device: torch.device, dtype: torch.dtype) -> None:
    """Give every parameter of `module` its tensor; the names that `read` knows start with `prefix`."""
    names = [name for name, _ in module.named_parameters()]
    tensors = read([prefix + name for name in names])
    for name in names:
        assign(module, name, checked(prefix + name, tensors.pop(prefix + name), dtype).to(device), prefix)
    for buffer in module.buffers():
        buffer.data = buffer.data.to(device)


def checked(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in `dtype`, if it is finite there."""
    converted = tensor.to(dtype)
    if not is_finite(converted):
        raise FormatError(
            f"{name}: the weights hold NaN or infinity in {str(dtype).removeprefix('torch.')}; try `dtype: float32` in "
            "the recipe, and if that fails too the checkpoint is damaged: fetch or save it again"
        )
    return converted


def is_finite(tensor: Tensor) -> bool:
    """Whether there is no NaN and no infinity; `isfinite().all()` would take more memory than the tensor itself."""
    return tensor.numel() == 0 or all(bool(end.isfinite()) for end in tensor.aminmax())  # a NaN is both ends


def assign(module: Module, name: str, tensor: Tensor, prefix: str = "") -> None:
    """Set the parameter `name` (a dotted path below `prefix`); its shape must be as the model says."""
    owner, _, leaf = name.rpartition(".")
    place = module.get_submodule(owner)
    expected = tuple(getattr(place, leaf).shape)
    if tuple(tensor.shape) != expected:
        raise FormatError(f"{prefix}{name}: shape {tuple(tensor.shape)} in the checkpoint, {expected} in the model")
    setattr(place, leaf, nn.Parameter(tensor, requires_grad=False))


def release(module: Module, name: str) -> None:
    """Put the parameter `name` back on the meta device."""
    owner, _, leaf = name.rpartition(".")
    place = module.get_submodule(owner)
    setattr(place, leaf, nn.Parameter(getattr(place, leaf).to("meta"), requires_grad=False))
