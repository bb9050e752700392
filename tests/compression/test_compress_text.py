"""compress_text.py as its users run it: every byte comes back, in a new process too, or one line says why not."""

import hashlib
import io
import json
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

import compress_text
from fairway.compression.bitstream import DEVICES, BitstreamError, packed, unpacked
from fairway.compression.compressor import Coder
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
    "text": "\n".join(english_like(3, 5)).encode(),
    "half": b"The nation \xc3 and \x80 war.",
}


class Done(NamedTuple):
    code: int
    out: bytes
    err: str


@pytest.fixture(scope="module")
def artifact(tmp_path_factory, corpus) -> Path:
    """Of a tiny model that is not trained, but not blank either."""
    cfg = Config(**TINY | dict(vocab_size=corpus.vocab_size))
    path = tmp_path_factory.mktemp("artifact") / "a.ptz"
    path.write_bytes(
        encoded(trained(cfg), tokenizer=(corpus.folder / "tokenizer.model").read_bytes())
    )
    return path


@pytest.fixture(scope="module")
def coder(artifact) -> Coder:
    return Coder.of(artifact, "cpu")


@pytest.fixture
def here(capfdbinary, artifact):
    """`here("encode", ...)`: the script's main in this process; what it says, but for the progress bar."""

    def call(verb: str, *arguments, artifact=artifact, **env) -> Done:
        more = [] if verb == "info" else ["--artifact", str(artifact)]
        capfdbinary.readouterr()
        code = compress_text.main([verb, *map(str, arguments), *more], env)
        out, err = capfdbinary.readouterr()
        return Done(
            code, out, "".join(line for line in err.decode().splitlines(True) if "\r" not in line)
        )

    return call


def written(folder: Path, files: dict[str, bytes]) -> list[Path]:
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return [folder / name for name in files]


def random_bytes(count: int) -> dict[str, bytes]:
    """Of several kinds, so that text, bytes and what lies between are met at all boundaries."""
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


# ---- Round trips -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [[], ["--experts"], ["--streams", 200]], ids=str)
def test_corners_come_back_from_one_bitstream(here, tmp_path, options):
    paths = written(tmp_path / "in", CORNERS)
    done = here("encode", "--out", tmp_path / "f.fwy", *options, *paths)
    assert done.code == 0 and done.out == b"" and "bits/byte" in done.err
    assert "decoding needs the artifact too" in done.err
    done = here("decode", tmp_path / "f.fwy", "--out", tmp_path / "out")
    assert done.code == 0 and "checksum right" in done.err
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == CORNERS


def test_200_random_files_come_back(coder):
    files = list(random_bytes(200).items())
    assert len({data for _, data in files}) > 100
    for settings, streams in ((None, 16), (None, 1), (EvalConfig(), 8)):
        part = files if settings is None and streams > 1 else files[:40]
        assert coder.decode(*unpacked(coder.encode(part, settings, streams), "f")) == part


@pytest.mark.parametrize("name", CORNERS)
def test_each_corner_alone(coder, name):
    files = [("a", CORNERS[name])]
    header, payload = unpacked(coder.encode(files), "f")
    assert coder.decode(header, payload) == files and header.count == len(
        coder.speller.tokens(CORNERS[name])
    )


def test_a_new_process_needs_the_artifact_and_the_bitstream_alone(here, artifact, tmp_path):
    paths = written(tmp_path / "in", {name: CORNERS[name] for name in ("text", "bytes", "empty")})
    assert here("encode", "--experts", "--out", tmp_path / "f.fwy", *paths).code == 0
    for path in paths:
        path.unlink()
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "compress_text.py"),
            "decode",
            "--artifact",
            str(artifact),
            str(tmp_path / "f.fwy"),
            "--out",
            str(tmp_path / "out"),
        ],
        capture_output=True,
        cwd="/",
        env=dict(PATH=os.environ["PATH"], OMP_NUM_THREADS="1"),
        timeout=120,
    )
    assert done.returncode == 0 and done.stdout == b"", done.stderr
    assert all((tmp_path / "out" / path.name).read_bytes() == CORNERS[path.name] for path in paths)


def test_pipes(here, monkeypatch):
    text = CORNERS["text"] + b"\xff\0"

    def piped(data: bytes, *arguments: str) -> Done:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
        return here(*arguments)

    coded = piped(text, "encode", "--out", "-", "-")
    assert coded.code == 0 and coded.out.startswith(b"FWY\x01") and "bits/byte" in coded.err
    assert piped(coded.out, "decode", "-", "--out", "-")[:2] == (0, text)
    assert json.loads(piped(coded.out, "info", "-").out)["files"] == [["text", len(text)]]


