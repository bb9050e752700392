"""Test data/overlap.py against brute force, at every offset and across every border."""

import json
from pathlib import Path

import numpy as np
import pytest

from data import overlap
from fairway.command_line import UsageError, run_reporting
from fairway.shards import write_shard
from train_gpt import BOS_ID, UserError


@pytest.fixture
def random():
    return np.random.default_rng(0)


def write(folder: Path, split: str, *shards: np.ndarray) -> str:
    for i, tokens in enumerate(shards):
        write_shard(folder / f"x_{split}_{i:06d}.bin", np.asarray(tokens, np.uint16))
    return str(folder / f"x_{split}_*.bin")


def scan(folder: Path, train: list, val: list, window: int = 64) -> tuple[int, dict]:
    code = overlap.main(
        [
            "--train",
            write(folder, "train", *train),
            "--window",
            str(window),
            "--val",
            write(folder, "val", *val),
            "--json",
            str(folder / "o.json"),
        ]
    )
    return code, json.loads((folder / "o.json").read_text())


def document(random: np.random.Generator, n: int) -> np.ndarray:
    return np.concatenate([[BOS_ID], random.integers(2, 1024, n)])


def bodies(tokens: np.ndarray) -> list[bytes]:
    """Return the documents without BOS, as little-endian bytes."""
    return [
        part[part != BOS_ID].astype("<u2").tobytes()
        for part in np.split(tokens, np.flatnonzero(tokens == BOS_ID))
    ]


def by_hand(train: np.ndarray, val: np.ndarray, window: int) -> tuple[dict, set]:
    """Count matching windows per document, and find short documents, by comparing everything."""
    w, windows, documents_trained, matched, short = 2 * window, set(), set(bodies(train)), {}, set()
    for body in documents_trained:
        windows |= {body[i : i + w] for i in range(0, len(body) - w + 1, 2)}
    documents = bodies(val)[1:]
    for d, body in enumerate(documents):
        if n := sum(body[i : i + w] in windows for i in range(0, len(body) - w + 1, 2)):
            matched[d] = n
        if 0 < len(body) < w and body in documents_trained:
            short.add(d)
    return matched, short


