"""`int4_linear` on the CPU: every way to compute it is as exact as torch; failures to compile are told and repaired."""

import ctypes
import itertools
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from kernel_cases import int4_weight, relative_error
from llmcompress_kernels import crossover, native, sparse24_int4_linear, sparse24_linear
from llmcompress_kernels.int4_linear import cpu, int4_linear, torch_cpu
from llmcompress_kernels.int4_linear.layout import Int4Weight, from_tiles, sample_weight, to_tiles
from llmcompress_kernels.int4_linear.reference import dequantize_reference
from llmcompress_kernels.sparse24_int4_linear import cpu as cpu_sparse24_int4
from llmcompress_kernels.sparse24_linear import cpu as cpu_sparse24
from torch import Tensor

BF16, F16 = torch.bfloat16, torch.float16
SOURCE = native.SOURCES / "int4_linear.cpp"
WAYS = ["rows", "many", "panels", "torch int4", "torch panels"]
SHAPES = [(1, 96, 32), (3, 576, 64), (17, 256, 128), (70, 1056, 32)]  # tokens, columns, group
OLDER = {  # flags, and the feature without which this CPU does not run the code
    "AVX2": (("-march=haswell",), "avx2"),
    "AVX-VNNI": (("-march=alderlake",), "avx_vnni"),
    "AVX-512": (("-march=skylake-avx512",), "avx512bw"),
    "AVX512-VNNI": (("-march=icelake-server",), "avx512_vbmi2"),
    "AVX512-BF16": (("-march=native", "-mno-amx-tile", "-mno-amx-bf16"), "avx512_bf16"),
}


def older_library(source: Path, processor: str) -> ctypes.CDLL:
    """Compiled for one of OLDER."""
    flags, feature = OLDER[processor]
    if feature not in native.processor():
        pytest.skip(f"this CPU has no {feature}")
    return native.load(source, ("-O1", *flags, *native.FLAGS[2:]))


def kernels() -> cpu.Kernels:
    found = cpu.native()
    if found is None:
        pytest.skip("no compiled kernels on this machine")
    return found


def way(name: str) -> Callable[[Tensor, Int4Weight, Tensor | None], Tensor]:
    """One of the ways in which the operator may be computed."""
    if name == "torch int4":
        return torch_cpu.by_torch_int4
    if name == "torch panels":
        return torch_cpu.by_panels
    return {"rows": kernels().by_rows, "many": kernels().of_many, "panels": kernels().by_panels}[name]


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Uninitialized memory is NaN, so that an output which is not written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Inputs(NamedTuple):
    """Arguments of a linear."""

    x: Tensor
    weight: Int4Weight
    bias: Tensor


def inputs(
    tokens: int = 3, rows: int = 24, columns: int = 96, group: int = 32, symmetric: bool = False,
    dtype: torch.dtype = BF16,
) -> Inputs:  # fmt: skip
    """Random ones, the same at every call."""
    generator = torch.Generator().manual_seed(tokens * rows + columns)
    weight = int4_weight(rows, columns, group, symmetric, dtype, generator)
    x, bias = torch.randn(tokens, columns, generator=generator), torch.randn(rows, generator=generator)
    return Inputs(x.to(dtype), weight, bias.to(dtype))


def guarded(x: Tensor) -> Tensor:
    """The same values with NaN around them in memory."""
    around = torch.full((x.shape[0] + 2, x.shape[1] + 64), torch.nan, dtype=x.dtype)
    around[1:-1, 32:-32] = x
    return around[1:-1, 32:-32]


