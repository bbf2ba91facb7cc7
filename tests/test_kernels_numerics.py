"""Every Triton kernel in Triton's interpreter: as exact as torch on odd shapes. interpreted_program.py runs the cases.

All cases that were selected run in one process, since starting one takes as long as many of them.
"""

import itertools
from pathlib import Path
from typing import Any

import pytest
from kernel_cases import assert_exact, case, interpreted
from llmcompress_kernels.int4_gated_mlp.reference import ACTIVATIONS

Case = dict[str, Any]


def linear(*shape: Any, **kind: Any) -> Case:
    return case("int4_linear", *shape, **kind)


def gated(*shape: Any, activation: str = "silu", **kind: Any) -> Case:
    return case("int4_gated_mlp", *shape, activation=activation, **kind)


def lora(*shape: Any, rank: int, **kind: Any) -> Case:
    return case("int4_lora_linear", *shape, rank=rank, **kind)


def sparse(tokens: int, rows: int, columns: int, *dtype: str, **kind: Any) -> Case:
    return case("sparse24_linear", tokens, rows, columns, 8, *dtype, **kind)


def sparse4(*shape: Any, sparse_cores: bool = False, **kind: Any) -> Case:
    return case("sparse24_int4_linear", *shape, sparse_cores=sparse_cores, **kind)


def teal(tokens: int, columns: int, rows: int, *dtype: str, threshold: float = 0.625, **kind: Any) -> Case:
    return case("teal_linear", tokens, rows, columns, 1, *dtype, threshold=threshold, **kind)


