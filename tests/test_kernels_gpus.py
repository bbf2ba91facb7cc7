"""GPUs on which the kernels do not run are refused before anything is launched or imported, and models are told why."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from llmcompress_kernels import checks
from llmcompress_kernels.registered import where_it_runs

from llmcompress.runtime.table import OPERATORS

GPU = torch.device("cuda", 0)
OLD = "on a GPU of compute capability 7.5, expected 8.0 or more"


def tensor(dtype=torch.bfloat16, shape=(8, 2)):
    """As much of a tensor on a GPU as a check looks at."""
    return SimpleNamespace(device=GPU, dtype=dtype, is_meta=False, ndim=len(shape), shape=shape)


@pytest.fixture(autouse=True)
def forgotten():
    checks.unsupported.cache_clear()
    yield
    checks.unsupported.cache_clear()


@pytest.fixture
def gpu_of(monkeypatch):
    """Makes the GPU one of a compute capability."""

    def make(capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    return make


@pytest.mark.parametrize("capability", [(7, 5), (6, 1)])
def test_an_old_gpu_is_refused_before_its_kernel(gpu_of, capability):
    gpu_of(capability)
    started = []
    found = ".".join(map(str, capability))
    with pytest.raises(ValueError, match=rf"^some: x is on a GPU of compute capability {found}, expected 8.0 or more$"):
        where_it_runs("some", started.append)(tensor())
    assert started == []


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0)])
def test_others_run(gpu_of, capability):
    gpu_of(capability)
    x, other = tensor(), object()
    assert where_it_runs("some", lambda *given: given)(x, other) == (x, other)


def test_rocm_and_a_missing_triton_are_named(gpu_of, monkeypatch):
    gpu_of((9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="x is on a GPU, and triton is not installed, expected triton"):
        checks.check_gpu("some", tensor())
    checks.unsupported.cache_clear()
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(ValueError, match="x is on a GPU of ROCm, expected an NVIDIA GPU"):
        checks.check_gpu("some", tensor())


def test_a_gpu_is_asked_once(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: asked.append(device) or (9, 0))
    for _ in range(3):
        checks.check_gpu("some", tensor())
    assert asked == [GPU]


def test_a_model_on_an_old_gpu_is_told_why(gpu_of):
    gpu_of((7, 5))
    names = ("weight", "weight_packed", "weight_scale", "weight_index")
    tensors = {name: tensor() for name in names}
    reasons = {operator.name: operator.refuses(tensors, (8, 128)) for operator in OPERATORS.values()}
    assert reasons.keys() >= {"int4_linear", "sparse24_linear", "sparse24_int4_linear"}
    assert set(reasons.values()) == {f"it is {OLD}"}
