"""Storage formats: what comes back is what the method chose, bit for bit; sizes are exact; stock libraries agree."""

import json
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import CompressedTensorsConfig

from llmcompress.formats import FORMATS
from llmcompress.formats.pack_quantized import PackQuantized, words
from llmcompress.grid import IntGrid
from llmcompress.methods import METHODS, IntMethod, Method
from llmcompress.methods.rtn import RTN
from llmcompress.weight import CompressedWeight

PACKED = PackQuantized()
SHAPES = {  # out, in, group: odd rows, two words short of a group, one row, a row that no group divides
    "17x96-g32": (17, 96, 32),
    "17x192-g64": (17, 192, 64),
    "1x128-g128": (1, 128, 128),
    "5x100-row": (5, 100, "row"),
}
kinds = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
all_bits = pytest.mark.parametrize("bits", [2, 3, 4, 8], ids="{}bits".format)

QUANTIZERS = [name for name, cls in METHODS.items() if issubclass(cls, IntMethod)]


def weight_of_every_sign(rows: int, columns: int) -> Tensor:
    """Rows of both signs, all positive (zero at the first code), all negative (at the last) and all zero."""
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    w[1::4], w[2::4], w[3::4] = w[1::4].abs(), -w[2::4].abs(), 0
    return w


def compress(method: Method, shape: tuple[int, int], dtype: torch.dtype) -> CompressedWeight:
    x = torch.randn(300, shape[1], generator=torch.Generator().manual_seed(1))
    return method.compress(weight_of_every_sign(*shape), x.T @ x / 300, dtype)


def scheme_of(method: Method) -> dict[str, Any]:
    """The scheme that config.json will hold for a linear, after a trip through JSON."""
    config = json.loads(json.dumps(PACKED.config({"layer": method.kind}, [])))
    return config["config_groups"]["group_0"]


def check_round_trip(fmt: str, method: IntMethod, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = compress(method, shape, dtype)
    for transposed in (False, True):
        if FORMATS[fmt].refuses(method.kind, shape, transposed):
            continue
        tensors = FORMATS[fmt].pack(weight, transposed)
        back = FORMATS[fmt].unpack(tensors, scheme_of(method), transposed)
        assert back.dtype == weight.values.dtype == dtype
        assert torch.equal(back, weight.values)
        assert FORMATS[fmt].suffix in tensors
        assert all(tensor.is_contiguous() for tensor in tensors.values())
        assert sum(tensor.nbytes for tensor in tensors.values()) == FORMATS[fmt].stored_bytes(
            method.kind, shape, dtype.itemsize
        )


@kinds
@all_bits
@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("fmt", FORMATS)
def test_round_trip(fmt, case, bits, symmetric):
    rows, columns, group = case
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        check_round_trip(fmt, RTN(bits=bits, group_size=group, symmetric=symmetric), (rows, columns), dtype)


@kinds
@all_bits
@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_round_trip_of_every_method(fmt, name, bits, symmetric):
    method = METHODS[name].parse({"bits": bits, "group_size": 32, "symmetric": symmetric}, "")
    check_round_trip(fmt, method, (17, 96), torch.bfloat16)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(9, 40),
    groups=st.integers(1, 4),
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_codes_and_zeros_come_back(rows, groups, bits, symmetric, seed):
    """Not only what a method would choose: every code and every zero that the grid allows."""
    generator = torch.Generator().manual_seed(seed)
    codes, zero = (torch.randint(0, 2**bits, s, generator=generator) for s in [(rows, 32 * groups), (rows, groups)])
    zero = torch.full_like(zero, 2 ** (bits - 1)) if symmetric else zero
    scale = (0.1 + torch.rand(rows, groups, generator=generator)).to(torch.bfloat16)
    weight = CompressedWeight.on_grid(codes.to(torch.uint8), IntGrid(bits, 32, symmetric, scale, zero.to(torch.int32)))
    method = RTN(bits=bits, group_size=32, symmetric=symmetric)
    assert torch.equal(PACKED.unpack(PACKED.pack(weight, False), scheme_of(method), False), weight.values)


@kinds
@all_bits
@pytest.mark.parametrize("rows", [1, 4, 8])
def test_few_rows_come_back_or_are_refused(rows, bits, symmetric):
    """Zero points that fit in one word per group: the library's own decompressor must be able to read them."""
    method = RTN(bits=bits, group_size=32, symmetric=symmetric)
    if PACKED.refuses(method.kind, (rows, 64), False) is None:
        check_round_trip("pack-quantized", method, (rows, 64), torch.bfloat16)


# pack-quantized, byte by byte


def test_packed_layout():
    """4 bits, one row of 32: eight codes in a word, the lowest bits first; scale and shape beside it."""
    codes = (torch.arange(32) % 16).to(torch.uint8)[None]
    grid = IntGrid(4, 32, True, torch.ones(1, 1, dtype=torch.bfloat16), torch.full((1, 1), 8, dtype=torch.int32))
    tensors = PACKED.pack(CompressedWeight.on_grid(codes, grid), False)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == {
        "weight_packed": (torch.int32, (1, 4)),
        "weight_scale": (torch.bfloat16, (1, 1)),
        "weight_shape": (torch.int64, (2,)),
    }
    assert [word % 2**32 for word in tensors["weight_packed"][0].tolist()] == [0x76543210, 0xFEDCBA98] * 2
    assert tensors["weight_shape"].tolist() == [1, 32]


@all_bits
def test_zero_points_are_packed_along_the_rows(bits):
    tensors = PACKED.pack(compress(RTN(bits=bits, group_size=32, symmetric=False), (17, 96), torch.bfloat16), False)
    assert tensors["weight_zero_point"].shape == (words(17, bits), 3)
    assert tensors["weight_zero_point"].dtype == torch.int32


@pytest.mark.parametrize(
    ("count", "bits", "expected"), [(1, 2, 1), (32, 3, 3), (33, 3, 4), (17, 4, 3), (96, 8, 24), (17, 3, 2)]
)
def test_words(count, bits, expected):
    assert words(count, bits) == expected


def test_refusals():
    rtn = RTN()
    assert PACKED.refuses(rtn.kind, (8, 64), False) is None
    assert "Conv1D" in PACKED.refuses(rtn.kind, (8, 64), True)
    assert "integer grid" in PACKED.refuses(Method().kind, (8, 64), False)
    assert all(FORMATS["dense"].refuses(m.kind, (8, 64), t) is None for m in (rtn, Method()) for t in (False, True))


# dense


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "Conv1D"])
def test_dense_is_the_weight_as_the_module_keeps_it(transposed):
    weight = compress(RTN(group_size=32), (17, 96), torch.bfloat16)
    stored = FORMATS["dense"].pack(weight, transposed)["weight"]
    assert stored.is_contiguous()
    assert torch.equal(stored.T if transposed else stored, weight.values)
    assert stored.shape == ((96, 17) if transposed else (17, 96))


