"""Download the challenge's published FineWeb shards and their tokenizer.

The layout is the challenge's own: OUT/manifest.json, OUT/datasets/fineweb10B_sp1024/*.bin and
OUT/tokenizers/*. An interrupted download continues where it stopped, in the same run or a later
one. A file gets its final name only when it is complete: its length matches its header, and its
sha256 matches the manifest or, if the manifest has none, the one that the host states. No entry
of the manifest can write outside OUT, or make a file larger than SHARD_BYTES.

Without --base-url, the challenge's environment variables choose the host's folder:
MATCHED_FINEWEB_REPO_ID, MATCHED_FINEWEB_REMOTE_ROOT_PREFIX and MATCHED_FINEWEB_REVISION.
"""

from __future__ import annotations

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

# When this file runs as a script, Python searches data/ for modules, not the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.progress import progress_bar
from fairway.command_line import Parser, UsageError, run_reporting
from fairway.shards import sidecar_path
from train_gpt import SHARD_HEADER_BYTES, UserError, file_sha256, read_shard

SHARD_BYTES = 1 << 30  # a larger shard is refused; the published ones have 200,001,024
SMALL_BYTES = 64 << 20  # a larger manifest or tokenizer is refused
SHARDS = 10_000  # a manifest that lists more is refused
TRIES = 6  # failures in a row, without one new byte, before giving up
EXAMPLES = """examples:
  python data/download_fineweb.py --variant sp1024                      80 shards, 16 GB
  python data/download_fineweb.py --variant sp1024 --train-shards 1     200 MB and validation
  MATCHED_FINEWEB_REPO_ID=owner/name python data/download_fineweb.py --variant sp8192"""


@dataclass
class Host:
    """The address that files are downloaded from, and the wait between tries."""

    base: str  # URL of the folder that holds manifest.json
    retry_wait: float  # seconds after the first failure, doubled each time up to a minute

    def get(self, remote: str, target: Path, limit: int, bar: tqdm, sha256: str = "") -> None:
        """Download `remote`, at most `limit` bytes, into `target`, and check it.

        A part of an earlier download is continued. If the result is damaged, the download starts
        again from zero, once.
        """
        part = target.with_name(target.name + ".part")
        part.parent.mkdir(parents=True, exist_ok=True)
        for last in (not part.exists(), True):
            stated = self._complete(remote, part, limit, bar)
            problem = find_damage(part, sha256 or stated)
            if not problem:
                with part.open("rb+") as f:
                    os.fsync(f.fileno())
                part.replace(target)
                return
            bar.update(-part.stat().st_size)
            part.unlink()
            if last:
                break
        raise UserError(
            f"{self.base}/{remote}: {problem}; the file was deleted, report it to its publisher "
            "or try another --base-url"
        )

    def _complete(self, remote: str, part: Path, limit: int, bar: tqdm) -> str:
        """Append until the file is complete; a broken connection is tried again.

        Return the sha256 that the host states, or "".
        """
        failures, wait, counted = 0, self.retry_wait, 0
        while True:
            have = part.stat().st_size if part.exists() else 0
            bar.update(have - counted)
            try:
                return self._append(remote, part, have, limit)
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
                    f"again to continue from {counted} bytes"
                )
            time.sleep(wait)

    def _append(self, remote: str, part: Path, have: int, limit: int) -> str:
        """Append to `part`, which has `have` bytes, what one connection delivers.

        Return the sha256 that the host states, or "".
        """
        redirects = LinkedHash()
        headers = {"User-Agent": "fairway", "Accept-Encoding": "identity"}
        headers |= {"Range": f"bytes={have}-"} if have else {}
        request = urllib.request.Request(f"{self.base}/{remote}", headers=headers)
        try:
            response = urllib.request.build_opener(redirects).open(request, timeout=60)
        except urllib.error.HTTPError as e:
            if e.code == 416 and e.headers.get("Content-Range", "") == f"bytes */{have}":
                return redirects.sha256  # the part was already complete
            if e.code == 416:
                part.unlink()
                raise ConnectionError("the local file is longer than the remote one") from None
            raise
        with response, part.open("ab") as f:
            continues = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
            if not (response.status == 206 and continues):
                f.truncate(have := 0)  # this host sends the file from its start
            length = response.headers.get("Content-Length")
            total = have + int(length) if length and length.isdigit() else None
            if (total or 0) > limit:
                raise UserError(
                    f"{self.base}/{remote}: {total} bytes, at most {limit} are "
                    "accepted; check --base-url"
                )
            while block := response.read(1 << 20):
                have += len(block)
                if have > limit:
                    raise UserError(
                        f"{self.base}/{remote}: more than {limit} bytes; check --base-url"
                    )
                f.write(block)
        if total is not None and have < total:
            raise ConnectionError(f"connection closed after {have} of {total} bytes")
        return redirects.sha256


