"""The model of GPUs: occupancy against known values, waves, limits, and the table in the README."""

import dataclasses
import itertools

import cases
import gpu_model
import launches
import layers
import pytest
import resource_files
import roofline
from cases import LARGE, Target
from gpu_model import COPY_SHARE, LATENCY, LAUNCH, Code, Launch, duration, limits, occupancy, waves
from gpus import GPUS, SCHEDULERS
from hypothesis import given
from hypothesis import strategies as st
from launches import MODELS

A100, ADA, H100, B200 = GPUS
SMALL = Code(registers=32, shared_bytes=0, warps=4, stages=1, instructions=100, loop_per_weight=0.0, weights=8192)


@pytest.mark.parametrize(
    ("gpu", "registers", "shared", "warps", "programs"),
    [
        (A100, 32, 0, 8, 8),  # all 64 warps
        (A100, 64, 0, 4, 8),  # 2048 registers a warp: 32 warps
        (A100, 66, 0, 4, 7),  # 2304 a warp, as they come 256 at a time: 28 warps
        (A100, 33, 0, 4, 12),  # 1280 a warp: 51 would fit, but 12 on each scheduler do
        (A100, 255, 0, 8, 1),  # 8192 a warp: 8 warps
        (A100, 32, 48 << 10, 4, 3),  # 49 KB of 164
        (A100, 32, 163 << 10, 4, 1),  # the largest block
        (A100, 16, 0, 1, 32),  # no more blocks than 32
        (ADA, 32, 0, 8, 6),  # all 48 warps
        (ADA, 16, 0, 1, 24),  # no more blocks than 24
        (H100, 32, 75 << 10, 4, 3),  # 76 KB of 228
        (B200, 128, 0, 4, 4),
    ],
)
def test_occupancy_is_what_nvidias_calculator_gives(gpu, registers, shared, warps, programs):
    code = dataclasses.replace(SMALL, registers=registers, shared_bytes=shared, warps=warps)
    assert occupancy(gpu, code) == programs


def test_a_program_that_fits_nowhere_is_an_error():
    with pytest.raises(ValueError, match=r"no program of .* fits on an SM of RTX 4090"):
        occupancy(ADA, dataclasses.replace(SMALL, shared_bytes=100 << 10))


@pytest.mark.parametrize(("programs", "found"), [(3, [3]), (4, [4]), (5, [4, 1]), (12, [4, 4, 4]), (0, [])])
def test_waves(programs, found):
    assert waves(programs, 4) == found


