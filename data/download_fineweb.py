"""Fetch the challenge's published FineWeb shards and their tokenizer, by its manifest.

The layout is the challenge's own: OUT/manifest.json, OUT/datasets/fineweb10B_sp1024/*.bin and
OUT/tokenizers/*. A download that breaks off goes on where it stopped, now or in a later run. A
file is put in place once it is whole: its length is what its header says, and its sha256 is what
the manifest says, or else what the host names for it. Nothing that the manifest says can lead
outside OUT, nor to more bytes than a shard can have.

The challenge's variables are honoured when --base-url is not given: MATCHED_FINEWEB_REPO_ID,
MATCHED_FINEWEB_REMOTE_ROOT_PREFIX and MATCHED_FINEWEB_REVISION.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import shutil
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository: train_gpt

from data.common import progress, run
from train_gpt import SHARD_HEADER_BYTES, ShardError, UserError, file_sha256, read_shard

SHARD_BYTES = 1 << 30  # refuse more; the published ones have 200,001,024
SMALL_BYTES = 64 << 20  # refuse more for a manifest or a tokenizer
SHARDS = 10_000  # refuse a manifest with more
TRIES = 6  # in a row without a new byte
EXAMPLES = """examples:
  python data/download_fineweb.py --variant sp1024                      80 shards, 16 GB
  python data/download_fineweb.py --variant sp1024 --train-shards 1     200 MB and validation
  MATCHED_FINEWEB_REPO_ID=owner/name python data/download_fineweb.py --variant sp8192"""


@dataclass
class Source:
    """Where files come from, and how patiently."""

    base: str
    retry_wait: float  # seconds after the first failure, doubled each time up to a minute

    def get(self, remote: str, target: Path, most: int, bar: tqdm, sha256: str = "") -> None:
        """Fetch into `target`; what is there of an earlier try is used, and checked."""
        part = target.with_name(target.name + ".part")
        part.parent.mkdir(parents=True, exist_ok=True)
        for last in (not part.exists(), True):
            linked = self._complete(remote, part, most, bar)
            wrong = damage(part, sha256 or linked)
            if not wrong:
                with open(part, "rb+") as f:
                    os.fsync(f.fileno())
                os.replace(part, target)
                return
            bar.update(-part.stat().st_size)
            part.unlink()
            if last:
                break
        raise UserError(
            f"{self.base}/{remote}: {wrong}; nothing kept, report it to its publisher "
            "or try another --base-url"
        )

    def _complete(self, remote: str, part: Path, most: int, bar: tqdm) -> str:
        """Append until the file is whole, through any number of broken connections."""
        failures, wait, counted = 0, self.retry_wait, 0
        while True:
            have = part.stat().st_size if part.exists() else 0
            bar.update(have - counted)
            try:
                return self._append(remote, part, have, most)
            except urllib.error.HTTPError as e:
                if e.code not in (408, 425, 429) and e.code < 500:
                    raise UserError(
                        f"{self.base}/{remote}: HTTP {e.code} {e.reason}; check "
                        "--variant and --base-url"
                    ) from None
                problem = f"HTTP {e.code}"
            except (
                urllib.error.URLError,
                http.client.HTTPException,
                ssl.SSLError,
                ConnectionError,
                TimeoutError,
            ) as e:
                problem = str(getattr(e, "reason", e) or type(e).__name__)
            finally:
                counted = part.stat().st_size if part.exists() else 0
                bar.update(counted - have)
            failures = 1 if counted > have else failures + 1
            wait = self.retry_wait if failures == 1 else min(2 * wait, 60)
            if failures >= TRIES:
                raise UserError(
                    f"{self.base}/{remote}: {problem}, {failures} times in a row; run "
                    f"again, it goes on from {counted} bytes"
                )
            time.sleep(wait)

    def _append(self, remote: str, part: Path, have: int, most: int) -> str:
        """One connection; returns the sha256 that the host names for the file, if it does."""
        redirects = LinkedHash()
        headers = {"User-Agent": "fairway", "Accept-Encoding": "identity"}
        headers |= {"Range": f"bytes={have}-"} if have else {}
        request = urllib.request.Request(f"{self.base}/{remote}", headers=headers)
        try:
            response = urllib.request.build_opener(redirects).open(request, timeout=60)
        except urllib.error.HTTPError as e:
            if e.code == 416 and e.headers.get("Content-Range", "") == f"bytes */{have}":
                return redirects.sha256  # it was whole already
            if e.code == 416:
                part.unlink()
                raise ConnectionError("the file at hand is longer than the remote one") from None
            raise
        with response, open(part, "ab") as f:
            going_on = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
            if not (response.status == 206 and going_on):
                f.truncate(have := 0)  # the host cannot go on: from the start
            length = response.headers.get("Content-Length")
            total = have + int(length) if length and length.isdigit() else None
            if (total or 0) > most:
                raise UserError(
                    f"{self.base}/{remote}: {total} bytes, at most {most} are "
                    "taken; check --base-url"
                )
            while block := response.read(1 << 20):
                have += len(block)
                if have > most:
                    raise UserError(
                        f"{self.base}/{remote}: more than {most} bytes; check --base-url"
                    )
                f.write(block)
        if total is not None and have < total:
            raise ConnectionError(f"broke off at {have} of {total} bytes")
        return redirects.sha256


class LinkedHash(urllib.request.HTTPRedirectHandler):
    """Follow redirects, and keep the sha256 that the hub states when it hands on to its store."""

    sha256 = ""

    def redirect_request(self, req, fp, code, msg, headers, newurl):  # noqa: ANN001, ANN201
        stated = headers.get("X-Linked-Etag", "").strip('"')
        self.sha256 = stated if re.fullmatch(r"[0-9a-f]{64}", stated) else self.sha256
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def damage(path: Path, sha256: str) -> str:
    """What is wrong with a file, or nothing."""
    if ".bin" in path.suffixes:
        try:
            read_shard(path)
        except ShardError as e:
            return str(e)
    if sha256 and (actual := file_sha256(path)) != sha256:
        return f"sha256 is {actual}, {sha256} expected"
    return ""


@dataclass(frozen=True)
class Export:
    """What the manifest says about one variant, checked before anything of it is used."""

    dataset: str
    train_shards: int
    val_shards: int
    val_tokens: int | None
    shard_tokens: int
    tokenizer_files: tuple[str, ...]
    sha256: Mapping[str, str]  # by file name, where the manifest has it

    @classmethod
    def of(cls, path: Path, variant: str) -> Export:
        dataset = f"fineweb10B_{variant}"
        try:
            manifest = json.loads(path.read_bytes())
            entry = named(manifest["datasets"], dataset)
            tokenizer = named(manifest["tokenizers"], entry["tokenizer_name"])
            stats = entry["stats"]
            files = tuple(
                tokenizer_file(tokenizer[key])
                for key in ("model_path", "vocab_path", "path")
                if tokenizer.get(key)
            )
            hashes = {str(s["file"]): str(s["sha256"]) for s in entry.get("shards", ())}
            export = cls(
                dataset,
                number(stats["files_train"], 0, SHARDS),
                number(stats["files_val"], 1, SHARDS),
                stats.get("tokens_val"),
                number(manifest.get("shard_size", 100_000_000), 1, SHARD_BYTES // 2),
                files,
                hashes,
            )
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as e:
            raise UserError(
                f"{path}: not a manifest that can be used ({e!r}); check --base-url "
                f"and --variant {variant}"
            ) from None
        if not files:
            raise UserError(f"{path}: names no tokenizer file for {dataset}; check --base-url")
        return export

    def files(self, train_shards: int) -> list[str]:
        return [
            f"fineweb_{split}_{i:06d}.bin"
            for split, n in (("val", self.val_shards), ("train", train_shards))
            for i in range(n)
        ]


def named(entries: list[dict], name: str) -> dict:
    for entry in entries:
        if entry["name"] == name:
            return entry
    raise ValueError(f"{name} is not among " + ", ".join(str(e["name"]) for e in entries)[:200])


def number(value: Any, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{value!r} is not a number from {low} to {high}")
    return value


def tokenizer_file(path: Any) -> str:
    if not re.fullmatch(r"tokenizers/[A-Za-z0-9][A-Za-z0-9_.-]{0,120}\.(model|vocab|json)", path):
        raise ValueError(f"refused the tokenizer path {path!r}")
    return path


def download(source: Source, variant: str, train_shards: int | None, out: Path) -> int:
    """Everything of the variant that is not there yet; returns how many files were fetched."""
    with progress(0, "manifest", "B") as bar:
        source.get("manifest.json", out / "manifest.json", SMALL_BYTES, bar)
    export = Export.of(out / "manifest.json", variant)
    n = min(80, export.train_shards) if train_shards is None else train_shards
    if n > export.train_shards:
        raise UserError(
            f"--train-shards {n}: {variant} has {export.train_shards} at "
            f"{source.base}; ask for no more"
        )
    wanted = [(name, SMALL_BYTES, "") for name in export.tokenizer_files]
    wanted += [
        (f"datasets/{export.dataset}/{name}", SHARD_BYTES, export.sha256.get(name, ""))
        for name in export.files(n)
    ]
    missing = [
        (name, most, sha256)
        for name, most, sha256 in wanted
        if not (out / name).is_file() or damage(out / name, sha256)
    ]
    size = sum(
        SHARD_HEADER_BYTES + 2 * export.shard_tokens
        for _, most, _ in missing
        if most == SHARD_BYTES and export.shard_tokens
    )
    if (free := shutil.disk_usage(out).free) < size:
        raise UserError(
            f"--out {out}: up to {size} bytes to fetch, {free} free; lower "
            "--train-shards or choose another --out"
        )
    with progress(size, export.dataset, "B") as bar:
        for name, most, sha256 in missing:
            source.get(name, out / name, most, bar, sha256)
    shards = [out / "datasets" / export.dataset / f for f in export.files(0)]
    tokens = sum(len(read_shard(path)) for path in shards)
    if export.val_tokens not in (None, tokens):
        raise UserError(
            f"{shards[0].parent}: validation has {tokens} tokens, the manifest says "
            f"{export.val_tokens}; its score would not compare, check --base-url"
        )
    print(
        f"{shards[0].parent}: train_shards:{n} val_shards:{len(shards)} val_tokens:{tokens} "
        f"fetched:{len(missing)} already_there:{len(wanted) - len(missing)}",
        flush=True,
    )
    return len(missing)


def base_url(env: Mapping[str, str]) -> str:
    repo = env.get("MATCHED_FINEWEB_REPO_ID", "willdepueoai/parameter-golf")
    revision = env.get("MATCHED_FINEWEB_REVISION", "main")
    prefix = env.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "datasets").strip("/")
    return f"https://huggingface.co/datasets/{repo}/resolve/{revision}/{prefix}".rstrip("/")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Fetch the challenge's published FineWeb shards.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--variant", default="sp1024", help="sp1024, sp8192, ... (default sp1024)")
    parser.add_argument(
        "--train-shards",
        type=int,
        metavar="N",
        help="the first N of 100 M tokens each (default 80, or all if fewer)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).resolve().parent,
        metavar="DIR",
        help="default: the folder data/",
    )
    parser.add_argument("--base-url", metavar="URL", help="the folder that holds manifest.json")
    parser.add_argument(
        "--retry-wait",
        type=float,
        default=1.0,
        metavar="S",
        help="seconds before the first retry, doubled each time (default 1)",
    )
    args = parser.parse_args(arguments)
    if not re.fullmatch(r"[a-z][a-z0-9_]{1,80}", args.variant):
        raise UserError(f"--variant {args.variant}: a name such as sp1024")
    if args.train_shards is not None and args.train_shards < 0:
        raise UserError(f"--train-shards {args.train_shards}: must be 0 or more")
    base = (args.base_url or base_url(os.environ)).rstrip("/")
    if not re.match(r"https?://[^/]", base):
        raise UserError(f"--base-url {base}: must start with https:// or http://")
    download(Source(base, max(args.retry_wait, 0)), args.variant, args.train_shards, args.out)
    return 0


if __name__ == "__main__":
    run(main)
