"""2:4 products by torch's own kernels for sparse tensor cores, for many tokens at once.

torch has two libraries behind `torch.sparse.SparseSemiStructuredTensor`; each wants the weight in a form of its own:

    CUTLASS      compute capability 8, all others it refuses: kept weights as they are stored, and positions of 16
                 columns as an int16, in an order that its loads ask for
    cuSPARSELt   capability 9 from version 0.6.2 on, and 10 from 0.8.0 on, where this build of torch has it: a form
                 that it makes of the dense weight, and that nobody else can read

Making a form costs more than a product of few tokens, so it is not made in a product: `sparse24_form` makes it once, on
the GPU where it is used. It is a tensor that belongs to whoever asked for it, and `sparse24_linear` takes it beside the
packed weight. A form takes 9 bits per weight, as the packed tensors do, and both together more than the dense weight;
so it is for those who have the memory and long prompts.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from .layout import Sparse24Weight, to_sparse24

CUTLASS, CUSPARSELT = "CUTLASS", "cuSPARSELt"
MULTIPLES = {CUTLASS: (32, 64), CUSPARSELT: (16, 16)}  # of out and in that each takes, in 16-bit dtypes
TOKENS_MULTIPLE = 16
VERSIONS = {9: 602, 10: 800}  # of cuSPARSELt, 0.6.2 and 0.8.0, by the first capability that each knows


def sparse24_form(weight: Sparse24Weight, in_features: int) -> Tensor | None:
    """The weight [out, in] for torch's kernel, [9 / 16 out in] in its dtype; None if torch has none for it.

    Needs the memory of the dense weight for a moment where cuSPARSELt makes the form.
    """
    values = weight.values
    name = library_of(values.device)
    if name is None or not fits(name, values.shape[1], in_features):
        return None
    if name == CUTLASS:
        return cutlass_form(weight, in_features)
    from .launch import expand

    compressed: Tensor = torch._cslt_compress(expand(weight, in_features))
    return compressed.flatten()


def form_elements(out_features: int, in_features: int) -> int:
    """Numbers of a form: half of the weight, and an eighth of that in positions."""
    return out_features * in_features // 16 * 9


def library_of(device: torch.device) -> str | None:
    """Which library multiplies on this device."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    major = torch.cuda.get_device_capability(device)[0]
    if major == 8:
        return CUTLASS
    version = torch.backends.cusparselt.version() if torch.backends.cusparselt.is_available() else None
    return CUSPARSELT if major in VERSIONS and (version or 0) >= VERSIONS[major] else None


def fits(name: str, out_features: int, in_features: int) -> bool:
    """Whether a library takes a weight of this size."""
    out_multiple, in_multiple = MULTIPLES[name]
    return out_features % out_multiple == 0 and in_features % in_multiple == 0


def library_product(x: Tensor, form: Tensor, out_features: int, bias: Tensor | None, name: str) -> Tensor:
    """x [M, in] -> [M, out], by the library that made the form. Both compute W xᵀ."""
    tokens, columns = x.shape
    if tokens % TOKENS_MULTIPLE:
        x = pad(x, (0, 0, 0, -tokens % TOKENS_MULTIPLE))
    if name == CUSPARSELT:
        y: Tensor = torch._cslt_sparse_mm(form, x.contiguous().T, bias=bias, transpose_result=True)
        return y[:tokens]
    values, order = cutlass_parts(form, out_features, columns)
    if bias is None:
        y = torch._sparse_semi_structured_mm(values, order, x.contiguous().T)
    else:
        y = torch._sparse_semi_structured_addmm(bias, values, order, x.contiguous().T)
    return y[:, :tokens].T.contiguous()


def cutlass_form(weight: Sparse24Weight, in_features: int) -> Tensor:
    """Kept weights [out, in / 2] and after them reordered positions; out a multiple of 32, in of 64."""
    values, index = to_sparse24(weight, in_features)
    positions = index.view(torch.int16)
    order = torch.empty_like(positions).view(-1).scatter_(0, places(positions), positions.view(-1))
    return torch.cat([values.view(-1), order.view(values.dtype)])


def cutlass_parts(form: Tensor, out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
    """The two parts of `cutlass_form`: weights [out, in / 2] and int16 [out, in / 16]."""
    kept = out_features * in_features // 2
    return form[:kept].view(out_features, -1), form[kept:].view(torch.int16).view(out_features, -1)


def places(positions: Tensor) -> Tensor:
    """Where CUTLASS wants each of the words [out, in / 16], as int64 [out * in / 16].

    Within 32 rows, row 8 a + b goes to row 4 b + a. Then every 2 x 2 block is transposed, and the result is stored with
    columns outermost, two neighbouring ones together.
    """
    out, words = positions.shape
    row = torch.arange(out, device=positions.device)[:, None]
    column = torch.arange(words, device=positions.device)[None, :]
    row = row // 32 * 32 + row % 8 * 4 + row % 32 // 8
    block_row, block_column = row // 2 * 2, column // 2 * 2
    row, column = block_row + column % 2, block_column + row % 2
    return (column // 2 * out * 2 + row * 2 + column % 2).reshape(-1)