@pytest.mark.parametrize("window", [8, 9, 16, 64])
@pytest.mark.parametrize("seed", range(6))
def test_equals_brute_force_on_repetitive_text(tmp_path, monkeypatch, seed, window):
    """Few different tokens make windows match in many places."""
    random = np.random.default_rng(seed)
    monkeypatch.setattr(overlap, "BLOCK", [97, 256, 1 << 20][seed % 3])
    monkeypatch.setattr(overlap, "PAIRS", 50)
    phrases = [random.integers(1, 4 + seed, random.integers(1, 2 * window)) for _ in range(40)]
    train, val = (
        np.concatenate([[BOS_ID], *(phrases[i] for i in random.integers(0, 40, n))])
        for n in (150, 60)
    )
    cuts = np.sort(random.integers(0, len(train), 2))
    code, report = scan(tmp_path, np.split(train, cuts), np.split(val, [len(val) // 3]), window)
    matched, short = by_hand(train, val, window)
    assert {x["document"]: x["windows_found"] for x in report["overlap"]} == matched
    assert {x["document"] for x in report["short_overlap"]} == short
    assert code == bool(matched or short)


def test_64_tokens_match_at_every_offset_and_63_never(tmp_path, random):
    """Try each alignment in both splits, at the ends of documents and of shards."""
    val = [document(random, 400) for _ in range(140)]
    train = [document(random, 500) for _ in range(140)]
    for i in range(70):  # 64 tokens at every offset; every other document a near miss
        for j, n in ((2 * i, 64), (2 * i + 1, 63)):
            at, to = 1 + i, 501 - n - i
            train[j][to : to + n] = val[j][at : at + n]
    joined = np.concatenate(train)
    code, report = scan(
        tmp_path,
        np.split(joined, [501 - 20, 3333, 3334, 40_000]),
        np.split(np.concatenate(val), [77, 30_000]),
    )
    assert code == 1 and not report["short_overlap"]
    assert [
        (x["document"], x["windows_found"], x["windows"], x["offset"]) for x in report["overlap"]
    ] == [(2 * i, 1, 337, 1 + i) for i in range(70)]


def test_the_report_names_the_shard_and_the_offset(tmp_path, random):
    train, val = [document(random, 300) for _ in range(3)], document(random, 300)
    train[2][100:170] = val[50:120]
    _, report = scan(tmp_path, train, [val])
    assert report["overlap"] == [
        {
            "document": 0,
            "windows_found": 7,
            "windows": 237,
            "offset": 50,
            "shard": str(tmp_path / "x_train_000002.bin"),
            "shard_offset": 100,
        }
    ]


def test_a_window_across_a_missing_shard_is_no_overlap(tmp_path, random):
    val = document(random, 200)
    train = [
        np.concatenate([document(random, 100), val[1:41]]),
        document(random, 99),
        np.concatenate([val[41:101], document(random, 100)]),
    ]
    pattern = write(tmp_path, "train", *train)
    (tmp_path / "x_train_000001.bin").unlink()
    arguments = ["--train", pattern, "--val", write(tmp_path, "val", val)]
    assert overlap.main(arguments) == 0
    (tmp_path / "x_train_000002.bin").rename(tmp_path / "x_train_000001.bin")
    assert overlap.main(arguments) == 1


def test_short_documents_match_only_as_whole_documents(tmp_path, random):
    short, part, last = document(random, 30), document(random, 30), document(random, 5)
    longer = np.concatenate([part, [7]])
    val = np.concatenate([short, part, document(random, 63), [BOS_ID], last])
    train = np.concatenate([document(random, 90), short, longer, document(random, 90), last])
    code, report = scan(tmp_path, np.split(train, [100]), [val])
    assert code == 1 and not report["overlap"]
    assert [(x["document"], x["tokens"]) for x in report["short_overlap"]] == [(0, 30), (4, 5)]
    assert report["short_overlap"][1]["shard_offset"] == len(train) - 100 - 5


def test_hash_collisions_are_no_overlap(tmp_path, monkeypatch, random):
    """With a hash that is always zero, only the comparison of tokens decides."""
    monkeypatch.setattr(overlap.Hashes, "runs", lambda *a: np.zeros(a[3] - a[2], np.uint64))
    monkeypatch.setattr(overlap.Hashes, "slices", lambda *a: np.zeros(len(a[2]), np.uint64))
    monkeypatch.setattr(overlap.Hashes, "prefix", lambda *a: np.zeros(len(a[1]) + 1, np.uint64))
    val, train = document(random, 300), document(random, 900)
    assert scan(tmp_path, [train], [val, document(random, 20)])[0] == 0
    train[500:564] = val[9:73]
    assert scan(tmp_path, [train], [val])[0] == 1


def test_random_shards_have_no_overlap(tmp_path, random, capsys):
    assert scan(tmp_path, [document(random, 5000)], [document(random, 5000)])[0] == 0
    assert "overlap: 0 of 1 validation documents" in capsys.readouterr().out


def test_errors_are_one_line_and_exit_code_2(tmp_path, random, capsys, monkeypatch):
    train = write(tmp_path, "train", document(random, 100))
    for arguments, match in [
        (["--train", str(tmp_path / "none*"), "--val", train], "--train .*no such shard"),
        (["--train", train, "--val", train], "in --train and in --val"),
        (["--train", train, "--val", train, "--window", "3"], "--window 3"),
        (["--train", train, "--val", write(tmp_path, "val", [])], "no tokens"),
    ]:
        with pytest.raises((UserError, UsageError), match=match):
            overlap.main(arguments)
    (tmp_path / "x_train_000000.bin").write_bytes(b"no shard")
    monkeypatch.setattr("sys.argv", ["overlap.py", "--train", train, "--val", train])
    assert run_reporting("overlap", overlap.main_or_usage_error) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("overlap: error: ") and "not a token shard" in line
