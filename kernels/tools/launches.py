"""What each operator launches for M tokens, as far as the model of GPUs wants to know it: one row of MODELS each.

Grids, splits and tiles come from the operators' own launchers, registers and instructions from the resource tables. To
add an operator: a function that gives what it does, one that gives what the dense form takes, and a row in MODELS. What
follows a comma in a name tells how the operator is used.
"""

import dataclasses
import functools
import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gpu_model import Code, Launch, blas, stream
from gpus import Gpu
from resource_files import TABLES
from resources import Case

GROUP = 128
RANK = 16  # of LoRA adapters


@dataclass(frozen=True)
class Spent:
    """What an operator does: launches of its own kernels, and seconds in the BLAS and elsewhere in torch."""

    launches: list[Launch]
    torch: float = 0.0


@dataclass(frozen=True)
class Modelled:
    """An operator.

    spent         what it does: GPU, M, rows and columns of each weight
    dense         seconds of the same in dense bfloat16
    weight_bytes  of its weights of so many rows and columns, packed
    """

    spent: Callable[[Gpu, int, int, int], Spent]
    dense: Callable[[Gpu, int, int, int], float]
    weight_bytes: Callable[[int, int], float]


@functools.cache
def compiled(operator: str) -> dict[str, Any]:
    """The resource table of an operator."""
    return json.loads((TABLES / f"{operator}.json").read_text(encoding="utf-8"))["kernels"]


@functools.cache
def code_of(operator: str, architecture: int, kernel: str, bits: float = 4.0, **constants: Any) -> Code:
    """The only configuration of a kernel with these constants, compiled for bfloat16 and to store results.

    Raises LookupError if there is none or more than one: then the launcher and this file disagree.
    """
    launch = importlib.import_module(f"llmcompress_kernels.{operator}.launch")
    found = [
        configuration
        for configuration in launch.configurations()
        if configuration.kernel == kernel
        and not configuration.parts
        and constants.items() <= configuration.constants.items()
    ]
    if len(found) != 1:
        raise LookupError(f"launches: {operator} has {len(found)} {kernel} with {constants}, expected one")
    row = compiled(operator)[Case(operator, found[0], architecture, "bf16").name()]
    return Code(
        row["registers"], row["shared_bytes"], found[0].warps, found[0].stages, row["instructions"],
        row["loop_per_weight"], found[0].weights, bits,
    )  # fmt: skip


def int4_bytes(rows: int, columns: int) -> float:
    """Symmetric 4-bit weight with 16-bit scales."""
    return rows * columns * (4 + 16 / GROUP) / 8


def sparse24_bytes(rows: int, columns: int) -> float:
    """Two of four in 16 bits, with a position of 2 bits each."""
    return rows * columns * 9 / 8


def sparse24_int4_bytes(rows: int, columns: int) -> float:
    """Two of four in 4 bits, with positions and scales."""
    return rows * columns * (3 + 16 / GROUP) / 8


@dataclass(frozen=True)
class Reduce:
    """The kernel that adds up splits, and the outputs that one of its programs makes."""

    code: Code
    rows: int
    tokens: int = 1


def product_launch(
    plan: Any, code: Code, shape: tuple[int, int, int], packed: float, matrices: int = 1, summed: bool = False
) -> Launch:
    """The kernel that multiplies one token or few with packed weights.

    plan: `launching.Plan`. shape: M, rows, columns. packed: bytes of all weights, each read once, as programs that read
    the same are neighbours. matrices: weights with the same rows. summed: float32 sums are stored, even of one split.
    """
    tokens, rows, columns = shape
    down, across, splits = plan.grid
    results = 4.0 * splits * matrices * tokens * rows if summed or splits > 1 else 2.0 * tokens * rows
    padded = across * plan.tiles.rows * down * plan.tiles.tokens
    flops = 2.0 * matrices * padded * columns if plan.tiles.tokens > 1 else 0.0
    return Launch(code, across * down * splits, code.weights * plan.span, packed + 2 * tokens * columns, results, flops)


