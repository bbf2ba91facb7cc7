"""Triton kernels of `int4_gated_mlp`. Imported only when a kernel is about to run.

The sums over two weights, gate and up, in one read of x are those of int4_linear/kernel.py. What follows them needs no
further kernel, since a program has the same outputs n of both in the same registers. Where the inner dimension is
split, programs store the two sums apart, float32 [splits, 2, M, N], and `reduce_gated` adds them up before it applies
the activation; how sums are split: outputs.py.

Arguments: y_ptr is None in a split launch, and parts_ptr in one that is not.
"""

import triton
import triton.language as tl

from ..int4_linear.kernel import gemm_sums, gemv_sums
from ..outputs import store_token, store_tokens, with_bias


@triton.jit
def activated(gate, ACTIVATION: tl.constexpr):
    """The activation in float32. 0.5 (1 + tanh z) is the logistic function of 2 z, which serves `gelu_tanh`."""
    if ACTIVATION == "silu":
        share = tl.sigmoid(gate)
    elif ACTIVATION == "gelu_tanh":
        share = tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))  # 2 sqrt(2 / pi)
    else:
        share = 0.5 + 0.5 * tl.erf(0.7071067811865476 * gate)
    return gate * share


@triton.jit
def gated(gate, up, gate_bias_ptr, up_bias_ptr, n, N, ACTIVATION: tl.constexpr):
    """act(gate + bias) * (up + bias) in float32, of two finished sums [BN] or [BN, BM]."""
    return activated(with_bias(gate, gate_bias_ptr, n, N), ACTIVATION) * with_bias(up, up_bias_ptr, n, N)


@triton.jit
def gated_gemv(
    x_ptr, gate_words_ptr, gate_scale_ptr, gate_zero_ptr, gate_bias_ptr,
    up_words_ptr, up_scale_ptr, up_zero_ptr, up_bias_ptr, y_ptr, parts_ptr, N, K, span,
    GROUP: tl.constexpr, BN: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """y[n] of one token, or its parts. Grid (1, ceil(N / BN), splits), `span` tiles per program."""
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    split = tl.program_id(2)
    gate, up = gemv_sums(
        x_ptr, gate_words_ptr, gate_scale_ptr, gate_zero_ptr, up_words_ptr, up_scale_ptr, up_zero_ptr, n, split, N, K,
        span, GROUP, BN,
    )  # fmt: skip
    if parts_ptr is None:
        store_token(y_ptr, None, gated(gate, up, gate_bias_ptr, up_bias_ptr, n, N, ACTIVATION), n, split, N)
    else:
        store_token(parts_ptr, None, gate, n, 2 * split, N)
        store_token(parts_ptr, None, up, n, 2 * split + 1, N)


@triton.jit
def gated_gemm(
    x_ptr, gate_words_ptr, gate_scale_ptr, gate_zero_ptr, gate_bias_ptr,
    up_words_ptr, up_scale_ptr, up_zero_ptr, up_bias_ptr, y_ptr, parts_ptr, M, N, K, stride, span,
    GROUP: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, ACTIVATION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """y[m, n], or its parts, by tensor cores. Grid (ceil(M / BM), ceil(N / BN), splits); stride of x's rows."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    split = tl.program_id(2)
    gate, up = gemm_sums(
        x_ptr, gate_words_ptr, gate_scale_ptr, gate_zero_ptr, up_words_ptr, up_scale_ptr, up_zero_ptr, n, m, split,
        M, N, K, stride, span, GROUP, BN, BM, INTERPRETED,
    )  # fmt: skip
    if parts_ptr is None:
        y = gated(gate, up, gate_bias_ptr, up_bias_ptr, n, N, ACTIVATION)
        store_tokens(y_ptr, None, y, n, m, split, M, N)
    else:
        store_tokens(parts_ptr, None, gate, n, m, 2 * split, M, N)
        store_tokens(parts_ptr, None, up, n, m, 2 * split + 1, M, N)


@triton.jit
def reduce_gated(
    parts_ptr, gate_bias_ptr, up_bias_ptr, y_ptr, M, N, splits, BN: tl.constexpr, ACTIVATION: tl.constexpr
):  # fmt: skip
    """y [M, N] of parts [splits, 2, M, N], added in the order of the splits. Grid (ceil(N / BN), M)."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1)
    gate = tl.zeros((BN,), dtype=tl.float32)
    up = tl.zeros((BN,), dtype=tl.float32)
    for split in range(splits):
        gate += tl.load(parts_ptr + (2 * split * M + m).to(tl.int64) * N + n, mask=n < N, other=0.0)
        up += tl.load(parts_ptr + ((2 * split + 1) * M + m).to(tl.int64) * N + n, mask=n < N, other=0.0)
    y = gated(gate, up, gate_bias_ptr, up_bias_ptr, n, N, ACTIVATION)
    tl.store(y_ptr + m.to(tl.int64) * N + n, y.to(y_ptr.dtype.element_ty), mask=n < N)
