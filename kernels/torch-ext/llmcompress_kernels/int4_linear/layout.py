"""Where the bits of an int4 weight lie: from the words of `pack-quantized` to those of the kernels, and back exactly.

Stored (compressed-tensors): a word of row n holds the codes of eight neighbouring columns, lowest nibble first. A
kernel that reads such words has to shuffle either weights or activations before it can multiply. So the kernels' words
hold columns that are 16 apart. For a weight [out, in] with groups of g columns:

    words  int32  [ceil(in / 128), out, 16]   tile t of row n is 128 columns, in 16 words that lie together (64 bytes);
                                              nibble i of word j is the code of column 128 t + 16 i + j
    scale  bf16 or fp16  [in / g, out]
    zero   uint8  [in / g, out]               the code of 0.0; absent means 8 everywhere

    weight[n, k] = (code[n, k] - zero[k // g, n]) * scale[k // g, n]

The nibbles i of a tile row are a *plane*: 16 neighbouring columns, one step of a tensor core, and never of two groups.
Rows of a tile follow each other, so a program that makes 64 outputs reads one run of 4096 bytes. Columns beyond `in`,
which exist if it is no multiple of 128, have code 0; kernels multiply them by zeros.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import DEVICES, FLOATS, check_dtype, check_shape, refuse_unless

GROUPS = (32, 64, 128)  # columns per scale
PLANES = 8  # nibbles of a word
WIDTH = 16  # words per row and tile
TILE = PLANES * WIDTH  # columns


class Int4Weight(NamedTuple):
    """An int4 weight in the layout of the kernels; the shapes are in the module's docstring."""

    words: Tensor
    scale: Tensor
    zero: Tensor | None


def tensors_of(weight: Int4Weight, bias: Tensor | None, prefix: str = "") -> list[tuple[str, Tensor | None]]:
    """Names, as arguments of an operator, and tensors of a weight and its bias."""
    tensors = {"words": weight.words, "scale": weight.scale, "zero": weight.zero, "bias": bias}
    return [(prefix + name, tensor) for name, tensor in tensors.items()]


