"""How many multiplications a layer or a model needs for T tokens, and from which length on one needs more than another.

Counted are, for one sequence and the forward pass, multiplications of real numbers: a complex product is four of them,
a complex number times a real one two. An addition goes with nearly every one: FLOPs are twice as many.

- projections: products of a token with weights, one for each weight, and those that features of it are made of.
- recurrence: what mixes tokens. A recurrence is counted as it is written, token by token: the products that update the
  state (decay and input) and those that read it. Attention: the scores and their products with the values, 2 T² D for T
  tokens of D channels. A short convolution: one for each of its weights.

Attention counts for each query as many keys as the query that sees most does: T, whether it is causal or looks both
ways, though kernels may skip what is masked; min(T, window) with a window or in chunks. The chunked forms that run over
whole sequences do more multiplications than the recurrence that they compute, but do them as products of matrices.

Not counted is what costs a few operations for each number of a token, or is a function of each score: norms, gates,
activations, softmax, rotary turns, constant scales, biases, skips (RWKV-7's bonus is one), token shifts, divisions. Nor
what parameters alone are made into once a call, such as eigenvalues.
"""

import itertools
from collections.abc import Callable

from torch import nn

from linrnn._multiplications import Length, count
from linrnn.layers.base import positive_int

PARTS = ("projections", "recurrence")


def flops(layer: nn.Module, T: int, *, part: str | None = None) -> int:
    """Returns the multiplications (not twice that) of one sequence of T tokens through a layer or a model.

    See the module's documentation for what is counted. Of a model all layers, feed-forward networks and the head are
    counted (a classifier's once for a sequence, and with two inputs both of T tokens), embeddings of ids are not.

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

    Exact: between the lengths at which a window or a chunk is full, the difference of two costs is a polynomial of
    degree two, and its first positive value is found by bisection on where that grows.

    Args:
        layer_a, layer_b: as in `flops`.
        part: as in `flops`.
        limit: the largest T that is considered.

    Raises:
        TypeError, ValueError: as `flops`; and where a module's own `multiplications` is no polynomial of degree two.
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
    """Returns the first T of start, ..., end with f(T) > 0, or None; f is a polynomial of degree two, f(start) <= 0."""
    if end - start < 4:
        return next((T for T in range(start, end + 1) if f(T) > 0), None)
    f0, slope, bend = f(start), f(start + 1) - f(start), f(start + 2) - 2 * f(start + 1) + f(start)
    for T in (start + 3, (start + end) // 2, end):
        k = T - start
        if f(T) != f0 + k * slope + k * (k - 1) // 2 * bend:
            raise ValueError(
                f"multiplications: expected a polynomial of degree two from T = {start} to {end}, got others"
            )
    # from f(start) <= 0 on, f changes its sign once at most where it bends upwards, or before its largest value
    top = end if bend >= 0 else min(end, start + max(0, -(slope // bend)))
    if f(top) <= 0:
        return None
    low = start  # f(low) <= 0 < f(top)
    while top - low > 1:
        middle = (low + top) // 2
        low, top = (low, middle) if f(middle) > 0 else (middle, top)
    return top
