"""Test data/prepare.py: the same bytes for any text, number of workers, or moment of a kill."""

import gzip
import json
import lzma
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data import download_fineweb, embedded, overlap, prepare
from fairway.case_ops import PIECES
from fairway.command_line import UsageError, run_reporting
from fairway.compression.spelling import Speller
from fairway.shards import sidecar_path, write_shard
from train_gpt import (
    BOS_ID,
    ByteTable,
    UserError,
    check_sidecar,
    document_bounds,
    file_sha256,
    list_shards,
    read_shard,
)

ROOT = Path(__file__).resolve().parents[2]
WORDS = "the of and to in a is that for it as was with be by on not he his but at are this".split()


def prose(n: int, seed: int = 0) -> list[str]:
    """Return documents of random words, with line ends, tabs and letters outside ASCII."""
    r = random.Random(seed)
    return [
        " ".join(r.choice(WORDS) + str(r.randrange(99)) for _ in range(r.randrange(20, 200)))
        + f"\n\n\tÉnd of {i} — naïve ☃.  \n"
        for i in range(n)
    ]


def jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return path


def run(out: Path, *docs: Path, tokenizer: str | Path = "train:400", **more: object) -> dict:
    options = [x for key, value in more.items() for x in (f"--{key.replace('_', '-')}", str(value))]
    prepare.main(
        [
            "--docs",
            *map(str, docs),
            "--tokenizer",
            str(tokenizer),
            "--out",
            str(out),
            "--workers",
            "1",
            *options,
        ]
    )
    return json.loads((out / "manifest.json").read_text())


def contents(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in out.iterdir()}


def texts_of(out: Path, split: str) -> list[str]:
    sp = sentencepiece.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
    texts = []
    for path in sorted(out.glob(f"*_{split}_*.bin")):
        tokens = read_shard(path)
        bounds = document_bounds(tokens)
        assert (tokens[bounds[:-1]] == BOS_ID).all()
        documents = [tokens[a + 1 : b].tolist() for a, b in pairwise(bounds)]
        texts += sp.decode(documents, num_threads=1)
    return texts


class SameProcess:
    """A ProcessPoolExecutor that starts no process: it runs each batch when it is submitted."""

    def __init__(self, workers, context, initializer, arguments):
        model, val_fraction, done = arguments
        tokenizer = prepare.Tokenizer(model, "test")
        prepare._worker.update(tokenizer=tokenizer, val_fraction=val_fraction, done=done)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def shutdown(self, **options):
        pass

    def submit(self, function, *arguments) -> Future:
        """Return a finished future with the result, or the error, of the call."""
        future = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as e:
            future.set_exception(e)
        return future


