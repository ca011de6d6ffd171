"""The measures that the laws stand on."""

import numpy as np
import pytest
import torch

from effattn_lite.testing import (
    budget,
    count_flops,
    flat,
    make_inputs,
    max_error,
    on_parts,
    relative_error,
    round_to,
    to_torch,
)

Q = np.arange(24.0).reshape(2, 3, 4) + 1
W = np.ones((4, 7))


def counted(form, **more):
    return count_flops(lambda q, **rest: form(q, **rest), {"q": Q, **more})


@pytest.mark.parametrize(
    "flops, form",
    [
        (2 * 6 * 4 * 7, lambda q: q @ W),
        (2 * 6 * 4 * 7, lambda q: np.dot(q, W)),
        (2 * 6 * 4 * 7, lambda q: np.einsum("btk,kn->btn", q, W)),
        (2 * 6 * 4 * 7, lambda q: np.einsum("...k, kn -> ...n", q, W)),
        (6 * 4 * 4, lambda q: np.einsum("bti,btj->btij", q, q)),
        (3 * 6 * 4 * 4, lambda q: np.einsum("bti,btj,bti->btj", q, q, q)),
        (24, lambda q: np.einsum("btk->bt", q)),
        (0, lambda q: np.einsum("btk->tbk", q)),
        (24, np.exp),
        (24, lambda q: np.maximum(q, 3)),
        (24, lambda q: -q),
        (48, lambda q: (q - 1) / 2),
        (24, lambda q: q.max(axis=-1, keepdims=True)),
        (24, lambda q: np.sum(q, axis=(0, 1))),
        (24, lambda q: np.cumsum(q, axis=1)),
        (0, lambda q: q > 3),
        (0, lambda q: np.where(q > 3, q, 0)),
        (0, lambda q: np.tril(q.swapaxes(0, 1))[:, ::-1].reshape(-1)),
        (0, lambda q: np.stack([q, np.argsort(q)])),
        (48, lambda q: np.concatenate([q, q]) * 2),
        (48, lambda q: np.repeat(q, 2, axis=2) + 1),
        (2, lambda q: q[0, 0, 0] * 2 + 1),
    ],
)
def test_counts_by_hand(flops, form):
    assert counted(form) == flops


def test_parameters_cost_nothing_until_they_meet_data():
    assert counted(lambda q, g: np.exp(g), g=np.ones(4)) == 0
    assert counted(lambda q, g: np.exp(g) * q, g=np.ones(4)) == 24
    assert counted(lambda q, g: np.exp(g), g=np.ones((2, 3))) == 6


def test_what_a_form_allocates_is_data():
    def form(q):
        S, o = np.zeros((2, 4)), np.empty(q.shape)
        S *= 0.5
        o[:, 0] = q[:, 0]
        return o + 1

    assert counted(form) == 8 + 24
    assert type(np.zeros(1)) is np.ndarray


def test_what_has_no_rule_is_refused():
    with pytest.raises(NotImplementedError, match="tensordot"):
        counted(lambda q: np.tensordot(q, W, 1))


def test_solve_counts_elimination_and_substitution():
    A = np.broadcast_to(np.eye(4), (2, 4, 4)).copy()
    assert (
        count_flops(lambda q, A: np.linalg.solve(A, q.swapaxes(1, 2)), {"q": Q, "A": A})
        == 2 * 42 + 2 * 4 * 24
    )


def test_errors():
    assert max_error([1.0, np.nan], [1.0, 2.0]) == np.inf
    assert max_error([-np.inf, 1], [-np.inf, 1.5]) == 0.5
    assert relative_error(([2.0], [1.0]), ([4.0], [1.0])) == 0.5
    assert relative_error([0.25], [0.0]) == 0.25
    with pytest.raises(ValueError, match="shapes differ"):
        max_error([1.0], [1.0, 2.0])


def test_budget_is_twice_the_error_of_plain_torch():
    assert budget([1.0, -4.0], [1.5, -4.0], "float16") == 2 * (0.5 + 4 * 2.0**-10 + 2.0**-24)


def test_budget_grows_with_the_root_of_what_is_summed():
    assert budget([1.0], [1.0], "float32", factor=3.0, terms=256) == 3 * (17 * 2.0**-23 + 2.0**-149)
    assert budget([1.0], [1.0], "float64", terms=256) == 2 * 2.0**-52


def test_a_state_of_several_parts_is_one_that_a_text_leaves():
    nested = (1, (2, (3,)))
    assert flat(nested) == (1, 2, 3) and flat(7) == (7,)
    assert on_parts(lambda x, y: x + y, nested, nested) == (2, (4, (6,)))
    tensors = to_torch({"initial_state": (np.ones(2), np.zeros(3))}, dtype="float16")
    assert [x.dtype for x in tensors["initial_state"]] == [torch.float32] * 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_rounding_is_torchs(dtype):
    x = np.random.default_rng(0).normal(size=1000)
    assert max_error(round_to(x, dtype), torch.tensor(x).to(getattr(torch, dtype))) == 0


def test_inputs_are_the_same_every_time():
    a, b = (make_inputs("rwkv5", state=True, dtype="float16") for _ in range(2))
    assert list(a) == ["q", "k", "v", "g", "u", "initial_state"]
    assert all(np.array_equal(a[name], b[name]) for name in a)
    assert (a["g"] < 0).all()
    tensors = to_torch(a, dtype="float16")
    assert tensors["q"].dtype == torch.float16 and tensors["g"].dtype == torch.float32
