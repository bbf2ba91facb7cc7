"""Triton kernels of `int4_lora_linear`. Imported only when a kernel is about to run.

The sums over the int4 weight are those of int4_linear/kernel.py. What LoRA adds to an output, scaling * B h with
h = A x of that token, is at most 64 products long, and is added where the sum is finished: at the end of the same
kernel, or in the reduce of its splits. So it costs no launch and no pass over the outputs; h is made before.

Names: R is the rank padded to a power of two, 16 at least, which is one step of a tensor core; padding reads zeros.
"""

import triton
import triton.language as tl

from ..int4_linear.kernel import gemm_sums, gemv_sums
from ..outputs import store_token, store_tokens
from ..words import dot


@triton.jit
def b_rows(b_ptr, n, rank, N, R: tl.constexpr):
    """Rows n of B [N, rank], padded: [BN, R]."""
    r = tl.arange(0, R)
    return tl.load(
        b_ptr + n.to(tl.int64)[:, None] * rank + r[None, :], mask=(n < N)[:, None] & (r < rank)[None, :], other=0.0
    )


@triton.jit
def low_rank(b_ptr, h_ptr, n, m, rank, M, N, R: tl.constexpr, INTERPRETED: tl.constexpr):
    """sum_r B[n, r] h[m, r] by tensor cores: float32 [BN, BM]."""
    r = tl.arange(0, R)
    h = tl.load(
        h_ptr + m.to(tl.int64)[None, :] * rank + r[:, None], mask=(r < rank)[:, None] & (m < M)[None, :], other=0.0
    )
    zeros = tl.zeros((n.shape[0], m.shape[0]), dtype=tl.float32)
    return dot(b_rows(b_ptr, n, rank, N, R), h, zeros, INTERPRETED)


@triton.jit
def lora_gemv(
    x_ptr, words_ptr, scale_ptr, zero_ptr, bias_ptr, b_ptr, h_ptr, y_ptr, N, K, span, rank, scaling,
    GROUP: tl.constexpr, BN: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """y[n] of one token. Grid (1, ceil(N / BN), 1)."""
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    split = tl.program_id(2)
    y, _ = gemv_sums(x_ptr, words_ptr, scale_ptr, zero_ptr, None, None, None, n, split, N, K, span, GROUP, BN)
    r = tl.arange(0, R)
    h = tl.load(h_ptr + r, mask=r < rank, other=0.0).to(tl.float32)
    y += scaling * tl.sum(b_rows(b_ptr, n, rank, N, R).to(tl.float32) * h[None, :], axis=1)
    store_token(y_ptr, bias_ptr, y, n, split, N)


@triton.jit
def lora_gemm(
    x_ptr, words_ptr, scale_ptr, zero_ptr, bias_ptr, b_ptr, h_ptr, y_ptr, M, N, K, stride, span, rank, scaling,
    GROUP: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, R: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """y[m, n]. Grid (ceil(M / BM), ceil(N / BN), 1)."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    split = tl.program_id(2)
    y, _ = gemm_sums(
        x_ptr, words_ptr, scale_ptr, zero_ptr, None, None, None, n, m, split, M, N, K, stride, span,
        GROUP, BN, BM, INTERPRETED,
    )  # fmt: skip
    y += scaling * low_rank(b_ptr, h_ptr, n, m, rank, M, N, R, INTERPRETED)
    store_tokens(y_ptr, bias_ptr, y, n, m, split, M, N)


@triton.jit
def lora_gemm_reduce(
    parts_ptr, bias_ptr, b_ptr, h_ptr, y_ptr, M, N, splits, rank, scaling,
    BN: tl.constexpr, BM: tl.constexpr, R: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """y [M, N] of parts [splits, M, N], added in the order of the splits. Grid (ceil(N / BN), ceil(M / BM))."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    mask = (n < N)[:, None] & (m < M)[None, :]
    y = scaling * low_rank(b_ptr, h_ptr, n, m, rank, M, N, R, INTERPRETED)
    for split in range(splits):
        at = (split * M + m).to(tl.int64)[None, :] * N + n[:, None]
        y += tl.load(parts_ptr + at, mask=mask, other=0.0)
    store_tokens(y_ptr, bias_ptr, y, n, m, 0, M, N)
