"""Published presets have as many weights as their authors say."""

import pytest

from effattn_lite import models

# billions, as the model's paper, card or checkpoint gives them: a wrong width or pattern is off by more
SIZES = {
    ("llama", "smollm2_135m"): 0.1345,
    ("llama", "mistral_7b"): 7.24,
    ("gpt3", "small"): 0.125,
    ("gpt3", "175b"): 174.6,
    ("gemma3", "270m"): 0.268,
    ("gemma3", "1b"): 1.0,
    ("command_a", "r7b"): 8.03,
    ("gpt_oss", "20b"): 20.91,
    ("gpt_oss", "120b"): 116.83,
    ("jamba", "52b"): 51.6,
    ("falcon_mamba", "7b"): 7.27,
    ("codestral_mamba", "7b"): 7.285403648,
    ("minimax_01", "456b"): 456.0,
    ("nemotron_h", "4b"): 4.485,
    ("zamba2", "1.2b"): 1.215,
    ("griffin", "2b"): 2.683,
    ("samba", "421m"): 0.421,
    # 109 and 400 with the encoder of images, which is not here
    ("llama4", "scout"): 107.8,
    ("llama4", "maverick"): 400.7,
    ("deepseek_v32", "671b"): 671,
    ("hymba", "1.5b"): 1.52,
    ("phi4_mini_flash", "3.8b"): 3.85,
    ("minicpm4", "8b"): 8.19,
    ("rwkv_series", "4-169m"): 0.1693,
    ("rwkv_series", "4-14b"): 14.15,
    ("rwkv_series", "5-1.5b"): 1.5778,
    ("rwkv_series", "6-1.6b"): 1.5999,
    ("rwkv_series", "7-1.5b"): 1.5274,
}


@pytest.mark.parametrize(("name", "preset"), SIZES, ids=str)
def test_number_of_weights(name, preset):
    model = models.build(name, preset, device="meta")
    billions = sum(x.numel() for x in model.parameters()) / 1e9
    assert billions == pytest.approx(SIZES[name, preset], rel=3e-3)


def test_cache_of_a_hybrid_is_small():
    """What the patterns are for: bytes at 128 k tokens, in bfloat16."""
    tokens = 131_072

    def held(name, preset):
        return models.recipe(name).PRESETS[preset].cache_bytes(tokens, itemsize=2)

    plain = models.recipe("llama").config(
        vocab=1, width=4096, depth=32, heads=32, kv_heads=8, hidden=1
    ).cache_bytes(tokens, itemsize=2)  # fmt: skip
    # every eighth layer has attention: an eighth of the keys and values, and states beside them
    assert plain / 8 < held("jamba", "52b") < 1.02 * plain / 8
    assert plain / 4 < held("command_a", "r7b") < 1.1 * plain / 4