def test_dense_leaves_config_alone():
    assert FORMATS["dense"].config({"a": RTN().kind}, ["lm_head"]) is None


# quantization_config


@kinds
@pytest.mark.parametrize("group_size", [32, 128, "row"], ids="g{}".format)
@all_bits
def test_config_is_what_the_library_defines(bits, group_size, symmetric):
    method = RTN(bits=bits, group_size=group_size, symmetric=symmetric)
    config = json.loads(json.dumps(PACKED.config({"a.q": method.kind, "a.k": method.kind}, ["lm_head", "a.v"])))
    parsed = QuantizationConfig.model_validate(config)
    assert parsed.model_dump(mode="json") == config
    assert set(config) <= set(QuantizationConfig.model_fields)
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", "pack-quantized")
    assert config["quantization_status"] == "compressed"
    assert config["ignore"] == ["lm_head", "a.v"]
    (group,) = parsed.config_groups.values()
    assert group.targets == ["Linear"]
    assert group.input_activations is None
    assert group.output_activations is None
    weights = group.weights
    assert (weights.num_bits, weights.type, weights.symmetric, weights.dynamic) == (bits, "int", symmetric, False)
    assert (weights.strategy, weights.group_size) == (
        ("channel", None) if group_size == "row" else ("group", group_size)
    )


@kinds
def test_transformers_reads_the_config(symmetric):
    config = PACKED.config({"a": RTN(symmetric=symmetric).kind}, ["lm_head"])
    read = CompressedTensorsConfig(**json.loads(json.dumps(config)))
    assert read.quantization_config.config_groups["group_0"].weights.num_bits == 4
    assert read.quantization_config.ignore == ["lm_head"]
    assert read.is_quantization_compressed


@kinds
def test_config_says_nothing_of_sparsity(symmetric):
    config = PACKED.config({"a": RTN(symmetric=symmetric).kind}, [])
    assert not [key for key in config if "sparsity" in key and config[key]]
    assert "sparsity_config" not in config


def test_linears_on_different_grids_get_groups_of_their_own():
    four, eight = RTN(bits=4).kind, RTN(bits=8, group_size="row").kind
    gptq = METHODS["gptq"].parse({"bits": 4}, "").kind  # another method, the same grid as `four`
    methods = {"m.0.q": four, "m.0.down": eight, "m.1.q": gptq, "m.1.down": eight}
    config = json.loads(json.dumps(PACKED.config(methods, ["lm_head"])))
    groups = {
        tuple(group["targets"]): (group["weights"]["num_bits"], group["weights"]["strategy"])
        for group in config["config_groups"].values()
    }
    assert groups == {("m.0.q", "m.1.q"): (4, "group"), ("m.0.down", "m.1.down"): (8, "channel")}
    assert len(CompressedTensorsConfig(**config).quantization_config.config_groups) == 2


def test_scheme_of_each_grid_validates_alone():
    config = PACKED.config({"q": RTN(bits=3, symmetric=False).kind, "d": RTN(bits=2, group_size=128).kind}, [])
    schemes = [QuantizationScheme.model_validate(group) for group in config["config_groups"].values()]
    assert [scheme.weights.num_bits for scheme in schemes] == [3, 2]
