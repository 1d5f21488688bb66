"""Step 5: which conversations stand side by side in one row of tokens."""

from collections.abc import Sequence


def pack(lengths: Sequence[int], row_length: int) -> tuple[tuple[int, ...], ...]:
    """Puts each conversation into the fullest row that still has room for it, long ones first.

    Best fit in falling order leaves at most 11/9 of the rows that would be needed at least (Johnson et al. 1974, SIAM
    J. Comput. 3(4)), and on chat data a few percent of padding. It depends on the lengths alone.

    Args:
        lengths: Tokens of each conversation, from 1 to `row_length`.
        row_length: Tokens of a row.

    Returns:
        The rows, each a tuple of indices into `lengths`, ascending; every index is in exactly one row.
    """
    assert all(0 < length <= row_length for length in lengths)
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(row_length + 1)]
    # Bit r is set if some row has room for exactly r more tokens, so the best fit is one shift away.
    rooms = 0
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        length = lengths[index]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = row_length, len(rows)
            rows.append([])
        rows[row].append(index)
        by_room[room - length].append(row)
        rooms |= 1 << (room - length)
    return tuple(tuple(sorted(row)) for row in rows)
