"""Test data/download_fineweb.py against a local server that fails as real ones do."""

import hashlib
import http.server
import json
import threading
from pathlib import Path

import numpy as np
import pytest

from data import download_fineweb
from fairway.command_line import UsageError
from train_gpt import UserError, read_shard

DATASET = "datasets/fineweb10B_sp1024"
VAL, TRAIN = f"{DATASET}/fineweb_val_000000.bin", f"{DATASET}/fineweb_train_00000{{}}.bin"
TOKENIZER = "tokenizers/fineweb_1024_bpe.model"


def shard(seed: int, n: int = 60_000) -> bytes:
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, n
    tokens = np.random.default_rng(seed).integers(2, 1024, n).astype("<u2")
    return header.tobytes() + tokens.tobytes()


class LocalHost(http.server.BaseHTTPRequestHandler):
    """Serve `files`, with ranges; `failures` lists, by path, how the next requests fail."""

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path, server = self.path.removeprefix("/hub/"), self.server
        server.requests.append((path, self.headers.get("Range")))
        failures = server.failures.get(path, [])
        failure = failures.pop(0) if failures else None
        if isinstance(failure, int):
            return self.send_error(failure)
        if failure and failure[0] == "redirect":
            self.send_response(302)
            self.send_header("X-Linked-Etag", f'"{failure[1]}"')
            self.send_header("Location", self.path)
            self.end_headers()
            return None
        if path not in server.files:
            return self.send_error(404)
        body, start = server.files[path], 0
        requested = self.headers.get("Range")
        if requested and server.ranges:
            start = int(requested.removeprefix("bytes=").rstrip("-"))
            if start >= len(body):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(body)}")
                self.end_headers()
                return None
        self.send_response(206 if requested and server.ranges else 200)
        if requested and server.ranges:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        claimed = failure[1] if failure and failure[0] == "claim" else len(body) - start
        self.send_header("Content-Length", str(claimed))
        self.end_headers()
        end = failure[1] if failure and failure[0] == "drop" else len(body)
        self.wfile.write(body[start : max(start, end)])
        return None


