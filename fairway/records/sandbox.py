"""`check --run`: run a copy of a record on a little text, with nothing else in reach.

A child process trains a few steps with train_gpt.py and then runs eval_final.py, with limits of
time, memory and file size, no network, and no file outside its copy. Tokenizer and shards are made
from the folder's own texts.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fairway.records import guard
from fairway.records.checks.base import (
    BUDGET,
    CheckFailed,
    CheckUndecided,
    code_bytes_in_use,
    named_vocabulary,
)
from fairway.records.folder import RecordFolder
from fairway.records.logs import parse_log
from fairway.records.shipped_code import PACKAGES, CodeFile
from fairway.records.syntax import constant_value

# Seconds for training and evaluation together: a few times what ours take on two busy cores.
RUN_SECONDS = 240.0
MEMORY_BYTES, FILE_BYTES = 12 << 30, 1 << 30  # bytes of one process's data, and of one file
LARGEST_COPY = 256 << 20
SMALLEST_VOCABULARY = 320  # 256 bytes and the control pieces, and a few more
SYSTEM = (
    "/usr",
    "/lib",
    "/lib64",
    "/bin",
    "/proc",
    "/sys",
    "/dev",
    "/etc/os-release",
    "/etc/localtime",
    "/etc/ssl",
    "/etc/mime.types",
    "/etc/ld.so.cache",
    "/etc/nsswitch.conf",
    "/etc/alternatives",
)
NO_CUDA = re.compile(r"(?i)cuda|nvidia|flash.?attn|triton|nccl|no gpu")


class Ending(NamedTuple):
    """The exit code, the output and the refusals of a process that ended."""

    code: int | None  # None if it was stopped at the limit
    output: str  # the end of what it printed
    seconds: float
    refused: list[str]  # what the guard refused


# ==== One process within limits ===================================================================
class Sandbox:
    """A folder whose `copy` may be changed; `run` starts Python in it."""

    def __init__(self, root: Path):
        self.root = root
        self.copy, self.home, self.temporary, self.guard, self.refusals = (
            root / name for name in ("copy", "home", "tmp", "guard", "refused.txt")
        )
        for folder in (self.copy, self.home, self.temporary, self.guard):
            folder.mkdir(parents=True)
        self.refusals.touch()
        python = {
            sys.prefix,
            sys.base_prefix,
            sys.exec_prefix,
            *(p for p in sys.path if "site-packages" in p),
        }
        readable, writable = (
            [*python, *SYSTEM, self.guard],
            [self.copy, self.home, self.temporary, "/dev/shm"],
        )
        (self.guard / "sitecustomize.py").write_text(
            f"{Path(guard.__file__).read_text('utf-8')}\n\ninstall({[str(p) for p in readable]!r}, "
            f"{[str(p) for p in writable]!r}, {str(self.refusals)!r})\n",
            "utf-8",
        )

    def run(self, arguments: Sequence[str], env: Mapping[str, str], seconds: float) -> Ending:
        """Run `python ARGUMENTS` in the copy. Output goes to a file, so that it cannot fill our
        memory.
        """
        env = (
            dict(
                PATH=os.environ.get("PATH", os.defpath),
                HOME=str(self.home),
                TMPDIR=str(self.temporary),
                LANG="C.UTF-8",
                PYTHONPATH=str(self.guard),
                PYTHONDONTWRITEBYTECODE="1",
                PYTHONUNBUFFERED="1",
                OMP_NUM_THREADS=str(min(2, os.cpu_count() or 1)),
            )
            | env
        )
        start, code = time.monotonic(), None
        with open(self.root / "output.txt", "w+b") as output:
            child = subprocess.Popen(
                [*without_network(), sys.executable, *arguments],
                cwd=self.copy,
                env=env,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=limits(seconds),
            )
            try:
                code = child.wait(max(seconds, 0.1))
            except subprocess.TimeoutExpired:
                pass
            finally:
                stop(child)
            output.seek(max(0, output.seek(0, io.SEEK_END) - (64 << 10)))
            text = output.read().decode("utf-8", "replace")
        refused = list(dict.fromkeys(self.refusals.read_text("utf-8", "replace").splitlines()))
        return Ending(code, text, time.monotonic() - start, refused)


def limits(seconds: float) -> Callable[[], None]:
    """Return a function that sets the limits of resources in a child before it starts."""

    def apply() -> None:
        cpu = int(seconds * (os.cpu_count() or 1)) + 5
        # CUDA reserves terabytes of addresses.
        data = resource.RLIM_INFINITY if has_cuda() else MEMORY_BYTES
        for what, most in (
            (resource.RLIMIT_DATA, data),
            (resource.RLIMIT_FSIZE, FILE_BYTES),
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_CPU, cpu),
        ):
            # The limit is lower already, or this kernel does not know it.
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(what, (most, most))

    return apply


def stop(child: subprocess.Popen) -> None:
    """Kill a child and everything it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def without_network() -> list[str]:
    """Return the command for own namespaces of network and processes, if this kernel allows it.

    Without one, only the guard refuses connections.
    """
    command = ["unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child"]
    try:
        works = subprocess.run([*command, "true"], capture_output=True, timeout=10).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        works = False
    return command if works else []