CASES = {
    "int4_linear: one token, two splits, last tile of 32 columns": linear(1, 40, 1056, 32),
    "int4_linear: one token, symmetric": linear(1, 70, 576, 64, "float16", zero=False, bias=False),
    "int4_linear: three tokens": linear(3, 70, 576, 64),
    "int4_linear: 17 tokens, two splits": linear(17, 40, 1056, 32, "float16"),
    "int4_linear: 17 tokens, transposed, symmetric": linear(17, 33, 256, 128, zero=False, transposed=True),
    "int4_linear: 40 tokens": linear(40, 20, 192, 64, bias=False),
    "int4_linear: two programs of tokens": linear(140, 40, 192, 64, bias=False),
    "int4_linear: unpacked for the BLAS": linear(257, 40, 160, 32, "float16"),
    "int4_linear: no tokens": linear(0, 40, 160, 32),
    "int4_gated_mlp: one token, two splits, last tile of 32 columns": gated(1, 40, 1056, 32),
    "int4_gated_mlp: one token, gelu, symmetric": gated(
        1, 70, 576, 64, "float16", activation="gelu", zero=False, bias=False
    ),
    "int4_gated_mlp: three tokens, gelu_tanh": gated(3, 70, 576, 64, activation="gelu_tanh"),
    "int4_gated_mlp: 17 tokens, two splits, gelu": gated(17, 40, 1056, 32, "float16", activation="gelu"),
    "int4_gated_mlp: 17 tokens, transposed, symmetric": gated(17, 33, 256, 128, zero=False, transposed=True),
    "int4_gated_mlp: 36 tokens, two products, two splits": gated(36, 20, 1056, 32, "float16", activation="gelu"),
    "int4_gated_mlp: 70 tokens, two products": gated(70, 40, 192, 64, bias=False),
    "int4_gated_mlp: unpacked for the BLAS": gated(257, 40, 160, 32, activation="gelu_tanh"),
    "int4_gated_mlp: no tokens": gated(0, 40, 160, 32),
    "int4_lora_linear: one token, two splits, last tile of 32 columns": lora(1, 40, 1056, 32, rank=8),
    "int4_lora_linear: one token, symmetric": lora(1, 70, 576, 64, "float16", rank=33, zero=False, bias=False),
    "int4_lora_linear: three tokens, highest rank": lora(3, 70, 576, 64, rank=64),
    "int4_lora_linear: 17 tokens, two splits": lora(17, 40, 1056, 32, "float16", rank=16),
    "int4_lora_linear: 17 tokens, transposed, symmetric": lora(17, 33, 256, 128, rank=1, zero=False, transposed=True),
    "int4_lora_linear: 40 tokens": lora(40, 20, 192, 64, rank=17, bias=False),
    "int4_lora_linear: widest tile, so the reduce adds the update": lora(70, 40, 192, 64, rank=17, bias=False),
    "int4_lora_linear: unpacked for the BLAS": lora(257, 40, 160, 32, rank=8),
    "int4_lora_linear: no tokens": lora(0, 40, 160, 32, rank=8),
    "sparse24_linear: one token, two splits, last plane of 8 columns": sparse(1, 20, 2056),
    "sparse24_linear: one token, float16": sparse(1, 70, 576, "float16", bias=False),
    "sparse24_linear: three tokens": sparse(3, 70, 576),
    "sparse24_linear: 17 tokens, two splits": sparse(17, 33, 2056, "float16"),
    "sparse24_linear: 17 tokens, transposed": sparse(17, 33, 264, transposed=True, bias=False),
    "sparse24_linear: three programs of tokens": sparse(70, 40, 192, bias=False),
    "sparse24_linear: expanded for the BLAS": sparse(257, 40, 168, "float16"),
    "sparse24_linear: no tokens": sparse(0, 40, 160),
    "sparse24_int4_linear: one token, two splits, last block of 32 columns": sparse4(1, 20, 1056, 32),
    "sparse24_int4_linear: one token, float16": sparse4(1, 70, 576, 64, "float16", bias=False),
    "sparse24_int4_linear: three tokens": sparse4(3, 40, 576, 64),
    "sparse24_int4_linear: 17 tokens, two splits": sparse4(17, 20, 1056, 32, "float16"),
    "sparse24_int4_linear: 17 tokens, transposed": sparse4(17, 33, 256, 128, transposed=True),
    "sparse24_int4_linear: two programs of tokens": sparse4(70, 40, 192, 64, bias=False),
    "sparse24_int4_linear: unpacked for the BLAS": sparse4(257, 40, 160, 32, "float16"),
    "sparse24_int4_linear: no tokens": sparse4(0, 40, 160, 32),
    "sparse24_int4_linear: sparse cores, one token, two splits": sparse4(1, 20, 2080, 32, sparse_cores=True),
    "sparse24_int4_linear: sparse cores, three tokens": sparse4(3, 70, 576, 64, sparse_cores=True),
    "sparse24_int4_linear: sparse cores, 16 tokens, transposed": sparse4(
        16, 40, 640, 128, "float16", transposed=True, sparse_cores=True
    ),
    "sparse24_int4_linear: sparse cores, 35 tokens": sparse4(35, 33, 128, 128, bias=False, sparse_cores=True),
    "teal_linear: one program": teal(1, 96, 40),
    "teal_linear: splits, odd sizes": teal(1, 289, 131, "float16"),
    "teal_linear: no bias, float32": teal(1, 100, 30, "float32", bias=False),
    "teal_linear: nothing left out": teal(1, 96, 128, threshold=0.0),
    "teal_linear: all left out": teal(1, 96, 128, threshold=50.0),
    "teal_linear: fewer inputs than a tile": teal(1, 5, 129, bias=False, threshold=0.1),
    "teal_linear: three tokens": teal(3, 96, 40),
    "teal_linear: no tokens": teal(0, 96, 40),
}

UNPACKED = "int4_dequantize"
BLACKWELL = {  # on compute capability 10, where instructions are scarce: case and the first kernel that is started
    "int4_linear: 17 tokens, the tile of 32": (linear(17, 33, 256, 128, capability=10), "int4_gemm"),
    "int4_linear: 65 tokens, no wide tile, so unpacked": (linear(65, 40, 192, 64, capability=10), UNPACKED),
    "int4_gated_mlp: one token, fused": (gated(1, 40, 192, 64, capability=10), "gated_gemv"),
    "int4_gated_mlp: three tokens, two products": (gated(3, 40, 192, 64, capability=10), "int4_gemm"),
    "int4_gated_mlp: 65 tokens, unpacked": (gated(65, 20, 192, 64, capability=10), UNPACKED),
    "int4_lora_linear: 40 tokens": (lora(40, 20, 192, 64, rank=8, capability=10), "lora_gemm"),
    "int4_lora_linear: 65 tokens, unpacked": (lora(65, 20, 192, 64, rank=8, capability=10), UNPACKED),
    "sparse24_linear: 96 tokens": (sparse(96, 20, 192, capability=10), "sparse24_gemm"),
    "sparse24_linear: 97 tokens, expanded": (sparse(97, 20, 192, capability=10), "sparse24_expand"),
}

