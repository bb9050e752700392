"""A score is proved by decoding: what was counted decodes elsewhere, and a false claim fails."""

import contextlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from artifacts import TINY, encoded, trained, write
from tqdm import tqdm

from fairway import cli
from fairway.artifact_reader import read_artifact
from fairway.compression import proof
from fairway.compression.bitstream import parse_bitstream, read_bitstream
from fairway.compression.compressor import Compressor
from fairway.scoring.mixed import MixedScorer
from fairway.scoring.neural import Neural
from fairway.scoring.settings import EvalConfig
from fairway.scoring.text import Text, load_text
from train_gpt import Config, Runtime, UserError, build_model, read_shard

COUNT = 250
ALONE = Runtime(0, 1, torch.device("cpu"), "cpu")


def make_artifact(path: Path, corpus, **changed) -> Path:
    """Write the artifact of a small random model. Its tokenizer is next to the shards."""
    model = trained(Config(**TINY | dict(vocab_size=corpus.vocab_size) | changed))
    tokenizer = (corpus.folder / "tokenizer.model").read_bytes()
    return write(path, encoded(model, tokenizer=tokenizer, embed_tokenizer=False))


@pytest.fixture(scope="module")
def artifact(corpus, tmp_path_factory) -> Path:
    return make_artifact(tmp_path_factory.mktemp("proved") / "a.ptz", corpus)


@pytest.fixture(scope="module")
def cfg(artifact, corpus) -> EvalConfig:
    return EvalConfig(checkpoint=str(artifact), data_path=str(corpus.folder), eval_stride=8)


@pytest.fixture(scope="module")
def text(cfg) -> Text:
    return load_text(cfg, read_artifact(cfg.checkpoint))


def score(cfg: EvalConfig, text: Text) -> np.ndarray:
    """Return what is counted for the first COUNT tokens, with as much text again after them."""
    model = build_model(read_artifact(cfg.checkpoint))
    scorer = MixedScorer(Neural(model, cfg, ALONE), cfg, text.table)
    return scorer.score(text.tokens[: 2 * COUNT])[: COUNT - 1]


@pytest.fixture(scope="module")
def logp(cfg, text) -> np.ndarray:
    return score(cfg, text)


@pytest.fixture(scope="module")
def evaluation(cfg, text, logp, tmp_path_factory):
    """Return the parts of a finished evaluation that a proof reads."""
    folder = tmp_path_factory.mktemp("eval")
    return SimpleNamespace(
        cfg=cfg,
        text=text,
        logp=logp,
        folder=folder,
        stage=contextlib.nullcontext,
        bar=lambda label, rows: tqdm(total=rows, disable=True),
    )


@pytest.fixture(scope="module")
def facts(evaluation) -> proof.ProofFacts:
    return proof.prove_score(evaluation, COUNT)


def check(facts: proof.ProofFacts, logp: np.ndarray) -> None:
    """Check that a proof holds, at the price that `logp` claims."""
    d = facts.details
    assert facts.passed and facts.figure.startswith(f"{COUNT} tokens, ")
    assert d["claimed_bits"] == pytest.approx(-logp.sum() / np.log(2)) and d["file_bits"] % 8 == 0
    assert 0 <= d["file_bits"] - d["claimed_bits"] <= 0.001 * d["claimed_bits"] + 512


def test_a_score_is_decoded_at_the_price_that_it_claims(facts, logp, evaluation):
    """The tokenizer is next to the shards, and the other process gets its path."""
    check(facts, logp)
    header, _ = read_bitstream(evaluation.folder / "proof.fwy")
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
def test_a_score_with_other_settings_is_decoded_too(cfg, text, settings):
    """In this process: another one would add the same for all settings."""
    cfg, steps, tokens = replace(cfg, **settings), [], text.tokens[:COUNT]
    logp = score(cfg, text)
    compressor = Compressor.load(cfg.checkpoint, "cpu", text.tokenizer_path)
    coded = compressor.encode_proof(tokens, cfg, steps.append)
    header, payload = parse_bitstream(coded, "proof.fwy")
    decoded = compressor.decode_proof(header, payload, steps.append)
    claimed_bits = -float(logp.sum()) / np.log(2)
    check(proof.proof_facts(tokens, decoded, claimed_bits, 8 * len(coded), 0.0), logp)
    assert sum(steps) == 2 * (COUNT - 1) and header.experts == dict(eval_stride=8) | settings


