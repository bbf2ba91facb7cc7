"""Time of decoding with half of all inputs left out, beside that of the same model dense; see
`compare_runtime_sparsity.py`."""

import argparse
import copy
import time
from collections.abc import Callable
from statistics import median
from typing import Any

SHAPE = {  # of TinyLlama-1.1B
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
HALF = 0.5  # left out where time is measured
PROMPT = 128  # tokens of a prompt whose time is taken


def speed(args: argparse.Namespace) -> dict[str, Any]:
    """Decoding, dense and with half of all inputs left out."""
    import torch

    dense = random_model(args.layers)
    sparse = copy.deepcopy(dense)
    prompt = torch.randint(SHAPE["vocab_size"], (1, 32), generator=torch.Generator().manual_seed(1))
    tokens = sparsify(sparse, prompt)
    times: dict[str, list[float]] = {"dense": [], "sparse": [], "dense_prompt": [], "sparse_prompt": []}
    for _ in range(args.rounds):
        for side, model in (("dense", dense), ("sparse", sparse)):
            times[side].append(decode_seconds(model, prompt, args.new))
            times[f"{side}_prompt"].append(prompt_seconds(model))
    left_out = left_out_in_decoding(sparse, tokens, prompt)
    plain, thin, plain_prompt, thin_prompt = (median(seconds) for seconds in times.values())
    linears = linear_times(dense, sparse)
    print(f"{args.layers} layers of 1.1B's shape, {torch.get_num_threads()} threads, {left_out:.1%} left out\n")
    print("| | dense | 50% left out | dense / sparse |\n|---|---:|---:|---:|")
    print(f"| a token | {1e3 * plain:.1f} ms | {1e3 * thin:.1f} ms | {plain / thin:.2f} |")
    print(
        f"| {PROMPT} tokens at once | {plain_prompt:.2f} s | {thin_prompt:.2f} s | {plain_prompt / thin_prompt:.2f} |"
    )
    for name, row in linears.items():
        full, half = row["dense"], row["sparse"]
        cells = [f"{1e3 * s:.2f} ms, {b / s / 1e9:.1f} GB/s" for s, b in zip((full, half), row["bytes"], strict=True)]
        print(f"| {name} | {cells[0]} | {cells[1]} | {full / half:.2f} |")
    print(f"\n{verdict(plain, thin, linears)}\n", flush=True)
    return {
        "layers": args.layers,
        "threads": torch.get_num_threads(),
        "left_out": left_out,
        **times,
        "linears": linears,
    }


def random_model(layers: int) -> Any:
    """A Llama with random bfloat16 weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaForCausalLM(LlamaConfig(**(SHAPE | {"num_hidden_layers": layers}))).eval()
    finally:
        torch.set_default_dtype(before)


def sparsify(model: Any, prompt: Any) -> Any:
    """Thresholds at the median of what comes into each linear with the prompt, applied."""
    import torch
    from torch import nn

    from llmcompress.histogram import InputHistogram
    from llmcompress.teal import apply_thresholds
    from llmcompress.thresholds import Threshold, Thresholds

    linears = {name: m for name, m in model.model.named_modules(prefix="model") if isinstance(m, nn.Linear)}
    found = {name: InputHistogram() for name in linears}
    hooks = [m.register_forward_pre_hook(lambda _, x, h=found[name]: h.update(x[0])) for name, m in linears.items()]
    with torch.inference_mode():
        model(prompt, use_cache=False)
    for hook in hooks:
        hook.remove()
    modules = {name: Threshold(h.threshold(HALF), HALF, linears[name].in_features) for name, h in found.items()}
    return apply_thresholds(model, Thresholds(HALF, 0, modules))


def decode_seconds(model: Any, prompt: Any, new: int) -> float:
    """Median time of a token after the prompt."""
    import torch
    from transformers import DynamicCache

    cache, seconds = DynamicCache(config=model.config), []
    with torch.inference_mode():
        token = model(prompt, past_key_values=cache).logits[:, -1:].argmax(-1)
        for _ in range(new):
            start = time.perf_counter()
            token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
            seconds.append(time.perf_counter() - start)
    return median(seconds)


def prompt_seconds(model: Any) -> float:
    """Time of PROMPT tokens in one pass, which reads all weights, masked or not."""
    import torch

    with torch.inference_mode():
        start = time.perf_counter()
        model(torch.ones(1, PROMPT, dtype=torch.int64), use_cache=False, logits_to_keep=1)
        return time.perf_counter() - start


def left_out_in_decoding(model: Any, tokens: Any, prompt: Any) -> float:
    """Share of the linears' weights that a few decoded tokens left out."""
    from llmcompress.teal import mean_share, measured, weight_sizes

    with measured(tokens) as meter:
        decode_seconds(model, prompt[:, :1], 8)
    return mean_share(meter.shares(), weight_sizes(model, meter.seen))


def verdict(dense: float, sparse: float, linears: dict[str, dict[str, Any]]) -> str:
    """Whether decoding is faster, and if not, where the time goes."""
    if sparse < dense:
        return f"Decoding is {dense / sparse:.2f} times as fast with half of the weights left out."
    rates = [
        [row["bytes"][side] / row[key] for row in linears.values()] for side, key in enumerate(("dense", "sparse"))
    ]
    return (
        f"Decoding is NOT faster ({dense / sparse:.2f}): single linears read {median(rates[1]) / 1e9:.1f} GB/s of kept "
        f"columns and {median(rates[0]) / 1e9:.1f} GB/s of whole rows, so half of the bytes take "
        f"{median(rates[0]) / median(rates[1]) / 2:.2f} of the time"
    )


def linear_times(dense: Any, sparse: Any) -> dict[str, dict[str, Any]]:
    """Median seconds of single linears: all weights by rows, as stock models have them, and half of the columns.

    Every call is for the next block, so that weights come from memory as in decoding; bytes are those that are read.
    """
    import torch
    from llmcompress_kernels import teal_linear

    found = {}
    for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj"):
        rows = [layer.get_submodule(name).weight for layer in dense.model.layers]
        columns = [layer.get_submodule(name).weight.T for layer in sparse.model.layers]
        out, size = rows[0].shape
        x = torch.randn(1, size, generator=torch.Generator().manual_seed(2)).bfloat16()
        at = float(x.abs().float().median())
        kept = int((x.float().abs() > at).sum())
        full = per_call([lambda x=x, w=w: torch.nn.functional.linear(x, w) for w in rows])
        half = per_call([lambda x=x, w=w, at=at: teal_linear(x, w, at) for w in columns])
        found[f"{name} {(out, size)}"] = {"dense": full, "sparse": half, "bytes": [2 * out * size, 2 * out * kept]}
    return found


def per_call(calls: list[Callable[[], Any]]) -> float:
    """Median time of a call, ten rounds through all of them."""
    import torch

    seconds = []
    with torch.inference_mode():
        for _ in range(10):
            for call in calls:
                start = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - start)
    return median(seconds)
