"""Which conversations share a sample.

Best fit, the longest first: each goes into the fullest sample that still has room for it. That leaves little padding, and
it depends on the lengths alone: who shares a sample stays the same in every epoch, the number of samples too, and the
order in which samples come is a permutation as of any other data. So the sample at position n is a function of (seed, n),
and a run is resumed without walking through the epochs before. Neighbours in a sample do not see each other, so nothing
is learned from who they are.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

Pack = tuple[int, ...]
"""Numbers of the conversations in one sample, in their order there."""


def packed(lengths: Sequence[int], room: int) -> tuple[Pack, ...]:
    """Every conversation once; those of a sample have together at most `room` tokens.

    The rooms that are left are kept sorted, so a conversation costs a search among at most `room` of them.
    """
    packs: list[list[int]] = []
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda one: (-lengths[one], one)):
        assert 0 < lengths[number] <= room, f"{lengths[number]} tokens do not fit into {room}"
        place = bisect_left(rooms, lengths[number])
        if place == len(rooms):
            left, pack = room, len(packs)
            packs.append([])
        else:
            left = rooms[place]
            pack = by_room[left].pop()
            if not by_room[left]:
                del rooms[place]
        packs[pack].append(number)
        left -= lengths[number]
        if not by_room.setdefault(left, []):
            insort(rooms, left)
        by_room[left].append(pack)
    return tuple(sorted(tuple(sorted(pack)) for pack in packs))


def apart(lengths: Sequence[int]) -> tuple[Pack, ...]:
    """A sample for each conversation."""
    return tuple((number,) for number in range(len(lengths)))