class LinkedHash(urllib.request.HTTPRedirectHandler):
    """Follow redirects, and remember the sha256 in the first one's X-Linked-Etag header.

    Hugging Face's server states it there when it redirects to its file store.
    """

    sha256 = ""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        """Read the header, then redirect as the base class does."""
        stated = headers.get("X-Linked-Etag", "").strip('"')
        self.sha256 = stated if re.fullmatch(r"[0-9a-f]{64}", stated) else self.sha256
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def find_damage(path: Path, sha256: str) -> str:
    """Return what is wrong with a downloaded file, or "". A `sha256` of "" is not compared."""
    if ".bin" in path.suffixes:
        try:
            read_shard(path)
        except UserError as e:
            return str(e)
    if sha256 and (actual := file_sha256(path)) != sha256:
        return f"sha256 is {actual}, {sha256} expected"
    return ""


@dataclass(frozen=True)
class Variant:
    """The entry of one dataset in the manifest, with every value checked."""

    dataset: str
    train_shards: int
    val_shards: int
    val_tokens: int | None
    shard_tokens: int
    tokenizer_files: tuple[str, ...]
    sha256: Mapping[str, str]  # by file name; a file that the manifest does not hash is missing

    @classmethod
    def from_manifest(cls, path: Path, name: str) -> Variant:
        """Read the entry of fineweb10B_`name`; anything unexpected in it is a `UserError`."""
        dataset = f"fineweb10B_{name}"
        try:
            manifest = json.loads(path.read_bytes())
            entry = entry_named(manifest["datasets"], dataset)
            tokenizer = entry_named(manifest["tokenizers"], entry["tokenizer_name"])
            stats = entry["stats"]
            files = tuple(
                checked_tokenizer_path(tokenizer[key])
                for key in ("model_path", "vocab_path", "path")
                if tokenizer.get(key)
            )
            hashes = {str(s["file"]): str(s["sha256"]) for s in entry.get("shards", ())}
            variant = cls(
                dataset,
                checked_number(stats["files_train"], 0, SHARDS),
                checked_number(stats["files_val"], 1, SHARDS),
                stats.get("tokens_val"),
                checked_number(manifest.get("shard_size", 100_000_000), 1, SHARD_BYTES // 2),
                files,
                hashes,
            )
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as e:
            raise UserError(
                f"{path}: not a usable manifest ({e!r}); check --base-url and --variant {name}"
            ) from None
        if not files:
            raise UserError(f"{path}: lists no tokenizer file for {dataset}; check --base-url")
        return variant

    def files(self, train_shards: int) -> list[str]:
        """Return the names of all validation shards and of the first `train_shards` others."""
        return [
            f"fineweb_{split}_{i:06d}.bin"
            for split, n in (("val", self.val_shards), ("train", train_shards))
            for i in range(n)
        ]

    def sidecars(self, shards: list[str]) -> list[str]:
        """Return the byte sidecars of these shards: those that the manifest lists, and those of
        validation in a dataset of CaseOps, whose scores need them.
        """
        names = [sidecar_path(Path(file)).name for file in shards]
        case_ops = "caseops" in self.dataset
        return [n for n in names if n in self.sha256 or (case_ops and "_val_" in n)]


def entry_named(entries: list[dict], name: str) -> dict:
    """Return the entry whose "name" is `name`, or raise `ValueError` with the names there are."""
    for entry in entries:
        if entry["name"] == name:
            return entry
    raise ValueError(f"{name} is not among " + ", ".join(str(e["name"]) for e in entries)[:200])


def checked_number(value: Any, low: int, high: int) -> int:
    """Return `value`, or raise `ValueError` unless it is an integer from `low` to `high`."""
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{value!r} is not a number from {low} to {high}")
    return value


def checked_tokenizer_path(path: Any) -> str:
    """Return `path`, or raise `ValueError` unless it is a plain file name below tokenizers/."""
    if not re.fullmatch(r"tokenizers/[A-Za-z0-9][A-Za-z0-9_.-]{0,120}\.(model|vocab|json)", path):
        raise ValueError(f"refused the tokenizer path {path!r}")
    return path


def download(host: Host, name: str, train_shards: int | None, out: Path) -> int:
    """Download the files of variant `name` that `out` lacks; return their number.

    `train_shards` None asks for the challenge's usual 80, or all if the variant has fewer.
    """
    with progress_bar(0, "manifest", "B") as bar:
        host.get("manifest.json", out / "manifest.json", SMALL_BYTES, bar)
    variant = Variant.from_manifest(out / "manifest.json", name)
    n = min(80, variant.train_shards) if train_shards is None else train_shards
    if n > variant.train_shards:
        raise UserError(
            f"--train-shards {n}: {name} has {variant.train_shards} at {host.base}; ask for no more"
        )
    wanted = [(file, SMALL_BYTES, "") for file in variant.tokenizer_files]
    shards = variant.files(n)
    wanted += [
        (f"datasets/{variant.dataset}/{file}", SHARD_BYTES, variant.sha256.get(file, ""))
        for file in [*shards, *variant.sidecars(shards)]
    ]
    missing = [
        (file, limit, sha256)
        for file, limit, sha256 in wanted
        if not (out / file).is_file() or find_damage(out / file, sha256)
    ]
    size = sum(
        SHARD_HEADER_BYTES + 2 * variant.shard_tokens
        for _, limit, _ in missing
        if limit == SHARD_BYTES and variant.shard_tokens
    )
    if (free := shutil.disk_usage(out).free) < size:
        raise UserError(
            f"--out {out}: up to {size} bytes to download, {free} free; lower "
            "--train-shards or choose another --out"
        )
    with progress_bar(size, variant.dataset, "B") as bar:
        for file, limit, sha256 in missing:
            host.get(file, out / file, limit, bar, sha256)
    shards = [out / "datasets" / variant.dataset / file for file in variant.files(0)]
    tokens = sum(len(read_shard(path)) for path in shards)
    if variant.val_tokens not in (None, tokens):
        raise UserError(
            f"{shards[0].parent}: validation has {tokens} tokens, the manifest says "
            f"{variant.val_tokens}; scores would not be comparable, check --base-url"
        )
    print(
        f"{shards[0].parent}: train_shards:{n} val_shards:{len(shards)} val_tokens:{tokens} "
        f"fetched:{len(missing)} already_there:{len(wanted) - len(missing)}",
        flush=True,
    )
    return len(missing)


def base_url(env: Mapping[str, str]) -> str:
    """Return the URL of the folder that the challenge's environment variables choose."""
    repo = env.get("MATCHED_FINEWEB_REPO_ID", "willdepueoai/parameter-golf")
    revision = env.get("MATCHED_FINEWEB_REVISION", "main")
    prefix = env.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "datasets").strip("/")
    return f"https://huggingface.co/datasets/{repo}/resolve/{revision}/{prefix}".rstrip("/")


