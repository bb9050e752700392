"""The certificate catches every cheat of the zoo by the rule that it breaks, and passes every
honest scorer.
"""

import functools
import json
import re
import signal
import sys
import threading
import time

import numpy as np
import pytest
from conftest import ROOT, english_like, to_tokens
from hypothesis import given
from hypothesis import strategies as st

from fairway import cli
from fairway.certificate.accounts import JUDGES
from fairway.certificate.judge import Certificate, Verdict, certify
from fairway.certificate.synthetic import synthetic_tokens
from fairway.scoring.commits import CHAIN_START, Commit, chained, verify_chain
from fairway.scoring.shipped import counted_code_bytes, imported_code
from fairway.shards import write_shard
from tests.zoo import CHEATS, HONEST, UNSEEN, certificate_of, honest, zoo_table
from tests.zoo.honest import TABLE, TEXT, TOKENIZER, Bigram, Smeared, Uniform, V
from train_gpt import BOS_ID, ByteTable, UserError

certificate_on = functools.cache(certificate_of)
RULES = [
    "causal",
    "normalised",
    "target-blind",
    "score first",
    "one pass",
    "coverage",
    "claim",
    "bytes",
    "canary",
    "paid prefix",
    "smear",
    "sizes",
]


def verdict_on(certificate: Certificate, rule: str) -> Verdict:
    """Return the verdict of one rule."""
    return next(v for v in certificate.verdicts if v.rule == rule)


# ---- The zoo -------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", CHEATS, ids=lambda kind: kind.__name__)
def test_each_cheat_is_caught_by_the_rule_that_it_breaks(kind):
    certificate = certificate_on(kind)
    assert verdict_on(certificate, kind.breaks).verdict == "FAIL" and not certificate.passed


@pytest.mark.parametrize("kind", [*HONEST, *UNSEEN], ids=lambda kind: kind.__name__)
def test_honest_scorers_pass(kind):
    certificate = certificate_on(kind)
    assert [(v.rule, v.figure) for v in certificate.verdicts if v.verdict == "FAIL"] == []
    assert certificate.passed and [v.rule for v in certificate.verdicts] == RULES


@pytest.mark.parametrize("kind", [*HONEST, *CHEATS], ids=lambda kind: kind.__name__)
def test_every_verdict_is_one_line_and_goes_into_json(kind):
    certificate = certificate_on(kind)
    for v in certificate.verdicts:
        assert v.verdict in ("ok", "FAIL", "cannot tell")
        assert v.figure and "\n" not in v.figure and "Traceback" not in v.figure
    read = json.loads(json.dumps(certificate.as_json(), allow_nan=False))
    assert read["passed"] == certificate.passed and len(read["rules"]) == len(RULES)
    assert len(certificate.table().splitlines()) == len(RULES) + 1


def test_every_rule_is_broken_by_some_cheat():
    assert {kind.breaks for kind in CHEATS} == set(RULES)


class CountsChunks(honest.ScoreFirst):
    """Commits the number of the chunk in place of a digest of what it learned."""

    def rows(self, tokens: np.ndarray) -> np.ndarray:
        held = super().rows(tokens)
        self.states = [str(nth) for nth in range(len(self.states))]
        return held


def test_a_chunk_longer_than_the_excerpt_is_read_to_its_end(monkeypatch):
    monkeypatch.setattr(honest, "CHUNK", 600)
    verdict = verdict_on(certificate_of(honest.ScoreFirst), "score first")
    assert (
        verdict.verdict == "ok" and verdict.details["adaptive"] and verdict.details["commits"] == 2
    )
    verdict = verdict_on(certificate_of(CountsChunks), "score first")
    assert verdict.verdict == "FAIL" and "no digest of what was learned" in verdict.figure


def test_a_rule_about_something_the_scorer_does_not_offer_cannot_tell():
    plain = certificate_on(Uniform)
    assert [v.rule for v in plain.verdicts if v.verdict == "cannot tell"] == [
        "score first",
        "smear",
    ]
    assert plain.about["vocab_size"] == V
    smear = verdict_on(certificate_on(Smeared), "smear")
    assert smear.verdict == "ok" and certificate_on(Smeared).about["tolerance"] == 1e-6


def test_the_zoo_table_names_every_scorer_and_marks_what_it_breaks():
    lines = zoo_table([Bigram, CHEATS[0]]).splitlines()
    assert all(rule in lines[0] for rule in RULES)
    assert lines[1].startswith("Bigram ") and "x" not in lines[1][24:]
    assert lines[2].startswith("TwoPasses ") and "[x]" in lines[2]