@pytest.fixture(autouse=True, scope="module")
def same_process():
    """Run workers in this process: forking one costs more than all that most tests do with it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "ProcessPoolExecutor", SameProcess)
        yield


@pytest.fixture
def real_workers(monkeypatch):
    """Run workers in processes of their own after all."""
    monkeypatch.setattr(prepare, "ProcessPoolExecutor", ProcessPoolExecutor)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    run(folder, jsonl(folder / "a.jsonl", prose(200)), val_fraction=0)
    return folder / "tokenizer.model"


# ---- shards and manifest -------------------------------------------------------------------------


def test_manifest_has_the_counts_and_hashes_of_the_files(tmp_path):
    texts = prose(300)
    m = run(
        tmp_path / "o",
        jsonl(tmp_path / "a.jsonl", [*texts, ""]),
        val_fraction=0.2,
        shard_tokens=20_000,
        name="mine",
        tokenizer="train:350",
    )
    train, val = texts_of(tmp_path / "o", "train"), texts_of(tmp_path / "o", "val")
    assert sorted(train + val) == sorted(texts) and 30 < len(val) < 90
    assert [t for t in texts if t in set(train)] == train  # in the order of the input
    assert m["documents"] == 300 and m["empty_documents"] == 1 and m["inexact_documents"] == 0
    assert m["splits"]["val"]["bytes"] == sum(len(t.encode()) for t in val)
    assert m["vocab_size"] == 350 and m["inputs"][0]["sha256"] == file_sha256(tmp_path / "a.jsonl")
    assert m["tokenizer_sha256"] == file_sha256(tmp_path / "o/tokenizer.model")
    assert {s["file"] for s in m["shards"]} == {p.name for p in (tmp_path / "o").glob("*.bin")}
    for shard in m["shards"]:
        path = tmp_path / "o" / shard["file"]
        assert path.name.startswith("mine_") and file_sha256(path) == shard["sha256"]
        assert len(read_shard(path, 350)) == shard["tokens"] <= 20_000
    assert sum(s["tokens"] for s in m["shards"]) == m["tokens"]


def test_the_number_of_workers_changes_no_byte(tmp_path, monkeypatch, real_workers):
    monkeypatch.setattr(prepare, "BATCH_BYTES", 5000)
    docs = jsonl(tmp_path / "a.jsonl", prose(400))
    for n in (1, 3):
        run(tmp_path / str(n), docs, workers=n, shard_tokens=30_000)
    monkeypatch.setattr(prepare, "ProcessPoolExecutor", SameProcess)
    run(tmp_path / "0", docs, shard_tokens=30_000)
    assert contents(tmp_path / "1") == contents(tmp_path / "3") == contents(tmp_path / "0")


def test_all_compressions_are_read_and_a_txt_is_one_document(tmp_path, model):
    line = b'{"text": "one"}\n\n{"text": "two\\r\\n"}'
    for name, pack in [
        ("a.jsonl", bytes),
        ("b.jsonl.gz", gzip.compress),
        ("c.jsonl.xz", lzma.compress),
        ("d.jsonl.zst", zstandard.ZstdCompressor().compress),
    ]:
        (tmp_path / name).write_bytes(pack(line[:16]) + pack(line[16:]))  # two frames each
    (tmp_path / "e.txt").write_bytes(b"a\r\n\n{}\n")
    (tmp_path / "f.jsonl.txt.xz").write_bytes(lzma.compress(b"f"))
    m = run(tmp_path / "o", *sorted(tmp_path.glob("?.*")), tokenizer=model, val_fraction=0)
    assert texts_of(tmp_path / "o", "train") == ["one", "two\r\n"] * 4 + ["a\r\n\n{}\n", "f"]
    assert len(m["inputs"]) == 6


def test_equal_texts_share_a_split_and_larger_fractions_only_add(tmp_path, model):
    docs = jsonl(tmp_path / "a.jsonl", prose(200) * 2)
    held_out = []
    for fraction in (0, 0.1, 0.3, 1):
        out = tmp_path / str(fraction)
        run(out, docs, tokenizer=model, val_fraction=fraction)
        train, val = texts_of(out, "train"), texts_of(out, "val")
        assert not set(train) & set(val) and len(train) + len(val) == 400
        held_out.append(set(val))
    assert not held_out[0] and held_out[0] < held_out[1] < held_out[2] < held_out[3]
    assert held_out[3] == set(prose(200))


def test_the_tokenizer_never_sees_validation_text(tmp_path, monkeypatch):
    held_out = {3, 50, 51}
    monkeypatch.setattr(
        prepare,
        "choose_split",
        lambda document, text, fraction: "val" if document.index in held_out else "train",
    )
    texts = prose(200)
    a = run(tmp_path / "a", jsonl(tmp_path / "a.jsonl", texts))
    texts = [t + " zqxj" * 500 * (i in held_out) for i, t in enumerate(texts)]
    b = run(tmp_path / "b", jsonl(tmp_path / "b.jsonl", texts))
    assert a["tokenizer_sha256"] == b["tokenizer_sha256"] and a["tokens"] != b["tokens"]


def test_a_long_corpus_trains_on_a_fixed_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "SAMPLE_BYTES", 20_000)
    docs = jsonl(tmp_path / "a.jsonl", prose(300))
    a = run(tmp_path / "a", docs, val_fraction=0)["tokenizer_sha256"]
    assert a == run(tmp_path / "b", docs, val_fraction=0)["tokenizer_sha256"]
    monkeypatch.setattr(prepare, "SAMPLE_BYTES", 1 << 20)
    assert a != run(tmp_path / "c", docs, val_fraction=0)["tokenizer_sha256"]


# ---- exactness -----------------------------------------------------------------------------------

ODD = [
    "▁",
    "a▁b ▁",
    "▁▁",
    "\0",
    "\t\n\r\x0b\x85\u2028",
    "😀👩‍👩‍👧",
    "▅",
    "⁇ ",
    "ﬁ½Å",
    "<s></s><0x41><unk>",
    "\ufeff\ufffe\U0010ffff",
    "  two  ",
    " ",
    "\n",
]
ANY = st.text(st.characters(exclude_categories=["Cs"]), min_size=1) | st.sampled_from(ODD)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(ANY | st.builds("".join, st.lists(ANY)).filter(bool), min_size=1, max_size=20))
def test_the_round_trip_of_any_text_is_exact(tmp_path_factory, model, texts):
    out = tmp_path_factory.mktemp("any")
    m = run(out / "o", jsonl(out / "a.jsonl", texts), tokenizer=model, val_fraction=0)
    assert texts_of(out / "o", "train") == texts and m["inexact_documents"] == 0
    assert m["bytes"] == sum(len(t.encode()) for t in texts)


def test_odd_text_can_be_trained_on(tmp_path):
    docs = jsonl(tmp_path / "a.jsonl", ODD * 3 + prose(20))
    m = run(tmp_path / "o", docs, val_fraction=0)
    assert texts_of(tmp_path / "o", "train") == ODD * 3 + prose(20) and m["vocab_size"] == 400


def foreign_model(path: Path, **options: object) -> Path:
    with path.open("wb") as f:
        sentencepiece.SentencePieceTrainer.train(
            model_writer=f,
            minloglevel=2,
            hard_vocab_limit=False,
            pad_id=0,
            unk_id=3,
            **{
                "sentence_iterator": iter(prose(100)),
                "model_type": "bpe",
                "vocab_size": 400,
                "bos_id": 1,
                "eos_id": 2,
                "byte_fallback": True,
                **options,
            },
        )
    return path


def test_documents_changed_by_a_normalising_tokenizer_are_counted(tmp_path, capsys):
    """The challenge's own models, too, turn a line end and a literal ▁ into a space."""
    model = foreign_model(tmp_path / "m.model", add_dummy_prefix=False)
    docs = jsonl(tmp_path / "a.jsonl", ["plain is exact", "two\nlines", "a▁b", "  blanks  "])
    m = run(tmp_path / "o", docs, tokenizer=model, val_fraction=0)
    assert m["inexact_documents"] == 3 and m["bytes"] < m["source_bytes"]
    assert texts_of(tmp_path / "o", "train") == ["plain is exact", "two lines", "a b", "blanks"]
    assert "3 of 4 documents change in this tokenizer's round trip" in capsys.readouterr().err