def check(compute: Callable[..., Tensor], given: Inputs) -> None:
    """At most twice the error of torch in the same dtype, against float64."""
    x, weight = guarded(given.x), given.weight
    exact = dequantize_reference(weight, x.shape[1], torch.float64)
    for bias in (given.bias, None):
        truth = torch.nn.functional.linear(x.double(), exact, None if bias is None else bias.double())
        torch_error = relative_error(torch.nn.functional.linear(x, exact.to(x.dtype), bias), truth)
        y = compute(x, weight, bias)
        assert y.dtype == x.dtype
        assert relative_error(y, truth) <= 2 * torch_error


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("tokens", "columns", "group"), SHAPES)
@pytest.mark.parametrize("name", WAYS)
def test_every_way_is_as_exact_as_torch(name, tokens, columns, group, symmetric, dtype):
    if name == "torch int4" and dtype == F16:
        pytest.skip("torch has it for bfloat16 only")
    rows = 80 if name == "torch int4" else 71
    check(way(name), inputs(tokens, rows, columns, group, symmetric, dtype))


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", WAYS[:3])
def test_every_way_is_as_exact_as_torch_on_more_shapes(name):
    """Each number of tokens that is a case of its own; one row; several blocks of rows, tokens and columns."""
    for tokens, rows, columns, group in [
        *((tokens, 40, 160, 32) for tokens in range(1, 40)),
        *((5, rows, 192, 64) for rows in (1, 15, 16, 17, 31, 33, 64, 257, 600)),
        *((33, 70, columns, group) for columns, group in ((32, 32), (64, 64), (128, 128), (4096, 128), (5632, 64))),
        (700, 40, 1536, 128),
    ]:
        check(way(name), inputs(tokens, rows, columns, group))


def test_integers_keep_small_values_beside_large_ones():
    """One column in 128 is 150 times the others, and its weight is zero: what is lost shows."""
    x, weight, _ = inputs(5, 64, 384, 128, symmetric=True)
    codes = from_tiles(weight.words, 384)
    codes[:, 7::128] = 8
    x[:, 7::128] = 150.0
    check(kernels().by_rows, Inputs(x, weight._replace(words=to_tiles(codes)), torch.zeros(64, dtype=BF16)))


@pytest.mark.parametrize("group", [32, 64, 128])
def test_eight_bits_of_x_would_not_do(group):
    """Why x is not rounded to 8 bits: that alone, with one scale per token and group, is off by more than the limit."""
    x, weight, _ = inputs(64, 256, 2048, group)
    exact = dequantize_reference(weight, 2048, torch.float64)
    truth = x.double() @ exact.T
    parts = x.double().view(64, -1, group)
    scale = parts.abs().amax(2, keepdim=True) / 127
    rounded = ((parts / scale).round() * scale).view(64, 2048)
    assert relative_error(rounded @ exact.T, truth) > 2 * relative_error(x @ exact.to(BF16).T, truth)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("factor", [2.0**-110, 2.0**-20, 2.0**100])
def test_integers_take_x_of_any_size(factor, dtype):
    x, weight, _ = inputs(2, 64, 128, 128, symmetric=True, dtype=dtype)
    scaled = (x.double() * factor).to(dtype)
    truth = scaled.double() @ dequantize_reference(weight, 128, torch.float64).T
    y = kernels().by_rows(scaled, weight, None)
    if truth.abs().max() < torch.finfo(dtype).max and scaled.isfinite().all():
        limit = 2 * torch.finfo(dtype).eps * truth.abs().max() + 128 * torch.finfo(dtype).tiny
        assert (y.double() - truth).abs().max() <= limit
    else:
        assert not y.isfinite().all()


def beyond_a_nibble() -> Inputs:
    """Zero points up to 255, as no file has them: the operator takes what is uint8."""
    given = inputs(40, 71)
    assert given.weight.zero is not None
    return given._replace(weight=given.weight._replace(zero=16 * given.weight.zero + 15))


@pytest.mark.parametrize("name", WAYS[:3])
def test_zero_points_beyond_a_nibble(name):
    check(way(name), beyond_a_nibble())


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("processor", OLDER)
def test_code_for_older_processors(processor):
    """Compiled without what this CPU has beyond them, and little optimized: the compiler takes most of the time."""
    kernels()
    older = cpu.Kernels(older_library(SOURCE, processor))
    assert not older.matrix
    for (tokens, columns, group), dtype, symmetric in itertools.product(SHAPES, (BF16, F16), (True, False)):
        for compute in (older.by_rows, older.of_many):
            check(compute, inputs(tokens, 71, columns, group, symmetric, dtype))
    for compute in (older.by_rows, older.of_many):
        check(compute, beyond_a_nibble())


def test_torch_operator_sees_changed_weights():
    """Its converted copy is not used after the weight was written to, and is dropped with the weight."""
    x, weight, _ = inputs(rows=32)
    first = torch_cpu.by_torch_int4(x, weight, None)
    weight.scale.mul_(2)
    assert torch.equal(torch_cpu.by_torch_int4(x, weight, None), 2 * first)


