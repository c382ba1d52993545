"""In the 8-bit modes the target's logits of tokens outside the draft vocabulary come from an 8-bit product. It says whether one of them is likelier
than every draft token (such positions teach nothing) and how much mass they have. How often does the first come out otherwise than in bf16, and how far is the
second off, on real states?

    python benchmarks/rest_in_8_bits.py --target outputs/quickstart/target --data examples/hf-quickstart/data/validate.jsonl

The draft vocabulary is the ``--draft_vocab`` most frequent tokens of the data, filled up by id. Prints one JSON line: positions, the share whose likeliest
token is in the draft vocabulary, the share that 8 bits judge otherwise, how far apart the two likeliest tokens of such a position were at most (nats), and
the difference of the draft vocabulary's mass, in the mean and at most.
"""

from __future__ import annotations

import argparse
import sys
from itertools import islice
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from torchspec.data.conversations import parse
from torchspec.data.render import Renderer
from torchspec.data.sources import find_sources, read_rows
from torchspec.engines.transformers.hidden_states import HiddenStateHooks
from torchspec.files import dumps
from torchspec.models.target_head import TargetHead
from torchspec.paths import expand_all
from torchspec.target import Target, TargetConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--draft_vocab", type=int, default=16384)
    parser.add_argument("--conversations", type=int, default=12, help="a minute on a CPU")
    parser.add_argument("--max_length", type=int, default=512)
    args = expand_all(parser.parse_args())
    target = Target(TargetConfig(args.target, dtype="float32"))
    renderer = Renderer(target.tokenizer(), name=args.target)
    rows = (text for source in find_sources(args.data, config_key="--data") for text, _ in read_rows(source, config_key="--data"))
    ids = [torch.as_tensor(renderer.render(parse(text)).ids[: args.max_length]).long() for text in islice(rows, args.conversations)]
    head = TargetHead.of(target).to(torch.bfloat16)
    counts = torch.bincount(torch.cat(ids), minlength=head.weight.shape[0])
    head.put_first(torch.argsort(counts, descending=True, stable=True)[: args.draft_vocab].sort().values)
    model = target.auto_class().from_pretrained(args.target, dtype=torch.float32, **target.model_files).eval()
    layer = target.num_layers
    states = HiddenStateHooks(model, (layer,), num_layers=layer)
    margins, masses = [], []
    with torch.no_grad():
        for one in ids:
            normed = head.normed(states.run(one[None])[layer][0])
            kept, exact = head.parts(normed)
            _, rounded = head.parts(normed, rounded=True)
            assert exact is not None and rounded is not None
            margins.append(torch.stack([kept.amax(-1).float() - rest.amax(-1).float() for rest in (exact, rounded)]))
            masses.append(torch.stack([torch.sigmoid(kept.float().logsumexp(-1) - rest.float().logsumexp(-1)) for rest in (exact, rounded)]))
    margin, other = torch.cat(margins, dim=1)
    off = torch.cat(masses, dim=1).diff(dim=0).abs()
    otherwise = (margin >= 0) != (other >= 0)
    found = {
        "positions": margin.numel(), "inside": round(float((margin >= 0).float().mean()), 4), "judged_otherwise": round(float(otherwise.float().mean()), 5),
        "largest_gap": round(float(margin[otherwise].abs().max()), 3) if otherwise.any() else 0.0,
        "mass_off": round(float(off.mean()), 5), "mass_off_at_most": round(float(off.max()), 4),
    }  # fmt: skip
    print(dumps(found))


if __name__ == "__main__":
    main()
