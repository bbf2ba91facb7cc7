"""Activation thresholds at work: inputs of linears that are small count as zero, and their columns are not read.

    apply_thresholds(model, thresholds)     # what `llmcompress.load` does with a folder that has a threshold file

A token at the start of a text (the first `dense_tokens`, padding not counted) uses all weights: attention rests on
these, and they have the largest activations of all. Every other token computes with the masked input. One token alone,
as in decoding, goes through `llmcompress_kernels.teal_linear`, which reads the columns of kept inputs and no others.
For that a column must lie together in memory, so weights [out, in] get the strides of their transposes; values and
names do not change, and there is no second copy.

Linears of other kinds (packed weights, Conv1D) get the masked input and read all of their weight. The linears must be
called one by one: what fuses several into one operation has to leave those with thresholds alone.
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from llmcompress_kernels import teal_linear
from torch import Tensor, nn

from llmcompress.errors import FormatError, PlanError
from llmcompress.thresholds import FILE, Thresholds


class Tokens:
    """Which tokens of the forward pass that is under way are sparse; all linears of a model look here."""

    def __init__(self, dense: int, decoder: nn.Module) -> None:
        self.dense = dense  # tokens at the start of a text that use all weights
        self.signature = inspect.signature(decoder.forward)
        self.sparse = torch.zeros(1, 1, dtype=torch.bool)  # [batch, length]
        self.alone = False  # there is one token in all
        self.all_sparse = False  # then: whether it is sparse
        self.meter: Meter | None = None
        self.expected: set[str] = set()  # linears that have not been called yet

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A hook of the decoder, before its forward pass: looks at how many tokens come, and how many came before."""
        given = self.signature.bind_partial(*args, **kwargs).arguments
        ids = given.get("input_ids")
        ids = given["inputs_embeds"] if ids is None else ids
        batch, length = ids.shape[:2]
        cache = given.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        self.sparse = positions(given.get("attention_mask"), batch, past, length).to(ids.device) >= self.dense
        self.alone = batch * length == 1
        self.all_sparse = self.alone and bool(self.sparse)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A hook of the decoder, after a forward pass. Raises FormatError if a linear was never called."""
        if self.expected:
            raise FormatError(
                f"{FILE}: {min(self.expected)} was not called in a forward pass, so its threshold had no effect; load "
                "the model without what fuses it with others"
            )

    def note(self, name: str, x: Tensor, threshold: float) -> None:
        """A linear has been called with x [..., in]."""
        self.expected.discard(name)
        if self.meter:
            self.meter.add(name, x, threshold, self.sparse)


def positions(mask: Any, batch: int, past: int, length: int) -> Tensor:
    """The place of each token in its own text, [batch, length] int64: padding on the left is not the start of a text.

    mask: the decoder's; none, [batch, tokens] with 0 for padding, [batch, 1, length, entries] bool or added to scores,
    or one of these for each kind of layers.  past: tokens that came before.
    Raises PlanError for a mask of another kind.
    """
    if isinstance(mask, Mapping):
        known = [each for each in mask.values() if each is not None]
        found = [positions(each, batch, past, length) for each in known or [None]]
        return torch.stack(found).amax(0)  # a sliding window shows no more than its width
    if mask is None:
        return torch.arange(past, past + length).expand(batch, -1)
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= past + length:
        return mask.long().cumsum(1)[:, past : past + length] - 1
    if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[2] == length:
        shown = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        return shown[:, 0].sum(-1).expand(batch, -1) - 1
    shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    raise PlanError(
        f"{FILE}: an attention mask {shape} for {length} tokens after {past} does not tell where texts begin, whose "
        "first tokens use all weights; give one of [batch, tokens]"
    )


def masked(x: Tensor, threshold: float, sparse: Tensor) -> Tensor:
    """x [..., in] with zeros where |x| <= threshold in sparse tokens; sparse: bool [batch, length].

    NaN stays NaN. Raises FormatError where the tokens of x are not those of the forward pass.
    """
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) != sparse.numel():
        raise FormatError(
            f"{FILE}: a linear was called with {len(rows)} of {sparse.numel()} tokens; models that share tokens out "
            "over experts have no run-time sparsity here"
        )
    return rows.masked_fill((rows.float().abs() <= threshold) & sparse.reshape(-1, 1).to(x.device), 0).view(x.shape)


class SparseLinear(nn.Linear):
    """A linear that leaves out small inputs; its parameters are those of the linear that it takes the place of."""

    def __init__(self, linear: nn.Linear, name: str, threshold: float, tokens: Tokens) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        linear.weight.data = linear.weight.data.T.contiguous().T
        self.weight, self.bias = linear.weight, linear.bias
        self.name, self.threshold, self.tokens = name, threshold, tokens
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        self.tokens.note(self.name, x, self.threshold)
        if not self.tokens.alone:
            return nn.functional.linear(masked(x, self.threshold, self.tokens.sparse), self.weight, self.bias)
        return teal_linear(x, self.weight.T, self.threshold if self.tokens.all_sparse else 0.0, self.bias)

    def extra_repr(self) -> str:
        """For print(model)."""
        return f"{super().extra_repr()}, threshold={self.threshold:.4g}"


def apply_thresholds(model: Any, thresholds: Thresholds) -> Tokens:
    """Let a model that transformers has loaded leave out small inputs; returns what its linears look at.

    Raises FormatError if a linear that has a threshold is not there or has another size; then nothing has changed.
    """
    linears = {name: checked(model, name, each.in_features) for name, each in thresholds.modules.items()}
    decoder = model.get_submodule(decoder_of(linears))
    tokens = Tokens(thresholds.dense_tokens, decoder)
    tokens.expected |= linears.keys()
    decoder.register_forward_pre_hook(tokens.before, with_kwargs=True)
    decoder.register_forward_hook(tokens.after)
    for name, linear in linears.items():
        threshold = thresholds.modules[name].threshold
        if isinstance(linear, nn.Linear) and is_plain(linear):
            model.set_submodule(name, SparseLinear(linear, name, threshold, tokens))
        else:
            linear.register_forward_pre_hook(masking(tokens, name, threshold))
    return tokens


def masking(tokens: Tokens, name: str, threshold: float) -> Any:
    """A hook that masks the input of a linear of any kind."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        tokens.note(name, args[0], threshold)
        return (masked(args[0], threshold, tokens.sparse), *args[1:])

    return hook


