"""Laws of the layers: three calls, one function; float64 on the CPU."""

import importlib
import inspect

import pytest
import torch
from cases import cases, causal

from effattn_lite.testing import max_error, relative_error

RTOL = 1e-10
WIDTH, HEADS = 32, 4
WINDOWS = {"window", "local_blocks"}


def build(case):
    """The method's layer in float64, with those of the case's options that its constructor takes."""
    module = importlib.import_module(f"effattn_lite.layers.{case.name}")
    layer = getattr(module, case.row.layer)
    known = inspect.signature(layer).parameters
    torch.manual_seed(0)
    return layer(WIDTH, HEADS, **{name: x for name, x in case.options.items() if name in known}).double()


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def bytes_of(cache):
    if isinstance(cache, torch.Tensor):
        return cache.nbytes
    return (
        sum(map(bytes_of, cache.values() if isinstance(cache, dict) else cache)) if cache is not None else 0
    )


def bounded(case):
    """Whether decoding forgets: a state, or a window, unless blocks are selected from the whole text."""
    row = case.row
    return row.stateful or (row.family != "selected blocks" and bool(WINDOWS & set(case.options)))


def decodes(case):
    return causal(case) and set(case.options) <= set(constructor(case))


def constructor(case):
    module = importlib.import_module(f"effattn_lite.layers.{case.name}")
    return inspect.signature(getattr(module, case.row.layer)).parameters


LAYERS = cases("layer", decodes)


@pytest.mark.parametrize("case", LAYERS)
def test_forward_is_prefill_is_steps(case):
    layer, x = build(case), draw(2, 45, WIDTH)
    want = layer(x)
    assert want.shape == x.shape
    a, cache = layer.prefill(x[:, :19])
    b, cache = layer.prefill(x[:, 19:], cache)
    assert relative_error(torch.cat((a, b), dim=1), want) < RTOL
    alone, halfway = [], None
    for t in range(x.shape[1]):
        y, halfway = layer.step(x[:, t], halfway)
        alone.append(y)
    assert relative_error(torch.stack(alone, dim=1), want) < RTOL
    y, _ = layer.step(x[:, 0], cache)
    z, _ = layer.step(x[:, 0], halfway)
    assert relative_error(y, z) < RTOL


@pytest.mark.parametrize("case", LAYERS)
def test_cache_is_not_written_to(case):
    """Two continuations of one prompt do not see each other."""
    layer, x = build(case), draw(1, 30, WIDTH)
    cache = layer.prefill(x[:, :20])[1]
    first = layer.prefill(x[:, 20:], cache)[0]
    assert max_error(layer.prefill(x[:, 20:], cache)[0], first) == 0


@pytest.mark.parametrize("case", LAYERS)
def test_causality(case):
    layer, x, t = build(case), draw(2, 45, WIDTH), 30
    other = x.clone()
    other[:, t] = -x[:, t]
    before, after = layer(x), layer(other)
    assert relative_error(after[:, :t], before[:, :t]) < RTOL
    assert max_error(after[:, t], before[:, t]) > 1e-6


@pytest.mark.parametrize("case", cases("layer", lambda case: case.row.differentiable))
def test_gradient_reaches_every_parameter(case):
    layer, x = build(case), draw(2, 45, WIDTH).requires_grad_()
    loss = layer(x).square().sum()
    # what chooses hard learns by a loss of its own
    (loss + layer.loss(x) if hasattr(layer, "loss") else loss).backward()
    parameters = dict(layer.named_parameters()) | {"x": x}
    missing = [name for name, parameter in parameters.items() if parameter.grad is None]
    assert not missing
    sizes = {name: float(parameter.grad.abs().max()) for name, parameter in parameters.items()}
    assert all(parameter.grad.isfinite().all() for parameter in parameters.values())
    # where terms cancel, what is left of a gradient is rounding: float64 keeps sixteen digits
    assert all(size > 1e-10 * max(sizes.values()) for size in sizes.values()), sizes


@pytest.mark.parametrize("case", [p for p in LAYERS if bounded(p.values[0])])
def test_cache_is_bounded(case):
    layer, x = build(case), draw(1, 240, WIDTH)
    assert 0 < bytes_of(layer.prefill(x[:, :120])[1]) == bytes_of(layer.prefill(x)[1])


@pytest.mark.parametrize("case", LAYERS)
def test_packed_sequences(case):
    layer, x, edges = build(case), draw(1, 45, WIDTH), [0, 20, 20, 21, 45]
    packed = layer(x, cu_seqlens=torch.tensor(edges))
    alone = [layer(x[:, a:b]) for a, b in zip(edges, edges[1:], strict=False) if a < b]
    assert relative_error(torch.cat(alone, dim=1), packed) < RTOL


@pytest.mark.parametrize("case", cases("layer"))
def test_state_dict_round_trip(case):
    layer, x = build(case), draw(1, 20, WIDTH)
    other = build(case)
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter)
    other.load_state_dict(layer.state_dict())
    assert max_error(other(x), layer(x)) == 0


@pytest.mark.parametrize("case", cases("layer"))
def test_autocast(case):
    """Under bfloat16 autocast the layer stays near its float32 self, and its gradients are finite."""
    layer, x = build(case).float(), draw(2, 45, WIDTH).float()
    want = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    # a projection, the op and a projection, each of them rounded to 8 bits
    assert relative_error(y.float(), want) < 0.1
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())
