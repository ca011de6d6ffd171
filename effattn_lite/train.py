"""The one training loop, and the small reader that all sequence mixers are compared in."""

import math
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from effattn_lite.layers.common import ShortConvolution
from effattn_lite.tasks.ask import NOTHING, accuracy

__all__ = ["Reader", "evaluate", "train"]


class Reader(nn.Module):
    """Embedding, L blocks, norm, scores: [B, T] tokens -> [B, T, vocab] scores.

    A block is y = x + mixer(convolution(norm(x))), and with `feed_forward` an MLP of width 4 D after it.
    Every mixer gets the same short convolution: without one, hardly any linear mixer solves recall, and some
    bring their own.

    Args:
        mixer: builds one mixer, [B, T, D] -> [B, T, D].
        vocab: tokens.
        width: D.
        depth: L.
        feed_forward: add MLPs.
        convolution: tokens that the short convolution sees; 0 leaves it out.
    """

    def __init__(
        self,
        mixer: Callable[[], nn.Module],
        *,
        vocab: int,
        width: int,
        depth: int = 2,
        feed_forward: bool = False,
        convolution: int = 4,
    ):
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm": nn.RMSNorm(width),
                    "convolution": ShortConvolution(width, convolution) if convolution else nn.Identity(),
                    "mixer": mixer(),
                }
                | ({"mlp": _mlp(width)} if feed_forward else {})
            )
            for _ in range(depth)
        )
        self.norm, self.scores = nn.RMSNorm(width), nn.Linear(width, vocab, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Scores of every token of [B, T]."""
        return self.scores(self.read(tokens))

    def read(self, tokens: torch.Tensor) -> torch.Tensor:
        """What the blocks make of [B, T] tokens, [B, T, D], normalised."""
        x = self.embedding(tokens)
        for block in self.blocks:
            y = block["norm"](x)
            if isinstance(block["convolution"], ShortConvolution):
                y = block["convolution"].prefill(y)[0]
            x = x + block["mixer"](y)
            if "mlp" in block:
                x = x + block["mlp"](x)
        return self.norm(x)


def _mlp(width):
    return nn.Sequential(
        nn.RMSNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
    )


def train(
    model: nn.Module,
    draw: Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]],
    *,
    steps: int,
    lr: float,
    seed: int = 0,
    weight_decay: float = 0.1,
    clip: float = 1.0,
    accumulate: int = 1,
    keep=None,
) -> dict[str, float]:
    """Train on fresh samples by AdamW; the rate rises for a tenth of the steps, then falls as a cosine.

    Args:
        model: a `Reader` or a `LanguageModel`, on the device where it is to be trained: `read` makes vectors
            of tokens, `scores` makes scores of vectors.
        draw: one batch of tokens and targets, [B, T].
        steps: changes of the weights.
        lr: largest learning rate.
        seed: of the samples; the weights are the caller's.
        weight_decay: of matrices; vectors have none.
        clip: largest norm of the gradient.
        accumulate: batches a step; its gradient is their mean.
        keep: what writes the run down, as `keeper.Keeper`: its `load` puts an earlier state into a dict of
            model, optimizer, rng and losses, its `save` sees that dict after every step.

    Returns:
        loss: mean of the last tenth of the steps, nats; seconds.
    """
    rng, device = np.random.default_rng(seed), next(model.parameters()).device
    matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) == many] for many in (True, False))
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
    start, losses = time.perf_counter(), []
    state = {"model": model, "optimizer": optimizer, "rng": rng, "losses": losses}
    if keep:
        keep.load(state)
    model.train()
    for step in range(len(losses), steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * _cycle(step, steps)
        optimizer.zero_grad()
        parts = []
        for _ in range(accumulate):
            tokens, targets = (torch.as_tensor(x, device=device) for x in draw(rng))
            asked = targets != NOTHING
            # the head is the dearest part where the vocabulary is large: only what is asked is scored
            loss = F.cross_entropy(model.scores(model.read(tokens)[asked]).float(), targets[asked])
            (loss / accumulate).backward()
            parts.append(loss.detach())
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(torch.stack(parts).mean())
        if keep:
            keep.save(state)
    tail = torch.stack(losses[-max(1, steps // 10) :]).mean()
    return {"loss": float(tail), "seconds": time.perf_counter() - start}


def _cycle(step, steps):
    rise = max(1, steps // 10)
    return (
        (step + 1) / rise if step < rise else 0.5 * (1 + math.cos(math.pi * (step - rise) / (steps - rise)))
    )


@torch.no_grad()
def evaluate(
    model: Reader,
    draw: Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]],
    *,
    batches: int = 8,
    seed: int = 10**6,
) -> float:
    """Share of right answers on samples that training has not drawn.

    Args:
        model: a trained reader.
        draw: one batch of tokens and targets, [B, T].
        batches: how many.
        seed: of the samples; another than in training.
    """
    rng, device = np.random.default_rng(seed), next(model.parameters()).device
    model.eval()
    answers, targets = [], []
    for _ in range(batches):
        tokens, target = draw(rng)
        answers.append(model(torch.as_tensor(tokens, device=device)).argmax(-1).cpu().numpy())
        targets.append(target)
    return accuracy(np.concatenate(answers), np.concatenate(targets))