def test_converted_weights_have_a_limit(monkeypatch):
    monkeypatch.setattr(torch_cpu, "KEPT_BYTES", 0)
    monkeypatch.setattr(torch_cpu, "by_torch_int4", None)
    x, weight, _ = inputs(1, 32)
    assert torch_cpu.int4_linear_torch(x, weight, None).shape == (1, 32)


@pytest.mark.parametrize("name", WAYS[:3])
@pytest.mark.parametrize("tokens", [1, 40, 300])
def test_same_bits_whatever_the_threads(name, tokens):
    """Also where two threads share the tokens, and three the rows."""
    given = inputs(tokens, 200, 576, 64)
    compute, threads = way(name), torch.get_num_threads()
    found = []
    try:
        for count in (1, 1, 2, 3):
            torch.set_num_threads(count)
            found.append(compute(*given))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:]) or name == "panels"
    assert torch.equal(found[0], found[1])


def test_infinite_and_nan_inputs_come_through():
    for bad, name in itertools.product((torch.inf, torch.nan), WAYS[:3]):
        x, weight, _ = inputs(2, 40)
        x[1, 5] = bad
        y = way(name)(x, weight, None)
        assert y[0].isfinite().all()
        assert not y[1].isfinite().any()


# compiling


@pytest.fixture
def fresh(tmp_path, monkeypatch) -> Iterator[Path]:
    """An empty cache folder, and nothing loaded yet."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.delenv(native.SWITCH, raising=False)
    forget()
    yield folder / "llmcompress"
    forget()


def forget() -> None:
    native.library.cache_clear()
    cpu.native.cache_clear()
    crossover.found.cache_clear()


def compiler_exists() -> bool:
    return bool([name for name in ("g++", "clang++", "c++") if native.shutil.which(name)])


@pytest.fixture(scope="module")
def ready(tmp_path_factory) -> Path:
    """A library that answers 42, compiled once for all tests that need one and not the compiler."""
    if not compiler_exists():
        pytest.skip("no compiler on this machine")
    folder = tmp_path_factory.mktemp("ready")
    source, library = folder / "answer.cpp", folder / "answer.so"
    source.write_text('extern "C" __attribute__((visibility("default"))) int answer() { return 42; }\n')
    native.build(source, native.find_compiler(), native.FLAGS, library)
    return library


@pytest.fixture
def answer(ready, tmp_path, monkeypatch) -> Path:
    """Its source, and as compiler a script that copies the library and writes a line to `log`."""
    script, log, source = tmp_path / "compiler", tmp_path / "log", tmp_path / "source" / "answer.cpp"
    script.write_text(f'#!/bin/sh\necho "$@" >> {log}\nsleep 0.2\nfor last; do :; done\ncp {ready} "$last"\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    source.parent.mkdir()
    shutil.copy(ready.with_suffix(".cpp"), source)
    return source


def load_answer(source: Path) -> int:
    return native.load(source, native.FLAGS).answer()


def falls_back(message: str, rows: int = 24) -> None:
    """One warning that says why, at the first call only; the operator works."""
    x, weight, bias = inputs(1, rows)
    with pytest.warns(RuntimeWarning, match=message):
        first = int4_linear(x, *weight, bias)
    assert torch.equal(int4_linear(x, *weight, bias), first)  # another warning would be an error
    check(lambda *given: int4_linear(given[0], *given[1], given[2]), inputs(1, rows))


@pytest.mark.parametrize("rows", [24, 32])
def test_without_a_compiler(rows, fresh, monkeypatch):
    """Panels are unpacked where torch's operator does not take the number of rows."""
    calls: list[int] = []

    def counted(x: Tensor, weight: Int4Weight, bias: Tensor | None) -> Tensor:
        calls.append(len(x))
        return by_torch_int4(x, weight, bias)

    by_torch_int4 = torch_cpu.by_torch_int4
    monkeypatch.setattr(torch_cpu, "by_torch_int4", counted)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    falls_back(r"no C\+\+ compiler .* was found; install g\+\+\. Slower operators of torch are used", rows)
    assert bool(calls) is (rows == 32)
    assert not list(fresh.glob("*.so"))


def test_a_compiler_that_fails(fresh, monkeypatch):
    monkeypatch.setenv("CXX", "false")
    falls_back("false failed: no message")
    assert not [path for path in fresh.iterdir() if path.suffix != ".lock"]


def test_another_processor(fresh, monkeypatch):
    monkeypatch.setattr(native.platform, "machine", lambda: "riscv64")
    falls_back("linux on riscv64")


