"""The data of a run: tokenised sets, their plans, and what the rest of the run derives from them. The same on every rank; knows no trainer and no engine."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from torchspec.data.dataset import TokenizedDataset
from torchspec.data.plan import Plan
from torchspec.data.prepare import DataOptions, prepare
from torchspec.data.prompts import Prompts
from torchspec.data.render import tokenizer_fingerprint
from torchspec.data.sources import Given
from torchspec.data.vocabulary_report import TokenCounts
from torchspec.engines.engine import OnPolicy
from torchspec.errors import UserError
from torchspec.images import VisionTower
from torchspec.paths import home
from torchspec.supervision import Supervision
from torchspec.target import Target
from torchspec.transfer.record import RecordSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def default_cache_dir() -> Path:
    """``~/.cache/torchspec``, or under ``XDG_CACHE_HOME``."""
    return Path(home(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "torchspec"


MAX_ROWS = 16384
"""Draft rows of a pack at most unless ``data.max_rows`` is given, for families whose work is not that of tokens."""


class Corpus:
    """Training and validation data of one target.

    Args:
        target: its tokenizer, template and vocabulary decide the tokens.
        sources: what the user gave for ``train``, and for ``validate`` or ``validate/NAME`` (None: there is none).
        options: what changes the tokens.
        max_tokens: tokens of a pack at most.
        packs_per_step: packs of an optimizer step.
        seed: of the order.
        cache_dir: folder of tokenised data.
        max_rows: draft rows of a training pack at most, for families that have such work; None takes ``MAX_ROWS``.
        max_bad_fraction: share of unusable rows that is tolerated.
        num_proc: processes that tokenise.
        on_policy: how the target answers the training prompts anew; None trains on the answers given.
        say: takes the line about each set.
    """

    def __init__(
        self,
        target: Target,
        *,
        sources: Mapping[str, Given | None],
        options: DataOptions,
        max_tokens: int,
        packs_per_step: int,
        seed: int,
        cache_dir: Path,
        max_rows: int | None = None,
        max_bad_fraction: float = 0.0,
        num_proc: int | None = None,
        on_policy: OnPolicy | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.target, self.sources, self.options = target, sources, options
        self.max_tokens, self.packs_per_step, self.seed = max_tokens, packs_per_step, seed
        self.max_rows = max_rows
        self._cache_dir, self._max_bad_fraction, self._num_proc, self._say = cache_dir, max_bad_fraction, num_proc, say
        self.on_policy = on_policy
        self._data: dict[str, TokenizedDataset] = {}
        self._no_tokenizer: UserError | None = None
        self._prompts: Prompts | None = None
        self._rules: dict[str, Supervision] = {}
        self._measured: dict[tuple[str, Supervision], tuple[np.ndarray | None, np.ndarray]] = {}
        self._plan: Plan | None = None
        self._validation_plans: dict[tuple[str, int, Supervision], Plan] = {}

    def dataset(self, stage: str) -> TokenizedDataset:
        """The tokenised data of ``train``, ``validate`` or ``validate/NAME``; built on first use.

        Raises:
            UserError: see :func:`torchspec.data.prepare.prepare`.
        """
        if stage not in self._data:
            source, key = self.sources.get(stage), f"data.{stage.replace('/', '.')}"
            if source is None:
                raise UserError(key, None, "is needed here", "give a conversation file")
            self._data[stage] = prepare(
                source,
                options=self.options,
                tokenizer=self.tokenizer,
                vocab_size=self.target.vocab_size,
                cache_dir=self._cache_dir,
                target_name=self.target.config.path,
                end_ids=self.target.end_ids(),
                tower=self.tower,
                config_key=key,
                max_bad_fraction=self._max_bad_fraction,
                num_proc=self._num_proc,
                served=self.target.served if self.tokenizer is not None else None,
                no_tokenizer=self._no_tokenizer,
                say=self._say,
            )
            self._say(f"{stage}: {self._data[stage].summary}")
        return self._data[stage]

    def samples(self, stage: str) -> TokenizedDataset | Prompts:
        """What a stage goes through: the data as it is, or (training on-policy) its prompts.

        Raises:
            UserError: see :meth:`dataset` and :class:`Prompts`.
        """
        if stage != "train" or self.on_policy is None:
            return self.dataset(stage)
        if self._prompts is None:
            data = self.dataset(stage)
            self._prompts = Prompts(data, self.on_policy, max_length=self.options.max_length)
            if lost := len(data) - len(self._prompts):
                self._say(f"{stage}: {lost} conversations leave no room for an answer within data.max_length")
        return self._prompts

    def warn_of_overlap(self, stage: str) -> int:
        """Say so when conversations of a validation set are in the training set; returns how many."""
        data = self.dataset(stage)
        shared = np.flatnonzero(np.isin(data.hashes, self.dataset("train").hashes))
        if shared.size:
            first = data.place(int(shared[0]))
            self._say(
                f"warning: {shared.size} of the {len(data)} conversations of {stage} are in the training data as well, {first} the first: "
                "its metrics will look better than the draft is"
            )
        return int(shared.size)

    @property
    def loaded(self) -> dict[str, TokenizedDataset]:
        """The sets that were used so far."""
        return dict(self._data)

    @property
    def described(self) -> dict[str, Any]:
        """The training data, as plain values: names of the sources as given, their weights, and sizes."""
        given, loaded = self.sources["train"], self._data.get("train")
        assert given is not None
        named = {given: 1.0} if isinstance(given, str) else given if isinstance(given, Mapping) else dict.fromkeys(given, 1.0)
        return {
            "train": [[name, float(weight)] for name, weight in named.items()],
            "conversations": None if loaded is None else len(loaded),
            "max_length": self.options.max_length,
            "tokens_per_step": self.max_tokens * self.packs_per_step,
            "steps_per_epoch": None if loaded is None else self.any_plan.steps,
            "on_policy": self.on_policy is not None,
        }

    # -- plans

    def supervise(self, *, train: Supervision, validate: Supervision) -> None:
        """Take the rules by which the draft learns and is validated; plans are made from them."""
        if self._rules.get("train") != train:
            self._plan = None
        self._rules = {"train": train, "validate": validate}

    def rule(self, stage: str) -> Supervision:
        """Of ``train``, ``validate`` or ``validate/NAME``."""
        return self._rules["train" if stage == "train" else "validate"]

    def _measure(self, stage: str) -> tuple[np.ndarray | None, np.ndarray]:
        """Normalisers (None where answers come with their lengths) and draft rows of each conversation of a stage."""
        key = stage, self.rule(stage)
        if key not in self._measured:
            self._measured[key] = self.samples(stage).measured(key[1])
        return self._measured[key]

    def check_rows(self) -> None:
        """Refuse a bound of draft rows for a draft that has none beside its tokens.

        Raises:
            UserError: naming it.
        """
        if self.max_rows is not None and not self._measure("train")[1].any():
            problem = "bounds draft rows, and what this draft computes follows from its tokens alone"
            raise UserError("data.max_rows", self.max_rows, problem, "leave it out: data.max_tokens is its bound")

    def plan(self, epoch: int) -> Plan:
        """The plan of a training epoch."""
        if self._plan is None or self._plan.epoch != epoch:
            samples = self.samples("train")
            counts, work = self._measure("train")
            self._plan = Plan(
                samples.lengths,
                seed=self.seed,
                epoch=epoch,
                max_tokens=self.max_tokens,
                packs_per_step=self.packs_per_step,
                counts=counts,
                work=work,
                max_rows=self.max_rows or MAX_ROWS,
                content=samples.content,
                num_packs=None if self._plan is None else len(self._plan),
            )
        return self._plan

    @property
    def any_plan(self) -> Plan:
        """The plan of some epoch: all have the same length and fingerprint."""
        return self.plan(0) if self._plan is None else self._plan

    @property
    def about_work(self) -> str | None:
        """A line on the training plans of a family with draft rows of its own; None where tokens are the only bound."""
        plan, (counts, work) = self.any_plan, self._measure("train")
        if plan.max_rows is None:
            return None
        packs, larger = int((plan.tokens() > 0).sum()), int((work > plan.max_rows).sum())
        bounds = f"{self.max_tokens:,} tokens and {plan.max_rows:,} draft rows (data.max_rows)"
        line = f"train: {packs:,} packs of at most {bounds}"
        if larger:
            line += f", {larger:,} conversations of more rows in a pack each"
        if counts is not None:
            share = counts[:, 0].sum() / max(int(plan.lengths.sum()), 1)
            line += f"; {share:.3f} supervised positions a streamed token"
        return line

    def validation_plan(self, stage: str, world: int) -> Plan:
        """A validation set in its own order, padded so that every one of ``world`` ranks has as many packs."""
        key = stage, world, self.rule(stage)
        if key not in self._validation_plans:
            data = self.dataset(stage)
            self._validation_plans[key] = Plan(
                data.lengths,
                seed=0,
                epoch=0,
                max_tokens=self.max_tokens,
                packs_per_step=world,
                counts=self._measure(stage)[0],
                shuffle=False,
                content=data.content,
            )
        return self._validation_plans[key]

    # -- what others need to know

    @cached_property
    def tower(self) -> VisionTower | None:
        """What the target makes of images; None where engines are given none.

        Raises:
            UserError: the target takes none, or none in a way that is known here; positions that it does not have.
        """
        if self.options.media != "engine":
            return None
        tower = VisionTower(self.target)
        if self.options.image_positions == "temporal" and not tower.has_axes:
            problem = f"is an axis of RoPE that a target of type {tower.family} does not have"
            raise UserError("data.image_positions", "temporal", problem, "leave it out")
        return tower

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The target's tokenizer, None where it has none."""
        try:
            return self.target.tokenizer()
        except UserError as error:
            self._no_tokenizer = error
            return None

    def spec(self, aux_layers: tuple[int, ...]) -> RecordSpec:
        """What every record of this run must say of itself."""
        return self.target.record_spec(aux_layers, tokenizer=tokenizer_fingerprint(self.tokenizer))

    def largest_pack(self, stage: str, spec: RecordSpec) -> int:
        """Bytes of records that no pack of any epoch exceeds.

        As many of the shortest conversations as fit give the most headers; all of ``max_tokens`` give the most states. For small data, the whole of it is less.
        """
        lengths = np.sort(self.samples(stage).lengths)
        records = max(int(np.searchsorted(np.cumsum(lengths), self.max_tokens, side="right")), 1)
        one_token = spec.nbytes(2) - spec.nbytes(1) + 64  # parts are padded to 64 bytes
        overhead = spec.nbytes(0) + 3 * 64
        per_token = (spec.nbytes(1024) - spec.nbytes(0)) / 1024
        bound = int(per_token * self.max_tokens) + records * overhead + one_token
        everything = sum(spec.nbytes(int(length)) * int(count) for length, count in zip(*np.unique(lengths, return_counts=True), strict=True))
        return min(bound, everything)

    def token_counts(self) -> torch.Tensor:
        """[V] int64, supervised occurrences of each token in the training set."""
        return torch.from_numpy(self.dataset("train").token_counts(self.target.vocab_size))

    def special_end_ids(self) -> list[int]:
        """Ids that end what the target generates, by the target and by the data."""
        return sorted({*self.target.end_ids(), *(i for i in self.dataset("train").end_ids if 0 <= i < self.target.vocab_size)})