def main(arguments: list[str] | None = None) -> int:
    """Download what the command line asks for; return the exit code."""
    parser = Parser(
        prog="data/download_fineweb.py",
        description="Download the challenge's published FineWeb shards.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--variant", default="sp1024", help="sp1024, sp8192, ... (default sp1024)")
    parser.add_argument(
        "--train-shards",
        type=int,
        metavar="N",
        help="download the first N, of 100 M tokens each (default 80, or all if fewer)",
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
        help="seconds before the first new try, doubled each time (default 1)",
    )
    args = parser.parse_args(arguments)
    if not re.fullmatch(r"[a-z][a-z0-9_]{1,80}", args.variant):
        raise UsageError(f"--variant {args.variant}: must be a name such as sp1024")
    if args.train_shards is not None and args.train_shards < 0:
        raise UsageError(f"--train-shards {args.train_shards}: must be 0 or more")
    base = (args.base_url or base_url(os.environ)).rstrip("/")
    if not re.match(r"https?://[^/]", base):
        raise UsageError(f"--base-url {base}: must start with https:// or http://")
    download(Host(base, max(args.retry_wait, 0)), args.variant, args.train_shards, args.out)
    return 0


if __name__ == "__main__":
    message = "interrupted; the same command continues the download"
    sys.exit(run_reporting("download_fineweb", main, interrupted=message))
