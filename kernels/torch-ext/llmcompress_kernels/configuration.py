"""A way in which a launcher can start a kernel: what `configurations()` of every `launch.py` yields.

kernels/tools/resources.py compiles each of them ahead of time and writes what the compiler made of it. It also says
what else a launcher may start, without a bias for example, and why that takes no more of anything.
"""

from dataclasses import dataclass
from typing import Any

TYPES = {  # of kernel arguments that are neither int32 nor a pointer to the dtype of x; the same in every operator
    "scaling": "fp32",
    "threshold": "fp32",
    "words_ptr": "*i32",
    "gate_words_ptr": "*i32",
    "up_words_ptr": "*i32",
    "zero_ptr": "*u8",
    "gate_zero_ptr": "*u8",
    "up_zero_ptr": "*u8",
    "parts_ptr": "*fp32",
    "index_ptr": "*i16",
    "metadata_ptr": "*i32",
    "fragments_ptr": "*i32",
}
ARCHITECTURES = (80, 89, 90, 100)  # on which launchers may choose a configuration, unless it says otherwise
FLOAT16 = (90,)  # on which it is compiled in float16, unless registers are scarce
ALIGNED = ("N", "K", "stride")  # integers that are multiples of 16 in any model, which Triton finds out at the launch


@dataclass(frozen=True)
class Configuration:
    """One kernel with its compile-time arguments.

    kernel         name in the operator's `kernel.py`; with `gemm` in it, it multiplies on tensor cores
    constants      its constexpr arguments; None stands for an absent tensor
    warps          of a program
    stages         of the pipeline of loads
    weights        made by a program in one round of its main loop; 0 if it reads no packed weight
    architectures  on which it may be chosen
    float16        on which it is compiled in float16, too
    parts          y is float32 [splits, M, out]: parts of a sum, to which no bias is added
    registers      of a thread at most, if that is told to the compiler
    """

    kernel: str
    constants: dict[str, Any]
    warps: int
    stages: int
    weights: int = 0
    architectures: tuple[int, ...] = ARCHITECTURES
    float16: tuple[int, ...] = FLOAT16
    parts: bool = False
    registers: int | None = None
