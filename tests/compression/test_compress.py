"""The verbs of compression as users run them: every byte comes back, or one line says why."""

import hashlib
import io
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from artifacts import TINY, encoded, trained
from conftest import english_like

from fairway import cli
from fairway.compression.bitstream import DEVICES, bitstream_bytes, parse_bitstream
from fairway.compression.compressor import Compressor
from fairway.compression.token_coder import BitstreamError
from fairway.scoring.settings import EvalConfig
from train_gpt import Config, UserError

ROOT = Path(__file__).resolve().parents[2]
CORNERS = {
    "empty": b"",
    "one byte": b"a",
    "another": b"\xff",
    "blank": " ▁".encode(),
    "mark": "▁".encode(),
    "marks": "▁▁▁ ▁a".encode(),
    "nuls": b"\0" * 50,
    "bos": b"<s></s><unk><0x41> <s>",
    "cut": "é日🙂".encode()[:-1],
    "surrogates": b"\xed\xa0\x80\xed\xb0\x80",
    "bytes": bytes(range(256)),
    "lines": b"\r\n\n\n a\n \n",
    "text": "\n".join(english_like(3, 2)).encode(),
    "half": b"The nation \xc3 and \x80 war.",
}


class Done(NamedTuple):
    verb: str
    code: int
    out: bytes
    err: str


@pytest.fixture(scope="module")
def artifact(tmp_path_factory, corpus) -> Path:
    """Write the artifact of a tiny random model, with its tokenizer inside."""
    cfg = Config(**TINY | dict(vocab_size=corpus.vocab_size))
    path = tmp_path_factory.mktemp("artifact") / "a.ptz"
    path.write_bytes(
        encoded(trained(cfg), tokenizer=(corpus.folder / "tokenizer.model").read_bytes())
    )
    return path


@pytest.fixture(scope="module")
def compressor(artifact) -> Compressor:
    return Compressor.load(artifact, "cpu")


@pytest.fixture
def here(capfdbinary, artifact, monkeypatch):
    """Return `here("compress", ...)`: run a verb in this process, with settings as keywords."""

    def call(verb: str, *arguments, artifact=artifact, **settings) -> Done:
        options = [] if verb == "describe" else ["--artifact", str(artifact)]
        capfdbinary.readouterr()
        with monkeypatch.context() as patch:
            for name, value in settings.items():
                patch.setenv(name, value)
            code = cli.main([verb, *map(str, arguments), *options])
        out, err = capfdbinary.readouterr()
        return Done(verb, code, out, err.decode())

    return call


def written(folder: Path, files: dict[str, bytes]) -> list[Path]:
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return [folder / name for name in files]


def random_bytes(count: int) -> dict[str, bytes]:
    """Return files that mix text, bytes and marks, so that all kinds meet at boundaries."""
    r, texts = random.Random(0), [text.encode() for text in english_like(4, 30)]
    kinds = [
        lambda: r.randbytes(r.randrange(12)),
        lambda: r.choice(texts)[: r.randrange(25)],
        lambda: b"\n" * r.randrange(3),
        lambda: r.choice([" ", "▁", "é", "🙂", "\0", "<s>"]).encode() * r.randrange(4),
    ]
    return {
        f"{n}.bin": b"".join(r.choice(kinds)() for _ in range(r.randrange(4))) for n in range(count)
    }


# ==== ROUND TRIPS =================================================================================
@pytest.mark.parametrize(
    "options", [["--streams", 8], ["--experts", "--streams", 4], ["--streams", 200]], ids=str
)
def test_corners_come_back_from_one_bitstream(here, tmp_path, options):
    paths = written(tmp_path / "in", CORNERS)
    done = here("compress", "--out", tmp_path / "f.fwy", *options, *paths)
    assert done.code == 0 and done.out == b"" and "bits/byte" in done.err
    assert "decompressing needs the artifact too" in done.err
    done = here("decompress", tmp_path / "f.fwy", "--out", tmp_path / "out")
    assert done.code == 0 and "checksum right" in done.err
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == CORNERS


def test_200_random_files_come_back(compressor):
    files = list(random_bytes(200).items())
    assert len({data for _, data in files}) > 100
    for settings, streams in ((None, 16), (None, 1), (EvalConfig(), 8)):
        part = files if settings is None and streams > 1 else files[:40]
        assert (
            compressor.decode(*parse_bitstream(compressor.encode(part, settings, streams), "f"))
            == part
        )