@pytest.fixture
def server():
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), LocalHost)
    served.files, served.failures, served.requests = published(), {}, []
    served.ranges = True
    thread = threading.Thread(target=served.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield served
    served.shutdown()
    served.server_close()


def manifest(**changes: object) -> bytes:
    stats = {"files_train": 3, "files_val": 1, "tokens_val": 60_000} | changes.pop("stats", {})
    entry = {"name": "fineweb10B_sp1024", "tokenizer_name": "sp_bpe_1024", "stats": stats}
    entry |= changes.pop("entry", {})
    tokenizer = {"name": "sp_bpe_1024", "model_path": TOKENIZER} | changes.pop("tokenizer", {})
    return json.dumps(
        {"datasets": [entry], "tokenizers": [tokenizer], "shard_size": 60_000} | changes
    ).encode()


def published() -> dict[str, bytes]:
    files = {TRAIN.format(i): shard(i) for i in range(3)}
    return files | {VAL: shard(9), TOKENIZER: b"a model", "manifest.json": manifest()}


def fetch(server: http.server.HTTPServer, out: Path, n: int = 2) -> None:
    download_fineweb.main(
        [
            "--variant",
            "sp1024",
            "--train-shards",
            str(n),
            "--out",
            str(out),
            "--retry-wait",
            "0",
            "--base-url",
            f"http://127.0.0.1:{server.server_port}/hub",
        ]
    )


def bytes_below(out: Path) -> dict[str, bytes]:
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def test_downloads_the_requested_files_and_none_twice(server, tmp_path, capsys):
    fetch(server, tmp_path)
    assert bytes_below(tmp_path) == {
        name: body for name, body in server.files.items() if name != TRAIN.format(2)
    }
    server.requests.clear()
    fetch(server, tmp_path)
    assert server.requests == [("manifest.json", None)]
    assert "val_tokens:60000 fetched:0 already_there:4" in capsys.readouterr().out


def test_continues_after_broken_connections_and_server_errors(server, tmp_path):
    size = len(server.files[VAL])
    server.failures = {VAL: [("drop", 1000), 500, ("drop", 50_000), 503, 429], TOKENIZER: [500]}
    fetch(server, tmp_path)
    assert (tmp_path / VAL).read_bytes() == server.files[VAL]
    assert [r for p, r in server.requests if p == VAL] == [
        None,
        "bytes=1000-",
        "bytes=1000-",
        *["bytes=50000-"] * 3,
    ] and size > 50_000


def test_a_later_run_continues_the_part_file(server, tmp_path):
    part = tmp_path / (VAL + ".part")
    part.parent.mkdir(parents=True)
    part.write_bytes(server.files[VAL][:7777])
    fetch(server, tmp_path)
    assert (VAL, "bytes=7777-") in server.requests
    assert (tmp_path / VAL).read_bytes() == server.files[VAL] and not part.exists()


@pytest.mark.parametrize("content", [b"x" * 500, b"x" * 10**6, None])
def test_a_wrong_or_complete_part_file_does_no_harm(server, tmp_path, content):
    part = tmp_path / (VAL + ".part")
    part.parent.mkdir(parents=True)
    part.write_bytes(server.files[VAL] if content is None else content)
    fetch(server, tmp_path)
    assert (tmp_path / VAL).read_bytes() == server.files[VAL]


def test_a_host_without_ranges_sends_the_file_again(server, tmp_path):
    server.ranges, server.failures = False, {VAL: [("drop", 5000)]}
    fetch(server, tmp_path)
    assert (tmp_path / VAL).read_bytes() == server.files[VAL]


def refused(server: http.server.HTTPServer, out: Path, match: str, n: int = 2) -> None:
    before = {p for p in bytes_below(out.parent) if out.name not in p}
    with pytest.raises(UserError, match=match) as error:
        fetch(server, out, n)
    assert "\n" not in str(error.value)
    assert {p for p in bytes_below(out.parent) if out.name not in p} == before


def test_missing_files_and_dead_hosts_are_one_line(server, tmp_path):
    del server.files[TRAIN.format(1)]
    refused(server, tmp_path / "a", "HTTP 404")
    server.failures = {VAL: [500] * 99}
    refused(server, tmp_path / "b", "HTTP 500, 6 times in a row.*run again to continue from 0")
    assert not (tmp_path / "b" / VAL).exists()
    refused(server, tmp_path / "c", "--train-shards 4: sp1024 has 3", n=4)


def test_truncated_and_wrong_shards_are_deleted(server, tmp_path):
    complete = server.files[VAL]
    for body, match in (
        (complete[:-2], "header says 60000"),
        (complete + b"12", "header says 60000"),
        (b"<html>" * 300, "not a token shard"),
    ):
        server.files[VAL] = body
        refused(server, tmp_path / "a", match)
        assert not list((tmp_path / "a").rglob("*val*"))


def test_the_sha256_of_the_manifest_or_else_of_the_host_is_checked(server, tmp_path):
    right, wrong = hashlib.sha256(server.files[VAL]).hexdigest(), "0" * 64
    name = Path(VAL).name
    server.files["manifest.json"] = manifest(entry={"shards": [{"file": name, "sha256": wrong}]})
    refused(server, tmp_path / "a", f"sha256 is {right}, {wrong} expected")
    server.files["manifest.json"] = manifest(entry={"shards": [{"file": name, "sha256": right}]})
    fetch(server, tmp_path / "b")
    server.files["manifest.json"] = manifest()
    server.failures = {VAL: [("redirect", wrong)]}
    refused(server, tmp_path / "c", f"sha256 is {right}, {wrong} expected")
    server.failures = {VAL: [("redirect", right)]}
    fetch(server, tmp_path / "d")


def test_a_shard_damaged_on_disk_is_downloaded_again(server, tmp_path):
    fetch(server, tmp_path)
    (tmp_path / VAL).write_bytes(server.files[VAL][:5000])
    fetch(server, tmp_path)
    assert len(read_shard(tmp_path / VAL)) == 60_000


def test_fewer_validation_tokens_than_the_manifest_states_are_refused(server, tmp_path):
    server.files["manifest.json"] = manifest(stats={"tokens_val": 60_001})
    refused(server, tmp_path / "a", "60000 tokens, the manifest says 60001")


@pytest.mark.parametrize(
    "hostile",
    [
        manifest(tokenizer={"model_path": "../../outside.model"}),
        manifest(tokenizer={"model_path": "tokenizers/../../outside.model"}),
        manifest(tokenizer={"model_path": "/tmp/outside.model"}),
        manifest(tokenizer={"model_path": "tokenizers\\..\\outside.model"}),
        manifest(tokenizer={"model_path": ["tokenizers/a.model"]}),
        manifest(tokenizer={"model_path": ""}),
        manifest(stats={"files_val": 10**12}),
        manifest(stats={"files_val": -1}),
        manifest(stats={"files_train": "3"}),
        manifest(entry={"name": "fineweb10B_sp512"}),
        manifest(entry={"stats": None}),
        manifest(shard_size=10**15),
        b"[]",
        b"{",
        b"null",
        b'{"datasets": 3}',
        b"[" * 100_000,
    ],
)
def test_hostile_manifests_are_refused(server, tmp_path, hostile):
    server.files["manifest.json"] = hostile
    refused(server, tmp_path / "a", "manifest")
    assert set(bytes_below(tmp_path)) == {"a/manifest.json"}


def test_giant_files_are_refused_before_they_are_read(server, tmp_path):
    server.failures = {VAL: [("claim", 1 << 40)]}
    refused(server, tmp_path / "a", "1099511627776 bytes, at most")
    server.failures = {"manifest.json": [("claim", 1 << 30)]}
    refused(server, tmp_path / "b", "1073741824 bytes, at most")


def test_the_challenge_variables_choose_the_address():
    assert download_fineweb.base_url({}) == (
        "https://huggingface.co/datasets/willdepueoai/parameter-golf/resolve/main/datasets"
    )
    assert download_fineweb.base_url(
        {"MATCHED_FINEWEB_REPO_ID": "a/b", "MATCHED_FINEWEB_REMOTE_ROOT_PREFIX": ""}
    ) == ("https://huggingface.co/datasets/a/b/resolve/main")


@pytest.mark.parametrize(
    "arguments, match",
    [
        (["--variant", "../x"], "--variant"),
        (["--train-shards", "-1"], "--train-shards"),
        (["--base-url", "file:///etc"], "--base-url"),
    ],
)
def test_options_out_of_range_are_refused(arguments, match):
    with pytest.raises(UsageError, match=match):
        download_fineweb.main(arguments)
