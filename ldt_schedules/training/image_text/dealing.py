"""Which sample of a global batch goes to which replica and microbatch, so that replicas have equal image work.

    given        replica 0   replica 1            dealt        replica 0   replica 1
    microbatch 0     900          0    max 900    microbatch 0     900        800    max 900
    microbatch 1       0        800    max 800    microbatch 1       0          0    max   0

Replicas work on microbatch m at the same time and meet at its end, or at the latest at the end of the step: what it
costs is its largest image load over the replicas, and a step costs the sum of those. Images differ in size far more
than texts do, which are padded to one length anyway, so the load is counted in patches.

First, samples sorted by load are cut into microbatches, as a maximum costs least where its neighbours are nearly as
large, and within each they go, largest first, to the replica with the least so far that has room. For one sample a
slot that is the optimum: the m-th largest of the maxima is at least the ((m - 1) R + 1)-st largest load, whatever the
deal. For more, pairs of samples are then exchanged while that lowers the cost, one of them from a slowest replica.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

Deal = tuple[tuple[tuple[int, ...], ...], ...]
"""deal[m][r]: places in the global batch of the samples in microbatch m of replica r."""


_Slot = tuple[int, int]
"""Number of the microbatch, of the replica."""


def given_order(num_samples: int, num_replicas: int, num_microbatches: int) -> Deal:
    """The deal without balancing: microbatches in order, each cut over the replicas."""
    size, rest = divmod(num_samples, num_replicas * num_microbatches)
    assert size and not rest, f"{num_samples} samples on {num_microbatches} microbatches of {num_replicas} replicas"
    return tuple(
        tuple(
            tuple(range((m * num_replicas + r) * size, (m * num_replicas + r + 1) * size)) for r in range(num_replicas)
        )
        for m in range(num_microbatches)
    )


def cost(deal: Deal, loads: Sequence[int]) -> int:
    """Patches on the slowest replica, summed over the microbatches."""
    return sum(max(sum(loads[place] for place in slot) for slot in microbatch) for microbatch in deal)


def encoder_dp_balance(loads: Sequence[int], num_replicas: int, num_microbatches: int) -> Deal:
    """Deal the samples of one global batch so that `cost` is small.

    Every sample comes exactly once, every slot has equally many. A function of its arguments alone: replicas that
    know all loads agree without a message. Never worse than `given_order`, which is returned unless it can be beaten.

    A step sees the same samples as without it, in other company. With `train.calculate_per_token_loss` each token weighs
    the same wherever its sample lies, so the gradient is the same up to the rounding of another order of sums. Without
    it a step's loss is the mean of its microbatches' means, and a sample in a microbatch with few learned tokens weighs
    more per token than one in a microbatch with many: another deal then weighs the samples otherwise.

    Args:
        loads: patches of each sample, in the order of the global batch.
    """
    given = given_order(len(loads), num_replicas, num_microbatches)
    size = len(given[0][0])
    order = sorted(range(len(loads)), key=lambda place: (-loads[place], place))
    share = num_replicas * size
    groups = [_spread(order[start : start + share], loads, num_replicas) for start in range(0, len(order), share)]
    if size > 1:
        _exchange(groups, loads)
    # Light and heavy microbatches stay mixed as they came; sorted, each step would begin with its heaviest.
    groups.sort(key=lambda group: min(min(slot) for slot in group))
    dealt = tuple(tuple(tuple(sorted(slot)) for slot in group) for group in groups)
    return dealt if cost(dealt, loads) < cost(given, loads) else given


def _spread(places: Sequence[int], loads: Sequence[int], num_replicas: int) -> list[list[int]]:
    """Equally many of `places` (heaviest first) to each replica, largest to the least loaded."""
    room = len(places) // num_replicas
    slots: list[list[int]] = [[] for _ in range(num_replicas)]
    sums = [0] * num_replicas
    for place in places:
        replica = min((r for r in range(num_replicas) if len(slots[r]) < room), key=lambda r: (sums[r], r))
        slots[replica].append(place)
        sums[replica] += loads[place]
    return slots


def _exchange(groups: list[list[list[int]]], loads: Sequence[int]) -> None:
    """Swap pairs in place while the sum of the maxima falls, a microbatch's most loaded slot giving one of them."""
    sums = [[sum(loads[place] for place in slot) for slot in group] for group in groups]
    slots = [(m, r) for m, group in enumerate(groups) for r in range(len(group))]
    improved = True
    while improved:
        improved = False
        for m in range(len(groups)):
            here = m, max(range(len(sums[m])), key=lambda r: (sums[m][r], -r))
            swaps = (swap for there in slots if there != here for swap in _swaps(groups, sums, loads, here, there))
            gain, there, i, j = max(swaps, default=(0, here, 0, 0), key=lambda swap: swap[0])
            if gain > 0:
                mine, theirs = groups[here[0]][here[1]], groups[there[0]][there[1]]
                less = loads[mine[i]] - loads[theirs[j]]
                mine[i], theirs[j] = theirs[j], mine[i]
                sums[here[0]][here[1]] -= less
                sums[there[0]][there[1]] += less
                improved = True


def _swaps(
    groups: list[list[list[int]]], sums: list[list[int]], loads: Sequence[int], here: _Slot, there: _Slot
) -> Iterator[tuple[int, _Slot, int, int]]:
    """`(gain, there, i, j)` of each swap of place i of `here`, a maximum of its microbatch, with a lighter j of `there`."""
    (m, r), (n, q) = here, there
    rest = max((sums[m][k] for k in range(len(sums[m])) if k != r and (m != n or k != q)), default=0)
    other = max((sums[n][k] for k in range(len(sums[n])) if k != q), default=0)
    before = sums[m][r] + (0 if m == n else max(sums[n][q], other))
    for i, out in enumerate(groups[m][r]):
        for j, back in enumerate(groups[n][q]):
            less = loads[out] - loads[back]
            if less > 0:
                mine, theirs = sums[m][r] - less, sums[n][q] + less
                after = max(rest, mine, theirs) if m == n else max(rest, mine) + max(other, theirs)
                yield before - after, there, i, j
