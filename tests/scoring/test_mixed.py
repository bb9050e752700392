"""The text and the mixed scorer: bad input is one error line, and a score keeps every contract."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, english_like, train_tokenizer

from fairway.artifact_reader import read_artifact
from fairway.certificate.judge import certify
from fairway.scoring import counting
from fairway.scoring import mixed as mixed_module
from fairway.scoring.ablation import VARIANTS, ablation, as_rows, delayed
from fairway.scoring.columns import columns_in_memory
from fairway.scoring.commits import verify_chain
from fairway.scoring.counting import CountedText
from fairway.scoring.experts.mixing import Mixture
from fairway.scoring.mixed import (
    COMMIT_ROWS,
    DEFAULT_EXPERTS,
    MixedScorer,
    chunks,
    count_ahead,
    find_matches,
    make_ngram,
)
from fairway.scoring.neural import KINDS, make_neural
from fairway.scoring.settings import EvalConfig
from fairway.scoring.shipped import code_sizes
from fairway.scoring.text import load_text
from fairway.shards import write_shard
from train_gpt import BOS_ID, Runtime, UserError, build_model

ALONE = Runtime(0, 1, torch.device("cpu"), "test")
MODES = [
    dict(),
    dict(eval_mode="cached", mix_mode="log"),
    pytest.param(dict(eval_stride=16, mix_mode="log", expert_reset=True), marks=pytest.mark.slow),
    dict(eval_mode="cached", expert_reset=True, eval_documents=True),
]
each_mode = pytest.mark.parametrize(
    "settings", MODES, ids=lambda s: "-".join(map(str, s.values())) or "default"
)


@pytest.fixture(scope="module")
def artifact(trained_artifact):
    return read_artifact(trained_artifact)


@pytest.fixture(scope="module")
def model(artifact):
    return build_model(artifact)


@pytest.fixture(scope="module")
def text(artifact, corpus):
    return load_text(EvalConfig(data_path=str(corpus.folder)), artifact)


def make_scorer(model, text, **settings) -> MixedScorer:
    cfg = EvalConfig(**(dict(eval_stride=32) | settings))
    return MixedScorer(make_neural(model, cfg, ALONE), cfg, text.table)


def neural_columns(scorer: MixedScorer, tokens: np.ndarray):
    columns, matches = (
        columns_in_memory(len(tokens) - 1, KINDS),
        find_matches(tokens, scorer.vocab_size, scorer.cfg),
    )
    scorer.neural.fill(tokens, columns, matches.hint)
    return columns, matches


# ---- The text ------------------------------------------------------------------------------------
def refusal(artifact, **settings) -> str:
    with pytest.raises(UserError) as caught:
        load_text(EvalConfig(**{name: str(value) for name, value in settings.items()}), artifact)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    return message


def test_a_text_is_its_shards_in_order(artifact, corpus, text, tmp_path):
    write_shard(tmp_path / "x_val_1.bin", text.tokens[1000:])
    write_shard(tmp_path / "x_val_0.bin", text.tokens[:1000])
    (tmp_path / "x_train_0.bin").write_bytes(b"not part of it")
    again = load_text(EvalConfig(data_path=str(tmp_path)), artifact)
    assert (
        (again.tokens == text.tokens).all()
        and again.sha256 == text.sha256
        and again.bytes == text.bytes
    )
    decoded = corpus.tokenizer.decode(
        [
            ids[1:].tolist()
            for ids in np.split(text.tokens, np.flatnonzero(text.tokens == BOS_ID)[1:])
        ]
    )
    assert text.bytes == sum(len(d.encode()) for d in decoded) == text.sizes.sum()
    part = load_text(EvalConfig(val_files=str(tmp_path / "*l_0.bin")), artifact)
    assert (part.tokens == text.tokens[:1000]).all()
    assert text.bpb(np.full(len(text.sizes), -math.log(2))) == pytest.approx(
        len(text.sizes) / text.bytes
    )


def test_a_pattern_that_matches_no_shards(artifact, tmp_path):
    assert refusal(artifact, data_path=tmp_path).startswith(
        f"no shards match {tmp_path}/*_val_*.bin; run `make data`"
    )
    assert "no shards match nowhere-*" in refusal(artifact, val_files="nowhere-*")


@pytest.mark.parametrize("size", [0, 1])
def test_a_text_of_one_token_has_nothing_to_predict(artifact, tmp_path, size):
    write_shard(tmp_path / "x_val_0.bin", np.full(size, BOS_ID))
    assert f"holds {size} tokens; at least 2 are needed" in refusal(artifact, data_path=tmp_path)


def test_tokens_without_bytes(artifact, tmp_path):
    write_shard(tmp_path / "x_val_0.bin", np.full(9, BOS_ID))
    assert "stand for no bytes" in refusal(artifact, data_path=tmp_path)


def test_a_token_that_the_model_does_not_know(artifact, text, tmp_path):
    write_shard(tmp_path / "x_val_0.bin", np.append(text.tokens, 384))
    assert "holds token 384, but the artifact knows 384; set VAL_FILES" in refusal(
        artifact, data_path=tmp_path
    )


@pytest.mark.parametrize("keep", [0, 100, 1024, 2001, -1])
def test_a_shard_cut_short(artifact, text, tmp_path, keep):
    path = tmp_path / "x_val_0.bin"
    write_shard(path, text.tokens)
    path.write_bytes(path.read_bytes()[:keep])
    assert str(path) in refusal(artifact, data_path=tmp_path)


def test_shards_that_another_tokenizer_wrote(artifact, tmp_path):
    write_shard(tmp_path / "x_val_0.bin", np.random.default_rng(0).integers(4, 384, 3000))
    assert "the artifact's tokenizer" in refusal(artifact, data_path=tmp_path)


def test_the_tokenizer_is_the_given_file_the_artifacts_own_or_the_shards(
    artifact, corpus, text, tmp_path
):
    bare, beside = artifact._replace(tokenizer=b""), corpus.folder / "tokenizer.model"
    for settings in (
        dict(data_path=corpus.folder),
        dict(data_path=corpus.folder, tokenizer_path=beside),
    ):
        found = load_text(
            EvalConfig(**{name: str(value) for name, value in settings.items()}), bare
        )
        assert (
            found.bytes == text.bytes
            and found.tokenizer_path == str(beside)
            and text.tokenizer_path == ""
        )
    other = tmp_path / "other.model"
    other.write_bytes(train_tokenizer(english_like(7, 400), 384))
    for kind in (artifact, bare):
        message = refusal(kind, data_path=corpus.folder, tokenizer_path=other)
        assert (
            message.startswith(f"{other} is tokenizer ")
            and "but the artifact was trained with" in message
        )
        assert f"no tokenizer at {tmp_path}; set TOKENIZER_PATH" in refusal(
            bare, data_path=corpus.folder, tokenizer_path=tmp_path
        )
    write_shard(tmp_path / "x_val_0.bin", text.tokens)
    assert f"no tokenizer in the artifact nor at {tmp_path}/tokenizer.model" in refusal(
        bare, data_path=tmp_path
    )
    # As data/download_fineweb.py lays it out: shards in datasets/, tokenizers beside that folder.
    shards, tokenizers = tmp_path / "datasets" / "fineweb10B_sp384", tmp_path / "tokenizers"
    for folder in (shards, tokenizers):
        folder.mkdir(parents=True)
    write_shard(shards / "x_val_0.bin", text.tokens)
    (tokenizers / "fineweb_384_bpe.model").write_bytes(artifact.tokenizer)
    found = load_text(EvalConfig(data_path=str(shards)), bare)
    assert found.bytes == text.bytes and "fineweb_384_bpe.model" in found.tokenizer_path


def test_counted_code_is_what_was_imported_and_the_extra_files(tmp_path):
    (tmp_path / "more.cu").write_bytes(b"12345")
    sizes = code_sizes(f" {tmp_path / 'more.cu'}, ")
    assert sizes[str(tmp_path / "more.cu")] == 5 and len(sizes) == len(code_sizes("")) + 1
    assert sizes["train_gpt.py"] == (ROOT / "train_gpt.py").stat().st_size
    assert all((ROOT / name).is_file() for name in sizes if not Path(name).is_absolute())
    with pytest.raises(UserError, match="EXTRA_CODE_FILES names nowhere.py, which is no file"):
        code_sizes("nowhere.py")


# ---- The scorer ----------------------------------------------------------------------------------
@each_mode
def test_scoring_twice_gives_the_same_and_commits_to_all_of_it(model, text, settings):
    scorer, tokens = make_scorer(model, text, **settings), text.tokens
    out = scorer.score(tokens)
    commits, digest = scorer.commits, scorer.mixture.digest()
    assert (
        out.shape == (len(tokens) - 1,)
        and out.dtype == np.float64
        and (out < 0).all()
        and np.isfinite(out).all()
    )
    assert (scorer.score(tokens) == out).all() and (scorer.commits, scorer.mixture.digest()) == (
        commits,
        digest,
    )
    assert len(tokens) > COMMIT_ROWS and verify_chain(commits) is None
    assert [c.first for c in commits] == list(range(0, len(out), COMMIT_ROWS))
    for c in commits:
        rows = slice(c.first, c.first + c.count)
        assert (
            c.nats == pytest.approx(-out[rows].sum(), abs=1e-9)
            and c.bytes == text.sizes[rows].sum()
        )
    assert sum(c.count for c in commits) == len(out) and len({c.state for c in commits}) == len(
        commits
    )
    assert out.mean() > neural_columns(scorer, tokens)[0]["logp"].mean() + 0.05 * (settings == {})


@each_mode
def test_distributions_are_what_was_counted_and_read_no_later_token(
    model, text, settings, monkeypatch
):
    """Rows on both sides of a commit, of a window and of a document; commits are shortened."""
    monkeypatch.setattr(mixed_module, "COMMIT_ROWS", 192)
    scorer, tokens = make_scorer(model, text, **settings), text.tokens[:300]
    out = scorer.score(tokens)
    bos = int(np.flatnonzero(tokens == BOS_ID)[2])
    for i in (1, 2, 64, 65, bos, bos + 1, 192, 193, len(tokens) - 1):
        held = scorer.distribution(tokens, i)
        assert held.shape == (384,) and abs(held.sum() - 1) < 1e-12 and (held > 0).all()
        assert math.log(held[tokens[i]]) == pytest.approx(out[i - 1], abs=scorer.tolerance)
        changed = tokens.copy()
        changed[i:] = (changed[i:] + 7) % 384
        assert (scorer.distribution(changed, i) == held).all()
        np.testing.assert_allclose(
            scorer.score(changed)[: i - 1], out[: i - 1], rtol=0, atol=scorer.tolerance
        )


@each_mode
@pytest.mark.parametrize("size", [0, 1, 2, 3])
def test_texts_of_at_most_three_tokens(model, text, settings, size):
    scorer = make_scorer(model, text, **settings)
    for tokens in (text.tokens[:size], text.tokens[5 : 5 + size], np.full(size, BOS_ID, np.uint16)):
        out = scorer.score(tokens)
        assert out.shape == (max(size - 1, 0),) and np.isfinite(out).all()
        assert sum(c.count for c in scorer.commits) == len(out)
        if size:
            assert scorer.distribution(tokens, size).sum() == pytest.approx(1, abs=1e-12)
        assert all(
            ((0 <= b) & (b < max(size - 1, 0))).all() for b in scorer.boundaries(tokens).values()
        )


@each_mode
def test_boundaries_are_rows_of_the_text(model, text, settings):
    found = make_scorer(model, text, **settings).boundaries(text.tokens)
    assert {"chunk", "window", "document", "batch"} <= found.keys()
    assert set(range(0, len(text.sizes), COMMIT_ROWS)) <= set(found["chunk"].tolist())
    for kind, rows in found.items():
        assert len(rows) and rows.min() >= 0 and rows.max() < len(text.sizes), kind
    assert set(np.flatnonzero(text.tokens[:-1] == BOS_ID)) <= set(found["document"].tolist())


def test_reset_experts_know_nothing_of_earlier_documents(model, text):
    starts = np.flatnonzero(text.tokens == BOS_ID)
    document = text.tokens[starts[20] : starts[25]]
    changed = [np.concatenate([text.tokens[a:b], document]) for a, b in ((0, 300), (600, 900))]
    for reset in (True, False):
        scorer = make_scorer(model, text, expert_reset=reset, eval_documents=True)
        evidence = []
        for tokens in changed:
            grams = make_ngram(384, scorer.cfg, tokens)
            evidence.append([part[300:] for part in grams.fill(tokens[1:])])
            evidence[-1] += [part[300:] for part in find_matches(tokens, 384, scorer.cfg)]
        assert all((a == b).all() for a, b in zip(*evidence, strict=True)) == reset


@each_mode
def test_the_certificate_finds_nothing(model, text, settings):
    scorer = make_scorer(model, text, **settings)
    certificate = certify(
        scorer,
        text.tokens,
        byte_table=text.table,
        tokenizer=text.tokenizer,
        claimed=scorer.score(text.tokens),
        seconds=1.0,
    )
    assert [(v.rule, v.figure) for v in certificate.verdicts if v.verdict == "FAIL"] == []
    assert {v.rule for v in certificate.verdicts if v.verdict == "cannot tell"} <= {
        "sizes"
    } and certificate.passed


def test_embeddings_look_back_by_one_token_and_never_across_a_bos(model, text):
    scorer, tokens = make_scorer(model, text), text.tokens[:200].copy()
    before = scorer.embeddings(tokens)
    assert before.shape == (200, 32)
    bos = int(np.flatnonzero(tokens == BOS_ID)[1])
    for at, moved in ((50, {50, 51} - {bos}), (bos - 1, {bos - 1})):
        changed = tokens.copy()
        changed[at] = 77 if tokens[at] != 77 else 78
        assert (
            set(np.flatnonzero((scorer.embeddings(changed) != before).any(axis=1)).tolist())
            == moved
        )


def test_counting_in_another_thread_changes_no_bit(model, text, monkeypatch):
    scorer = make_scorer(model, text)
    columns, matches = neural_columns(scorer, text.tokens)
    alone, commits = scorer.mixed(text.tokens, columns, matches), scorer.commits
    state = scorer.grams.candidate_counts()
    monkeypatch.setattr(counting, "BLOCK_ROWS", 700)  # no multiple of the rows of a commit
    assert len(text.sizes) > 5 * 700
    for ahead in (1, 1500, 10**6):
        grams = make_ngram(384, scorer.cfg, text.tokens)
        with CountedText(grams, text.tokens[1:], ahead) as counted:
            np.testing.assert_array_equal(
                scorer.mixed(text.tokens, columns, matches, counted), alone
            )
        assert scorer.commits == commits and counted.digest() == grams.digest()
        for a, b in zip(scorer.grams.candidate_counts(), state, strict=True):
            np.testing.assert_array_equal(a, b)


def test_counts_that_nobody_takes_are_bounded_and_given_up(text, monkeypatch):
    monkeypatch.setattr(counting, "BLOCK_ROWS", 64)
    grams = make_ngram(384, EvalConfig(), text.tokens)
    counted = CountedText(grams, text.tokens[1:], 128)
    counted.take(10)
    counted.close()
    assert grams.position <= 1 + 3 * 64
    with (
        pytest.raises(UserError, match="holds token 999"),
        CountedText(grams, np.full(200, 999), 128) as counted,
    ):
        counted.take(100)


# ---- Texts on which experts are useless ----------------------------------------------------------
@pytest.mark.parametrize(
    "settings",
    [dict(), dict(mix_mode="log"), dict(mix_weights="exponential"), dict(mix_weights="em")],
    ids=str,
)
@pytest.mark.parametrize(
    "kind", ["random tokens", "random bytes", "one document a token", "no BOS"]
)
def test_mixing_costs_next_to_nothing(model, text, settings, kind):
    rng = np.random.default_rng(0)
    tokens = rng.integers(4, 384 if kind == "random tokens" else 260, 3000).astype(np.uint16)
    if kind == "one document a token":
        tokens[::2] = BOS_ID
    scorer = make_scorer(model, text, **settings)
    columns, matches = neural_columns(scorer, tokens)
    out = scorer.mixed(tokens, columns, matches)
    cost = (columns["logp"].sum() - out.sum()) / math.log(2) / scorer.table.count(tokens).sum()
    assert cost <= 0.0002


# ---- Ablation ------------------------------------------------------------------------------------
def test_every_variant_is_the_mixture_that_it_names(model, text):
    scorer, progress = make_scorer(model, text), []
    columns, matches = neural_columns(scorer, text.tokens)
    sums = ablation(text.tokens, text.sizes, columns, matches, 384, scorer.cfg, 2, progress.append)
    assert list(sums) == list(VARIANTS) and len(set(sums.values())) == len(sums)
    assert progress[-1] == len(text.sizes) and progress == sorted(progress)
    neural = columns["logp"].sum()
    for name, total in sums.items():
        assert math.isfinite(total) and (neural - total) / math.log(2) / text.bytes <= 0.0002, name
    assert sums["contextual, chain"] > neural + 0.05 * len(text.sizes)
    changed, experts = VARIANTS["contextual, chain"]
    mixture = Mixture(384, EvalConfig(eval_stride=32, **changed), experts)
    alone = sum(
        mixture.fill(chunk.inputs).sum()
        for chunk in chunks(
            text.tokens, text.sizes, columns, matches, count_ahead(text.tokens, 384, scorer.cfg)
        )
    )
    assert sums["contextual, chain"] == pytest.approx(alone, abs=1e-9)
    for row in as_rows(sums, text, 2.0):
        assert (
            row["bpb"] == pytest.approx(text.bpb(np.array([sums[row["name"]]])))
            and row["gain"] == 2.0 - row["bpb"]
        )


def test_delayed_experts_know_less_and_finally_nothing(model, text):
    scorer = make_scorer(model, text)
    columns, matches = neural_columns(scorer, text.tokens)
    now, later, never = (
        delayed(text.tokens, text.sizes, columns, 384, scorer.cfg, d) for d in (0, 1000, 10**6)
    )
    assert now == pytest.approx(scorer.mixed(text.tokens, columns, matches).sum(), abs=1e-9)
    temperatures = Mixture(384, scorer.cfg, DEFAULT_EXPERTS[:3])
    rest = sum(
        temperatures.fill(chunk.inputs).sum()
        for chunk in chunks(
            text.tokens, text.sizes, columns, matches, count_ahead(text.tokens, 384, scorer.cfg)
        )
    )
    rows = len(text.sizes)
    assert now - later > 0.02 * rows and later - never > 0.02 * rows
    assert abs(never - rest) < 0.02 * rows  # the rest is what the model's own temperatures gain
