"""What recovery minimizes: the text itself, the dense model's predictions, or its hidden states.

    cross entropy   - log q(next token)                                    q: the smaller model's probabilities
    distillation    T² KL(p || q) at temperature T, Hinton et al. 2015     p: the dense model's, arXiv:1503.02531
    hidden          mean over windows of |h_q - h_p|² / |h_p|²             h: last hidden states of a window

Of p only the k largest are kept for each position. All other tokens together are one more outcome, whose probability
both models have; so the loss stays a divergence, is zero where the models agree, and never exceeds the full one.

Logits are large (a vocabulary for every position), so their gradient is taken with the loss, some positions at a time:
float32 copies of all of them would cost more time than the loss itself.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

EPSILON = 1e-6  # least probability of "all others", of which a logarithm is taken
ROWS = 64  # positions whose logits are in float32 at once
NO_TOKEN = -100  # what stands for "nothing follows" in torch's cross entropy


@dataclass(frozen=True, slots=True)
class Taught:
    """What the dense model says of some windows."""

    tokens: Tensor  # [n, length, k] int64: the likeliest next tokens
    log_probs: Tensor  # [n, length, k] float32: theirs at the temperature, over the whole vocabulary
    hidden: Tensor | None  # [n, length, width]: last hidden states, before the final norm


def cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean next-token loss in nats; logits [n, length, vocabulary], tokens [n, length] int64."""
    following = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=NO_TOKEN).to(logits.device)
    total = summed(logits, nothing_but_text, following)
    return total / (following != NO_TOKEN).sum()


def nothing_but_text(logits: Tensor, following: Tensor) -> Tensor:
    """Sum of - log q over rows of logits [n, vocabulary] and tokens [n] int64."""
    return torch.nn.functional.cross_entropy(logits, following, ignore_index=NO_TOKEN, reduction="sum")


def distillation(logits: Tensor, taught: Taught, temperature: float) -> Tensor:
    """Mean over positions of T² KL(p || q) in nats, over the k kept tokens and all others as one."""

    def divergence(rows: Tensor, likeliest: Tensor, log_p: Tensor) -> Tensor:
        scaled = rows / temperature
        log_q = scaled.gather(-1, likeliest) - scaled.logsumexp(-1, keepdim=True)
        kept = (log_p.exp() * (log_p - log_q)).sum(-1)
        rest_p, rest_q = ((1 - log.exp().sum(-1)).clamp(min=EPSILON) for log in (log_p, log_q))
        return (kept + rest_p * (rest_p.log() - rest_q.log())).sum()

    positions = logits.shape[:-1].numel()
    return temperature**2 * summed(logits, divergence, taught.tokens, taught.log_probs) / positions


def summed(logits: Tensor, loss: Callable[..., Tensor], *others: Tensor) -> Tensor:
    """Sum of a loss over positions, with its gradient; logits [..., vocabulary] of any float dtype.

    loss: of float32 rows [n, vocabulary], and of rows [n, ...] of each of `others` [..., ...].
    """
    rows = logits.flatten(0, -2)
    total: Tensor = _Summed.apply(
        rows, loss, *(other.reshape(len(rows), *other.shape[logits.ndim - 1 :]) for other in others)
    )
    return total


class _Summed(torch.autograd.Function):
    """The sum, whose gradient is known when it is."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, loss: Callable[..., Tensor], *others: Tensor) -> Tensor:
        gradient, total = torch.empty_like(rows), torch.zeros((), device=rows.device)
        for start in range(0, len(rows), ROWS):
            part = slice(start, start + ROWS)
            with torch.enable_grad():
                piece = rows[part].detach().float().requires_grad_()
                value = loss(piece, *(other[part] for other in others))
            gradient[part] = torch.autograd.grad(value, piece)[0]
            total += value.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient.dtype), *[None] * (len(ctx.needs_input_grad) - 1)


def hidden_error(found: Tensor, taught: Taught) -> Tensor:
    """Squared difference of hidden states [n, length, width] relative to their size, of each window; the mean.

    Relative to that of its own window, so that it does not matter which windows share a pass.
    """
    if taught.hidden is None:
        raise ValueError("hidden states were not kept")
    wanted = taught.hidden.float()
    return ((found.float() - wanted).square().sum((1, 2)) / wanted.square().sum((1, 2))).mean()


def keep_largest(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """The k largest of logits [..., vocabulary]: tokens int64 and log probabilities float32 at the temperature."""
    scaled = logits.float() / temperature
    values, tokens = scaled.topk(min(k, scaled.shape[-1]), dim=-1)
    return tokens, values - scaled.logsumexp(-1, keepdim=True)
