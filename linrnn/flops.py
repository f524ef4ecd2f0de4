"""How many multiplications a layer or a model needs for T tokens, and from which length on one needs more than another.

Counted are, for one sequence and the forward pass, multiplications of real numbers: a complex product is four of them,
a complex number times a real one two. An addition goes with nearly every one: FLOPs are twice as many.

- projections: products of a token with weights, one for each weight, and those that features of it are made of.
- recurrence: what mixes tokens. A recurrence is counted as it is written, token by token: the products that update the
  state (decay and input) and those that read it. Attention: the scores and their products with the values, 2 T² D for T
  tokens of D channels. A short convolution: one for each of its weights.

Attention counts for each query as many keys as the query that sees most does: T, whether it is causal or looks both
ways, though kernels may skip what is masked; min(T, window) with a window or in chunks. A pair has one score, though
ReRoPE may make two. The chunked forms that run over whole sequences do more multiplications than the recurrence that
they compute, but do them as products of matrices.

Not counted is what costs a few operations for each number of a token, or is a function of each score: norms, gates,
activations, softmax, rotary turns, constant scales, biases, skips (RWKV-7's bonus is one), token shifts, divisions. Nor
what parameters alone are made into once a call, such as eigenvalues.
"""

import functools
import itertools
import math
from collections.abc import Callable

from torch import nn

from linrnn._multiplications import count
from linrnn._recurrences import Length
from linrnn.layers.base import positive_int

PARTS = ("projections", "recurrence")
DEGREE = 3  # of a cost in T, at most: Nyström's iteration multiplies matrices of T x T as long as all are landmarks


def flops(layer: nn.Module, T: int, *, part: str | None = None) -> int:
    """Returns the multiplications (not twice that) of one sequence of T tokens through a layer or a model.

    See the module's documentation for what is counted. Of a model all layers, feed-forward networks and the head are
    counted (a classifier's once for a sequence, if it pools; with two inputs both of T tokens), embeddings of ids are
    not.

    ```python
    linrnn.flops(layers.build("attention", 512), 1024)  # 4 T D² + 2 T² D = 2147483648
    ```

    Args:
        layer: one of `linrnn.layers` or `linrnn.models`, torch.nn.Linear, norms and activations, or torch.nn.Sequential
            of these. Any other module says its own number, with its submodules', by a method `multiplications(T)` that
            returns the pair (projections, recurrence).
        T: number of tokens, at least 1.
        part: "projections", "recurrence", or None for their sum.

    Raises:
        TypeError: `layer`, or a part of it, is a module that nothing is known of.
        ValueError: T or part has none of these values.
    """
    if part not in (None, *PARTS):
        raise ValueError(f"part: expected 'projections', 'recurrence' or None, got {part!r}")
    return count(layer, Length(positive_int("T", T))).of(part)


def crossover(layer_a: nn.Module, layer_b: nn.Module, *, part: str | None = None, limit: int = 2**40) -> int | None:
    """Returns the least T at which `layer_a` needs more multiplications than `layer_b`; None if none up to `limit` is.

    Exact: between the lengths at which windows and chunks are full, the difference of two costs is a polynomial, and
    its first positive value is found by bisection on where it rises.

    Args:
        layer_a, layer_b: as in `flops`.
        part: as in `flops`.
        limit: the largest T that is considered.

    Raises:
        TypeError, ValueError: as `flops`; and ValueError where a module's own `multiplications` is no polynomial in T,
            of degree 3 at most.
    """
    positive_int("limit", limit)
    kinks: set[int] = set()

    def more(T: int) -> int:
        a, b = (count(layer, Length(T, kinks)).of(part) for layer in (layer_a, layer_b))
        return a - b

    flops(layer_a, 1, part=part)  # the errors of both
    if more(1) > 0:
        return 1
    ends = sorted({1, limit, *(T for T in kinks if 1 < T < limit)})
    for start, end in itertools.pairwise(ends):
        T = first_positive(more, start, end)
        if T is not None:
            return T
    return None


def first_positive(f: Callable[[int], int], start: int, end: int) -> int | None:
    """Returns the first T of start, ..., end with f(T) > 0, or None; f(start) <= 0, f a polynomial (see `DEGREE`)."""
    f = functools.cache(f)
    if end - start <= DEGREE:
        return next((T for T in range(start, end + 1) if f(T) > 0), None)
    check_polynomial(f, start, end)
    for a, b in itertools.pairwise(turns(f, start, end, DEGREE)):
        if f(b) > 0:
            return first(lambda T: f(T) > 0, a, b)
    return None


def check_polynomial(f: Callable[[int], int], start: int, end: int) -> None:
    """Raises ValueError unless values elsewhere in start, ..., end are those that the first few extend to."""
    differences = [f(start + i) for i in range(DEGREE + 1)]
    for i in range(1, DEGREE + 1):
        differences[i:] = [b - a for a, b in itertools.pairwise(differences[i - 1 :])]
    for T in (start + DEGREE + 1, (start + end) // 2, end):
        if f(T) != sum(math.comb(T - start, i) * difference for i, difference in enumerate(differences)):
            raise ValueError(
                f"multiplications: expected a polynomial of degree {DEGREE} or less from T = {start} to {end}"
            )


def turns(f: Callable[[int], int], start: int, end: int, degree: int) -> list[int]:
    """Returns start, where a polynomial f turns from rising to falling or back, and end."""
    if degree <= 1 or end - start <= 1:
        return [start, end]

    def slope(T: int) -> int:
        return f(T + 1) - f(T)

    def rises(T: int) -> bool:
        return slope(T) > 0

    def falls(T: int) -> bool:
        return slope(T) <= 0

    found = [start]
    for a, b in itertools.pairwise(turns(slope, start, end - 1, degree - 1)):  # the slope rises, or falls, from a to b
        if rises(a) != rises(b):
            found.append(first(rises if rises(b) else falls, a, b))
    return [*found, end]


def first(holds: Callable[[int], bool], low: int, high: int) -> int:
    """Returns the first T of low + 1, ..., high where `holds`: not at low, at high, and from the first on at all."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
