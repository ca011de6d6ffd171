"""A filled cell of the coverage table means that its law ran: every room that stands is collected."""

import pytest
from cases import cases

from effattn_lite import registry

LAWS = {
    "reference": ("test_forms_agree", "test_batch_row", "test_cost"),
    "op": ("test_equals_reference", "test_batch_row", "test_strides", "test_errors_name_both_sides"),
    "kernel": (
        "test_outputs_and_gradients",
        "test_packed_sequences",
        "test_strides",
        "test_compiles_as_one_graph",
    ),
    "layer": ("test_state_dict_round_trip",),
}
STATEFUL = {
    "reference": ("test_halves", "test_step"),
    "op": ("test_halves", "test_step"),
    "kernel": ("test_step",),
    "layer": ("test_cache_is_bounded",),
}
CAUSAL = {
    "reference": ("test_causality",),
    "op": ("test_causality",),
    "kernel": ("test_causality",),
    "layer": ("test_causality", "test_forward_is_prefill_is_steps"),
}
DIFFERENTIABLE = {
    "op": ("test_gradient",),
    "layer": ("test_gradient_reaches_every_parameter",),
}
CELLS = [(room, name) for room in LAWS for name in registry.names(room)]


def owed(room, row):
    traits = ((STATEFUL, row.stateful), (CAUSAL, row.causal), (DIFFERENTIABLE, row.differentiable))
    return LAWS[room] + tuple(law for laws, holds in traits if holds for law in laws.get(room, ()))


@pytest.mark.parametrize("room, name", CELLS, ids=[f"{name}-{room}" for room, name in CELLS])
def test_a_filled_cell_is_collected(request, room, name):
    items = [
        i
        for i in request.config.collected
        if i.path.name == f"test_{room}.py" and i.path.parent.name == "laws"
    ]
    if not items:
        pytest.skip(f"this run collects none of tests/laws/test_{room}.py")
    seen = {i.originalname for i in items if getattr(i.callspec.params.get("case"), "name", None) == name}
    missing = [law for law in owed(room, registry.find(name)) if law not in seen]
    assert not missing, f"{name}: its {room} stands, but these laws did not collect it: {missing}"


@pytest.mark.parametrize("room", LAWS)
def test_every_option_is_run(room):
    """Each entry of a row's options is a case of its own."""
    for name in registry.names(room):
        found = {repr(dict(p.values[0].options)) for p in cases(room) if p.values[0].name == name}
        assert found == {repr(dict(options)) for options in registry.find(name).options}
