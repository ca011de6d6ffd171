"""Language models: one decoder, and one short recipe an architecture. Importing this loads no torch.

A recipe is `models/<name>.py`, named as the registry's row. It has

- `TYPES`: model types of transformers that it reads,
- `PRESETS`: name -> `Config`; "tiny" is for tests and first tries,
- `from_config(theirs) -> Config`: our configuration of one of theirs,
- `weights(config) -> list[Rule]`: where their weights go.
"""

import importlib
from types import ModuleType

from effattn_lite import registry

__all__ = [
    "build",
    "from_folder",
    "from_transformers",
    "load_gguf",
    "load_tokenizer",
    "names",
    "presets",
    "recipe",
]

PLAIN = "llama"
"""The decoder that all others are measured against; no method of the registry, but a recipe."""


def names() -> list[str]:
    """Names of all architectures that have a recipe: the plain decoder, then the registry's order."""
    return [PLAIN, *registry.names("model")]


def recipe(name: str) -> ModuleType:
    """The recipe of an architecture.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in names():
        raise ValueError(f"no recipe is called {name!r}, expected one of {', '.join(names())}")
    return importlib.import_module(f"effattn_lite.models.{name}")


def presets(name: str) -> list[str]:
    """Names of an architecture's presets."""
    return list(recipe(name).PRESETS)


def build(name: str, preset: str = "tiny", *, device=None, dtype=None):
    """A model of fresh weights.

    Args:
        name: of an architecture.
        preset: one of `presets(name)`.
        device: where its weights are; "meta" only counts them.
        dtype: of its weights; default float32.

    Returns:
        A `LanguageModel`.

    Raises:
        ValueError: no such architecture or preset.
    """
    table = recipe(name).PRESETS
    if preset not in table:
        raise ValueError(f"{name} has no preset {preset!r}, expected one of {', '.join(table)}")
    import torch

    from effattn_lite.models.lm import LanguageModel

    with torch.device(device or "cpu"):
        return LanguageModel(table[preset]).to(dtype or torch.float32)


def from_transformers(model):
    """Our model of a model of transformers, with its weights: the same logits.

    Args:
        model: a causal language model whose `config.model_type` a recipe reads.

    Returns:
        A `LanguageModel` in the dtype and on the device of theirs, in evaluation mode.

    Raises:
        ValueError: no recipe reads this type; a setting that ours lacks; a weight that is left over.
    """
    from effattn_lite.models.convert import load
    from effattn_lite.models.lm import LanguageModel

    reader, weight = _reader(model.config), next(model.parameters())
    config = reader.from_config(model.config)
    ours = LanguageModel(config).to(weight.device, weight.dtype)
    return load(ours, reader.weights(config), model.state_dict()).eval()


def from_folder(path, *, dtype=None):
    """Our model of a folder with `config.json` and safetensors files, as published checkpoints are.

    Args:
        path: of the folder; nothing is downloaded.
        dtype: of the model's weights; default float32.

    Returns:
        A `LanguageModel` on the CPU, in evaluation mode.

    Raises:
        ImportError: transformers, which reads the configuration, or safetensors is not installed.
        ValueError: as `from_transformers`.
    """
    from pathlib import Path

    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig

    from effattn_lite.models.convert import load
    from effattn_lite.models.lm import LanguageModel

    theirs = AutoConfig.from_pretrained(path, local_files_only=True)
    reader = _reader(theirs)
    config = reader.from_config(theirs)
    files = sorted(Path(path).glob("*.safetensors"))
    tensors = {name: x for file in files for name, x in load_file(file).items()}
    ours = LanguageModel(config).to(dtype or torch.float32)
    return load(ours, reader.weights(config), tensors).eval()


def _reader(theirs):
    """The recipe that reads a configuration of theirs."""
    kind = theirs.model_type
    readers = [r for r in map(recipe, names()) if kind in getattr(r, "TYPES", ())]
    if not readers:
        known = sorted(kind for name in names() for kind in getattr(recipe(name), "TYPES", ()))
        raise ValueError(f"no recipe reads models of type {kind!r}, expected one of {', '.join(known)}")
    return readers[0]


def load_gguf(path):
    """The model of a GGUF file of Llama's kind, with its weights: SmolLM2, say.

    Args:
        path: of the file; tensors of kind F32, F16, Q4_1 and Q8_0 are read.

    Returns:
        A `LanguageModel` in float32, in evaluation mode.

    Raises:
        ValueError: another format, architecture or kind of tensor.
    """
    from effattn_lite.models import gguf

    return gguf.load(path)


def load_tokenizer(path):
    """The tokenizer of a GGUF file: `encode(text)` gives token numbers, `decode(numbers)` text.

    Raises:
        ValueError: another format, or another kind of tokenizer.
    """
    from effattn_lite.models import gguf

    return gguf.tokenizer(path)
