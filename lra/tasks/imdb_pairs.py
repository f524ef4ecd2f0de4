"""Pairs of reviews of one film and of two films, drawn so that only a comparison of the two tells which."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lra.tasks.draws import permutation

_REPAIRS = 100  # so many times partners are exchanged before giving up


class Reviews(NamedTuple):
    """n reviews of a source split: texts, labels (n,), films (n,) by number, and the row of each in the split (n,)."""

    texts: list[str]
    label: np.ndarray
    film: np.ndarray
    row: np.ndarray
    origin: int

    def where(self, kept: np.ndarray) -> Reviews:
        """Returns the reviews where `kept` (n,) is True."""
        at = np.flatnonzero(kept)
        return Reviews([self.texts[i] for i in at], self.label[at], self.film[at], self.row[at], self.origin)


def held_out(film: np.ndarray, seed: int) -> np.ndarray:
    """Draws whole films until they have a tenth of the reviews: whether each review is of one of them, (n,) bool."""
    films, number, count = np.unique(film, return_inverse=True, return_counts=True)
    order = permutation(len(films), seed)
    before = np.cumsum(count[order]) - count[order]
    held = np.empty(len(films), bool)
    held[order] = before < len(film) // 10
    return held[number]


def draw_pairs(
    film: np.ndarray, label: np.ndarray, rounds: int, *key: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws distinct pairs of reviews, in the random order of the key: first (m,), second (m,), same film or not (m,).

    A film's reviews meet as in a round-robin tournament of at most `rounds` rounds, once a round each. The pairs of two
    films have the same first reviews, and as second ones the same again, exchanged among pairs of the same two labels.
    So every review is in as many pairs of either kind, and the labels of a pair say nothing about its kind.

    Raises:
        ValueError: there are none of one film, or not as many of two, since one film has too many of the reviews.
    """
    pairs = _same_film(film, rounds, key)  # (p, 2)
    if len(pairs) == 0:
        raise ValueError(f"no two reviews of {len(film)} are of one film, so there are no pairs")
    # the review with the lower label first: the exchange below then cannot make a pair in both orders
    pairs = np.where((label[pairs[:, 0]] > label[pairs[:, 1]])[:, None], pairs[:, ::-1], pairs)
    other = pairs[:, 1].copy()
    kind = label[pairs].sum(axis=1)
    for k in np.unique(kind):
        of_kind = np.flatnonzero(kind == k)
        other[of_kind] = _exchange(pairs[of_kind], film, (*key, 2, int(k)))
    drawn = np.concatenate([pairs, np.stack([pairs[:, 0], other], axis=1)])
    same = np.repeat([1, 0], len(pairs))

    order = permutation(len(drawn), *key, 3)
    drawn, same = drawn[order], same[order]
    turned = permutation(len(drawn), *key, 4) % 2 == 1
    drawn[turned] = drawn[turned, ::-1]
    return drawn[:, 0], drawn[:, 1], same


def _same_film(film: np.ndarray, rounds: int, key: tuple[int, ...]) -> np.ndarray:
    """Pairs of reviews of one film, (p, 2): the first rounds of a tournament of each film's reviews."""
    order = permutation(len(film), *key, 1)
    order = order[np.argsort(film[order], kind="stable")]  # by film, and at random within a film
    pairs = []
    for members in np.split(order, np.flatnonzero(np.diff(film[order])) + 1):
        n = len(members) - 1 + len(members) % 2  # rounds of a whole tournament; an odd number of players rests one each
        for r in range(min(rounds, n)):
            # the circle method: r meets the player in the middle, who rests if there is none, and r + i meets r - i
            if len(members) % 2 == 0:
                pairs.append((members[r], members[n]))
            pairs.extend((members[(r + i) % n], members[(r - i) % n]) for i in range(1, (n + 1) // 2))
    return np.array(pairs, np.int64).reshape(-1, 2)


def _exchange(pairs: np.ndarray, film: np.ndarray, key: tuple[int, ...]) -> np.ndarray:
    """Second reviews in another order, (p,), so that no pair is of one film and none stands twice."""
    first, n = pairs[:, 0], len(pairs)
    second = pairs[permutation(n, *key, 1), 1]
    possible = 2 * np.bincount(film[first]).max() <= n  # each film's pairs need as many of the other films
    for attempt in range(_REPAIRS if possible else 0):
        wrong = film[first] == film[second]
        pair = np.minimum(first, second) * len(film) + np.maximum(first, second)
        repeated = np.ones(n, bool)
        repeated[np.unique(pair, return_index=True)[1]] = False
        at = np.flatnonzero(wrong | repeated)
        if len(at) == 0:
            return second
        for i, j in zip(at, permutation(n, *key, 2 + attempt), strict=False):
            second[[i, j]] = second[[j, i]]
    raise ValueError(
        f"no pairs of two films can be drawn from {n} pairs of one film: one film has too many of the reviews, "
        "or there are too few reviews"
    )
