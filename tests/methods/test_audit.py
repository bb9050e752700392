"""The audit finds nothing wrong with honest cells, and every planted fraud."""

import copy
import json
import math
from dataclasses import dataclass

import pytest

from fairway.methods.audit import RULES, audit
from fairway.methods.integers import Integers
from fairway.methods.parcel import with_stored


@pytest.fixture(scope="module")
def honest(run_here):
    """Return the results of a baseline and of three other methods."""
    cells = [run_here(name) for name in ("fp32", "int4-rms", "int6-rms", "int4-g32")]
    assert [c["status"] for c in cells] == ["done"] * 4, [c.get("error") for c in cells]
    return json.loads(json.dumps(cells))


def rules_broken(cells, files) -> set[str]:
    return {finding.rule for finding in audit(cells, files)}


def test_honest_cells_break_no_rule(honest, run_here):
    assert audit(honest, run_here.files) == []


# ==== METHODS THAT CHEAT ==========================================================================
@dataclass(frozen=True)
class ReturnsItsInput(Integers):
    """It applies nothing."""

    def apply(self, model, calibration):
        return with_stored(model, {})


@dataclass(frozen=True)
class ReadsTheValidationSplit(Integers):
    """It calibrates on the scored text."""

    folder: str = ""

    def apply(self, model, calibration):
        from pathlib import Path

        for path in Path(self.folder).glob("*_val_*.bin"):
            path.read_bytes()
        return super().apply(model, calibration)


@dataclass(frozen=True)
class CalibratesOnItsCopy(Integers):
    """It calibrates on the scored text under another name."""

    def apply(self, model, calibration):
        calibration.give("training", self.scored[:256].reshape(8, -1))
        return super().apply(model, calibration)


@dataclass(frozen=True)
class ChangesWhatItSpares(Integers):
    """It promises to leave the embedding alone, and rounds it."""

    def spared(self, model):
        return {"tok_emb.weight": model.tok_emb.weight}


@dataclass(frozen=True)
class HidesAFile(Integers):
    """Half of what it loads lies outside the files that it ships."""

    def load(self, folder):
        (folder / ".hidden").write_bytes(b"weights")
        (folder / ".hidden").read_bytes()
        return super().load(folder)


@dataclass(frozen=True)
class ShipsLessThanItCounts(Integers):
    """Its size is not that of its files."""

    def bytes(self, model):
        return super().bytes(model) - 1000


@dataclass(frozen=True)
class ComputesWithOtherWeights(Integers):
    """The model in memory is not the one in the file."""

    def apply(self, model, calibration):
        made = super().apply(model, calibration)
        rounded = made.stored
        made = with_stored(model, {})
        made.stored = rounded
        return made


@dataclass(frozen=True)
class LoadsBetterWeights(Integers):
    """It ships codes, and loads what it kept aside."""

    def apply(self, model, calibration):
        KEPT["model"] = with_stored(model, {})
        return super().apply(model, calibration)

    def load(self, folder):
        return KEPT["model"]


KEPT: dict = {}

CHEATS = {
    "returns its input": (ReturnsItsInput, "something_was_applied"),
    "reads the validation split": (ReadsTheValidationSplit, "calibration_is_not_the_scored_text"),
    "calibrates on its copy": (CalibratesOnItsCopy, "calibration_is_not_the_scored_text"),
    "changes what it spares": (ChangesWhatItSpares, "spared_parameters_are_unchanged"),
    "hides a file": (HidesAFile, "sizes_count_every_file"),
    "ships less than it counts": (ShipsLessThanItCounts, "sizes_count_every_file"),
    "computes with other weights": (ComputesWithOtherWeights, "the_file_scores_the_same"),
    "loads better weights": (LoadsBetterWeights, "the_file_scores_the_same"),
}


@pytest.mark.parametrize("name", CHEATS)
def test_a_method_that_cheats_is_found(name, honest, run_here, corpus, monkeypatch):
    from train_gpt import read_shard

    kind, rule = CHEATS[name]
    monkeypatch.setattr(
        CalibratesOnItsCopy,
        "scored",
        read_shard(corpus.folder / "tiny_val_000000.bin"),
        raising=False,
    )
    method = kind(4, folder=str(corpus.folder)) if kind is ReadsTheValidationSplit else kind(4)
    cell = run_here(name, method)
    assert cell["status"] == "done", cell.get("error")
    assert rule in rules_broken([honest[0], cell], run_here.files)


# ==== RESULTS THAT WERE CHANGED ===================================================================
def fold_the_first_pass_in(cell):
    times = cell["latency"]
    times["samples_ms"].insert(0, times["first_ms"])


def hide_the_slow_passes(cell):
    cell["latency"]["mean_ms"] = min(cell["latency"]["samples_ms"])


FORGERIES = {
    "first pass in the mean": (fold_the_first_pass_in, "the_first_run_is_apart"),
    "mean of the fast passes": (hide_the_slow_passes, "the_first_run_is_apart"),
    "cache of another size": (
        lambda c: c["cache"][0].update(measured=17),
        "the_cache_has_its_computed_size",
    ),
    "other code": (lambda c: c["environment"].update(code_sha256="0" * 64), "all_ran_alike"),
    "other data": (lambda c: c["data"].update(sha256="0" * 64), "all_ran_alike"),
    "another machine": (
        lambda c: c["environment"]["hardware"].update(processor="another"),
        "all_ran_alike",
    ),
    "more threads": (lambda c: c["environment"].update(threads=8), "all_ran_alike"),
    "a file less": (lambda c: c["size"].update(files=[]), "sizes_count_every_file"),
    "no number": (
        lambda c: c["generation"].update(tokens_per_second=math.nan),
        "every_number_is_one",
    ),
    "a better score": (lambda c: c["score"].update(bpb=1.0), "the_whole_text_was_scored"),
    "a result cut short": (lambda c: c.pop("check"), "the_file_scores_the_same"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_changed_result_is_found(name, honest, run_here):
    change, rule = FORGERIES[name]
    cells = copy.deepcopy(honest)
    change(cells[1])
    assert rule in rules_broken(cells, run_here.files)


def test_another_file_than_the_measured_one_is_found(honest, run_here):
    path = run_here.files / "int4-rms" / "model.fwm"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert rules_broken(honest, run_here.files) == {"files_are_those_that_were_measured"}
    path.with_name("more").write_bytes(b"")
    assert len(audit(honest, run_here.files)) == 2
    path.write_bytes(whole)
    path.with_name("more").unlink()


def test_without_a_baseline_or_any_result_there_is_no_table(honest, run_here):
    assert rules_broken(honest[1:], run_here.files) == {"there_is_a_baseline"}
    assert rules_broken([], run_here.files) == {"there_are_results"}


def test_every_rule_is_broken_by_some_fraud():
    broken = {rule for _, rule in [*CHEATS.values(), *FORGERIES.values()]}
    assert {r.__name__ for r in RULES} - broken == {"files_are_those_that_were_measured"}
