"""What is special to sLSTM: gates that shout, a normaliser, and memory mixing that no scan can follow."""

import numpy as np
import pytest
import torch

from effattn_lite.layers.slstm import GATES, SLSTM
from effattn_lite.ops.slstm import slstm
from effattn_lite.testing import make_inputs, max_error, relative_error, run_reference, to_torch

GATE_INPUTS = ("z", "i", "f", "o")


def unmixed(x):
    """The same inputs with recurrent weights of 0."""
    return {name: 0 * t if name.startswith("r_") else t for name, t in x.items()}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def plain(x):
    """The published cell without a maximum: c = f c + e^i tanh z, n = f n + e^i, h = sigmoid(o) c / n."""
    c, n, h = np.zeros((3, *x["z"][:, 0].shape))
    y = np.zeros_like(x["z"])
    for t in range(y.shape[1]):
        mixed = {g: x[g][:, t] + np.einsum("bhv,hvw->bhw", h, x[f"r_{g}"]) for g in GATE_INPUTS}
        c = sigmoid(mixed["f"]) * c + np.exp(mixed["i"]) * np.tanh(mixed["z"])
        n = sigmoid(mixed["f"]) * n + np.exp(mixed["i"])
        h = sigmoid(mixed["o"]) * c / n
        y[:, t] = h
    return y, (c, n, h)


def test_published_cell():
    """The stabiliser changes neither an output nor the memory it stands for."""
    x = make_inputs("slstm", T=25)
    y, (c, n, h, m) = run_reference("slstm", x)
    want, end = plain(x)
    assert relative_error((y, c * np.exp(m), n * np.exp(m), h), (want, *end)) < 1e-10


def test_by_hand():
    """Gates of 1/2 and weights 1, 3: c = 1/2 t_1 + 3 t_2, n = 1/2 + 3, and half of c / n is read."""
    one = np.ones((1, 2, 1, 1))
    x = {"z": np.array([0.3, -0.6]).reshape(one.shape), "i": np.log([1.0, 3.0]).reshape(one.shape)}
    x |= {"f": 0 * one, "o": 0 * one} | {f"r_{g}": np.zeros((1, 1, 1)) for g in GATE_INPUTS}
    y, _ = run_reference("slstm", x)
    want = (0.5 * np.tanh(0.3) + 3 * np.tanh(-0.6)) / 3.5 / 2
    assert max_error(y.ravel(), np.array([np.tanh(0.3) / 2, want])) < 1e-12


@pytest.mark.parametrize("loud", (-800.0, 800.0))
def test_gates_that_shout(loud):
    """e^800 leaves float64: a constant on all input gates cancels in c / n, and nothing overflows."""
    x = unmixed(make_inputs("slstm", T=25))
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        y, state = run_reference("slstm", x | {"i": x["i"] + loud})
    assert relative_error(y, run_reference("slstm", x)[0]) < 1e-10
    # the loudness went into m, and n counts at least the loudest token
    assert (state[1] >= 1).all() and np.isfinite(state[3]).all()
    got = slstm(**to_torch(x | {"i": x["i"] + loud}), output_final_state=True)
    assert relative_error(got, (y, state)) < 1e-10


def test_a_loud_token_revises_the_memory():
    """An input gate of e^40 after quiet ones: the cell holds that token's value, and nothing else."""
    x = unmixed(make_inputs("slstm", T=12))
    x["i"][:, 11] = 40
    y, _ = run_reference("slstm", x)
    assert relative_error(y[:, 11], sigmoid(x["o"][:, 11]) * np.tanh(x["z"][:, 11])) < 1e-10


def test_outputs_are_gated_averages():
    """|h| < 1: c / n is an average of tanh z."""
    x = make_inputs("slstm", T=40)
    assert np.abs(run_reference("slstm", x)[0]).max() < 1