@pytest.mark.parametrize("name", CORNERS)
def test_each_corner_alone(compressor, name):
    files = [("a", CORNERS[name])]
    header, payload = parse_bitstream(compressor.encode(files, streams=8), "f")
    assert compressor.decode(header, payload) == files and header.count == len(
        compressor.speller.tokens(CORNERS[name])
    )


def test_a_new_process_needs_the_artifact_and_the_bitstream_alone(here, artifact, tmp_path):
    paths = written(tmp_path / "in", {name: CORNERS[name] for name in ("half", "cut", "empty")})
    assert here("compress", "--experts", "--out", tmp_path / "f.fwy", *paths).code == 0
    for path in paths:
        path.unlink()
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "fairway",
            "decompress",
            "--artifact",
            str(artifact),
            str(tmp_path / "f.fwy"),
            "--out",
            str(tmp_path / "out"),
        ],
        capture_output=True,
        cwd=tmp_path,
        env=dict(PATH=os.environ["PATH"], OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)),
        timeout=120,
    )
    assert done.returncode == 0 and done.stdout == b"", done.stderr
    assert all((tmp_path / "out" / path.name).read_bytes() == CORNERS[path.name] for path in paths)


def test_pipes(here, monkeypatch):
    text = CORNERS["text"] + b"\xff\0"

    def piped(data: bytes, *arguments: str) -> Done:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
        return here(*arguments)

    coded = piped(text, "compress", "--out", "-", "-")
    assert coded.code == 0 and coded.out.startswith(b"FWY\x01") and "bits/byte" in coded.err
    assert piped(coded.out, "decompress", "-", "--out", "-")[1:3] == (0, text)
    assert json.loads(piped(coded.out, "describe", "-").out)["files"] == [["text", len(text)]]


def test_files_leave_standard_output_in_order(here, tmp_path):
    paths = written(tmp_path / "in", {"b": b"of the ", "a": b"nation"})
    assert here("compress", "--out", tmp_path / "f", *paths).code == 0
    done = here("decompress", tmp_path / "f", "--out", "-")
    assert done.out == b"of the nation" and not list(tmp_path.glob("-"))


def test_describe_needs_no_artifact(here, tmp_path, artifact):
    assert (
        here("compress", "--out", tmp_path / "f", *written(tmp_path / "in", {"x": b"of the"})).code
        == 0
    )
    header = json.loads(here("describe", tmp_path / "f").out)
    assert header["artifact"] == hashlib.sha256(artifact.read_bytes()).hexdigest()[:24]
    assert header["digest"] == hashlib.sha256(b"of the").hexdigest()[:24] and header["files"] == [
        ["x", 6]
    ]
    assert header["made_on"].startswith("torch 2.") and header["made_on"].endswith("1 thread")


def test_settings_of_the_experts_come_from_the_environment_and_travel(here, tmp_path):
    (text,) = written(tmp_path / "in", {"x": CORNERS["text"]})
    env = dict(
        MIX_WEIGHTS="exponential", NGRAM_ORDERS="3", EVAL_STRIDE="8"
    )  # a text is read in no windows
    assert here("compress", "--experts", "--out", tmp_path / "f", text, **env).code == 0
    assert json.loads(here("describe", tmp_path / "f").out)["experts"] == {
        "ngram_orders": 3,
        "mix_weights": "exponential",
    }
    assert here("decompress", tmp_path / "f", "--out", "-").out == CORNERS["text"]
    assert here("compress", "--out", tmp_path / "g", text, **env).code == 0
    assert json.loads(here("describe", tmp_path / "g").out)["experts"] is None
    refused(
        here("compress", "--experts", "--out", tmp_path / "h", text, MIX_WEIGHT="em"), "MIX_WEIGHT"
    )
    refused(
        here("compress", "--experts", "--out", tmp_path / "h", text, NGRAM_ORDERS="99"),
        "NGRAM_ORDERS is 99",
    )


def test_threads_are_those_that_encoded(compressor):
    before = torch.get_num_threads()
    header, payload = parse_bitstream(compressor.encode([("a", b"of the nation")]), "f")
    seen = []
    header = header._replace(made_on=header.made_on._replace(threads=2))
    compressor.decode(header, payload, on_progress=lambda _: seen.append(torch.get_num_threads()))
    assert set(seen) == {2} and torch.get_num_threads() == before


