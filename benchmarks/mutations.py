"""Plant errors in a copy of the package and show that the tests fail: a JSON line an error, last ``planted``, ``caught``.

Two kinds: the sixteen failures of ``tests/defects``, and slips in the kernels' torch twins (what a CPU computes with, and what the kernels themselves are
tested against), which the fp64 references must notice.

A mutation is one change of source text in one file. The copy lies in a temporary folder; the tests run against it in a process of their own, first as it
is (they must pass), then with each mutation (its tests must fail, and not for an error of collection).

    python benchmarks/mutations.py                  # all, minutes
    python benchmarks/mutations.py 1 7 13 twins     # some
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Mutation:
    """An error, as a change of one place."""

    of: int | str
    """Number of the failure, or ``twins``."""
    what: str
    file: str
    """Under ``torchspec/``."""
    before: str
    """Occurs exactly once."""
    after: str
    tests: tuple[str, ...] = ()
    """Node ids of the tests that must notice; left out for a failure, whose tests are named after it."""


DEFECTS = (
    Mutation(1, "RoPE base read with a default", "models/ops/rope_parameters.py",
             'parameters["rope_theta"] = getattr(config, "rope_theta", None)', 'parameters["rope_theta"] = getattr(config, "rope_theta", 10000.0)'),
    Mutation(2, "resume loses the optimizer's moments", "models/module.py",
             'facts = checkpoint.get("torchspec")', '[s.update(state={}) for s in checkpoint["optimizer_states"]]; facts = checkpoint.get("torchspec")'),
    Mutation(3, "the position before the end is supervised by a state that nobody computed", "supervision.py",
             "depth = end - begin - alone", "depth = end - begin - alone + 1"),
    Mutation(4, "vocabulary mapping recomputed on resume", "callbacks/vocabulary.py", "if path is not None:", "if path is None:"),
    Mutation(5, "final norm not applied before the target's head", "models/target_head.py",
             "return normed\n", "return last.to(self.weight.dtype)\n"),
    Mutation(5, "final norm applied by the engine too", "engines/transformers/hidden_states.py",
             "self.norm.register_forward_pre_hook(lambda _, args, i=index: keep(i, args) if entered else None)",
             "self.norm.register_forward_hook(lambda _, args, out, i=index: keep(i, out) if entered else None)"),
    Mutation(6, "an engine that counts from 1", "engines/transformers/hidden_states.py",
             "self.blocks[index].register_forward_pre_hook", "self.blocks[index - 1].register_forward_pre_hook"),
    Mutation(6, "SGLang's ids in our counting", "models/eagle3/formats.py", "[i - 1 for i in config.aux_layers]", "[i for i in config.aux_layers]"),
    Mutation(7, "d2t holds ids", "models/vocabulary.py", "return self.draft_ids - torch.arange(self.size)", "return self.draft_ids"),
    Mutation(7, "pruned head exported without its mapping", "models/eagle3/formats.py", 'tensors["d2t"] = vocabulary.d2t.contiguous()', "pass"),
    Mutation(8, "random embeddings", "models/eagle3/formats.py",
             "read_embedding(target).to(dtype).contiguous()", "torch.randn_like(read_embedding(target)).to(dtype)"),
    Mutation(8, "type not honoured", "models/export/export.py", '.detach().to("cpu", kind).contiguous()', '.detach().to("cpu", torch.float32)'),
    Mutation(8, "missing tensors not noticed", "models/export/export.py", "if missing or unknown:", "if unknown:"),
    Mutation(9, "norm_output for logits alone", "models/eagle3/network.py", "if self.config.norm_output:", "if False:"),
    Mutation(10, "end-of-turn token not supervised", "data/render.py", "return i + 1\n", "return i\n"),
    Mutation(10, "mask one token late", "data/render.py", "mask[first:last] = 1", "mask[first + 1 : last] = 1"),
    Mutation(11, "tokens outside the draft vocabulary count as hits of the best inside", "models/ops/loss_formulas.py",
             "hit = (chosen == target.best) & inside", "hit = chosen == target.best"),
    Mutation(11, "acceptance as a product of marginals", "models/metrics.py",
             '1.0 + sum(sums["correct_so_far"][:trained]) / first', '1.0 + mean["correct"][0] + mean["correct"][0] * mean["correct"][-1]'),
    Mutation(12, "the engine refuses its own maximum", "engines/transformers/engine.py", "<= self.max_tokens", "< self.max_tokens"),
    Mutation(13, "a prefill that was cut is stored", "engines/vllm/connector.py",
             "if request.num_computed_tokens < rows:", "if request.num_computed_tokens < 0:"),
    Mutation(13, "attempts share a key", "engines/leases.py", "{passed.epoch}/{sample.index}/{number}", "{passed.epoch}/{sample.index}"),
    Mutation(14, "gradients reduced in the compute type", "models/training/parallelize.py", "reduce_dtype=torch.float32", "reduce_dtype=compute_dtype"),
    Mutation(14, "the head's gradient accumulated in the compute type", "models/ops/head_loss.py",
             "d_weight = torch.zeros_like(cast, dtype=exact)", "d_weight = torch.zeros_like(cast)"),
    Mutation(14, "biases' gradients summed over the steps in the compute type", "models/ops/dense_projections.py",
             "part.bias.to(wide(dtype))", "part.bias.to(dtype)"),
    Mutation(14, "the output bias's gradient summed over the steps in the compute type", "models/ops/dense_projections.py",
             "o_proj.bias.to(wide(dtype))", "o_proj.bias.to(dtype)"),
    Mutation(14, "norms' gradients summed over the steps in the gathered type", "models/ops/norm.py",
             "self.weight.to(wide(self.weight.dtype))", "self.weight"),
    Mutation(14, "a token's gradients summed in the table's type", "models/ops/embedding.py", "grads[0].to(wide(ctx.kind))", "grads[0]"),
    Mutation(15, "first step at rate 0", "models/optim/schedules.py", "(step + 1) / (warmup + 1)", "step / (warmup + 1)"),
    Mutation(15, "decay that divides by nothing", "models/optim/schedules.py",
             "(progress - (1.0 - self.decay)) / self.decay", "(progress - (1.0 - self.decay)) / (self.decay - self.decay)"),
    Mutation(15, "rotation deletes the best checkpoint", "trainer.py",
             "publish(partial, final)", "[remove(p) for p in final.parent.glob('*.ckpt')]; publish(partial, final)"),
    Mutation(16, "one seed for all that is drawn", "data/prompts.py", "SeedSequence([self.policy.seed, epoch, index])", "SeedSequence([self.policy.seed])"),
)  # fmt: skip


_UNROLL = ("tests/models/test_unroll.py::test_equals_the_reference[plain-full]",)
_PRUNED = ("tests/models/test_unroll.py::test_equals_the_reference[plain-pruned]",)
_LOSSES = ("tests/models/test_losses.py::test_equals_the_textbook",)

TWINS = (
    Mutation("twins", "a query sees the key after it", "models/ops/attention/torch.py", "> rows[:, None]", "> rows[:, None] + 1", _UNROLL),
    Mutation("twins", "causal backward without delta", "models/ops/attention/torch.py", ".sub_(by_group(delta[first:end, :, None]))", "", _UNROLL),
    Mutation("twins", "merged log-sum-exp leaves out the later keys", "models/ops/attention/torch.py",
             "torch.logaddexp(lse, torch.logsumexp(score, dim=-1))", "lse", _UNROLL),
    Mutation("twins", "later keys' scores without the scale", "models/ops/attention/torch.py",
             '_wide(extra_key)).flatten(1, 2) * scale', '_wide(extra_key)).flatten(1, 2)', _UNROLL),
    Mutation("twins", "backward of the merge without delta", "models/ops/attention/torch.py", "g, ev) - delta)", "g, ev))", _UNROLL),
    Mutation("twins", "the slot's gradient of the wrong step", "models/ops/attention/dispatch.py",
             "total[entries, ctx.slot]", "total[entries, ctx.slot - 1]", _UNROLL),
    Mutation("twins", "a second backward adds to the later keys' sums of the first", "models/ops/attention/dispatch.py",
             "found, self._sums, self._extra_sums = self._sums, None, None", "found, self._sums = self._sums, None",
             ("tests/models/test_backward_again.py::test_gradients_double",)),
    Mutation("twins", "norm's backward without the projection", "models/ops/norm.py",
             "d_unit - unit * (d_unit * unit).mean(-1, keepdim=True)", "d_unit", _UNROLL),
    Mutation("twins", "norm's weight gradient before the unit", "models/ops/norm.py",
             "* unit.to(x.dtype).to(kind)).sum(0)", "* x.to(kind)).sum(0)", _UNROLL),
    Mutation("twins", "SwiGLU's backward with the sigmoid alone", "models/ops/mlp.py",
             "torch.ops.aten.silu_backward(d_act * up, gate)", "d_act * up * torch.sigmoid(gate)", _UNROLL),
    Mutation("twins", "RoPE turned the other way in one half", "models/ops/rope.py", "low * cos - high * sin", "low * cos + high * sin", _UNROLL),
    Mutation("twins", "shared rows keep the last step's gradient", "models/ops/shared_rows.py",
             "index_add_(0, place + shift, part.to", "index_copy_(0, place + shift, part.to", _UNROLL),
    Mutation("twins", "a weight's gradient of the first step alone", "models/ops/shared_weight.py",
             "torch.cat(outs) if len(outs) > 1 else outs[0]).t(), torch.cat(ins) if len(ins) > 1 else ins[0]", "outs[0]).t(), ins[0]", _UNROLL),
    Mutation("twins", "a state's target of the step before", "models/eagle3/task.py", "torch.cat([entries + k for k", "torch.cat([entries for k", _UNROLL),
    Mutation("twins", "the likeliest token inside taken for the likeliest", "models/ops/head_loss.py",
             "inside[low:high] = highest >= rest.amax(dim=-1)", "pass", _PRUNED),
    Mutation("twins", "mass of the draft's vocabulary left out", "models/ops/loss_formulas.py",
             "true = p.to(wide) * target.mass[:, None]", "true = p.to(wide)", _LOSSES),
    Mutation("twins", "forward KL's gradient as if rounded probabilities added up to 1", "models/ops/loss_formulas.py",
             "(by * target.whole)[:, None]", "by[:, None]",
             ("tests/models/test_losses.py::test_gradients_are_those_of_the_values_where_p_is_rounded",)),
    Mutation("twins", "gradient of tv on the other side", "models/ops/loss_formulas.py", "below = (q < true)", "below = (q > true)", _LOSSES),
    Mutation("twins", "gradient of a curved loss without its mean", "models/ops/loss_formulas.py", "weight * (g - mean[:, None])", "weight * g", _LOSSES),
    Mutation("twins", "the raw row as the residual where it is the normed one", "models/ops/layer_input.py",
             "Residual(normed if self.normed_residual else taken)", "Residual(taken)",
             ("tests/models/test_unroll.py::test_equals_the_reference[norm_before_residual-full]",)),
    Mutation("twins", "short gradients made longer by clipping", "models/optim/clipping.py", ".clamp(min=1.0)", "",
             ("tests/models/test_clipping.py::test_equals_clipping_before",)),
    Mutation("twins", "a clipping factor that stays", "models/optim/clipping.py", 'optimizer.__dict__.pop("grad_scale", None)', "pass",
             ("tests/models/test_clipping.py::test_the_step_after_is_not_clipped",)),
    Mutation("twins", "8-bit rows use half of their range", "models/ops/fp8.py", "/ 448.0", "/ 224.0",
             ("tests/models/test_fp8.py::test_rows_are_rounded_by_half_a_step_and_use_their_range",)),
    Mutation("twins", "an 8-bit weight gradient without the scales of its rows", "models/ops/fp8.py",
             "else top / limit / common", "else torch.ones_like(top) / common",
             ("tests/models/test_fp8.py::test_weight_gradient_of_many_calls",)),
)  # fmt: skip

MUTATIONS = DEFECTS + TWINS


def occurrences(mutation: Mutation, root: Path = ROOT) -> int:
    """How often the text to change is in its file."""
    return (root / "torchspec" / mutation.file).read_text().count(mutation.before)


def selections(mutations: Sequence[Mutation]) -> list[list[str]]:
    """What pytest is told, one list a run, to run the tests that must notice some mutations."""
    words = sorted({f"test_defect_{mutation.of:02d}" for mutation in mutations if not mutation.tests})
    nodes = sorted({node for mutation in mutations for node in mutation.tests})
    return [*([["tests/defects", "-k", " or ".join(words)]] if words else []), *([nodes] if nodes else [])]


def run_tests(root: Path, selection: list[str]) -> tuple[int, str]:
    """Exit code and output of pytest on some tests of the copy in ``root``.

    In a fork, so that torch and its like, which this process holds already, need not be imported again; nothing of ours is imported here.
    """
    with tempfile.TemporaryFile("w+") as sink:
        child = os.fork()
        if child == 0:
            try:
                os.dup2(sink.fileno(), 1)
                os.dup2(sink.fileno(), 2)
                os.chdir(root)
                sys.path.insert(0, str(root))
                import pytest

                code = int(pytest.main([*selection, "-q", "-p", "no:cacheprovider", "--ignore=tests/defects/test_mutations.py"]))
                sys.stdout.flush()
            except BaseException:
                traceback.print_exc()
                code = 70
            os._exit(code)
        _, status = os.waitpid(child, 0)
        sink.seek(0)
        return os.waitstatus_to_exitcode(status), sink.read()


def failed_tests(output: str) -> list[str]:
    """Names of the tests that failed, without their parameters."""
    return sorted(set(re.findall(r"^FAILED \S+::(test_\w+)", output, re.MULTILINE)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("which", nargs="*", help="numbers of failures, twins; all when left out")
    args = parser.parse_args()
    if unknown := set(args.which) - {str(mutation.of) for mutation in MUTATIONS}:
        parser.error(f"nothing is planted for {', '.join(sorted(unknown))}")
    chosen = [mutation for mutation in MUTATIONS if not args.which or str(mutation.of) in args.which]
    os.environ |= {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}  # tiny tensors: threads would only wait for each other
    sys.dont_write_bytecode = True
    import lightning.pytorch  # noqa: F401  # for the forks
    import transformers.models.llama.modeling_llama  # noqa: F401

    caught = 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in ("torchspec", "tests"):
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", root)
        for selection in selections(chosen):
            code, output = run_tests(root, selection)
            if code:
                sys.exit(f"the tests fail before anything is planted:\n{output[-3000:]}")
        for mutation in chosen:
            if occurrences(mutation, root) != 1:
                sys.exit(f"{mutation.file} does not hold once: {mutation.before}")
            started = time.monotonic()
            file = root / "torchspec" / mutation.file
            text = file.read_text()
            file.write_text(text.replace(mutation.before, mutation.after))
            code, output = run_tests(root, *selections([mutation]))
            file.write_text(text)
            failed = failed_tests(output)
            found = code == 1 and bool(failed)
            caught += found
            seconds = round(time.monotonic() - started, 1)
            line = {"of": mutation.of, "planted": mutation.what, "file": mutation.file, "failed": failed, "caught": found, "seconds": seconds}
            print(json.dumps(line), flush=True)
            if not found:
                print(output[-2000:], file=sys.stderr)
    print(json.dumps({"planted": len(chosen), "caught": caught}))
    sys.exit(0 if caught == len(chosen) else 1)


if __name__ == "__main__":
    main()
