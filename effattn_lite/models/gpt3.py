"""GPT-3: layers that see all and layers that see a band, in turn, with learned positions.

The paper says "alternating dense and locally banded sparse attention patterns" and gives no width of the
band; 256 here is that of GPT-Neo, the public model of this pattern, which the recipe reads. GPT-Neo does not
scale its products, and has no biases before them; GPT-3's, which are not published, are taken to be
GPT-2's: everywhere.

Source: Brown et al. 2020, arXiv:2005.14165, section 2.1 and table 2.1; GPT-Neo 125M from its configuration.
"""

from effattn_lite.models.config import Config, Norm, Part
from effattn_lite.models.theirs import Rule, activation

TYPES = ("gpt_neo",)
LETTERS = {"global": "A", "local": "W"}


def config(
    *, vocab, width, depth, heads, positions, hidden=None, window=256, pattern="AW", scale=None, bias=True,
    act="gelu_tanh", eps=1e-5, tie=True,
):  # fmt: skip
    """GPT-3 of some size: dense layers "A", banded ones "W"."""
    common = dict(heads=heads, scale=scale, bias=bias, out_bias=True)
    return Config(
        name="gpt3",
        vocab=vocab,
        width=width,
        pattern=pattern,
        depth=depth,
        mixers={"A": Part("attention", **common), "W": Part("attention", window=window, **common)},
        feed_forwards={"F": Part("plain", hidden=hidden or 4 * width, activation=act, bias=True)},
        norm=Norm("layer", eps=eps, bias=True),
        positions=positions,
        tie=tie,
    )


PRESETS = {
    "tiny": config(vocab=64, width=32, depth=4, heads=4, positions=64, window=8),
    "small": config(vocab=50_257, width=768, depth=12, heads=12, positions=2048),
    "175b": config(vocab=50_257, width=12_288, depth=96, heads=96, positions=2048),
    "neo_125m": config(vocab=50_257, width=768, depth=12, heads=12, positions=2048, scale=1.0, bias=False),
}


def from_config(theirs) -> Config:
    """Ours of a `GPTNeoConfig`."""
    return config(
        vocab=theirs.vocab_size,
        width=theirs.hidden_size,
        pattern="".join(LETTERS[kind] for kind in theirs.attention_layers),
        depth=theirs.num_layers,
        heads=theirs.num_heads,
        positions=theirs.max_position_embeddings,
        hidden=theirs.intermediate_size,
        window=theirs.window_size,
        scale=1.0,
        bias=False,
        act=activation(theirs.activation_function),
        eps=theirs.layer_norm_epsilon,
        tie=theirs.tie_word_embeddings,
    )


def weights(config: Config) -> list[Rule]:
    """Where the weights of a `GPTNeoForCausalLM` go."""
    layer = "transformer.h.{i}"
    return [
        Rule("transformer.wte.weight", "embedding.weight"),
        Rule("transformer.wpe.weight", "positions.weight"),
        Rule("transformer.ln_f.*", "norm.*"),
        Rule("lm_head.weight", "head.weight"),
        Rule(f"{layer}.attn.attention.out_proj.weight", "blocks.{i}.mixer.o_proj.weight"),
        Rule(f"{layer}.attn.attention.out_proj.bias", "blocks.{i}.mixer.o_proj.bias"),
        Rule(f"{layer}.attn.attention.*", "blocks.{i}.mixer.*"),
        Rule(f"{layer}.mlp.c_fc.*", "blocks.{i}.feed_forward.up_proj.*"),
        Rule(f"{layer}.mlp.c_proj.*", "blocks.{i}.feed_forward.down_proj.*"),
        Rule(f"{layer}.ln_1.*", "blocks.{i}.mixer_norm.*"),
        Rule(f"{layer}.ln_2.*", "blocks.{i}.feed_forward_norm.*"),
    ]
