"""The vocabularies of texts: bytes as in the Long Range Arena, characters as in the loaders of S4 and its successors.

Both are fixed, so neither a model's size nor the ids depend on which rows a split happens to hold.
"""

from typing import Literal

from lra.tasks.base import Ids

Encoding = Literal["bytes", "characters"]

# The S4 loaders' vocabulary: what occurs at least 15 times in the first 4,095 characters of IMDB's training reviews.
# All of printable ASCII is in it, so it serves the ASCII of the Retrieval task as well.
CHARACTERS = (
    "\t"
    + "".join(map(chr, range(0x20, 0x7F)))
    + "\x84\x85\x91\x96\x97"  # quotation marks and dashes of Windows-1252, read as Latin-1
    + "¡£¨«´»½àáâãäåçèéêëíïñóôöúü–’“”"
)
UNKNOWN, END, FIRST = 2, 3, 4  # of the characters' ids; 0 is padding, 1 the mask
INPUTS: dict[Encoding, Ids] = {
    "bytes": Ids(258, pad_id=0, mask_id=257),
    "characters": Ids(FIRST + len(CHARACTERS), pad_id=0, mask_id=1),
}