def test_a_token_without_bytes_stops_the_run_and_is_named(tmp_path):
    model = foreign_model(tmp_path / "m.model", byte_fallback=False)  # é becomes <unk>
    docs = jsonl(tmp_path / "a.jsonl", ["the of and " * 50, "the of ☢ in"])
    with pytest.raises(UserError, match="not written.*token 3 .*unk") as error:
        run(tmp_path / "o", docs, tokenizer=model, val_fraction=0)
    assert "\n" not in str(error.value)
    assert set(contents(tmp_path / "o")) == {".unfinished.json", "tokenizer.model"}


# ---- interrupted runs ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kills",
    [
        ("text_train_000001.bin",),
        pytest.param(
            ("tokenizer.model", "text_train_000001.bin", "text_val_000000.bin"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_killed_run_ends_with_the_same_bytes(tmp_path, kills):
    docs = jsonl(tmp_path / "a.jsonl", prose(800))
    command = [
        "--docs",
        docs,
        "--tokenizer",
        "train:500",
        "--shard-tokens",
        "5000",
        "--val-fraction",
        "0.1",
        "--workers",
        "2",
        "--out",
    ]
    run(
        tmp_path / "uninterrupted",
        docs,
        tokenizer="train:500",
        shard_tokens=5000,
        val_fraction=0.1,
    )
    out, complete = tmp_path / "killed", {}
    for wanted in kills:
        process = subprocess.Popen(
            [sys.executable, "data/prepare.py", *map(str, command), out],
            cwd=ROOT,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
        )
        while not (out / wanted).exists() and process.poll() is None:
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert not (out / "manifest.json").exists()
        for name, stat in complete.items():  # complete shards are not written again
            assert (out / name).stat().st_mtime_ns == stat
        complete = {
            s["file"]: (out / s["file"]).stat().st_mtime_ns
            for s in json.loads((out / ".unfinished.json").read_text())["shards"]
        }
        for path in out.glob("*.bin"):
            read_shard(path)
        assert no_process_left(process.pid)
    (out / ".text_train_000007.bin.123.part").write_bytes(b"left behind")
    prepare.main([*map(str, command), str(out)])
    assert contents(out) == contents(tmp_path / "uninterrupted")
    assert complete
    assert all((out / name).stat().st_mtime_ns == stat for name, stat in complete.items())


def no_process_left(group: int) -> bool:
    for _ in range(500):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)
    return False


def test_a_second_run_does_nothing_and_changes_start_again(tmp_path, capsys, model):
    docs, out = jsonl(tmp_path / "a.jsonl", prose(100)), tmp_path / "o"

    def printed(**more: object) -> str:
        run(out, docs, tokenizer=model, shard_tokens=5000, **more)
        return capsys.readouterr().out

    assert "prepared:" in printed(name="a") and printed(name="a") == f"{out} is up to date\n"
    (out / "a_train_000000.bin").write_bytes(b"damaged")
    assert "continuing" in printed(name="a") and "up to date" in printed(name="a")
    assert "val_fraction was 0.05, is 0.5" in printed(name="a", val_fraction=0.5)
    (out / "theirs_train_000000.bin").write_bytes(b"not ours")
    assert "name was a, is b" in printed(name="b", val_fraction=0.5)
    jsonl(docs, prose(10))
    assert "the input files changed" in printed(name="b", val_fraction=0.5)
    shards = {p.name for p in out.glob("*.bin")}
    m = json.loads((out / "manifest.json").read_text())
    assert shards == {s["file"] for s in m["shards"]} | {"theirs_train_000000.bin"}


def test_a_folder_with_foreign_files_is_refused_and_unchanged(tmp_path, model):
    docs = jsonl(tmp_path / "a.jsonl", prose(5))
    for name in ("text_train_000003.bin", "tokenizer.model", "manifest.json"):
        out = tmp_path / name.split(".")[0]
        out.mkdir()
        (out / name).write_bytes(b"precious")
        with pytest.raises(UserError, match="did not write; choose an empty folder"):
            run(out, docs, tokenizer=model)
        assert contents(out) == {name: b"precious"}


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, data, match",
    [
        ("a.jsonl", None, "no such file"),
        ("a.jsonl", b"", "empty"),
        ("a.txt", b"", "empty"),
        ("a.csv", b"x", "must end in .jsonl or .txt"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": "cut', "a.jsonl line 2: not JSON"),
        ("a.jsonl", b'\n\n{"txt": "x"}\n', 'line 3: no field "text" with a string'),
        ("a.jsonl", b'{"text": 3}\n', 'line 1: no field "text" with a string'),
        ("a.jsonl", b'["text"]\n', 'line 1: no field "text" with a string'),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1: half a surrogate pair"),
        ("a.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("a.jsonl", b'{"text": "\xff"}\n', "line 1: not UTF-8"),
        ("a.txt", b"ab\xff", "a.txt: not UTF-8 .byte 2."),
        ("a.jsonl", b'{"text": ""}\n', "no document with any text"),
        ("a.jsonl.xz", lzma.compress(b'{"text": "x"}\n' * 9999)[:-40], "truncated or damaged"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 9999)[:-9], "truncated or damaged"),
        ("a.jsonl.zst", zstandard.compress(b'{"text": "x"}\n' * 9999)[:-9], "truncated or damaged"),
        ("a.jsonl.xz", b"no xz", "truncated or damaged"),
        ("a.jsonl.gz", b"no gz", "truncated or damaged"),
        ("a.jsonl.zst", b"no zst", "truncated or damaged"),
    ],
)
@pytest.mark.parametrize("tokenizer", ["train:400", "model"])
def test_bad_documents_are_one_line(tmp_path, model, name, data, match, tokenizer):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=match) as error:
        run(tmp_path / "o", tmp_path / name, tokenizer=model if tokenizer == "model" else tokenizer)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "o").glob("*.bin")) and not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize(
    "tokenizer, match",
    [
        ("nowhere.model", "no such file"),
        ("train:12", "261 to 65536"),
        ("train:65537", "261 to"),
        ("train:x", "261 to"),
        ("train:261", "train:261: .*choose another size"),
    ],
)
def test_bad_tokenizers_are_one_line(tmp_path, tokenizer, match):
    with pytest.raises(UserError, match=match) as error:
        run(tmp_path / "o", jsonl(tmp_path / "a.jsonl", prose(20)), tokenizer=tokenizer)
    assert "\n" not in str(error.value)


