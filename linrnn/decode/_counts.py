"""How often a memory evaluates what, by formula: block evaluations at each level, and pairs of blocks that meet.

A job reads a prefix of `first` tokens in one call and then single tokens up to `last`: last - first + 1 calls.
Levels are those of `AttentionStack`: embeddings are level 0, the last layer level N.
"""

from dataclasses import dataclass
from math import comb

from linrnn.decode._stack import AttentionStack, tile_ranges


@dataclass(frozen=True)
class Counts:
    """Evaluations at each level, and pairs, own blocks included."""

    evaluations: tuple[int, ...]
    pairs: int


def count(stack: AttentionStack, memory: str, block_size: int, first: int, last: int) -> Counts:
    """Returns what a decoder counts on the job."""
    N, B = stack.n_layers, block_size
    calls = last - first + 1
    if memory == "kv":
        return Counts((blocks_of(first, B) + calls - 1,) * (N + 1), 0)
    if memory == "inputs":
        nb = blocks_of(first, B)
        prefix = sum(prefix_pairs(stack, level, nb, B) for level in range(1, N))
        prefix += 1 + tiles(stack, N, (nb - 1) * B, B)
        steps = sum(step_pairs(stack, level, first, last, B) for level in range(1, N + 1))
        return Counts((nb + calls - 1,) * N + (calls,), prefix + steps)
    if memory == "layerwise" and sees_all(stack):
        blocks, triangles = (recursion_until(k, last, B) - recursion_until(k, first - 1, B) for k in (1, 2))
        return Counts((blocks,) * N + (calls,), (N - 1) * triangles + blocks)
    if memory == "layerwise":
        inner = pairs = 0
        for nb, times in calls_by_blocks(first, last, B):
            inner += times * nb
            lower = sum(prefix_pairs(stack, level, nb, B) for level in range(1, N))
            pairs += times * (lower + 1 + tiles(stack, N, (nb - 1) * B, B))
        return Counts((inner,) * N + (calls,), pairs)
    evaluations = recursion(stack, B, first, last)
    return Counts(evaluations, sum(evaluations[:-1]))  # whatever is evaluated meets one frame above it


def recursion(stack: AttentionStack, block_size: int, first: int, last: int) -> tuple[int, ...]:
    """Counts block recursion: binomials where every layer sees everything, else by adding up what is seen."""
    N, B = stack.n_layers, block_size
    if sees_all(stack):
        return tuple(recursion_until(k, last, B) - recursion_until(k, first - 1, B) for k in range(N, -1, -1))
    nb = blocks_of(last, B)
    wanted = [0] * nb
    for n, times in calls_by_blocks(first, last, B):
        wanted[n - 1] = times
    counts = [sum(wanted)]
    for level in range(N, 0, -1):
        change = [0] * (nb + 1)
        for b, times in enumerate(wanted):
            for low, high in [*tile_ranges(stack.spans(level, b * B), b * B, B), (b, b + 1)]:
                change[low] += times
                change[high] -= times
        running, wanted = 0, []
        for delta in change[:nb]:
            running += delta
            wanted.append(running)
        counts.append(sum(wanted))
    return tuple(reversed(counts))


def sees_all(stack: AttentionStack) -> bool:
    """Whether no layer has a window."""
    return all(stack.mixer(level).window is None for level in range(1, stack.n_layers + 1))


def step_pairs(stack: AttentionStack, level: int, first: int, last: int, block_size: int) -> int:
    """Counts the pairs of one layer for the single tokens behind first ... last - 1 others."""
    if stack.mixer(level).window is None:
        seen = recursion_until(1, last - 1, block_size) - recursion_until(1, first - 1, block_size)
        return last - first + seen
    return sum(1 + tiles(stack, level, i, block_size) for i in range(first, last))


def recursion_until(k: int, tokens: int, block_size: int) -> int:
    """Sums C(ceil(i / B) + k - 1, k) over i = 1 ... tokens: evaluations k levels below the top."""
    whole, rest = divmod(tokens, block_size)
    return block_size * comb(whole + k, k + 1) + rest * comb(whole + k, k)


def blocks_of(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size)


def calls_by_blocks(first: int, last: int, block_size: int) -> list[tuple[int, int]]:
    """Returns (number of blocks, number of calls that read so many) for calls at lengths first ... last."""
    numbers = range(blocks_of(first, block_size), blocks_of(last, block_size) + 1)
    return [(n, min(last, n * block_size) - max(first - 1, (n - 1) * block_size)) for n in numbers]


def prefix_pairs(stack: AttentionStack, level: int, nb: int, block_size: int) -> int:
    """Counts the pairs of one layer over nb blocks."""
    if stack.mixer(level).window is None:
        return nb * (nb + 1) // 2
    return sum(1 + tiles(stack, level, b * block_size, block_size) for b in range(nb))


def tiles(stack: AttentionStack, level: int, start: int, block_size: int) -> int:
    """Counts the blocks of tokens before `start` that queries from there on see."""
    return sum(high - low for low, high in tile_ranges(stack.spans(level, start), start, block_size))
