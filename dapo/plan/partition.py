"""Numbers into balanced parts: Karmarkar-Karp differencing, bins with a hard limit, and an exchange that evens out.

`balanced_partition`, its `equal_size` (exchanges without `moves`) and `micro_batches` are what the reference's
balancing schema asks for; the parity tests compare them. Packs are made by `fill_bins`.
"""

from __future__ import annotations

import heapq
import itertools
import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any, TypeAlias

from dapo.errors import DataError

Parts = list[list[int]]
"""Indices of the items in each part."""

_Part: TypeAlias = tuple[float, int, int, Any]
"""(sum, items, number, items as nested pairs); the number is unique and keeps comparisons away from the items."""


def balanced_partition(costs: Sequence[float], parts: int, *, equal_size: bool = False) -> Parts:
    """Split items into `parts` non-empty parts of nearly equal cost.

    Largest differencing (Karmarkar and Karp 1982), then exchanges between the heaviest and the lightest part. About
    n log n: a set of differences holds only the parts that are not empty yet.

    Args:
        equal_size: every part gets the same number of items.

    Raises:
        DataError: fewer items than parts, or not divisible with `equal_size`.
    """
    n = len(costs)
    if parts < 1 or n < parts:
        raise DataError(f"{n} items cannot make {parts} non-empty parts")
    if equal_size and n % parts:
        raise DataError(f"{n} items cannot make {parts} parts of equal size: {n} is not a multiple of {parts}")
    result = _largest_differencing(costs, parts, equal_size)
    _even_out(result, costs, moves=not equal_size)
    return [sorted(part) for part in result]


def micro_batches(
    tokens: Sequence[int],
    limit: int,
    *,
    costs: Sequence[float] | None = None,
    multiple_of: int = 1,
    at_least: int = 1,
) -> Parts:
    """Sequences into as few non-empty batches of at most `limit` tokens as we can, of nearly equal cost.

    Args:
        costs: what to balance; the token counts where not given.
        multiple_of: the number of batches is a multiple of this.

    Raises:
        DataError: a sequence is longer than `limit`, or there are fewer sequences than batches asked for.
    """
    bins = fill_bins(tokens, tokens if costs is None else costs, limit, multiple_of=multiple_of, at_least=at_least)
    if not all(bins):
        raise DataError(f"{len(tokens)} sequences cannot make {len(bins)} non-empty micro-batches")
    return bins


def fill_bins(
    tokens: Sequence[int], costs: Sequence[float], limit: int, *, multiple_of: int = 1, at_least: int = 1
) -> Parts:
    """Items into bins of at most `limit` tokens, balanced by cost; bins may stay empty to reach `multiple_of`.

    Raises:
        DataError: an item has more than `limit` tokens.
    """
    for index, size in enumerate(tokens):
        if size > limit:
            raise DataError(f"item {index} has {size} tokens and does not fit into a limit of {limit}")
    fewest = math.ceil(max(at_least, sum(tokens) / limit, 1) / multiple_of)
    fallback = _best_fit(tokens, limit)
    most = max(math.ceil(len(fallback) / multiple_of), fewest)
    if bins := _within_limit(tokens, costs, limit, fewest * multiple_of):
        return bins
    # More bins are easier to fill: a search by halves between what cannot be enough and what is.
    best = None
    while fewest + 1 < most:
        middle = (fewest + most) // 2
        if bins := _within_limit(tokens, costs, limit, middle * multiple_of):
            best, most = bins, middle
        else:
            fewest = middle
    if best is None:
        best = _within_limit(tokens, costs, limit, most * multiple_of)
    return best or _evened(fallback + [[] for _ in range(most * multiple_of - len(fallback))], tokens, costs, limit)


def _within_limit(tokens: Sequence[int], costs: Sequence[float], limit: int, count: int) -> Parts | None:
    """`count` bins balanced by cost if differencing, or else a greedy pass, happens to respect the limit."""
    if count >= len(tokens):
        return [[i] for i in range(len(tokens))] + [[] for _ in range(count - len(tokens))]
    bins = _largest_differencing(costs, count, equal_size=False)
    if any(sum(tokens[i] for i in part) > limit for part in bins):
        greedy = _lightest_first(tokens, costs, limit, count)
        if greedy is None:
            return None
        bins = greedy
    return _evened(bins, tokens, costs, limit)


def _evened(bins: Parts, tokens: Sequence[int], costs: Sequence[float], limit: int) -> Parts:
    _even_out(bins, costs, tokens=tokens, limit=limit)
    return [sorted(part) for part in bins]


def _best_fit(tokens: Sequence[int], limit: int) -> Parts:
    """Best-fit decreasing: few bins, whatever their cost. At most 11/9 of the optimum + 1 (Johnson 1973)."""
    bins: Parts = []
    room: list[tuple[int, int]] = []
    for i in sorted(range(len(tokens)), key=lambda i: -tokens[i]):
        at = bisect_left(room, (tokens[i], -1))
        left, index = room.pop(at) if at < len(room) else (limit, len(bins))
        if index == len(bins):
            bins.append([])
        bins[index].append(i)
        insort(room, (left - tokens[i], index))
    return bins