def test_unusable_tokenizers_are_refused(tmp_path):
    docs = jsonl(tmp_path / "a.jsonl", prose(20))
    (tmp_path / "text.model").write_bytes(b"\x00no model")
    words = [" ".join(f"w{i}" for i in range(n, n + 100)) for n in range(0, 66_000, 100)]
    big = foreign_model(
        tmp_path / "big.model",
        model_type="word",
        vocab_size=65_540,
        byte_fallback=False,
        sentence_iterator=iter(words),
    )
    other = foreign_model(tmp_path / "other.model", bos_id=2, eos_id=1)
    for tokenizer, match in (
        (tmp_path / "text.model", "not a SentencePiece model"),
        (big, "65540 pieces.*65536"),
        (other, "BOS is 2, shards need 1"),
    ):
        with pytest.raises(UserError, match=match):
            run(tmp_path / "o", docs, tokenizer=tokenizer)
        assert not (tmp_path / "o" / "tokenizer.model").exists()


def test_no_tokenizer_is_trained_on_validation_text_alone(tmp_path):
    with pytest.raises(UserError, match="no training document.*--val-fraction"):
        run(tmp_path / "o", jsonl(tmp_path / "a.jsonl", prose(20)), val_fraction=1)


@pytest.mark.parametrize(
    "arguments, match",
    [
        ([], "either --embedded or --docs"),
        (["--docs", "a.txt"], "--docs needs --tokenizer"),
        (["--embedded", "--val-fraction", "0.1"], "has its own validation split"),
        (["--embedded", "--shard-tokens", "0"], "--shard-tokens 0"),
        (["--embedded", "--name", "../x"], "--name"),
        (
            ["--docs", "a.txt", "--tokenizer", "x", "--out", "o", "--val-fraction", "2"],
            "from 0 to 1",
        ),
    ],
)
def test_options_out_of_range_are_refused(arguments, match):
    with pytest.raises(UsageError, match=match):
        prepare.main(arguments)


