"""HQQ: a robust grid without data, by half-quadratic splitting.

Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models". The rounding error is measured
with the norm ||.||_p, p < 1, which forgives outliers, and split with an auxiliary error E:

    min over s, z, E of  ||E||_p^p + beta/2 ||W - s (Q - z) - E||²,      Q = clamp(round(W / s) + z)
    E <- shrink_p(W - s (Q - z), beta)                                   generalized soft threshold
    s <- <W - E, Q - z> / ||Q - z||²                                     least squares
    z <- round(mean(Q - (W - E) / s))                                    asymmetric grids only
    beta <- 1.01 beta

The original moves only a fractional z. Stored formats hold integer zeros, for which that step alone nearly always
rounds back to where it was; so here the scale moves as well (which also serves symmetric grids). The start is the range
with the least error, errors are measured in its steps, and the best iterate by the p-norm error is kept.
"""

from pydantic import Field

from llmcompress.grid import IntGrid, row_chunks
from llmcompress.lazy import Tensor, torch
from llmcompress.methods.base import IntMethod
from llmcompress.weight import CompressedWeight


class HQQ(IntMethod):
    """Options of `method: hqq`."""

    iterations: int = Field(20, ge=1, le=1000)
    p: float = Field(0.7, gt=0, lt=1)
    beta: float = Field(10.0, gt=0)

    def compress(
        self, weight: Tensor, statistics: Tensor | None, dtype: "torch.dtype", mask: Tensor | None = None
    ) -> CompressedWeight:
        """Fit scale and zero to weight [out, in] float32; `statistics` are not used."""
        group = self.group(weight.shape[1])
        start = self.fit(weight, dtype)
        groups = weight.reshape(len(weight), -1, group)
        keep = torch.ones_like(weight) if mask is None else mask.to(weight.dtype)
        keep = keep.reshape(groups.shape)
        scale, zero = start.scale.float(), start.zero.float()
        for rows in row_chunks(groups):
            unit = scale[rows].clone()  # errors are measured in steps of the start, so that beta fits any weight
            found, zero[rows] = self._solve(groups[rows] / unit[..., None], zero[rows], unit, keep[rows], dtype)
            scale[rows] = found * unit
        grid = IntGrid(self.bits, group, self.symmetric, scale.to(dtype), zero.to(torch.int32))
        return CompressedWeight.on_grid(grid.encode(weight), grid, mask)

    def _solve(
        self, w: Tensor, zero: Tensor, unit: Tensor, keep: Tensor, dtype: "torch.dtype"
    ) -> tuple[Tensor, Tensor]:
        """Half-quadratic iterations on w [rows, groups, group], in units of `unit` [rows, groups]; scale and zero.

        keep: like w, 0 where a mask has made the weight zero, which it is at any scale and zero; so only the others
        say where the zero goes. In the other two updates such weights have no part anyway.
        """
        count = keep.sum(-1)
        top, beta, scale = 2**self.bits - 1, self.beta, torch.ones_like(unit)
        best, best_scale, best_zero = torch.full_like(scale, torch.inf), scale, zero
        for _ in range(self.iterations):
            code = (w / scale[..., None] + zero[..., None]).round_().clamp_(0, top)
            steps = code - zero[..., None]
            residual = w - steps * scale[..., None]
            loss = residual.abs().pow(self.p).sum(-1)
            better = loss < best
            best = torch.where(better, loss, best)
            best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
            target = w - shrink(residual, beta, self.p)
            fitted = self._least_squares(target, steps, scale) * unit
            scale = fitted.to(dtype).float() / unit  # what will be stored
            if not self.symmetric:
                moved = (code - target / scale[..., None]).mul_(keep).sum(-1) / count.clamp(min=1)
                zero = moved.round_().clamp_(0, top).where(count > 0, zero)
            beta *= 1.01
        return best_scale, best_zero

    @staticmethod
    def _least_squares(target: Tensor, steps: Tensor, scale: Tensor) -> Tensor:
        """argmin over s of ||target - s steps||², per group; the old scale where that is not a positive number."""
        fitted = (target * steps).sum(-1) / steps.square().sum(-1)
        return fitted.where(fitted > 0, scale)  # also false for the 0 / 0 of an all-zero group


def shrink(x: Tensor, beta: float, p: float) -> Tensor:
    """Generalized soft threshold, the minimizer of |e|^p + beta/2 (x - e)² (approximately, as in the paper)."""
    size = x.abs()
    return x.sign() * (size - size.pow(p - 1) / beta).clamp_(min=0).nan_to_num_(0.0)
