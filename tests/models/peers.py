"""Tiny models of transformers, one function an architecture, with weights that show every mistake."""

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch

KERNELS = ("fla", "mamba_ssm", "causal_conv1d")
"""Packages whose GPU kernels transformers prefers to its own code."""
VOCAB, WIDTH = 64, 32
SIZES = dict(
    vocab_size=VOCAB, hidden_size=WIDTH, num_attention_heads=4, num_key_value_heads=2, use_cache=False,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


@dataclass(frozen=True)
class Peer:
    """How to build a model of theirs.

    Attributes:
        name: of our recipe.
        model: their class, in transformers.
        config: their configuration class.
        settings: its arguments, on top of SIZES.
        layers: path of the list of layers.
        enters: path of the module whose output enters the first layer, if not what it is called with.
        sizes: common arguments; another spelling has its own.
        touch: called with the model after its weights are drawn, to mend those that have a range.
        files: the recipe's rules know the names in their files too, which may differ from those in memory.
    """

    name: str
    model: str
    config: str
    settings: dict
    layers: str = "model.layers"
    enters: str | None = None
    sizes: dict = field(default_factory=lambda: SIZES)
    touch: Callable | None = None
    files: bool = True

    def build(self):
        """The model, float32, in evaluation mode, with random weights."""
        with pytest.MonkeyPatch.context() as patch:
            for package in KERNELS:
                # where it is missing, they take their plain torch code
                patch.setitem(sys.modules, package, None)
            import transformers

            config = getattr(transformers, self.config)(**self.sizes | self.settings)
            config._attn_implementation = "eager"
            model = getattr(transformers, self.model)(config).float().eval()
        randomise(model)
        if self.touch:
            self.touch(model)
        return model


@torch.no_grad()
def randomise(model, seed: int = 0) -> None:
    """Draw every weight anew: matrices keep the size of their input, vectors are near 1 or 0 as before.

    As they are made, norms are 1 and biases 0, and a swapped or forgotten one would not show.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(x):
        return torch.randn(x.shape, generator=generator)

    for name, x in model.named_parameters():
        if "embed" in name or name.endswith("wte.weight"):
            x.copy_(normal(x))
        elif x.ndim > 1:
            x.copy_(normal(x) / x.shape[-1] ** 0.5)
        else:
            # a vector of one value, as all norms and biases: spread about it
            x.add_(0.3 * normal(x))


def gemma3():
    return Peer(
        "gemma3", "Gemma3ForCausalLM", "Gemma3TextConfig",
        dict(num_hidden_layers=7, head_dim=8, intermediate_size=48, sliding_window=6,
             query_pre_attn_scalar=10, final_logit_softcapping=5.0,
             rope_parameters={
                 "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
                 "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}),
    )  # fmt: skip


def jamba():
    return Peer(
        "jamba", "JambaForCausalLM", "JambaConfig",
        dict(num_hidden_layers=6, intermediate_size=48, num_experts=4, num_experts_per_tok=2, mamba_d_state=8,
             attn_layer_period=3, attn_layer_offset=1, mamba_dt_rank=4, use_associative_scan=False),
    )  # fmt: skip


def llama():
    # several of the eight pairs are on the ramp between stretched and not
    turns = {"rope_type": "llama3", "rope_theta": 50.0, "factor": 8.0, "low_freq_factor": 1.0,
             "high_freq_factor": 8.0, "original_max_position_embeddings": 64}  # fmt: skip
    settings = dict(num_hidden_layers=4, intermediate_size=48, attention_bias=True, head_dim=16,
                    rope_parameters=turns)  # fmt: skip
    return Peer("llama", "LlamaForCausalLM", "LlamaConfig", settings)


def mistral():
    settings = dict(num_hidden_layers=4, intermediate_size=48, sliding_window=7, head_dim=12)
    return Peer("llama", "MistralForCausalLM", "MistralConfig", settings)


def gpt_neo():
    sizes = dict(
        vocab_size=VOCAB, hidden_size=WIDTH, num_heads=4, max_position_embeddings=48, use_cache=False
    )
    settings = dict(num_layers=4, attention_types=[[["global", "local"], 2]], window_size=7)
    return Peer("gpt3", "GPTNeoForCausalLM", "GPTNeoConfig", settings, layers="transformer.h", sizes=sizes)


def command_a():
    settings = dict(num_hidden_layers=5, intermediate_size=48, sliding_window=6, logit_scale=0.25,
                    attention_bias=True)  # fmt: skip
    return Peer("command_a", "Cohere2ForCausalLM", "Cohere2Config", settings)


def llama4():
    return Peer(
        "llama4", "Llama4ForCausalLM", "Llama4TextConfig",
        dict(num_hidden_layers=5, intermediate_size=24, intermediate_size_mlp=40, num_local_experts=4,
             num_experts_per_tok=2, interleave_moe_layer_step=2, attention_chunk_size=16, floor_scale=4,
             head_dim=8, attention_bias=True),
    )  # fmt: skip


def gpt_oss():
    yarn = {"rope_type": "yarn", "rope_theta": 50.0, "factor": 8.0, "beta_fast": 8.0, "beta_slow": 1.0,
            "truncate": False, "original_max_position_embeddings": 64}  # fmt: skip

    @torch.no_grad()
    def touch(model):
        # gates beyond the clip at 7
        for name, x in model.named_parameters():
            if name.endswith("gate_up_proj"):
                x.mul_(5)

    return Peer(
        "gpt_oss", "GptOssForCausalLM", "GptOssConfig",
        dict(num_hidden_layers=4, intermediate_size=24, head_dim=16, num_local_experts=4,
             num_experts_per_tok=2, sliding_window=6, rope_parameters=yarn, max_position_embeddings=512),
        touch=touch,
    )  # fmt: skip


def falcon_mamba():
    return Peer(
        "falcon_mamba", "FalconMambaForCausalLM", "FalconMambaConfig",
        dict(vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=4, state_size=8, time_step_rank=4,
             mixer_rms_eps=1e-2, tie_word_embeddings=False, use_cache=False),
        layers="backbone.layers", sizes={},
    )  # fmt: skip


def mamba():
    return replace(falcon_mamba(), model="MambaForCausalLM", config="MambaConfig", settings=dict(
        vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=4, state_size=8, time_step_rank=4,
        conv_kernel=3,
    ))  # fmt: skip


def codestral_mamba():
    return Peer(
        "codestral_mamba", "Mamba2ForCausalLM", "Mamba2Config",
        dict(vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=4, state_size=8, num_heads=8, head_dim=8,
             n_groups=2, chunk_size=16, use_bias=True, use_cache=False),
        layers="backbone.layers", sizes={},
    )  # fmt: skip


def qwen3_next():
    return Peer(
        "qwen3_next", "Qwen3NextForCausalLM", "Qwen3NextConfig",
        dict(num_hidden_layers=5, layer_types=["linear_attention", "full_attention", "linear_attention",
                                               "linear_attention", "full_attention"],
             head_dim=16, intermediate_size=48, linear_key_head_dim=8, linear_value_head_dim=16,
             linear_num_key_heads=2, linear_num_value_heads=4, num_experts=6, num_experts_per_tok=2,
             moe_intermediate_size=16, shared_expert_intermediate_size=24, mlp_only_layers=[3],
             attention_bias=True,
             rope_parameters={"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.25}),
    )  # fmt: skip


def minimax():
    return Peer(
        "minimax_01", "MiniMaxForCausalLM", "MiniMaxConfig",
        dict(num_hidden_layers=4, head_dim=10, intermediate_size=24, num_local_experts=4,
             num_experts_per_tok=2, block_size=16,
             layer_types=["linear_attention"] * 2 + ["full_attention", "linear_attention"],
             linear_attn_alpha_factor=1.3, linear_attn_beta_factor=0.8, full_attn_alpha_factor=1.2,
             full_attn_beta_factor=0.7, mlp_alpha_factor=1.1, mlp_beta_factor=0.9),
    )  # fmt: skip


def nemotron_h():
    # so large a smallest step that it cuts some
    return Peer(
        "nemotron_h", "NemotronHForCausalLM", "NemotronHConfig",
        dict(layers_block_type=[dict(M="linear_attention", A="full_attention", F="mlp")[x] for x in "MFMAFM"],
             head_dim=10, intermediate_size=48, ssm_state_size=8, mamba_num_heads=6, mamba_head_dim=8,
             n_groups=2, chunk_size=16, time_step_min=0.5, use_bias=True, mlp_bias=True),
    )  # fmt: skip


def kimi_linear():
    return Peer(
        "kimi_linear", "KimiLinearForCausalLM", "KimiLinearConfig",
        dict(num_hidden_layers=5, layer_types=["linear_attention", "full_attention", "linear_attention",
                                               "linear_attention", "full_attention"],
             num_key_value_heads=4, intermediate_size=48, moe_intermediate_size=16, kv_lora_rank=16,
             qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=6, linear_head_dim=8, linear_num_heads=4,
             num_local_experts=8, num_experts_per_tok=2, n_shared_experts=2, n_group=2, topk_group=1,
             attention_bias=True),
        touch=unbalance,
    )  # fmt: skip


def unbalance(model):
    """Draw the biases that balance experts; they are buffers."""
    generator = torch.Generator().manual_seed(2)
    for name, x in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            x.copy_(0.3 * torch.randn(x.shape, generator=generator))


def deepseek_v32():
    # 16 heads of the indexer: with few, many scores are exactly 0, and their top-k breaks ties as it likes
    return Peer(
        "deepseek_v32", "DeepseekV32ForCausalLM", "DeepseekV32Config",
        dict(num_hidden_layers=4, first_k_dense_replace=1, num_key_value_heads=4, intermediate_size=48,
             moe_intermediate_size=16, q_lora_rank=24, kv_lora_rank=16, qk_rope_head_dim=4,
             qk_nope_head_dim=8, v_head_dim=6, n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=2,
             n_group=4,
             topk_group=2, index_n_heads=16, index_head_dim=8, index_topk=7, attention_bias=True,
             rope_parameters={"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "mscale": 0.7,
                              "mscale_all_dim": 1.0, "original_max_position_embeddings": 32}),
        touch=unbalance,
    )  # fmt: skip


def zamba2():
    return Peer(
        "zamba2", "Zamba2ForCausalLM", "Zamba2Config",
        dict(num_hidden_layers=6, num_key_value_heads=4, intermediate_size=48, n_mamba_heads=8,
             mamba_d_state=8, mamba_ngroups=2,
             layers_block_type=[dict(M="linear_attention", H="hybrid")[x] for x in "MHHMHH"],
             num_mem_blocks=2, adapter_rank=4, use_shared_attention_adapter=True, use_mem_rope=True,
             chunk_size=16, time_step_min=0.5),
    )  # fmt: skip


def zamba2_plain():
    peer = zamba2()
    return replace(peer, settings=peer.settings | dict(
        num_mem_blocks=1, use_shared_attention_adapter=False, use_mem_rope=False, time_step_min=1e-3
    ))  # fmt: skip


def griffin():
    return Peer(
        "griffin", "RecurrentGemmaForCausalLM", "RecurrentGemmaConfig",
        dict(num_hidden_layers=5, lru_width=40, intermediate_size=96, attention_window_size=6,
             logits_soft_cap=20.0, attention_bias=True, rms_norm_eps=0.3),
    )  # fmt: skip


def falcon_h1():
    return Peer(
        "falcon_h1", "FalconH1ForCausalLM", "FalconH1Config",
        dict(num_hidden_layers=3, head_dim=10, intermediate_size=48, mamba_d_ssm=48, mamba_n_heads=6,
             mamba_n_groups=2, mamba_d_state=8, mamba_chunk_size=16, embedding_multiplier=0.7,
             lm_head_multiplier=1.3, key_multiplier=0.6, attention_in_multiplier=1.2,
             mlp_multipliers=[0.7, 0.6], attention_out_multiplier=0.8, ssm_in_multiplier=1.1,
             ssm_out_multiplier=0.9,
             ssm_multipliers=[0.8, 1.2, 0.7, 1.4, 0.5], time_step_limit=(1.0, 1.6)),
    )  # fmt: skip


def falcon_h1_normed():
    peer = falcon_h1()
    return replace(peer, settings=peer.settings | dict(
        mamba_rms_norm=True, mamba_norm_before_gate=True, mlp_bias=True
    ))  # fmt: skip


def rwkv():
    return Peer(
        "rwkv_series", "RwkvForCausalLM", "RwkvConfig",
        dict(vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=4, intermediate_size=48, rescale_every=0,
             use_cache=False),
        layers="rwkv.blocks", enters="rwkv.blocks.0.pre_ln", sizes={},
    )  # fmt: skip


PEERS = {
    peer.__name__: peer
    for peer in (
        llama,
        mistral,
        gpt_neo,
        gemma3,
        command_a,
        llama4,
        gpt_oss,
        jamba,
        falcon_mamba,
        mamba,
        codestral_mamba,
        minimax,
        nemotron_h,
        zamba2,
        zamba2_plain,
        griffin,
        falcon_h1,
        falcon_h1_normed,
        qwen3_next,
        kimi_linear,
        deepseek_v32,
        rwkv,
    )
}
"""Every peer by its name; a recipe may have several."""