@given(programs=st.integers(0, 5000), slots=st.integers(1, 700))
def test_waves_run_every_program_once(programs, slots):
    found = waves(programs, slots)
    assert sum(found) == programs
    assert len(found) == -(-programs // slots)
    assert all(0 < wave <= slots for wave in found)


def test_a_launch_that_memory_bounds_lasts_for_its_bytes():
    launch = Launch(SMALL, programs=100_000, weights=8192, loaded=6e9, stored=3e9)
    seconds, limit = duration(H100, launch)
    assert seconds == pytest.approx(LAUNCH + 9e9 / (H100.bandwidth * COPY_SHARE))
    assert limit == "memory"


def test_few_bytes_in_flight_bound_a_small_grid():
    """132 programs of 4096 bytes each: 541 KB every LATENCY, far less than what the memory could give."""
    launch = Launch(SMALL, programs=132, weights=8192 * 100, loaded=132 * 4096 * 100.0, stored=0)
    assert duration(H100, launch) == (pytest.approx(LAUNCH + 100 * LATENCY), "latency")
    pipelined = dataclasses.replace(SMALL, stages=4, shared_bytes=3 * 4096, loop_per_weight=0.01)
    assert duration(H100, dataclasses.replace(launch, code=pipelined))[0] == pytest.approx(LAUNCH + 100 / 3 * LATENCY)


def test_instructions_of_the_busiest_processor_are_issued():
    code = dataclasses.replace(SMALL, instructions=0, loop_per_weight=2.0)
    launch = Launch(code, programs=H100.processors + 1, weights=32_000, loaded=1.0, stored=0)
    issue = limits(H100, launch, launch.programs)["issue"]
    assert issue == pytest.approx(2 * 2.0 * 32_000 / 32 / (SCHEDULERS * H100.clock))  # two programs on one of them


def test_tensor_cores_at_their_peak():
    launch = Launch(SMALL, programs=H100.processors, weights=8192, loaded=1.0, stored=0, flops=H100.flops)
    assert limits(H100, launch, launch.programs)["tensor cores"] == pytest.approx(1.0)


@given(
    loaded=st.floats(1e3, 1e9),
    more=st.floats(1.01, 10),
    programs=st.integers(1, 5000),
    gpu=st.sampled_from(GPUS),
    loop=st.floats(0, 5),
)
def test_more_of_anything_is_never_quicker(loaded, more, programs, gpu, loop):
    code = dataclasses.replace(SMALL, loop_per_weight=loop)
    launch = Launch(code, programs, 8192, loaded, loaded)
    before = duration(gpu, launch)[0]
    for changed in (
        dataclasses.replace(launch, loaded=more * loaded),
        dataclasses.replace(launch, stored=more * loaded),
        dataclasses.replace(launch, flops=1e9 * more),
        dataclasses.replace(launch, code=dataclasses.replace(code, loop_per_weight=loop + more)),
    ):
        assert duration(gpu, changed)[0] >= before
    slower = dataclasses.replace(gpu, bandwidth=gpu.bandwidth / more, clock=gpu.clock / more)
    assert duration(slower, launch)[0] >= before


@pytest.mark.parametrize(("gpu", "products"), [(A100, 1024), (ADA, 256), (H100, 2048), (B200, 4096)])
def test_clocks_and_peaks_of_the_datasheets_fit_each_other(gpu, products):
    """Multiply-adds of a processor in a cycle, which the whitepapers give too."""
    assert gpu.flops / gpu.processors / gpu.clock / 2 == pytest.approx(products, rel=2e-3)
    assert gpu.source


# operators


@pytest.mark.parametrize("tokens", roofline.TOKENS)
@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("operator", MODELS)
def test_no_prediction_is_better_than_the_bytes_allow(operator, gpu, tokens):
    for rows, columns in roofline.LAYERS:
        found = roofline.predict(operator, gpu, tokens, rows, columns)
        assert 0 < found.share <= COPY_SHARE
        assert found.seconds > LAUNCH
        least = MODELS[operator].weight_bytes(rows, columns) / (gpu.bandwidth * COPY_SHARE) + LAUNCH
        assert found.ratio <= MODELS[operator].dense(gpu, tokens, rows, columns) / least


def test_every_operator_is_modelled():
    operators = {path.parent.name for path in resource_files.PACKAGE.glob("*/launch.py")}
    assert operators == {name.partition(",")[0] for name in MODELS}
    assert set(roofline.TOKENS) == set(layers.TOKENS)


@pytest.mark.parametrize(("tokens", "times"), [(1, 1), (16, 1), (64, 1), (256, 2)])
def test_all_weights_are_made_once_for_each_tile_of_tokens(tokens, times):
    rows, columns = 4096, 4096
    for model, matrices in ((launches.int4_linear, 1), (launches.int4_gated_mlp, 2)):
        found = model(H100, tokens, rows, columns)
        products = [launch for launch in found.launches if launch.weights]
        assert sum(one.programs * one.weights for one in products) >= matrices * times * rows * columns
        read = matrices * launches.int4_bytes(rows, columns) + len(products) * 2 * tokens * columns
        assert sum(one.loaded for one in products) == read
        assert sum(one.flops for one in products) >= (matrices * 2 * tokens * rows * columns if tokens > 1 else 0)
        assert (found.torch > 0) == (len(products) > 1)  # the activation, where no kernel of ours has both sums


def test_many_tokens_go_through_the_dense_weight():
    rows, columns = 4096, 4096
    found = launches.int4_linear(H100, 4096, rows, columns)
    (unpack,) = found.launches
    assert unpack.programs * unpack.weights == rows * columns
    assert found.torch == gpu_model.blas(H100, 4096, rows, columns)


@pytest.mark.parametrize("shape", [s for s in layers.SHAPES if s.parts == "gate, up"], ids=lambda shape: shape.model)
@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_a_gated_mlp_is_never_slower_than_two_calls(gpu, shape):
    for tokens in (*roofline.TOKENS, 17, 32, 33, 65, 128):
        apart, at_once = (
            seconds(gpu, model(gpu, tokens, shape.rows, shape.columns))
            for model in (launches.two_calls, launches.int4_gated_mlp)
        )
        assert at_once <= 1.005 * apart, tokens


def seconds(gpu, spent):
    return spent.torch + sum(duration(gpu, launch)[0] for launch in spent.launches)


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_a_sparse_weight_is_expanded_where_that_is_faster(gpu):
    """Up to a quarter off: one limit serves layers of all sizes."""
    for (rows, columns), tokens in itertools.product(roofline.LAYERS, (2, 16, 64, 96, 128, 192, 256)):
        chosen, packed, expanded = (
            seconds(gpu, model(gpu, tokens, rows, columns))
            for model in (launches.sparse24_linear, launches.packed24, launches.expanded24)
        )
        assert chosen <= 1.25 * min(packed, expanded), (rows, tokens)


def test_making_a_form_takes_longer_than_a_product_of_few_tokens():
    """So it is made once, and not in every product."""
    for gpu in GPUS:
        product = seconds(gpu, launches.formed24(gpu, 128, 28672, 8192))
        assert launches.forming(gpu, 28672, 8192) > product


def test_fewer_bits_are_fewer_bytes():
    sizes = [MODELS[name].weight_bytes(128, 256) for name in ("sparse24_int4_linear", "int4_linear", "sparse24_linear")]
    assert [8 * size / (128 * 256) for size in sizes] == [3.125, 4.125, 9.0]


@pytest.mark.parametrize("tokens", [8, 16, 64])
def test_sparse_tensor_cores_do_half_the_work(tokens):
    sparse = launches.sparse24_int4_linear(H100, tokens, 4096, 4096).launches
    assert len(sparse) >= 2  # one orders x
    assert sparse[1].flops == tokens * 4096 * 4096


def test_a_configuration_that_does_not_exist_is_an_error():
    with pytest.raises(LookupError, match=r"has 0 int4_gemv with {'GROUP': 7}"):
        launches.code_of("int4_linear", 90, "int4_gemv", GROUP=7)
    with pytest.raises(LookupError, match="has 6 int4_gemv"):
        launches.code_of("int4_linear", 90, "int4_gemv")


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_targets_are_judged_by_their_worst_case(gpu):
    one = Target("int4_linear", "bf16", (1,), 3.1, LARGE)
    found = roofline.worst(one, gpu)
    assert cases.int4_bytes(found.rows, found.columns) >= LARGE
    assert found.ratio <= roofline.predict("int4_linear", gpu, 1, 28672, 8192).ratio
    assert found.met == (found.ratio >= 3.1)
    easy, hard = (roofline.worst(dataclasses.replace(one, at_least=least), gpu) for least in (0.01, 100.0))
    assert easy.met
    assert not hard.met
    same = roofline.worst(Target("int4_linear", "int4_linear", (1, 16), 1.0), gpu)
    assert same.ratio == 1.0


def test_every_target_has_a_verdict_on_every_gpu():
    rows = [line for line in roofline.targets() if "(M = " in line]
    assert len(rows) == len(cases.TARGETS)
    assert all(row.count("met (") + row.count("missed (") == len(GPUS) for row in rows)


def test_the_readme_has_the_table_of_today():
    text = roofline.README.read_text(encoding="utf-8")
    assert roofline.with_table(text) == text, "run python kernels/tools/roofline.py --write"


def test_a_readme_without_markers_is_refused():
    with pytest.raises(ValueError, match="has no line <!-- roofline: begin -->"):
        roofline.with_table("# Kernels\n")
