"""`int4_gated_mlp`: as exact as torch on a CPU; what it refuses. The kernels: test_kernels_numerics.py."""

import itertools
from typing import Any

import pytest
import torch
from kernel_cases import int4_weight, relative_error
from kernel_checks import assert_any_strides, assert_fake_agrees, assert_opcheck, assert_refused
from llmcompress_kernels import Int4Weight, int4_gated_mlp
from llmcompress_kernels.int4_gated_mlp.reference import ACTIVATIONS, Gated, int4_gated_mlp_reference
from llmcompress_kernels.int4_linear.reference import dequantize_reference
from torch.nn.functional import linear

BF16, F16 = torch.bfloat16, torch.float16
Arguments = dict[str, Any]


def arguments(
    tokens: int = 3, rows: int = 24, columns: int = 96, group: int = 32, symmetric: bool = False,
    dtype: torch.dtype = BF16, activation: str = "silu",
) -> Arguments:  # fmt: skip
    """Arguments of the operator by name."""
    generator = torch.Generator().manual_seed(tokens + rows + columns)
    gate, up = (int4_weight(rows, columns, group, symmetric, dtype, generator) for _ in range(2))
    x = torch.randn(tokens, columns, generator=generator).to(dtype)
    biases = torch.randn(2, rows, generator=generator).to(dtype)
    return {"x": x, "gate": gate, "up": up, "activation": activation, "gate_bias": biases[0], "up_bias": biases[1]}


def flat(given: Arguments) -> tuple[Any, ...]:
    """Arguments of the registered operator."""
    return (given["x"], *given["gate"], *given["up"], given["gate_bias"], given["up_bias"], given["activation"])


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("tokens", "columns", "group", "activation"),
    [(1, 576, 64, "silu"), (3, 96, 32, "gelu"), (17, 256, 128, "gelu_tanh")],
)
def test_operator_on_cpu_is_as_exact_as_torch(tokens, columns, group, activation, symmetric, dtype):
    given = arguments(tokens, 70, columns, group, symmetric, dtype, activation)
    x, gate, up, gate_bias, up_bias = (given[name] for name in ("x", "gate", "up", "gate_bias", "up_bias"))
    truth = int4_gated_mlp_reference(x, Gated(gate, up, gate_bias, up_bias), activation, torch.float64)
    gates = linear(x, dequantize_reference(gate, columns).to(dtype), gate_bias)
    by_torch = ACTIVATIONS[activation](gates) * linear(x, dequantize_reference(up, columns).to(dtype), up_bias)
    y = int4_gated_mlp(**given)
    assert y.dtype == dtype
    assert relative_error(y, truth) <= 2 * relative_error(by_torch, truth)


def test_activations_differ_and_gate_is_not_up():
    given = arguments()
    results = [int4_gated_mlp(**given | {"activation": name}) for name in ACTIVATIONS]
    swapped = {"gate": given["up"], "up": given["gate"], "gate_bias": given["up_bias"], "up_bias": given["gate_bias"]}
    results.append(int4_gated_mlp(**given | swapped))
    for one, other in itertools.combinations(results, 2):
        assert not torch.equal(one, other)


def test_any_strides_and_leading_dimensions():
    given = arguments(tokens=12)
    assert_any_strides(int4_gated_mlp, given, 24)


@pytest.mark.parametrize("symmetric", [True, False])
def test_opcheck(symmetric):
    given = arguments(symmetric=symmetric)
    assert_opcheck(
        torch.ops.llmcompress.int4_gated_mlp.default, flat(given), flat(given | {"gate_bias": None, "up_bias": None})
    )


def test_fake_and_real_agree_on_every_shape():
    given = arguments()
    assert_fake_agrees(int4_gated_mlp, given)


def other_weight(**kind: Any) -> Int4Weight:
    return arguments(**kind)["up"]


GATE = arguments()["gate"]
BAD: list[tuple[str, Any, str]] = [
    ("x", torch.zeros(3, 96), "x is torch.float32"),
    ("x", torch.zeros(3, 64, dtype=BF16), "gate_scale is 3 groups of 64 columns"),
    ("activation", "relu", "activation is 'relu', expected silu or gelu or gelu_tanh"),
    ("gate", GATE._replace(words=torch.zeros(1, 24, 16, dtype=torch.int64)), "gate_words is torch.int64"),
    ("gate", GATE._replace(words=torch.zeros(1, 16, 24, dtype=torch.int32).mT), "gate_words is strided"),
    ("gate", GATE._replace(zero=torch.zeros(2, 24, dtype=torch.uint8)), r"gate_zero is \[2, 24\], expected \[3, 24\]"),
    ("up", other_weight(rows=25), r"up_bias is \[24\], expected \[25\]"),
    ("up", other_weight(dtype=F16), "up_scale is torch.float16, expected torch.bfloat16"),
    ("up", other_weight(group=96), "up_scale is 1 groups of 96 columns"),
    ("up", other_weight(symmetric=True), "up_zero is absent, expected one, as gate has"),
    ("gate", GATE._replace(zero=None), "up_zero is given, expected None, as of gate"),
    ("gate_bias", torch.zeros(24), "gate_bias is torch.float32"),
    ("up_bias", torch.zeros(3, dtype=BF16), r"up_bias is \[3\], expected \[24\]"),
]


@pytest.mark.parametrize(("argument", "value", "message"), BAD)
def test_bad_arguments_are_refused(argument, value, message):
    given = arguments() | {argument: value}
    registered = torch.ops.llmcompress.int4_gated_mlp
    assert_refused(int4_gated_mlp, given, registered, flat(given), f"int4_gated_mlp: {message}")


def test_two_weights_of_other_sizes_or_groups_are_refused():
    given = arguments(columns=192, group=64)
    for name, up in (
        ("up_words", other_weight(rows=25, columns=192, group=64)),
        ("up_scale", other_weight(columns=192)),
    ):
        with pytest.raises(ValueError, match=f"int4_gated_mlp: {name} is"):
            int4_gated_mlp(given["x"], given["gate"], up)
