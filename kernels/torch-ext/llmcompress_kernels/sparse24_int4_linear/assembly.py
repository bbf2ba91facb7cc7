"""The inline assembly of `sparse24_int4_gemm_sp`, as text: what Triton's language has no words for.

Operands are `$0`, `$1`, ... in the order in which `tl.inline_asm_elementwise` numbers them: outputs first, and of a
tensor [threads, 4] the four elements of a thread. tests/ptx_fragments.py executes this text on NumPy arrays.
"""

import triton

MULTIPLY_CONSTRAINTS = "=&f,=&f,=&f,=&f" + 36 * ",r"  # written before the last operand is read, hence &


@triton.constexpr_function
def less_eight(bfloat16):
    """Two 16-bit floats base + 8 + value -> value, exactly; base is 128 in bfloat16 and 1024 in float16.

    By the multiply-add of two, which sm_80 has in both types: 1 * pair - (base + 8).
    """
    kind, one, less = ("bf16x2", "0x3F803F80", "0xC308C308") if bfloat16 else ("f16x2", "0x3C003C00", "0xE408E408")
    return f"""{{
    .reg .b32 one, less;
    mov.b32 one, {one};
    mov.b32 less, {less};
    fma.rn.{kind} $0, $1, one, less;
    }}"""


@triton.constexpr_function
def multiply(bfloat16, first, count, half):
    """The sum of `count` products of 32 columns, from the one numbered `first` of a block's four.

    $0 .. $3    C: rows g, g, g + 8, g + 8 of the strip and tokens 2 t, 2 t + 1, 2 t, 2 t + 1, for lane 4 g + t
    $4 + 4 r    A: register r, for each of the four products
    $20         E: of the four pairs of products of a tile; `half` says which block of the tile this is
    $24 + 4 s   B: four registers of product s
    """
    kind = "bf16" if bfloat16 else "f16"
    lines = ["{", ".reg .f32 zero;", "mov.f32 zero, 0f00000000;"]
    for s in range(first, first + count):
        a = f"${4 + s}, ${8 + s}, ${12 + s}, ${16 + s}"
        b = f"${24 + 4 * s}, ${25 + 4 * s}, ${26 + 4 * s}, ${27 + 4 * s}"
        c = "zero, zero, zero, zero" if s == first else "$0, $1, $2, $3"
        name = f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{kind}.{kind}.f32"
        lines.append(f"{name} {{$0, $1, $2, $3}}, {{{a}}}, {{{b}}}, {{{c}}}, ${20 + 2 * half + s // 2}, {s % 2};")
    return "\n".join([*lines, "}"])
