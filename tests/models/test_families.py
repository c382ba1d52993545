"""Whose a draft is: by name, by its file, by its checkpoint; options that a family has and those that it has not."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.models.exports import export_variant, save_plain_target
from torchspec.errors import UserError
from torchspec.models.choice import choose
from torchspec.models.export.import_draft import family_at
from torchspec.models.families import FAMILIES, DraftFile, chosen, family_named, family_of, options_of, with_family
from torchspec.models.module import DraftModule
from torchspec.target import Target


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return save_plain_target(tmp_path_factory.mktemp("target"))


def refused(said: str, call: Any, *args: Any, **options: Any) -> None:
    with pytest.raises(UserError, match=said):
        call(*args, **options)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_table_holds_families_of_these_names(name: str) -> None:
    family = family_named(name)
    assert family.name == name and family_named(FAMILIES[name]) is family
    assert options_of(family, None) == family.options()


def test_names_that_are_none() -> None:
    refused(r"model.family='eagle4' is unknown. Fix: use one of eagle3", family_named, "eagle4")
    refused("does not import|no_such", family_named, "no_such_module:FAMILY")
    refused("where Family is expected", family_named, "torchspec.batch:PackedBatch")


def test_options_are_the_familys_own_and_of_their_types() -> None:
    eagle3, dflash = family_named("eagle3"), family_named("dflash")
    assert options_of(eagle3, {"step_weights": [1, 0.5]}, unroll_steps=2).weights == [1.0, 0.5]
    assert options_of(dflash, {"anchors": 0.3}).anchors == 0.3
    refused(r"model.options.anchors=5 is no option of EAGLE-3", options_of, eagle3, {"anchors": 5})
    refused(r"model.options.unroll_steps='a' is no int", options_of, eagle3, {"unroll_steps": "a"})
    refused(r"model.options.unroll_steps=2 is given as model.unroll_steps too", options_of, eagle3, {"unroll_steps": 2}, unroll_steps=3)
    refused(r"model.unroll_steps=3 is no option of DFlash", options_of, dflash, None, unroll_steps=3)
    refused(r"model.unroll_steps=0 is below 1", options_of, eagle3, None, unroll_steps=0)


def test_the_draft_says_its_family(tmp_path: Path) -> None:
    (tmp_path / "draft.json").write_text(json.dumps({"family": "dflash", "block_size": 4}))
    file = DraftFile.read(str(tmp_path / "draft.json"))
    assert (file.family, file.given) == ("dflash", {"block_size": 4})
    assert chosen(family=None, draft=file) == chosen(family="dflash", draft=file) == "dflash"
    assert chosen(family=None, draft=DraftFile.read(None)) == "eagle3" and chosen(family=None, draft=DraftFile.read(None), started="dspark") == "dspark"
    refused(r"model.draft \(draft.json: family\)='dflash' contradicts eagle3", chosen, family="eagle3", draft=file)
    refused(r"model.family='eagle3' contradicts dspark of model.start_from", chosen, family="eagle3", draft=DraftFile.read(None), started="dspark")


def test_a_published_draft_is_known_by_its_config(target: Target, tmp_path: Path) -> None:
    for form in ("vllm", "speculators"):
        made = export_variant("plain", target, tmp_path / form, form=form)
        assert family_at(str(made.folder)) is family_named("eagle3")
        assert [name for name in FAMILIES if family_named(name).recognises(json.loads((made.folder / "config.json").read_text()))] == ["eagle3"]
    refused("is of architecture", family_of, {"architectures": ["MedusaModel"]}, where="here")
    refused("is a speculators draft of type peagle", family_of, {"speculators_model_type": "peagle"}, where="here")
    refused("give a draft of DFlash", family_at, str(tmp_path / "vllm"), family="dflash")


def test_facts_of_before_are_of_the_default_family() -> None:
    old = {"target": 1, "unroll_steps": 3, "step_weights": [1.0, 0.5, 0.2]}
    assert with_family(old) == {"target": 1, "family": "eagle3", "options": {"unroll_steps": 3, "step_weights": [1.0, 0.5, 0.2]}}
    assert with_family({"family": "dflash", "options": {}}) == {"family": "dflash", "options": {}}


def test_layers_come_from_the_source_or_the_family(target: Target, tmp_path: Path) -> None:
    given: dict[str, Any] = {"family": None, "draft": None, "start_from": None, "aux_layers": None}
    assert choose(target, **given).aux_layers == (2, 4, 6) and choose(target, **{**given, "aux_layers": [1, 5]}).aux_layers == (1, 5)
    made = export_variant("plain", target, tmp_path / "draft")
    started = {**given, "start_from": str(made.folder)}
    assert choose(target, **started).aux_layers == made.config.aux_layers
    refused("are not those of", choose, target, **{**started, "aux_layers": [1, 5]})
    refused("would change the architecture", choose, target, **{**started, "draft": "x.json"})


def test_more_draft_tokens_than_a_block_has_are_refused(target: Target) -> None:
    module = DraftModule(target.config, unroll_steps=2)
    module.refuse_proposals(9, field="k")  # an unroll goes on as far as is asked
    config, options = SimpleNamespace(block_size=4, shift=1), SimpleNamespace(anchors=1)
    block = SimpleNamespace(family=family_named("dflash"), choice=SimpleNamespace(config=config), options=options)
    refused("k=5 is more than the 3 draft tokens", DraftModule.refuse_proposals, block, 5, field="k")
