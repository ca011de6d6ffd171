"""Byte-level byte-pair encoding, as SmolLM2 splits text; needs the standard library alone."""

import functools
import re
import unicodedata
from collections.abc import Iterable, Sequence


class Tokenizer:
    """Text to token numbers and back.

    Control tokens are cut out first. The rest is cut into pieces: a contraction, a word with the space
    before it, a single digit, a run of other signs, white space. In each piece, of its UTF-8 bytes, the pair
    that was learned first is joined until none is left.

    Args:
        tokens: token of each number; a byte is written as a printable letter.
        merges: pairs "a b", in the order in which they were learned.
        control: tokens that text is never split into.

    Source: Sennrich et al. 2016, arXiv:1508.07909; pieces and letters as in GPT-2's released code.
    """

    def __init__(self, tokens: Sequence[str], merges: Sequence[str], *, control: Iterable[str] = ()):
        self.tokens, self.control = tokens, frozenset(control)
        self.number = {token: i for i, token in enumerate(tokens)}
        self.rank = {tuple(pair.split(" ")): i for i, pair in enumerate(merges)}
        shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
        hidden = [byte for byte in range(256) if byte not in shown]
        self.letter = {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}
        self.byte = {letter: b for b, letter in self.letter.items()}

    def encode(self, text: str) -> list[int]:
        """Token numbers of a text; nothing is put before or behind them."""
        pieces = self._pieces(text)
        numbers = {piece: self._join(piece) for piece in set(pieces)}
        return [number for piece in pieces for number in numbers[piece]]

    def decode(self, numbers: Iterable[int]) -> str:
        """The text of token numbers; bytes that are no UTF-8 become U+FFFD."""
        text = b""
        for token in (self.tokens[i] for i in numbers):
            text += token.encode() if token in self.control else bytes(self.byte[letter] for letter in token)
        return text.decode(errors="replace")

    def _pieces(self, text):
        split = _pattern("".join(sorted(c for c in set(text) if unicodedata.category(c)[0] == "N"))).findall
        if not self.control:
            return split(text)
        control = "|".join(map(re.escape, self.control))
        parts = re.split(f"({control})", text)
        return [piece for part in parts for piece in ([part] if part in self.control else split(part))]

    def _join(self, piece):
        if piece in self.control:
            return [self.number[piece]]
        parts = [self.letter[b] for b in piece.encode()]
        while len(parts) > 1:
            ranks = [self.rank.get(pair, len(self.rank)) for pair in zip(parts, parts[1:], strict=False)]
            i = min(range(len(ranks)), key=ranks.__getitem__)
            if ranks[i] == len(self.rank):
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return [self.number[part] for part in parts]


@functools.lru_cache
def _pattern(digits):
    """How text whose digits are these is cut into pieces."""
    digit = f"[{re.escape(digits)}]" if digits else "(?!)"
    letter = rf"(?:(?!{digit})[^\W_])"
    return re.compile(
        rf"'(?:[sdmt]|ll|re|ve)| ?{letter}+|{digit}| ?(?:[^\s\w]|_)+|\s+(?={digit})|\s+(?!\S)|\s+"
    )
