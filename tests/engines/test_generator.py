"""Answers of the batched generator equal those of Transformers' own ``generate``, one prompt at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.tiny import save_target
from torchspec.engines.engine import Answer, Sampling
from torchspec.engines.transformers.generator import TransformersGenerator, _choose
from torchspec.target import TargetConfig

END = 2


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_target(tmp_path_factory.mktemp("target"), layers=2, hidden=64, heads=1)


@pytest.fixture(scope="module")
def generator(target: Path) -> Iterator[TransformersGenerator]:
    made = TransformersGenerator(TargetConfig(str(target)), batch_size=4, device="cpu")
    assert made.ends.tolist() == [END]
    said = [token for answer in made.generate(prompts_of(11), Sampling(max_new_tokens=24)) for token in answer.ids[4:20]]
    made.ends = torch.tensor([END, *(token for token, _ in Counter(said).most_common(4))])  # answers end, at different lengths
    yield made
    made.close()


def prompts_of(count: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 300, (int(torch.randint(1, 30, (1,), generator=generator)),), generator=generator).tolist() for _ in range(count)]


def answers(generator: TransformersGenerator, prompts: list[list[int]], sampling: Sampling) -> dict[int, Answer]:
    given = list(generator.generate(prompts, sampling))
    found = {answer.index: answer for answer in given}
    assert len(given) == len(found) == len(prompts)
    return found


def test_greedy_answers_equal_generate_one_by_one(generator: TransformersGenerator) -> None:
    prompts = prompts_of(11)
    found = answers(generator, prompts, Sampling(max_new_tokens=24))
    finishes = set()
    ends = generator.ends.tolist()
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        whole = generator.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, eos_token_id=ends, pad_token_id=END)
        expected = whole[0, len(prompt) :].tolist()
        assert found[i].ids == expected, i
        assert found[i].finish == ("stop" if expected[-1] in ends else "length")
        assert len(expected) == 24 or found[i].finish == "stop"
        finishes.add(found[i].finish)
    assert finishes == {"stop", "length"}, "the test must see both ways to end"


def test_an_answer_does_not_depend_on_the_batch_size(generator: TransformersGenerator, target: Path) -> None:
    prompts = prompts_of(9, seed=3)
    together = answers(generator, prompts, Sampling(max_new_tokens=16))
    for i, prompt in enumerate(prompts):
        (alone,) = generator.generate([prompt], Sampling(max_new_tokens=16))
        assert alone.ids == together[i].ids


def test_sampling_repeats_with_its_seed_and_changes_with_another(generator: TransformersGenerator) -> None:
    prompts = prompts_of(6, seed=4)
    first = answers(generator, prompts, Sampling(max_new_tokens=12, temperature=1.0, seed=1))
    assert answers(generator, prompts, Sampling(max_new_tokens=12, temperature=1.0, seed=1)) == first
    assert answers(generator, prompts, Sampling(max_new_tokens=12, temperature=1.0, seed=2)) != first


def test_choice_follows_the_distribution() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).expand(20000, -1)
    source = torch.Generator().manual_seed(0)
    plain = torch.bincount(_choose(logits, Sampling(temperature=1.0), source), minlength=4) / 20000
    torch.testing.assert_close(plain, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.015, rtol=0)
    nucleus = torch.bincount(_choose(logits, Sampling(temperature=1.0, top_p=0.7), source), minlength=4) / 20000
    torch.testing.assert_close(nucleus, torch.tensor([0.625, 0.375, 0.0, 0.0]), atol=0.015, rtol=0)
    assert _choose(logits, Sampling(temperature=1.0, top_p=0.01), source).unique().tolist() == [0]
    assert _choose(logits, Sampling(temperature=0.0), source).unique().tolist() == [0]


def test_no_prompts_no_answers(generator: TransformersGenerator) -> None:
    assert list(generator.generate([], Sampling())) == []
