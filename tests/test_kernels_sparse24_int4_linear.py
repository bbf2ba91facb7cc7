"""`sparse24_int4_linear`: fragments come back bit for bit and are what the instruction takes, kernels exact as torch.

The inline assembly of the kernel for sparse tensor cores is executed, instruction by instruction, by ptx_fragments.py.
"""

import itertools
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import relative_error
from kernel_checks import assert_any_strides, assert_fake_agrees, assert_opcheck, assert_refused
from llmcompress_kernels import from_sparse24_int4, sparse24_int4_linear, to_sparse24_int4
from llmcompress_kernels.sparse24_int4_linear.layout import BLOCK, STRIP, TILE, dequantize_reference
from ptx_fragments import mma_sp_m16n8k32, right, sparse_a
from sparse24_cases import stored_sparse24_int4
from test_kernels_resources import resources
from torch import Tensor

from llmcompress.formats.sparse24 import Sparse24Int4
from llmcompress.grid import IntGrid
from llmcompress.weight import CompressedWeight

NAME = "sparse24_int4_linear"
BF16, F16 = torch.bfloat16, torch.float16


def stored(
    rows: int = 24, columns: int = 96, group: int = 32, dtype: torch.dtype = BF16
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * columns + group)
    return stored_sparse24_int4(rows, columns, group, dtype, generator)


def arguments(
    tokens: int = 3, rows: int = 24, columns: int = 96, group: int = 32, dtype: torch.dtype = BF16
) -> tuple[dict[str, Any], Tensor]:
    """Arguments of `sparse24_int4_linear` by name, and the weight that they hold, in float64."""
    *tensors, exact = stored(rows, columns, group, dtype)
    words, metadata, scale = from_sparse24_int4(*tensors)
    x, bias = torch.randn(tokens, columns).to(dtype), torch.randn(rows).to(dtype)
    return {"x": x, "words": words, "metadata": metadata, "scale": scale, "bias": bias}, exact


# layout


@settings(max_examples=25)
@given(
    rows=st.integers(1, 40),
    groups=st.integers(1, 9),
    group=st.sampled_from([32, 64, 128]),
    dtype=st.sampled_from([BF16, F16]),
)
def test_repacking_is_exact_in_both_directions(rows, groups, group, dtype):
    *before, exact = stored(rows, groups * group, group, dtype)
    weight = from_sparse24_int4(*before)
    for old, new in zip(before, to_sparse24_int4(weight, groups * group), strict=True):
        assert torch.equal(old, new)
    assert torch.equal(dequantize_reference(weight, groups * group, torch.float64), exact)


def test_tensors_of_the_format_are_taken():
    *_, exact = stored()
    scale = stored()[2]
    codes = (exact / scale.double().repeat_interleave(32, 1)).round().to(torch.uint8) + 8
    grid = IntGrid(4, 32, True, scale, torch.full(scale.shape, 8, dtype=torch.int32))
    weight = CompressedWeight.on_grid(codes, grid)
    tensors = Sparse24Int4().pack(weight, False)
    taken = from_sparse24_int4(tensors["weight"], tensors["weight_index"], tensors["weight_scale"])
    assert torch.equal(dequantize_reference(taken, 96, BF16), weight.values)


def test_it_is_three_bits_and_the_scales():
    weight = from_sparse24_int4(*stored(64, 512, 128)[:3])
    assert sum(tensor.nbytes for tensor in weight) * 8 == 64 * 512 * 3.125