# ==== REFUSALS ====================================================================================
def refused(done: Done, *words: str, code: int = 1) -> None:
    """Check that a verb printed one line of error, with these words in it, and nothing else."""
    assert done.code == code and done.out == b"" and done.err.count("\n") == 1, done
    assert done.err.startswith(f"fairway {done.verb}: error: "), done.err
    assert all(word in done.err for word in words), done.err


@pytest.fixture(scope="module")
def coded(compressor, tmp_path_factory) -> Path:
    """Write the bitstream of one file, x, and return its path."""
    path = tmp_path_factory.mktemp("coded") / "f.fwy"
    path.write_bytes(compressor.encode([("x", CORNERS["text"])], streams=4))
    return path


def test_another_artifact(here, coded, artifact, tmp_path, corpus):
    cfg = Config(**TINY | dict(vocab_size=corpus.vocab_size, num_layers=1))
    other = tmp_path / "b.ptz"
    other.write_bytes(
        encoded(trained(cfg), tokenizer=(corpus.folder / "tokenizer.model").read_bytes())
    )
    sums = [hashlib.sha256(path.read_bytes()).hexdigest()[:24] for path in (artifact, other)]
    refused(here("decompress", coded, "--out", tmp_path / "out", artifact=other), str(coded), *sums)
    assert sums[0] != sums[1] and not (tmp_path / "out").exists()


def test_other_probabilities_give_an_error_and_no_text(here, coded, tmp_path):
    """If the checksum holds and the text does not come out, the error names both machines."""
    header, payload = parse_bitstream(coded.read_bytes(), "f")
    for changes in (
        dict(),
        dict(streams=header.streams + 1),
        dict(experts={}),
        dict(made_on=header.made_on._replace(torch=(0, 1, 2))),
    ):
        forged = header._replace(digest=b"0" * 12, **changes)
        (tmp_path / "g").write_bytes(bitstream_bytes(forged, payload))
        done = here("decompress", tmp_path / "g", "--out", tmp_path / "out")
        refused(done, "this machine computes other probabilities than the one that wrote it")
        assert (
            ("torch 0.1.2" in done.err)
            == ("this is: torch 2." in done.err)
            == ("made_on" in changes)
        )
    assert not (tmp_path / "out").exists()


