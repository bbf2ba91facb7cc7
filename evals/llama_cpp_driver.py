"""Times a model in llama.cpp, through llama-cpp-python. Run by bench_runtime.py in an interpreter that has it.

Standard input: {"model": path of a GGUF file, "prompt": tokens, "new": tokens, "threads": n}. Standard output:
{"version", "prefill_seconds", "decode_seconds"}: reading the prompt and making one token; the median of each further
token. Like `llmcompress bench` it generates twice, and the clock is that of the second time. Tokens are random numbers.
"""

import json
import random
import statistics
import sys
import time
from importlib.metadata import version
from typing import Any


def main() -> None:
    asked = json.load(sys.stdin)
    times = generated(asked["model"], asked["prompt"], asked["new"], asked["threads"])
    seconds = {"prefill_seconds": times[0], "decode_seconds": statistics.median(times[1:])}
    json.dump({"version": version("llama_cpp_python")} | seconds, sys.stdout)


def generated(path: str, prompt: int, new: int, threads: int) -> list[float]:
    """Seconds of each step of the second of two generations."""
    import llama_cpp

    quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)  # must live as long as the library logs
    llama_cpp.llama_log_set(quiet, None)
    llama_cpp.llama_backend_init()
    loading = llama_cpp.llama_model_default_params()
    loading.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(path.encode(), loading)
    if not model:
        raise SystemExit(f"{path}: llama.cpp cannot load it")
    times: list[float] = []
    for count in (2, new):
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch = prompt + new, prompt
        settings.n_threads = settings.n_threads_batch = threads
        context = llama_cpp.llama_init_from_model(model, settings)
        if not context:
            raise SystemExit(f"{path}: llama.cpp has no memory for {prompt + new} tokens")
        times = steps(llama_cpp, context, prompt, count)
        llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return times


def steps(library: Any, context: Any, prompt: int, new: int) -> list[float]:
    """Seconds of reading the prompt, then of each token; logits of its last token are made by each step."""
    draw, times = random.Random(0), []
    for length in (prompt, *[1] * (new - 1)):
        tokens = (library.llama_token * length)(*(draw.randrange(3, 1000) for _ in range(length)))
        start = time.perf_counter()
        failed = library.llama_decode(context, library.llama_batch_get_one(tokens, length))
        logits = library.llama_get_logits_ith(context, -1)  # waits until they are there
        times.append(time.perf_counter() - start)
        if failed or not logits:
            raise SystemExit(f"llama_decode failed with {failed} after {len(times) - 1} steps")
    return times


if __name__ == "__main__":
    main()