def _lightest_first(tokens: Sequence[int], costs: Sequence[float], limit: int, count: int) -> Parts | None:
    """Longest first, each into the cheapest bin that has room; None where one finds no room."""
    bins: Parts = [[] for _ in range(count)]
    heap = [(0.0, 0, index) for index in range(count)]
    for i in sorted(range(len(tokens)), key=lambda i: (-tokens[i], -costs[i])):
        full = []
        while heap and heap[0][1] + tokens[i] > limit:
            full.append(heapq.heappop(heap))
        if not heap:
            return None
        cost, held, index = heap[0]
        heapq.heapreplace(heap, (cost + costs[i], held + tokens[i], index))
        bins[index].append(i)
        for entry in full:
            heapq.heappush(heap, entry)
    return bins


def _largest_differencing(costs: Sequence[float], parts: int, equal_size: bool) -> Parts:
    """Merge the two most uneven partial partitions, heaviest part on lightest, until one is left.

    A partial partition is an ascending list of its parts; those still empty are not stored, and items are pairs nested
    by merging and flattened at the end, so that a merge copies next to nothing.
    """
    number = itertools.count()
    order = sorted(range(len(costs)), key=lambda i: (costs[i], i))
    width = parts if equal_size else 1
    heap: list[tuple[float, float, int, list[_Part]]] = []

    def push(state: list[_Part]) -> None:
        lightest = state[0][0] if len(state) == parts else 0.0
        heapq.heappush(heap, (lightest - state[-1][0], -state[-1][0], next(number), state))

    for at in range(0, len(order), width):
        push([(costs[i], 1, next(number), i) for i in order[at : at + width]])
    while len(heap) > 1:
        one, other = heapq.heappop(heap)[3], heapq.heappop(heap)[3]
        if len(one) < len(other):
            one, other = other, one
        # The heaviest of `other` fill what is empty in `one`; the rest meet its lightest, heavy on light.
        meeting = max(len(one) + len(other) - parts, 0)
        pairs = zip(one[:meeting], reversed(other[:meeting]), strict=True)
        changed = [(a[0] + b[0], a[1] + b[1], next(number), (a[3], b[3])) for a, b in pairs] + other[meeting:]
        merged = one[meeting:]
        if len(changed) == 1:
            insort(merged, changed[0])
        else:
            merged = sorted(merged + changed)
        push(merged)
    filled = [_flatten(part[3]) for part in heap[0][3]] if heap else []
    return filled + [[] for _ in range(parts - len(filled))]


def _flatten(items: Any) -> list[int]:
    flat, stack = [], [items]
    while stack:
        item = stack.pop()
        if isinstance(item, tuple):
            stack.extend(item)
        else:
            flat.append(item)
    return flat


def _even_out(
    bins: Parts,
    costs: Sequence[float],
    *,
    moves: bool = True,
    tokens: Sequence[int] | None = None,
    limit: int = 0,
) -> None:
    """Move or swap items between the heaviest and the lightest bin, in place, while it narrows their gap.

    Both end strictly inside the old gap, so that neither the largest cost nor the spread can grow.

    Args:
        moves: an item may change bins alone; False: sizes are kept.
        tokens, limit: with them, no bin may come to hold more than `limit` tokens.
    """
    loads = [sum(costs[i] for i in part) for part in bins]
    for _ in range(4 * len(bins)):
        heavy, light = max(range(len(bins)), key=loads.__getitem__), min(range(len(bins)), key=loads.__getitem__)
        found = _best_exchange(bins[heavy], bins[light], loads[heavy] - loads[light], costs, moves, tokens, limit)
        if found is None:
            return
        down, up = found
        bins[heavy].remove(down)
        bins[light].append(down)
        if up is not None:
            bins[light].remove(up)
            bins[heavy].append(up)
        for part in (heavy, light):
            loads[part] = sum(costs[i] for i in bins[part])


def _best_exchange(
    heavy: list[int],
    light: list[int],
    gap: float,
    costs: Sequence[float],
    moves: bool,
    tokens: Sequence[int] | None,
    limit: int,
) -> tuple[int, int | None] | None:
    """(item that goes down, item that comes up or None) whose exchange leaves the smallest gap; None: none helps."""
    ups: list[tuple[float, int | None]] = sorted(((costs[i], i) for i in light), key=lambda up: up[0])
    if moves and len(heavy) > 1:
        ups.insert(0, (0.0, None))
    keys = [cost for cost, _ in ups]
    room = None
    if tokens is not None:
        room = limit - sum(tokens[i] for i in light), limit - sum(tokens[i] for i in heavy)
    best, result = gap / 2 * (1 - 1e-12), None
    for down in heavy:
        at = bisect_left(keys, costs[down] - gap / 2)
        for cost, up in ups[max(at - 1, 0) : at + 1]:
            off = abs(costs[down] - cost - gap / 2)
            if off >= best:
                continue
            if room is not None and tokens is not None:
                grows = tokens[down] - (0 if up is None else tokens[up])
                if grows > room[0] or -grows > room[1]:
                    continue
            best, result = off, (down, up)
    return result
