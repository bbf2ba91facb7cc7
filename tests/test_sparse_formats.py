"""Formats for zeros: what comes back is what went in, sizes are exact, and damaged tensors are refused."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save
from torch import Tensor

from llmcompress.errors import FormatError
from llmcompress.formats import FORMATS
from llmcompress.mask import Pattern, keep_best
from llmcompress.methods import METHODS
from llmcompress.safetensors_file import read_headers
from llmcompress.weight import CompressedWeight, Kind

BF16 = torch.bfloat16
HERE = Path(__file__).parent / "hostile"
Tensors = dict[str, Tensor]


def pruned(rows: int, columns: int, pattern: str, sparsity: float = 0.5, dtype: torch.dtype = BF16) -> CompressedWeight:
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns))
    mask = keep_best(w.abs(), Pattern.parse(pattern), sparsity)
    return CompressedWeight(values=w.masked_fill(~mask, 0).to(dtype), mask=mask)


def quantized(
    rows: int, columns: int, group_size: Any = 32, dtype: torch.dtype = BF16
) -> tuple[Kind, CompressedWeight]:
    weight = pruned(rows, columns, "2:4", dtype=torch.float32)
    steps = [METHODS["magnitude"].parse({"pattern": "2:4"}, ""), METHODS["rtn"].parse({"group_size": group_size}, "")]
    return Kind.after([step.kind for step in steps]), steps[1].compress(weight.values, None, dtype, weight.mask)


def size(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 9),
    eights=st.integers(1, 9),
    pattern=st.sampled_from(["2:4", "1:4"]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
def test_two_of_four_round_trip(rows, eights, pattern, dtype):
    fmt, weight, shape = FORMATS["sparse24"], pruned(rows, 8 * eights, pattern, dtype=dtype), (rows, 8 * eights)
    tensors = fmt.pack(weight, False)
    assert torch.equal(fmt.unpack(tensors, None, False), weight.values)
    assert size(tensors) == fmt.stored_bytes(Kind(pattern=Pattern.parse(pattern)), shape, dtype.itemsize)
    if dtype is BF16:
        assert 8 * size(tensors) == 9 * rows * 8 * eights


@pytest.mark.parametrize("group_size", [32, 64, "row"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_two_of_four_codes_round_trip(group_size, dtype):
    kind, weight = quantized(7, 192, group_size, dtype)
    fmt = FORMATS["sparse24-int4"]
    assert fmt.refuses(kind, (7, 192), False) is None
    tensors = fmt.pack(weight, False)
    assert torch.equal(fmt.unpack(tensors, None, False), weight.values)
    assert size(tensors) == fmt.stored_bytes(kind, (7, 192), dtype.itemsize)


def test_bits_per_weight_at_group_128():
    _, weight = quantized(4, 1024, 128)
    assert 8 * size(FORMATS["sparse24-int4"].pack(weight, False)) == 3.125 * 4 * 1024


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 40),
    sparsity=st.floats(0, 0.95),
    pattern=st.sampled_from(["row", "layer"]),
)
def test_bitmask_round_trip(rows, columns, sparsity, pattern):
    fmt, weight = FORMATS["bitmask"], pruned(rows, columns, pattern, sparsity)
    tensors = fmt.pack(weight, False)
    assert torch.equal(fmt.unpack(tensors, None, False), weight.values)
    assert size(tensors) == fmt.stored_bytes(
        Kind(pattern=Pattern.parse(pattern), sparsity=sparsity), (rows, columns), BF16.itemsize
    )


def test_equal_weights_have_equal_bytes():
    """Zeros that fill up go to the smallest free positions: one row by hand."""
    values = torch.tensor([[0, 5, 0, 6, 0, 0, 0, 7.0]], dtype=BF16)
    tensors = FORMATS["sparse24"].pack(CompressedWeight(values), False)
    assert tensors["weight"].tolist() == [[5, 6, 0, 7]]
    assert tensors["weight_index"].tolist() == [[1 | 3 << 2 | 0 << 4 | 3 << 6]]


def test_codes_of_one_row_by_hand():
    """value = (code - 8) scale; a zero that fills up has code 8."""
    method = METHODS["rtn"].parse({"group_size": "row", "range": "minmax"}, "")
    values = torch.tensor([[0, 7, 0, -1, 0, 0, 0, 3.0]])
    tensors = FORMATS["sparse24-int4"].pack(method.compress(values, None, BF16), False)
    assert tensors["weight_scale"].tolist() == [[1.0]]
    assert tensors["weight"].tolist() == [[15 | 7 << 4, 8 | 11 << 4]]
    assert tensors["weight_index"].tolist() == [[1 | 3 << 2 | 0 << 4 | 3 << 6]]


def test_bitmask_of_one_row_by_hand():
    values = torch.tensor([[0, 5, 0, 6, 0, 0, 0, 0, 0, 7.0]], dtype=BF16)
    tensors = FORMATS["bitmask"].pack(CompressedWeight(values), False)
    assert tensors["weight"].tolist() == [5, 6, 7]
    assert tensors["weight_mask"].tolist() == [[2 | 8, 2]]
    assert tensors["weight_shape"].tolist() == [1, 10]


@pytest.mark.parametrize("name", ["sparse24", "sparse24-int4"])
def test_three_of_four_are_refused(name):
    """Whatever the recipe said: the tensor itself is looked at."""
    values = torch.tensor([[1.0, 2, 3, 0, 1, 0, 0, 0]])
    weight = METHODS["rtn"].parse({"group_size": "row"}, "").compress(values, None, BF16)
    with pytest.raises(FormatError, match="3 of four are not zero; prune to 2:4"):
        FORMATS[name].pack(weight, False)


@pytest.mark.parametrize(
    ("name", "kind", "columns", "words"),
    [
        ("sparse24", Kind(), 64, "no pruning step"),
        ("sparse24", Kind(pattern=Pattern.parse("4:8")), 64, "pattern 4:8"),
        ("sparse24", Kind(pattern=Pattern.parse("3:4")), 64, "pattern 3:4"),
        ("sparse24", Kind(pattern=Pattern.parse("2:4")), 12, "12 input columns are no multiple of 8"),
        ("sparse24-int4", Kind(pattern=Pattern.parse("2:4")), 64, "symmetric 4-bit codes"),
        ("sparse24-int4", Kind(4, 32, False, Pattern.parse("2:4")), 64, "symmetric 4-bit codes"),
        ("bitmask", Kind(), 64, "no step prunes it"),
    ],
)
def test_kinds_that_have_no_such_form(name, kind, columns, words):
    assert words in FORMATS[name].refuses(kind, (8, columns), False)
    assert "Conv1D" in FORMATS[name].refuses(Kind(4, 32, True, Pattern.parse("2:4")), (8, 64), True)


# hostile tensors


def without(name: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        del tensors[name]

    return change


def replaced(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: change(tensors[name]).contiguous()})


COMMON: list[tuple[str, Callable[[Tensors], None], str]] = [
    ("no index", without("weight_index"), "weight_index is missing"),
    ("index cut", replaced("weight_index", lambda t: t[:, :-1]), "weight_index is uint8"),
    ("index of fewer rows", replaced("weight_index", lambda t: t[:-1]), "weight_index is uint8"),
    ("index of wide numbers", replaced("weight_index", lambda t: t.int()), "weight_index is int32"),
    ("positions twice", replaced("weight_index", lambda t: t * 0), "must rise"),
    ("positions fall", replaced("weight_index", lambda t: t * 0 + 0b00010001), "must rise"),
    ("no weight", without("weight"), "weight is missing"),
    ("weight cut", replaced("weight", lambda t: t[:, :-1]), "weight_index is uint8"),
    ("weight flat", replaced("weight", lambda t: t.flatten()), "weight is"),
]
HOSTILE = [
    *[("sparse24", *case) for case in COMMON],
    ("sparse24", "weight in float64", replaced("weight", lambda t: t.double()), "weight is float64"),
    ("sparse24", "weight of codes", replaced("weight", lambda t: t.to(torch.uint8)), "expected floats"),
    *[("sparse24-int4", *case) for case in COMMON],
    ("sparse24-int4", "weight of floats", replaced("weight", lambda t: t.float()), "expected uint8"),
    ("sparse24-int4", "no scales", without("weight_scale"), "weight_scale is missing"),
    ("sparse24-int4", "scales of fewer rows", replaced("weight_scale", lambda t: t[:-1]), "weight_scale is"),
    ("sparse24-int4", "scale zero", replaced("weight_scale", lambda t: t * 0), "a scale is zero"),
    ("sparse24-int4", "scale infinite", replaced("weight_scale", lambda t: t / 0), "infinite"),
    ("sparse24-int4", "scale NaN", replaced("weight_scale", lambda t: t * torch.nan), "no number"),
    ("sparse24-int4", "no groups", replaced("weight_scale", lambda t: t[:, :0]), "groups do not divide"),
    ("sparse24-int4", "odd groups", replaced("weight_scale", lambda t: t[:, :1].repeat(1, 5)), "groups do not divide"),
    ("sparse24-int4", "scales of whole numbers", replaced("weight_scale", lambda t: t.int()), "weight_scale is int32"),
    ("bitmask", "no weight", without("weight"), "weight is missing"),
    ("bitmask", "weight in float64", replaced("weight", lambda t: t.double()), "weight is float64"),
    ("bitmask", "no mask", without("weight_mask"), "weight_mask is missing"),
    ("bitmask", "no shape", without("weight_shape"), "weight_shape is missing"),
    ("bitmask", "mask cut", replaced("weight_mask", lambda t: t[:, :-1]), "weight_mask is uint8"),
    ("bitmask", "one value too few", replaced("weight", lambda t: t[:-1]), "weight is"),
    ("bitmask", "one bit too many", replaced("weight_mask", lambda t: t | 1), "weight is"),
    ("bitmask", "bits beyond", replaced("weight_shape", lambda t: t - torch.tensor([0, 4])), "bits after the last"),
    ("bitmask", "huge shape", replaced("weight_shape", lambda t: t * 2**40), "weight_mask is uint8"),
    ("bitmask", "negative shape", replaced("weight_shape", lambda t: -t), "two positive"),
]


def hostile_files() -> dict[str, bytes]:
    """The files of tests/hostile: every damage above, and one file of each format that ends too early."""
    files = {}
    for name, case, change, _ in HOSTILE:
        weight = (
            quantized(6, 64)[1] if name == "sparse24-int4" else pruned(6, 64, "row" if name == "bitmask" else "2:4")
        )
        tensors = FORMATS[name].pack(weight, False)
        files[f"{name}/whole.safetensors"] = save(tensors)
        files[f"{name}/truncated.safetensors"] = save(tensors)[:-40]
        change(tensors)
        files[f"{name}/{case.replace(' ', '-')}.safetensors"] = save(tensors)
    return files


def test_the_hostile_folder_is_complete():
    """Readers in other languages can be tested with it. To write it anew: python tests/test_sparse_formats.py"""
    found = {path.relative_to(HERE).as_posix(): path.read_bytes() for path in HERE.rglob("*.safetensors")}
    assert found == hostile_files()


@pytest.mark.parametrize(
    ("name", "case", "words"), [(n, i, w) for n, i, _, w in HOSTILE], ids=[f"{n}: {i}" for n, i, *_ in HOSTILE]
)
def test_hostile_files_are_refused(name, case, words):
    tensors = load_file(HERE / name / f"{case.replace(' ', '-')}.safetensors")
    with pytest.raises(FormatError, match=words):
        FORMATS[name].unpack(tensors, None, False)


@pytest.mark.parametrize("name", ["sparse24", "sparse24-int4", "bitmask"])
def test_the_undamaged_file_is_read_and_the_truncated_one_is_not(name):
    assert FORMATS[name].unpack(load_file(HERE / name / "whole.safetensors"), None, False).shape == (6, 64)
    with pytest.raises(FormatError, match="truncated"):
        read_headers([HERE / name / "truncated.safetensors"])


if __name__ == "__main__":
    shutil.rmtree(HERE, ignore_errors=True)
    for name, content in hostile_files().items():
        (HERE / name).parent.mkdir(parents=True, exist_ok=True)
        (HERE / name).write_bytes(content)
