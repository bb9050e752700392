"""An artifact of older code stays readable: the same score, and the same bytes when written again.

tests/golden/frontier.int6.ptz was trained by the code of November 2026, before its header could
lack a setting: four layers with loops, two lanes, gates, SmearGate, BigramHash, 5, 6 and 7 bits,
and its tokenizer. frontier.json holds what that code printed for 513 tokens.
"""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import train_gpt
from fairway.artifact_reader import RETIRED_FIELDS, ArtifactError, read_artifact
from train_gpt import ARTIFACT_MAGIC, PLAIN_BITS, Rounded

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
PATH = GOLDEN / "frontier.int6.ptz"
EXPECTED = json.loads((GOLDEN / "frontier.json").read_text())


@pytest.fixture(scope="module")
def artifact() -> train_gpt.Artifact:
    return read_artifact(PATH)


def split(blob: bytes) -> tuple[dict, bytes]:
    """Return the header of an artifact, and everything after it."""
    start = train_gpt.PRELUDE.size
    end = start + int.from_bytes(blob[12:16], "little")
    return json.loads(blob[start:end]), blob[end:]


def with_model(model: dict, path: Path) -> Path:
    """Write the golden artifact with other model settings in its header, and right checksums."""
    header, rest = split(PATH.read_bytes())
    text = json.dumps(header | {"model": model}).encode()
    prelude = train_gpt.PRELUDE.pack(ARTIFACT_MAGIC, 1, len(text), hashlib.sha256(text).digest())
    path.write_bytes(prelude + text + rest)
    return path


def test_it_scores_as_the_code_that_wrote_it_did(artifact):
    """The tolerance is for other processors, whose fp32 sums end in other bits.

    On the processor that made the file the sum is equal to the last digit. A setting that is lost
    or read wrongly moves it by more than a thousandth.
    """
    ids = torch.tensor(EXPECTED["tokens"])
    model = train_gpt.build_model(artifact)
    assert model.looping
    with torch.no_grad():
        nats = model(ids[:-1].view(8, 64), ids[1:].view(8, 64)).double()
    assert nats.sum().item() == pytest.approx(EXPECTED["sum_nats"], rel=1e-6)


def test_the_same_weights_are_written_as_the_same_bytes(artifact):
    header, rest = split(PATH.read_bytes())
    shapes = []
    for bits, *shape in header["tensors"].values():
        shapes += [(2, int(np.prod(shape)))] if bits == PLAIN_BITS else [shape, (2, shape[0])]
    planes = iter(
        train_gpt.decode_planes(
            header["codec"], rest[: header["payload_bytes"]], [tuple(s) for s in shapes]
        )
    )
    rounded = {}
    for name, (bits, *_) in header["tensors"].items():
        first = next(planes)
        if bits == PLAIN_BITS:
            rounded[name] = Rounded(bits, artifact.weights[name].half(), None)
        else:
            codes = torch.from_numpy(first.view(np.int8)).float()
            steps = train_gpt.joined_values(next(planes)).astype("<u4") << 16
            steps = torch.from_numpy(steps.view("<f4"))[:, None]
            rounded[name] = Rounded(bits, codes, steps)
            assert torch.equal(rounded[name].weight(), artifact.weights[name])
    cfg = dataclasses.replace(artifact.config, embed_tokenizer=True)
    blob = train_gpt.encode_artifact(
        rounded, header["k"], cfg, True, header["codec"], artifact.tokenizer
    )
    again, rest_again = split(blob)
    assert rest_again == rest
    assert again == header | {"model": again["model"]}
    kept = {n: v for n, v in header["model"].items() if n not in RETIRED_FIELDS}
    assert again["model"] == {"skip_gates": False} | kept  # what the file is older than


def test_a_setting_that_is_younger_than_the_file_has_its_default(artifact, tmp_path):
    model = dict(split(PATH.read_bytes())[0]["model"])
    assert model.pop("logit_softcap") == train_gpt.Config().logit_softcap
    assert read_artifact(with_model(model, tmp_path / "a.ptz")).config == artifact.config


def test_a_retired_setting_is_read_at_its_one_value_only(artifact, tmp_path):
    model = split(PATH.read_bytes())[0]["model"]
    assert model["loop_adaln"] is False and RETIRED_FIELDS["loop_adaln"] is False
    assert "loop_adaln" not in train_gpt.MODEL_FIELDS
    with pytest.raises(ArtifactError, match="LOOP_ADALN is True, not False; use the train_gpt.py"):
        read_artifact(with_model(model | {"loop_adaln": True}, tmp_path / "a.ptz"))
    with pytest.raises(ArtifactError, match="there is no model setting 'NUM_EXPERTS'; use the"):
        read_artifact(with_model(model | {"num_experts": 8}, tmp_path / "b.ptz"))
