"""What every operator has to pass, whatever it computes: any strides of x, fakes like real results, refusals.

An operator is given as its function and its arguments by name, `x` [tokens, in] among them.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

Arguments = dict[str, Any]
Operator = Callable[..., Tensor]


def assert_any_strides(operator: Operator, given: Arguments, out: int) -> None:
    """12 tokens in every arrangement give what the same tokens give in a contiguous matrix."""
    x = given["x"]
    columns = x.shape[1]
    folded = x.view(2, 6, columns)
    others = (
        folded,
        folded.transpose(0, 1),
        x.T.contiguous().T,
        x[::5],
        x[::12],
        x[0],
        x[:1].view(1, 1, columns),
        x[:0],
    )
    for other in others:
        found = operator(**given | {"x": other})
        rows = operator(**given | {"x": other.reshape(-1, columns).contiguous()})
        assert found.shape == (*other.shape[:-1], out)
        assert found.is_contiguous()
        assert torch.equal(found.reshape(-1, out), rows)


def assert_fake_agrees(operator: Operator, given: Arguments) -> None:
    """On meta tensors: shape, dtype and strides of the real result."""
    columns = given["x"].shape[1]
    meta = {name: on_meta(value) for name, value in given.items()}
    for shape in ((columns,), (0, columns), (2, 3, columns)):
        real, fake = (operator(**a | {"x": a["x"].new_zeros(shape)}) for a in (given, meta))
        assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride())


def assert_opcheck(registered: Any, flat: tuple[Any, ...], without_bias: tuple[Any, ...]) -> None:
    """torch's own checks of a registered operator whose first argument is x, and again with an x of odd strides."""
    torch.library.opcheck(registered, flat)
    x, *others = without_bias
    shuffled = x.expand(2, *x.shape).transpose(0, 1)
    torch.library.opcheck(registered, (shuffled, *others))


def assert_refused(operator: Operator, given: Arguments, registered: Any, flat: tuple[Any, ...], message: str) -> None:
    """ValueError by the function and by the registered operator, which others may call.

    With a tensor on meta, torch itself would send the second call to the operator for such tensors.
    """
    with pytest.raises(ValueError, match=message):
        operator(**given)
    if not any(isinstance(value, Tensor) and value.is_meta for value in flat):
        with pytest.raises(ValueError, match=message):
            registered(*flat)


def on_meta(value: Any) -> Any:
    """The same without data: a tensor, a named tuple of tensors and None, or anything else as it is."""
    if isinstance(value, tuple):
        return type(value)(*map(on_meta, value))
    return value.to("meta") if isinstance(value, Tensor) else value
