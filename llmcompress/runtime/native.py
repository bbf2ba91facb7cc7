"""Folders that GPTQ and AWQ tools write in layouts of their own, read without their libraries.

Both keep 4-bit codes eight to a 32-bit word, with scales [in / g, out] and packed zeros:

    gptq   qweight int32 [in / 8, out]   along the input columns, first code in the lowest nibble
           qzeros  int32 [in / g, out / 8]   codes of 0.0, less one each in `gptq`, as they are in `gptq_v2`
           g_idx   int32 [in]   group of each column; out of order after act-order
    awq    qweight int32 [in, out / 8]   along the outputs, in nibble i of a word the output ORDER[i] of eight (`gemm`)
           qzeros  int32 [in / g, out / 8]   in the same order

Each linear is turned into the tensors of `pack-quantized`, which an operator takes, or else unpacked.
Formats: AutoGPTQ's and AutoAWQ's checkpoints, as GPTQModel documents them.
"""

from typing import Any

import torch
from llmcompress_kernels.int4_linear.layout import PLANES, from_words, to_words
from torch import Tensor, nn

from llmcompress.errors import FormatError
from llmcompress.runtime.linears import plain_linear
from llmcompress.runtime.operators import Shape, panels

INVERSE = [0, 4, 1, 5, 2, 6, 3, 7]  # nibble of each of eight outputs; the inverse of ORDER = 0 2 4 6 1 3 5 7
ONES = 0x11111111  # one in every nibble
LOW = 0x77777777  # the lower three bits of every nibble
EIGHTS = 0x88888888 - 2**32  # eight in every nibble, as int32
LAYOUTS = {("gptq", "gptq"), ("gptq", "gptq_v2"), ("awq", "gemm")}  # method and format