def check_linear(operator: str, x: Tensor, weight: Int4Weight, bias: Tensor | None, prefix: str = "") -> None:
    """Raises ValueError if dtypes or shapes of x [..., in], a weight [out, in] and a bias [out] do not fit together.

    prefix: of the names that the operator gives to the tensors of this weight.
    """
    words_name, scale_name, zero_name, bias_name = (name for name, _ in tensors_of(weight, bias, prefix))
    words, scale, zero = weight
    check_dtype(operator, "x", x, *FLOATS)
    check_dtype(operator, words_name, words, torch.int32)
    check_dtype(operator, scale_name, scale, x.dtype)
    refuse_unless(x.dim() > 0, operator, "x", "a scalar", "a tensor [..., in]")
    refuse_unless(words.dim() == 3, operator, words_name, list(words.shape), "a tensor [ceil(in / 128), out, 16]")
    refuse_unless(scale.dim() == 2, operator, scale_name, list(scale.shape), "a tensor [in / group, out]")
    columns, out, groups = x.shape[-1], words.shape[1], scale.shape[0]
    fits = groups > 0 and columns % groups == 0 and columns // groups in GROUPS
    refuse_unless(fits, operator, scale_name, f"{groups} groups of {columns} columns", f"groups of {GROUPS} columns")
    check_shape(operator, words_name, words, -(-columns // TILE), out, WIDTH)
    check_shape(operator, scale_name, scale, groups, out)
    if zero is not None:
        check_dtype(operator, zero_name, zero, torch.uint8)
        check_shape(operator, zero_name, zero, groups, out)
    if bias is not None:
        check_dtype(operator, bias_name, bias, x.dtype)
        check_shape(operator, bias_name, bias, out)


def fits(x: Tensor, weight: Int4Weight, bias: Tensor | None) -> bool:
    """Whether all that is checked holds, in a fraction of the time that the checks take to say what does not."""
    words, scale, zero = weight
    if x.dtype not in FLOATS or not x.dim() or scale.dim() != 2 or x.device.type not in DEVICES:
        return False
    columns, (groups, out), device = x.shape[-1], scale.shape, x.device
    return (
        groups > 0
        and columns % groups == 0
        and columns // groups in GROUPS
        and are(words, torch.int32, device, (-(-columns // TILE), out, WIDTH))
        and are(scale, x.dtype, device, (groups, out))
        and (zero is None or are(zero, torch.uint8, device, (groups, out)))
        and (bias is None or are(bias, x.dtype, device, (out,)))
    )


def are(tensor: Tensor, dtype: torch.dtype, device: torch.device, shape: tuple[int, ...]) -> bool:
    """Whether a tensor has these, and is contiguous."""
    return tensor.dtype == dtype and tensor.device == device and tensor.shape == shape and tensor.is_contiguous()


def sample_weight(dtype: torch.dtype, rows: int, columns: int) -> Int4Weight:
    """A random weight in the largest groups that divide its columns, to measure with."""
    group = next(size for size in reversed(GROUPS) if columns % size == 0)
    shape = (-(-columns // TILE), rows, WIDTH)
    words = torch.randint(-(2**31), 2**31, shape, generator=torch.Generator().manual_seed(0))
    return Int4Weight(words.to(torch.int32), torch.full((columns // group, rows), 0.01, dtype=dtype), None)


def from_pack_quantized(packed: Tensor, scale: Tensor, zero_point: Tensor | None, in_features: int) -> Int4Weight:
    """Repack a stored weight.

    packed      weight_packed: int32 [out, in / 8]
    scale       weight_scale: bfloat16 or float16 [out, in / g], g one of 32, 64, 128
    zero_point  weight_zero_point: int32 [ceil(out / 8), in / g], or None on a symmetric grid

    Raises ValueError if sizes or dtypes contradict each other: they come from somebody's file.
    """
    name = "from_pack_quantized"
    refuse_unless(packed.dim() == 2, name, "packed", list(packed.shape), "a matrix [out, in / 8]")
    refuse_unless(scale.dim() == 2, name, "scale", list(scale.shape), "a matrix [out, in / group]")
    out, groups = scale.shape
    fits = groups > 0 and in_features % groups == 0 and in_features // groups in GROUPS
    refuse_unless(fits, name, "scale", f"of {groups} groups for {in_features} columns", f"groups of {GROUPS} columns")
    check_dtype(name, "packed", packed, torch.int32)
    check_dtype(name, "scale", scale, *FLOATS)
    check_shape(name, "packed", packed, out, in_features // PLANES)
    words = to_tiles(from_words(packed, in_features))
    if zero_point is None:
        return Int4Weight(words, scale.T.contiguous(), None)
    check_dtype(name, "zero_point", zero_point, torch.int32)
    check_shape(name, "zero_point", zero_point, -(-out // PLANES), groups)
    return Int4Weight(words, scale.T.contiguous(), from_words(zero_point.T, out))


def to_pack_quantized(weight: Int4Weight, in_features: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """The stored tensors (packed, scale, zero_point) again, bit for bit."""
    packed = to_words(from_tiles(weight.words, in_features))
    zero_point = None if weight.zero is None else to_words(weight.zero).T.contiguous()
    return packed, weight.scale.T.contiguous(), zero_point


def from_words(words: Tensor, count: int) -> Tensor:
    """Codes in stored order: int32 [rows, ceil(count / 8)] -> uint8 [rows, count]."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)
    return ((words[..., None] >> shifts) & 0xF).to(torch.uint8).flatten(1)[:, :count].contiguous()


def to_words(codes: Tensor) -> Tensor:
    """The reverse of `from_words`; nibbles beyond the last code are 0."""
    rows, count = codes.shape
    return gather(torch.nn.functional.pad(codes, (0, -count % PLANES)).view(rows, -1, PLANES), 2)


def to_tiles(codes: Tensor) -> Tensor:
    """uint8 [out, in] -> the kernels' words, int32 [tiles, out, 16]."""
    rows, columns = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -columns % TILE))
    return gather(padded.view(rows, -1, PLANES, WIDTH), 2).transpose(0, 1).contiguous()


def from_tiles(words: Tensor, in_features: int) -> Tensor:
    """The reverse of `to_tiles`: uint8 [out, in]."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)[:, None]
    planes = (words[:, :, None, :] >> shifts) & 0xF
    return planes.to(torch.uint8).transpose(0, 1).flatten(1)[:, :in_features].contiguous()


def gather(codes: Tensor, dim: int) -> Tensor:
    """Eight codes along `dim` become one int32, the first in its lowest bits."""
    words = torch.zeros_like(codes.select(dim, 0), dtype=torch.int32)
    for i in range(PLANES):
        words |= codes.select(dim, i).to(torch.int32) << (4 * i)
    return words