# ---- The text, and what was claimed for it -------------------------------------------------------
def test_claims_for_the_full_text_are_compared_with_its_prefixes():
    honest = Bigram().score(TEXT)
    assert verdict_on(certify(Bigram(), TEXT, claimed=honest, seconds=0.1), "claim").verdict == "ok"
    for wrong, message in (
        (honest * 0.99, "moved by"),
        (honest[:-1], "1,198 scores were claimed for 1,199 targets"),
    ):
        verdict = verdict_on(certify(Bigram(), TEXT, claimed=wrong, seconds=0.1), "claim")
        assert verdict.verdict == "FAIL" and message in verdict.figure
    unscored = np.append(honest[:-1], np.nan)
    assert (
        verdict_on(certify(Bigram(), TEXT, claimed=unscored, seconds=0.1), "coverage").verdict
        == "FAIL"
    )


@pytest.mark.parametrize(
    "text",
    [np.full(200, 5), np.full(200, BOS_ID), np.arange(200) % 40 + 4, TEXT[:128]],
    ids=["one token", "only BOS", "no BOS", "the shortest"],
)
def test_odd_texts_are_judged_too(text):
    certificate = certify(Bigram(), text.astype(np.int64), byte_table=TABLE, seconds=0.05)
    assert [(v.rule, v.figure) for v in certificate.verdicts if v.verdict == "FAIL"] == []


def test_an_unusable_text_is_refused_in_one_line():
    for text, message in (
        (TEXT[:127], "at least 128 tokens, not 127"),
        (TEXT[:0], "not 0"),
        (np.full(200, V), f"holds token {V}, but the scorer's vocabulary is {V}"),
    ):
        with pytest.raises(UserError, match=message):
            certify(Bigram(), text, seconds=0.05)
    short = ByteTable(TABLE.base[:9], TABLE.space[:9], TABLE.boundary[:9])
    with pytest.raises(UserError, match="byte table has 9 pieces"):
        certify(Bigram(), TEXT, byte_table=short, seconds=0.05)


@pytest.mark.parametrize("vocab_size", [4, 65_536])
def test_any_vocabulary(vocab_size):
    class Flat(Uniform):
        def score(self, tokens):
            return np.full(len(tokens) - 1, -np.log(vocab_size))

        def distribution(self, tokens, i):
            return np.full(vocab_size, 1 / vocab_size)

    certificate = certify(Flat(), synthetic_tokens(vocab_size, 300), seconds=0.05)
    assert certificate.passed and certificate.about["vocab_size"] == vocab_size


def test_a_scorer_cannot_change_the_text():
    class Overwrites(Uniform):
        def score(self, tokens):
            tokens[:] = 0
            return super().score(tokens)

    before = TEXT.copy()
    assert certify(Overwrites(), TEXT, seconds=0.05).passed and (before == TEXT).all()


@pytest.mark.parametrize(
    "rule, extra",
    [
        ("coverage", dict(vocab_size="many")),
        ("coverage", dict(boundaries=lambda tokens: [1, 2])),
        ("score first", dict(commits=[{"first": 0}])),
        ("score first", dict(commits=[(-1, 2**70, 0, 0, "", "")])),
        ("smear", dict(embeddings=lambda tokens: [[1], [2, 3]])),
        ("smear", dict(embeddings=lambda tokens: np.zeros(3))),
        ("coverage", dict(commits=[])),
        ("coverage", dict(tolerance=float("nan"))),
        ("coverage", dict(score=None)),
        ("normalised", dict(distribution=lambda tokens, i: np.full(V, np.nan))),
        ("coverage", dict(distribution=lambda tokens, i: "a")),
        ("coverage", dict(score=lambda tokens: sys.exit(0))),
    ],
)
def test_odd_answers_end_in_a_verdict_not_in_a_traceback(rule, extra):
    scorer = Uniform()
    for name, value in extra.items():
        setattr(scorer, name, value)
    verdict = verdict_on(
        certify(scorer, TEXT, byte_table=TABLE, tokenizer=TOKENIZER, seconds=0.05), rule
    )
    assert verdict.verdict == "FAIL" and "\n" not in verdict.figure


# ---- Bytes and totals ----------------------------------------------------------------------------
def test_bytes_are_audited_against_a_real_tokenizer(corpus):
    tokens = to_tokens(corpus.tokenizer, english_like(3, 40))

    class Flat(Uniform):
        def score(self, tokens):
            return np.full(len(tokens) - 1, -np.log(corpus.vocab_size))

        def distribution(self, tokens, i):
            return np.full(corpus.vocab_size, 1 / corpus.vocab_size)

    verdict = verdict_on(certify(Flat(), tokens, tokenizer=corpus.tokenizer, seconds=0.1), "bytes")
    assert verdict.verdict == "ok" and verdict.details["documents"] >= 8
    table = ByteTable.of(corpus.tokenizer, corpus.vocab_size)
    twice = ByteTable(table.base + table.space, table.space, table.boundary)
    verdict = verdict_on(
        certify(Flat(), tokens, byte_table=twice, tokenizer=corpus.tokenizer, seconds=0.1), "bytes"
    )
    assert verdict.verdict == "FAIL" and "decodes to" in verdict.figure
    assert (
        verdict_on(certify(Flat(), tokens, byte_table=table, seconds=0.1), "bytes").verdict
        == "cannot tell"
    )
    assert verdict_on(certify(Flat(), tokens, seconds=0.1), "bytes").verdict == "cannot tell"


