"""Laws of the references: NumPy, float64, every form of every method."""

import importlib
import inspect

import numpy as np
import pytest
from cases import SIZES, cases, causal, changed, row_of, stateful, stressed, tokens

from effattn_lite.testing import count_flops, flat, on_parts, relative_error, run_reference, sizes_of

RTOL = 1e-10
STRESSES = (None, "weak", "strong", "zero", "repeated")


def module_of(case):
    return importlib.import_module(f"effattn_lite.reference.{case.name}")


@pytest.mark.parametrize(
    "case", cases("reference", sizes=SIZES) + cases("reference", stressed, hard=STRESSES[1:])
)
def test_forms_agree(case):
    inputs = case.inputs()
    first, *others = case.row.forms
    want = run_reference(case.name, inputs, form=first, **case.options)
    assert all(np.isfinite(part).all() for part in flat(want[0]))
    for form in others:
        assert relative_error(run_reference(case.name, inputs, form=form, **case.options), want) < RTOL, form


@pytest.mark.parametrize("case", cases("reference", causal))
def test_causality(case):
    inputs, t = case.inputs(), 40
    for form in case.row.forms:
        before = run_reference(case.name, inputs, form=form, **case.options)[0]
        after = run_reference(case.name, changed(case, inputs, t), form=form, **case.options)[0]
        assert np.array_equal(before[:, :t], after[:, :t]), form
        assert not np.array_equal(before[:, t], after[:, t]), form


@pytest.mark.parametrize("case", cases("reference", stateful, hard=STRESSES))
def test_halves(case):
    inputs, t = case.inputs(), 29
    for form in case.row.forms:
        whole, last = run_reference(case.name, inputs, form=form, **case.options)
        left = tokens(case, inputs, slice(0, t))
        a, state = run_reference(case.name, left, form=form, **case.options)
        right = tokens(case, inputs, slice(t, None)) | {"initial_state": state}
        b, state = run_reference(case.name, right, form=form, **case.options)
        assert relative_error((np.concatenate((a, b), axis=1), *flat(state)), (whole, *flat(last))) < RTOL, (
            form
        )


@pytest.mark.parametrize("case", cases("reference", stateful))
def test_zeros_are_the_default_state(case):
    inputs = case.inputs(state=False)
    zeros = on_parts(np.zeros_like, case.inputs()["initial_state"])
    for form in case.row.forms:
        plain = run_reference(case.name, inputs, form=form, **case.options)
        given = run_reference(case.name, inputs | {"initial_state": zeros}, form=form, **case.options)
        assert relative_error(plain, given) < RTOL


@pytest.mark.parametrize("case", cases("reference", stateful))
def test_step(case):
    inputs = case.inputs()
    whole, last = run_reference(case.name, inputs, **case.options)
    state = inputs.pop("initial_state")
    for t in range(whole.shape[1]):
        o, state = module_of(case).step(**tokens(case, inputs, t), state=state, **case.options)
        assert relative_error(o, whole[:, t]) < RTOL, t
    assert relative_error(state, last) < RTOL


@pytest.mark.parametrize("case", cases("reference"))
def test_batch_row(case):
    inputs = case.inputs()
    for form in case.row.forms:
        batch = run_reference(case.name, inputs, form=form, **case.options)
        alone = run_reference(case.name, row_of(case, inputs, 1), form=form, **case.options)
        assert relative_error(alone[0][0], batch[0][1]) < RTOL, form


@pytest.mark.parametrize("case", cases("reference", sizes=(SIZES[0], *SIZES[2:])))
def test_cost(case):
    module, inputs = module_of(case), case.inputs(state=False)
    known = set(inspect.signature(module.cost).parameters)
    given = {name: x for name, x in (sizes_of(**case.sizes) | case.options).items() if name in known}
    for form in case.row.forms:
        cost = module.cost(form=form, **given)
        assert cost["flops"] == count_flops(getattr(module, form), inputs, **case.options), form
        # every tensor is moved once, at least
        out, state = run_reference(case.name, inputs, form=form, **case.options)
        moved = 2 * sum(x.size for x in (*inputs.values(), out))
        assert cost["bytes"] >= moved, form
        assert all(isinstance(number, int) for number in cost.values())
        if case.row.stateful:
            # a state is kept in float32, whatever the inputs' dtype
            assert cost["state_bytes"] == 4 * sum(x.size for x in flat(state))
    assert module.cost(form=form, **given, itemsize=4)["bytes"] > cost["bytes"]
