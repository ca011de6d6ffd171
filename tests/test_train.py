"""The loop learns what can be learnt, and is the same every time."""

import functools

import numpy as np
import pytest
import torch

from effattn_lite.layers.retnet import RetNet
from effattn_lite.layers.softmax_attention import SoftmaxAttention
from effattn_lite.tasks import induction, mqar
from effattn_lite.train import Reader, evaluate, train

RECALL = functools.partial(mqar.draw, batch=32, length=16, pairs=2, vocab=16)


def reader(layer, **more):
    torch.manual_seed(0)
    return Reader(lambda: layer(16, 1), vocab=16, width=16, **more)


def test_learns_recall_that_chance_does_not_give():
    model = reader(SoftmaxAttention)
    before = evaluate(model, RECALL)
    found = train(model, RECALL, steps=400, lr=1e-2)
    assert before < 0.3 < 0.9 < evaluate(model, RECALL) and found["loss"] < 0.5


def test_same_seed_same_weights():
    models = [reader(RetNet, feed_forward=True) for _ in range(2)]
    losses = [train(model, RECALL, steps=3, lr=1e-3)["loss"] for model in models]
    assert losses[0] == losses[1]
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True))


def test_accumulated_batches_are_one_large_batch():
    halves = functools.partial(mqar.draw, batch=16, length=16, pairs=2, vocab=16)

    def both(rng):
        return tuple(np.concatenate(x) for x in zip(halves(rng), halves(rng), strict=True))

    models = [reader(RetNet) for _ in range(2)]
    whole = train(models[0], both, steps=3, lr=1e-3)["loss"]
    assert train(models[1], halves, steps=3, lr=1e-3, accumulate=2)["loss"] == pytest.approx(whole, rel=1e-6)
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)  # a hundredth of a step


@pytest.mark.parametrize("convolution", (0, 4))
def test_shapes(convolution):
    model = reader(SoftmaxAttention, convolution=convolution, depth=1)
    tokens = torch.as_tensor(induction.draw(np.random.default_rng(0), batch=3, length=9)[0])
    assert model(tokens).shape == (3, 9, 16)