def test_a_torch_without_openmp(fresh, monkeypatch):
    """The threads are its own: nothing is compiled where they would not be found."""
    monkeypatch.setattr(native, "OPENMP", ("GOMP_parallel", "no_such_function"))
    falls_back("torch has loaded no OpenMP library with no_such_function, as GNU's")
    assert not fresh.exists()


def test_a_cache_that_cannot_be_written(fresh, monkeypatch):
    fresh.parent.write_text("a file where the folder should be")
    falls_back("File exists|Not a directory" if compiler_exists() else "compiler")


def test_switched_off_without_a_word(fresh, monkeypatch):
    monkeypatch.setenv(native.SWITCH, "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cpu.native() is None
        int4_linear(*inputs()[:1], *inputs().weight)


def test_an_error_of_the_compiler_is_quoted(fresh, answer, monkeypatch):
    monkeypatch.delenv("CXX")
    answer.write_text("int answer( { return 42; }\n")
    with pytest.raises(native.Unavailable, match=r"failed: .*answer\.cpp:1:.*error"):
        native.load(answer, native.FLAGS)
    assert not [path for path in fresh.iterdir() if path.suffix != ".lock"]


def test_a_folder_that_others_may_write_to_is_not_loaded_from(fresh, answer):
    """Somebody could have put a library there, and its checksum."""
    fresh.mkdir(parents=True, exist_ok=True)
    fresh.chmod(0o777)
    with pytest.raises(native.Unavailable, match=r"others may write to .*; make it yours alone"):
        native.load(answer, native.FLAGS)
    fresh.chmod(0o700)
    assert load_answer(answer) == 42


def test_without_a_home_thresholds_are_measured_and_nothing_is_compiled(answer, monkeypatch):
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(native.Path, "home", homeless)
    with pytest.raises(native.Unavailable, match="no home folder; set XDG_CACHE_HOME"):
        native.load(answer, native.FLAGS)
    few = many = lambda x, weight, bias: x
    crossover.found.cache_clear()
    assert crossover.crossover("homeless", BF16, few, many, nothing, (576, 576)) in (*crossover.CANDIDATES, 96)


def test_compiled_once_and_again_when_something_changes(fresh, answer):
    assert load_answer(answer) == 42
    (made,) = fresh.glob("*.so")
    before = made.stat().st_mtime_ns
    assert load_answer(answer) == 42
    assert made.stat().st_mtime_ns == before
    (answer.parent / "header.h").write_text("// another version\n")
    assert load_answer(answer) == 42
    assert len(list(fresh.glob("*.so"))) == 2


@pytest.mark.parametrize("damage", ["truncated", "empty", "no checksum", "another checksum"])
def test_a_damaged_library_is_made_again(fresh, answer, damage):
    """A truncated one could end the process when it is loaded, so it must not be."""
    path = fresh / f"answer-{native.fingerprint(answer, native.find_compiler(), native.FLAGS)}.so"
    path.parent.mkdir(parents=True)
    native.build(answer, native.find_compiler(), native.FLAGS, path)  # not loaded: that of a damaged file is the test
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "no checksum":
        native.checksum_file(path).unlink()
    else:
        native.checksum_file(path).write_bytes(b"\xff" * 64)
    assert not native.is_whole(path)
    assert load_answer(answer) == 42
    assert native.is_whole(path)


def start(source: Path) -> subprocess.Popen[str]:
    code = "import sys, pathlib, native; print(native.load(pathlib.Path(sys.argv[1]), native.FLAGS).answer())"
    return subprocess.Popen(
        [sys.executable, "-c", code, str(source)], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(native.SOURCES.parent)},  # of the module: torch takes seconds
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> None:
    out, error = process.communicate(timeout=120)
    assert (process.returncode, out.strip()) == (0, "42"), error


def test_two_processes_compile_once(fresh, answer, tmp_path):
    processes = [start(answer) for _ in range(2)]
    for process in processes:
        finish(process)
    assert len((tmp_path / "log").read_text().splitlines()) == 1
    assert not list(fresh.glob("build-*"))


# the crossover


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """Seconds by which ways say how long they take, in place of the time that passes."""
    now = [0.0]
    monkeypatch.setattr(crossover, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return now


class Timed:
    """Two ways that take what they are said to; `calls` has what was called, with how many tokens."""

    def __init__(self, clock: list[float], few: Callable[[int], float], many: Callable[[int], float]) -> None:
        self.clock, self.seconds = clock, {"few": few, "many": many}
        self.calls: list[tuple[str, int]] = []

    def way(self, name: str) -> Callable[..., None]:
        def call(x: Tensor, weight: object, bias: Tensor | None) -> None:
            self.calls.append((name, len(x)))
            self.clock[0] += self.seconds[name](len(x))

        return call

    def crossover(self, shape: tuple[int, int] = (576, 576)) -> int:
        crossover.found.cache_clear()
        return crossover.crossover("test", BF16, self.way("few"), self.way("many"), nothing, shape)


def nothing(dtype: torch.dtype, rows: int, columns: int) -> None:
    """In place of a weight."""


def test_crossover_is_measured_once_and_kept(fresh, clock):
    ways = Timed(clock, lambda tokens: 0.001 * tokens, lambda tokens: 0.007)
    assert ways.crossover() == 8
    (path,) = fresh.glob("crossover-*.json")
    assert json.loads(path.read_text())["tokens"] == 8
    ways.calls.clear()
    assert ways.crossover() == 8
    assert not ways.calls
    for damage in ("", "[]", '{"tokens": -3}', '{"tokens": "x"}'):
        path.write_text(damage)
        assert ways.crossover() == 8
    assert json.loads(path.read_text())["tokens"] == 8
    assert len(list(fresh.iterdir())) == 1


@pytest.mark.parametrize("tokens", [*crossover.CANDIDATES, crossover.NONE])
def test_crossover_finds_every_number_of_tokens(tokens, fresh, clock):
    ways = Timed(clock, lambda x: 0.001 * x, lambda x: 0.001 * tokens - 0.0005)
    assert ways.crossover() == tokens
    assert len({x for _, x in ways.calls}) <= 4


@pytest.mark.parametrize("seconds", [0.1, 100.0])
def test_crossover_takes_turns_and_is_not_misled_by_slow_calls(seconds, fresh, clock, monkeypatch):
    monkeypatch.setattr(crossover, "SECONDS", seconds)

    def disturbed(tokens: int) -> float:
        return 0.007 + 0.1 * (len(ways.calls) % 8 == 3)

    ways = Timed(clock, lambda tokens: 0.001 * tokens, disturbed)
    assert ways.crossover() == 8
    assert {call for call, _ in ways.calls[0::2]} == {"many"}
    assert {call for call, _ in ways.calls[1::2]} == {"few"}


def test_crossover_ends_in_time(fresh, clock):
    ways = Timed(clock, lambda tokens: 0.2, lambda tokens: 0.3)
    assert ways.crossover() == crossover.NONE
    assert len(ways.calls) == 3 * 2 * crossover.FEWEST  # three numbers of tokens


def test_crossover_of_weights_of_every_class(fresh, clock):
    sampled: list[tuple[int, int]] = []

    def sample(dtype: torch.dtype, rows: int, columns: int) -> None:
        sampled.append((rows, columns))

    few, many = lambda x, weight, bias: None, lambda x, weight, bias: None
    for shape in ((576, 576), (192, 576), (512, 1024), (1024, 1023), (1024, 1024), (4096, 14336)):
        crossover.crossover("test", BF16, few, many, sample, shape)
    assert sampled == list(crossover.CLASSES.values())
    assert len(list(fresh.glob("crossover-*.json"))) == 3


@pytest.mark.parametrize("shape", crossover.CLASSES.values(), ids=str)
def test_samples_are_weights_that_every_way_takes(shape):
    rows, columns = shape
    for dtype in (BF16, F16):
        x = torch.randn(1, columns).to(dtype)  # of one token, which needs no search
        assert int4_linear(x, *sample_weight(dtype, rows, columns)).shape == (1, rows)
        for operator, module in ((sparse24_linear, cpu_sparse24), (sparse24_int4_linear, cpu_sparse24_int4)):
            sample = module.Kernels.sample(dtype, rows, columns)
            assert operator(x, *sample).shape == (1, rows)
            if (compiled := module.native()) is not None:
                assert compiled.of_many(x, sample, None).shape == (1, rows)


def test_crossover_without_a_folder(fresh, clock):
    fresh.parent.write_text("a file where the folder should be")
    assert Timed(clock, lambda tokens: 1.0, lambda tokens: 2.0).crossover() == crossover.NONE
