"""Statistics of a linear layer, kept as sums and counts so that batches, shards and ranks add up exactly."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Self

from llmcompress.errors import CalibrationError
from llmcompress.lazy import Tensor, torch

NO_TOKENS = "no tokens reached this layer; give more calibration text, or list it in `keep`"
SAMPLE = 8192  # tokens that relative errors are judged on where nothing needs more
PANEL = 512  # columns of one product; only panels on or above the diagonal are computed


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """Let CPUs with bfloat16 matrix units round the factors of float32 products to bfloat16, for a while.

    Sums stay in float32, so what came in bfloat16 is multiplied without any loss.
    """
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


class InputGram:
    """Second moment of one linear's inputs: the sum over tokens of x xᵀ, in float32.

    Its mean G gives the output error of any change D of the weight without a forward pass, tr(D G Dᵀ), which is
    all that GPTQ, AWQ's searches and relative errors need.
    """

    def __init__(self, features: int, device: "torch.device | str" = "cpu") -> None:
        self.total = torch.zeros(features, features, dtype=torch.float32, device=device)
        self.tokens = 0

    def update(self, x: Tensor) -> None:
        """Add activations x [..., in]. There must be no padding: a padded token counts like any other."""
        with bfloat16_products() if x.dtype is torch.bfloat16 else nullcontext():
            x = x.reshape(-1, x.shape[-1]).float()
            for start in range(0, x.shape[1], PANEL):
                panel = x[:, start : start + PANEL]
                self.total[start : start + PANEL, start:].addmm_(panel.T, x[:, start:])
        self.tokens += x.shape[0]

    def merge(self, other: Self) -> None:
        """Add what another process or shard saw."""
        self.total += other.total
        self.tokens += other.tokens

    @property
    def mean(self) -> Tensor:
        """G = mean of x xᵀ, [in, in] float32, symmetric. A new matrix."""
        if self.tokens == 0:
            raise CalibrationError(NO_TOKENS)
        mean = self.total / self.tokens
        for start in range(0, len(mean), PANEL):  # panel by panel: mirroring must not cost another matrix
            here = slice(start, start + PANEL)
            mean[here, here] = mean[here, here].triu() + mean[here, here].triu(1).T
            mean[start + PANEL :, here] = mean[here, start + PANEL :].T
        return mean


class InputGramMean(InputGram):
    """The same with the mean of the inputs themselves, summed in float64, from one pass."""

    def __init__(self, features: int, device: "torch.device | str" = "cpu") -> None:
        super().__init__(features, device)
        self.sums = torch.zeros(features, dtype=torch.float64, device=device)

    def update(self, x: Tensor) -> None:
        """Add activations x [..., in]. There must be no padding: a padded token counts like any other."""
        super().update(x)
        self.sums += x.reshape(-1, x.shape[-1]).sum(0, dtype=torch.float64)

    def merge(self, other: Self) -> None:
        """Add what another process or shard saw."""
        super().merge(other)
        self.sums += other.sums

    @property
    def average(self) -> Tensor:
        """E[x], [in] float32."""
        if self.tokens == 0:
            raise CalibrationError(NO_TOKENS)
        return (self.sums / self.tokens).float()


class InputSquares:
    """Mean square of each of one linear's inputs, in float32; all that wanda and its like need.

    It costs a fraction of `InputGram`, which is kept of the first SAMPLE tokens only, to judge errors by.
    """

    def __init__(self, features: int, device: "torch.device | str" = "cpu") -> None:
        self.total = torch.zeros(features, dtype=torch.float32, device=device)
        self.tokens = 0
        self.sample = InputGram(features, device)

    def update(self, x: Tensor) -> None:
        """Add activations x [..., in]. There must be no padding: a padded token counts like any other."""
        x = x.reshape(-1, x.shape[-1])
        self.total += x.float().square().sum(0)
        self.tokens += x.shape[0]
        if (room := SAMPLE - self.sample.tokens) > 0:
            self.sample.update(x[:room])

    def merge(self, other: Self) -> None:
        """Add what another process or shard saw."""
        self.total += other.total
        self.tokens += other.tokens
        self.sample.merge(other.sample)

    @property
    def mean(self) -> Tensor:
        """Mean of x², [in] float32. A new tensor."""
        if self.tokens == 0:
            raise CalibrationError(NO_TOKENS)
        return self.total / self.tokens


class InputSizes:
    """Mean size of each of one linear's inputs, E[|x|], in float64."""

    def __init__(self, features: int, device: "torch.device | str" = "cpu") -> None:
        self.total = torch.zeros(features, dtype=torch.float64, device=device)
        self.tokens = 0

    def update(self, x: Tensor) -> None:
        """Add activations x [..., in]. There must be no padding: a padded token counts like any other."""
        x = x.reshape(-1, x.shape[-1])
        self.total += x.abs().sum(0, dtype=torch.float64)
        self.tokens += x.shape[0]

    @property
    def mean(self) -> Tensor:
        """Mean of |x|, [in] float32. A new tensor."""
        if self.tokens == 0:
            raise CalibrationError(NO_TOKENS)
        return (self.total / self.tokens).float()