def reduce_launch(reduce: Reduce, sums: float, tokens: int, rows: int) -> Launch:
    """The kernel that reads so many bytes of sums and makes outputs of them."""
    programs = -(-rows // reduce.rows) * -(-tokens // reduce.tokens)
    return Launch(reduce.code, programs, 0, sums, 2.0 * tokens * rows)


def packed_product(
    plan: Any, code: Code, shape: tuple[int, int, int], packed: float, reduce: Reduce, matrices: int = 1
) -> list[Launch]:
    """`product_launch`, and the reduce if the inner dimension is split."""
    launch = product_launch(plan, code, shape, packed, matrices)
    return [launch] if plan.splits == 1 else [launch, reduce_launch(reduce, launch.stored, *shape[:2])]


def unpacked(gpu: Gpu, rows: int, columns: int) -> Launch:
    """Writing the dense weight of `int4_linear`."""
    from llmcompress_kernels.int4_linear.launch import DEQUANTIZE
    from llmcompress_kernels.int4_linear.layout import TILE

    made = code_of("int4_linear", gpu.architecture, "int4_dequantize", GROUP=GROUP, zero_ptr=None)
    programs = -(-rows // DEQUANTIZE.rows) * -(-columns // TILE)
    return Launch(made, programs, made.weights, int4_bytes(rows, columns), 2.0 * rows * columns)


def summing(gpu: Gpu) -> Reduce:
    """`reduce_splits`, which several operators use."""
    from llmcompress_kernels.launching import REDUCE

    return Reduce(code_of("int4_linear", gpu.architecture, "reduce_splits"), REDUCE.rows)


def int4_plan(gpu: Gpu, tokens: int, rows: int, columns: int) -> tuple[Any, Code]:
    """How `int4_linear` multiplies with a packed weight, and its code."""
    from llmcompress_kernels.int4_linear import launch
    from llmcompress_kernels.int4_linear.layout import TILE
    from llmcompress_kernels.launching import planned

    plan = planned(launch.choices(gpu.architecture // 10, GROUP), tokens, rows, -(-columns // TILE), gpu.processors)
    kernel, block = ("int4_gemv", {}) if tokens == 1 else ("int4_gemm", {"BM": plan.tiles.tokens})
    return plan, code_of("int4_linear", gpu.architecture, kernel, GROUP=GROUP, zero_ptr=None, **block)


def int4_linear(gpu: Gpu, tokens: int, rows: int, columns: int) -> Spent:
    from llmcompress_kernels.int4_linear.launch import blas_tokens

    if tokens > blas_tokens(gpu.architecture // 10):
        return Spent([unpacked(gpu, rows, columns)], blas(gpu, tokens, rows, columns))
    plan, code = int4_plan(gpu, tokens, rows, columns)
    return Spent(packed_product(plan, code, (tokens, rows, columns), int4_bytes(rows, columns), summing(gpu)))


def int4_gated_mlp(gpu: Gpu, tokens: int, rows: int, columns: int) -> Spent:
    """With SwiGLU."""
    from llmcompress_kernels.int4_gated_mlp import launch
    from llmcompress_kernels.int4_linear.layout import TILE
    from llmcompress_kernels.launching import REDUCE, planned

    if tokens > launch.fused_tokens(gpu.architecture // 10):
        return two_calls(gpu, tokens, rows, columns)
    plan = planned((launch.GEMV, *launch.GEMM), tokens, rows, -(-columns // TILE), gpu.processors)
    kernel, block = ("gated_gemv", {}) if tokens == 1 else ("gated_gemm", {"BM": plan.tiles.tokens})
    whole = {"gate_zero_ptr": None, "up_zero_ptr": None, "parts_ptr": None, "ACTIVATION": "silu"}
    code = code_of("int4_gated_mlp", gpu.architecture, kernel, GROUP=GROUP, **whole, **block)
    reduce = Reduce(code_of("int4_gated_mlp", gpu.architecture, "reduce_gated", ACTIVATION="silu"), REDUCE.rows)
    packed = 2 * int4_bytes(rows, columns)
    return Spent(packed_product(plan, code, (tokens, rows, columns), packed, reduce, matrices=2))


def two_calls(gpu: Gpu, tokens: int, rows: int, columns: int) -> Spent:
    """What `int4_gated_mlp` does, by `int4_linear` twice and torch's activation and product."""
    one = int4_linear(gpu, tokens, rows, columns)
    return Spent(2 * one.launches, 2 * one.torch + activating(gpu, tokens, rows))


def activating(gpu: Gpu, tokens: int, rows: int) -> float:
    """Seconds of an activation and a product in torch, which read and write five times M x rows."""
    return stream(gpu, 2, 5 * 2.0 * tokens * rows)


def dense_gated(gpu: Gpu, tokens: int, rows: int, columns: int) -> float:
    """Two linears, an activation and a product."""
    return 2 * blas(gpu, tokens, rows, columns) + activating(gpu, tokens, rows)


def int4_lora_linear(gpu: Gpu, tokens: int, rows: int, columns: int) -> Spent:
    """With an adapter of RANK."""
    from llmcompress_kernels.int4_linear.launch import WIDE, blas_tokens
    from llmcompress_kernels.int4_lora_linear.launch import REDUCE

    down = blas(gpu, tokens, RANK, columns)
    if tokens > blas_tokens(gpu.architecture // 10):
        return Spent([unpacked(gpu, rows, columns)], dense_adapted(gpu, tokens, rows, columns))
    shape, packed = (tokens, rows, columns), int4_bytes(rows, columns) + 2 * RANK * rows
    made = code_of("int4_lora_linear", gpu.architecture, "lora_gemm_reduce", R=RANK)
    reduce = Reduce(made, REDUCE.rows, REDUCE.tokens)
    plan, code = int4_plan(gpu, *shape)
    if plan.tiles == WIDE:
        one = product_launch(plan, code, shape, packed, summed=True)
        return Spent([one, reduce_launch(reduce, one.stored, tokens, rows)], down)
    if plan.splits == 1:
        kernel, block = ("lora_gemv", {}) if tokens == 1 else ("lora_gemm", {"BM": plan.tiles.tokens})
        code = code_of("int4_lora_linear", gpu.architecture, kernel, GROUP=GROUP, zero_ptr=None, R=RANK, **block)
    return Spent(packed_product(plan, code, shape, packed, reduce), down)


def dense_adapted(gpu: Gpu, tokens: int, rows: int, columns: int) -> float:
    """Three linears, of which the last adds to the result of the first."""
    adapter = blas(gpu, tokens, RANK, columns) + blas(gpu, tokens, rows, RANK)
    return blas(gpu, tokens, rows, columns) + adapter + stream(gpu, 0, 2.0 * tokens * rows)


def sparse24_linear(gpu: Gpu, tokens: int, rows: int, columns: int) -> Spent:
    """From the packed weight alone."""
    from llmcompress_kernels.sparse24_linear.launch import blas_tokens

    if tokens > blas_tokens(gpu.architecture // 10):
        return expanded24(gpu, tokens, rows, columns)
    return packed24(gpu, tokens, rows, columns)


def expanded24(gpu: Gpu, tokens: int, rows: int, columns: int) -> Spent:
    """The weight of `sparse24_linear` written out for the BLAS."""
    from llmcompress_kernels.sparse24_linear.launch import EXPAND
    from llmcompress_kernels.sparse24_linear.layout import TILE

    code = code_of("sparse24_linear", gpu.architecture, "sparse24_expand", bits=9.0)
    programs = -(-rows // EXPAND.rows) * -(-columns // TILE)
    launch = Launch(code, programs, code.weights, sparse24_bytes(rows, columns), 2.0 * rows * columns)
    return Spent([launch], blas(gpu, tokens, rows, columns))


def packed24(gpu: Gpu, tokens: int, rows: int, columns: int) -> Spent:
    """The weight of `sparse24_linear` expanded in registers."""
    from llmcompress_kernels.sparse24_linear import launch
    from llmcompress_kernels.sparse24_linear.layout import TILE

    plan = launch.plan_of(tokens, rows, -(-columns // TILE), gpu.processors)
    kernel, block = ("sparse24_gemv", {}) if tokens == 1 else ("sparse24_gemm", {"BM": plan.tiles.tokens})
    code = code_of("sparse24_linear", gpu.architecture, kernel, bits=9.0, BN=plan.tiles.rows, **block)
    return Spent(packed_product(plan, code, (tokens, rows, columns), sparse24_bytes(rows, columns), summing(gpu)))


def formed24(gpu: Gpu, tokens: int, rows: int, columns: int) -> Spent:
    """`sparse24_linear` with a form for torch's library, at twice the peak of dense tensor cores.

    CUTLASS gives y the other way round, so it is copied; x is copied if it has to be padded.
    """
    from llmcompress_kernels.sparse24_linear.launch import LIBRARY_TOKENS
    from llmcompress_kernels.sparse24_linear.library import TOKENS_MULTIPLE

    if tokens <= LIBRARY_TOKENS:
        return packed24(gpu, tokens, rows, columns)
    copies = 1 if tokens % TOKENS_MULTIPLE else 0, 1 if gpu.architecture // 10 == 8 else 0
    traffic = 4.0 * tokens * (copies[0] * columns + copies[1] * rows)
    product = blas(gpu, tokens, rows, columns, sparse24_bytes(rows, columns), speed=2.0)
    return Spent([], product + stream(gpu, sum(copies), traffic))


def forming(gpu: Gpu, rows: int, columns: int) -> float:
    """Seconds to make that form, once per weight.

    For CUTLASS by some thirty operators of torch, which move 19 bytes per weight, most of them to compute the order of
    positions; for cuSPARSELt the dense weight is written and read, and the form is written.
    """
    if gpu.architecture // 10 == 8:
        return stream(gpu, 30, 19.0 * rows * columns)
    return stream(gpu, 2, 2 * (2.0 * rows * columns + sparse24_bytes(rows, columns)))


def sparse24_int4_linear(gpu: Gpu, tokens: int, rows: int, columns: int) -> Spent:
    """On sparse tensor cores up to 256 tokens, which takes a launch that orders x before."""
    from llmcompress_kernels.int4_linear.launch import BLAS_TOKENS
    from llmcompress_kernels.launching import planned
    from llmcompress_kernels.sparse24_int4_linear import launch
    from llmcompress_kernels.sparse24_int4_linear.layout import BLOCK, TILE

    made = functools.partial(code_of, "sparse24_int4_linear", gpu.architecture)
    packed, blocks = sparse24_int4_bytes(rows, columns), -(-columns // BLOCK)
    if tokens > BLAS_TOKENS:
        code = made("sparse24_int4_dequantize", bits=3.0, GROUP=GROUP)
        programs = -(-rows // launch.DEQUANTIZE.rows) * blocks
        expanded = Launch(code, programs, code.weights, packed, 2.0 * rows * columns)
        return Spent([expanded], blas(gpu, tokens, rows, columns))
    plan = planned(launch.FRAGMENT, tokens, rows, -(-columns // TILE), gpu.processors)
    block, (down, across, _) = plan.tiles.tokens, plan.grid
    order = Launch(
        made("token_fragments", BM=block), blocks * down, 0, 2.0 * tokens * columns, 2.0 * down * block * columns
    )
    code = made("sparse24_int4_gemm_sp", bits=3.0, GROUP=GROUP, BM=block)
    product = packed_product(plan, code, (tokens, rows, columns), packed, summing(gpu))
    flops = down * block * across * plan.tiles.rows * columns  # a multiply-add for every second weight
    return Spent([order, dataclasses.replace(product[0], flops=float(flops)), *product[1:]])


def teal_linear(gpu: Gpu, tokens: int, rows: int, columns: int) -> Spent:
    """With half of the inputs left out at one token; with several, torch masks x and reads all of the weight."""
    from llmcompress_kernels.launching import planned
    from llmcompress_kernels.teal_linear import launch

    if tokens > 1:
        return Spent([], blas(gpu, tokens, rows, columns) + stream(gpu, 1, 2 * 2.0 * tokens * columns))
    plan = planned((launch.GEMV,), tokens, rows, -(-columns // launch.INPUTS), gpu.processors)
    code = code_of("teal_linear", gpu.architecture, "teal_gemv", bits=8.0)  # 16, of half of the columns
    return Spent(packed_product(plan, code, (tokens, rows, columns), halved_bytes(rows, columns), summing(gpu)))


def halved_bytes(rows: int, columns: int) -> float:
    """Half of the columns in 16 bits."""
    return 2.0 * rows * columns / 2


MODELS = {
    "int4_linear": Modelled(int4_linear, blas, int4_bytes),
    "int4_gated_mlp": Modelled(int4_gated_mlp, dense_gated, lambda rows, columns: 2 * int4_bytes(rows, columns)),
    "int4_lora_linear": Modelled(int4_lora_linear, dense_adapted, int4_bytes),
    "sparse24_linear": Modelled(sparse24_linear, blas, sparse24_bytes),
    "sparse24_linear, form": Modelled(formed24, blas, sparse24_bytes),
    "sparse24_int4_linear": Modelled(sparse24_int4_linear, blas, sparse24_int4_bytes),
    "teal_linear": Modelled(teal_linear, blas, halved_bytes),
}
