"""The parts that linear hybrids add to the frame, each against its formula; float64 on the CPU."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from effattn_lite import models
from effattn_lite.layers.mamba2 import Mamba2
from effattn_lite.models.config import Part
from effattn_lite.models.kinds import build_part
from effattn_lite.models.lightning import Lightning
from effattn_lite.models.rg_lru import RGLRU
from effattn_lite.models.shared_attention import Adapted
from effattn_lite.models.side_by_side import SideBySide
from effattn_lite.testing import relative_error

RTOL = 1e-10
WIDTH = 16


@pytest.fixture(autouse=True)
def in_float64():
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def draw(*shape):
    return torch.randn(*shape)


@torch.no_grad()
def test_rg_lru_is_its_formula_and_begins_anew_with_every_text():
    layer, edges = RGLRU(WIDTH, inner=24, heads=3), [0, 5, 6, 6, 14]
    for x in layer.parameters():
        x.add_(0.3 * torch.randn_like(x))
    x = draw(1, 14, WIDTH)
    got = layer(x, cu_seqlens=torch.tensor(edges))
    taps, split = layer.conv.weight, {"i": layer.input_gate, "r": layer.leak_gate}
    dense = {name: torch.block_diag(*gate.weight) for name, gate in split.items()}
    for a, b in zip(edges, edges[1:], strict=False):
        h, u = torch.zeros(24), F.pad(layer.x_proj(x[0, a:b]), (0, 0, 3, 0))
        for t in range(b - a):
            c = sum(u[t + i] * taps[:, i] for i in range(4)) + layer.conv.bias
            i, r = (torch.sigmoid(c @ dense[name] + split[name].bias.flatten()) for name in "ir")
            leak = torch.exp(-8 * F.softplus(layer.rate) * r)
            h = leak * h + (1 if t == 0 else torch.sqrt(1 - leak**2)) * i * c
            want = layer.o_proj(F.gelu(layer.y_proj(x[0, a + t]), approximate="tanh") * h)
            assert relative_error(got[0, a + t], want) < RTOL


@torch.no_grad()
def test_scales_of_mamba2_are_rows_of_its_projection():
    sizes, scales = (32, 32, 8, 8, 4), (0.5, 2.0, 0.7, 1.3, 0.9)
    scaled = Mamba2(WIDTH, 4, state=4, groups=2, scales=scales)
    plain = Mamba2(WIDTH, 4, state=4, groups=2)
    plain.load_state_dict(scaled.state_dict())
    rows = torch.cat([torch.full((n,), x) for n, x in zip(sizes, scales, strict=True)])
    plain.in_proj.weight.mul_(rows[:, None])
    x = draw(2, 20, WIDTH)
    assert relative_error(scaled(x), plain(x)) < RTOL


@torch.no_grad()
def test_mamba2_cuts_steps_in_a_prefill_as_in_a_step():
    layer = Mamba2(WIDTH, 4, state=4, steps=(0.7, 0.7))
    other = Mamba2(WIDTH, 4, state=4, steps=(0.7, 0.7))
    other.load_state_dict(layer.state_dict())
    # all steps are 0.7, so what asks for one is not heard
    other.dt_bias.add_(draw(4))
    x = draw(2, 12, WIDTH)
    want = layer(x)
    assert relative_error(other(x), want) < RTOL
    cache = layer.prefill(x[:, :7])[1]
    for t in range(7, 12):
        y, cache = other.step(x[:, t], cache)
        assert relative_error(y, want[:, t]) < RTOL


@torch.no_grad()
@pytest.mark.parametrize("norm", ["after", "before", None])
def test_norm_of_mamba2_stands_where_it_says(norm):
    layer = Mamba2(WIDTH, 4, state=4, groups=2, norm=norm, norm_eps=0.1)
    y, z = draw(3, 5, 4, 8), draw(3, 5, 32)

    def normed(x):
        groups = x.unflatten(-1, (2, 16))
        scale = (groups.square().mean(-1, keepdim=True) + 0.1).rsqrt()
        return (groups * scale * layer.norm.weight).flatten(-2)

    flat, gate = y.flatten(-2), F.silu(z)
    want = {"after": lambda: normed(gate * flat), "before": lambda: gate * normed(flat)}
    want = want.get(norm, lambda: gate * flat)()
    assert relative_error(layer._output(y, z), layer.out_proj(want)) < RTOL


@torch.no_grad()
def test_side_by_side_is_the_sum_of_its_parts():
    parts = {
        "a": Part("attention", gain=0.7, heads=4, window=5),
        "m": Part("mamba2", gain=-1.2, heads=4, state=4),
    }
    both = SideBySide(WIDTH, parts=parts, place=(0, 1))
    x = draw(2, 15, WIDTH)
    want = 0.7 * both.parts["a"](x) - 1.2 * both.parts["m"](x)
    assert relative_error(both(x), want) < RTOL
    with pytest.raises(ValueError, match="carries are"):
        SideBySide(WIDTH, parts={"a": Part("attention", carry=2.0, heads=4)}, place=(0, 1))


@torch.no_grad()
def test_a_correction_of_low_rank_is_a_matrix():
    base, x = nn.Linear(WIDTH, 12, bias=False), draw(5, WIDTH)
    adapted = Adapted(base, 3)
    merged = base.weight + adapted.widen.weight @ adapted.narrow.weight
    assert relative_error(adapted(x), x @ merged.T) < RTOL
    assert relative_error(Adapted(base, 0)(x), base(x)) < RTOL


def test_later_layers_of_minimax_forget_more_slowly():
    rates = torch.stack([build_part(WIDTH, Part("lightning", heads=4), place=(i, 80)).g for i in range(80)])
    assert (rates[1:] > rates[:-1]).all() and (rates < 0).all()
    # the first layer has ALiBi's slopes, 1/4, 1/16, 1/64, 1/256
    assert relative_error(-rates[0], 0.25 ** torch.arange(1, 5) * (1 + 1e-5)) < 1e-6
    assert isinstance(build_part(WIDTH, Part("lightning", heads=4), place=(0, 80)), Lightning)


def test_samba_stops_growing_at_its_window():
    config = models.recipe("samba").PRESETS["421m"]
    assert config.cache_bytes(2046) < config.cache_bytes(2047) == config.cache_bytes(10**6)


def test_a_pattern_of_nemotron_h_has_one_part_a_layer():
    config = models.recipe("nemotron_h").PRESETS["8b"]
    assert all((layer.mixer is None) != (layer.feed is None) for layer in config.layers)
    assert [config.pattern.count(letter) for letter in "M-*"] == [24, 24, 4] and len(config.layers) == 52
