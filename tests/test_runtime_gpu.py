"""On a GPU: packed folders are loaded, moved and generate. It needs one, so the default run leaves it out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import proof_inside, recipe
from torch import Tensor

from llmcompress.run import run
from llmcompress.runtime import PackedLinear, accelerate, compressed_linears, load

pytestmark = pytest.mark.gpu

TWO_OF_FOUR = {"method": "magnitude", "pattern": "2:4"}
RTN = {"method": "rtn", "group_size": 32}
RECIPES: dict[str, list[dict[str, Any]]] = {
    "pack-quantized": [RTN],
    "sparse24": [TWO_OF_FOUR],
    "sparse24-int4": [TWO_OF_FOUR, RTN],
}


@pytest.fixture(scope="module", params=RECIPES)
def folder(request: Any, tiny_folders: Any, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a tiny Llama."""
    made = tmp_path_factory.mktemp("runs") / request.param
    with pytest.MonkeyPatch.context() as patch, proof_inside(patch):
        run(recipe(tiny_folders("llama"), text, *RECIPES[request.param], output={"format": request.param}), made)
    return made


@pytest.fixture
def packed(folder: Path) -> Any:
    """Moved to the GPU after loading; what had no code on the CPU is packed there."""
    model = load(folder).to("cuda")
    accelerate(model)
    return model


def logits(model: Any, length: int) -> Tensor:
    tokens = torch.randint(3, 128, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found: Tensor = model(tokens.to(model.device)).logits
    return found


@pytest.mark.parametrize("length", [1, 5, 48])
def test_a_moved_model_is_as_exact_as_the_dense_one(packed, folder, length):
    assert {type(linear) for _, linear in compressed_linears(packed)} == {PackedLinear}
    dense = load(folder, packed=False).to("cuda")
    found, unpacked = logits(packed, length), logits(dense, length)
    truth = logits(dense.float(), length)
    assert found.is_cuda
    errors = [float((y.float() - truth).norm() / truth.norm()) for y in (found, unpacked)]
    assert errors[0] <= 2 * errors[1]


def test_it_loads_onto_the_gpu(folder):
    model = load(folder, device_map="cuda")
    assert all(tensor.is_cuda for tensor in model.state_dict().values())
    assert torch.isfinite(logits(model, 5)).all()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_it_generates(packed, cache):
    tokens = torch.randint(3, 128, (1, 7), generator=torch.Generator().manual_seed(0)).to("cuda")
    options = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": cache}
    first, again = (packed.generate(tokens, **options) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(first[:, :7], tokens)
