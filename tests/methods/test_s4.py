"""What is special to S4: HiPPO in a complex basis, the kernel without powers, recurrence and convolution."""

import numpy as np
import pytest
import torch

from effattn_lite.layers.s4 import S4
from effattn_lite.ops.s4 import s4, step
from effattn_lite.reference import s4 as reference
from effattn_lite.testing import make_inputs, relative_error, to_torch

FORMS = pytest.mark.parametrize("form", (reference.recurrent, reference.convolution))


def draw(**sizes):
    return make_inputs("s4", state=True, **sizes)


def hippo_inputs(*, T=40, D=3, M=16, seed=0):
    """HiPPO-LegS in every channel, C drawn in the real basis: complex parameters of a real system."""
    rng = np.random.default_rng(seed)
    diagonal, P, B, basis = reference.hippo(M)
    C = rng.normal(size=(D, M))
    x = {"x": rng.normal(size=(2, T, D)), "dt": np.array([1e-3, 0.02, 0.3]), "C": C @ basis}
    x |= {name: np.tile(part, (D, 1)) for name, part in (("A", diagonal), ("P", P), ("B", B))}
    return x, C, basis


def real_hippo(M):
    """The matrix as it is defined, entry by entry, and B."""
    A = np.zeros((M, M))
    for n in range(M):
        for k in range(n):
            A[n, k] = -np.sqrt((2 * n + 1) * (2 * k + 1))
        A[n, n] = -(n + 1)
    return A, np.sqrt(2 * np.arange(M) + 1)


@pytest.mark.parametrize("M", (1, 2, 16, 65))
def test_hippo_is_a_diagonal_minus_an_outer_product(M):
    diagonal, P, B, basis = reference.hippo(M)
    A, b = real_hippo(M)
    assert relative_error(np.abs(basis.conj().T @ basis), np.eye(M)) < 1e-12
    again = basis @ (np.diag(diagonal) - np.outer(P, P.conj())) @ basis.conj().T
    assert np.abs(again - A).max() < 1e-12 * np.abs(A).max() * M
    assert np.abs(basis @ B - b).max() < 1e-12 * b.max()
    assert np.allclose(diagonal.real, -0.5)


@FORMS
def test_equals_the_real_system(form):
    """The same output as the dense real matrix, stepped by the bilinear rule token by token."""
    x, C, basis = hippo_inputs()
    A, b = real_hippo(16)
    want = np.zeros((2, 40, 3))
    for d, dt in enumerate(x["dt"]):
        h = np.zeros((2, 16))
        for t in range(40):
            right = h @ (np.eye(16) + dt / 2 * A).T + dt * x["x"][:, t, d, None] * b
            h = np.linalg.solve(np.eye(16) - dt / 2 * A, right.T).T
            want[:, t, d] = h @ C[d]
    y, h = form(**x)
    assert relative_error(y, want) < 1e-10
    # the imaginary parts vanish in the real basis
    back = h @ basis.T
    assert np.abs(back.imag).max() < 1e-10 * np.abs(back).max()


@pytest.mark.parametrize("T", (1, 2, 7, 64))
def test_kernel_without_powers(T):
    """The generating function's sums give C A^l B, z = -1 included."""
    x, _, _ = hippo_inputs(M=8)
    system = [x[name] for name in ("dt", "A", "P", "B")]
    step_, write = reference.discretise(*system)
    want = np.zeros((T, 3))
    for length in range(T):
        want[length] = np.einsum("dm,dm->d", x["C"], write).real
        write = np.einsum("dmn,dn->dm", step_, write)
    assert relative_error(reference.kernel(*system, x["C"], T), want) < 1e-10


@FORMS
def test_by_hand(form):
    """A = -2, dt = 1: A-bar = 0, B-bar = 1/2; nothing is remembered, and the output is C B-bar x + D x."""
    one = np.ones((1, 1))
    y, h = form(
        np.array([[[4.0], [6.0]]]), np.ones(1), -2 * one, 0 * one, one, 3 * one, D=np.array([0.5]),
        initial_state=np.full((1, 1, 1), 7.0),
    )  # fmt: skip
    assert np.allclose(y[0, :, 0], (8, 12)) and np.allclose(h, 3)


