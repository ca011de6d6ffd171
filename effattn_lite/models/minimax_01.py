"""MiniMax-01: seven layers of lightning attention to one of softmax, and a mixture of experts in each.

A layer adds its parts to the normed stream, not to the stream: x <- alpha N(x) + F(N(x)), DeepNorm's way,
with alpha = (2 L)^(1/4). Lightning layers forget more slowly the later they come; only softmax layers turn,
and of their channels the first half. A token goes to two of 32 experts, whose weights sum to 1.

Source: MiniMax 2025, arXiv:2501.08313; sizes from the published configuration of MiniMax-Text-01. The class
of transformers turns all channels, so what is read from it does too.
"""

from effattn_lite.models.config import Config, Norm, Part, Rope
from effattn_lite.models.theirs import Rule, ends, experts, letters, rope

TYPES = ("minimax",)
LETTERS = {"linear_attention": "L", "full_attention": "A"}


def config(
    *, vocab, width, pattern="LLLLLLLA", depth=None, heads, kv_heads, head_dim, hidden, experts, top=2,
    rope=None, lightning=(1.0, 1.0), softmax=(1.0, 1.0), feed=(1.0, 1.0), eps=1e-5, tie=False,
):  # fmt: skip
    """MiniMax of some size: lightning "L" and softmax "A"; each part's (alpha, beta) of the residual."""
    return Config(
        name="minimax_01",
        vocab=vocab,
        width=width,
        pattern=pattern,
        depth=depth,
        mixers={
            "L": Part("lightning", carry=lightning[0], gain=lightning[1], heads=heads, head_dim=head_dim),
            "A": Part(
                "attention", carry=softmax[0], gain=softmax[1], heads=heads, kv_heads=kv_heads,
                head_dim=head_dim, rope=rope,
            ),
        },
        feed_forwards={
            "F": Part(
                "experts", carry=feed[0], gain=feed[1], hidden=hidden, experts=experts, top=top,
                normalise=True,
            )
        },
        norm=Norm("rms", eps=eps),
        placement="post_residual",
        tie=tie,
    )  # fmt: skip


def deep(depth: int) -> dict[str, tuple[float, float]]:
    """The published factors at some depth: alpha = (2 L)^(1/4), beta = 1, for all parts."""
    return dict.fromkeys(("lightning", "softmax", "feed"), ((2 * depth) ** 0.25, 1.0))


PRESETS = {
    "tiny": config(
        vocab=64, width=32, heads=4, kv_heads=2, head_dim=8, hidden=32, experts=4, rope=Rope(1e4, dims=4),
        **deep(8),
    ),
    "456b": config(
        vocab=200_064, width=6144, depth=80, heads=64, kv_heads=8, head_dim=128, hidden=9216, experts=32,
        rope=Rope(1e7, dims=64), **deep(80),
    ),
}  # fmt: skip


def from_config(theirs) -> Config:
    """Ours of a `MiniMaxConfig`.

    Raises:
        ValueError: a window, or an activation other than SiLU.
    """
    if theirs.sliding_window or theirs.hidden_act != "silu":
        raise ValueError(
            f"sliding_window is {theirs.sliding_window} and hidden_act {theirs.hidden_act!r}, "
            "expected None and 'silu', as in the published models"
        )
    return config(
        vocab=theirs.vocab_size,
        width=theirs.hidden_size,
        pattern=letters(theirs.layer_types, LETTERS),
        depth=theirs.num_hidden_layers,
        heads=theirs.num_attention_heads,
        kv_heads=theirs.num_key_value_heads,
        head_dim=theirs.head_dim or theirs.hidden_size // theirs.num_attention_heads,
        hidden=theirs.intermediate_size,
        experts=theirs.num_local_experts,
        top=theirs.num_experts_per_tok,
        rope=rope(theirs.rope_parameters | {"partial_rotary_factor": 1.0}),
        lightning=(theirs.linear_attn_alpha_factor, theirs.linear_attn_beta_factor),
        softmax=(theirs.full_attn_alpha_factor, theirs.full_attn_beta_factor),
        feed=(theirs.mlp_alpha_factor, theirs.mlp_beta_factor),
        eps=theirs.rms_norm_eps,
        tie=theirs.tie_word_embeddings,
    )


def weights(config: Config) -> list[Rule]:
    """Where the weights of a `MiniMaxForCausalLM` go; its tables of decays follow from the layer's place."""
    heads = config.mixers["L"].options["heads"]
    theirs, ours = "model.layers.{i}.self_attn", "blocks.{i}.mixer"
    files = "model.layers.{i}.block_sparse_moe"
    tables = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")
    return [
        *ends(),
        Rule(tuple(f"{theirs}.{name}" for name in tables), None),
        Rule(
            f"{theirs}.qkv_proj.weight",
            tuple(f"{ours}.{name}_proj.weight" for name in "qkv"),
            # rows are a head's q, k and v, then the next head's
            lambda x: tuple(y.flatten(0, 1) for y in x.view(heads, 3, -1, x.shape[1]).unbind(1)),
        ),
        Rule(f"{theirs}.output_gate.weight", f"{ours}.u_proj.weight"),
        Rule(f"{theirs}.out_proj.weight", f"{ours}.o_proj.weight"),
        Rule(f"{theirs}.norm.weight", f"{ours}.norm.weight", lambda x: x[None]),
        Rule(f"{theirs}.*", f"{ours}.*"),
        *experts(),
        # in files every expert has tensors of its own
        Rule(f"{files}.gate.weight", "blocks.{i}.feed_forward.router.weight"),
        *(
            Rule(f"{files}.experts.{{e}}.{name}.weight", f"blocks.{{i}}.feed_forward.{own}")
            for name, own in {"w1": "gate", "w2": "down", "w3": "up"}.items()
        ),
        Rule("model.layers.{i}.input_layernorm.weight", "blocks.{i}.mixer_norm.weight"),
        Rule("model.layers.{i}.post_attention_layernorm.weight", "blocks.{i}.feed_forward_norm.weight"),
    ]
