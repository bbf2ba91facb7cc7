"""One run of llm-compressor in its own environment: job.json in, a folder and measured.json out."""

import json
import sys
import time
from pathlib import Path

from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
from llmcompressor.modifiers.pruning.wanda import WandaPruningModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from safetensors.torch import load_file

IMPORTED = time.perf_counter()


def main(job_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    # It needs an accelerator, and without one there is nothing to copy to.
    IntermediatesCache.pin_memory = lambda self, *args, **kwargs: None
    oneshot(model=job["model"], recipe=modifiers(job), output_dir=job["output"], **data(job))
    done = time.perf_counter()
    status = Path("/proc/self/status").read_text()
    peak = 1024 * int(status.split("VmHWM:")[1].split()[0])
    Path(job["measured"]).write_text(json.dumps({"work_seconds": done - IMPORTED, "peak_bytes": peak}))


def modifiers(job: dict) -> list:
    if job.get("pattern"):
        pruner = SparseGPTModifier if job["method"] == "sparsegpt" else WandaPruningModifier
        return [pruner(sparsity=0.5, mask_structure=job["pattern"], ignore=["lm_head"])]
    weights = {"num_bits": 4, "type": "int", "strategy": "group"}
    weights |= {"symmetric": job["symmetric"], "group_size": job["group_size"]}
    scheme = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}
    if job["method"] == "gptq":
        return [GPTQModifier(**scheme)]
    return ([AWQModifier()] if job["method"] == "awq" else []) + [QuantizationModifier(**scheme)]


def data(job: dict) -> dict:
    if job["method"] == "rtn":
        return {}
    rows = load_file(job["tokens"])["tokens"].tolist()
    dataset = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    return {"dataset": dataset, "num_calibration_samples": len(rows), "max_seq_length": len(rows[0])}


if __name__ == "__main__":
    main(sys.argv[1])
