"""The model of tensor core fragments: the sparse instruction is two dense ones, and assembly runs as written."""

import numpy as np
import pytest
from ptx_fragments import (
    bits_of,
    dense_a,
    from_accumulators,
    mma_m16n8k16,
    mma_sp_m16n8k32,
    right,
    run,
    sparse_a,
    to_accumulators,
)

KINDS = ["bf16", "f16"]
PAIRS = np.array([0b0100, 0b1000, 0b1100, 0b1001, 0b1101, 0b1110], dtype=np.uint32)  # first | second << 2, rising


def registers(generator, kind, *shape):
    """Small whole numbers, which both types hold and sum exactly."""
    bits = bits_of(generator.integers(-8, 8, (*shape, 2)).astype(np.float64), kind).astype(np.uint32)
    return bits[..., 0] | bits[..., 1] << 16


def metadata(generator):
    nibbles = PAIRS[generator.integers(0, 6, (32, 8))]
    return np.bitwise_or.reduce(nibbles << np.arange(0, 32, 4, dtype=np.uint32), axis=1)


@pytest.mark.parametrize("kind", KINDS)
def test_dense_product(kind):
    generator = np.random.default_rng(0)
    a, b = registers(generator, kind, 32, 4), registers(generator, kind, 32, 2)
    c = to_accumulators(generator.integers(-8, 8, (16, 8)))
    d = from_accumulators(mma_m16n8k16(a, b, c, kind))
    assert np.array_equal(d, dense_a(a, kind) @ right(b, kind) + from_accumulators(c))
    assert not np.isnan(d).any()


@pytest.mark.parametrize("kind", KINDS)
def test_dense_fragments_lie_where_the_manual_says(kind):
    """One register at a time: an element by its own formula, `row` and `col` of the instruction's description."""
    numbers = np.arange(256, dtype=np.float64).reshape(32, 8)  # a0 .. a7 of each lane
    bits = bits_of(numbers, "f16").astype(np.uint32)
    whole = dense_a(bits[:, 0::2] | bits[:, 1::2] << 16, "f16")
    for lane in range(32):
        for i in range(8):
            row = lane // 4 if i < 2 or 4 <= i < 6 else lane // 4 + 8
            column = lane % 4 * 2 + (i & 1) + (8 if i >= 4 else 0)
            assert whole[row, column] == numbers[lane, i]


@pytest.mark.parametrize("selector", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_sparse_product_is_that_of_two_dense_halves(kind, selector):
    generator = np.random.default_rng(1)
    a, b, e = registers(generator, kind, 32, 4), registers(generator, kind, 32, 4), metadata(generator)
    whole = sparse_a(a, e, selector, kind)
    assert ((whole.reshape(16, 8, 4) != 0).sum(-1) <= 2).all()
    c = np.zeros((32, 4), dtype=np.float32)
    for half in range(2):
        columns = whole[:, 16 * half : 16 * half + 16]
        pairs = bits_of(np.stack([columns[:, 0::2], columns[:, 1::2]], axis=-1), kind).astype(np.uint32)
        words = pairs[..., 0] | pairs[..., 1] << 16  # [16, 8]: columns 2 i and 2 i + 1
        lane = np.arange(32)
        dense = np.stack([words[lane // 4 + 8 * (r % 2), lane % 4 + 4 * (r // 2)] for r in range(4)], axis=-1)
        c = mma_m16n8k16(dense, b[:, 2 * half : 2 * half + 2], c, kind)
    zero = np.zeros((32, 4), dtype=np.float32)
    assert np.array_equal(mma_sp_m16n8k32(a, b, zero, e, selector, kind), c)


def test_metadata_of_the_other_selector_is_not_read():
    generator = np.random.default_rng(2)
    a, e = registers(generator, "bf16", 32, 4), metadata(generator)
    before = sparse_a(a, e, 0, "bf16")
    e[np.arange(32) % 4 >= 2] = 0
    assert np.array_equal(sparse_a(a, e, 0, "bf16"), before)
    with pytest.raises(ValueError, match="do not rise"):
        sparse_a(a, e, 1, "bf16")


def test_assembly_is_executed():
    x = np.arange(32, dtype=np.uint32)
    text = "{ .reg .b32 one; mov.b32 one, 0x3F803F80; fma.rn.bf16x2 $0, $1, one, $2; mov.f32 $1, 0f3F800000; }"
    with pytest.raises(NotImplementedError, match=r"add\.u32"):
        run("{ add.u32 $0, $1, $1; }", 1, [x])
    two, three = np.full(32, 0x40004000, dtype=np.uint32), np.full(32, 0x40404040, dtype=np.uint32)
    (total,) = run(text, 1, [two, three])
    assert (total == 0x40A040A0).all()  # 2 * 1 + 3, twice
