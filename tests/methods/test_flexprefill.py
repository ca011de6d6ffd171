"""What is special to FlexPrefill: budgets, the switch between two patterns, what is always kept."""

import numpy as np
import pytest
import torch

from effattn_lite.ops import block_sparse_attention, flexprefill, softmax_attention
from effattn_lite.ops.engines import block_select
from effattn_lite.ops.flexprefill import select
from effattn_lite.testing import make_inputs, max_error, relative_error, to_torch

RTOL = 1e-10


def inputs(**sizes):
    return to_torch(make_inputs("flexprefill", **sizes))


@pytest.mark.parametrize("options", (dict(gamma=1.0, min_budget=8), dict(min_budget=48), dict(min_budget=41)))
def test_reduces_to_softmax_attention(options):
    """gamma = 1, or no more tokens than the least budget: in blocks, 41 are as many as 48."""
    x = inputs(H=4, HKV=2)
    got = flexprefill(**x, block_size=8, **options, return_lse=True, impl="torch")
    assert relative_error(got, softmax_attention(**x, return_lse=True, impl="torch")) < RTOL


def test_fewest_tokens_hold_gamma():
    rng = np.random.default_rng(0)
    mass = rng.dirichlet(np.full(40, 0.2), size=30)
    for gamma in (0.1, 0.5, 0.9):
        n = block_select.fewest(torch.tensor(mass), gamma).numpy()
        best = np.sort(mass)[:, ::-1]
        held = [row[:m].sum() for row, m in zip(best, n, strict=True)]
        less = [row[: m - 1].sum() for row, m in zip(best, n, strict=True)]
        assert (np.array(held) >= gamma).all() and (np.array(less) < gamma).all()