class NativeLinear(nn.Module):
    """A linear [out, in] as a GPTQ or AWQ file has it; exists only between loading and `accelerate`."""

    bias: nn.Parameter | None
    g_idx: nn.Parameter | None

    def __init__(self, linear: nn.Linear, layout: tuple[str, str], groups: int, leaves: set[str]) -> None:
        """groups: of scales; leaves: names of the tensors that the files have for this linear."""
        super().__init__()
        self.layout, dtype = layout, linear.weight.dtype
        self.shape: Shape = (linear.out_features, linear.in_features)
        out, columns = self.shape
        sizes = (columns // PLANES, out) if layout[0] == "gptq" else (columns, out // PLANES)
        self.qweight = placeholder(sizes, torch.int32)
        self.qzeros = placeholder((groups, out // PLANES), torch.int32)
        self.scales = placeholder((groups, out), dtype)
        self.g_idx = placeholder((columns,), torch.int32) if "g_idx" in leaves else None
        self.bias = placeholder((out,), dtype) if linear.bias is not None or "bias" in leaves else None

    @property
    def refusal(self) -> str | None:
        """Why no operator can take it."""
        return None if self.in_order() else "its columns are in an order of their own (act-order)"

    def in_order(self) -> bool:
        """Whether groups are neighbouring columns."""
        if self.g_idx is None:
            return True
        return torch.equal(self.g_idx.long(), groups_of(self.shape[1], self.scales.shape[0], self.g_idx.device))

    @torch.no_grad()  # a graph would keep the file's scales, and be more than torch.compile takes
    def tensors(self) -> dict[str, Tensor]:
        """The tensors of `pack-quantized`; zeros that are all 8 are left out."""
        if self.layout[0] == "gptq":
            packed, zeros = self.qweight.T.contiguous(), self.qzeros.data
            zeros = one_more(zeros) if self.layout[1] == "gptq" else zeros
        else:
            packed, zeros = repacked(self.qweight.data, self.shape), to_words(awq_codes(self.qzeros.data))
        tensors = {"weight_packed": packed, "weight_scale": self.scales.T.contiguous()}
        return tensors if bool((zeros == EIGHTS).all()) else tensors | {"weight_zero_point": zeros.T.contiguous()}

    @torch.no_grad()
    def unpacked(self) -> nn.Linear:
        """An ordinary linear with the same values."""
        out, columns = self.shape
        tensors = self.tensors()
        group = self.g_idx if self.g_idx is not None else groups_of(columns, len(self.scales), self.scales.device)
        zero_point = tensors.get("weight_zero_point")
        zeros = None if zero_point is None else from_words(zero_point.T, out)
        weight = self.scales.new_empty(self.shape)
        for rows in panels(self.shape):
            codes = from_words(tensors["weight_packed"][rows], columns).to(weight.dtype)
            zero = 8 if zeros is None else zeros[:, rows].T[:, group].to(weight.dtype)
            weight[rows] = (codes - zero) * self.scales[:, rows].T[:, group]
        return plain_linear(weight, self.bias)


def placeholder(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    """A tensor without content, for a loader to fill."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)


def groups_of(columns: int, groups: int, device: Any) -> Tensor:
    """Group of each column, where groups are neighbouring columns; [columns] int64."""
    return torch.arange(columns, device=device) // -(-columns // groups)


def one_more(words: Tensor) -> Tensor:
    """Every nibble of int32 words plus one, 15 becoming 0, as the tools that write `gptq` take it; none carries."""
    return ((words & LOW) + ONES) ^ (words & EIGHTS)


def awq_codes(words: Tensor) -> Tensor:
    """int32 [n, m / 8] -> uint8 [n, m], in the order of the outputs."""
    codes = from_words(words, words.shape[1] * PLANES)
    return codes.view(len(codes), -1, PLANES)[..., INVERSE].flatten(1)


def repacked(qweight: Tensor, shape: Shape) -> Tensor:
    """AWQ's codes [in, out / 8] as words along the columns: int32 [out, in / 8]."""
    parts = (qweight[:, rows.start // PLANES : -(-rows.stop // PLANES)] for rows in panels(shape))
    return torch.cat([to_words(awq_codes(part).T.contiguous()) for part in parts])


def layout_of(config: Any) -> tuple[str, str] | None:
    """Method and format of a GPTQ or AWQ config, if it is one that is read here; None otherwise."""
    method = str(getattr(config.quant_method, "value", config.quant_method))
    found = method, str(getattr(config.format, "value", config.format))
    return found if config.bits == 4 and found in LAYOUTS else None


def place_natives(
    model: nn.Module, sizes: dict[str, tuple[int, ...]], layout: tuple[str, str], group_size: int
) -> None:
    """Put placeholders where the files have packed linears.

    sizes: of all tensors of the files, by name.  group_size: of config.json, -1 for whole rows.
    Raises FormatError for what the files hold beyond linears, and for groups of another size than config.json's.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    modules = {name.removesuffix(".qweight") for name in sizes if name.endswith(".qweight")}
    if extra := sorted(n for n in sizes if n.endswith(".scales") and n.removesuffix(".scales") not in modules):
        raise FormatError(f"{extra[0]}: scales of something that is no linear; this folder needs its own library")
    for name in sorted(modules):
        known = [n for n in (name, name.removeprefix(prefix), prefix + name) if has_linear(model, n)]
        if not known:
            raise FormatError(f"{name}: is packed in the files, and no linear of this model; config.json is another's")
        linear = model.get_submodule(known[0])
        assert isinstance(linear, nn.Linear)
        groups = sizes.get(f"{name}.scales", (0,))[0]
        if groups == 0 or linear.out_features % PLANES or linear.in_features % PLANES:
            shape = [linear.out_features, linear.in_features]
            raise FormatError(f"{name}: {groups} groups of scales for a linear {shape}, expected multiples of 8")
        expected = -(-linear.in_features // group_size) if group_size > 0 else 1
        if groups != expected:
            raise FormatError(
                f"{name}: {groups} groups of scales for {linear.in_features} columns, expected {expected} by "
                f"config.json, which says group_size {group_size}: one of the two belongs to another model"
            )
        leaves = {leaf for leaf in ("g_idx", "bias") if f"{name}.{leaf}" in sizes}
        model.set_submodule(known[0], NativeLinear(linear, layout, groups, leaves))


def has_linear(model: nn.Module, name: str) -> bool:
    """Whether the model has an ordinary linear of this name."""
    try:
        return isinstance(model.get_submodule(name), nn.Linear)
    except AttributeError:
        return False
