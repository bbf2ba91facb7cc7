"""What recovery minimizes: the text itself, the dense model's predictions, or its hidden states.

    cross entropy   - log q(next token)                                    q: the smaller model's probabilities
    distillation    T² KL(p || q) at temperature T, Hinton et al. 2015     p: the dense model's, arXiv:1503.02531
    hidden          mean (h_q - h_p)² / mean h_p²                          h: last hidden states

Of p only the k largest are kept for each position. All other tokens together are one more outcome, whose probability
both models have; so the loss stays a divergence, is zero where the models agree, and never exceeds the full one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

EPSILON = 1e-6  # least probability of "all others", of which a logarithm is taken


@dataclass(frozen=True, slots=True)
class Taught:
    """What the dense model says of some windows."""

    tokens: Tensor  # [n, length, k] int64: the likeliest next tokens
    log_probs: Tensor  # [n, length, k] float32: theirs at the temperature, over the whole vocabulary
    hidden: Tensor | None  # [n, length, width]: last hidden states, before the final norm


def cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean next-token loss in nats; logits [n, length, vocabulary], tokens [n, length] int64."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def distillation(logits: Tensor, taught: Taught, temperature: float) -> Tensor:
    """Mean over positions of T² KL(p || q) in nats, over the k kept tokens and all others as one."""
    scaled = logits.float() / temperature
    log_q = scaled.gather(-1, taught.tokens) - scaled.logsumexp(-1, keepdim=True)
    log_p = taught.log_probs
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    rest_p, rest_q = ((1 - log.exp().sum(-1)).clamp(min=EPSILON) for log in (log_p, log_q))
    return temperature**2 * (divergence + rest_p * (rest_p.log() - rest_q.log())).mean()


def hidden_error(found: Tensor, taught: Taught) -> Tensor:
    """Mean squared difference of hidden states [n, length, width], relative to their size."""
    if taught.hidden is None:
        raise ValueError("hidden states were not kept")
    wanted = taught.hidden.float()
    return (found.float() - wanted).square().mean() / wanted.square().mean()


def keep_largest(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """The k largest of logits [..., vocabulary]: tokens int64 and log probabilities float32 at the temperature."""
    scaled = logits.float() / temperature
    values, tokens = scaled.topk(min(k, scaled.shape[-1]), dim=-1)
    return tokens, values - scaled.logsumexp(-1, keepdim=True)
