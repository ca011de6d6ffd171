"""Our models compute what transformers computes, layer by layer, with the same random weights."""

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from peers import PEERS, VOCAB

from effattn_lite import models
from effattn_lite.testing import relative_error

TOKENS = 40
# float32 on both sides: some 1e-6 a layer, and a wrong one is off by more than 1e-2
RTOL = 1e-4


@pytest.fixture(scope="module", params=[make() for make in PEERS.values()], ids=PEERS)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def pair(case):
    """Their model and ours."""
    theirs = case.build()
    return case, theirs, models.from_transformers(theirs)


def text(rows=2, length=TOKENS):
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def states(model, peer, tokens):
    """What goes into their first layer and comes out of each, and the logits."""
    seen, hooks = [], []

    def into(_, arguments, named):
        seen.append(arguments[0] if arguments else named["hidden_states"])

    def out(_, arguments, result):
        seen.append(result[0] if isinstance(result, tuple) else result)

    layers = model.get_submodule(peer.layers)
    if peer.enters:
        hooks.append(model.get_submodule(peer.enters).register_forward_hook(out))
    else:
        hooks.append(layers[0].register_forward_pre_hook(into, with_kwargs=True))
    hooks += [layer.register_forward_hook(out) for layer in layers]
    logits = model(tokens).logits
    for hook in hooks:
        hook.remove()
    return seen, logits


@torch.no_grad()
def test_every_layer_agrees(pair):
    peer, theirs, ours = pair
    tokens = text()
    want, logits = states(theirs, peer, tokens)
    got = ours.hidden_states(tokens)
    assert len(got) == len(want)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        error = relative_error(a, b)
        assert error < RTOL, f"{'the embedding' if i == 0 else f'layer {i - 1}'} is off by {error:.1e}"
    assert relative_error(ours(tokens), logits) < RTOL


@torch.no_grad()
def test_our_cache_goes_on_as_their_whole_text(pair):
    _, theirs, ours = pair
    tokens = text()
    want = theirs(tokens).logits
    for sizes in ((17, 1, 22), (3, 3, 34)):
        parts, cache = [], None
        for part in tokens.split(sizes, dim=1):
            logits, cache = ours.prefill(part, cache)
            parts.append(logits)
        assert relative_error(torch.cat(parts, dim=1), want) < RTOL
    parts, cache = [], None
    for token in tokens.unbind(1):
        logits, cache = ours.step(token, cache)
        parts.append(logits)
    assert relative_error(torch.stack(parts, dim=1), want) < RTOL


@torch.no_grad()
def test_a_saved_folder(pair, tmp_path):
    """What they write to files, read without them."""
    peer, theirs, ours = pair
    if not peer.files:
        pytest.skip(f"the rules of {peer.name} do not know the names in its files")
    theirs.save_pretrained(tmp_path)
    again = models.from_folder(tmp_path).state_dict()
    assert all(torch.equal(x, again[name]) for name, x in ours.state_dict().items())


@torch.no_grad()
def test_packed_texts_are_their_texts_alone(pair):
    _, theirs, ours = pair
    tokens, edges = text(1), [0, 9, 10, 33, 40]
    packed = ours(tokens, cu_seqlens=torch.tensor(edges))
    for a, b in zip(edges, edges[1:], strict=False):
        assert relative_error(packed[:, a:b], theirs(tokens[:, a:b]).logits) < RTOL