@pytest.mark.parametrize("script", [prepare, overlap, download_fineweb])
def test_a_wrong_option_is_one_line_and_exit_code_2(script, capsys):
    name = script.__name__.split(".")[-1]
    assert run_reporting(name, lambda: script.main(["--windw", "3"])) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{name}: error: unknown option --windw")
    assert line.endswith(f"; see data/{name}.py --help")


def test_an_error_in_a_worker_is_one_line_and_exit_code_1(tmp_path, real_workers, model, capfd):
    docs = tmp_path / "a.jsonl"
    docs.write_text('{"text": "x"}\nnot json\n')
    code = run_reporting("prepare", lambda: run(tmp_path / "o", docs, tokenizer=model))
    (line,) = capfd.readouterr().err.splitlines()
    assert code == 1 and line.startswith("prepare: error: ")
    assert "a.jsonl line 2: not JSON" in line


def test_an_interrupt_is_one_line_and_exit_code_130(tmp_path, model, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "encode_batch", interrupt)
    docs = jsonl(tmp_path / "a.jsonl", prose(2))
    code = run_reporting("prepare", lambda: run(tmp_path / "o", docs, tokenizer=model))
    assert (code, capsys.readouterr().err) == (130, "prepare: interrupted\n")


# ---- embedded corpus -----------------------------------------------------------------------------


def test_the_embedded_corpus_is_exact_split_by_year_and_without_overlap(tmp_path):
    out = tmp_path / "e"
    prepare.main(["--embedded", "--out", str(out)])
    texts = embedded.addresses()
    val, train = (set(texts_of(out, split)) for split in ("val", "train"))
    assert val | train == {text.decode() for text in texts.values()} and not val & train
    years = [{n[:4] for n, t in texts.items() if t.decode() in side} for side in (val, train)]
    assert not years[0] & years[1]
    m = json.loads((out / "manifest.json").read_text())
    assert m["documents"] == len(texts) == 249 and m["vocab_size"] == 8192
    assert 0.045 < m["splits"]["val"]["bytes"] / m["bytes"] < 0.065
    assert overlap.main(["--train", str(out / "*_train_*"), "--val", str(out / "*_val_*")]) == 0


def test_years_that_quote_each_other_stay_in_training():
    r = random.Random(1)
    fresh = ["".join(r.choice("abcdefg ") for _ in range(3000)) for _ in range(5)]
    texts = {f"{1900 + i}-X-1": t.encode() for i, t in enumerate(fresh)}
    assert embedded.quoting_years(texts) == set()
    texts["1903-X-1"] += b" " + texts["1901-X-1"][500:700]
    assert embedded.quoting_years(texts) == {1901, 1903}


# ==== CASE OPS ====================================================================================
CAPITALS = ["The NASA iPhone of McDonald. I, A B\n\nÉCOLE ", "\ue001 x \ue004\ue003The ▁The ", ""]


