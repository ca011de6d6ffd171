"""Sparse attention in a model that was trained dense: one method, by its name, instead of full attention."""

import importlib
import inspect
from collections.abc import Callable, Collection, Iterator

import torch

from effattn_lite.models.attention import Attention
from effattn_lite.models.pages import Pages
from effattn_lite.models.rotary import gain, turn
from effattn_lite.models.rows import PAGES, Rows
from effattn_lite.ops.double_sparsity import calibrate
from effattn_lite.ops.engines.softmax_attention import keep
from effattn_lite.ops.magicpig import draw_planes

STREAMING = ("streaming_llm",)
PREFILL = ("minference", "flexprefill", "xattention", "spargeattn")
DECODE = ("quest", "double_sparsity", "resa", "clusterkv", "magicpig")
NAMES = (*STREAMING, *PREFILL, *DECODE)
"""Methods that read both a prompt and new tokens sparsely, the prompt alone, new tokens alone."""
DENSE = {"quest": 2, "clusterkv": 2, "magicpig": range(0, 65, 16)}
"""Layers that a method's authors leave dense: the first ones, or those of these numbers (magicpig: by the
released code); none of other methods."""
CALLER = {"cache", "k", "v", "scale", "cu_seqlens", "return_lse", "impl", "prompt", "planes"}
"""Arguments of the ops that are no options of a mode."""
OWN = {
    "streaming_llm": {"positions": "cache"},
    "double_sparsity": {"sample": None},
    "resa": {"rectify": 32},
    "magicpig": {"tables": 150, "seed": 0},
}
"""Options of a mode that its op does not have, with their defaults."""


class Reading:
    """How the layers of full attention of a model read: one method and its options.

    Args:
        model: a `LanguageModel`.
        name: one of NAMES.
        dense: layers that stay dense: that many first ones, or these numbers; default as in DENSE.
        prompt: of a method of decoding: tokens of each text that are read dense in a prefill, the others as
            if each had just been written; default all.
        options: of the mode, as in its op or in OWN.

    Raises:
        ValueError: an unknown name or option, an option that is missing, a value that the op refuses; no
            layer of full attention is left.
    """

    def __init__(self, model, name: str, *, dense=None, prompt: int | None = None, **options):
        if name not in NAMES:
            raise ValueError(f"no sparse mode is called {name!r}, expected one of {', '.join(NAMES)}")
        if prompt is not None and name not in DECODE:
            raise ValueError(f"{name} takes no option prompt: that is for {', '.join(DECODE)}")
        self.name, self.prompt = name, prompt
        self.op = getattr(importlib.import_module(f"effattn_lite.ops.{name}"), name)
        self.options = _settings(name, self.op, options)
        own = {key: self.options.pop(key) for key in OWN.get(name, ())}
        self.rectify: int | None = own.get("rectify")
        self.positions: str | None = own.get("positions")
        if self.positions not in (None, "cache", "text"):
            raise ValueError(f"positions is {self.positions!r}, expected 'cache' or 'text'")
        if self.rectify is not None and self.rectify < 1:
            raise ValueError(f"rectify is {self.rectify}, expected None or >= 1")
        layers = dict(_full(model))
        left = DENSE.get(name, 0) if dense is None else dense
        left = set(range(left)) if isinstance(left, int) else set(left)
        self.layers = {i: layer for i, layer in layers.items() if i not in left}
        if not self.layers:
            full = f"full attention is in layers {list(layers)}, dense are {sorted(left)}"
            raise ValueError(f"no layer is left for {name}: {full}")
        self.of_layer = self._each(model, own)
        i, layer = next(iter(self.layers.items()))
        # what the op refuses is refused here, not at the first token
        q, k = (layer.q_proj.weight.new_zeros(1, 1, n, layer.head_dim) for n in (layer.heads, layer.kv_heads))
        self._call(i, layer, q, k=k, v=k, prompt=0)

    def at(self, i: int, how: str) -> Callable | None:
        """What attends in layer i; None: the layer itself.

        It takes the layer, q, k, v, cache, position and cu_seqlens, and returns o and what to keep.

        Args:
            i: number of the layer.
            how: "prefill" or "step".
        """
        if i not in self.layers:
            return None
        if self.name in STREAMING:
            return self._streaming(i)
        if self.name in PREFILL:
            return self._whole(i) if how == "prefill" else None
        if how == "step":
            return self._step(i)
        return None if self.prompt is None else self._written(i)

    def _whole(self, i):
        """The method on whole prompts."""

        def read(layer, q, k, v, cache, position, cu_seqlens):
            if cache:
                got = "expected it in one prefill, got a cache of tokens before it"
                raise ValueError(f"{self.name} chooses from a whole prompt: {got}")
            rows = Rows.extend(None, {"k": k, "v": v}, cu_seqlens)
            return self._call(i, layer, q, k, v, cu_seqlens=rows.edges), rows.keep(lambda x: x)

        return read

    def _step(self, i):
        """The method on the newest token of each row."""

        def read(layer, q, k, v, cache, position, cu_seqlens):
            if not cache:
                cache = {"k": k[:, :0], "v": v[:, :0]}
            pages = cache.get(PAGES) or Pages.of(Rows.extend(cache, {"k": k[:, :0], "v": v[:, :0]}))
            pages = pages.append(k, v)
            prompts = pages.prompts if self.prompt is None else [self.prompt] * len(pages.prompts)
            parts = zip(pages.split(q[:, 0]), pages.caches, prompts, strict=True)
            o = torch.cat([self._call(i, layer, part, kv, prompt=n) for (part,), kv, n in parts])
            return o[:, None], {PAGES: pages}

        return read

    def _written(self, i):
        """Dense for tokens of the prompt, the method for those behind it."""

        def read(layer, q, k, v, cache, position, cu_seqlens):
            def attend(q, k, v):
                T, Tk = q.shape[1], k.shape[1]
                n = min(max(self.prompt - (Tk - T), 0), T)
                end = Tk - T + n
                parts = [layer.dense(q[:, :n], k[:, :end], v[:, :end])] if n else []
                parts += [self._call(i, layer, q[:, n:], k=k, v=v, prompt=self.prompt)] if n < T else []
                return torch.cat(parts, dim=1)

            rows = Rows.extend(cache, {"k": k, "v": v}, cu_seqlens)
            return rows.attend(attend, q), rows.keep(lambda x: x)

        return read

    def _streaming(self, i):
        """Sinks and a window, with places in the cache for positions."""
        sinks, window = self.options["sinks"], self.options["window"]
        last = sinks + window - 1

        def read(layer, q, k, v, cache, position, cu_seqlens):
            K, far = q.shape[3], None
            if self.positions == "cache" and layer.rope is not None and bool((position > last).any()):
                # towards a sink a query's position stops growing
                far = turn(q, position.clamp(max=last) - position, layer.rope) / gain(layer.rope)
                q = torch.cat((q, far), dim=-1)

            def attend(q, k, v):
                scale = layer.pattern["scale"] or K**-0.5
                if far is not None:
                    # a sink answers to the second half of a query, another key to the first
                    sink = (torch.arange(k.shape[1], device=k.device) < sinks)[:, None, None]
                    k = torch.cat((k * ~sink, k * sink), dim=-1)
                return self._call(i, layer, q, k, v, scale=scale)

            rows = Rows.extend(cache, {"k": k, "v": v}, cu_seqlens)
            return rows.attend(attend, q), rows.keep(lambda x: keep(x, window, sinks))

        return read

    def _call(self, i, layer, *tensors, prompt=None, **more):
        options = {"scale": layer.pattern["scale"], "impl": layer.pattern["impl"]} | self.options
        if self.name in ("clusterkv", "magicpig"):
            more["prompt"] = prompt
        return self.op(*tensors, **options | self.of_layer[i] | more)

    def _each(self, model, own):
        """Options that every layer has for itself: channels, planes."""
        device = model.embedding.weight.device
        if self.name == "magicpig":
            tables, bits, seed = own["tables"], self.options["bits"], own["seed"]
            return {
                i: {"planes": draw_planes(tables, bits, layer.head_dim, seed=seed + i).to(device)}
                for i, layer in self.layers.items()
            }
        if self.name != "double_sparsity" or not isinstance(self.options["channels"], int):
            return {i: {} for i in self.layers}
        if own["sample"] is None:
            raise ValueError("channels is a number: double_sparsity needs the option sample, tokens [B, T]")
        calibration = _Calibration(self.layers, self.options.pop("channels"))
        with torch.no_grad():
            model.reads(calibration).read(torch.as_tensor(own["sample"], device=device))
        return calibration.found


