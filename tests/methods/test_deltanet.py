"""What is special to DeltaNet: it overwrites, it erases, it reflects, and repeated keys do not blow it up."""

import numpy as np
import pytest
import torch

from effattn_lite.layers.common import unit
from effattn_lite.layers.deltanet import DeltaNet
from effattn_lite.ops.deltanet import deltanet
from effattn_lite.reference import deltanet as reference
from effattn_lite.reference import lightning_attention
from effattn_lite.testing import make_inputs, max_error, relative_error, to_torch

FORMS = (reference.recurrent, reference.parallel, reference.chunkwise)


def draw(*, beta=None, **sizes):
    x = make_inputs("deltanet", state=True, **sizes)
    if beta is not None:
        x["beta"][:] = beta
    return x


@pytest.mark.parametrize("form", FORMS)
def test_a_key_reads_the_value_it_has_just_written(form):
    """beta = 1 and keys of length 1: S_t^T k_t = v_t at every token, whatever the memory held."""
    x = draw(T=37, beta=1)
    o, _ = form(**x | {"q": x["k"]}, scale=1.0)
    assert max_error(o, x["v"]) < 1e-12


def test_beta_between_moves_the_read_out_part_of_the_way():
    """S_t^T k = (1 - beta) S_{t-1}^T k + beta v."""
    x = draw(T=1)
    o, _ = reference.recurrent(**x | {"q": x["k"]}, scale=1.0)
    old = np.einsum("bthk,bhkv->bthv", x["k"], x["initial_state"])
    beta = x["beta"][..., None]
    assert max_error(o, (1 - beta) * old + beta * x["v"]) < 1e-12


@pytest.mark.parametrize("form", FORMS)
def test_beta_zero_changes_nothing(form):
    x = draw(T=37, beta=0)
    assert np.array_equal(form(**x)[1], x["initial_state"])


@pytest.mark.parametrize("form", FORMS)
def test_beta_two_reflects(form):
    """v = 0, S_0 = I: the state is a product of reflections, hence orthogonal, with determinant (-1)^T."""
    x = draw(T=37, K=16, V=16, beta=2)
    x["v"][:] = 0
    x["initial_state"][:] = np.eye(16)
    _, S = form(**x)
    assert max_error(S @ S.swapaxes(2, 3), np.broadcast_to(np.eye(16), S.shape)) < 1e-12
    assert max_error(np.linalg.det(S), np.full(S.shape[:2], -1.0)) < 1e-12


@pytest.mark.parametrize("form", (reference.recurrent, reference.chunkwise))
@pytest.mark.parametrize("beta", (1, 2))
def test_repeated_keys_stay_finite(form, beta):
    """One key 4096 times: beta = 1 reads v_t back, beta = 2 reads r_t = 2 v_t - r_{t-1}, a sum of signs."""
    T = 4096
    x = draw(B=1, T=T, H=1, K=8, V=8, hard="repeated", beta=beta)
    o, S = form(**x | {"q": x["k"]}, scale=1.0)
    want = x["v"]
    if beta == 2:
        sign = (-1.0) ** np.arange(T)[:, None, None]
        first = np.einsum("bhk,bhkv->bhv", x["k"][:, 0], x["initial_state"])
        want = sign * (np.cumsum(2 * sign * x["v"], axis=1) - first[:, None])
    assert relative_error(o, want) < 1e-10
    # only the key's direction has changed
    k, S0 = x["k"][:, 0], x["initial_state"]
    kept = S0 - np.einsum("bhk,bhj,bhjv->bhkv", k, k, S0)
    assert relative_error(S - np.einsum("bhk,bhv->bhkv", k, o[:, -1]), kept) < 1e-10


@pytest.mark.parametrize("form", FORMS)
def test_orthogonal_keys_make_it_a_plain_sum(form):
    """No key reads what another wrote: linear attention without decay, of the values times beta."""
    x = draw(T=16, K=16)
    x["k"] = np.linalg.qr(x["k"].swapaxes(1, 2))[0].swapaxes(1, 2)
    del x["initial_state"]
    beta = x.pop("beta")
    want = lightning_attention.recurrent(
        x["q"], x["k"], beta[..., None] * x["v"], g=np.zeros(2), scale=16**-0.5
    )
    assert relative_error(form(**x, beta=beta), want) < 1e-12