def test_op_equals_reference_where_parameters_are_complex():
    x, _, _ = hippo_inputs()
    text = {name: torch.tensor(part) for name, part in x.items()}
    want = reference.recurrent(**x)
    y, h = s4(**text, output_final_state=True, chunk_size=16)
    assert y.dtype == torch.float64 and h.dtype == torch.complex128
    assert relative_error(y, want[0]) < 1e-10
    assert np.abs(h.numpy() - want[1]).max() < 1e-10 * np.abs(want[1]).max()
    token = {name: part[:, 0] if name == "x" else part for name, part in text.items()}
    first, _ = step(**token, state=torch.zeros_like(h))
    assert relative_error(first, want[0][:, 0]) < 1e-10


def test_complex_gradients():
    x, _, _ = hippo_inputs(T=5, M=3)
    text = {name: torch.tensor(part).requires_grad_() for name, part in x.items()}

    def function(*values):
        named = dict(zip(text, values, strict=True))
        y, h = s4(**named, output_final_state=True, chunk_size=2)
        return y, torch.view_as_real(h)

    assert torch.autograd.gradcheck(function, tuple(text.values()))


def test_small_steps_in_float32():
    """dt = 1e-5: A-bar is nearly I, and still its powers are right, since they are made in float64."""
    inputs = make_inputs("s4", T=200, dtype="float32")
    inputs["dt"][:] = 1e-5
    want = reference.recurrent(**{name: part.astype(np.float64) for name, part in inputs.items()})[0]
    assert relative_error(s4(**to_torch(inputs, dtype="float32"))[0], want) < 1e-6


def test_it_is_time_invariant():
    """The same text a few tokens later gives the same output a few tokens later."""
    x = draw(T=40)
    del x["initial_state"]
    later = np.concatenate((np.zeros_like(x["x"][:, :5]), x["x"][:, :-5]), axis=1)
    y, z = s4(**to_torch(x))[0], s4(**to_torch(x | {"x": later}))[0]
    assert relative_error(z[:, 5:], y[:, :-5]) < 1e-12


def test_legendre_coefficients_of_the_past():
    """HiPPO's state of a constant past is its first coefficient alone: h'(t) = 0 at h = (1, 0, 0, ...)."""
    A, b = real_hippo(32)
    settled = -np.linalg.solve(A, b)
    assert relative_error(settled, np.eye(32)[0]) < 1e-10


def test_errors():
    x = to_torch(draw(T=9))
    with pytest.raises(ValueError, match=r"P has shape \(20, 11\).*\[D, M\] = \(20, 12\) as x and A"):
        s4(**x | {"P": x["P"][:, :11]})
    with pytest.raises(ValueError, match=r"dt has shape \(19,\)"):
        s4(**x | {"dt": x["dt"][:19]})
    with pytest.raises(ValueError, match=r"initial_state has shape.*\[N, D, M\] = \(2, 20, 12\)"):
        s4(**x | {"initial_state": x["initial_state"][:1]})
    with pytest.raises(TypeError, match="initial_state is torch.float64, expected torch.complex128"):
        s4(**x | {"C": x["C"].to(torch.complex128)})
    with pytest.raises(NotImplementedError, match="s4 has no kernel"):
        s4(**x, impl="triton")


def test_layer_begins_as_hippo():
    """Every channel: real parts -1/2, steps between 0.001 and 0.1, a state that decays."""
    torch.manual_seed(0)
    dt, A, P, B, _ = S4(16, states=32)._system()
    want = reference.hippo(32)
    for got, part in zip((A, P, B), want, strict=False):
        assert np.abs(got.detach().numpy() - part).max() < 1e-5 * np.abs(part).max()
    assert 0.99e-3 < dt.min() and dt.max() < 0.101
    moved, _ = reference.discretise(*(part.detach().numpy() for part in (dt, A, P, B)))
    assert np.abs(np.linalg.eigvals(moved)).max() < 1