@pytest.fixture(scope="module")
def case_folder(tmp_path_factory) -> Path:
    """Return shards of texts with many capitals, written with --case-ops."""
    folder = tmp_path_factory.mktemp("case")
    texts = [text.title() for text in prose(40)] + CAPITALS
    docs = jsonl(folder / "d.jsonl", texts)
    arguments = ["--docs", str(docs), "--tokenizer", "train:420", "--out", str(folder / "out")]
    prepare.main([*arguments, "--val-fraction", "0.2", "--workers", "1", "--case-ops"])
    return folder / "out"


def table_of(folder: Path) -> tuple[Speller, ByteTable]:
    sp = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return Speller(sp, sp.vocab_size()), ByteTable.of(sp, sp.vocab_size())


def test_case_ops_keeps_every_byte_and_counts_it(case_folder):
    speller, table = table_of(case_folder)
    manifest = json.loads((case_folder / "manifest.json").read_text())
    assert manifest["bytes"] == manifest["source_bytes"] and not manifest["inexact_documents"]
    assert table.markers and speller.folds
    texts, sizes = [], 0
    for path in list_shards(case_folder / "*_*.bin"):
        tokens, sidecar = read_shard(path), read_shard(sidecar_path(path))
        assert len(sidecar) == len(tokens) and not sidecar[tokens == BOS_ID].any()
        check_sidecar(path, tokens, table)
        sizes += int(sidecar.sum())
        bounds = document_bounds(tokens)
        texts += [speller.data(tokens[a + 1 : b]).decode() for a, b in pairwise(bounds)]
    assert sizes == manifest["bytes"]
    wanted = [text.title() for text in prose(40)] + CAPITALS[:2]
    assert sorted(texts) == sorted(wanted)


def test_capitals_cost_no_pieces_of_their_own(case_folder):
    speller, _ = table_of(case_folder)
    pieces = [speller.tokenizer.id_to_piece(i) for i in range(speller.tokenizer.vocab_size())]
    assert not [p for p in pieces if any(c.isupper() and c.isascii() for c in p) and p[0] != "<"]
    the, title = speller.tokens(b"the"), pieces.index(PIECES[0])
    assert speller.tokens(b"The") == [title, *the]


@given(st.binary(max_size=40) | st.text(max_size=30).map(str.encode))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_a_case_tokenizer_spells_any_bytes(case_folder, data):
    speller, _ = table_of(case_folder)
    assert speller.data(speller.tokens(data)) == data


def test_a_sidecar_that_disagrees_names_the_token(case_folder, tmp_path):
    _, table = table_of(case_folder)
    shard = list_shards(case_folder / "*_val_*.bin")[0]
    tokens, sizes = read_shard(shard), read_shard(sidecar_path(shard))
    path = tmp_path / shard.name
    for wrong, says in (
        (np.where(np.arange(len(sizes)) == 7, sizes + 1, sizes), f"token 7 has [{sizes[7] + 1}]"),
        (sizes[:-1], f"token {len(sizes) - 1} has [] bytes"),
        (np.append(sizes, 1), f"token {len(sizes)} has [1] bytes, its piece []"),
    ):
        write_shard(sidecar_path(path), wrong)
        with pytest.raises(UserError, match=re.escape(says)):
            check_sidecar(path, tokens, table)


def test_case_ops_needs_a_tokenizer_with_markers(tmp_path):
    docs = jsonl(tmp_path / "d.jsonl", prose(30))
    run(tmp_path / "plain", docs)
    plain = tmp_path / "plain" / "tokenizer.model"
    arguments = ["--docs", str(docs), "--tokenizer", str(plain), "--out", str(tmp_path / "x")]
    with pytest.raises(UserError, match="has no case markers; use train:VOCAB"):
        prepare.main([*arguments, "--case-ops"])


def test_a_damaged_sidecar_is_written_again(case_folder, tmp_path):
    copy = tmp_path / "out"
    shutil.copytree(case_folder, copy)
    whole = contents(copy)
    path = sidecar_path(list_shards(copy / "*_train_*.bin")[0])
    path.write_bytes(path.read_bytes()[:-2])
    docs = case_folder.parent / "d.jsonl"
    arguments = ["--docs", str(docs), "--tokenizer", "train:420", "--out", str(copy)]
    prepare.main([*arguments, "--val-fraction", "0.2", "--workers", "1", "--case-ops"])
    again = contents(copy)
    assert path.name in again
    whole.pop("manifest.json"), again.pop("manifest.json")  # it lists the shards as they came
    assert again == whole