def test_files_leave_standard_output_in_order(here, tmp_path):
    paths = written(tmp_path / "in", {"b": b"of the ", "a": b"nation"})
    assert here("encode", "--out", tmp_path / "f", *paths).code == 0
    done = here("decode", tmp_path / "f", "--out", "-")
    assert done.out == b"of the nation" and not list(tmp_path.glob("-"))


def test_info_needs_no_artifact(here, tmp_path, artifact):
    assert (
        here("encode", "--out", tmp_path / "f", *written(tmp_path / "in", {"x": b"of the"})).code
        == 0
    )
    header = json.loads(here("info", tmp_path / "f").out)
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
    assert here("encode", "--experts", "--out", tmp_path / "f", text, **env).code == 0
    assert json.loads(here("info", tmp_path / "f").out)["experts"] == {
        "ngram_orders": 3,
        "mix_weights": "exponential",
    }
    assert here("decode", tmp_path / "f", "--out", "-").out == CORNERS["text"]
    assert here("encode", "--out", tmp_path / "g", text, **env).code == 0
    assert json.loads(here("info", tmp_path / "g").out)["experts"] is None
    refused(
        here("encode", "--experts", "--out", tmp_path / "h", text, MIX_WEIGHT="em"), "MIX_WEIGHT"
    )
    refused(
        here("encode", "--experts", "--out", tmp_path / "h", text, NGRAM_ORDERS="99"),
        "NGRAM_ORDERS is 99",
    )


def test_threads_are_those_that_encoded(coder):
    before = torch.get_num_threads()
    header, payload = unpacked(coder.encode([("a", b"of the nation")]), "f")
    seen = []
    header = header._replace(made_on=header.made_on._replace(threads=2))
    coder.decode(header, payload, told=lambda _: seen.append(torch.get_num_threads()))
    assert set(seen) == {2} and torch.get_num_threads() == before


# ---- Refusals --------------------------------------------------------------------------------------------------------
def refused(done: Done, *words: str) -> None:
    assert done.code == 1 and done.out == b"" and done.err.count("\n") == 1, done
    assert done.err.startswith("compress_text: error: ") and all(
        word in done.err for word in words
    ), done.err


@pytest.fixture
def coded(here, tmp_path) -> Path:
    assert (
        here(
            "encode", "--out", tmp_path / "f.fwy", *written(tmp_path / "in", {"x": CORNERS["text"]})
        ).code
        == 0
    )
    return tmp_path / "f.fwy"


def test_another_artifact(here, coded, artifact, tmp_path, corpus):
    cfg = Config(**TINY | dict(vocab_size=corpus.vocab_size, num_layers=1))
    other = tmp_path / "b.ptz"
    other.write_bytes(
        encoded(trained(cfg), tokenizer=(corpus.folder / "tokenizer.model").read_bytes())
    )
    sums = [hashlib.sha256(path.read_bytes()).hexdigest()[:24] for path in (artifact, other)]
    refused(here("decode", coded, "--out", tmp_path / "out", artifact=other), str(coded), *sums)
    assert sums[0] != sums[1] and not (tmp_path / "out").exists()


def test_other_probabilities_are_no_text(here, coded, tmp_path):
    """A checksum that holds, and a text that does not come out: said to be so, with both machines."""
    header, payload = unpacked(coded.read_bytes(), "f")
    for changes in (
        dict(),
        dict(streams=header.streams + 1),
        dict(experts={}),
        dict(made_on=header.made_on._replace(torch=(0, 1, 2))),
    ):
        forged = header._replace(digest=b"0" * 12, **changes)
        (tmp_path / "g").write_bytes(packed(forged, payload))
        done = here("decode", tmp_path / "g", "--out", tmp_path / "out")
        refused(done, "this machine computes other probabilities than the one that wrote it")
        assert (
            ("torch 0.1.2" in done.err) == ("here: torch 2." in done.err) == ("made_on" in changes)
        )
    assert not (tmp_path / "out").exists()


def test_files_that_are_there_are_kept(here, coded, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_bytes(b"mine")
    refused(here("decode", coded, "--out", tmp_path / "out"), "is there already", "--force")
    assert (tmp_path / "out" / "x").read_bytes() == b"mine"
    assert here("decode", coded, "--out", tmp_path / "out", "--force").code == 0
    assert (tmp_path / "out" / "x").read_bytes() == CORNERS["text"]


def test_what_cannot_be_encoded(here, tmp_path):
    (a,) = written(tmp_path / "a", {"x": b"1"})
    (b,) = written(tmp_path / "b", {"x": b"2"})
    (odd,) = written(tmp_path / "c", {"a\nb": b"2"})
    out = tmp_path / "f.fwy"
    refused(here("encode", "--out", out, a, b), "two of the files are called 'x'")
    refused(here("encode", "--out", out, odd), "is no plain file name")
    refused(here("encode", "--out", out, tmp_path / "none"), "No such file")
    refused(here("encode", "--out", out, tmp_path), "Is a directory")
    refused(here("encode", "--out", out, "--streams", "-1", a), "--streams is -1")
    refused(
        here("encode", "--out", out, "--streams", "9999", a), "streams: 9999; it must be 1 to 256"
    )
    refused(here("encode", "--out", out, a, artifact=a), "not a Fairway artifact")
    refused(here("encode", "--out", out, a, artifact=tmp_path / "none"), "cannot be read")
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
        here("encode", "--out", tmp_path / "f", text, artifact=alone),
        "no tokenizer in the artifact",
    )
    (alone.parent / "tokenizer.model").write_bytes(model)
    assert here("encode", "--out", tmp_path / "f", text, artifact=alone).code == 0
    done = here("decode", tmp_path / "f", "--out", "-", artifact=alone)
    assert done.out == CORNERS["text"]