def test_length_of_a_key_acts_as_strength():
    """A key of length c with strength beta erases as one of length 1 with c^2 beta: above 2 it grows."""
    x = draw(B=1, T=300, H=1, hard="repeated", beta=1)
    x["v"][:] = 0
    long = reference.chunkwise(**x | {"k": 1.5 * x["k"]})[1]
    assert relative_error(long, reference.chunkwise(**x | {"beta": 2.25 * x["beta"]})[1]) < 1e-10
    assert np.abs(long).max() > 1e10 * np.abs(x["initial_state"]).max()


@pytest.mark.parametrize("chunk_size", (1, 2, 7, 64))
def test_any_chunk_size_gives_the_same(chunk_size):
    x = draw(T=37)
    assert relative_error(reference.chunkwise(**x, chunk_size=chunk_size), reference.recurrent(**x)) < 1e-12


@pytest.mark.parametrize("impl", ("torch", "triton"))
@pytest.mark.parametrize("beta", (1, 2))
def test_op_reads_back_what_repeated_keys_write(impl, beta, device):
    """One key 150 times: beta = 1 reads v_t back, beta = 2 reads 2 v_t - r_{t-1}."""
    x = draw(B=1, T=150, H=1, K=16, V=16, hard="repeated", beta=beta, dtype="float32")
    x |= {"q": x["k"], "initial_state": 0 * x["initial_state"]}
    o, _ = deltanet(**to_torch(x, dtype="float32", device=device), scale=1.0, impl=impl)
    sign = (-1.0) ** np.arange(150)[:, None, None]
    want = x["v"] if beta == 1 else 2 * sign * np.cumsum(sign * x["v"], axis=1)
    # every token rounds the same k k = 1: T roundings add up
    assert relative_error(o, want) < 150 * 2.0**-22


def test_layer_reflects_where_beta_may_reach_two():
    """beta in (0, 1) keeps I - beta k k^T positive, beta_max = 2 lets its smallest eigenvalue reach -1."""
    x = 50 * torch.randn(1, 200, 32)
    for most in (1.0, 2.0):
        beta = DeltaNet(32, 4, beta_max=most).gates(x)["beta"]
        assert 0 <= beta.min() and most - 1e-3 < beta.max() <= most


def test_unit_vectors():
    x = torch.randn(7, 16, dtype=torch.float64)
    assert relative_error(unit(x).norm(dim=-1), torch.ones(7)) < 1e-6
    zero = torch.zeros(4, requires_grad=True)
    unit(zero).sum().backward()
    assert zero.grad.isfinite().all() and not unit(zero).any()


def test_convolutions_stop_at_a_sequence():
    """Changing the last token of one packed sequence leaves the next sequence as it was."""
    layer, x = DeltaNet(32, 2).double(), torch.randn(1, 20, 32, dtype=torch.float64)
    edges, other = torch.tensor([0, 9, 9, 20]), x.clone()
    other[:, 8] += 1
    assert torch.equal(layer(x, cu_seqlens=edges)[:, 9:], layer(other, cu_seqlens=edges)[:, 9:])


def test_packed_prefill_can_be_continued():
    layer, x = DeltaNet(32, 2).double(), torch.randn(1, 30, 32, dtype=torch.float64)
    edges = torch.tensor([0, 0, 2, 30])
    _, cache = layer.prefill(x, cu_seqlens=edges)
    token = torch.randn(3, 32, dtype=torch.float64)
    together = layer.step(token, cache)[0]
    for n, (a, b) in enumerate(zip(edges, edges[1:], strict=False)):
        alone = layer.prefill(x[:, a:b])[1] if a < b else None
        assert relative_error(layer.step(token[n : n + 1], alone)[0], together[n : n + 1]) < 1e-10
