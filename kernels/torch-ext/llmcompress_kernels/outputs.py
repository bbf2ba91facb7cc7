"""What the kernels of all operators do where a sum is finished, in Triton: add a bias, store outputs, add up splits.

Split-K: program (m, n, s) sums a span of the inner dimension into its own slice of a float32 workspace, and
`reduce_splits` adds the slices in the order of s. No atomics, so the same inputs give the same bits. A slice takes no
bias; the reduce does. Tokens m are the first axis of every grid: programs that read the same weights are neighbours in
it, run at the same time, and find in the cache what the first of them has loaded.

Names: outputs n and tokens m of a program, splits, N outputs and M tokens in all.

Imported only when a kernel is about to run, since importing triton takes a second.
"""

import triton
import triton.language as tl


@triton.jit
def with_bias(y, bias_ptr, n, N):
    """y + bias[n] in float32, y itself without a bias. y: [BN], [BN, BM], or any shape that n broadcasts to."""
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
        if len(n.shape) < len(y.shape):
            bias = bias[:, None]
        y += bias
    return y


@triton.jit
def store_token(y_ptr, bias_ptr, y, n, split, N):
    """Outputs n of the only token, or its parts of one split: y [BN]."""
    y = with_bias(y, bias_ptr, n, N)
    tl.store(y_ptr + split.to(tl.int64) * N + n, y.to(y_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def store_tokens(y_ptr, bias_ptr, y, n, m, split, M, N):
    """Outputs n of tokens m, or their parts of one split. y [BN, BM]; or n and m are tensors that broadcast to y."""
    y = with_bias(y, bias_ptr, n, N)
    if len(n.shape) < len(y.shape):
        n, m = n[:, None], m[None, :]
    at = (split * M + m).to(tl.int64) * N + n
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=(n < N) & (m < M))


@triton.jit
def reduce_splits(parts_ptr, bias_ptr, y_ptr, M, N, splits, BN: tl.constexpr):
    """y [M, N] = sum over splits of parts [splits, M, N] + bias, always in the same order. Grid (ceil(N / BN), M)."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1)
    total = tl.zeros((BN,), dtype=tl.float32)
    for split in range(splits):
        total += tl.load(parts_ptr + (split * M + m).to(tl.int64) * N + n, mask=n < N, other=0.0)
    total = with_bias(total, bias_ptr, n, N)
    tl.store(y_ptr + m.to(tl.int64) * N + n, total.to(y_ptr.dtype.element_ty), mask=n < N)
