"""A score is proved by decoding: what was counted can be decoded elsewhere, and what was not cannot."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from artifacts import TINY, encoded, trained, write

from fairway.compression import proof
from fairway.compression.bitstream import read_bitstream, unpacked
from fairway.compression.compressor import Coder
from fairway.scoring.evaluation import Evaluation
from fairway.scoring.mixed import MixedScorer
from fairway.scoring.neural import make_neural
from fairway.scoring.settings import EvalConfig
from fairway.scoring.text import load_text
from train_gpt import Config, Log, Runtime, UserError, build_model, read_artifact, read_shard

COUNT = 600


def make_artifact(path: Path, corpus, inside: bool = True, **changed) -> Path:
    """Of a small model that is not trained, but not blank either."""
    model = trained(Config(**TINY | dict(vocab_size=corpus.vocab_size) | changed))
    tokenizer = (corpus.folder / "tokenizer.model").read_bytes()
    return write(path, encoded(model, tokenizer=tokenizer, embed_tokenizer=inside))


@pytest.fixture(scope="module")
def artifact(corpus, tmp_path_factory) -> Path:
    return make_artifact(tmp_path_factory.mktemp("proved") / "a.ptz", corpus)


@pytest.fixture(scope="module")
def cfg(artifact, corpus) -> EvalConfig:
    return EvalConfig(checkpoint=str(artifact), data_path=str(corpus.folder), eval_stride=8)


def scored(cfg: EvalConfig) -> tuple[np.ndarray, np.ndarray]:
    """The split's first tokens, and what was counted for them: as eval_final.py does, from the whole split."""
    text, rt = (
        load_text(cfg, loaded := read_artifact(cfg.checkpoint)),
        Runtime(0, 1, torch.device("cpu"), "cpu"),
    )
    scorer = MixedScorer(make_neural(build_model(loaded), cfg, rt), cfg, text.table)
    return text.tokens[:COUNT], scorer.score(text.tokens)[: COUNT - 1]


@pytest.fixture(scope="module")
def counted(cfg) -> tuple[np.ndarray, np.ndarray]:
    return scored(cfg)


@pytest.fixture(scope="module")
def proved(cfg, counted, tmp_path_factory):
    """(path of the proof, its verdict)"""
    path = tmp_path_factory.mktemp("proof") / "proof.fwy"
    proof.write_proof(cfg, counted[0], path, lambda done: None)
    return path, proof.prove(cfg, *counted, path)


def check(verdict, logp: np.ndarray) -> None:
    d = verdict.details
    assert verdict.passed and verdict.figure.startswith("600 tokens, ")
    assert d["claimed_bits"] == pytest.approx(-logp.sum() / np.log(2)) and d["file_bits"] % 8 == 0
    assert 0 <= d["file_bits"] - d["claimed_bits"] <= 0.001 * d["claimed_bits"] + 512


def test_a_score_is_decoded_at_the_price_that_it_claims(counted, proved):
    path, verdict = proved
    check(verdict, counted[1])
    header, _ = read_bitstream(path)
    assert header.count == COUNT - 1 and header.experts == dict(eval_stride=8)