def decoder_of(linears: Iterable[str]) -> str:
    """Path of the module that calls the decoder blocks: what comes before their list and its numbers."""
    path = next(iter(linears), "").split(".")
    numbers = [place for place, part in enumerate(path) if part.isdigit()]
    return ".".join(path[: numbers[0] - 1]) if numbers else ""


def is_plain(linear: nn.Module) -> bool:
    """Whether it computes with a dense weight of its own, and not with one that a library unpacks for it."""
    return type(linear) is nn.Linear and "weight" in linear._parameters and not hasattr(linear, "quantization_scheme")


def checked(model: nn.Module, name: str, in_features: int) -> nn.Module:
    """The linear of a name, if the file can be of this model."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise FormatError(f"{FILE}: the model has no module {name!r}; the file is of another model") from None
    size = getattr(module, "in_features", getattr(module, "nx", None))
    if size != in_features:
        raise FormatError(f"{FILE}: {name} has {size} inputs, and the file is of a model with {in_features} there")
    return module


class Meter:
    """Counts what sparse tokens leave out, linear by linear."""

    def __init__(self) -> None:
        self.left_out: dict[str, int] = {}
        self.seen: dict[str, int] = {}

    def add(self, name: str, x: Tensor, threshold: float, sparse: Tensor) -> None:
        """Count the inputs x [..., in] of one linear."""
        rows = x.reshape(-1, x.shape[-1])[sparse.reshape(-1).to(x.device)]
        self.left_out[name] = self.left_out.get(name, 0) + int((rows.float().abs() <= threshold).sum())
        self.seen[name] = self.seen.get(name, 0) + rows.numel()

    def shares(self) -> dict[str, float]:
        """Linear -> share of its input that was left out."""
        return {name: self.left_out[name] / seen for name, seen in self.seen.items() if seen}


@contextmanager
def measured(tokens: Tokens) -> Iterator[Meter]:
    """Count what is left out, for a while."""
    tokens.meter = meter = Meter()
    try:
        yield meter
    finally:
        tokens.meter = None


def weight_sizes(model: nn.Module, names: Mapping[str, Any]) -> dict[str, int]:
    """Weights of these linears; a dense one's `weight` has as many numbers."""
    return {name: model.get_parameter(f"{name}.weight").numel() for name in names}


def mean_share(shares: Mapping[str, float], sizes: Mapping[str, int]) -> float:
    """Share of all these linears' weights; 0.0 without any."""
    total = sum(sizes[name] for name in shares)
    return sum(share * sizes[name] for name, share in shares.items()) / total if total else 0.0