def test_the_totals_of_the_challenge_are_known(monkeypatch):
    size = int(TABLE.count(TEXT).sum())
    monkeypatch.setattr("fairway.certificate.accounts.CANONICAL_TARGETS", {len(TEXT) - 1: "SP48"})
    for canonical, verdict in ((size, "ok"), (int(size * 1.001), "FAIL")):
        monkeypatch.setattr("fairway.certificate.accounts.CANONICAL_BYTES", canonical)
        assert (
            verdict_on(certify(Bigram(), TEXT, byte_table=TABLE, seconds=0.05), "coverage").verdict
            == verdict
        )


def test_sizes_count_every_imported_module_but_the_judges():
    code = imported_code()
    assert {"train_gpt.py", "fairway/scoring/shipped.py"} <= code.keys()
    assert not any(path.startswith(("tests/", "bench/")) for path in code)

    budget = 1000 + counted_code_bytes(code)

    def judge(**change):
        sizes = {"artifact": 1000, "code": code} | change
        return verdict_on(
            certify(Uniform(), TEXT, sizes=sizes, budget_bytes=budget, seconds=0.05), "sizes"
        )

    assert judge().verdict == "ok"
    assert judge(artifact=1001).figure.endswith(f"1 over the budget of {budget:,}")
    assert (
        "train_gpt.py is imported"
        in judge(code={k: v for k, v in code.items() if k != "train_gpt.py"}).figure
    )
    assert "counted as 74" in judge(code=code | {"train_gpt.py": 74}).figure
    absolute = {str(ROOT / path): size for path, size in code.items()}
    assert judge(code=absolute).verdict == "ok"
    without_judges = {path: size for path, size in code.items() if not path.startswith(JUDGES)}
    assert len(without_judges) < len(code) and judge(code=without_judges).verdict == "ok"
    elsewhere = judge(code=code | {"/elsewhere/their_scorer.py": 500})
    assert elsewhere.figure.endswith(f"500 over the budget of {budget:,}")


# ---- The commit log ------------------------------------------------------------------------------
def log_of(entries) -> list[Commit]:
    log = []
    for first, nats in entries:
        log.append(chained(log[-1].chain if log else CHAIN_START, first, 3, nats, 5, "ab" * 32))
    return log


@given(st.lists(st.tuples(st.integers(0, 1 << 40), st.floats(0, 1e9)), max_size=6), st.data())
def test_any_change_of_a_commit_breaks_the_chain(entries, data):
    log = log_of(entries)
    assert verify_chain(log) is None and verify_chain([tuple(c) for c in log]) is None
    if log:
        at = data.draw(st.integers(0, len(log) - 1))
        for change in (
            dict(first=log[at].first + 1),
            dict(nats=log[at].nats + 1.0),
            dict(state="cd" * 32),
        ):
            assert verify_chain([*log[:at], log[at]._replace(**change), *log[at + 1 :]]) == at
        if at + 1 < len(log):
            assert verify_chain([*log[:at], *log[at + 1 :]]) == at


def test_the_chain_of_a_known_commit():
    commit = chained(CHAIN_START, np.int64(0), np.int32(64), np.float64(1.5), np.int16(100), "00")
    assert commit == (
        0,
        64,
        1.5,
        100,
        "00",
        "b4ddfb70b96610eb40fb8843c4f09aae341aa8eb32ab01b4b1ea71fc442b1545",
    )


# ---- Speed, progress, threads --------------------------------------------------------------------
def test_the_time_is_kept_and_progress_reported():
    """Beyond the second, a certificate may cost what one costs that has next to no time."""
    heard, start = [], time.perf_counter()
    certify(Bigram(), TEXT, seconds=0.01)
    least, start = time.perf_counter() - start, time.perf_counter()
    certificate = certify(
        Bigram(),
        TEXT,
        seconds=1.0,
        on_progress=lambda rule, fraction: heard.append((rule, fraction)),
    )
    taken = time.perf_counter() - start
    assert taken < 3 + 3 * least
    assert [rule for rule, _ in heard] == RULES and [f for _, f in heard] == sorted(
        f for _, f in heard
    )
    assert certificate.about["seconds"] == pytest.approx(taken, abs=0.1)


