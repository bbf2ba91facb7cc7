"""`int4_linear`: layouts come back bit for bit, kernels are as exact as torch; the package stands alone."""

import ast
import itertools
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import llmcompress_kernels
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import relative_error
from kernel_checks import assert_any_strides, assert_fake_agrees, assert_opcheck, assert_refused
from llmcompress_kernels.int4_linear import from_pack_quantized, int4_linear, to_pack_quantized
from llmcompress_kernels.int4_linear.layout import PLANES, TILE, WIDTH, from_tiles, to_tiles
from llmcompress_kernels.int4_linear.reference import dequantize_reference
from torch import Tensor

from llmcompress.formats.pack_quantized import PackQuantized
from llmcompress.grid import IntGrid
from llmcompress.weight import CompressedWeight

ROOT = Path(__file__).parents[1]
PACKAGE = Path(llmcompress_kernels.__file__).parent
BF16, F16 = torch.bfloat16, torch.float16


def quantized(rows: int, columns: int, group: int, symmetric: bool, dtype: torch.dtype = BF16) -> CompressedWeight:
    """A weight on a random grid, with every code used."""
    generator = torch.Generator().manual_seed(rows * columns + group)
    size = (rows, columns // group)
    scale = ((torch.rand(size, generator=generator) + 0.5) / (8 * columns**0.5)).to(dtype)
    zero = torch.full(size, 8) if symmetric else torch.randint(0, 16, size, generator=generator)
    codes = torch.randint(0, 16, (rows, columns), generator=generator, dtype=torch.uint8)
    return CompressedWeight.on_grid(codes, IntGrid(4, group, symmetric, scale, zero.to(torch.int32)))


def stored(weight: CompressedWeight) -> tuple[Tensor, Tensor, Tensor | None]:
    """Its tensors as a checkpoint has them: packed, scale, zero point."""
    tensors = PackQuantized().pack(weight, False)
    return tensors["weight_packed"], tensors["weight_scale"], tensors.get("weight_zero_point")


def arguments(
    tokens: int = 3, rows: int = 24, columns: int = 96, group: int = 32, symmetric: bool = False, **kind: Any
) -> tuple[dict[str, Any], CompressedWeight]:
    """Arguments of `int4_linear` by name, and the weight that they hold."""
    weight = quantized(rows, columns, group, symmetric, **kind)
    words, scale, zero = from_pack_quantized(*stored(weight), columns)
    x, bias = torch.randn(tokens, columns).to(scale.dtype), torch.randn(rows).to(scale.dtype)
    return {"x": x, "words": words, "scale": scale, "zero": zero, "bias": bias}, weight


def exact(weight: CompressedWeight) -> Tensor:
    """(code - zero) * scale in float64."""
    assert weight.grid is not None
    assert weight.codes is not None
    group = weight.grid.group
    zero, scale = (t.double().repeat_interleave(group, 1) for t in (weight.grid.zero, weight.grid.scale))
    return (weight.codes.double() - zero) * scale


# layout


@settings(max_examples=25)
@given(
    rows=st.integers(9, 40),
    groups=st.integers(1, 9),
    group=st.sampled_from([32, 64, 128]),
    symmetric=st.booleans(),
    dtype=st.sampled_from([BF16, F16]),
)
def test_repacking_is_exact_in_both_directions(rows, groups, group, symmetric, dtype):
    weight = quantized(rows, groups * group, group, symmetric, dtype)
    before = stored(weight)
    packed = from_pack_quantized(*before, groups * group)
    for old, new in zip(before, to_pack_quantized(packed, groups * group), strict=True):
        assert (old is None and new is None) or torch.equal(old, new)
    assert torch.equal(dequantize_reference(packed, groups * group, dtype), weight.values)


def test_nibbles_lie_where_the_docstring_says():
    codes = torch.randint(0, 16, (5, 200), dtype=torch.uint8)
    words = to_tiles(codes)
    assert words.shape == (2, 5, WIDTH)
    assert words.is_contiguous()
    for n, k in itertools.product(range(5), range(2 * TILE)):
        word = int(words[k // TILE, n, k % WIDTH])
        code = word >> (4 * (k % TILE // WIDTH)) & 0xF
        assert code == (codes[n, k] if k < 200 else 0)
    assert torch.equal(from_tiles(words, 200), codes)
    assert TILE == PLANES * WIDTH


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_features": 192}, r"packed is \[24, 12\], expected \[24, 24\]"),
        ({"in_features": 95}, "scale"),
        ({"packed": torch.zeros(24, 12)}, "packed is torch.float32"),
        ({"packed": torch.zeros(24, 13, dtype=torch.int32)}, r"packed is \[24, 13\], expected \[24, 12\]"),
        ({"packed": torch.zeros(24 * 12, dtype=torch.int32)}, r"packed is \[288\], expected a matrix"),
        ({"scale": torch.zeros(24 * 3, dtype=BF16)}, r"scale is \[72\], expected a matrix"),
        ({"scale": torch.zeros(24, 2, dtype=BF16)}, "2 groups for 96 columns"),
        ({"scale": torch.zeros(24, 0, dtype=BF16)}, "0 groups"),
        ({"scale": torch.zeros(24, 3)}, "scale is torch.float32"),
        ({"zero_point": torch.zeros(3, 2, dtype=torch.int32)}, "zero_point"),
        ({"zero_point": torch.zeros(3, 3)}, "zero_point is torch.float32"),
    ],
)
def test_a_checkpoint_that_contradicts_itself_is_refused(change, message):
    packed, scale, zero_point = stored(quantized(24, 96, 32, False))
    given_ = {"packed": packed, "scale": scale, "zero_point": zero_point, "in_features": 96} | change
    with pytest.raises(ValueError, match=f"from_pack_quantized: .*{message}"):
        from_pack_quantized(**given_)


# the operator


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("tokens", "columns", "group"), [(1, 576, 64), (3, 96, 32), (17, 256, 128)])
def test_operator_on_cpu_is_as_exact_as_torch(tokens, columns, group, symmetric, dtype):
    given_, weight = arguments(tokens, 70, columns, group, symmetric, dtype=dtype)
    x, bias = given_["x"], given_["bias"]
    truth = x.double() @ exact(weight).T + bias.double()
    torch_error = relative_error(torch.nn.functional.linear(x, weight.values, bias), truth)
    y = int4_linear(**given_)
    assert y.dtype == dtype
    assert relative_error(y, truth) <= 2 * torch_error


def test_any_strides_and_leading_dimensions():
    given_, _ = arguments(tokens=12)
    assert_any_strides(int4_linear, given_, 24)


@pytest.mark.parametrize("symmetric", [True, False])
def test_opcheck(symmetric):
    given_, _ = arguments(symmetric=symmetric)
    assert_opcheck(
        torch.ops.llmcompress.int4_linear.default, tuple(given_.values()), (*list(given_.values())[:4], None)
    )


def test_fake_and_real_agree_on_every_shape():
    given_, _ = arguments()
    assert_fake_agrees(int4_linear, given_)


BAD: list[tuple[str, Any, str]] = [
    ("x", torch.zeros(3, 96), "x is torch.float32"),
    ("x", torch.zeros(3, 64, dtype=BF16), "3 groups of 64 columns"),
    ("x", torch.zeros(3, 192, dtype=BF16), r"words is \[1, 24, 16\], expected \[2, 24, 16\]"),
    ("x", torch.zeros((), dtype=BF16), "x is a scalar"),
    ("words", torch.zeros(1, 24, 16, dtype=torch.int64), "words is torch.int64"),
    ("words", torch.zeros(24, 16, dtype=torch.int32), "words is"),
    ("words", torch.zeros(1, 24, 12, dtype=torch.int32), "words is"),
    ("words", torch.zeros(1, 16, 24, dtype=torch.int32).mT, "words is strided"),
    ("words", torch.zeros(1, 24, 16, dtype=torch.int32, device="meta"), "words is on meta, expected on cpu"),
    ("scale", torch.zeros(3, 24, dtype=F16), "scale is torch.float16, expected torch.bfloat16"),
    ("scale", torch.zeros(3, 25, dtype=BF16), r"scale is \[3, 25\]"),
    ("scale", torch.zeros(24, dtype=BF16), "scale is"),
    ("scale", torch.zeros(0, 24, dtype=BF16), "0 groups"),
    ("scale", torch.zeros(24, 3, dtype=BF16).T, "scale is strided"),
    ("zero", torch.zeros(3, 24, dtype=torch.int8), "zero is torch.int8"),
    ("zero", torch.zeros(2, 24, dtype=torch.uint8), "zero is"),
    ("bias", torch.zeros(24), "bias is torch.float32"),
    ("bias", torch.zeros(3, dtype=BF16), "bias is"),
]


@pytest.mark.parametrize(("argument", "value", "message"), BAD)
def test_bad_arguments_are_refused(argument, value, message):
    given_ = arguments()[0] | {argument: value}
    registered = torch.ops.llmcompress.int4_linear
    assert_refused(int4_linear, given_, registered, tuple(given_.values()), f"int4_linear: .*{message}")


@given(tiles=st.integers(1, 300), programs=st.integers(1, 2000), processors=st.integers(1, 200))
def test_splits_cover_all_tiles_and_none_is_empty(tiles, programs, processors):
    from llmcompress_kernels.launching import MAX_SPLITS, spans

    span, splits = spans(tiles, programs, processors)
    assert (splits - 1) * span < tiles <= splits * span
    assert 1 <= splits <= MAX_SPLITS


# the package


def test_package_stands_alone():
    """The Hub loads it without llmcompress, and under another name; triton waits until a kernel runs."""
    allowed = sys.stdlib_module_names | {"torch", "triton"}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                assert str(node.module).split(".")[0] in allowed, path
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, path
    code = "import sys, llmcompress_kernels; print({'triton', 'llmcompress', 'transformers'} & set(sys.modules))"
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    loaded = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "set()"


def test_kernels_folder_does_not_shadow_hugging_face_kernels():
    """transformers imports `kernels`: ours must not be a package of that name, even from the repository's root."""
    assert not list((ROOT / "kernels").glob("*.py"))
    assert not (ROOT / "kernels.py").exists()


@pytest.mark.slow
def test_wheel_has_the_package_and_not_the_folder(tmp_path):
    pytest.importorskip("setuptools")
    source = tmp_path / "source"  # a build writes into its folder
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("llmcompress", "kernels", "evals", "recipes"):
        shutil.copytree(ROOT / name, source / name)
    build = [sys.executable, "-m", "pip", "wheel", str(source), "--no-deps", "--no-build-isolation", "-w", tmp_path]
    subprocess.run(build, check=True, capture_output=True)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert "llmcompress_kernels/int4_linear/kernel.py" in names
    assert {"llmcompress_kernels/csrc/int4_linear.cpp", "llmcompress_kernels/csrc/common.h"} <= set(names)
    assert "llmcompress/cli.py" in names
    assert not [name for name in names if name.startswith("kernels/")]
