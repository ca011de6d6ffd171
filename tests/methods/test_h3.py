"""What is special to H3: a shift register before the product, a sum of decays after it, two gates."""

import numpy as np
import pytest
import torch

from effattn_lite.layers.h3 import H3
from effattn_lite.ops.h3 import h3, step
from effattn_lite.reference import h3 as reference
from effattn_lite.testing import make_inputs, relative_error, run_reference, to_torch

FORMS = pytest.mark.parametrize("form", (reference.recurrent, reference.parallel))


def draw(**sizes):
    return make_inputs("h3", state=True, **sizes)


def complex_modes(x):
    """The same inputs with oscillating modes, and their states."""
    rng = np.random.default_rng(5)
    A, C = (x[name] + 1j * rng.normal(size=x[name].shape) for name in ("A", "C"))
    keys, modes = x["initial_state"]
    return x | {"A": A, "C": C, "initial_state": (keys, modes * (1 + 0.5j))}


@FORMS
def test_reduces_to_lightning_attention(form):
    """One mode, no shift, no skip, C = 1 / B-bar: linear attention with a decay a head."""
    x = draw(T=37, M=1)
    del x["D"]
    x |= {"shift": np.ones_like(x["shift"]), "A": np.maximum(x["A"], -5.0)}
    decay, write = reference.discretise(x["dt"], x["A"])
    assert (decay > 0).all()
    x["C"] = 1 / write
    keys, modes = x["initial_state"]
    o, (_, S) = form(**x)
    # the state holds B-bar k v^T
    qkv = {name: x[name] for name in ("q", "k", "v")}
    want = run_reference(
        "lightning_attention",
        qkv | {"g": np.log(decay[:, 0]), "initial_state": modes[:, :, 0] / write[..., None]},
        scale=1.0,
    )
    assert relative_error((o, S[:, :, 0] / write[..., None]), want) < 1e-12


@FORMS
def test_is_two_convolutions_and_two_products(form):
    """The paper's order: k by the shift's kernel, times v; that by the diagonal's kernel, times q."""
    x = complex_modes(draw(B=1, T=30, H=2, K=1, V=1))
    del x["initial_state"]
    decay, write = reference.discretise(x["dt"], x["A"])
    lag = np.arange(30)[:, None, None]
    kappa = (x["C"] * decay**lag * write).sum(-1).real  # [T, H]
    kappa[0] += x["D"]

    def convolved(kernel, u):
        pairs = [[kernel[t - j] * u[j] for j in range(t + 1) if t - j < len(kernel)] for t in range(30)]
        return np.stack([sum(row) for row in pairs])

    q, k, v = (x[name][0, :, :, 0] for name in ("q", "k", "v"))
    want = q * convolved(kappa, convolved(x["shift"][:, 0].T, k) * v)
    assert relative_error(form(**x)[0][0, :, :, 0], want) < 1e-12


@FORMS
def test_forms_agree_where_modes_oscillate(form):
    x = complex_modes(draw(T=30))
    o, (keys, modes) = form(**x)
    want, (_, first) = reference.recurrent(**x)
    assert relative_error(o, want) < 1e-10 and np.abs(modes - first).max() < 1e-10 * np.abs(first).max()
    assert np.array_equal(keys, np.moveaxis(x["k"][:, :-13:-1], 1, -1))


@FORMS
def test_a_shift_looks_up_the_token_before(form):
    """shift = 1 at lag 1: a query that meets a key reads the value after it, as an induction head does."""
    k, v = np.eye(6)[None, :, None], np.arange(1.0, 7)[None, :, None, None]
    shift = np.zeros((1, 6, 2))
    shift[..., 1] = 1
    # one mode that forgets nothing, and one that nobody reads
    A, dt, C = np.array([[-1e-9, -1.0]]), np.ones(1), np.array([[1.0, 0.0]])
    q = np.zeros((1, 6, 1, 6))
    q[0, 5, 0, 2] = 1
    o, _ = form(q, k, v, shift=shift, dt=dt, A=A, C=C)
    # key 2 stood at token 2, and value 4 came next
    assert np.allclose(o[0, :, 0, 0], [0, 0, 0, 0, 0, 4], atol=1e-6)


