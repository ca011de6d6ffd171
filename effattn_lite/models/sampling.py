"""Draw the next token from logits."""

import torch


def sample(
    logits: torch.Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    r"""A token of each row, with probability :math:`\propto e^{z / \tau}` among those that are left.

    Args:
        logits: z, [N, vocab].
        temperature: tau >= 0; 0 takes the likeliest.
        top_k: leave only that many of the likeliest.
        top_p: of those, leave the fewest whose probability is at least top_p in all, at least one.
        generator: source of the draws.

    Returns:
        [N] int64.

    Raises:
        ValueError: a value out of its range.

    Source: top_p by Holtzman et al. 2019, arXiv:1904.09751, section 3.1.
    """
    if temperature < 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise ValueError(
            f"temperature {temperature}, top_k {top_k}, top_p {top_p}: expected >= 0, >= 1 and in (0, 1]"
        )
    if temperature == 0:
        return logits.argmax(-1)
    z, token = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).sort(
        dim=-1, descending=True, stable=True
    )
    if top_k is not None:
        z, token = z[:, :top_k], token[:, :top_k]
    p = z.softmax(-1)
    if top_p is not None:
        # a token stays while those before it have not reached top_p
        p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0)
    return token.gather(-1, torch.multinomial(p, 1, generator=generator))[:, 0]
