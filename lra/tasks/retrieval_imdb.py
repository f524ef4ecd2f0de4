"""RetrievalIMDB: do two reviews concern the same film? A task in the shape of the Long Range Arena's Retrieval.

It is no substitute for Retrieval's numbers, only for its shape: two texts of up to 4,000 bytes, read apart, and a
question about both. The reviews are IMDB's (Maas et al. 2011), whose original archive tells the film of each.

What a network could answer without comparing the texts is taken out of the pairs. Each review stands in as many pairs
of two films as in pairs of one film, so nothing in one text says anything about the label; and the opinions of the two
reviews agree as often in pairs of two films as in pairs of one, so they do not either.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lra.checks import check
from lra.tasks.base import SPLITS, Split
from lra.tasks.retrieval import Pairs, TextPairs
from lra.tasks.text import COLUMNS, reviews_of

if TYPE_CHECKING:
    from datasets import Dataset

    from lra.tasks.imdb_pairs import Reviews


_FILMS = (
    "train-films.parquet and test-films.parquet with a text column film (of each review the film's id in urls_pos.txt "
    "and urls_neg.txt of the original archive, aclImdb_v1)"
)


@dataclass(frozen=True, kw_only=True)
class RetrievalIMDB(TextPairs):
    """Pairs of IMDB's reviews, half of them of the same film.

    The splits have the columns input_ids and input_ids_2 (uint8 tokens), label (1: the same film), index and index_2
    (of the rows in the source split) and origin (0: the source's training reviews, 1: its test reviews). No film, and
    no text, is in two splits: a tenth of the training reviews, by whole films, is for validation, and test reviews of
    training films are left out.
    """

    rounds: int = 4
    """Most training pairs of a review with others of its film; it has as many with other films. 1 in val and test."""

    name: ClassVar[str] = "retrieval_imdb"
    summary: ClassVar[str] = "do two IMDB reviews concern the same film? (Retrieval's shape; needs film ids)"
    folders: ClassVar[tuple[str, ...]] = ("imdb",)

    def check(self) -> None:
        super().check()
        check(self.rounds >= 1, "rounds", self.rounds, "at least 1")

    def generate(self, workers: int | None, data_dir: Path | None) -> dict[str, Dataset]:
        """Returns the splits; see the base. It takes seconds, and one thread.

        Raises:
            ValueError: the source or its films cannot be read, or there are too few pairs.
        """
        from tqdm.auto import tqdm

        reviews = self.read(data_dir)
        progress = tqdm(SPLITS, desc=f"{self.name} pairs", unit="split", disable=None, leave=False)
        return {split: self._pairs(split, reviews[split], i).dataset() for i, split in enumerate(progress)}

    def source(self, data_dir: Path | None, hashes: bool = True) -> dict[str, Any]:
        from lra.tasks.sources import describe_files, find_files

        folder = self._folder(data_dir)
        shards = [path for paths in find_files(self, folder).values() for path in paths]
        return describe_files([*shards, *self._films(folder).values()], hashes)

    def read(self, data_dir: Path | None) -> dict[Split, Reviews]:
        """Returns the reviews of each split, all of different texts."""
        import numpy as np

        from lra.tasks.imdb_pairs import Reviews, held_out
        from lra.tasks.sources import SourceError, read_columns, read_source

        folder = self._folder(data_dir)
        source = read_source(self, folder, COLUMNS)
        films = {
            split: read_columns(path, {"film": "text"}).column("film").to_pylist()
            for split, path in self._films(folder).items()
        }
        numbers = {film: i for i, film in enumerate(dict.fromkeys([*films["train"], *films["test"]]))}
        seen: set[str] = set()
        read = []
        for origin, (split, rows) in enumerate(source.items()):
            texts, labels = reviews_of(rows, split)
            if len(films[split]) != len(texts):
                path = self._films(folder)[split]
                raise SourceError(
                    f"{path} must have a row for each of the {len(texts)} reviews; it has {len(films[split])}"
                )
            new = []  # a text that stands twice would be on two sides, or of two films
            for text in texts:
                new.append(text not in seen)
                seen.add(text)
            film = np.array([numbers[film] for film in films[split]])
            read.append(Reviews(texts, labels, film, np.arange(len(texts)), origin).where(np.array(new)))
        train, test = read
        held = held_out(train.film, self.seed)
        return {
            "train": train.where(~held),
            "val": train.where(held),
            "test": test.where(~np.isin(test.film, train.film)),
        }

    def _pairs(self, split: Split, reviews: Reviews, stream: int) -> Pairs:
        import numpy as np

        from lra.tasks.imdb_pairs import draw_pairs
        from lra.tasks.sources import count_rows
        from lra.tasks.text_encoding import encode

        rounds = self.rounds if split == "train" else 1
        drawn = draw_pairs(reviews.film, reviews.label, rounds, self.seed, 1 + stream)
        n = count_rows(self, {split: len(drawn[0])}, self.benchmark_rows)[split]
        first, second, label = (column[:n] for column in drawn)
        tokens = encode(reviews.texts, self.encoding, self.max_tokens)
        more = {
            "index": reviews.row[first].astype(np.int32),
            "index_2": reviews.row[second].astype(np.int32),
            "origin": np.full(n, reviews.origin, np.uint8),
        }
        return Pairs(tokens.take(first), tokens.take(second), label, more)

    def _folder(self, data_dir: Path | None) -> Path:
        from lra.tasks.sources import SourceError

        if data_dir is None:
            raise SourceError(
                "task 'retrieval_imdb' needs --data-dir DIR, a folder with IMDB's train*.parquet and test*.parquet, "
                f"and row by row beside them {_FILMS}: the hub's copy of IMDB does not tell the films"
            )
        return Path(data_dir)

    def _films(self, folder: Path) -> dict[str, Path]:
        """Returns the files of the films, which lie beside those of the reviews."""
        from lra.tasks.sources import SourceError, find_files

        paths = {split: files[0].parent / f"{split}-films.parquet" for split, files in find_files(self, folder).items()}
        for path in paths.values():
            if not path.is_file():
                raise SourceError(f"there is no {path}: beside IMDB's reviews task 'retrieval_imdb' needs {_FILMS}")
        return paths
