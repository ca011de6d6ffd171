"""What the tests of the linear engines share: a call with all its gradients, and the budget it is held to."""

import numpy as np
import torch

from effattn_lite.testing import budget, max_error, run_op, to_torch


def both(name, inputs, *, impl, dtype, device, edges=None, **options):
    """Outputs, and gradients of all inputs from fixed cotangents on o and the final state."""
    x = to_torch(inputs, dtype=dtype, device=device, requires_grad=True)
    cu_seqlens = None if edges is None else torch.tensor(edges, device=device)
    out = run_op(name, x, impl=impl, cu_seqlens=cu_seqlens, **options)
    rng = np.random.default_rng(3)
    dout = [torch.tensor(np.round(rng.normal(size=y.shape) * 8) / 8).to(y) for y in out]
    grads = torch.autograd.grad(out, tuple(x.values()), dout)
    return dict(zip(("o", "S", *x), (*out, *grads), strict=True))


def hold(name, inputs, *, device, dtype="float32", edges=None, terms=0):
    """Hold the kernels to the law's budget: twice plain torch's error, three times for gradients."""
    how = dict(edges=edges)
    want = both(name, inputs, impl="torch", dtype="float64", device="cpu", **how)
    plain = both(name, inputs, impl="torch", dtype=dtype, device=device, **how)
    got = both(name, inputs, impl="triton", dtype=dtype, device=device, **how)
    terms = max(terms, inputs["q"].shape[-1], inputs["v"].shape[-1])
    for what in want:
        factor = 2.0 if what in "oS" else 3.0
        limit = budget(want[what], plain[what], dtype, factor=factor, terms=terms)
        error = max_error(got[what].detach(), want[what].detach())
        assert error <= limit, f"{'' if what in 'oS' else 'd'}{what}: error {error:.2e}, budget {limit:.2e}"
