"""Fixtures that all tests share: a tiny corpus, and the trainer, in this process or its own."""

import contextlib
import fcntl
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from io import BytesIO, StringIO
from pathlib import Path
from typing import NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["OMP_NUM_THREADS"] = (
    "1"  # before torch and numpy are imported: workers of the tests share few cores
)

import hypothesis
import numpy as np
import pytest
import sentencepiece
import torch
from models import PARTS

import train_gpt
from fairway.shards import write_shard
from train_gpt import BOS_ID, file_sha256, read_shard

ROOT = Path(__file__).resolve().parents[1]
pytest_plugins = ["method_cells"]
signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # a shell that puts us in the background has it ignored
torch.set_num_threads(1)
hypothesis.settings.register_profile("default", max_examples=30, deadline=None)
hypothesis.settings.register_profile(
    "ci", max_examples=60, deadline=None, derandomize=True, print_blob=True
)
hypothesis.settings.register_profile("thorough", max_examples=2000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


WORDS = """
the of and to in a is that for it as was with be by on not he his but at are this have from or had
an they which one you were all her she there would their we him been has when who will no more if
out so up said what its about than into them can only other time new some could these two may first
then do any like my now over such our man me even most made after also did many off before must well
back through years where much your way down should because long each people just state those between
own under never day same another know while last might great old year come since against go came
right used take three small world house water country government congress nation peace war law
public citizens
""".split()
SAMPLES = [
    "naïve",
    "Zürich",
    "€100",
    "“quoted”",
    "日本",
    "x²",
    "🙂",
    "\n",
    "  ",
    "1,776",
]  # not all in the vocabulary


def english_like(seed: int, documents: int) -> list[str]:
    """Return documents in which each word depends on the one before, so that models learn."""
    rng = np.random.default_rng(seed)
    followers = np.random.default_rng(1).integers(0, len(WORDS), (len(WORDS), 4))
    texts = []
    for length in rng.integers(4, 60, documents):
        at, words = int(rng.integers(len(WORDS))), []
        for choice, end in zip(rng.integers(0, 4, length), rng.random((length, 2)), strict=True):
            at = int(followers[at, choice])
            words.append(
                SAMPLES[at % len(SAMPLES)] if end[0] < 0.01 else WORDS[at] + "." * int(end[1] < 0.1)
            )
        texts.append(" ".join(words).capitalize())
    return texts


def train_tokenizer(texts: list[str], vocab_size: int, **options) -> bytes:
    """Train a SentencePiece model like data/prepare.py: BPE with byte fallback, exact text."""
    model = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        **dict(
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_digits=True,
            character_coverage=0.999,
            pad_id=0,
            bos_id=BOS_ID,
            eos_id=2,
            unk_id=3,
            num_threads=1,
            minloglevel=2,
        )
        | options
    )
    return model.getvalue()


def to_tokens(tokenizer, texts: list[str]) -> np.ndarray:
    return np.array(
        [token for ids in tokenizer.encode(texts) for token in (BOS_ID, *ids)], dtype="<u2"
    )


class Corpus(NamedTuple):
    folder: Path
    vocab_size: int
    tokenizer: sentencepiece.SentencePieceProcessor
    texts: list[str]  # of the training shards


