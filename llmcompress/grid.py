"""Integer grids: value = (code - zero) * scale, one scale and zero per row and group of input columns.

The scale is kept in the dtype of the checkpoint and every code is chosen with that rounded scale, and `decode` rounds
its product in that dtype too, as stock engines do when they unpack. So what a method sees is what a layer computes.

Zero is on every grid: the range of a group always includes 0.0, and `zero` is an integer code.

The range of a group may be smaller than its largest weight: clipping a few large weights makes all other steps finer.
`fit_range` tries shrunken ranges and keeps the one with the least error, measured in one of three ways:

    importance None          sum_j (w_j - q_j)^4                    the weight alone
    importance [in]          sum_j d_j (w_j - q_j)^2                d = mean squared input (diagonal of G)
    importance [groups,g,g]  (w - q) G_g (w - q)ᵀ                   output error of the group alone

Without data the fourth power spares large weights, which cost a small model more than their share: SmolLM2-135M at 4
bits, rounded in groups of 64, has perplexity 39.4 with it, 43.5 with squares and 41.6 without a search.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from llmcompress.lazy import Tensor, torch

SHRINK = tuple(1.0 - 0.05 * i for i in range(1, 12))  # 0.95 .. 0.45 of the range that clips nothing
FINER = 0.025  # then this much to either side of the best of these
CHUNK = 1 << 18  # weights searched at once: temporaries stay in the cache

Judged = tuple[Tensor, Tensor, Tensor, Tensor]  # of each group: error, scale, zero, share of its range


@dataclass(frozen=True, slots=True)
class IntGrid:
    """Evenly spaced values, one scale per row and group of `group` neighbouring input columns."""

    bits: int
    group: int
    symmetric: bool  # zero is the middle code everywhere and need not be stored
    scale: Tensor  # [out, in // group] in the dtype of the checkpoint, > 0
    zero: Tensor  # [out, in // group] int32, in 0 .. 2**bits - 1

    def columns(self) -> tuple[Tensor, Tensor]:
        """Scale (float32) and zero (float32) of every single weight: [out, in] each."""
        return (
            self.scale.float().repeat_interleave(self.group, 1),
            self.zero.float().repeat_interleave(self.group, 1),
        )

    def encode(self, w: Tensor) -> Tensor:
        """Nearest code of each weight: w [out, in] float -> uint8 [out, in], saturating."""
        scale, zero = self.columns()
        return (w.float() / scale).round_().add_(zero).clamp_(0, 2**self.bits - 1).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """Values of codes [out, in] uint8, in the dtype of the scale."""
        dtype = self.scale.dtype
        steps = codes.to(torch.int32) - self.zero.repeat_interleave(self.group, 1)
        return steps.to(dtype) * self.scale.repeat_interleave(self.group, 1)


def fit_range(
    w: Tensor,
    *,
    bits: int,
    group: int,
    symmetric: bool,
    dtype: "torch.dtype",
    search: bool = True,
    importance: Tensor | None = None,
) -> IntGrid:
    """The grid for `w` [out, in]: one range per row and group, shrunk to the least error if `search`.

    importance: see the module's docstring.  dtype: in which scales are stored.
    Ties go to the wider range. An all-zero group gets scale 1.
    """
    rows, columns = w.shape
    groups = w.float().reshape(rows, columns // group, group)
    scale, zero = torch.empty(2, rows, columns // group, device=w.device)
    if importance is not None and importance.ndim == 1:
        importance = importance.reshape(columns // group, group).contiguous()  # a diagonal is strided
    for part in row_chunks(groups):
        scale[part], zero[part] = _fit_chunk(groups[part], bits, symmetric, dtype, search, importance)
    return IntGrid(bits, group, symmetric, scale.to(dtype), zero.to(torch.int32))


def _fit_chunk(
    x: Tensor, bits: int, symmetric: bool, dtype: "torch.dtype", search: bool, importance: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`fit_range` for some rows, x [rows, groups, group]; scale and zero [rows, groups] float32."""
    low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
    if not search:
        return affine(low, high, bits, symmetric, dtype)
    buffer = torch.empty_like(x)

    def judged(shrink: Tensor) -> Judged:
        scale, zero = affine(low * shrink, high * shrink, bits, symmetric, dtype)
        return group_error(snap(x, scale, zero, bits, out=buffer).sub_(x), importance), scale, zero, shrink

    best = judged(torch.ones_like(low))
    for shrink in SHRINK:
        best = better(best, judged(torch.full_like(low, shrink)))
    coarse = best[-1]
    for step in (FINER, -FINER):
        best = better(best, judged((coarse + step).clamp(max=1)))
    return best[1], best[2]


def better(first: Judged, second: Judged) -> Judged:
    """Of each group the range with less error, of equal ones the first."""
    less = second[0] < first[0]
    error, scale, zero, shrink = (torch.where(less, y, x) for x, y in zip(first, second, strict=True))
    return error, scale, zero, shrink


def affine(low: Tensor, high: Tensor, bits: int, symmetric: bool, dtype: "torch.dtype") -> tuple[Tensor, Tensor]:
    """Scale, already rounded to `dtype`, and integer zero of a grid from `low` <= 0 to `high` >= 0 (float32 both).

    Symmetric grids span -2^(b-1) .. 2^(b-1)-1 steps; the scale lets the positive end reach max(|low|, high).
    """
    top = 2**bits - 1
    if symmetric:
        scale = torch.maximum(-low, high) / (2 ** (bits - 1) - 1)
    else:
        scale = (high - low) / top
    scale = scale.to(dtype).float()  # methods must see the scale that will be stored
    scale = scale.where(scale > 0, 1)  # an all-zero group, or one that underflows `dtype`
    if symmetric:
        return scale, torch.full_like(scale, 2 ** (bits - 1))
    return scale, (-low / scale).round_().clamp_(0, top)


def snap(x: Tensor, scale: Tensor, zero: Tensor, bits: int, out: Tensor | None = None) -> Tensor:
    """Nearest grid value of x [..., group] for scale and zero [...], in float32; written into `out` if given."""
    scale, zero = scale[..., None], zero[..., None]
    return torch.div(x, scale, out=out).round_().add_(zero).clamp_(0, 2**bits - 1).sub_(zero).mul_(scale)


def group_error(delta: Tensor, importance: Tensor | None) -> Tensor:
    """Error of each group of delta [rows, groups, group] under `importance`; [rows, groups]. Overwrites delta."""
    if importance is None:
        return delta.square_().square_().sum(-1)
    if importance.ndim == 2:
        return delta.square_().mul_(importance).sum(-1)
    return (torch.einsum("rgi,gij->rgj", delta, importance) * delta).sum(-1)


def row_chunks(x: Tensor) -> Iterator[slice]:
    """Slices of the first dimension of x that hold about CHUNK elements each."""
    step = max(1, CHUNK // max(1, x[0].numel()))
    for start in range(0, x.shape[0], step):
        yield slice(start, start + step)