def fragments(x: Tensor) -> np.ndarray[Any, Any]:
    """x [8, 32] of whole numbers as the right operand in bfloat16, by the formula of the manual: uint32 [32, 4]."""
    bits = x.to(BF16).view(torch.int16).numpy().view(np.uint16).astype(np.uint32)
    lane = np.arange(32)
    registers = [
        bits[lane // 4, 8 * b + 2 * (lane % 4)] | bits[lane // 4, 8 * b + 2 * (lane % 4) + 1] << 16 for b in range(4)
    ]
    return np.stack(registers, axis=-1)


def registers_of(words: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """One word per lane, uint32 [32] -> the left operand in bfloat16, uint32 [32, 4]: nibbles to numbers, as words."""
    made = []
    for r in range(4):
        nibbles = np.stack([words >> (4 * r), words >> (4 * r + 16)], axis=-1) & 15
        values = torch.from_numpy((nibbles ^ 8).astype(np.float32) - 8).to(BF16).view(torch.int16)
        bits = values.numpy().view(np.uint16).astype(np.uint32)
        made.append(bits[:, 0] | bits[:, 1] << 16)
    return np.stack(made, axis=-1)


@pytest.mark.parametrize(("rows", "columns", "group"), [(20, 96, 32), (16, 576, 64), (33, 640, 128)])
def test_packed_words_are_what_the_instruction_takes(rows, columns, group):
    """The whole product from the packed words by the model of the instruction, against float64."""
    *tensors, exact = stored(rows, columns, group)
    words, metadata, scale = (t.numpy() if t.dtype == torch.int32 else t for t in from_sparse24_int4(*tensors))
    words, metadata = words.view(np.uint32), metadata.view(np.uint32)
    x = torch.randint(-8, 8, (8, columns)).float()
    padded = torch.nn.functional.pad(x, (0, -columns % TILE))
    y = torch.zeros(words.shape[1] * STRIP, 8, dtype=torch.float64)
    zero = np.zeros((32, 4), dtype=np.float32)
    for k, strip in itertools.product(range(0, columns, 32), range(words.shape[1])):
        left = registers_of(words[k // BLOCK, strip, :, k % BLOCK // 32])
        e = metadata[k // TILE, strip, :, k % TILE // 64]
        selector = k // 32 % 2
        part = mma_sp_m16n8k32(left, fragments(padded[:, k : k + 32]), zero, e, selector, "bf16")
        product = sparse_a(left, e, selector, "bf16") @ right(fragments(padded[:, k : k + 32]), "bf16")
        lane = np.arange(32)
        for i in range(4):
            assert np.array_equal(part[:, i], product[lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2])
        scales = torch.nn.functional.pad(scale[k // group], (0, len(y) - rows)).double()[:, None]
        here = slice(STRIP * strip, STRIP * strip + STRIP)
        y[here] += torch.from_numpy(product) * scales[here]
    truth = exact @ x.double().T
    assert torch.allclose(y[:rows], truth, rtol=1e-12, atol=1e-12)
    assert not y[rows:].any()


def test_rows_and_columns_beyond_are_zeros_at_rising_positions():
    words, metadata, _ = from_sparse24_int4(*stored(5, 96, 32)[:3])
    assert words.shape == (1, 1, 32, 4)
    assert metadata.shape == (1, 1, 32, 4)
    assert not words[0, 0, 20:].any()  # rows 5 to 7 of the strip, and 13 to 15
    assert not words[0, 0, :, 3].any()  # columns 96 to 127
    assert (metadata[0, 0, 20:] == 0x44444444).all()
    assert (metadata[0, 0, :, 2:] == 0x44444444).all()  # columns 128 to 255


FALLING = torch.full((24, 12), 0b0100_0100, dtype=torch.uint8)
FALLING[5, 1] = 0b1010_0100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(24, 24)}, "weight is torch.float32"),
        ({"weight": torch.zeros(24 * 24, dtype=torch.uint8)}, r"weight is \[576\], expected a matrix"),
        ({"weight_scale": torch.zeros(72, dtype=BF16)}, r"weight_scale is \[72\], expected a matrix"),
        ({"weight": torch.zeros(24, 25, dtype=torch.uint8)}, "weight is of 100 columns, expected a multiple of 8"),
        ({"weight": torch.zeros(24, 32, dtype=torch.uint8)}, r"weight_index is \[24, 12\], expected \[24, 16\]"),
        ({"weight_index": torch.zeros(24, 12, dtype=torch.int8)}, "weight_index is torch.int8"),
        ({"weight_index": FALLING}, "weight_index is 2, 2 at row 5, columns 12 to 15, expected rising positions"),
        ({"weight_scale": torch.zeros(24, 3)}, "weight_scale is torch.float32"),
        ({"weight_scale": torch.zeros(24, 2, dtype=BF16)}, "weight_scale is 2 groups of 96 columns"),
        ({"weight_scale": torch.zeros(24, 0, dtype=BF16)}, "weight_scale is 0 groups"),
        ({"weight_scale": torch.zeros(25, 3, dtype=BF16)}, r"weight_scale is \[25, 3\], expected \[24, 3\]"),
    ],
)
def test_a_checkpoint_that_contradicts_itself_is_refused(change, message):
    kept, index, scale, _ = stored()
    with pytest.raises(ValueError, match=f"from_sparse24_int4: {message}"):
        from_sparse24_int4(**{"weight": kept, "weight_index": index, "weight_scale": scale} | change)


# the operator


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize(("tokens", "columns", "group"), [(1, 576, 64), (3, 96, 32), (17, 256, 128)])
def test_operator_on_cpu_is_as_exact_as_torch(tokens, columns, group, dtype):
    given_, exact = arguments(tokens, 70, columns, group, dtype)
    x, bias = given_["x"], given_["bias"]
    truth = x.double() @ exact.T + bias.double()
    torch_error = relative_error(torch.nn.functional.linear(x, exact.to(dtype), bias), truth)
    y = sparse24_int4_linear(**given_)
    assert y.dtype == dtype
    assert relative_error(y, truth) <= 2 * torch_error


def test_any_strides_and_leading_dimensions():
    given_, _ = arguments(tokens=12)
    assert_any_strides(sparse24_int4_linear, given_, 24)


def test_opcheck():
    given_, _ = arguments()
    assert_opcheck(
        torch.ops.llmcompress.sparse24_int4_linear.default, tuple(given_.values()), (*list(given_.values())[:4], None)
    )


def test_fake_and_real_agree_on_every_shape():
    given_, _ = arguments()
    assert_fake_agrees(sparse24_int4_linear, given_)


WORDS = torch.zeros(1, 2, 32, 4, dtype=torch.int32)
BAD: list[tuple[str, Any, str]] = [
    ("x", torch.zeros(3, 96), "x is torch.float32"),
    ("x", torch.zeros((), dtype=BF16), "x is a scalar"),
    ("x", torch.zeros(3, 64, dtype=BF16), "scale is 3 groups of 64 columns"),
    ("x", torch.zeros(3, 192, dtype=BF16), r"words is \[1, 2, 32, 4\], expected \[2, 2, 32, 4\]"),
    ("words", WORDS.long(), "words is torch.int64"),
    ("words", WORDS[:, :1], r"words is \[1, 1, 32, 4\], expected \[1, 2, 32, 4\]"),
    ("words", WORDS.transpose(2, 3).contiguous().transpose(2, 3), "words is strided"),
    ("words", WORDS.to("meta"), "words is on meta, expected on cpu"),
    ("metadata", WORDS.short(), "metadata is torch.int16"),
    ("metadata", WORDS[0], r"metadata is \[2, 32, 4\], expected \[1, 2, 32, 4\]"),
    ("scale", torch.zeros(3, 24, dtype=F16), "scale is torch.float16, expected torch.bfloat16"),
    ("scale", torch.zeros(3, 40, dtype=BF16), r"words is \[1, 2, 32, 4\], expected \[1, 3, 32, 4\]"),
    ("scale", torch.zeros(24, dtype=BF16), "scale is"),
    ("scale", torch.zeros(0, 24, dtype=BF16), "scale is 0 groups"),
    ("scale", torch.zeros(24, 3, dtype=BF16).T, "scale is strided"),
    ("bias", torch.zeros(24), "bias is torch.float32"),
    ("bias", torch.zeros(3, dtype=BF16), "bias is"),
]


@pytest.mark.parametrize(("argument", "value", "message"), BAD)
def test_bad_arguments_are_refused(argument, value, message):
    given_ = arguments()[0] | {argument: value}
    registered = torch.ops.llmcompress.sparse24_int4_linear
    assert_refused(sparse24_int4_linear, given_, registered, tuple(given_.values()), f"sparse24_int4_linear: {message}")


# what the compiler makes of the inline assembly


@pytest.mark.parametrize("architecture", [80, 90])
def test_a_row_of_a_tensor_is_a_thread(architecture):
    """The assembly takes four elements of a row as the registers of one lane, in the order of threads."""
    pytest.importorskip("triton")
    tool = resources()
    cases = [c for c in tool.cases(NAME) if c.architecture == architecture and c.configuration.kernel.endswith("_sp")]
    compiled = tool.compile_case(cases[0])
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\.blocked.*)$", compiled.asm["ttgir"], re.MULTILINE))
    used = re.findall(r"elementwise_inline_asm.*-> tensor<128x4x\w+, (#\w+)>", compiled.asm["ttgir"])
    assert used
    for name in used:
        assert "sizePerThread = [1, 4], threadsPerWarp = [32, 1], warpsPerCTA = [4, 1]" in layouts[name]
    products = re.findall(r"mma\.sp::ordered_metadata\.sync\.aligned\.m16n8k32", compiled.asm["ptx"])
    assert len(products) == TILE // 32
    code = tool.cuobjdump(compiled.asm["cubin"], "-sass")
    assert len(re.findall(r"HMMA\.SP\.16832\.F32", code)) == TILE // 32