# Files that take longest, longest first. They start first, so that no process runs one while the
# others have nothing left to do.
LONGEST = """
trainer/test_training.py scoring/test_evaluation.py scoring/test_mixed.py scoring/test_adaptation.py
trainer/test_train_gpt_mlx.py data/test_data_prepare.py trainer/test_artifact.py
""".split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {ROOT / "tests" / name: at for at, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    needed = "mlx" if "mlx" in item.path.name else "coremltools"
    if item.get_closest_marker("apple") and importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed: pip install -r requirements-apple.txt")


class Result(NamedTuple):
    returncode: int
    stdout: str
    stderr: str
    events: list[dict]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Corpus:
    """3,000 training and 100 validation documents in three shards, tokenizer.model beside them."""
    folder, vocab_size, texts = tmp_path_factory.mktemp("corpus"), 384, english_like(0, 3000)
    model = train_tokenizer(texts, vocab_size)
    (folder / "tokenizer.model").write_bytes(model)
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    write_shard(folder / "tiny_train_000000.bin", to_tokens(tokenizer, texts[:2000]))
    write_shard(folder / "tiny_train_000001.bin", to_tokens(tokenizer, texts[2000:]))
    write_shard(folder / "tiny_val_000000.bin", to_tokens(tokenizer, english_like(2, 100)))
    return Corpus(folder, vocab_size, tokenizer, texts)


@pytest.fixture(scope="session")
def trainer_env(corpus):
    """Return `trainer_env(out_dir, **settings)`: an environment; None leaves a setting out."""

    def build(out_dir, **settings) -> dict[str, str]:
        parts = {} if "PRESET" in settings else PARTS
        env = parts | dict(
            PATH=os.environ["PATH"],
            HOME=str(out_dir),
            OMP_NUM_THREADS="1",
            PRESET="smoke",
            RUN_ID="test",
            DATA_PATH=corpus.folder,
            VOCAB_SIZE=corpus.vocab_size,
            CHECKPOINT_SECONDS=0,
            OUT_DIR=out_dir,
        )
        return {name: str(value) for name, value in (env | settings).items() if value is not None}

    return build


@pytest.fixture(scope="session")
def run_trainer(trainer_env):
    """Return `run_trainer(out_dir, timeout=600, **settings)`, which runs train_gpt.py."""

    def run(out_dir, timeout: float = 600, **settings) -> Result:
        Path(out_dir).mkdir(parents=True, exist_ok=True)
        env = trainer_env(out_dir, **settings)
        done = subprocess.run(
            [sys.executable, str(ROOT / "train_gpt.py")],
            env=env,
            cwd=out_dir,
            timeout=timeout,
            capture_output=True,
            text=True,
        )
        return Result(
            done.returncode,
            done.stdout,
            done.stderr,
            read_events(Path(out_dir), env.get("RUN_ID", "test")),
        )

    return run


@contextlib.contextmanager
def own_signals(seconds: int):
    """Give pytest its signal handlers back after a run, and end a run that does not end."""

    def too_long(*_):
        raise TimeoutError(f"still running after {seconds} s")

    kept = (signal.SIGTERM, signal.SIGINT, signal.SIGALRM, signal.SIGPIPE)
    before = {s: signal.getsignal(s) for s in kept}
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        for signum, handler in before.items():
            signal.signal(signum, handler)


@pytest.fixture
def trainer_here(trainer_env, capsys):
    """Return `run_trainer` in this process: `trainer_here(out_dir, *words, **settings)`.

    It saves the three seconds of processor time in which a process imports torch.
    """

    def run(out_dir, *words: str, **settings) -> Result:
        Path(out_dir).mkdir(parents=True, exist_ok=True)
        env = trainer_env(out_dir, **settings)
        with (
            own_signals(120),
            mock.patch.dict(os.environ, env, clear=True),
            mock.patch.object(sys, "argv", ["train_gpt.py", *words]),
            contextlib.chdir(out_dir),
        ):
            code = train_gpt.run_main()
        out, err = capsys.readouterr()
        return Result(code, out, err, read_events(Path(out_dir), env["RUN_ID"]))

    return run


@pytest.fixture(scope="session")
def trained_artifact(trainer_env, tmp_path_factory) -> Path:
    """Return the artifact of a small model that has learned a little, in thirty steps.

    All processes of a test run share it; the first trains, and the others wait.
    """
    folder = shared_folder(tmp_path_factory) / "trained"
    artifact = folder / "final_model.int6.ptz"
    with open(folder.parent / "trained.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not artifact.exists():
            settings = dict(
                ITERATIONS=30,
                MODEL_DIM=32,
                NUM_HEADS=4,
                NUM_KV_HEADS=2,
                BIGRAM_DIM=8,
                CODEC="brotli",
                MAX_WALLCLOCK_SECONDS=0,
            )
            with own_signals(120), contextlib.redirect_stdout(StringIO()):
                train_gpt.main(trainer_env(folder, **settings))
    return artifact


def shared_folder(tmp_path_factory) -> Path:
    """Return the folder that all processes of a test run share."""
    base = Path(tmp_path_factory.getbasetemp())
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def read_events(out_dir: Path, run_id: str = "test") -> list[dict]:
    log = out_dir / "logs" / f"{run_id}.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory, corpus) -> Path:
    """Return a folder with model.ptz, artifacts that differ from it in one respect, and prompts."""
    from artifacts import make_artifact

    folder = tmp_path_factory.mktemp("decoding")
    make_artifact(folder, corpus)
    make_artifact(folder, corpus, "small.ptz", num_layers=1)
    make_artifact(folder, corpus, "bare.ptz", inside=False)
    make_artifact(folder, corpus, "larger.ptz", vocab_size=corpus.vocab_size + 8)
    stranger = train_tokenizer(corpus.texts[:500], corpus.vocab_size - 16)
    make_artifact(folder, corpus, "stranger.ptz", stranger)
    damaged = bytearray((folder / "model.ptz").read_bytes())
    damaged[-3000] ^= 1
    (folder / "damaged.ptz").write_bytes(damaged)
    (folder / "prompt.txt").write_bytes(b"The people\n")
    (folder / "bytes.txt").write_bytes(b"\xff\xfe people \xc3")
    return folder


@pytest.fixture(scope="session")
def exported(tmp_path_factory, corpus):
    """Return `exported(**options)`: a folder of CoreML shards of a small random model.

    Options that equal their defaults do not matter. Each folder is exported once, and shared by
    all processes of a test run; a test that changes it must copy it first.
    """
    from artifacts import make_artifact

    from fairway.coreml.export import ExportOptions, ExportSource, export_shards

    folder = tmp_path_factory.mktemp("coreml")
    features = dict(smear_gate=True, bigram_vocab_size=32, bigram_dim=8, xsa_last_n=1)
    source = ExportSource.read(make_artifact(folder, corpus, num_layers=2, **features))
    sha256 = file_sha256(source.path)
    text = read_shard(corpus.folder / "tiny_train_000000.bin")[:400]
    shared = shared_folder(tmp_path_factory) / f"shards-{sha256[:12]}"

    def get(**options) -> Path:
        options = ExportOptions(**options)
        changed = {n: v for n, v in asdict(options).items() if v != getattr(ExportOptions, n)}
        path = shared / ("-".join(f"{n}={v}" for n, v in sorted(changed.items())) or "default")
        if not path.exists():
            export_shards(source, options, folder / path.name, text, lambda line: None)
            shared.mkdir(exist_ok=True)
            with contextlib.suppress(OSError):  # another process exported it meanwhile
                (folder / path.name).rename(path)
        return path

    def saving(**options):
        """Return a stand-in for export.save_shard that copies the shards of `get(**options)`."""
        ready = get(**options)  # now, because the stand-in would replace its own export too
        return lambda ct, shard, opts, sizes, path: shutil.copytree(ready / path.name, path)

    get.source, get.source_sha256, get.text, get.saving = source, sha256, text, saving
    return get
