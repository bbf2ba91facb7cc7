import pytest
from conftest import ARCHITECTURES

STEP = {"structure": "hidden", "score": "activation", "ratio": 0.25, "of": "group"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
@pytest.mark.parametrize("kind", list(ARCHITECTURES)[:-3])
def test_x(kind, run_here, dtype):
    folder, results = run_here(kind, STEP, dtype=dtype)
    p = results["proof"]
    print("XX", kind, dtype, p["relative_rms"], p["tolerance"], p["top1_agreement"], results["size"])
