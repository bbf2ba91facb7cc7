"""Triton kernel of `teal_linear`. Imported only when it is about to run, since importing triton takes a second.

The weight is stored by columns, [in, out], so the run of memory that a small input would need is whole: its loads are
masked off, and masked loads move no bytes. A program makes BN outputs; a tile of its loop is BK inputs.

Splits of the inner dimension: outputs.py.
"""

import triton
import triton.language as tl

from ..outputs import store_token


@triton.jit
def teal_gemv(
    x_ptr, columns_ptr, bias_ptr, y_ptr, threshold, N, K, span,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y[n] of one token, or parts [splits, n]. Grid (1, ceil(N / BN), splits), `span` tiles per program.

    A tile's inputs are loaded a round ahead of its columns, whose loads depend on them.
    """
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    split = tl.program_id(2)
    total = tl.zeros((BK, BN), dtype=tl.float32)
    for tile in range(split * span, min((split + 1) * span, tl.cdiv(K, BK))):
        k = tile * BK + tl.arange(0, BK)
        x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        kept = (k < K) & ((tl.abs(x) > threshold) | (x != x))
        at = k[:, None].to(tl.int64) * N + n[None, :]
        w = tl.load(columns_ptr + at, mask=kept[:, None] & (n < N)[None, :], other=0.0, eviction_policy="evict_first")
        total += tl.where(kept, x, 0.0)[:, None] * w.to(tl.float32)
    store_token(y_ptr, bias_ptr, tl.sum(total, axis=0), n, split, N)