@pytest.mark.parametrize(
    "settings",
    [
        dict(eval_mode="cached", mix_weights="exponential"),
        pytest.param(
            dict(eval_documents=True, expert_reset=True, mix_mode="log", mix_rate=0.1),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["cached-exponential", "documents-log"],
)
def test_so_is_one_by_other_settings(cfg, settings):
    """In this process: what another one adds is the same for all."""
    cfg, told = replace(cfg, **settings), []
    (tokens, logp), coder = scored(cfg), Coder.of(cfg.checkpoint, "cpu")
    coded = coder.encode_proof(tokens, cfg, told.append)
    header, payload = unpacked(coded, "proof.fwy")
    back = coder.decode_proof(header, payload, told.append)
    check(proof.verdict(tokens, back, -float(logp.sum()) / np.log(2), 8 * len(coded), 0.0), logp)
    assert sum(told) == 2 * (COUNT - 1) and header.experts == dict(eval_stride=8) | settings


def test_a_score_that_claims_too_much_is_found_out(counted, proved):
    tokens, details = counted[0], proved[1].details
    lifted = proof.verdict(
        tokens, tokens.copy(), 0.9 * details["claimed_bits"], details["file_bits"], 0.0
    )
    assert not lifted.passed and lifted.details["ratio"] > 1.1


def test_other_tokens_or_none_are_a_failure(counted):
    tokens, _ = counted
    changed = tokens.copy()
    changed[7] ^= 1
    assert proof.verdict(tokens, tokens.copy(), 1000.0, 1500, 0.0).passed
    assert "decoded other tokens" in proof.verdict(tokens, changed, 1000.0, 1500, 0.0).figure
    stopped = proof.verdict(tokens, "proof: error: no", 1000.0, 1500, 0.0)
    assert (
        not stopped.passed
        and stopped.figure == "another process could not decode: proof: error: no"
    )
    assert not proof.verdict(
        tokens, tokens.copy(), 1000.0, 1514, 0.0
    ).passed  # 1001 + 512, and a bit


def test_the_decoder_writes_the_shard_that_was_encoded(artifact, proved, counted, tmp_path, capsys):
    out = tmp_path / "tokens.bin"
    assert proof.main(["--artifact", str(artifact), str(proved[0]), "--out", str(out)]) == 0
    assert np.array_equal(read_shard(out), counted[0]) and capsys.readouterr().out == ""


def test_what_cannot_be_decoded_is_one_line(artifact, proved, tmp_path, capsys):
    out, data = tmp_path / "tokens.bin", proved[0].read_bytes()
    (tmp_path / "flipped.fwy").write_bytes(data[:60] + bytes([data[60] ^ 4]) + data[61:])
    (tmp_path / "cut.fwy").write_bytes(data[:-4])
    for name, why in (
        ("flipped.fwy", "checksum"),
        ("cut.fwy", "checksum"),
        ("absent.fwy", "No such file"),
    ):
        assert (
            proof.main(["--artifact", str(artifact), str(tmp_path / name), "--out", str(out)]) == 1
        )
        error = capsys.readouterr().err
        assert (
            error.startswith("proof: error: ")
            and why in error
            and error.count("\n") == 1
            and not out.exists()
        )


def test_the_error_of_another_process_is_told(cfg, corpus, proved, tmp_path):
    other = replace(cfg, checkpoint=str(make_artifact(tmp_path / "b.ptz", corpus, num_layers=1)))
    said = proof.decoded_elsewhere(other, proved[0])
    assert (
        isinstance(said, str)
        and said.startswith("proof: error: ")
        and "was made with artifact" in said
    )


def test_a_tokenizer_beside_the_shards_is_found_and_what_cannot_be_written_is_said_before_it_is_coded(
    cfg, corpus, tmp_path
):
    bare, rt = (
        make_artifact(tmp_path / "bare.ptz", corpus, inside=False),
        Runtime(0, 1, torch.device("cpu"), "cpu"),
    )
    settings = replace(
        cfg, checkpoint=str(bare), out_dir=str(tmp_path), eval_mode="cached", ngram_memory_mb=2305
    )
    evaluation = Evaluation(settings, rt, Log(Config(out_dir=str(tmp_path)), rt, "eval"))
    (tmp_path / "eval").mkdir()
    with pytest.raises(UserError, match="NGRAM_MEMORY_MB is 2305; a bitstream may ask for 2304"):
        proof.prove_score(evaluation, 50)
    evaluation.cfg, evaluation.logp = replace(settings, ngram_memory_mb=64), np.zeros(49) - 6.0
    told = proof.prove_score(evaluation, 50)
    assert told.details["tokens"] == 50 and "could not decode" not in told.figure