def test_a_score_that_claims_too_few_bits_fails(text, facts):
    tokens, claimed = text.tokens[:COUNT], facts.details["claimed_bits"]
    lifted = proof.proof_facts(tokens, tokens, 0.9 * claimed, facts.details["file_bits"], 0.0)
    assert not lifted.passed and lifted.details["ratio"] > 1.1


def test_other_tokens_or_none_fail(text):
    tokens = text.tokens[:COUNT]
    changed = tokens.copy()
    changed[7] ^= 1
    assert proof.proof_facts(tokens, tokens.copy(), 1000.0, 1500, 0.0).passed
    other = proof.proof_facts(tokens, changed, 1000.0, 1500, 0.0)
    assert not other.passed and "decoded other tokens" in other.figure
    stopped = proof.proof_facts(tokens, "an error line", 1000.0, 1500, 0.0)
    assert not stopped.passed
    assert stopped.figure == "another process could not decode: an error line"
    # 1001 bits and 64 bytes may be used; here it is one bit more.
    assert not proof.proof_facts(tokens, tokens.copy(), 1000.0, 1514, 0.0).passed


def test_decode_proof_writes_the_shard_that_was_encoded(
    artifact, facts, evaluation, text, tmp_path, capsys
):
    out, file = tmp_path / "tokens.bin", evaluation.folder / "proof.fwy"
    options = ["--artifact", str(artifact), "--tokenizer", text.tokenizer_path]
    assert cli.main(["decode-proof", *options, str(file), "--out", str(out)]) == 0
    assert np.array_equal(read_shard(out), text.tokens[:COUNT])
    assert capsys.readouterr().out == f"{out}: {COUNT} tokens\n"


def test_a_damaged_proof_is_one_line(artifact, facts, evaluation, tmp_path, capsys):
    out, data = tmp_path / "tokens.bin", (evaluation.folder / "proof.fwy").read_bytes()
    (tmp_path / "flipped.fwy").write_bytes(data[:60] + bytes([data[60] ^ 4]) + data[61:])
    (tmp_path / "cut.fwy").write_bytes(data[:-4])
    for name, reason in (
        ("flipped.fwy", "checksum"),
        ("cut.fwy", "checksum"),
        ("absent.fwy", "No such file"),
    ):
        words = ["--artifact", str(artifact), str(tmp_path / name), "--out", str(out)]
        assert cli.main(["decode-proof", *words]) == 1
        error = capsys.readouterr().err
        assert error.startswith("fairway decode-proof: error: ") and error.count("\n") == 1
        assert reason in error and not out.exists()


def test_the_error_of_another_process_is_passed_on(artifact, facts, evaluation):
    """It names a device that does not exist, which the process finds before it loads anything."""
    cfg = SimpleNamespace(checkpoint=str(artifact), tokenizer_path="", device="abacus")
    message = proof.decode_elsewhere(cfg, evaluation.folder / "proof.fwy")
    assert isinstance(message, str) and message.startswith("fairway decode-proof: error: ")
    assert "abacus" in message


def test_a_proof_of_another_artifact_is_refused(corpus, text, facts, evaluation, tmp_path, capsys):
    other, out = make_artifact(tmp_path / "b.ptz", corpus, num_layers=1), tmp_path / "tokens.bin"
    options = ["--artifact", str(other), "--tokenizer", text.tokenizer_path, "--out", str(out)]
    assert cli.main(["decode-proof", *options, str(evaluation.folder / "proof.fwy")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("fairway decode-proof: error: ") and "was made with artifact" in error
    assert not out.exists()


def test_settings_that_no_bitstream_holds_are_refused_before_coding(evaluation, tmp_path):
    other = SimpleNamespace(**vars(evaluation))
    other.cfg, other.folder = replace(evaluation.cfg, ngram_memory_mb=2305), tmp_path
    with pytest.raises(UserError, match="NGRAM_MEMORY_MB is 2305; a bitstream may ask for 2304"):
        proof.prove_score(other, 50)
    assert not list(tmp_path.iterdir())
