"""States of several parts, and how an inner model goes through the mini-batches of a text."""

import torch

from effattn_lite.ops.common import check_alike, check_shape


def check_state(name, state, q, sizes, parts):
    """Check a state of several parts against their axes; it is kept in float32, or float64 for float64."""
    if not isinstance(state, (tuple, list)) or len(state) != len(parts):
        expected = f"a tuple ({', '.join(parts)})"
        raise ValueError(f"{name} has shape {getattr(state, 'shape', len(state))}, expected {expected}")
    wide = torch.promote_types(q.dtype, torch.float32)
    for (part, axes), x in zip(parts.items(), state, strict=True):
        check_shape(f"{part} of {name}", x, axes, sizes)
        check_alike(f"{part} of {name}", x, q, dtype=False)
        if x.dtype != wide:
            raise TypeError(f"{part} of {name} is {x.dtype}, expected {wide}, since states are kept wide")


def descend(minibatch, tokens, base, state, size, cu_seqlens):
    """Go through the mini-batches of a text, or of packed ones; returns o and the final state.

    Args:
        minibatch: (tokens, start, now) -> (o, steps): the tokens of one mini-batch, the inner model at its
            start and at the first of these tokens, each a tuple of [B, ...]; what is taken off the model.
        tokens: [B, T, ...] each; the last is the rate eta, whose zeros make a token nothing.
        base: inner model that a text begins with, a tuple of [...].
        state: what the texts so far have added to it, what of that the present mini-batch has, and the tokens
            in that, one tuple; None: none.
        size: tokens in a mini-batch.
        cu_seqlens: as in the op.
    """
    B, T = tokens[0].shape[:2]
    edges = [0, T] if cu_seqlens is None else cu_seqlens.tolist()
    outputs, states = [tokens[2][:, :0]], []
    for n, (first, last) in enumerate(zip(edges, edges[1:], strict=False)):
        part = [x[:, first:last] for x in tokens]
        mine = state if state is None or cu_seqlens is None else tuple(x[n : n + 1] for x in state)
        o, mine = _descend(minibatch, part, base, mine, size)
        outputs.append(o)
        states.append(mine)
    return torch.cat(outputs, dim=1), tuple(torch.cat(part) for part in zip(*states, strict=True))


def _descend(minibatch, tokens, base, state, size):
    B, T = tokens[0].shape[:2]
    parts, count, length = len(base), None, T
    if state is None:
        total = tuple(x.new_zeros(B, *x.shape) for x in base)
        recent, c = total, tokens[0].new_zeros(B)
    else:
        total, recent, c = state[:parts], state[parts:-1], state[-1]
        # rows may stop anywhere in a mini-batch: each is shifted so that all begin one together
        count = c.detach().round().long().clamp(0, size - 1)
        length = T + size - 1 if T else 0
        tokens = shift(tokens, count, -(-length // size) * size)
    outputs = []
    for j in range(0, length, size):
        now = tuple(x + y for x, y in zip(base, total, strict=True))
        start = tuple(x - y for x, y in zip(now, recent, strict=True))
        o, steps = minibatch([x[:, j : j + size] for x in tokens], start, now)
        outputs.append(o)
        total = tuple(x - y for x, y in zip(total, steps, strict=True))
        recent = tuple(x - y for x, y in zip(recent, steps, strict=True))
        # a whole mini-batch: the next one's gradients are taken here
        if count is not None:
            done = count + T >= j + size
            recent = tuple(x.masked_fill(done.view(-1, *(1,) * (x.ndim - 1)), 0) for x in recent)
        elif j + size <= T:
            recent = tuple(torch.zeros_like(x) for x in recent)
    o = torch.cat([tokens[2][:, :0], *outputs], dim=1)
    if count is not None and T:
        o = shift([o], -count, T)[0]
    return o, (*total, *recent, count_after(c, T, size))


def count_after(c, tokens, size):
    """Tokens of the present mini-batch after some more; as a function of c it is c plus a constant."""
    seen = c.detach().round().long() + tokens
    return c + (tokens - seen.div(size, rounding_mode="floor") * size).to(c.dtype)


def shift(tensors, count, length):
    """Each row moved by its own count of tokens to the right, zeros around, cut to a length."""
    index = torch.arange(length, device=count.device) - count[:, None]
    T = tensors[0].shape[1]
    outside = (index < 0) | (index >= T)
    row = torch.arange(len(count), device=count.device)[:, None]
    moved = [x[row, index.clamp(0, T - 1)] for x in tensors]
    return [x.masked_fill(outside.view(*outside.shape, *(1,) * (x.ndim - 2)), 0) for x in moved]
