"""Times int4 products of other engines at one token. Run by bench_cpu_peers.py in an interpreter that has them.

Standard input: {"shapes": [[out, in], ...], "threads": n, "rounds": n}. Standard output: {"versions": {...}, "seconds":
{engine: {"OUTxIN": median seconds per product}}}. An engine that is not installed is left out.
"""

import ctypes
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROUND_SECONDS = 0.02
GGML_PRODUCTS = 16  # in one graph, so that starting its threads is shared out
GGML_F32, GGML_Q4_0 = 0, 2


def main() -> None:
    asked = json.load(sys.stdin)
    versions: dict[str, str] = {}
    seconds: dict[str, dict[str, float]] = {}
    for package, engine in (("onnxruntime", onnxruntime_times), ("llama_cpp_python", ggml_times)):
        if importlib.util.find_spec(package.removesuffix("_python")):
            versions[package] = version(package)
            seconds |= engine(asked["shapes"], asked["threads"], asked["rounds"])
    json.dump({"versions": versions, "seconds": seconds}, sys.stdout)


def median(call: Callable[[], object], rounds: int) -> float:
    """Median seconds per call over rounds of about ROUND_SECONDS."""
    call()
    repeats = max(1, int(ROUND_SECONDS / once(call, 3)))
    return statistics.median(once(call, repeats) for _ in range(rounds))


def once(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def onnxruntime_times(shapes: list[list[int]], threads: int, rounds: int) -> dict[str, dict[str, float]]:
    """MatMulNBits with float32 arithmetic (accuracy level 1) and with activations rounded to int8 (4)."""
    import numpy

    found: dict[str, dict[str, float]] = {}
    for rows, columns in shapes:
        x = {"x": numpy.random.randn(1, columns).astype(numpy.float32)}
        for level, name in ((1, "onnxruntime, float32"), (4, "onnxruntime, int8 activations")):
            session = onnx_session(rows, columns, level, threads)
            seconds = median(lambda session=session, x=x: session.run(None, x), rounds)
            found.setdefault(name, {})[f"{rows}x{columns}"] = seconds
    return found


def onnx_session(rows: int, columns: int, level: int, threads: int) -> Any:
    """A graph with one MatMulNBits of random codes."""
    import numpy
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    block = 128 if columns % 128 == 0 else 64
    codes = numpy.random.randint(0, 256, (rows, columns // block, block // 2), dtype=numpy.uint8)
    scales = numpy.full(rows * (columns // block), 0.01, dtype=numpy.float32)
    node = helper.make_node(
        "MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft",
        K=columns, N=rows, bits=4, block_size=block, accuracy_level=level,
    )  # fmt: skip
    graph = helper.make_graph(
        [node], "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, rows])],
        [numpy_helper.from_array(codes, "codes"), numpy_helper.from_array(scales, "scales")],
    )  # fmt: skip
    sets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    content = helper.make_model(graph, opset_imports=sets, ir_version=10).SerializeToString()
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


class GgmlMemory(ctypes.Structure):
    """struct ggml_init_params."""

    _fields_ = [("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


def ggml_times(shapes: list[list[int]], threads: int, rounds: int) -> dict[str, dict[str, float]]:
    """ggml_mul_mat with Q4_0 (groups of 32, activations rounded to int8), the same weight GGML_PRODUCTS times."""
    base, cpu = ggml_libraries()
    cpu.ggml_cpu_init()
    found = {}
    for rows, columns in shapes:
        size = rows * columns + 64 * columns + GGML_PRODUCTS * 8 * rows + (16 << 20)
        context = ctypes.c_void_p(base.ggml_init(GgmlMemory(size, None, False)))
        weight = ctypes.c_void_p(base.ggml_new_tensor_2d(context, GGML_Q4_0, columns, rows))
        x = ctypes.c_void_p(base.ggml_new_tensor_2d(context, GGML_F32, columns, 1))
        for tensor in (weight, x):  # bytes that are a small positive number as float16 and as float32
            ctypes.memset(base.ggml_get_data(tensor), 0x22, base.ggml_nbytes(tensor))
        graph = ctypes.c_void_p(base.ggml_new_graph(context))
        for _ in range(GGML_PRODUCTS):
            base.ggml_build_forward_expand(graph, ctypes.c_void_p(base.ggml_mul_mat(context, weight, x)))
        seconds = median(lambda c=context, g=graph: cpu.ggml_graph_compute_with_ctx(c, g, threads), rounds)
        found[f"{rows}x{columns}"] = seconds / GGML_PRODUCTS
        base.ggml_free(context)
    return {"llama.cpp, Q4_0": found}


def ggml_libraries() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    """libggml-base and libggml-cpu of llama-cpp-python, with the types of what is called."""
    spec = importlib.util.find_spec("llama_cpp")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "lib"
    base, cpu = (
        ctypes.CDLL(str(next(folder.glob(f"libggml-{part}.so*"))), ctypes.RTLD_GLOBAL) for part in ("base", "cpu")
    )
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    for name, result, arguments in (
        ("ggml_init", pointer, [GgmlMemory]),
        ("ggml_free", None, [pointer]),
        ("ggml_new_tensor_2d", pointer, [pointer, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]),
        ("ggml_get_data", pointer, [pointer]),
        ("ggml_nbytes", size, [pointer]),
        ("ggml_new_graph", pointer, [pointer]),
        ("ggml_mul_mat", pointer, [pointer, pointer, pointer]),
        ("ggml_build_forward_expand", None, [pointer, pointer]),
    ):
        function = getattr(base, name)
        function.restype, function.argtypes = result, arguments
    cpu.ggml_cpu_init.restype = None
    cpu.ggml_graph_compute_with_ctx.argtypes = [pointer, pointer, ctypes.c_int]
    return base, cpu


main()