SHAPES = [(1, 130), (3, 65), (17, 129), (33, 64), (65, 20)]  # tokens and rows
GROUPS, DTYPES = (32, 64, 128), ("bfloat16", "float16")
INT4 = list(itertools.product(GROUPS, DTYPES, (True, False)))  # and zeros with a bias, or neither


def int4_shape(tokens: int, rows: int, group: int, dtype: str) -> tuple[int, int, int, int, str]:
    """With as many columns as groups of that size allow, none a multiple of a tile unless it must be."""
    return tokens, rows, 640 if group == 128 else 576, group, dtype


GRIDS = {
    "int4_linear": [
        linear(*int4_shape(*shape, group, dtype), zero=zero, bias=zero)
        for shape, (group, dtype, zero) in itertools.product(SHAPES, INT4)
    ],
    "int4_gated_mlp": [
        gated(*int4_shape(*shape, group, dtype), zero=zero, bias=zero, activation=activation)
        for (shape, activation), (group, dtype, zero) in itertools.product(
            zip(SHAPES, 2 * list(ACTIVATIONS), strict=False), INT4
        )
    ],
    "int4_lora_linear": [
        lora(*int4_shape(*shape, group, dtype), zero=zero, bias=zero, rank=rank)
        for (shape, rank), (group, dtype, zero) in itertools.product(zip(SHAPES, (8, 16, 20, 64, 4), strict=True), INT4)
    ],
    "sparse24_linear": [
        sparse(*shape, columns, dtype, bias=bias)
        for shape, columns, dtype, bias in itertools.product(SHAPES, (8, 576, 680), DTYPES, (True, False))
    ],
    "sparse24_int4_linear": [
        sparse4(*int4_shape(*shape, group, dtype), bias=bias, sparse_cores=cores)
        for shape, (group, dtype, bias), cores in itertools.product([*SHAPES, (9, 40)], INT4, (True, False))
    ],
    "teal_linear": [
        teal(1, columns, rows, dtype, threshold=threshold, bias=bias)
        for (columns, rows), dtype, threshold, bias in itertools.product(
            [(576, 1536), (1536, 576), (33, 1), (2048, 257)], DTYPES, (0.25, 1.0), (True, False)
        )
    ],
}


@pytest.fixture(scope="module")
def results(request) -> dict[str, Case]:
    """Of the selected cases, by name."""
    selected = [
        item for item in request.session.items if item.path == Path(__file__) and "results" in item.fixturenames
    ]
    names = [item.callspec.params["name"] for item in selected]
    return dict(zip(names, interpreted([CASES[name] for name in names]), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_kernels_are_as_exact_as_torch(name, results):
    assert_exact(results[name], CASES[name])


@pytest.fixture(scope="module")
def on_blackwell() -> dict[str, Case]:
    return dict(zip(BLACKWELL, interpreted([asked for asked, _ in BLACKWELL.values()]), strict=True))


@pytest.mark.parametrize("name", BLACKWELL)
def test_kernels_for_newer_gpus_are_as_exact(name, on_blackwell):
    asked, kernel = BLACKWELL[name]
    assert_exact(on_blackwell[name], asked)
    assert on_blackwell[name]["kernels"][0] == kernel


@pytest.mark.slow
@pytest.mark.parametrize("operator", GRIDS)
def test_kernels_are_as_exact_as_torch_on_all_grids(operator):
    for found, asked in zip(interpreted(GRIDS[operator]), GRIDS[operator], strict=True):
        assert_exact(found, asked)


def test_every_operator_has_cases():
    package = Path(__file__).parents[1] / "kernels/torch-ext/llmcompress_kernels"
    operators = {path.parent.name for path in package.glob("*/launch.py")}
    assert operators == {asked["operator"] for asked in CASES.values()} == set(GRIDS)
