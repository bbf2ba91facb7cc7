"""Options of a train step: data, length, loss and optimizer, which all have; and those of recovery and techniques.

- train: recover               # a smaller model learns to be like the dense one again
  loss: distillation           # or cross_entropy, or weights such as {distillation: 1, hidden: 0.1}
  steps: 200
  batch: 4                     # windows of `calibration.length` tokens per optimizer step
  parameters: all              # or lora: merged into dense weights, kept beside quantized ones
- train: rigl                  # a technique of `techniques/`: learns, and becomes sparse
  start: random                # from scratch; or model: onwards
  density: 0.2
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from llmcompress.calibrate import CalibrationOptions
from llmcompress.options import Options

if TYPE_CHECKING:
    from llmcompress.training.technique import Technique

LOSSES = ("cross_entropy", "distillation", "hidden")


class Train(Options):
    """What all train steps have: data, length, loss, optimizer."""

    loss: dict[str, float] = Field(
        {"cross_entropy": 1.0}, description="cross_entropy, distillation, hidden; or a mapping to weights"
    )
    temperature: float = Field(1.0, gt=0, description="distillation: softens both models' predictions")
    top_k: int = Field(64, ge=1, description="distillation: tokens kept of each of the dense model's predictions")

    steps: int = Field(200, ge=1, description="optimizer steps")
    batch: int = Field(4, ge=1, description="windows per optimizer step, over all processes")
    micro_batch: int = Field(1, ge=1, description="windows per forward pass of a process")
    data: CalibrationOptions | None = Field(None, description="text to learn from; left out: that of `calibration`")
    learning_rate: float = Field(1e-4, gt=0, description="at the end of the warm-up")
    warmup: int = Field(10, ge=0, description="steps in which the rate rises; then it falls as a cosine to a tenth")
    weight_decay: float = Field(0.0, ge=0, description="of AdamW, on matrices")
    clip: float = Field(1.0, gt=0, description="largest norm of a step's gradient")
    precision: Literal["bfloat16", "float32"] = Field("bfloat16", description="of products; weights are in float32")
    gradient_checkpointing: bool = Field(False, description="recompute blocks on the way back, to save memory")
    compile: bool = Field(False, description="fuse what blocks compute by torch.compile; on a CPU it needs g++")
    checkpoint_every: int = Field(50, ge=1, description="steps between states from which a killed run continues")
    seed: int = Field(0, ge=0, description="of the order of the windows, and of whatever else is drawn")

    @field_validator("loss", mode="before")
    @classmethod
    def _loss(cls, value: Any) -> Any:
        weights = {value: 1.0} if isinstance(value, str) else value
        if not isinstance(weights, dict) or not weights or any(name not in LOSSES for name in weights):
            raise ValueError(f"expected one of {', '.join(LOSSES)}, or a mapping of some of these to weights")
        if any(isinstance(w, bool) or not isinstance(w, int | float) or w <= 0 for w in weights.values()):
            raise ValueError("weights of losses must be numbers above 0")
        return {name: float(weight) for name, weight in weights.items()}

    @model_validator(mode="after")
    def _batches(self) -> Self:
        if self.batch % self.micro_batch:
            raise ValueError(f"batch {self.batch} is no multiple of micro_batch {self.micro_batch}")
        return self

    @property
    def shortest(self) -> int:
        """Steps of the shortest schedule of the learning rate; rounds may begin it anew."""
        return self.steps

    @model_validator(mode="after")
    def _warms_up(self) -> Self:
        if self.warmup >= self.shortest:
            raise ValueError(
                f"warmup: the learning rate would rise for {self.warmup} steps of {self.shortest} and never be what "
                "`learning_rate` says; use a shorter one, or more steps"
            )
        return self

    @property
    def has_teacher(self) -> bool:
        """Whether the dense model's predictions or hidden states are needed."""
        return "distillation" in self.loss or "hidden" in self.loss

    @property
    def lora(self) -> bool:
        """Whether only updates of low rank are trained."""
        return False

    @property
    def leaves_weights(self) -> bool:
        """Whether what is learned can stay beside the weights."""
        return self.lora

    @property
    def begins_anew(self) -> bool:
        """Whether the weights to begin with are random."""
        return False

    @property
    def leaves(self) -> tuple[str, float] | None:
        """Pattern and share of the zeros that it leaves in the decoder linears; None if it prunes nothing."""
        return None

    @property
    def mask_source(self) -> str | None:
        """The model whose zeros are the mask to train with, if the step names one."""
        return None

    @property
    def unit_kinds(self) -> tuple[str, ...]:
        """Kinds of units (`structure/`) that it zeroes as a whole, for a structure step to remove."""
        return ()

    @property
    def scoring_bytes(self) -> int:
        """For each weight to prune, besides itself, while masks are chosen before the first step."""
        return 0

    @property
    def ranking_bytes(self) -> int:
        """The same between steps, beside gradients and moments."""
        return 0

    @property
    def remembered_bytes(self) -> int:
        """For each parameter of the model, through all of the training: what a technique will come back to."""
        return 0

    def technique(self) -> "Technique":
        """What happens beside the gradient steps: here nothing."""
        from llmcompress.training.technique import Technique

        return Technique(self)

    def check_shapes(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Raise ValueError if it cannot do what it is told with linears of these shapes [out, in]."""

    def check_units(self, model: Any) -> None:
        """Raise ValueError if it cannot do what it is told with the units of a model, which may be a skeleton."""


class Recover(Train):
    """Options of `train: recover`."""

    loss: dict[str, float] = Field(
        {"distillation": 1.0}, description="cross_entropy, distillation, hidden; or a mapping to weights"
    )
    parameters: Literal["all", "lora"] = Field("all", description="what is trained")
    rank: int = Field(8, ge=1, description="lora: of the update of each linear")
    alpha: int = Field(16, ge=1, description="lora: its scale is alpha / rank")

    @property
    def lora(self) -> bool:
        """As `parameters` says."""
        return self.parameters == "lora"


class Learn(Train):
    """What all techniques have: they train all parameters, onwards or from scratch."""

    start: Literal["model", "random"] = Field(
        "model", description="weights to begin with: the model's, or random ones drawn with `seed`"
    )

    @property
    def begins_anew(self) -> bool:
        """As `start` says."""
        return self.start == "random"
