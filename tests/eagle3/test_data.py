import torch
from hypothesis import given
from hypothesis import strategies as st

from eagle3.data import BatchOrder, batches, collate, positions_of
from eagle3.tokens import EncodedData, Example


def make_data(*masks):
    examples = tuple(
        Example(input_ids=torch.full((len(mask),), index), loss_mask=torch.tensor(mask, dtype=torch.bool))
        for index, mask in enumerate(masks)
    )
    return EncodedData(examples=examples, num_dropped=0, num_truncated=0)


def test_padding_stands_on_the_right_and_is_not_supervised():
    batch = collate([[example] for example in make_data([0, 1, 1], [1]).examples], pad_id=9)
    assert batch.input_ids_BT.tolist() == [[0, 0, 0], [1, 9, 9]]
    assert batch.loss_mask_BT.tolist() == [[False, True, True], [True, False, False]]
    assert (batch.input_ids_BT.dtype, batch.loss_mask_BT.dtype) == (torch.int64, torch.bool)


@st.composite
def layouts(draw):
    """How many examples a run has, and how they are split."""
    return draw(st.integers(1, 40)), draw(st.integers(1, 4)), draw(st.integers(1, 5))


@given(layouts(), st.integers(0, 3), st.integers(0, 3))
def test_an_epoch_counts_every_example_once_over_all_ranks(layout, seed, epoch):
    num_rows, batch_size, world_size = layout
    orders = [
        BatchOrder(num_rows, batch_size=batch_size, rank=rank, world_size=world_size, seed=seed)
        for rank in range(world_size)
    ]
    steps = [list(order.epoch(epoch)) for order in orders]
    assert {-(-num_rows // (batch_size * world_size))} == {len(own) for own in steps}
    assert {batch_size} == {len(picks) for own in steps for picks in own}
    counted = sorted(pick.index for own in steps for picks in own for pick in picks if pick.supervised)
    assert list(range(num_rows)) == counted


@given(layouts(), st.integers(0, 12))
def test_a_later_start_continues_the_same_epoch(layout, start_step):
    num_rows, batch_size, world_size = layout
    order = BatchOrder(num_rows, batch_size=batch_size, rank=0, world_size=world_size, seed=1)
    start_row = start_step * batch_size * world_size
    assert list(order.epoch(2))[start_step:] == list(order.epoch(2, start_row=start_row))


@given(layouts(), st.integers(0, 40))
def test_any_ranks_go_on_in_the_same_order_behind_any_row(layout, start_row):
    num_rows, batch_size, world_size = layout
    whole = [
        pick.index
        for picks in BatchOrder(num_rows, batch_size=1, rank=0, world_size=1, seed=3).epoch(1)
        for pick in picks
    ]
    orders = [
        BatchOrder(num_rows, batch_size=batch_size, rank=rank, world_size=world_size, seed=3)
        for rank in range(world_size)
    ]
    steps = [list(order.epoch(1, start_row=start_row)) for order in orders]
    assert {max(0, orders[0].steps_from(start_row))} == {len(own) for own in steps}
    # A step deals its rows out to the ranks in turn.
    dealt = [own[step][place] for step in range(len(steps[0])) for place in range(batch_size) for own in steps]
    assert whole[start_row:] == [pick.index for pick in dealt if pick.supervised]


@given(st.integers(1, 40))
def test_a_step_holds_the_same_examples_however_many_ranks_split_it(num_rows):
    def counted(world_size):
        per_rank = [
            list(BatchOrder(num_rows, batch_size=4 // world_size, rank=r, world_size=world_size, seed=5).epoch(0))
            for r in range(world_size)
        ]
        return [{pick.index for picks in step for pick in picks} for step in zip(*per_rank, strict=True)]

    assert counted(1) == counted(2) == counted(4)


def test_seed_and_epoch_both_change_the_order():
    def indices(seed, epoch):
        order = BatchOrder(50, batch_size=50, rank=0, world_size=1, seed=seed)
        return tuple(pick.index for pick in next(order.epoch(epoch)))

    assert len({indices(0, 0), indices(0, 1), indices(1, 0), indices(1, 1)}) == 4


def test_repeats_that_fill_the_last_step_are_not_supervised():
    data = make_data([1, 1], [1, 1, 1], [1, 1])
    order = BatchOrder(3, batch_size=2, rank=0, world_size=1, seed=0)
    first, last = batches(data, order=order, epoch=0, pad_id=9)
    repeated = first.input_ids_BT[0, 0]
    assert repeated == last.input_ids_BT[1, 0]
    assert last.loss_mask_BT[0].any()
    assert not last.loss_mask_BT[1].any()
    assert data.examples[repeated].loss_mask.all()


def test_reading_batches_leaves_the_global_random_numbers_alone():
    state = torch.random.get_rng_state()
    list(batches(make_data([0, 1]), order=BatchOrder(1, batch_size=1, rank=0, world_size=1, seed=0), epoch=0, pad_id=0))
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_packed_row_tells_its_conversations_and_its_padding_apart():
    data = make_data([0, 1], [1], [0, 1, 1]).packed(6)
    batch = collate([[data.examples[index] for index in row] for row in ((0, 1), (2,))], pad_id=9, row_length=6)
    assert [[0, 0, 1, 9, 9, 9], [2, 2, 2, 9, 9, 9]] == batch.input_ids_BT.tolist()
    assert [[0, 0, 1, 2, 2, 2], [0, 0, 0, 1, 1, 1]] == batch.documents_BT.tolist()
    assert [[0, 1, 0, 0, 1, 2], [0, 1, 2, 0, 1, 2]] == positions_of(batch.documents_BT).tolist()
    assert [[False, True, True, False, False, False], [False, True, True, False, False, False]] == (
        batch.loss_mask_BT.tolist()
    )


def test_batches_of_packed_rows_hold_every_conversation_once():
    data = make_data(*([[1] * length for length in (3, 5, 2, 2, 4, 1, 6)])).packed(7)
    order = BatchOrder(data.num_rows, batch_size=2, rank=0, world_size=1, seed=3)
    seen = []
    for batch in batches(data, order=order, epoch=0, pad_id=9):
        assert (2, 7) == tuple(batch.input_ids_BT.shape)
        for row, ids, mask in zip(batch.examples, batch.input_ids_BT, batch.loss_mask_BT, strict=True):
            lengths = [data.examples[index].input_ids.numel() for index in row]
            assert [index for index, length in zip(row, lengths, strict=True) for _ in range(length)] == ids[
                : sum(lengths)
            ].tolist()
            if mask.any():
                seen += row
    assert list(range(7)) == sorted(seen)


def test_worker_processes_give_the_same_batches():
    data = make_data(*([[1] * length for length in (3, 5, 2, 2, 4)])).packed(7)
    order = BatchOrder(data.num_rows, batch_size=1, rank=0, world_size=1, seed=3)
    alone, helped = (
        [(batch.examples, batch.input_ids_BT.tolist(), batch.documents_BT.tolist()) for batch in stream]
        for stream in (
            batches(data, order=order, epoch=1, pad_id=9),
            batches(data, order=order, epoch=1, pad_id=9, num_workers=2),
        )
    )
    assert alone == helped
