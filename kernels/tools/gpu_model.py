"""How long a grid of equal programs takes on a GPU, from its machine code and its bytes. A model, not a measurement.

As many programs as registers, shared memory and warps allow live on an SM at once; all SMs filled make a wave. A wave
lasts as long as the slowest of

    memory        its bytes over the bandwidth that can be had, COPY_SHARE of the datasheet's
    latency       bytes it loads over those in flight: by Little's law, what is asked for and not yet there over LATENCY
    issue         instructions of the busiest SM, over SCHEDULERS a cycle
    tensor cores  multiply-adds, padded to whole tiles of tokens, over the peak

and a launch lasts for LAUNCH and its waves. Not in the model: traffic between L2 and SMs, clocks under load, bank
conflicts, and that a program's loads and its arithmetic may wait for each other.
"""

from dataclasses import dataclass

from gpus import REGISTER_UNIT, REGISTERS, RESERVED_SHARED, SCHEDULERS, Gpu

# declared, not measured
COPY_SHARE = 0.9  # of the datasheet's bandwidth that a copy reaches
LATENCY = 650e-9  # seconds from a load to its data on a busy GPU; idle ones take 250 to 350 (arXiv:2402.13499)
LAUNCH = 2e-6  # seconds of a kernel in a CUDA graph besides its work
BLAS_SHARE = 0.75  # of the tensor cores' peak


@dataclass(frozen=True)
class Code:
    """What the compiler made of a kernel: the columns of the resource table that the model uses."""

    registers: int
    shared_bytes: int
    warps: int
    stages: int
    instructions: int  # in the whole kernel
    loop_per_weight: float
    weights: int  # made by a program in one round of its loop
    bits: float = 4.0  # of a weight as it is loaded


@dataclass(frozen=True)
class Launch:
    """A grid of equal programs.

    programs  how many
    weights   that each program makes, in all rounds of its loop
    loaded    bytes that all programs read from memory
    stored    bytes that they write
    flops     of all programs on tensor cores, 0 without them
    """

    code: Code
    programs: int
    weights: int
    loaded: float
    stored: float
    flops: float = 0.0


def occupancy(gpu: Gpu, code: Code) -> int:
    """Programs that live on one SM at once; raises ValueError if not even one fits."""
    per_warp = -(-code.registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = REGISTERS // per_warp // SCHEDULERS * SCHEDULERS // code.warps  # each scheduler has its own quarter
    by_shared = gpu.shared // (code.shared_bytes + RESERVED_SHARED)
    found = min(gpu.warps // code.warps, gpu.blocks, by_registers, by_shared)
    if found < 1:
        raise ValueError(f"roofline: no program of {code} fits on an SM of {gpu.name}")
    return found


def waves(programs: int, slots: int) -> list[int]:
    """Programs in each wave: full ones and what remains."""
    full, rest = divmod(programs, slots)
    return [slots] * full + ([rest] if rest else [])


def limits(gpu: Gpu, launch: Launch, programs: int) -> dict[str, float]:
    """Seconds that a wave of so many programs of a launch spends at least, by each of the four limits."""
    code, share = launch.code, programs / launch.programs
    busiest = -(-programs // gpu.processors)
    issued = code.instructions * code.warps + code.loop_per_weight * launch.weights / 32
    return {
        "memory": (launch.loaded + launch.stored) * share / (gpu.bandwidth * COPY_SHARE),
        "latency": launch.loaded * share / (programs * in_flight(code) / LATENCY),
        "issue": busiest * issued / (SCHEDULERS * gpu.clock),
        "tensor cores": busiest * launch.flops / launch.programs / (gpu.flops / gpu.processors),
    }


def in_flight(code: Code) -> float:
    """Bytes that a program has asked for while it works.

    One round of packed weights, or as many as its pipeline of loads keeps ahead, if it has shared memory for them. A
    kernel without weights asks for 16 bytes in every thread.
    """
    round_bytes = code.weights * code.bits / 8
    if not round_bytes:
        return code.warps * 32 * 16.0
    ahead = code.stages - 1
    pipelined = bool(code.loop_per_weight) and ahead > 1 and code.shared_bytes >= ahead * round_bytes
    return round_bytes * (ahead if pipelined else 1)


def duration(gpu: Gpu, launch: Launch) -> tuple[float, str]:
    """Seconds of a launch, and what most of them are spent on."""
    spent: dict[str, float] = {"launch": LAUNCH}
    for programs in waves(launch.programs, occupancy(gpu, launch.code) * gpu.processors):
        reason, seconds = max(limits(gpu, launch, programs).items(), key=lambda limit: limit[1])
        spent[reason] = spent.get(reason, 0.0) + seconds
    return sum(spent.values()), max(spent, key=lambda reason: spent[reason])


def blas(
    gpu: Gpu, tokens: int, rows: int, columns: int, weight_bytes: float | None = None, speed: float = 1.0
) -> float:
    """Seconds of a bfloat16 linear, whose weight is dense unless its bytes are given; `speed` times the dense peak."""
    weight = 2.0 * rows * columns if weight_bytes is None else weight_bytes
    traffic = weight + 2.0 * tokens * (rows + columns)
    flops = 2.0 * tokens * rows * columns
    return LAUNCH + max(traffic / (gpu.bandwidth * COPY_SHARE), flops / (gpu.flops * speed * BLAS_SHARE))


def stream(gpu: Gpu, kernels: int, traffic: float) -> float:
    """Seconds of some kernels that do nothing but read and write so many bytes altogether."""
    return kernels * LAUNCH + traffic / (gpu.bandwidth * COPY_SHARE)
