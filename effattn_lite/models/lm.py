"""One language model for all architectures: embedding, blocks, norm, head; prefill, step, generate."""

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from effattn_lite.models.block import Block
from effattn_lite.models.config import Config
from effattn_lite.models.meta import MetaTokens
from effattn_lite.models.norm import build_norm
from effattn_lite.models.rows import places
from effattn_lite.models.sampling import sample

ModelCache = dict[str, object]


class LanguageModel(nn.Module):
    """A decoder of tokens, built from a configuration.

    Three calls compute the same function: `forward` over whole texts, `prefill` over any part of them, `step`
    over one token a row. Texts of unequal length are packed, never padded: `prefill` with `cu_seqlens` leaves
    a cache with one row a text, and `step` goes on with all of them.

    Args:
        config: what it is made of.

    Cache: a dict: "length", the tokens of each row so far, [N] int64, and "layers", one dict a layer with
        what its parts keep. Its memory is `cache_bytes(cache)`, by the formula of `Config.cache_bytes`.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config, self.reading = config, None
        self.embedding = nn.Embedding(config.vocab, config.width)
        self.positions = nn.Embedding(config.positions, config.width) if config.positions else None
        self.embedding_norm = build_norm(config.embedding_norm, config.width)
        self.meta = MetaTokens(config.meta, config.width) if config.meta else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in config.layers)
        self.norm = build_norm(config.norm, config.width)
        self.head = nn.Linear(config.width, config.vocab, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        if config.tie:
            self.head.weight = self.embedding.weight
        for path, one in config.same.items():
            owner, _, name = path.rpartition(".")
            setattr(self.get_submodule(owner), name, self.get_submodule(one))

    def forward(self, tokens: torch.Tensor, *, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [B, T, vocab] of whole texts, tokens [B, T], or packed ones, [1, T]."""
        return self.scores(self.read(tokens, cu_seqlens=cu_seqlens))

    def read(self, tokens: torch.Tensor, *, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor:
        """What the blocks make of whole texts, [B, T, D], normalised."""
        return self.norm(self._run("prefill", tokens, None, cu_seqlens=cu_seqlens)[0])

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [..., vocab] of normalised vectors [..., D]."""
        logits = self.head(x)
        if self.config.logit_scale != 1:
            logits = logits * self.config.logit_scale
        if self.config.logit_softcap:
            logits = self.config.logit_softcap * torch.tanh(logits / self.config.logit_softcap)
        return logits

    def hidden_states(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """The residual stream of whole texts: the embedding, then after each block, [B, T, D] each."""
        states = []
        self._run("prefill", tokens, None, watch=states.append)
        return states

    def prefill(
        self,
        tokens: torch.Tensor,
        cache: ModelCache | None = None,
        *,
        cu_seqlens: torch.Tensor | None = None,
        last: bool = False,
    ) -> tuple[torch.Tensor, ModelCache]:
        """The next T tokens of each row.

        Args:
            tokens: [B, T]; packed texts [1, T].
            cache: after the tokens before them; it is not written to.
            cu_seqlens: edges of packed texts, [N + 1]; excludes a cache on the way in.
            last: return logits of the last token of each row or text only, [N, vocab]. From layer
                `Config.late` on the other tokens are not computed at all.

        Returns:
            Logits [B, T, vocab], and the cache after them.

        Raises:
            ValueError: both a cache and cu_seqlens; `last` of an empty text.
        """
        if last and cu_seqlens is not None and bool((cu_seqlens.diff() < 1).any()):
            raise ValueError(
                f"cu_seqlens is {cu_seqlens.tolist()}, expected no empty text: it has no last token"
            )
        if cache and cu_seqlens is not None:
            raise ValueError("got a cache and cu_seqlens, expected one of them: packed texts begin anew")
        x, cache = self._run("prefill", tokens, cache, last=last, cu_seqlens=cu_seqlens)
        return self.scores(self.norm(x)), cache

    def step(self, tokens: torch.Tensor, cache: ModelCache | None = None) -> tuple[torch.Tensor, ModelCache]:
        """One token a row, [N]; returns logits [N, vocab] and the cache after it."""
        if self.meta is not None and not cache:
            return self.prefill(tokens[:, None], last=True)
        x, cache = self._run("step", tokens, cache)
        return self.scores(self.norm(x)), cache

    def generate(
        self,
        prompts: torch.Tensor | Sequence[Sequence[int]],
        steps: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        stop: int | None = None,
        chunk: int | None = None,
    ) -> Iterator[torch.Tensor]:
        """Continue prompts, which may differ in length, a token at a time.

        Args:
            prompts: [N, T] tokens, or N sequences of tokens, none of them empty.
            steps: most tokens a prompt gets.
            temperature: logits are divided by it; 0 takes the likeliest token.
            top_k, top_p: as in `models.sampling.sample`.
            seed: of the draws; the same seed gives the same tokens.
            stop: token after which a row only repeats it; all rows stopped ends.
            chunk: tokens of the prompts that a prefill takes at a time; default all. Prompts of unequal
                length are packed and go in at once.

        Yields:
            The next token of each prompt, [N] int64.

        Raises:
            ValueError: an empty prompt, or `chunk` for prompts of unequal length.
        """
        with torch.no_grad():
            logits, cache = self._begin(prompts, chunk)
        base, recent = cache, []
        device = logits.device
        generator = torch.Generator(device=device).manual_seed(seed)
        done = torch.zeros(len(logits), dtype=torch.bool, device=device)
        for i in range(steps):
            token = sample(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
            if stop is not None:
                token = token.masked_fill(done, stop)
                done = token == stop
            yield token
            if i + 1 == steps or bool(done.all()):
                return
            recent.append(token)
            with torch.no_grad():
                if self.reading and len(recent) == self.reading.rectify:
                    # the newest tokens once more and dense: what sparse reading left in the cache is undone
                    logits, cache = self.sparse(None).prefill(torch.stack(recent, dim=1), base, last=True)
                    base, recent = cache, []
                else:
                    logits, cache = self.step(token, cache)

    def sparse(self, name: str | None, **options) -> "LanguageModel":
        """This model, its very weights, with another way to read in its layers of full attention.

        A method of prefill ("minference", "flexprefill", "xattention", "spargeattn") reads prompts, which
        then go in at once; one of decoding ("quest", "double_sparsity", "resa", "clusterkv", "magicpig") new
        tokens; "streaming_llm" both. Layers with a window of their own or a state stay as they are. A cache
        of one reading can go on with another, with the tokens that it holds. A step adds to `cache_bytes`
        what the method keeps of the keys, and room for more.

        Args:
            name: of the method; None is dense.
            options: `budget`, `window` and so on, as in the op of that name. Further: `dense`, layers that
                stay dense, how many first ones or their numbers (default: the method's authors'); `prompt` of
                a method of decoding, tokens that a prefill reads dense, the others as if each had just been
                written (default all); `positions` of streaming_llm, "cache" as in the paper, or "text";
                `channels` of double_sparsity as a number, with `sample`, tokens [B, T] to find them on;
                `rectify` of resa, tokens between two dense passes in `generate`, or None; `tables` and
                `seed` of magicpig.

        Raises:
            ValueError: an unknown name or option, or one that is missing; no layer of full attention.
        """
        from effattn_lite.models.sparse import Reading

        return self.reads(None if name is None else Reading(self, name, **options))

    def reads(self, reading) -> "LanguageModel":
        """This model, its very weights, with a `models.sparse.Reading`; None is dense."""
        other = copy.copy(self)
        other.reading = reading
        return other

    @staticmethod
    def cache_bytes(cache: ModelCache) -> int:
        """Bytes of all tensors of a cache, measured; of packed texts, their edges too."""
        return _bytes(cache)

    def _begin(self, prompts, chunk):
        device, lengths = self.embedding.weight.device, [len(prompt) for prompt in prompts]
        if not all(lengths):
            raise ValueError(f"prompts have {lengths} tokens, expected at least 1 each")
        rows = [torch.as_tensor(prompt, dtype=torch.long, device=device) for prompt in prompts]
        if len(set(lengths)) == 1:
            cache = None
            for part in torch.stack(rows).split(chunk or lengths[0], dim=1):
                logits, cache = self.prefill(part, cache, last=True)
            return logits, cache
        if chunk:
            raise ValueError(f"chunk is {chunk} and prompts have {lengths} tokens, expected equal lengths")
        edges = torch.tensor([0, *lengths], device=device).cumsum(0)
        return self.prefill(torch.cat(rows)[None], cu_seqlens=edges, last=True)

    def _run(self, how, tokens, cache, *, watch=None, last=False, **more):
        x, position, length = self._embed(tokens, cache, more.get("cu_seqlens"))
        own, front = slice(None), 0 if self.meta is None else len(self.meta)
        if self.meta is not None and not cache:
            x, own, more["cu_seqlens"] = self.meta.put(x, more.get("cu_seqlens"))
            position = places(x, None, more["cu_seqlens"])[0] - front
        if watch:
            watch(x[:, own])
        # what layers of this call tell each other: positions, the embedding, lent keys and values
        shared, layers = {"position": position + front, "embedding": x}, []
        before = cache["layers"] if cache else [None] * len(self.blocks)
        late = self.config.late if last else None
        for i, (block, held) in enumerate(zip(self.blocks, before, strict=True)):
            if i == late:
                x, shared, how, more = *_last(x, shared, length + front, **more), "step", {}
            shared["reading"] = self.reading and self.reading.at(i, how)
            x, held = getattr(block, how)(x, held, shared=shared, **more)
            layers.append(held)
            if watch:
                watch(x[:, own])
        if late == len(self.blocks):
            x, _ = _last(x, shared, length, **more)
        elif not last and how == "prefill":
            x = x[:, own]
        return x, {"length": length, "layers": layers}

    def _embed(self, tokens, cache, cu_seqlens):
        new = tokens if tokens.ndim == 2 else tokens[:, None]
        position, length = places(new, cache, cu_seqlens)
        x = self.embedding(tokens)
        if self.config.embedding_scale != 1:
            x = x * torch.tensor(self.config.embedding_scale, dtype=x.dtype)
        if self.positions is not None:
            x = x + self.positions(position if tokens.ndim == 2 else position[:, 0])
        return self.embedding_norm(x), position, length


def _last(x, shared, length, *, cu_seqlens=None):
    """Of x [B, T, D] and of tensors that layers share, what belongs to the last token of each row or text."""

    def cut(z):
        return z[:, -1] if cu_seqlens is None else z[0, cu_seqlens[1:].long() - 1]

    # keys and values are no tensors but `Rows`: the last token sees them all
    own = {name: cut(z) for name, z in shared.items() if isinstance(z, torch.Tensor)}
    return cut(x), shared | own | {"position": length[:, None] - 1}


def _bytes(held):
    if hasattr(held, "nbytes"):  # a tensor, or the pages of a sparse mode
        return held.nbytes
    return sum(map(_bytes, held.values() if isinstance(held, dict) else held)) if held else 0
