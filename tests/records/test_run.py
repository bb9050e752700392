"""The files of a run, found by folder or log, with the evaluation of this artifact and no other."""

import hashlib
import json
import os

import pytest

from fairway.records.files import RecordError
from fairway.records.run import dict_at, read_run

BLOB = b"an artifact"


def lay_out(folder, run_id="train", seed=1, blob=BLOB, scored=BLOB, at=0):
    digest = hashlib.sha256(blob).hexdigest()
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    (folder / "eval").mkdir(exist_ok=True)
    log = folder / "logs" / f"{run_id}.txt"
    log.write_text("step:1/1 train_loss:1.0\n")
    events = [
        dict(event="start", settings=dict(seed=0)),
        dict(event="start", settings=dict(seed=seed)),
        dict(event="artifact", sha256=digest),
    ]
    log.with_suffix(".jsonl").write_text(
        "".join(json.dumps(e) + "\n" for e in events) + '{"event": "cut'
    )
    os.utime(log, (at, at))
    (folder / "final_model.int6.ptz").write_bytes(blob)
    (folder / "logs" / "eval.txt").write_text("val_bpb:1\n")
    (folder / "eval" / "score.json").write_text(
        json.dumps(
            dict(
                val_bpb=1.0,
                certificate=dict(passed=True),
                sha256=dict(artifact=hashlib.sha256(scored).hexdigest()),
            )
        )
    )
    (folder / "eval" / "certificate.json").write_text('{"passed": true}')
    return log


def test_a_folder_and_its_log_name_the_same_run(tmp_path):
    log = lay_out(tmp_path, seed=42)
    run = read_run(tmp_path)
    assert run == read_run(log) == read_run(log.with_suffix(".jsonl"))
    # The last start: that of a resumed run
    assert (run.run_id, run.seed, run.settings) == (
        "train",
        42,
        {"seed": 42},
    )
    assert (
        run.artifact == tmp_path / "final_model.int6.ptz"
        and run.eval_log == tmp_path / "logs" / "eval.txt"
    )
    assert run.score["val_bpb"] == 1.0 and run.certificate == {"passed": True}
    assert len(run.all_events("start")) == 2 and run.event("final") == {}


def test_an_evaluation_of_another_artifact_is_ignored(tmp_path):
    lay_out(tmp_path, scored=b"another")
    run = read_run(tmp_path)
    assert run.artifact is not None and run.score is run.certificate is run.eval_log is None


def test_an_artifact_that_was_overwritten_is_gone(tmp_path):
    log = lay_out(tmp_path)
    (tmp_path / "final_model.int6.ptz").write_bytes(b"of a later run")
    assert read_run(log).artifact is None and read_run(log).score is not None


def test_among_several_logs_the_one_with_its_artifact_counts(tmp_path):
    lay_out(tmp_path, "old", blob=b"one", at=10)
    lay_out(tmp_path, "new", blob=b"two", at=20)
    assert read_run(tmp_path).run_id == "new"
    (tmp_path / "final_model.int6.ptz").write_bytes(b"one")
    assert read_run(tmp_path).run_id == "old"
    (tmp_path / "final_model.int6.ptz").unlink()
    assert read_run(tmp_path).run_id == "new"  # the newest, if nothing else decides


@pytest.mark.parametrize("name", ["", "logs", "absent", "logs/absent.txt"])
def test_a_folder_without_a_run_is_refused_in_one_line(tmp_path, name):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "eval.txt").write_text("an evaluation is no training run")
    with pytest.raises(RecordError, match="name a run's OUT_DIR, or its logs/RUN_ID.txt"):
        read_run(tmp_path / name)


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"sha256": 3}', '{"sha256": {"artifact": []}}', "\0\1\2"]
)
def test_damaged_scores_are_no_scores(tmp_path, content):
    lay_out(tmp_path)
    (tmp_path / "eval" / "score.json").write_text(content)
    assert read_run(tmp_path).score is None


def test_keys_are_followed_through_objects_only():
    assert dict_at({"a": {"b": {"c": 1}}}, "a", "b") == {"c": 1}
    assert dict_at({"a": [1]}, "a", "b") == dict_at(None, "a") == dict_at({"a": 1}, "a") == {}
