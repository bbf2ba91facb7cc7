"""Load kernels/ through Hugging Face's `kernels` library, from a local path, and multiply with it on CPU.

    python evals/load_hub_kernel.py

An environment is made below `--cache` on first use. It has `kernels` and what that needs; torch is the one of this
interpreter, whose packages are put on its path after its own. Nothing of this project is installed in it. Shown are:
that the library's own parser takes build.toml, that `get_local_kernel` and `get_kernel` with LOCAL_KERNELS load the
build, that its operators have a namespace of their own, and that they compute the product. Not shown: GPUs, uploading.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KERNELS = "kernels==0.17.2"
REPO = "your-name/llmcompress-kernels"
PROGRAM = '''
import inspect
import json
import sys
from pathlib import Path

import kernels
import torch
from kernels import get_kernel, get_local_kernel

source, built = Path(sys.argv[1]), Path(sys.argv[2])
facts = json.loads((built / "build/torch-cpu/metadata.json").read_text())


def parsed():
    """Whether the library's parser took build.toml; it is in one module or the other, by version."""
    for module in ("kernels._rust", "kernels._data", "kernels_data"):
        try:
            found = getattr(__import__(module, fromlist=["Build"]), "Build", None)
        except ImportError:
            continue
        if found is not None:
            return len(found.open(source).general.backends) == 2  # it raises what it does not take
    return None


def error(kernel):
    """Relative error of the product against float64, with a weight whose tensors are as in a checkpoint."""
    torch.manual_seed(0)
    rows, columns, group = 24, 192, 64
    packed = torch.randint(-(2**31), 2**31, (rows, columns // 8), dtype=torch.int64).to(torch.int32)
    scale = (torch.rand(rows, columns // group) + 0.5).to(torch.bfloat16)
    x = torch.randn(3, columns).to(torch.bfloat16)
    codes = (packed[..., None] >> torch.arange(0, 32, 4)) & 15
    truth = x.double() @ ((codes.flatten(1) - 8.0) * scale.double().repeat_interleave(group, 1)).T
    y = kernel.int4_linear(x, *kernel.from_pack_quantized(packed, scale, None, columns))
    return float((y.double() - truth).norm() / truth.norm())


old = "package_name" in inspect.signature(get_local_kernel).parameters
local = get_local_kernel(built, **({"package_name": "llmcompress_kernels"} if old else {}))
named = get_kernel("your-name/llmcompress-kernels", version=0)
print(json.dumps({
    "kernels": kernels.__version__ if hasattr(kernels, "__version__") else "unknown",
    "torch": torch.__version__,
    "build.toml parsed": parsed(),
    "error of get_local_kernel": error(local),
    "error of LOCAL_KERNELS": error(named),
    "own namespace": hasattr(getattr(torch.ops, facts["id"]), "int4_linear"),
    "shared namespace": hasattr(torch.ops.llmcompress, "int4_linear"),
    "ours imported": sorted({"llmcompress", "llmcompress_kernels"} & sys.modules.keys()),
}))
'''


def main() -> int:
    """Build, load, print what was found; exit code 1 if it is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=ROOT / ".peers", help="where the environment and the build go")
    cache = parser.parse_args().cache.resolve()
    built = cache / "hub-kernel"
    subprocess.run([sys.executable, str(ROOT / "kernels/tools/build_hub.py"), str(built)], check=True)
    program = cache / "load_hub_kernel.py"
    program.write_text(PROGRAM, encoding="utf-8")
    # started elsewhere and with -P: kernels/ of this repository must not be found in place of the library
    command = [str(environment(cache)), "-P", str(program), str(ROOT / "kernels"), str(built)]
    options = {"HF_HUB_OFFLINE": "1", "LOCAL_KERNELS": f"{REPO}={built}", "PYTHONPATH": ""}
    done = subprocess.run(command, env=os.environ | options, cwd=cache, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout, end="")
    return 1 if done.returncode or not right(done.stdout) else 0


def right(output: str) -> bool:
    """Whether the program found what it should."""
    found = json.loads(output.splitlines()[-1])
    exact = all(found[f"error of {way}"] < 2**-8 for way in ("get_local_kernel", "LOCAL_KERNELS"))  # bfloat16 rounds so
    apart = found["own namespace"] and not found["shared namespace"] and not found["ours imported"]
    return exact and apart and found["build.toml parsed"] is True


def environment(cache: Path) -> Path:
    """Python of an environment with `kernels`, made on first use."""
    folder = cache / f"hub-{KERNELS.replace('==', '-')}"
    python = folder / "bin" / "python"
    if (folder / "complete").exists():
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "torch_of_the_parent.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", KERNELS], check=True)
    (folder / "complete").touch()
    return python


if __name__ == "__main__":
    sys.exit(main())