class InputMoments:
    """Mean and mean square of each of one linear's inputs, summed in float64: little is left of their difference."""

    def __init__(self, features: int, device: "torch.device | str" = "cpu") -> None:
        self.sums = torch.zeros(features, dtype=torch.float64, device=device)
        self.squares = torch.zeros_like(self.sums)
        self.tokens = 0

    def update(self, x: Tensor) -> None:
        """Add activations x [..., in]. There must be no padding: a padded token counts like any other."""
        x = x.reshape(-1, x.shape[-1]).double()
        self.sums += x.sum(0)
        self.squares += x.square().sum(0)
        self.tokens += x.shape[0]

    def merge(self, other: Self) -> None:
        """Add what another process or shard saw."""
        self.sums += other.sums
        self.squares += other.squares
        self.tokens += other.tokens

    @property
    def mean(self) -> Tensor:
        """E[x], [in] float32."""
        return self._over_tokens(self.sums).float()

    @property
    def square(self) -> Tensor:
        """E[x²], [in] float32."""
        return self._over_tokens(self.squares).float()

    @property
    def variance(self) -> Tensor:
        """E[x²] - E[x]², [in] float32 >= 0."""
        mean = self._over_tokens(self.sums)
        return (self._over_tokens(self.squares) - mean.square()).clamp_(min=0).float()

    def _over_tokens(self, total: Tensor) -> Tensor:
        if self.tokens == 0:
            raise CalibrationError(NO_TOKENS)
        return total / self.tokens


@dataclass(frozen=True, slots=True)
class Inputs:
    """What was found out about a linear's inputs."""

    gram: Tensor  # [in, in] float32, mean of x xᵀ; of a sample of the tokens where no method needs it
    squares: Tensor  # [in] float32, mean of x² over all tokens

    @classmethod
    def of(cls, found: InputGram | InputSquares) -> "Inputs":
        """The means of what was summed up."""
        if isinstance(found, InputSquares):
            return cls(found.sample.mean, found.mean)
        gram = found.mean
        return cls(gram, gram.diagonal())

    def needed_by(self, needs: "Statistics") -> Tensor:
        """The one that a method asks for."""
        return self.squares if needs is InputSquares else self.gram


class GradientMean:
    """Mean over windows of text of dL/dW, the gradient of the next-token loss of the whole model; [out, in] float32."""

    def __init__(self, shape: "torch.Size", device: "torch.device | str" = "cpu") -> None:
        self.total = torch.zeros(shape, dtype=torch.float32, device=device)
        self.windows = 0

    def update(self, gradient: Tensor) -> None:
        """Add the gradient [out, in] of one window's mean loss."""
        self.total += gradient
        self.windows += 1

    def merge(self, other: Self) -> None:
        """Add what another process or shard saw."""
        self.total += other.total
        self.windows += other.windows

    @property
    def mean(self) -> Tensor:
        """The mean, [out, in] float32; a new tensor."""
        if self.windows == 0:
            raise CalibrationError(NO_TOKENS)
        return self.total / self.windows


class GradientSquare(GradientMean):
    """Mean over windows of (dL/dW)²: the diagonal of the empirical Fisher matrix; [out, in] float32."""

    def update(self, gradient: Tensor) -> None:
        """Add the square of the gradient [out, in] of one window's mean loss."""
        self.total.addcmul_(gradient, gradient)
        self.windows += 1


class GradientMoments(GradientMean):
    """Mean over windows of dL/dW and of its square; [out, in] float32 each."""

    def __init__(self, shape: "torch.Size", device: "torch.device | str" = "cpu") -> None:
        super().__init__(shape, device)
        self.squares = torch.zeros(shape, dtype=torch.float32, device=device)

    def update(self, gradient: Tensor) -> None:
        """Add the gradient [out, in] of one window's mean loss, and its square."""
        super().update(gradient)
        self.squares.addcmul_(gradient, gradient)

    def merge(self, other: Self) -> None:
        """Add what another process or shard saw."""
        super().merge(other)
        self.squares += other.squares

    @property
    def square(self) -> Tensor:
        """The mean square, [out, in] float32; a new tensor."""
        if self.windows == 0:
            raise CalibrationError(NO_TOKENS)
        return self.squares / self.windows


Statistics = type[InputGram] | type[InputSquares] | type[GradientMean]
