from hypothesis import example, given
from hypothesis import strategies as st

from eagle3.tokens import pack


@st.composite
def loads(draw):
    """Lengths of conversations, and rows that hold the longest."""
    lengths = draw(st.lists(st.integers(1, 40), max_size=60))
    return lengths, draw(st.integers(max(lengths, default=1), 80))


def num_rows_by_best_fit(lengths, row_length):
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
            rooms.append(min(fitting) - length)
        else:
            rooms.append(row_length - length)
    return len(rooms)


@given(loads())
@example(([], 1))
@example(([5, 5, 5], 5))
def test_every_conversation_is_in_one_row_and_no_row_overflows(load):
    lengths, row_length = load
    rows = pack(lengths, row_length)
    assert list(range(len(lengths))) == sorted(index for row in rows for index in row)
    assert all(sum(lengths[index] for index in row) <= row_length for row in rows)


@given(loads())
def test_no_two_rows_would_fit_into_one(load):
    lengths, row_length = load
    rows = pack(lengths, row_length)
    filled = sorted(sum(lengths[index] for index in row) for row in rows)
    assert len(filled) < 2 or filled[0] + filled[1] > row_length


@given(loads())
def test_rows_are_as_many_as_best_fit_written_out_gives(load):
    lengths, row_length = load
    assert num_rows_by_best_fit(lengths, row_length) == len(pack(lengths, row_length))


def test_long_conversations_are_joined_by_what_fits_best():
    assert ((0, 3), (1, 4), (2, 5)) == pack([9, 8, 6, 1, 2, 4], 10)
