"""What all tests share: one thread, fixed seeds, a device, Triton's interpreter where there is no GPU."""

import os

# two xdist workers on two cores: more threads a process only wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    # triton reads it when it is first imported
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config):
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    # the float32 laws compare with float32, not with TF32
    torch.set_float32_matmul_precision("highest")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    # before -k and -m take any away: the coverage law asks what was there
    config.collected = list(items)
    if CUDA:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seeds():
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def device():
    """Where kernels run: the GPU, or CPU tensors in Triton's interpreter."""
    return "cuda" if CUDA else "cpu"


@pytest.fixture
def nan_empty(monkeypatch):
    """Every floating tensor made by an `empty` is full of NaN, so that an output not wholly written shows."""

    def filled(make):
        def call(*args, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return call

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, filled(getattr(owner, name)))


@pytest.fixture
def launches(monkeypatch):
    """Names of the Triton kernels launched so far in this test, in order."""
    triton = pytest.importorskip("triton", reason="triton is not installed (it needs Linux)")
    from triton.runtime.interpreter import GridExecutor

    seen = []

    def counted(owner, method, name_of):
        run = getattr(owner, method)

        def call(self, *args, **kwargs):
            seen.append(name_of(self))
            return run(self, *args, **kwargs)

        monkeypatch.setattr(owner, method, call)

    counted(triton.runtime.jit.JITFunction, "run", lambda kernel: kernel.fn.__name__)
    counted(GridExecutor, "__call__", lambda executor: executor.fn.__name__)
    return seen
