"""Linears on packed weights: PyTorch operators with Triton kernels for NVIDIA GPUs and C++ for CPUs.

    from llmcompress_kernels import from_pack_quantized, int4_linear

    weight = from_pack_quantized(weight_packed, weight_scale, weight_zero_point, in_features)    # once, at loading
    y = int4_linear(x, *weight, bias)

    y = teal_linear(x, columns, threshold, bias)    # reads the columns of large inputs alone

Each operator is a folder: `reference.py` says in plain torch what it computes, `layout.py` how its weights lie in
memory, where no other operator's do, `kernel.py` is the Triton code, `launch.py` picks tiles and starts it,
`__init__.py` registers the operator. On a CPU, `cpu.py` picks the code, which is C++ in `csrc/`, compiled on first use.
The package needs torch and, on a GPU only, triton, which it imports when a kernel first runs. Its imports are relative,
since the Hugging Face Hub loads kernels under names of its own.
"""

from .int4_gated_mlp import int4_gated_mlp
from .int4_linear import Int4Weight, from_pack_quantized, int4_linear, to_pack_quantized
from .int4_lora_linear import int4_lora_linear
from .sparse24_int4_linear import Sparse24Int4Weight, from_sparse24_int4, sparse24_int4_linear, to_sparse24_int4
from .sparse24_linear import Sparse24Weight, from_sparse24, sparse24_form, sparse24_linear, to_sparse24
from .teal_linear import teal_linear

__all__ = [
    "Int4Weight",
    "Sparse24Int4Weight",
    "Sparse24Weight",
    "from_pack_quantized",
    "from_sparse24",
    "from_sparse24_int4",
    "int4_gated_mlp",
    "int4_linear",
    "int4_lora_linear",
    "sparse24_form",
    "sparse24_int4_linear",
    "sparse24_linear",
    "teal_linear",
    "to_pack_quantized",
    "to_sparse24",
    "to_sparse24_int4",
]