class _Calibration:
    """A reading that is dense and finds the channels of each layer."""

    rectify = None

    def __init__(self, layers: Collection[int], r: int):
        self.layers, self.r, self.found = layers, r, {}

    def at(self, i, how):
        if i not in self.layers:
            return None

        def read(layer, q, k, v, cache, position, cu_seqlens):
            self.found[i] = {"channels": calibrate(q, k, r=self.r)}
            return layer.dense(q, k, v), {}

        return read


def _full(model) -> Iterator[tuple[int, Attention]]:
    """Layers of full attention: their numbers and the attention in them. Windows, chunks and states stay."""
    for i, block in enumerate(model.blocks):
        for layer in block.modules():
            if type(layer) is not Attention or layer.window is not None:
                continue
            odd = dict(
                softcap=layer.pattern["softcap"], sinks=layer.sinks, lends=layer.lends, borrows=layer.borrows
            )
            odd = [name for name, x in odd.items() if x is not None]
            if odd:
                raise ValueError(f"layer {i} has {', '.join(odd)}: no sparse mode reads such attention")
            yield i, layer


def _settings(name, op, options):
    """All options of a mode, given or by default."""
    parameters = {
        key: parameter.default
        for key, parameter in inspect.signature(op).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and key not in CALLER
    } | OWN.get(name, {})
    unknown = sorted(set(options) - set(parameters))
    if unknown:
        raise ValueError(f"{name} takes no option {', '.join(unknown)}; it takes {', '.join(parameters)}")
    settings = parameters | options
    missing = [key for key, value in settings.items() if value is inspect.Parameter.empty]
    if missing:
        raise ValueError(f"{name} needs the option {', '.join(missing)}")
    return settings