@pytest.mark.parametrize("gamma", (0.3, 0.7, 0.95))
def test_budget(gamma):
    """Blocks of columns and of diagonals: n // BS + 1 of the heaviest, n tokens hold gamma of the weight."""
    x, T, BS, NB = inputs(B=1, T=72, H=3), 72, 8, 9
    s = torch.einsum("thk,jhk->htj", x["q"][0, -BS:], x["k"][0]) * 16**-0.5
    p = s.masked_fill(torch.ones(T, T).triu(1).bool()[-BS:], -torch.inf).softmax(-1) / BS
    chosen = select(x["q"], x["k"], gamma=gamma, tau=0, min_budget=BS, block_size=BS, impl="torch")[0]
    for h in range(3):
        column, diagonal = np.zeros(T), np.zeros(T)
        for r, t in enumerate(range(T - BS, T)):
            for j in range(t + 1):
                column[j] += p[h, r, j]
                diagonal[t - j] += p[h, r, j]
        sets = []
        for mass in (column, diagonal):
            n = next(n for n in range(1, T + 1) if np.sort(mass)[::-1][:n].sum() >= gamma)
            blocks = mass.reshape(NB, BS).sum(1)
            blocks[0] = np.inf
            sets.append(set(np.argsort(-blocks)[: n // BS + 1]))
        want = [[j <= i and (j in sets[0] or i - j in sets[1]) for j in range(NB)] for i in range(NB)]
        assert (chosen[h].numpy() == np.array(want)).all()


def test_query_aware_heads():
    """With a wide tau every head keeps the fewest pairs of blocks that hold gamma of all rows together."""
    x, BS, NB, gamma = inputs(B=1, T=72, H=2), 8, 9, 0.6
    chosen = select(x["q"], x["k"], gamma=gamma, tau=2.0, min_budget=BS, block_size=BS, impl="torch")[0]
    q, k = (x[n][0].unflatten(0, (NB, BS)).mean(1) for n in "qk")
    s = torch.einsum("ihk,jhk->hij", q, k) * 16**-0.5
    p = s.masked_fill(torch.ones(NB, NB).triu(1).bool(), -torch.inf).softmax(-1)
    for h in range(2):
        order = p[h].flatten().argsort(descending=True).tolist()
        held, pairs = 0.0, set()
        for pair in order:
            if held >= gamma * NB:
                break
            held += float(p[h].flatten()[pair])
            pairs.add(divmod(pair, NB))
        # the least budget of a block: the first column and the main diagonal
        want = pairs | {(i, 0) for i in range(NB)} | {(i, i) for i in range(NB)}
        assert {tuple(pair) for pair in chosen[h].nonzero().tolist()} == want
        assert len(pairs) < NB * (NB + 1) / 2


def test_estimate_decides():
    """Keys alike inside a block: means tell the truth. One key against its block: they do not."""
    x = inputs(B=1, T=64, H=1)
    x["q"][:, -8:] = x["q"][:, -1:]
    x["k"] = x["k"][:, ::8].repeat_interleave(8, 1)
    options = dict(gamma=0.5, min_budget=8, block_size=8, impl="torch")

    def switches(x):
        """Whether tau = 0.1 changes the choice."""
        return bool(
            (select(x["q"], x["k"], tau=0.1, **options) != select(x["q"], x["k"], tau=0, **options)).any()
        )

    assert switches(x)
    x["k"][:, 20], x["k"][:, 21] = 4 * x["q"][:, -1], -4 * x["q"][:, -1]
    assert not switches(x)


def test_threshold_of_the_switch():
    """tau is compared with the root of the Jensen-Shannon divergence, by the definition."""
    x = inputs(B=1, T=64, H=1)
    q, k = (x[n][0, :, 0].numpy() for n in "qk")
    s = np.where(np.arange(64) <= np.arange(56, 64)[:, None], q[-8:] @ k.T / 4, -np.inf)
    truth = np.exp(s) / np.exp(s).sum(1, keepdims=True)
    a = truth.mean(0).reshape(8, 8).sum(1)
    e = np.exp(k.reshape(8, 8, -1).mean(1) @ q[-8:].mean(0) / 4)
    e /= e.sum()
    m = (a + e) / 2
    root = np.sqrt((a * np.log(a / m) + e * np.log(e / m)).sum() / 2)
    options = dict(gamma=0.5, min_budget=8, block_size=8, impl="torch")
    choices = [select(x["q"], x["k"], tau=tau, **options) for tau in (0, 0.99 * root, 1.01 * root, 2)]
    assert (choices[0] == choices[1]).all() and (choices[2] == choices[3]).all()
    assert (choices[1] != choices[2]).any()


def test_finds_a_column_and_a_diagonal():
    x, t = inputs(B=1, T=128, H=1, K=16), torch.arange(128)
    wave = torch.randn(128, 8, generator=torch.Generator().manual_seed(0)).double()
    wave = wave / wave.norm(dim=-1, keepdim=True)
    x["k"][0, :, 0] = torch.cat((6 * wave, 4.0 * (t == 61)[:, None].expand(-1, 8)), -1)
    x["q"][0, :, 0] = torch.cat((6 * wave.roll(34, 0), torch.full((128, 8), 1.5).double()), -1)
    chosen = select(x["q"], x["k"], gamma=0.9, tau=0, min_budget=24, block_size=8, impl="torch")[0, 0]
    assert chosen[7:, 7].all() and chosen.float().mean() < 0.35
    assert all(chosen[i, i - 4] for i in range(4, 16))


def test_gradient_flows_through_the_attention_alone():
    x = {n: t.requires_grad_() for n, t in inputs(T=60).items()}
    options = dict(gamma=0.5, min_budget=8, block_size=8, impl="torch")
    mask = select(x["q"], x["k"], **options)
    assert not mask.requires_grad and mask.float().mean() < 0.5
    outputs = (
        flexprefill(**x, **options),
        block_sparse_attention(**x, block_mask=mask, block_size=8, impl="torch"),
    )
    grads = [torch.autograd.grad(o.square().sum(), x.values()) for o in outputs]
    assert max_error(*grads) == 0


@pytest.mark.parametrize("tau", (0.0, 0.2, 2.0))
def test_kernels_choose_as_torch_does(tau, device):
    q, k, _ = (t.float().to(device) for t in inputs(B=1, T=300, H=4, HKV=2).values())
    options = dict(gamma=0.6, tau=tau, min_budget=32, block_size=16)
    want, got = (select(q, k, **options, impl=impl) for impl in ("torch", "triton"))
    assert (want == got).all()


def test_errors():
    x = inputs()
    with pytest.raises(ValueError, match=r"min_budget is 0, expected >= 1"):
        flexprefill(**x, min_budget=0)
    x = {n: t.float() for n, t in x.items()}
    with pytest.raises(NotImplementedError, match=r"block_size <= 128, got 256"):
        flexprefill(**x, block_size=256, impl="triton")
