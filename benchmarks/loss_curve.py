"""Does the fast training step learn what a plain one learns? Two drafts with the same start, on the same real data, a curve each.

Stage 1 runs a target over conversations and keeps what a step reads (tokens, hidden states, the head in int8 to keep the file small). Stage 2 trains a
``DraftTask`` (the path of this machine: kernels on a GPU) and ``plain_step.PlainStep`` for ``--steps`` steps of one conversation each, and prints one JSON
line: both curves, thinned, and how far apart they are. ``--exact`` adds the plain step in fp32, whose distance from the plain one in bf16 is the yardstick.

    python benchmarks/loss_curve.py --save states.safetensors --target outputs/quickstart/target --data examples/hf-quickstart/data/train.jsonl
    python benchmarks/loss_curve.py --states states.safetensors --exact
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.plain_step import PlainStep
from torchspec.batch import PackedBatch
from torchspec.files import dumps
from torchspec.hardware import working_dtype
from torchspec.models.eagle3.config import DraftConfig
from torchspec.models.eagle3.network import Eagle3Draft, RMSNorm
from torchspec.models.eagle3.task import DraftTask, start_from_target
from torchspec.models.ops.fp8 import Fp8
from torchspec.models.target_head import TargetHead
from torchspec.paths import expand_all
from torchspec.supervision import Unroll, turns

_AUX = (2, 15, 27)
_EPS = 1e-5


def save(path: str, target: str, data: str, tokens: int, length: int) -> None:
    """Stage 1: states of a target over conversations of ``length`` tokens each."""
    from safetensors.torch import save_file

    from torchspec.target import Target, TargetConfig

    facts = Target(TargetConfig(target))
    model, tokenizer = facts.auto_class().from_pretrained(target, dtype=torch.float32, **facts.model_files).eval(), facts.tokenizer()
    norm = model.model.norm
    caught: list[Tensor] = []
    norm.register_forward_pre_hook(lambda _, given: caught.append(given[0]))
    ids, aux, last = [], [], []
    with open(data, encoding="utf-8") as rows, torch.inference_mode():
        for row in rows:
            text = tokenizer.apply_chat_template(json.loads(row)["conversations"], tokenize=True, return_dict=False)
            if len(text) < length:
                continue
            given = torch.tensor(text[:length])[None]
            states = model(given, output_hidden_states=True).hidden_states
            ids.append(given[0])
            aux.append(torch.cat([states[i][0] for i in _AUX], dim=-1).bfloat16())
            last.append(caught.pop()[0].bfloat16())
            caught.clear()
            if sum(map(len, ids)) >= tokens:
                break
    weight = model.get_output_embeddings().weight.detach()
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    save_file(
        {
            "ids": torch.stack(ids).int(), "aux": torch.stack(aux), "last": torch.stack(last), "head": (weight / scale).round().to(torch.int8), "scale": scale,
            "norm": norm.weight.detach().clone(),
        },
        path,
    )  # fmt: skip


def make_batch(ids: Tensor, aux: Tensor, last: Tensor, steps: int) -> PackedBatch:
    """One conversation, every position supervised."""
    total = ids.shape[0]
    bounds, turn = np.array([0, total]), np.zeros(total, dtype=np.int64)
    assert (turns(np.ones(total, dtype=np.uint8), bounds) == turn).all()
    return PackedBatch(
        input_ids=ids.long(), position=torch.arange(total), sequence=torch.zeros(total, dtype=torch.int64), turn=torch.from_numpy(turn), aux=aux, last=last,
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)), sample_ids=(0,),
        counts=torch.from_numpy(np.maximum(Unroll(steps).counts(np.ones(total, dtype=np.uint8), bounds)[0], 1).astype(np.float32)),
        rows=Unroll(steps).rows(turn, bounds),
    )  # fmt: skip


def make_task(kept: dict[str, Tensor], draft_vocab: int, steps: int, dtype: torch.dtype, device: torch.device, fp8: Fp8) -> DraftTask:
    """A draft of the target's sizes (SmolLM2-135M), started as training starts it."""
    head = (kept["head"].float() * kept["scale"]).to(dtype)
    config = DraftConfig(
        hidden_size=head.shape[1], intermediate_size=1536, num_heads=9, num_kv_heads=3, head_dim=64, vocab_size=head.shape[0], draft_vocab_size=draft_vocab,
        target_hidden_size=head.shape[1], aux_layers=_AUX, rope_parameters={"rope_type": "default", "rope_theta": 1e5}, max_position_embeddings=8192,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("meta"):
        norm = RMSNorm(config.target_hidden_size, _EPS)
    target = TargetHead(head, None, norm_module=norm, norm_tensors={"weight": kept["norm"].to(dtype)})
    draft = Eagle3Draft(config, compute_dtype=dtype, fp8=fp8)
    draft.initialise()
    draft.set_embedding(head)
    ids = torch.bincount(kept["ids"].flatten().long(), minlength=head.shape[0]).topk(draft_vocab).indices.sort().values
    start_from_target(draft, target, ids)
    return DraftTask(draft, target, draft_ids=ids, step_weights=[0.8**k for k in range(steps)]).to(device)


def curve(model: torch.nn.Module, loss_of: Callable[[PackedBatch], Tensor], batches: list[PackedBatch], steps: int, lr: float) -> list[float]:
    """Train; the loss of each step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 20)
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(batches[step % len(batches)])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def apart(a: list[float], b: list[float]) -> dict[str, float]:
    """Relative differences of two curves."""
    found = [abs(x - y) / y for x, y in zip(a, b, strict=True)]
    return {"mean": round(statistics.mean(found), 5), "max": round(max(found), 5), "last_30": round(sum(a[-30:]) / sum(b[-30:]) - 1, 5)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--save", help="stage 1: write states here")
    parser.add_argument("--target", help="stage 1: model directory")
    parser.add_argument("--data", help="stage 1: conversations, JSON lines with a field conversations")
    parser.add_argument("--tokens", type=int, default=5120, help="stage 1: tokens to keep")
    parser.add_argument("--length", type=int, default=512, help="stage 1: tokens of a conversation")
    parser.add_argument("--states", help="stage 2: what stage 1 wrote")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--unroll_steps", type=int, default=7)
    parser.add_argument("--draft_vocab", type=int, default=8192)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--exact", action="store_true", help="also the plain step in fp32")
    parser.add_argument("--fp8", action="store_true", help="also the fast step with 8-bit products, without and with those of weight gradients")
    args = expand_all(parser.parse_args())
    if args.save and Path(args.save).exists():
        parser.error(f"--save {args.save} is there: give another file, or remove it")
    if args.save:
        save(args.save, args.target, args.data, args.tokens, args.length)
        return
    from safetensors.torch import load_file

    kept = load_file(args.states)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    half = working_dtype(torch.bfloat16, device)
    curves: dict[str, list[float]] = {}
    for name, dtype in [
        ("torchspec", half),
        *([("torchspec fp8", half), ("torchspec fp8_all", half)] if args.fp8 else []),
        ("plain", half),
        *([("plain fp32", torch.float32)] if args.exact else []),
    ]:
        rows = zip(kept["ids"], kept["aux"].to(dtype), kept["last"].to(dtype), strict=True)
        batches = [make_batch(*row, args.unroll_steps).to(device) for row in rows]
        task = make_task(kept, args.draft_vocab, args.unroll_steps, dtype, device, Fp8.of(name.partition(" ")[2]) if "fp8" in name else Fp8.NONE)
        model = copy.deepcopy(task) if name.startswith("torchspec") else PlainStep(task, dtype=dtype)
        loss_of = (lambda batch, model=model: model(batch).loss) if name.startswith("torchspec") else model
        curves[name] = curve(model, loss_of, batches, args.steps, args.lr)
    report = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "dtype": str(half)[6:], "steps": args.steps,
        "conversations": kept["ids"].shape[0], "tokens_a_step": kept["ids"].shape[1],
        "curves": {name: [round(x, 4) for x in values[:: max(1, args.steps // 15)]] for name, values in curves.items()},
        "torchspec_from_plain": apart(curves["torchspec"], curves["plain"]),
    }  # fmt: skip
    if args.fp8:
        for level in ("fp8", "fp8_all"):
            report[f"{level}_from_plain"] = apart(curves[f"torchspec {level}"], curves["plain"])
    if args.exact:
        report["torchspec_from_plain_fp32"] = apart(curves["torchspec"], curves["plain fp32"])
        report["plain_from_plain_fp32"] = apart(curves["plain"], curves["plain fp32"])
    print(dumps(report), flush=True)


if __name__ == "__main__":
    main()