def test_files_that_exist_are_kept(here, coded, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_bytes(b"mine")
    refused(here("decompress", coded, "--out", tmp_path / "out"), "exists already", "--force")
    assert (tmp_path / "out" / "x").read_bytes() == b"mine"
    assert here("decompress", coded, "--out", tmp_path / "out", "--force").code == 0
    assert (tmp_path / "out" / "x").read_bytes() == CORNERS["text"]


def test_files_and_options_that_are_refused(here, tmp_path):
    (a,) = written(tmp_path / "a", {"x": b"1"})
    (b,) = written(tmp_path / "b", {"x": b"2"})
    (odd,) = written(tmp_path / "c", {"a\nb": b"2"})
    out = tmp_path / "f.fwy"
    refused(here("compress", "--out", out, a, b), "two files are called 'x'", code=2)
    refused(here("compress", "--out", out, odd), "is no plain file name")
    refused(here("compress", "--out", out, tmp_path / "none"), "No such file")
    refused(here("compress", "--out", out, tmp_path), "Is a directory")
    refused(here("compress", "--out", out, "--streams", "-1", a), "--streams is -1", code=2)
    refused(
        here("compress", "--out", out, "--streams", "9999", a), "streams: 9999; it must be 1 to 256"
    )
    refused(here("compress", "--out", out, a, artifact=a), "not a Fairway artifact")
    refused(here("compress", "--out", out, a, artifact=tmp_path / "none"), "cannot be read")
    assert not out.exists()


def test_an_artifact_without_its_tokenizer(here, tmp_path, corpus):
    model = (corpus.folder / "tokenizer.model").read_bytes()
    (alone,) = written(
        tmp_path / "alone",
        {
            "a.ptz": encoded(
                trained(Config(**TINY | dict(vocab_size=corpus.vocab_size))),
                tokenizer=model,
                embed_tokenizer=False,
            )
        },
    )
    (text,) = written(tmp_path / "in", {"x": CORNERS["text"]})
    refused(
        here("compress", "--out", tmp_path / "f", text, artifact=alone),
        "no tokenizer in the artifact",
    )
    (alone.parent / "tokenizer.model").write_bytes(model)
    assert here("compress", "--out", tmp_path / "f", text, artifact=alone).code == 0
    done = here("decompress", tmp_path / "f", "--out", "-", artifact=alone)
    assert done.out == CORNERS["text"]


def test_a_machine_without_the_device(here, coded, tmp_path):
    header, payload = parse_bitstream(coded.read_bytes(), "f")
    if torch.cuda.is_available():
        pytest.skip("this machine has it")
    made = header.made_on._replace(device=DEVICES.index("cuda"))
    (tmp_path / "g").write_bytes(bitstream_bytes(header._replace(made_on=made), payload))
    refused(
        here("decompress", tmp_path / "g", "--out", tmp_path / "out"),
        "was made on cuda",
        "--device cpu",
    )
    assert (
        here("decompress", tmp_path / "g", "--out", tmp_path / "out", "--device", "cpu").code == 0
    )


def test_a_proof_is_not_taken_for_a_text(compressor, here, tmp_path):
    tokens = torch.randint(4, 384, (60,)).numpy().astype("<u2")
    blob = compressor.encode_proof(tokens, EvalConfig(eval_stride=8))
    header, payload = parse_bitstream(blob, "f")
    assert (compressor.decode_proof(header, payload) == tokens).all() and header.experts == {
        "eval_stride": 8
    }
    (tmp_path / "f").write_bytes(blob)
    refused(
        here("decompress", tmp_path / "f", "--out", tmp_path / "out"),
        "tokens of a proof",
        "fairway decode-proof decodes it",
    )
    with pytest.raises(BitstreamError, match="holds a text"):
        compressor.decode_proof(parse_bitstream(compressor.encode([("a", b"b")]), "f")[0], payload)
    with pytest.raises(BitstreamError, match="do not match their checksum.*other probabilities"):
        compressor.decode_proof(header._replace(digest=bytes(12)), payload)
    for forged in (header._replace(streams=2), header._replace(experts=None)):
        with pytest.raises(BitstreamError, match="a proof must have one stream and experts"):
            compressor.decode_proof(forged, payload)


# ==== 500 MUTATIONS ===============================================================================
def mutated(blob: bytes, r: random.Random) -> bytes:
    at, kind = r.randrange(len(blob)), r.randrange(4)
    return [
        blob[:at] + bytes([blob[at] ^ r.randrange(1, 256)]) + blob[at + 1 :],
        blob[:at],
        blob[:at] + r.randbytes(r.randrange(1, 9)) + blob[at:],
        blob[:at] + blob[at + r.randrange(1, 9) :],
    ][kind]


def sealed(rest: bytes) -> bytes:
    """Return a file with a right checksum, so that the rest is read."""
    return b"FWY\x01" + zlib.crc32(rest).to_bytes(4, "little") + rest


def test_500_mutations_are_refused_in_time_and_memory(compressor):
    """Flips, cuts and insertions, half of them under a right checksum, give the text or one line.

    What passes changed nothing that matters: torch's version, the number of threads, a file name.
    """
    files = [("x", CORNERS["text"][:60]), ("y", b"\xff\0 the")]
    blob, r, slowest, refusals = compressor.encode(files, None, 4), random.Random(1), 0.0, 0
    honest = math.inf
    for _ in range(2):  # the first compiles
        began = time.process_time()
        compressor.decode(*parse_bitstream(blob, "f"))
        honest = min(honest, time.process_time() - began)
    for n in range(500):
        bad, began = (
            mutated(blob, r) if n % 2 else sealed(mutated(blob[8:], r)),
            time.process_time(),
        )
        try:
            found = compressor.decode(*parse_bitstream(bad, "f"))
            assert [data for _, data in found] == [data for _, data in files] and (
                n % 2 == 0 or bad == blob
            )
        except UserError as e:
            refusals += 1
            assert "\n" not in str(e) and 10 < len(str(e)) < 600
        slowest = max(slowest, time.process_time() - began)
    assert refusals > 450 and slowest < 30 * honest


# ==== INTERRUPTED =================================================================================
def test_ctrl_c_leaves_nothing_half_written(here, tmp_path):
    (big,) = written(tmp_path / "in", {"x": 400 * CORNERS["text"]})
    timer = threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    done = here("compress", "--streams", 1, "--out", tmp_path / "out" / "f.fwy", big)
    timer.join()
    assert done == ("compress", 130, b"", "fairway compress: interrupted\n")
    assert not (tmp_path / "out").exists()
