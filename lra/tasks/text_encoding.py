"""Texts to tokens and back, in one of the vocabularies of `lra.tasks.vocabularies`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lra.tasks.vocabularies import CHARACTERS, END, FIRST, INPUTS, UNKNOWN, Encoding

if TYPE_CHECKING:
    import pyarrow as pa


class Tokens(NamedTuple):
    """Texts one after the other: tokens (sum of lengths,) uint8, and the length of each text."""

    tokens: np.ndarray
    length: np.ndarray

    def take(self, index: np.ndarray) -> Tokens:
        """Returns the texts at `index`, in that order."""
        start = np.cumsum(self.length) - self.length
        rows = [self.tokens[s : s + n] for s, n in zip(start[index], self.length[index], strict=True)]
        return Tokens(np.concatenate(rows) if rows else self.tokens[:0], self.length[index])

    @staticmethod
    def concatenate(parts: Sequence[Tokens]) -> Tokens:
        return Tokens(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))

    def column(self) -> pa.ListArray:
        """Returns the texts as an Arrow column, a list of uint8 for each."""
        import pyarrow as pa

        offsets = np.concatenate([[0], np.cumsum(self.length)]).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(self.tokens))


def encode(texts: Sequence[str], encoding: Encoding, max_tokens: int) -> Tokens:
    """Maps texts to tokens, at most `max_tokens` of each; what is beyond is cut off.

    bytes: byte b of UTF-8 is b + 1; there is no end token. characters: those of `CHARACTERS` are 4, 5, ..., any other
    is 2, and the end token 3 follows, within `max_tokens`. An empty text is read as one space: no sequence is empty.
    """
    if encoding == "bytes":
        # a character has at least one byte, and no byte of UTF-8 is 255
        cut = [(text or " ")[:max_tokens].encode()[:max_tokens] for text in texts]
        return Tokens(np.frombuffer(b"".join(cut), np.uint8) + np.uint8(1), _lengths(cut))
    ended = [(text or " ")[: max_tokens - 1] + " " for text in texts]
    length = _lengths(ended)
    tokens = _table()[np.frombuffer("".join(ended).encode("utf-32-le"), "<u4")]
    tokens[np.cumsum(length) - 1] = END
    return Tokens(tokens, length)


def decode(ids: Sequence[int], encoding: Encoding) -> str:
    """Maps token ids to text: a byte sequence that was cut within a character, and an unknown one, become U+FFFD.

    Raises:
        ValueError: an id that stands for no byte or character.
    """
    first, most = (1, 256) if encoding == "bytes" else (UNKNOWN, INPUTS["characters"].vocab_size - 1)
    for i in ids:
        if not first <= i <= most:
            raise ValueError(f"ids must lie in {first}..{most}; got {i}")
    if encoding == "bytes":
        return bytes(i - 1 for i in ids).decode(errors="replace")
    return "".join(CHARACTERS[i - FIRST] if i >= FIRST else "\ufffd" for i in ids if i != END)


def _lengths(texts: Sequence[str] | Sequence[bytes]) -> np.ndarray:
    return np.fromiter(map(len, texts), np.int64, len(texts))


@cache
def _table() -> np.ndarray:
    """The id of every code point."""
    table = np.full(0x110000, UNKNOWN, np.uint8)
    table[[ord(character) for character in CHARACTERS]] = np.arange(FIRST, FIRST + len(CHARACTERS))
    return table