def count_tokens(
    target: Target,
    given: Given,
    *,
    messages_key: str | None = None,
    supervise: str = "auto",
    template_args: Mapping[str, Any] | None = None,
    max_bad_fraction: float = 0.0,
) -> tuple[torch.Tensor, list[int]]:
    """How often the target's answers use each token, for a vocabulary outside a run.

    Args:
        target: its tokenizer and template decide the tokens.
        given: conversations, or the file that ``main.py vocabulary`` wrote of them.
        messages_key, supervise, template_args, max_bad_fraction: as of a run's data.

    Returns:
        [V] int64 supervised occurrences, and the ids that end a turn.

    Raises:
        UserError: see :func:`torchspec.data.prepare.prepare`; a file of another target's counts.
    """
    if isinstance(given, str) and given.endswith(".safetensors"):
        found = TokenCounts.load(Path(given).expanduser(), field="token_counts")
        if found.target != target.fingerprint:
            raise UserError("token_counts", given, f"counts tokens of the target {found.target}, not of {target.fingerprint}", "count them with this target")
        return found.counts, list(found.end_ids)
    longest = int(getattr(target.hf_config, "max_position_embeddings", None) or 2**17)
    if not 0.0 <= max_bad_fraction < 1.0:
        raise UserError("max_bad_fraction", max_bad_fraction, "is no share", "use a number from 0 up to, but not including, 1")
    options = DataOptions(max_length=longest, messages_key=messages_key, supervise=supervise, template_args=template_args or {})
    corpus = Corpus(
        target, sources={"train": given}, options=options, max_tokens=longest, packs_per_step=1, seed=0, cache_dir=default_cache_dir(),
        max_bad_fraction=max_bad_fraction,
    )  # fmt: skip
    return corpus.token_counts(), corpus.special_end_ids()
