"""Perplexity of one model and divergence between two, on the same fixed windows of a text.

The text is tokenized once and cut into windows of `length` tokens that do not overlap. A window's first token has no
prediction, so a window of L tokens gives L - 1 negative log-likelihoods; perplexity is the exponential of their mean.
A tokenizer that starts every text with a BOS token puts it at the head of every window here (in place of one text
token): models such as Gemma are lost without it, and only the first window of a cut text would have one.

Windows, not tokens, are the independent samples: neighbouring tokens of one passage are easy or hard together. All
standard errors are therefore taken over windows.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmcompress.calibrate import cut_windows, leading_token
from llmcompress.errors import EvaluationError

Progress = Callable[[str, int, int], None]  # what is being scored, how much is done, of how much

LOGITS_BUDGET = 2**26  # logits per forward pass: 256 MiB in float32
POSITIONS = 256  # positions per softmax, so that its temporaries stay small beside the logits


@dataclass(frozen=True, slots=True)
class WindowScores:
    """Means over each window's predicted tokens; one value per window, natural logarithms."""

    nll: list[float] = field(default_factory=list)  # of the model, nats per token
    base_nll: list[float] = field(default_factory=list)  # of the base, for the windows that were compared
    kl: list[float] = field(default_factory=list)  # KL(base || model), nats per token
    agreement: list[float] = field(default_factory=list)  # share of positions where both have the same top token


def text_windows(text: str, tokenizer: Any, length: int, windows: int | None, name: str) -> Tensor:
    """Tokenize `text` once and cut it: [windows, length] int64, the first ones if there are more than asked for.

    Raises EvaluationError if the text does not fill one window.
    """
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    found = cut_windows(tokens, length, leading_token(tokenizer))
    if len(found) == 0:
        raise EvaluationError(
            f"text {name!r}: {len(tokens)} tokens do not fill one window of {length}; "
            "give a longer text or a smaller length"
        )
    return found[:windows]


def score_windows(
    model: Any,
    windows: Tensor,
    *,
    base: Any = None,
    compare: int = 0,
    batch_size: int = 1,
    progress: Callable[[int], None] | None = None,
) -> WindowScores:
    """Run `model` over all windows and `base` over the first `compare` of them, on the same batches.

    model, base: loaded by transformers.  windows: [windows, length] int64, on any device.
    progress: called with the number of windows done.
    Raises EvaluationError if a loss is not finite or the two models have different vocabularies.
    """
    scores, done = WindowScores(), 0
    while done < len(windows):
        stop = compare if done < compare else len(windows)
        batch = windows[done : min(stop, done + _rows(model, windows.shape[1], batch_size))]
        logits = _logits(model, batch)
        scores.nll.extend(_window_nll(logits, batch))
        if base is not None and done < compare:
            base_logits = _logits(base, batch).to(logits.device)
            scores.base_nll.extend(_window_nll(base_logits, batch))
            kl, agreement = divergence(base_logits, logits)
            scores.kl.extend(kl)
            scores.agreement.extend(agreement)
        done += len(batch)
        if progress:
            progress(done)
    return scores


def _rows(model: Any, length: int, batch_size: int) -> int:
    """Windows per forward pass: `batch_size`, or fewer if their logits would not fit the budget."""
    vocabulary: int = model.get_output_embeddings().weight.shape[0]
    return max(1, min(batch_size, LOGITS_BUDGET // (length * vocabulary)))


@torch.inference_mode()
def _logits(model: Any, windows: Tensor) -> Tensor:
    """Logits of every predicted position, [windows, length - 1, vocabulary]."""
    logits: Tensor = model(input_ids=windows.to(model.device), use_cache=False).logits
    return logits[:, :-1]


def _window_nll(logits: Tensor, windows: Tensor) -> list[float]:
    """Mean negative log-likelihood of each window's tokens, in nats; the softmax is taken in float32."""
    targets = windows[:, 1:].to(logits.device)
    total = torch.zeros(len(windows), dtype=torch.float64)
    for part in _slices(logits.shape[1]):
        loss = F.cross_entropy(logits[:, part].float().flatten(0, 1), targets[:, part].flatten(), reduction="none")
        total += loss.view(len(windows), -1).sum(1).double().cpu()
    if not torch.isfinite(total).all():
        raise EvaluationError(
            "the model's loss is not finite: a weight or an activation is NaN or infinite; "
            "score in float32, and check the layers' errors in results.json"
        )
    return (total / targets.shape[1]).tolist()


def divergence(base_logits: Tensor, logits: Tensor) -> tuple[list[float], list[float]]:
    """KL(base || model) in nats per token and top-1 agreement, each as the mean of a window.

    base_logits, logits: [windows, positions, vocabulary].
    """
    if base_logits.shape != logits.shape:
        raise EvaluationError(
            f"the base model has {base_logits.shape[-1]} logits and the model {logits.shape[-1]}: "
            "divergence needs the same vocabulary; leave the base model out"
        )
    kl, same = torch.zeros(len(logits), dtype=torch.float64), torch.zeros(len(logits), dtype=torch.float64)
    for part in _slices(logits.shape[1]):
        p, q = base_logits[:, part].float().log_softmax(-1), logits[:, part].float().log_softmax(-1)
        kl += F.kl_div(q, p, log_target=True, reduction="none").sum((1, 2)).double().cpu()
        same += (p.argmax(-1) == q.argmax(-1)).sum(1).double().cpu()
    return (kl / logits.shape[1]).tolist(), (same / logits.shape[1]).tolist()


def _slices(positions: int) -> list[slice]:
    return [slice(start, start + POSITIONS) for start in range(0, positions, POSITIONS)]


def mean_stderr(values: list[float]) -> tuple[float, float | None]:
    """Mean and its standard error; None for the error of a single value."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    variance = math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def perplexity(nll: list[float]) -> dict[str, float | None]:
    """Perplexity from the windows' mean losses; its error to first order: d exp(x) = exp(x) dx."""
    mean, stderr = mean_stderr(nll)
    value = math.exp(mean)
    return {"value": value, "nll": mean, "stderr": None if stderr is None else value * stderr}


def perplexity_ratio(base: list[float], compressed: list[float]) -> dict[str, float | None]:
    """Compressed over base perplexity on the same windows, with the paired standard error.

    Most of the spread between windows is the text's and falls out of the difference, so this error is far smaller
    than those of the two perplexities suggest.
    """
    mean, stderr = mean_stderr([c - b for b, c in zip(base, compressed, strict=True)])
    ratio = math.exp(mean)
    return {"ratio": ratio, "ratio_stderr": None if stderr is None else ratio * stderr}
