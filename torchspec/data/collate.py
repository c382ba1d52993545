"""Records of one pack → one ``PackedBatch``: conversations one after the other, no padding, nothing crosses a boundary.

States are copied once, from where the store delivered them into the packed tensors (page-locked where the trainer is a GPU). A conversation that was given up
is left out; its positions stay in ``counts``, which comes from the plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from torchspec.batch import PackedBatch
from torchspec.data.sample_source import Samples
from torchspec.supervision import Supervision, turns
from torchspec.transfer.record import Record, RecordSpec


def collate(
    records: Mapping[int, Record],
    *,
    dataset: Samples,
    samples: Sequence[int],
    keys: np.ndarray,
    spec: RecordSpec,
    supervision: Supervision,
    counts: np.ndarray,
    pack_index: int,
    stage: str,
    pin: bool = False,
) -> PackedBatch:
    """Build a micro-batch.

    Args:
        records: record of each sample that arrived.
        dataset: gives loss masks and positions.
        samples: the pack's samples in the plan's order; those without a record are left out.
        keys: [S] uint64 draw keys, one for each of ``samples`` (``Plan.keys``).
        spec: widths and type of the states.
        supervision: the family's rule of this stage.
        counts: [Q] normalisers of the whole optimizer step.
        pack_index: index in the epoch's plan.
        stage: ``train``, ``validate``.
        pin: page-locked memory.

    Returns:
        A batch of N tokens; N may be 0.
    """
    there = [place for place, i in enumerate(samples) if int(i) in records]
    arrived = [int(samples[place]) for place in there]
    lengths = np.array([records[i].input_ids.shape[0] for i in arrived], dtype=np.int64)
    bounds = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
    total, width = int(bounds[-1]), len(spec.aux_layers) * spec.hidden_size
    dtype = spec.torch_dtype
    ids = torch.empty(total, dtype=torch.int64, pin_memory=pin)
    aux = torch.empty(total, width, dtype=dtype, pin_memory=pin)
    last = torch.empty(total, spec.hidden_size, dtype=dtype, pin_memory=pin)
    mask = np.zeros(total, dtype=np.uint8)
    for i, low, high in zip(arrived, bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        record = records[i]
        rows = record.aux.shape[0]
        ids[low:high].copy_(record.input_ids)
        mask[low:high] = dataset.loss_mask(i, high - low)
        aux[low : low + rows].copy_(record.aux)
        last[low : low + rows].copy_(record.last)
        if low + rows < high:  # the last row is never read, but must be a number
            aux[low + rows : high].zero_()
            last[low + rows : high].zero_()
    turn = turns(mask, bounds)
    rows_of_pack = supervision.rows(turn, bounds, keys[there])
    sequence = np.repeat(np.arange(len(arrived), dtype=np.int64), lengths)
    position = np.arange(total, dtype=np.int64) - np.repeat(bounds[:-1], lengths)
    for i, low, high in zip(arrived, bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        own = dataset.positions(i, high - low)
        if own is not None:
            position[low:high] = own

    def put(values: np.ndarray | torch.Tensor) -> torch.Tensor:
        tensor = torch.as_tensor(values)
        return tensor.pin_memory() if pin else tensor

    return PackedBatch(
        input_ids=ids,
        position=put(position),
        sequence=put(sequence),
        turn=put(turn),
        aux=aux,
        last=last,
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
        sample_ids=tuple(arrived),
        counts=put(np.maximum(counts, 1).astype(np.float32)),  # what supervises nothing has a sum of 0: 0 / 1
        rows=rows_of_pack.map(put),
        pack_index=pack_index,
        stage=stage,
    )
