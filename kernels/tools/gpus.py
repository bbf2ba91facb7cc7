"""What the model of roofline.py knows about GPUs, each number with its source.

Limits of a processor (SM) are in the CUDA C++ Programming Guide, "Technical Specifications per Compute Capability";
registers are handed out 256 at a time to each warp, and every block takes 1 KB of shared memory for itself (CUDA
Occupancy API, cuda_occupancy.h). All four architectures have 65536 registers and four schedulers per SM, each of which
issues at most one instruction of a warp per cycle (NVIDIA's architecture whitepapers).
"""

from dataclasses import dataclass

REGISTERS = 65536
REGISTER_UNIT = 256
SCHEDULERS = 4
RESERVED_SHARED = 1024  # bytes per block


@dataclass(frozen=True)
class Gpu:
    """One product.

    processors   streaming multiprocessors (SMs)
    clock        Hz, the one at which `flops` is quoted
    bandwidth    bytes per second of its memory, as in the datasheet
    flops        per second, dense bfloat16 on tensor cores with sums in float32
    cache        bytes of L2
    warps        that may live on one SM; so for `blocks`
    shared       bytes of shared memory on one SM
    """

    name: str
    architecture: int
    processors: int
    clock: float
    bandwidth: float
    flops: float
    cache: int
    warps: int
    blocks: int
    shared: int
    source: str


GPUS = (
    Gpu(
        "A100 80GB SXM", 80, 108, 1.41e9, 2.039e12, 312e12, 40 << 20, 64, 32, 164 << 10,
        "NVIDIA A100 80GB datasheet (bandwidth, flops); whitepaper NVIDIA A100 Tensor Core GPU Architecture (the rest)",
    ),
    Gpu(
        "RTX 4090", 89, 128, 2.52e9, 1.008e12, 165.2e12, 72 << 20, 48, 24, 100 << 10,
        "whitepaper NVIDIA Ada GPU Architecture, appendix A",
    ),
    Gpu(
        "H100 SXM", 90, 132, 1.83e9, 3.35e12, 989.4e12, 50 << 20, 64, 32, 228 << 10,
        "NVIDIA H100 datasheet (bandwidth); whitepaper NVIDIA H100 Tensor Core GPU Architecture (the rest)",
    ),
    Gpu(
        "B200", 100, 148, 1.856e9, 8.0e12, 2250e12, 126 << 20, 64, 32, 228 << 10,
        "NVIDIA DGX B200 datasheet, an eighth of the system (bandwidth, flops); chipsandcheese.com, Nvidia's B200: "
        "Keeping the CUDA Juggernaut Rolling (SMs, L2); the clock is what 4096 multiply-adds per SM and cycle imply",
    ),
)  # fmt: skip