def test_a_machine_without_the_device(here, coded, tmp_path):
    header, payload = unpacked(coded.read_bytes(), "f")
    if torch.cuda.is_available():
        pytest.skip("this machine has it")
    made = header.made_on._replace(device=DEVICES.index("cuda"))
    (tmp_path / "g").write_bytes(packed(header._replace(made_on=made), payload))
    refused(
        here("decode", tmp_path / "g", "--out", tmp_path / "out"),
        "was made on cuda",
        "--device cpu",
    )
    assert (
        here("decode", tmp_path / "g", "--out", tmp_path / "out", "--device", "cpu").code == 0
    )  # told to, it tries


def test_a_proof_is_not_taken_for_a_text(coder, here, tmp_path):
    tokens = torch.randint(4, 384, (60,)).numpy().astype("<u2")
    blob = coder.encode_proof(tokens, EvalConfig(eval_stride=8))
    header, payload = unpacked(blob, "f")
    assert (coder.decode_proof(header, payload) == tokens).all() and header.experts == {
        "eval_stride": 8
    }
    (tmp_path / "f").write_bytes(blob)
    refused(
        here("decode", tmp_path / "f", "--out", tmp_path / "out"),
        "tokens of a proof",
        "fairway.compression.proof decodes it",
    )
    with pytest.raises(BitstreamError, match="holds a text"):
        coder.decode_proof(unpacked(coder.encode([("a", b"b")]), "f")[0], payload)
    with pytest.raises(BitstreamError, match="does not match its checksum.*other probabilities"):
        coder.decode_proof(header._replace(digest=bytes(12)), payload)
    for forged in (header._replace(streams=2), header._replace(experts=None)):
        with pytest.raises(BitstreamError, match="a proof is one stream, with experts"):
            coder.decode_proof(forged, payload)


# ---- 500 mutations ---------------------------------------------------------------------------------------------------
def mutated(blob: bytes, r: random.Random) -> bytes:
    at, kind = r.randrange(len(blob)), r.randrange(4)
    return [
        blob[:at] + bytes([blob[at] ^ r.randrange(1, 256)]) + blob[at + 1 :],
        blob[:at],
        blob[:at] + r.randbytes(r.randrange(1, 9)) + blob[at:],
        blob[:at] + blob[at + r.randrange(1, 9) :],
    ][kind]


def sealed(rest: bytes) -> bytes:
    """With a checksum that holds, so that everything behind it is met."""
    return b"FWY\x01" + zlib.crc32(rest).to_bytes(4, "little") + rest


def test_500_mutations_are_refused_in_time_and_memory(coder):
    """Flips, cuts, insertions, half of them with a checksum made anew: the text itself, or one line. What passes is
    what nothing hangs on: the version of torch, the number of threads, another file name."""
    files = [("x", CORNERS["text"][:120]), ("y", b"\xff\0 the")]
    blob, r, seconds, refusals = coder.encode(files, None, 4), random.Random(1), 0.0, 0
    for n in range(500):
        bad, began = (
            mutated(blob, r) if n % 2 else sealed(mutated(blob[8:], r)),
            time.process_time(),
        )
        try:
            found = coder.decode(*unpacked(bad, "f"))
            assert [data for _, data in found] == [data for _, data in files] and (
                n % 2 == 0 or bad == blob
            )
        except UserError as e:
            refusals += 1
            assert "\n" not in str(e) and 10 < len(str(e)) < 600
        seconds = max(seconds, time.process_time() - began)
    assert refusals > 450 and seconds < 5


# ---- Interrupted -----------------------------------------------------------------------------------------------------
def test_ctrl_c_leaves_nothing_half_written(here, tmp_path):
    (big,) = written(tmp_path / "in", {"x": "\n".join(english_like(3, 20_000)).encode()})
    timer = threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    done = here("encode", "--streams", 1, "--out", tmp_path / "out" / "f.fwy", big)
    timer.join()
    assert done == (130, b"", "compress_text: interrupted; nothing was written\n")
    assert not (tmp_path / "out").exists()