def test_a_thread_that_cannot_be_interrupted_still_judges():
    certificates = []
    thread = threading.Thread(
        target=lambda: certificates.append(certify(Uniform(), TEXT, seconds=0.05))
    )
    thread.start()
    thread.join()
    assert certificates[0].passed


# ---- The command ---------------------------------------------------------------------------------
@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """`run("mine:Scorer --seconds 1")`: exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    pipes = signal.getsignal(signal.SIGPIPE)

    def call(words: str) -> tuple[int, str, str]:
        code = cli.main(["certify", *words.split()])
        return code, *capsys.readouterr()

    yield call
    signal.signal(signal.SIGPIPE, pipes)  # the command lets a closed pipe end its process


def test_the_command_judges_anyones_scorer(tmp_path, run):
    (tmp_path / "their_scorer.py").write_text(
        "import numpy as np\nclass Flat:\n    lift = 0.0\n"
        "    def score(self, tokens): return np.full(len(tokens) - 1, -np.log(64) + self.lift)\n"
        "    def distribution(self, tokens, i): return np.full(64, 1 / 64)\n"
        "class Lifted(Flat): lift = 0.5\n"
    )
    code, out, err = run("their_scorer:Flat --seconds 0.2 --json c.json")
    assert (code, err) == (0, "") and out.splitlines()[0].split() == ["rule", "verdict", "figure"]
    read = json.loads((tmp_path / "c.json").read_text())
    assert read["scorer"] == "their_scorer:Flat" and read["vocab_size"] == 64
    assert read["tokens"] == 20_000
    write_shard(tmp_path / "x_val_000000.bin", synthetic_tokens(64, 500))
    code, out, err = run("their_scorer:Lifted --seconds .2 --val *_val_*.bin --tokens 300")
    assert code == 1 and "FAIL" in out and err == ""
    (tmp_path / "model.ptz").write_bytes(bytes(1000))
    code, out, err = run("their_scorer:Flat --seconds .2 --tokens 300 --artifact model.ptz")
    assert code == 0 and "of 16,000,000 bytes" in out.splitlines()[-1]
    source, read = (tmp_path / "their_scorer.py").stat().st_size, out.splitlines()[-1]
    total, code_bytes = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+) of ", read))
    assert total == 1000 + code_bytes > 1000 + source


def test_mistakes_at_the_command_are_one_line_each(tmp_path, run):
    (tmp_path / "none.model").write_bytes(b"no model")
    (tmp_path / "short.bin").write_bytes(b"no shard")
    for words, message in (
        ("", "required"),
        ("mine", "write module:Scorer"),
        ("no_such:Scorer", "no_such"),
        ("json:loads", "json:loads"),
        ("tests.zoo.honest:Uniform --val no*.bin", "matches no file"),
        ("tests.zoo.honest:Uniform --val short.bin", "not a token shard"),
        ("tests.zoo.honest:Uniform --seconds 0", "--seconds is 0"),
        ("tests.zoo.honest:Uniform --tokens -1", "-1"),
        ("tests.zoo.honest:Uniform --tokens 20", "at least 128 tokens"),
        ("x:y --artifact no.ptz", "no file"),
        ("tests.zoo.honest:Uniform --tokenizer none.model", "--val"),
        ("x:y --wrong", "--help"),
        (
            "tests.zoo.honest:Uniform --val short.bin --tokenizer none.model",
            "no SentencePiece model",
        ),
        ("builtins:object", "no vocab_size"),
    ):
        code, out, err = run(words)
        assert code == 2, words
        assert out == "" and err.count("\n") == 1 and message in err, (words, err)


def test_help_names_every_option(run, capsys):
    with pytest.raises(SystemExit) as stop:
        run("--help")
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for name in [
        "--val",
        "--tokenizer",
        "--tokens",
        "--seconds",
        "--json",
        "--artifact",
        "--budget",
    ]:
        assert name in text


@pytest.mark.parametrize("vocab_size", [4, 48, 1024])
def test_synthetic_tokens_are_documents_that_can_be_learned(vocab_size):
    tokens = synthetic_tokens(vocab_size, 5000)
    assert tokens.dtype == np.uint16 and tokens[0] == BOS_ID and tokens.max() < vocab_size
    assert 5 < (tokens == BOS_ID).sum() < 60
    pairs = np.unique(np.stack([tokens[:-1], tokens[1:]]), axis=1).shape[1]
    shuffled = np.random.default_rng(0).permutation(tokens)
    assert (
        pairs < 0.9 * np.unique(np.stack([shuffled[:-1], shuffled[1:]]), axis=1).shape[1]
        or vocab_size == 4
    )
