"""Triton kernel of `teal_linear`. Imported only when it is about to run, since importing triton takes a second.

The weight is stored by columns, [in, out], so the run of memory that a small input would need is whole: its loads are
masked off, and masked loads move no bytes. A program makes BN outputs; a tile of its loop is BK inputs.

Split-K as in `int4_linear`: program (n, 0, s) sums a span of tiles into its own slice of a float32 workspace, and
`reduce_splits` adds the slices in the order of s. No atomics, so the same inputs give the same bits.
"""

import triton
import triton.language as tl

from ..int4_linear.kernel import reduce_splits

__all__ = ["reduce_splits", "teal_gemv"]


@triton.jit
def teal_gemv(
    x_ptr, columns_ptr, bias_ptr, y_ptr, threshold, N, K, span,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y[n] of one token, or parts [splits, n]. Grid (ceil(N / BN), 1, splits), `span` tiles per program.

    A tile's inputs are loaded a round ahead of its columns, whose loads depend on them.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    split = tl.program_id(2)
    total = tl.zeros((BK, BN), dtype=tl.float32)
    for tile in range(split * span, min((split + 1) * span, tl.cdiv(K, BK))):
        k = tile * BK + tl.arange(0, BK)
        x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        kept = (k < K) & ((tl.abs(x) > threshold) | (x != x))
        at = k[:, None].to(tl.int64) * N + n[None, :]
        w = tl.load(columns_ptr + at, mask=kept[:, None] & (n < N)[None, :], other=0.0, eviction_policy="evict_first")
        total += tl.where(kept, x, 0.0)[:, None] * w.to(tl.float32)
    y = tl.sum(total, axis=0)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + split.to(tl.int64) * N + n, y.to(y_ptr.dtype.element_ty), mask=n < N)