def test_op_equals_reference_where_modes_oscillate():
    x = complex_modes(draw(T=37))
    want = reference.recurrent(**x)

    def torched(part):
        return tuple(map(torched, part)) if isinstance(part, tuple) else torch.tensor(part)

    text = {name: torched(part) for name, part in x.items()}
    o, (keys, modes) = h3(**text, output_final_state=True, chunk_size=16)
    assert modes.dtype == torch.complex128 and keys.dtype == torch.float64
    assert relative_error((o, keys), (want[0], want[1][0])) < 1e-10
    assert np.abs(modes.numpy() - want[1][1]).max() < 1e-10 * np.abs(want[1][1]).max()
    token = {name: part[:, 0] if name in ("q", "k", "v") else part for name, part in text.items()}
    state = token.pop("initial_state")
    assert relative_error(step(**token, state=state)[0], want[0][:, 0]) < 1e-10


def test_register_forgets_after_its_length():
    """A key older than M tokens is in no weighting: the next key-bar does not see it."""
    x = to_torch(draw(T=20, M=4))
    del x["initial_state"]
    other = x["k"].clone()
    other[:, 3] += 1
    x["A"], x["dt"] = torch.full_like(x["A"], -2.0), torch.ones_like(x["dt"])  # A-bar = 0: no memory after it
    before, after = h3(**x)[0], h3(**x | {"k": other})[0]
    changed = (before - after).abs().amax((0, 2, 3)) > 1e-12
    assert changed.nonzero().flatten().tolist() == [3, 4, 5, 6]


def test_errors():
    x = to_torch(draw(T=9))
    with pytest.raises(ValueError, match=r"shift has shape \(2, 15, 12\).*16.*as q and shift"):
        h3(**x | {"shift": x["shift"][:, :15]})
    with pytest.raises(ValueError, match=r"C has shape \(2, 11\)"):
        h3(**x | {"C": x["C"][:, :11]})
    keys, modes = x["initial_state"]
    with pytest.raises(ValueError, match=r"initial_state\[0\] has shape"):
        h3(**x | {"initial_state": (keys[..., 1:], modes)})
    with pytest.raises(TypeError, match=r"initial_state\[1\] is torch.float32, expected torch.float64"):
        h3(**x | {"initial_state": (keys, modes.float())})
    with pytest.raises(NotImplementedError, match="h3 has no kernel"):
        h3(**x, impl="triton")


def test_layer_begins_with_modes_of_all_lengths():
    """A = -1/2 + i pi m and steps between 0.001 and 0.1: every mode decays."""
    torch.manual_seed(0)
    system = H3(32, 4, states=16)._system()
    A = system["A"].detach()
    assert relative_error(A.imag, torch.pi * torch.arange(16.0).expand(4, 16)) < 1e-6
    assert relative_error(A.real, torch.full((4, 16), -0.5)) < 1e-6
    decay, _ = reference.discretise(system["dt"].detach().numpy(), A.numpy())
    assert (np.abs(decay) < 1).all()


def test_packed_prefill_can_be_continued():
    layer, x = H3(16, 2, states=4).double(), torch.randn(1, 30, 16, dtype=torch.float64)
    edges = torch.tensor([0, 0, 2, 30])
    _, cache = layer.prefill(x, cu_seqlens=edges)
    token = torch.randn(3, 16, dtype=torch.float64)
    together = layer.step(token, cache)[0]
    for n, (a, b) in enumerate(zip(edges, edges[1:], strict=False)):
        alone = layer.prefill(x[:, a:b])[1] if a < b else None
        assert relative_error(layer.step(token[n : n + 1], alone)[0], together[n : n + 1]) < 1e-10
