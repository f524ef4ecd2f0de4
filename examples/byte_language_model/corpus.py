"""Text as bytes: files, split into training, validation and test by a hash of their names."""

import hashlib
import sysconfig
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

PARTS = ("train", "validation", "test")
END = 0  # the byte behind every document
NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})
FEWEST_FILES, PIECES = 40, 200
LONG_LINE = 25  # characters; shorter ones (`return None`) are alike without being copied


@dataclass(frozen=True)
class Corpus:
    """Documents, each in one part, and each part as one uint8 tensor with a zero byte behind every document."""

    train: Tensor
    validation: Tensor
    test: Tensor
    names: dict[str, tuple[str, ...]]
    fingerprint: str

    def describe(self) -> dict[str, object]:
        """What a results file says of it: documents and bytes of each part, and a hash of all of it."""
        sizes = {part: {"documents": len(self.names[part]), "bytes": getattr(self, part).numel()} for part in PARTS}
        return {**sizes, "fingerprint": self.fingerprint}

    @cached_property
    def repeated(self) -> float:
        """The share of the test text's lines of 25 characters or more, by bytes, that the training text has too."""
        held_out, training = map(lines, (self.test, self.train))
        long = [line for line in held_out if len(line) >= LONG_LINE]
        wanted = set(long)
        known = {line for line in training if line in wanted}
        return sum(len(line) for line in long if line in known) / max(1, sum(map(len, long)))


def standard_library() -> dict[str, bytes]:
    """The Python source files of the standard library; without its tests, which some distributions leave out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return read([root], "*.py", NOT_LIBRARY)


def read(paths: Iterable[str | Path], pattern: str = "*", without: Collection[str] = ()) -> dict[str, bytes]:
    """Maps names to contents: files as they are, of folders the files below them that match `pattern`.

    A file below a folder is called by its path from there, so that names do not depend on the machine. Hidden files and
    folders, `__pycache__`, folders whose name is in `without`, empty files and second copies of a content are left out.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: no file is left, a file that was named is empty, or two have the same name.
    """
    found: dict[str, Path] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"text: {path} does not exist")
        if path.is_dir():
            files = {file.relative_to(path).as_posix(): file for file in below(path, pattern, without)}
        else:
            files = {path.name: path}
            if not path.stat().st_size:
                raise ValueError(f"text: {path} is empty")
        for name in files:
            if name in found:
                raise ValueError(f"text: two files are called {name!r}, {found[name]} and {files[name]}; rename one")
        found |= files
    contents: dict[str, bytes] = {}
    seen: set[bytes] = set()
    for name in sorted(found):
        content = found[name].read_bytes()
        digest = hashlib.sha256(content).digest()
        if content and digest not in seen:
            contents[name] = content
            seen.add(digest)
    if not contents:
        raise ValueError(f"text: no file that matches {pattern!r} and holds something in {[str(p) for p in paths]}")
    return contents


def below(folder: Path, pattern: str, without: Collection[str]) -> list[Path]:
    """The files below a folder that `read` takes."""
    return [
        file
        for file in folder.rglob(pattern)
        if file.is_file()
        and not any(
            part.startswith(".") or part == "__pycache__" or part in without for part in file.relative_to(folder).parts
        )
    ]


def split(contents: dict[str, bytes]) -> Corpus:
    """Puts nine documents of ten into training, and one of twenty each into validation and test.

    The hash of a document's name says where it goes, so that it stays there when others come or go. A document is a
    file; fewer than 40 files are cut into some 200 pieces first, whose neighbours may lie in other parts.

    Raises:
        ValueError: a part would be empty.
    """
    documents = contents if len(contents) >= FEWEST_FILES else pieces(contents)
    names: dict[str, list[str]] = {part: [] for part in PARTS}
    for name in sorted(documents):
        bucket = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) % 20
        names[("test", "validation", "train")[min(bucket, 2)]].append(name)
    empty = [part for part in PARTS if not names[part]]
    if empty:
        raise ValueError(f"text: too short, {len(documents)} documents leave none for {', '.join(empty)}; pass more")
    whole = hashlib.sha256()
    for name in sorted(documents):
        whole.update(hashlib.sha256(name.encode()).digest() + hashlib.sha256(documents[name]).digest())
    return Corpus(
        **{part: joined(documents[name] for name in names[part]) for part in PARTS},
        names={part: tuple(names[part]) for part in PARTS},
        fingerprint=whole.hexdigest()[:16],
    )


def pieces(contents: dict[str, bytes]) -> dict[str, bytes]:
    """Cuts files into pieces of equal size, numbered behind their name."""
    size = max(1, sum(map(len, contents.values())) // PIECES)
    return {
        f"{name}#{start // size}": content[start : start + size]
        for name, content in contents.items()
        for start in range(0, len(content), size)
    }


def joined(documents: Iterable[bytes]) -> Tensor:
    data = b"".join(document + bytes([END]) for document in documents)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def lines(text: Tensor) -> list[bytes]:
    """The lines of all documents, without the space around them."""
    return [line.strip() for line in text.numpy().tobytes().replace(bytes([END]), b"\n").split(b"\n")]


def training_batch(text: Tensor, seed: int, step: int, chunks: int, length: int) -> Tensor:
    """Chunks of length + 1 bytes at random places, (chunks, length + 1) int64: a function of seed and step alone."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + step)
    starts = torch.randint(text.numel() - length, (chunks, 1), generator=generator)
    return text[starts + torch.arange(length + 1)].long()


def held_out_chunks(text: Tensor, most_bytes: int, length: int) -> Tensor:
    """Chunks of length + 1 bytes at equal distances, which predict at most `most_bytes`, none of them twice."""
    count = max(1, min(most_bytes, text.numel() - 1) // length)
    starts = torch.arange(count)[:, None] * ((text.numel() - 1) // count)
    return text[starts + torch.arange(length + 1)].long()


def windows(chunks: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Cuts chunks (n, m length + 1) into inputs and targets (n m, length): the same targets at every length."""
    return chunks[:, :-1].reshape(-1, length), chunks[:, 1:].reshape(-1, length)


def check_long_enough(corpus: Corpus, length: int) -> None:
    """Raises ValueError unless every part holds a chunk of `length` + 1 bytes."""
    for part in PARTS:
        held = getattr(corpus, part).numel()
        if held <= length:
            raise ValueError(f"text: too short, {part} holds {held} bytes; windows of {length} need {length + 1}")


def unigram_bits(corpus: Corpus, chunks: Tensor) -> float:
    """Bits per byte of the training text's byte frequencies, on the targets of `chunks`."""
    counts = torch.bincount(corpus.train.long(), minlength=256).double() + 1
    return float(-(counts / counts.sum()).log2()[chunks[:, 1:]].mean())


def load(paths: Sequence[str], pattern: str | None) -> Corpus:
    """The corpus of a command line: of the standard library if no paths are given."""
    return split(read(paths, pattern or "*") if paths else standard_library())
