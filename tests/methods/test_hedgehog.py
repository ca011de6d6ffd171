"""What is special to Hedgehog: features that are a softmax, spiky weights, a map that is distilled."""

import numpy as np
import pytest
import torch

from effattn_lite.layers.hedgehog import Hedgehog
from effattn_lite.ops.hedgehog import hedgehog
from effattn_lite.ops.linear_transformer import linear_transformer
from effattn_lite.reference import linear_transformer as plain
from effattn_lite.reference.hedgehog import features
from effattn_lite.registry import find
from effattn_lite.testing import make_inputs, max_error, relative_error, run_op, run_reference, to_torch

FORMS = pytest.mark.parametrize("form", find("hedgehog").forms)
IMPLS = pytest.mark.parametrize("impl", ("torch", "triton"))


def identity(x, factor=1.0):
    """The inputs with W = factor I in every head and no bias."""
    K = x["q"].shape[-1]
    w = np.broadcast_to(factor * np.eye(K), (x["q"].shape[2], K, K))
    return {name: x[name] for name in "qkv"} | {"wq": w, "wk": w}


def test_reduces_to_linear_transformer():
    """Equal maps of queries and keys are one feature map."""
    x = to_torch(make_inputs("hedgehog", T=37))
    q, k, v, w, _, b, _ = x.values()

    def phi(t):
        u = torch.einsum("bthk,hmk->bthm", t, w) + b
        return torch.cat((u, -u), dim=-1).softmax(-1)

    want = linear_transformer(q, k, v, feature_map=phi, output_final_state=True)
    assert relative_error(hedgehog(q, k, v, wq=w, wk=w, bq=b, bk=b, output_final_state=True), want) < 1e-12


@FORMS
def test_without_bias(form):
    """None is a bias of zero, in every form and in the op."""
    x = make_inputs("hedgehog", T=33)
    zero = x | {"bq": np.zeros_like(x["bq"]), "bk": np.zeros_like(x["bk"])}
    want = run_reference("hedgehog", zero)
    none = x | {"bq": None, "bk": None}
    tensors = {n: torch.tensor(t) for n, t in none.items() if t is not None}
    assert relative_error(run_op("hedgehog", tensors), want) < 1e-12
    given = {n: t for n, t in none.items() if t is not None}
    assert relative_error(run_reference("hedgehog", given, form=form), want) < 1e-10


def test_features_are_a_softmax():
    """Positive, adding up to 1; exponentials of u and -u up to a factor, which for queries cancels."""
    x = make_inputs("hedgehog", T=20)
    phi = features(x["q"], x["wq"], x["bq"])
    assert (phi > 0).all() and max_error(phi.sum(-1), np.ones(phi.shape[:-1])) < 1e-12
    u = np.einsum("bthk,hmk->bthm", x["q"], x["wq"]) + x["bq"]
    exponentials = np.exp(np.concatenate((u, -u), axis=-1))
    assert relative_error(phi * exponentials.sum(-1, keepdims=True), exponentials) < 1e-12
    A = np.tril(np.einsum("bthm,bjhm->bhtj", exponentials, features(x["k"], x["wk"], x["bk"])))
    want = np.einsum("bhtj,bjhv->bthv", A / A.sum(-1, keepdims=True), x["v"])
    assert relative_error(run_reference("hedgehog", x)[0], want) < 1e-12


def entropy(weights):
    """Mean entropy of the weights of the second half of the tokens, in nats; weights [B, H, T, T]."""
    A = np.tril(weights)
    A = A / A.sum(-1, keepdims=True)
    return -np.sum(A * np.log(np.where(A > 0, A, 1)), axis=-1)[..., A.shape[-1] // 2 :].mean()


def test_spikiness():
    """elu + 1 stays near the mean of all tokens; a larger W makes weights spikier than a softmax's."""
    x = make_inputs("hedgehog", T=64, K=16)

    def products(phi):
        return np.einsum("bthk,bjhk->bhtj", phi(x["q"]), phi(x["k"]))

    uniform = np.log(np.arange(33, 65)).mean()
    flat, softmax = entropy(products(plain.features)), entropy(np.exp(products(lambda t: t) / 4))
    factors = (0.5, 1, 2, 4)
    spiky = [entropy(products(lambda t, f=f: features(t, identity(x, f)["wq"]))) for f in factors]
    assert flat > 0.97 * uniform
    assert all(a > b for a, b in zip(spiky, spiky[1:], strict=False))
    assert spiky[-1] < softmax < flat


@IMPLS
def test_maps_of_any_size(impl, device):
    """A W of 1,000: features are 0 and 1 to the last digit; a key of another channel weighs nothing."""
    inputs = make_inputs("hedgehog", B=1, T=20, H=1, K=16, V=16, dtype="float32")
    inputs = {n: np.array(t) for n, t in identity(inputs, 1000.0).items()}
    inputs["q"][:], inputs["k"][:] = 0, 0
    inputs["q"][..., 0], inputs["k"][:, :10, :, 1], inputs["k"][:, 10:, :, 0] = 1, 1, 1
    x = to_torch(inputs, dtype="float32", device=device, requires_grad=True)
    o = hedgehog(**x, impl=impl)[0]
    mean = x["v"][:, 10:].cumsum(1) / torch.arange(1, 11, device=device)[:, None, None]
    assert (o[:, :10] == 0).all() and relative_error(o[:, 10:].detach(), mean.detach()) < 1e-5
    o.sum().backward()
    assert all(t.grad.isfinite().all() for t in x.values())


def test_distilled_maps_mimic_a_softmax():
    """60 steps take the cross-entropy most of the way from the first maps' to the softmax's own entropy."""
    torch.manual_seed(0)
    layer, x = Hedgehog(32, 2), torch.randn(2, 32, 32)
    with torch.no_grad():
        # scores of some nats, as trained models have them
        layer.q_proj.weight.mul_(3), layer.k_proj.weight.mul_(3)
    maps = [layer.wq, layer.wk, layer.bq, layer.bk]
    optimizer = torch.optim.Adam(maps, lr=0.05)
    losses = []
    for _ in range(60):
        loss = layer.distill(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert layer.q_proj.weight.grad is None and layer.v_proj.weight.grad is None
    q, k, _ = layer.project(x)
    scores = torch.einsum("bthk,bjhk->bhtj", q, k) / 4
    a = scores.masked_fill(torch.ones(32, 32).triu(1) > 0, float("-inf")).softmax(-1)
    floor = torch.special.entr(a).sum(-1).mean().item()
    # cross-entropy is never below entropy
    assert floor < losses[-1] < floor + 0.4 * (losses[0] - floor)


def test_errors_name_both_sides():
    x = to_torch(make_inputs("hedgehog", T=4))
    with pytest.raises(ValueError, match=r"wk has shape \(2, 11, 16\), expected \[H, M, K\] = \(2, 12, 16\)"):
        hedgehog(**x | {"wk": x["wk"][:, 1:]})
    with pytest.raises(ValueError, match=r"bq has shape \(12,\), expected 2 axes \[H, M\]"):
        hedgehog(**x | {"bq": x["bq"][0]})
