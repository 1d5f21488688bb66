"""Query, key and value heads: the sum of a state's and a token's half, rotated by position, and its gradient.

The input of the draft's attention is a normed token embedding beside a normed state, so its projection is a sum of two
halves, and the token's half is the same for all rows and steps that read that token. So is the rotation: the row of
token c - 1 - i reads token c at step i, at position c - 1.

Shape suffixes: M rows, W = (Q + 2K)d projected width, Q query heads, K key and value heads, d head dimension, L = BT
tokens of the batch, N rows that carry loss, S steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eagle3.kernels import jit, next_power_of_2, tl, widened


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """How a projected row divides into heads, the queries first, then keys, then values, and what rotates them.

    Attributes:
        num_queries: Query heads, a multiple of `num_keys`.
        num_keys: Key heads, and as many value heads.
        head_dim: Elements of a head, even.
        cos: Cosines of every position a batch needs: (positions, d / 2), times the rope's scaling.
        sin: Their sines.
    """

    num_queries: int
    num_keys: int
    head_dim: int
    cos: Tensor
    sin: Tensor

    @property
    def width(self) -> int:
        """Elements of a projected row."""
        return (self.num_queries + 2 * self.num_keys) * self.head_dim


def place_queries(
    state_MW: Tensor,
    token_LW: Tensor,
    out_LQd: Tensor,
    *,
    token_M: Tensor,
    position_M: Tensor,
    row_M: Tensor,
    heads: Heads,
) -> None:
    """Adds the token's half, rotates, and writes the queries of each row to its place among all tokens.

    Args:
        state_MW: The state's half; only its first Q * d columns are read, and it may have no others.
        token_LW: The token's half.
        out_LQd: Written at `row_M`, elsewhere left alone.
        token_M: int32, the token that each row reads.
        position_M: int32, its position.
        row_M: int32, where it goes.
        heads: Of a projected row, and all positions.
    """
    _place(state_MW, token_LW, (out_LQd, out_LQd), (token_M, position_M, row_M), heads)


def place_keys_values(
    state_MW: Tensor,
    token_LW: Tensor,
    k_MKd: Tensor,
    v_MKd: Tensor,
    *,
    token_M: Tensor,
    position_M: Tensor,
    heads: Heads,
) -> None:
    """Adds the token's half and writes rotated keys, and values, row by row.

    Args:
        state_MW: The state's half; only its last 2K * d columns are read, and it may have no others.
        token_LW: As for `place_queries`.
        k_MKd: Overwritten by rotated keys.
        v_MKd: Overwritten by values.
        token_M: As for `place_queries`.
        position_M: As for `place_queries`.
        heads: As for `place_queries`.
    """
    _place(state_MW, token_LW, (k_MKd, v_MKd), (token_M, position_M, None), heads)


def _place(
    state_MW: Tensor,
    token_LW: Tensor,
    outs: tuple[Tensor, Tensor],
    index: tuple[Tensor, Tensor, Tensor | None],
    heads: Heads,
) -> None:
    """Places what is rotated, and what is not: values, which queries do not have. A section is K heads wide."""
    (rotated, values), (token_M, position_M, row_M) = outs, index
    num_rows, stride, is_queries = len(state_MW), state_MW.stride(0), row_M is not None
    group = heads.num_queries // heads.num_keys
    sections = range(group) if is_queries else range(group, group + 2)
    # Where the columns of the first section stand in `state_MW`, which may hold only a part of a projected row.
    offset = 0 if is_queries else state_MW.shape[1] - 2 * heads.num_keys * heads.head_dim
    if state_MW.is_cuda:
        if num_rows:
            _place_kernel[(num_rows, len(sections))](
                *(state_MW, token_LW, rotated, values, token_M, position_M, row_M, heads.cos, heads.sin),
                *(offset, stride, sections[0], heads.width),
                QUERIES=heads.num_queries,
                KEYS=heads.num_keys,
                HALF=heads.head_dim // 2,
                KEYS_BLOCK=next_power_of_2(heads.num_keys),
                HALF_BLOCK=next_power_of_2(heads.head_dim // 2),
                HAS_ROWS=is_queries,
            )
        return
    q_width, kv_width = heads.num_queries * heads.head_dim, heads.num_keys * heads.head_dim
    start = 0 if is_queries else q_width
    size = q_width if is_queries else 2 * kv_width
    sums = widened(state_MW[:, offset : offset + size]) + token_LW[token_M.long(), start : start + size]
    summed = sums.unflatten(-1, (-1, heads.head_dim))
    cos, sin = heads.cos[position_M.long()][:, None], heads.sin[position_M.long()][:, None]
    if row_M is not None:
        rotated[row_M.long()] = _rotate(summed, cos, sin).to(rotated.dtype)
    else:
        rotated.copy_(_rotate(summed[:, : heads.num_keys], cos, sin))
        values.copy_(summed[:, heads.num_keys :])


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = heads.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


@jit
def _place_kernel(
    state_ptr,
    token_ptr,
    out_ptr,
    values_ptr,
    token_index_ptr,
    position_ptr,
    row_ptr,
    cos_ptr,
    sin_ptr,
    offset,
    stride,
    first_section,
    width,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    HALF: tl.constexpr,
    KEYS_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    HAS_ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    section_here = tl.program_id(1)
    section = first_section + section_here
    head = tl.arange(0, KEYS_BLOCK)[:, None]
    half = tl.arange(0, HALF_BLOCK)[None, :]
    inside = (head < KEYS) & (half < HALF)
    within = head * 2 * HALF + half
    token = tl.load(token_index_ptr + row).to(tl.int64)
    from_state = state_ptr + row * stride + offset + section_here * KEYS * 2 * HALF + within
    from_token = token_ptr + token * width + section * KEYS * 2 * HALF + within
    low = tl.load(from_state, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(from_state + HALF, mask=inside, other=0.0).to(tl.float32)
    low += tl.load(from_token, mask=inside, other=0.0).to(tl.float32)
    high += tl.load(from_token + HALF, mask=inside, other=0.0).to(tl.float32)
    place = row
    if HAS_ROWS:
        place = tl.load(row_ptr + row).to(tl.int64)
    if section == QUERIES // KEYS + 1:
        to = values_ptr + place * KEYS * 2 * HALF + within
        tl.store(to, low, mask=inside)
        tl.store(to + HALF, high, mask=inside)
    else:
        position = tl.load(position_ptr + row).to(tl.int64)
        cos = tl.load(cos_ptr + position * HALF + half, mask=half < HALF, other=0.0)
        sin = tl.load(sin_ptr + position * HALF + half, mask=half < HALF, other=0.0)
        if HAS_ROWS:
            to = out_ptr + place * QUERIES * 2 * HALF + section * KEYS * 2 * HALF + within
        else:
            to = out_ptr + place * KEYS * 2 * HALF + within
        tl.store(to, low * cos - high * sin, mask=inside)
        tl.store(to + HALF, high * cos + low * sin, mask=inside)


def unrotate_(
    grad_MW: Tensor,
    *,
    queries_MQd: Tensor | None,
    keys_MKd: Tensor | None,
    values_MKd: Tensor | None,
    position_M: Tensor,
    heads: Heads,
) -> None:
    """Writes the gradient of projected rows, given those of rotated queries and keys and of values.

    Args:
        grad_MW: Overwritten where a gradient is given: all W columns, or only those of keys and values, or only those
            of queries.
        queries_MQd: Gradient of the rotated queries, or None.
        keys_MKd: Gradient of the rotated keys, or None.
        values_MKd: Gradient of the values, given with `keys_MKd`.
        position_M: int32.
        heads: Of a projected row, and all positions.
    """
    num_query_sections = heads.num_queries // heads.num_keys
    first = 0 if queries_MQd is not None else num_query_sections
    last = num_query_sections + 2 if keys_MKd is not None else num_query_sections
    # A narrow `grad_MW` begins with the first section that it holds.
    is_narrow = grad_MW.shape[1] < heads.width
    shift = first * heads.num_keys * heads.head_dim if is_narrow else 0
    if grad_MW.is_cuda:
        if len(grad_MW):
            # A gradient that is not given is never read, but the compiler wants a pointer.
            parts = [grad_MW if part is None else part for part in (queries_MQd, keys_MKd, values_MKd)]
            _unrotate_kernel[(len(grad_MW), last - first)](
                *(grad_MW, *parts, position_M, heads.cos, heads.sin),
                *(shift, grad_MW.stride(0), first),
                QUERIES=heads.num_queries,
                KEYS=heads.num_keys,
                HALF=heads.head_dim // 2,
                KEYS_BLOCK=next_power_of_2(heads.num_keys),
                HALF_BLOCK=next_power_of_2(heads.head_dim // 2),
            )
        return
    cos, sin = heads.cos[position_M.long()][:, None], heads.sin[position_M.long()][:, None]
    parts = []
    if queries_MQd is not None:
        parts.append(_rotate(queries_MQd, cos, -sin))
    if keys_MKd is not None and values_MKd is not None:
        parts += [_rotate(keys_MKd, cos, -sin), values_MKd]
    start = first * heads.num_keys * heads.head_dim - shift
    flat = torch.cat([part.flatten(1).to(grad_MW.dtype) for part in parts], dim=1)
    grad_MW[:, start : start + flat.shape[1]] = flat


@jit
def _unrotate_kernel(
    grad_ptr,
    queries_ptr,
    keys_ptr,
    values_ptr,
    position_ptr,
    cos_ptr,
    sin_ptr,
    shift,
    stride,
    first_section,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    HALF: tl.constexpr,
    KEYS_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    section = first_section + tl.program_id(1)
    head = tl.arange(0, KEYS_BLOCK)[:, None]
    half = tl.arange(0, HALF_BLOCK)[None, :]
    inside = (head < KEYS) & (half < HALF)
    within = head * 2 * HALF + half
    to = grad_ptr + row * stride - shift + section * KEYS * 2 * HALF + within
    # A value's gradient is not rotated: by no angle, which is a cosine of one.
    position = tl.load(position_ptr + row).to(tl.int64)
    is_rotated = (section <= QUERIES // KEYS) & (half < HALF)
    cos = tl.load(cos_ptr + position * HALF + half, mask=is_rotated, other=1.0)
    sin = tl.load(sin_ptr + position * HALF + half, mask=is_rotated, other=0.0)
    low = tl.zeros((KEYS_BLOCK, HALF_BLOCK), dtype=tl.float32)
    high = tl.zeros((KEYS_BLOCK, HALF_BLOCK), dtype=tl.float32)
    own = row * KEYS * 2 * HALF + within
    if section == QUERIES // KEYS + 1:
        low = tl.load(values_ptr + own, mask=inside, other=0.0).to(tl.float32)
        high = tl.load(values_ptr + own + HALF, mask=inside, other=0.0).to(tl.float32)
    elif section == QUERIES // KEYS:
        low = tl.load(keys_ptr + own, mask=inside, other=0.0).to(tl.float32)
        high = tl.load(keys_ptr + own + HALF, mask=inside, other=0.0).to(tl.float32)
    else:
        query = row * QUERIES * 2 * HALF + section * KEYS * 2 * HALF + within
        low = tl.load(queries_ptr + query, mask=inside, other=0.0).to(tl.float32)
        high = tl.load(queries_ptr + query + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(to, low * cos + high * sin, mask=inside)
    tl.store(to + HALF, high * cos - low * sin, mask=inside)


def sum_by_token(rows_SNW: Tensor, first_LU: Tensor, *, row_of_token_L: Tensor, time_L: Tensor) -> Tensor:
    """Sums the gradients of all rows and steps that read a token: the gradient of the token's half.

    Args:
        rows_SNW: Gradient of the projected rows with loss, by step; at step 0 only the columns of queries count.
        first_LU: Gradient of the step-0 keys and values of every row, U = 2K * d: row l reads token l + 1.
        row_of_token_L: int32, index into N of the row that stands at a token; -1 for none.
        time_L: int32, tokens before each in its own document: a row reads no other.

    Returns:
        (L, W), a new tensor, in the dtype of `rows_SNW`; sums run in float32 or better, in a fixed order.
    """
    num_steps, num_rows, width = rows_SNW.shape
    num_all = len(row_of_token_L)
    if rows_SNW.is_cuda:
        out_LW = torch.empty((num_all, width), dtype=rows_SNW.dtype, device=rows_SNW.device)
        block = 1024
        _sum_by_token_kernel[(num_all, -(-width // block))](
            *(rows_SNW, first_LU, row_of_token_L, time_L, out_LW, num_rows, width, first_LU.shape[1]),
            STEPS=num_steps,
            BLOCK=block,
        )
        return out_LW
    out = torch.zeros(
        (num_all, width), dtype=torch.promote_types(torch.float32, rows_SNW.dtype), device=rows_SNW.device
    )
    from_first = width - first_LU.shape[1]
    for step in range(num_steps):
        reads_L = torch.arange(num_all, device=out.device) - 1 - step
        row_L = row_of_token_L[reads_L.clamp(min=0)].long()
        used_L = (time_L >= 1 + step) & (row_L >= 0)
        columns = slice(0, from_first if step == 0 else width)
        if num_rows:
            out[used_L, columns] += rows_SNW[step, row_L[used_L], columns].to(out.dtype)
    later_L = time_L >= 1
    out[later_L, from_first:] += first_LU[torch.arange(num_all, device=out.device)[later_L] - 1].to(out.dtype)
    return out.to(rows_SNW.dtype)


@jit
def _sum_by_token_kernel(
    rows_ptr,
    first_ptr,
    row_of_token_ptr,
    time_ptr,
    out_ptr,
    num_rows,
    width,
    first_width,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    time = tl.load(time_ptr + token)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    from_first = width - first_width
    total = tl.load(
        first_ptr + (token - 1) * first_width + column - from_first,
        mask=inside & (column >= from_first) & (time >= 1),
        other=0.0,
    ).to(tl.float32)
    for step in tl.static_range(STEPS):
        row = tl.load(row_of_token_ptr + token - 1 - step, mask=time >= 1 + step, other=-1).to(tl.int64)
        used = inside & (row >= 0)
        if step == 0:
            used = used & (column < from_first)
        total += tl.load(rows_ptr + (step * num_rows + row) * width + column, mask=used, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * width + column, total, mask=inside)