def test_memory_mixing_counts():
    """Parity by one cell of a head of two: the recurrent weights flip the sign that the last output had.

    Cell 0 writes tanh(z) with z = a h_0 x, x = -1 for a one and +1 for a zero: no gate without h can do it.
    """
    bits = np.random.default_rng(0).integers(0, 2, size=60)
    sign, state = 1.0, None
    for bit in bits:
        # forget all (f = -50), write z, open the output gate
        x = {g: np.zeros((1, 1, 1, 1)) for g in GATE_INPUTS} | {"f": np.full((1, 1, 1, 1), -50.0)}
        x |= {"o": np.full((1, 1, 1, 1), 50.0)} | {f"r_{g}": np.zeros((1, 1, 1)) for g in "ifo"}
        x |= {"r_z": np.full((1, 1, 1), -5.0 if bit else 5.0)}
        if state is None:
            start = np.ones((1, 1, 1))
            state = (start, start, start, 0 * start)
        y, state = run_reference("slstm", x | {"initial_state": state})
        sign *= -1 if bit else 1
        assert np.sign(y.item()) == sign and abs(y.item()) > 0.9


def test_gradient_through_a_carried_state():
    """Backpropagation through two calls, linked by the state, is that through one call."""
    inputs = make_inputs("slstm", B=1, T=20, H=2, V=3, state=True)

    def gradients(cut):
        x = to_torch(inputs, requires_grad=True)
        state, total = x["initial_state"], 0
        for a, b in zip((0, *cut), (*cut, 20), strict=True):
            part = {n: t[:, a:b] if n in GATE_INPUTS else t for n, t in x.items() if n != "initial_state"}
            y, state = slstm(**part, initial_state=state, output_final_state=True)
            total = total + y.square().sum()
        leaves = [*(t for n, t in x.items() if n != "initial_state"), *x["initial_state"]]
        return torch.autograd.grad(total + sum(part.sum() for part in state), leaves)

    assert relative_error(gradients((7,)), gradients(())) < 1e-10


def test_there_is_no_kernel():
    x = to_torch(make_inputs("slstm", T=3), dtype="float32")
    with pytest.raises(NotImplementedError, match="no kernel"):
        slstm(**x, impl="triton")


def test_layer_begins_unmixed():
    """Recurrent weights of 0, and forget gates whose biases fall from 5 to -7 over a head, as released."""
    layer = SLSTM(32, 4)
    assert layer.r.count_nonzero() == 0
    bias = layer.b[GATES.index("f")].detach()
    assert float(bias[0, 0]) == 5 and float(bias[3, -1]) == -7 and (bias.diff() < 0).all()


def test_layer_convolves_for_input_and_forget_gate_alone():
    layer = SLSTM(16, 2)
    x, c = torch.randn(2, 1, 5, 16)
    one, other = layer._project(x, c), layer._project(x, c + 1)
    assert [name for name in GATES if torch.equal(one[name], other[name])] == ["z", "o"]
    one, other = layer._project(x, c), layer._project(x + 1, c)
    assert [name for name in GATES if torch.equal(one[name], other[name])] == ["i", "f"]


def test_layer_mixes_within_a_head():
    """With recurrent weights a cell sees the other cells of its head, and no other head."""
    layer = SLSTM(16, 2).double()
    torch.nn.init.normal_(layer.r)
    x = torch.randn(1, 12, 16, dtype=torch.float64)
    other = x.clone()
    other[:, 3, :8] += 1
    same = (layer(x) == layer(other))[:, 4:]
    assert same[..., 8:].all() and not same[..., :8].any()


def test_packed_prefill_can_be_continued():
    layer, x = SLSTM(32, 2).double(), torch.randn(1, 30, 32, dtype=torch.float64)
    torch.nn.init.normal_(layer.r, std=0.1)
    edges = torch.tensor([0, 0, 12, 30])
    _, cache = layer.prefill(x, cu_seqlens=edges)
    token = torch.randn(3, 32, dtype=torch.float64)
    together = layer.step(token, cache)[0]
    for n, (a, b) in enumerate(zip(edges, edges[1:], strict=False)):
        alone = layer.prefill(x[:, a:b])[1] if a < b else None
        assert relative_error(layer.step(token[n : n + 1], alone)[0], together[n : n + 1]) < 1e-10