# ==== Text to train on ============================================================================
def training_texts(folder: RecordFolder, most: int = 240_000) -> list[str]:
    """Return paragraphs of the folder's README, code and logs, of `most` characters in all."""
    sources = [
        folder.readme,
        *(s.text for s in folder.code.sources.values()),
        *folder.texts.values(),
    ]
    parts = [
        part.strip()[:2000]
        for text in sources
        for part in re.split(r"\n\s*\n", text[: most // 2])
        if part.strip()
    ]
    chosen, size = [], 0
    for part in [*parts, "A text of one line, in case that there is none."]:
        if size < most:
            chosen.append(part.replace("\0", " "))
            size += len(part)
    return chosen


def tokenizer_of(texts: list[str], vocabulary: int) -> tuple[bytes, int]:
    """Train a SentencePiece model of that many pieces, or of as many as the texts allow."""
    import sentencepiece

    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    while True:
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines),
                model_writer=model,
                vocab_size=vocabulary,
                model_type="bpe",
                num_threads=1,
                byte_fallback=True,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                pad_id=0,
                bos_id=1,
                eos_id=2,
                unk_id=3,
                remove_extra_whitespaces=False,
                minloglevel=2,
                hard_vocab_limit=True,
            )
            return model.getvalue(), vocabulary
        except RuntimeError as e:  # too little text for so many pieces
            if vocabulary <= SMALLEST_VOCABULARY:
                raise CheckUndecided(
                    f"no tokenizer could be made of the folder's texts: {str(e)[:100]}"
                ) from None
            vocabulary = max(SMALLEST_VOCABULARY, vocabulary // 2)


def write_shards(data: Path, model: bytes, texts: list[str]) -> None:
    """Write a training and a validation shard of the texts, and tokenizer.model next to them."""
    import sentencepiece

    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = [[1, *one] for one in tokenizer.encode(texts)]
    flat = np.array([token for one in ids for token in one], "<u2")
    validation_size = max(len(flat) // 8, 1)
    for kind, tokens in (
        ("train", np.resize(flat[validation_size:], max(len(flat), 200_000))),
        ("val", np.resize(flat[:validation_size], 9_000)),
    ):
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, len(tokens)
        (data / f"fineweb_{kind}_000000.bin").write_bytes(header.tobytes() + tokens.tobytes())
    (data / "tokenizer.model").write_bytes(model)


# ==== The record ==================================================================================
def check_run(folder: RecordFolder) -> str:
    """Train a few steps and evaluate, in a copy: the artifact must fit, and there must be a
    score.
    """
    trainer = next((name for name in folder.code.entries if name != "eval_final.py"), None)
    if trainer is None:
        raise CheckUndecided("there is no trainer to run")
    with tempfile.TemporaryDirectory(prefix="record-", ignore_cleanup_errors=True) as root:
        return run_in(Sandbox(Path(root)), folder, str(trainer))


def run_in(box: Sandbox, folder: RecordFolder, trainer: str) -> str:
    """Run trainer and evaluation in a sandbox; return the line that `check_run` prints."""
    copy_folder(folder, box.copy)
    env, started = environment(folder, box, trainer), time.monotonic()
    trained = box.run([trainer], env, RUN_SECONDS)
    judge_ending(folder, trainer, trained)
    artifact = newest_artifact(box.copy, folder)
    if artifact is None:
        raise CheckFailed(
            f"{trainer} ended without an artifact (final_model*.ptz): {last_line(trained.output)}"
        )
    size = artifact.stat().st_size + code_bytes_in_use(folder)
    if size > BUDGET:
        raise CheckFailed(
            f"{artifact.name} of {artifact.stat().st_size:,} bytes + code "
            f"{code_bytes_in_use(folder):,} = {size:,}; {BUDGET:,} are allowed"
        )
    output = trained.output
    if "eval_final.py" in folder.code.entries:
        env |= {"CHECKPOINT": str(artifact.relative_to(box.copy))}
        evaluated = box.run(["eval_final.py"], env, RUN_SECONDS - (time.monotonic() - started))
        judge_ending(folder, "eval_final.py", evaluated)
        output = evaluated.output
    score = parse_log(output).final
    if score is None or score.bpb is None:
        raise CheckFailed(f"no final score was printed; the last line is {last_line(output)}")
    return (
        f"trained{' and evaluated' * ('eval_final.py' in folder.code.entries)} in "
        f"{time.monotonic() - started:.0f} s on {machine()}: {artifact.name} and code {size:,} "
        f"bytes, val_bpb:{score.bpb}"
    )


def copy_folder(folder: RecordFolder, copy: Path) -> None:
    """Copy the folder's regular files; a huge folder is not run."""
    size = sum(folder.files.values())
    if size > LARGEST_COPY:
        raise CheckUndecided(
            f"the folder has {size:,} bytes; at most {LARGEST_COPY:,} are copied to be run"
        )
    for name in folder.files:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder.path / name, copy / name, follow_symlinks=False)


def environment(folder: RecordFolder, box: Sandbox, trainer: str) -> dict[str, str]:
    """Return the settings: the challenge's names, or PRESET=smoke where the trainer has it."""
    log = folder.runs[0].log if folder.runs else None
    wanted = min((log.vocab_size or named_vocabulary(log)) if log else 1024, 8192) or 1024
    texts = training_texts(folder)
    model, vocabulary = tokenizer_of(texts, max(wanted, SMALLEST_VOCABULARY))
    data = box.copy / "data"
    data.mkdir(exist_ok=True)
    write_shards(data, model, texts)
    env = dict(
        DATA_PATH="data",
        TOKENIZER_PATH="data/tokenizer.model",
        VOCAB_SIZE=vocabulary,
        RUN_ID="check",
        SEED=1337,
        ITERATIONS=3,
        MAX_WALLCLOCK_SECONDS=30,
    )
    code = [s for name, s in folder.code.sources.items() if name.split("!")[-1] == trainer]
    if any(reads_smoke(source) for source in code):
        env |= dict(PRESET="smoke", TTT="none")
    else:
        env |= dict(
            TRAIN_BATCH_TOKENS=2048,
            TRAIN_SEQ_LEN=128,
            VAL_BATCH_SIZE=2048,
            WARMUP_STEPS=0,
            EVAL_SEQ_LEN=128,
        )
    return {name: str(value) for name, value in env.items()}


def reads_smoke(source: CodeFile) -> bool:
    strings = {constant_value(node) for node in source.nodes if type(constant_value(node)) is str}
    return {"PRESET", "smoke"} <= strings


def newest_artifact(copy: Path, folder: RecordFolder) -> Path | None:
    new: Iterator[Path] = (
        p
        for p in copy.rglob("*.ptz")
        if p.is_file() and not p.is_symlink() and p.relative_to(copy).as_posix() not in folder.files
    )
    return max(new, key=lambda p: p.stat().st_mtime, default=None)


def judge_ending(folder: RecordFolder, script: str, ended: Ending) -> None:
    """Return if a script ended well; else say why not, and whether the folder is to blame."""
    if ended.refused:
        raise CheckFailed(f"{script} {'; '.join(ended.refused[:3])}")
    last = last_line(ended.output)
    if ended.code == 0:
        return
    here = machine()
    if not has_cuda() and NO_CUDA.search(ended.output[-2000:]):
        raise CheckUndecided(f"{script} wants a GPU, and this machine has none: {last}")
    lacking = re.search(r"ModuleNotFoundError: No module named '([\w.]+)'", ended.output)
    asked = {a.module.split(".")[0] for a in folder.code.absent}
    if lacking and lacking[1].split(".")[0] in PACKAGES | asked:
        raise CheckUndecided(f"{script} wants a package that is not installed here: {last}")
    newer = "SyntaxError" in ended.output and any(s.tree is None for s in folder.code.running())
    if newer:
        raise CheckUndecided(
            f"{script} does not parse with Python "
            f"{sys.version_info.major}.{sys.version_info.minor}: {last}"
        )
    if ended.code is None and not has_cuda():
        raise CheckUndecided(
            f"{script} did not end within {ended.seconds:.0f} s on {here}; its last line is {last}"
        )
    if ended.code is None:
        raise CheckFailed(
            f"{script} did not end within {ended.seconds:.0f} s; its last line is {last}"
        )
    raise CheckFailed(f"{script} ended with code {ended.code}: {last}")


def last_line(text: str) -> str:
    return next(
        (line.strip()[:200] for line in reversed(text.splitlines()) if line.strip()), "nothing"
    )


def has_cuda() -> bool:
    return shutil.which("nvidia-smi") is not None and Path("/proc/driver/nvidia").exists()


def machine() -> str:
    return "CUDA" if has_cuda() else f"{os.cpu_count()} CPU cores (no GPU here)"
