"""Attention of block drafts in one softmax over a context and a row's own block, forward and backward; twin: ``models/blocks/attention.py``.

    keys(a, j) = { C[s], s < a, in a's conversation }  u  { B[a, i], i any or i <= j },      both from a + j - (w - 1) on where there is a window w

A program of the forward does a few whole blocks with all query heads of a key-value head, so the blocks' own keys are its own rows: nothing is merged, and
nobody else adds to their gradients. The context's gradients come from programs that each own some keys of a conversation and go through the rows that see
them. No sum depends on the order of programs. Keys that every row of a program sees need no mask; which those are is a table made on the host
(``models/blocks/attention_tables.py``):

    keys of a tile   begin ... whole ....... lowest ... highest        lowest, highest: anchors of the tile's blocks
                     | some rows | every row | some rows |

With p = exp(s - lse), delta = dO.O and s = q.k / sqrt(d): dv = sum p dO, ds = p (dO.v - delta) / sqrt(d), dq = sum ds k, dk = sum ds q (Dao,
FlashAttention-2, arXiv 2307.08691). Logarithms are of base 2 in here, lse too.

Letters: A blocks, S slots of each, N rows of the pack, h query heads, g key-value heads, d head size. Matrix products take their operands in the type of
the inputs and sum in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchspec.models.ops.kernels import power_of_two
from torchspec.models.ops.kernels.rounding import LOG2E


@triton.jit
def _rows(pointer, rows, heads, row_stride, head_stride, real, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """[rows, WIDTH] of a tensor [.., heads, d], zeros where not real."""
    column = tl.arange(0, WIDTH)
    at = pointer + rows[:, None] * row_stride + heads[:, None] * head_stride + column[None, :]
    return tl.load(at, mask=real[:, None] & (column < SIZE)[None, :], other=0.0)


@triton.jit
def _keys(pointer, n, limit, row_stride, MASKED: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """[KEYS, WIDTH] of the keys from n on; where masked, zeros from the limit on."""
    key, column = tl.arange(0, KEYS), tl.arange(0, WIDTH)
    at = pointer + tl.full([], n, tl.int64) * row_stride + key[:, None] * row_stride + column[None, :]
    if MASKED:
        return tl.load(at, mask=(n + key < limit)[:, None] & (column < SIZE)[None, :], other=0.0)
    elif SIZE < WIDTH:
        return tl.load(at, mask=(column < SIZE)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def _visible(at, anchor, slot, WINDOW: tl.constexpr):
    """Whether a row sees a context key; shapes broadcast."""
    seen = at < anchor
    if WINDOW > 0:
        seen = seen & (at >= anchor + slot - (WINDOW - 1))
    return seen


@triton.jit
def _own(row, real, count, SLOTS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, OWN: tl.constexpr):
    """[rows, OWN]: which rows of the tile's blocks a row sees as keys. Rows that are none see all, so that no softmax is empty."""
    key = tl.arange(0, OWN)
    ahead = (key % SLOTS)[None, :] - (row % SLOTS)[:, None]
    seen = ((key // SLOTS)[None, :] == (row // SLOTS)[:, None]) & (key < count * SLOTS)[None, :]
    if CAUSAL:
        seen = seen & (ahead <= 0)
    if WINDOW > 0:
        seen = seen & (ahead < WINDOW) & (ahead > -WINDOW)
    return seen | (real == 0)[:, None]


@triton.jit
def _attend(
    total, sum_, top, q, key, value, low, high, limit, key_row, value_row, anchor, slot, factor,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Go on with the keys from low to high."""
    for n in range(low, high, KEYS):
        k = _keys(key, n, limit, key_row, MASKED, KEYS, SIZE, WIDTH)
        score = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASKED:
            score = tl.where(_visible((n + tl.arange(0, KEYS))[None, :], anchor[:, None], slot[:, None], WINDOW), score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, axis=1) * factor)
        p = tl.exp2(score * factor - higher[:, None])
        old = tl.exp2(top - higher)
        sum_ = sum_ * old + tl.sum(p, axis=1)
        v = _keys(value, n, limit, value_row, MASKED, KEYS, SIZE, WIDTH)
        total = tl.dot(p.to(v.dtype), v, total * old[:, None], input_precision="ieee")
        top = higher
    return total, sum_, top


@triton.jit
def _forward(
    query, key, value, context_key, context_value, base, tiles, out, lse, factor,
    q_row, q_head, k_row, k_head, v_row, v_head, ck_row, ck_head, cv_row, cv_head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, MEMBERS: tl.constexpr, SLOTS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """A program does the blocks of a tile with up to MEMBERS query heads of a key-value head."""
    CHUNKS: tl.constexpr = (GROUP + MEMBERS - 1) // MEMBERS
    g, entry = tl.program_id(0) // CHUNKS, tiles + tl.program_id(1) * 6
    low, count, begin = tl.load(entry).to(tl.int64), tl.load(entry + 1), tl.load(entry + 2)
    whole, lowest, highest = tl.load(entry + 3), tl.load(entry + 4), tl.load(entry + 5)
    m = tl.arange(0, ROWS)
    row, member = m // MEMBERS, tl.program_id(0) % CHUNKS * MEMBERS + m % MEMBERS
    real, slot, head = (row < count * SLOTS) & (member < GROUP), row % SLOTS, g * GROUP + member
    anchor = tl.load(base + low + row // SLOTS, mask=real, other=-1).to(tl.int32) + 1
    first = low * SLOTS
    q = _rows(query + first * q_row, row, head, q_row, q_head, real, SIZE, WIDTH)

    key_at = tl.arange(0, OWN)
    there, nothing = key_at < count * SLOTS, key_at * 0
    k = _rows(key + first * k_row + g * k_head, key_at, nothing, k_row, 0, there, SIZE, WIDTH)
    score = tl.where(_own(row, real, count, SLOTS, CAUSAL, WINDOW, OWN), tl.dot(q, tl.trans(k), input_precision="ieee") * factor, float("-inf"))
    top = tl.max(score, axis=1)
    p = tl.exp2(score - top[:, None])
    sum_ = tl.sum(p, axis=1)
    v = _rows(value + first * v_row + g * v_head, key_at, nothing, v_row, 0, there, SIZE, WIDTH)
    total = tl.dot(p.to(v.dtype), v, input_precision="ieee")

    context_key += g.to(tl.int64) * ck_head
    context_value += g.to(tl.int64) * cv_head
    if WINDOW > 0:
        part = tl.minimum(begin + tl.cdiv(whole - begin, KEYS) * KEYS, highest)
        total, sum_, top = _attend(
            total, sum_, top, q, context_key, context_value, begin, part, highest, ck_row, cv_row, anchor, slot, factor, True, WINDOW, KEYS, SIZE, WIDTH
        )  # fmt: skip
        begin = part
    free = begin + tl.maximum(lowest - begin, 0) // KEYS * KEYS
    total, sum_, top = _attend(
        total, sum_, top, q, context_key, context_value, begin, free, highest, ck_row, cv_row, anchor, slot, factor, False, WINDOW, KEYS, SIZE, WIDTH
    )  # fmt: skip
    total, sum_, top = _attend(
        total, sum_, top, q, context_key, context_value, free, highest, highest, ck_row, cv_row, anchor, slot, factor, True, WINDOW, KEYS, SIZE, WIDTH
    )  # fmt: skip
    column = tl.arange(0, WIDTH)
    at = row[:, None] * (HEADS * SIZE) + head[:, None] * SIZE + column[None, :]
    tl.store(out + first * (HEADS * SIZE) + at, (total / sum_[:, None]).to(out.dtype.element_ty), mask=real[:, None] & (column < SIZE)[None, :])
    tl.store(lse + first * HEADS + row * HEADS + head, top + tl.log2(sum_), mask=real)


@triton.jit
def _back(
    d_query, q, d_out, total_lse, delta, key, value, low, high, limit, key_row, value_row, anchor, slot, factor,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Add to the query's gradient what the keys from low to high give."""
    for n in range(low, high, KEYS):
        k = _keys(key, n, limit, key_row, MASKED, KEYS, SIZE, WIDTH)
        v = _keys(value, n, limit, value_row, MASKED, KEYS, SIZE, WIDTH)
        p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * factor - total_lse[:, None])
        if MASKED:
            p = tl.where(_visible((n + tl.arange(0, KEYS))[None, :], anchor[:, None], slot[:, None], WINDOW), p, 0.0)
        d_score = p * (tl.dot(d_out, tl.trans(v), input_precision="ieee") - delta[:, None])
        d_query = tl.dot(d_score.to(k.dtype), k, d_query, input_precision="ieee")
    return d_query


@triton.jit
def _backward_rows(
    grad, query, key, value, context_key, context_value, base, tiles, out, lse, deltas, d_query, d_key, d_value, apart, factor, scale,
    q_row, q_head, k_row, k_head, v_row, v_head, ck_row, ck_head, cv_row, cv_head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, MEMBERS: tl.constexpr, SLOTS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """Of a forward program's rows: gradients of queries and of their blocks' own keys and values, and delta for :func:`_backward_context`."""
    CHUNKS: tl.constexpr = (GROUP + MEMBERS - 1) // MEMBERS
    GROUPS: tl.constexpr = HEADS // GROUP
    g, chunk, entry = tl.program_id(0) // CHUNKS, tl.program_id(0) % CHUNKS, tiles + tl.program_id(1) * 6
    low, count, begin = tl.load(entry).to(tl.int64), tl.load(entry + 1), tl.load(entry + 2)
    whole, lowest, highest = tl.load(entry + 3), tl.load(entry + 4), tl.load(entry + 5)
    m = tl.arange(0, ROWS)
    row, member = m // MEMBERS, chunk * MEMBERS + m % MEMBERS
    real, slot, head = (row < count * SLOTS) & (member < GROUP), row % SLOTS, g * GROUP + member
    anchor = tl.load(base + low + row // SLOTS, mask=real, other=-1).to(tl.int32) + 1
    first = low * SLOTS
    d_out = _rows(grad + first * (HEADS * SIZE), row, head, HEADS * SIZE, SIZE, real, SIZE, WIDTH)
    o = _rows(out + first * (HEADS * SIZE), row, head, HEADS * SIZE, SIZE, real, SIZE, WIDTH)
    delta = tl.sum(d_out.to(tl.float32) * o.to(tl.float32), axis=1)
    at = first * HEADS + row * HEADS + head
    tl.store(deltas + at, delta, mask=real)
    total_lse = tl.load(lse + at, mask=real, other=0.0)
    q = _rows(query + first * q_row, row, head, q_row, q_head, real, SIZE, WIDTH)

    key_at, column = tl.arange(0, OWN), tl.arange(0, WIDTH)
    there, nothing = key_at < count * SLOTS, key_at * 0
    k = _rows(key + first * k_row + g * k_head, key_at, nothing, k_row, 0, there, SIZE, WIDTH)
    v = _rows(value + first * v_row + g * v_head, key_at, nothing, v_row, 0, there, SIZE, WIDTH)
    p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * factor - total_lse[:, None])
    p = tl.where(_own(row, real, count, SLOTS, CAUSAL, WINDOW, OWN), p, 0.0)
    d_score = p * (tl.dot(d_out, tl.trans(v), input_precision="ieee") - delta[:, None])
    own_at = chunk.to(tl.int64) * apart + first * (GROUPS * SIZE) + g * SIZE + key_at[:, None] * (GROUPS * SIZE) + column[None, :]
    seen = there[:, None] & (column < SIZE)[None, :]
    d_k = tl.dot(tl.trans(d_score.to(q.dtype)), q, input_precision="ieee") * scale
    tl.store(d_key + own_at, d_k.to(d_key.dtype.element_ty), mask=seen)
    d_v = tl.dot(tl.trans(p.to(q.dtype)), d_out, input_precision="ieee")
    tl.store(d_value + own_at, d_v.to(d_value.dtype.element_ty), mask=seen)
    d_q = tl.dot(d_score.to(k.dtype), k, input_precision="ieee")

    context_key += g.to(tl.int64) * ck_head
    context_value += g.to(tl.int64) * cv_head
    if WINDOW > 0:
        part = tl.minimum(begin + tl.cdiv(whole - begin, KEYS) * KEYS, highest)
        d_q = _back(
            d_q, q, d_out, total_lse, delta, context_key, context_value, begin, part, highest, ck_row, cv_row, anchor, slot, factor,
            True, WINDOW, KEYS, SIZE, WIDTH,
        )  # fmt: skip
        begin = part
    free = begin + tl.maximum(lowest - begin, 0) // KEYS * KEYS
    d_q = _back(
        d_q, q, d_out, total_lse, delta, context_key, context_value, begin, free, highest, ck_row, cv_row, anchor, slot, factor,
        False, WINDOW, KEYS, SIZE, WIDTH,
    )  # fmt: skip
    d_q = _back(
        d_q, q, d_out, total_lse, delta, context_key, context_value, free, highest, highest, ck_row, cv_row, anchor, slot, factor,
        True, WINDOW, KEYS, SIZE, WIDTH,
    )  # fmt: skip
    at = row[:, None] * (HEADS * SIZE) + head[:, None] * SIZE + column[None, :]
    tl.store(d_query + first * (HEADS * SIZE) + at, (d_q * scale).to(d_query.dtype.element_ty), mask=real[:, None] & (column < SIZE)[None, :])


@triton.jit
def _gather(
    d_key, d_value, k, v, grad, query, lse, deltas, base, low, high, n, factor, q_row, q_head,
    MASKED: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, SLOTS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
    WINDOW: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Add to the gradients of keys what the slots from low to high give, all heads of the group."""
    SPAN: tl.constexpr = ROWS // GROUP
    m = tl.arange(0, ROWS)
    row, head = m // GROUP, m % GROUP
    for r in range(low, high, SPAN):
        first = tl.full([], r, tl.int64)
        real = (row < SPAN) & (row < high - r)
        if MASKED or SPAN * GROUP < ROWS:
            q = _rows(query + first * q_row, row, head, q_row, q_head, real, SIZE, WIDTH)
            d_out = _rows(grad + first * (HEADS * SIZE), row, head, HEADS * SIZE, SIZE, real, SIZE, WIDTH)
            total_lse = tl.load(lse + first * HEADS + row * HEADS + head, mask=real, other=float("inf"))
            delta = tl.load(deltas + first * HEADS + row * HEADS + head, mask=real, other=0.0)
        else:
            column = tl.arange(0, WIDTH)
            q_at = query + first * q_row + row[:, None] * q_row + head[:, None] * q_head + column[None, :]
            grad_at = grad + first * (HEADS * SIZE) + row[:, None] * (HEADS * SIZE) + head[:, None] * SIZE + column[None, :]
            if SIZE < WIDTH:
                q = tl.load(q_at, mask=(column < SIZE)[None, :], other=0.0)
                d_out = tl.load(grad_at, mask=(column < SIZE)[None, :], other=0.0)
            else:
                q, d_out = tl.load(q_at), tl.load(grad_at)
            total_lse = tl.load(lse + first * HEADS + row * HEADS + head)
            delta = tl.load(deltas + first * HEADS + row * HEADS + head)
        p = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * factor - total_lse[None, :])
        if MASKED:
            slot = r + row
            anchor = tl.load(base + slot // SLOTS, mask=real, other=-1).to(tl.int32) + 1
            p = tl.where(_visible((n + tl.arange(0, KEYS))[:, None], anchor[None, :], (slot % SLOTS)[None, :], WINDOW), p, 0.0)
        d_value = tl.dot(p.to(d_out.dtype), d_out, d_value, input_precision="ieee")
        d_score = p * (tl.dot(v, tl.trans(d_out), input_precision="ieee") - delta[None, :])
        d_key = tl.dot(d_score.to(q.dtype), q, d_key, input_precision="ieee")
    return d_key, d_value


@triton.jit
def _backward_context(
    grad, query, context_key, context_value, base, tiles, lse, deltas, d_key, d_value, factor, scale, q_row, q_head, ck_row, ck_head, cv_row, cv_head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, SLOTS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, WINDOW: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A program does some keys of a conversation and one key-value head."""
    SPAN: tl.constexpr = ROWS // GROUP
    GROUPS: tl.constexpr = HEADS // GROUP
    g, entry = tl.program_id(0), tiles + tl.program_id(1) * 6
    n, limit, begin = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2) * SLOTS
    whole, whole_end, end = tl.load(entry + 3) * SLOTS, tl.load(entry + 4) * SLOTS, tl.load(entry + 5) * SLOTS
    k = _keys(context_key + g.to(tl.int64) * ck_head, n, limit, ck_row, True, KEYS, SIZE, WIDTH)
    v = _keys(context_value + g.to(tl.int64) * cv_head, n, limit, cv_row, True, KEYS, SIZE, WIDTH)
    d_k, d_v = tl.zeros([KEYS, WIDTH], tl.float32), tl.zeros([KEYS, WIDTH], tl.float32)
    query += g * GROUP * q_head
    grad += g * GROUP * SIZE
    lse += g * GROUP
    deltas += g * GROUP
    d_k, d_v = _gather(
        d_k, d_v, k, v, grad, query, lse, deltas, base, begin, whole, n, factor, q_row, q_head, True, HEADS, GROUP, SLOTS, SIZE, WIDTH, WINDOW, ROWS, KEYS
    )  # fmt: skip
    part = whole + (whole_end - whole) // SPAN * SPAN
    d_k, d_v = _gather(
        d_k, d_v, k, v, grad, query, lse, deltas, base, whole, part, n, factor, q_row, q_head, False, HEADS, GROUP, SLOTS, SIZE, WIDTH, WINDOW, ROWS, KEYS
    )  # fmt: skip
    d_k, d_v = _gather(
        d_k, d_v, k, v, grad, query, lse, deltas, base, part, end, n, factor, q_row, q_head, True, HEADS, GROUP, SLOTS, SIZE, WIDTH, WINDOW, ROWS, KEYS
    )  # fmt: skip
    key, column = tl.arange(0, KEYS), tl.arange(0, WIDTH)
    at = tl.full([], n, tl.int64) * (GROUPS * SIZE) + g * SIZE + key[:, None] * (GROUPS * SIZE) + column[None, :]
    seen = (n + key < limit)[:, None] & (column < SIZE)[None, :]
    tl.store(d_key + at, (d_k * scale).to(d_key.dtype.element_ty), mask=seen)
    tl.store(d_value + at, d_v.to(d_value.dtype.element_ty), mask=seen)


@dataclass(frozen=True)
class Launch:
    """How a kernel is cut."""

    rows: int
    """Query rows of a program, or of a turn of its loop: slots times query heads."""
    keys: int
    """Context keys likewise."""
    warps: int
    stages: int

    def options(self) -> dict[str, int]:
        """Of the launch."""
        return {"ROWS": self.rows, "KEYS": self.keys, "num_warps": self.warps, "num_stages": self.stages}


@dataclass(frozen=True)
class Launches:
    """Of the three kernels."""

    forward: Launch
    rows: Launch
    context: Launch


def launches(size: int) -> Launches:
    """For a head size. Chosen from registers and shared memory as compiled for an H100, not yet by timing."""
    if size <= 128:
        return Launches(Launch(128, 64, 8, 3), Launch(128, 64, 8, 2), Launch(64, 128, 8, 2))
    return Launches(Launch(64, 64, 4, 2), Launch(64, 32, 4, 2), Launch(32, 64, 8, 2))


@dataclass(frozen=True)
class Sizes:
    """Of a pack's attention, and how it is masked."""

    slots: int
    """S."""
    heads: int
    """h."""
    groups: int
    """g."""
    size: int
    """d."""
    causal: bool
    window: int | None

    @property
    def group(self) -> int:
        """Query heads of a key-value head."""
        return self.heads // self.groups

    def members(self, launch: Launch) -> int:
        """Query heads of a program."""
        return min(self.group, launch.rows // self.slots)

    def blocks(self, launch: Launch) -> int:
        """Blocks of a program."""
        return launch.rows // (self.slots * self.members(launch))

    def chunks(self, launch: Launch) -> int:
        """Programs for the heads of a group."""
        return -(-self.group // self.members(launch))

    def _shared(self) -> dict[str, Any]:
        return {
            "HEADS": self.heads, "GROUP": self.group, "SLOTS": self.slots, "SIZE": self.size, "WIDTH": max(16, power_of_two(self.size)),
            "WINDOW": self.window or 0,
        }  # fmt: skip

    def of_rows(self, launch: Launch) -> dict[str, Any]:
        """Constants of the two kernels that go by blocks."""
        own = max(16, power_of_two(self.blocks(launch) * self.slots))
        return {**self._shared(), "MEMBERS": self.members(launch), "CAUSAL": self.causal, "OWN": own, **launch.options()}

    def of_context(self, launch: Launch) -> dict[str, Any]:
        """Constants of the one that goes by keys."""
        return {**self._shared(), **launch.options()}


def _strides(*tensors: Tensor) -> list[int]:
    """Of rows and heads."""
    assert all(t.stride(-1) == 1 for t in tensors)
    return [stride for t in tensors for stride in (t.stride(-3), t.stride(-2))]


def forward(
    query: Tensor, key: Tensor, value: Tensor, context_key: Tensor, context_value: Tensor, base: Tensor, tiles: Tensor, *, sizes: Sizes, launch: Launch
) -> tuple[Tensor, Tensor]:
    """Attend.

    Args:
        query: [A * S, h, d], any strides of rows and heads.
        key, value: [A * S, g, d] of the blocks, likewise.
        context_key, context_value: [N, g, d], likewise.
        base: [A] anchor - 1 of each block.
        tiles: [.., 6] int32, see the tables of rows.
        sizes: of all this.
        launch: how the kernel is cut.

    Returns:
        out [A * S, h, d] in the type of the query; lse [A * S, h] fp32, to base 2.
    """
    out, lse = query.new_empty(query.shape), torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
    if tiles.shape[0]:
        _forward[(sizes.groups * sizes.chunks(launch), tiles.shape[0])](
            query, key, value, context_key, context_value, base, tiles, out, lse, sizes.size**-0.5 * LOG2E.value,
            *_strides(query, key, value, context_key, context_value), **sizes.of_rows(launch),
        )  # fmt: skip
    return out, lse


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, context_key: Tensor, context_value: Tensor, base: Tensor, tiles: Tensor, key_tiles: Tensor,
    out: Tensor, lse: Tensor, *, sizes: Sizes, launch: Launch, context_launch: Launch,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of :func:`forward`: of query, key, value, context_key and context_value, contiguous and in their types.

    Args:
        grad: [A * S, h, d], contiguous.
        key_tiles: [.., 6] int32, see the tables of keys.
        out, lse: from the forward.
        launch, context_launch: how the kernels of the rows and of the context are cut.
        query, key, value, context_key, context_value, base, tiles, sizes: as in the forward.
    """
    d_query, delta, chunks = query.new_empty(query.shape), torch.empty_like(lse), sizes.chunks(launch)
    own_shape, kind = (key.shape if chunks == 1 else (chunks, *key.shape)), (key.dtype if chunks == 1 else torch.float32)
    d_key, d_value = (torch.empty(own_shape, dtype=kind, device=key.device) for _ in range(2))
    d_context_key, d_context_value = (torch.zeros(context_key.shape, dtype=context_key.dtype, device=key.device) for _ in range(2))
    scale = sizes.size**-0.5
    factor = scale * LOG2E.value
    if tiles.shape[0]:
        _backward_rows[(sizes.groups * chunks, tiles.shape[0])](
            grad, query, key, value, context_key, context_value, base, tiles, out, lse, delta, d_query, d_key, d_value, key.numel(), factor, scale,
            *_strides(query, key, value, context_key, context_value), **sizes.of_rows(launch),
        )  # fmt: skip
    if key_tiles.shape[0]:
        _backward_context[(sizes.groups, key_tiles.shape[0])](
            grad, query, context_key, context_value, base, key_tiles, lse, delta, d_context_key, d_context_value, factor, scale,
            *_strides(query, context_key, context_value), **sizes.of_context(context_launch),
        )  # fmt: skip
    if chunks > 1:
        d_key, d_value = d_key.sum(0).to(key.dtype), d_value.sum(0).to(value.dtype)
    return d_query, d_key, d_value, d_context_key, d_context_value
