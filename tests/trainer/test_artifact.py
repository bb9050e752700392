"""A reader gets the weights that training rounded, to the bit; all other files are refused."""

import ast
import copy
import hashlib
import inspect
import json
import os
import pickle
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import brotli
import numpy as np
import pytest
import torch
from artifacts import TINY, K, encoded, trained, write

import train_gpt
from fairway import artifact_reader
from fairway.artifact_reader import MOST_HEADER_BYTES, MOST_WEIGHTS, ArtifactError, read_artifact
from train_gpt import (
    ARTIFACT_MAGIC,
    CODECS,
    GPT,
    HEAD,
    LEFT,
    RIGHT,
    Config,
    UserError,
    build_model,
    decode_artifact,
    decode_planes,
    encode_artifact,
    encode_planes,
    gptq_factor,
    quantised,
    read_shard,
    rounded_parameters,
    tensor_bits,
    use_weights,
)

PRELUDE_BYTES = 48  # magic, version, header's length, header's SHA-256
CONFIGS = {
    "8 bits": Config(**TINY | dict(attn_bits=8, mlp_bits=8)),
    "6 bits": Config(**TINY),
    "5 bits": Config(**TINY | dict(attn_bits=5, mlp_bits=5, embed_bits=5)),
    "4 bits": Config(**TINY | dict(attn_bits=4, mlp_bits=4, embed_bits=4)),
    "mixed": Config(**TINY | dict(attn_bits=6, mlp_bits=5, embed_bits=7)),
    "baseline features": Config(
        **TINY | dict(bigram_vocab_size=0, smear_gate=False, ortho_init=False, attn_bits=8)
    ),
    "one layer": Config(**TINY | dict(num_layers=1)),  # no skips: a tensor of no rows
    "frontier features": Config(
        **TINY
        | dict(
            num_layers=5,
            leaky_slope=0.5,
            xsa_last_n=5,
            ln_scale=True,
            rope_dims=8,
            attn_gate=True,
            skip_gates=True,
            qk_gain_init=5.0,
            parallel_start_layer=3,
            loop_start=1,
            loop_end=2,
            num_loops=2,
        )
    ),
}


# ---- Exact ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("codec", CODECS)
def test_the_artifact_is_the_rounded_forward_pass_exactly(tmp_path, name, codec):
    cfg = CONFIGS[name]
    for looping in {False, cfg.num_loops > 0}:
        model = trained(cfg, looping)
        path = write(tmp_path / "a.ptz", encoded(model, codec))
        read = build_model(read_artifact(path))
        tokens = torch.randint(
            0, cfg.vocab_size, (3, 32), generator=torch.Generator().manual_seed(4)
        )
        with torch.no_grad():
            plain = model.logits(tokens)
            params = list(model.parameters())
            own = [p.data for p in params]
            use_weights(params, rounded_parameters(model, K))
            rounded, loss = model.logits(tokens), model(tokens, tokens)
            use_weights(params, own)
            assert torch.equal(read.logits(tokens), rounded) and torch.equal(
                read(tokens, tokens), loss
            )
            assert not torch.equal(plain, rounded)  # rounding did something
            assert torch.equal(
                model.logits(tokens), plain
            )  # and the model has its own weights again
        for (n, p), own in zip(read.named_parameters(), rounded_parameters(model, K), strict=True):
            assert torch.equal(p, own), n


def test_gptq_codes_come_back_too(tmp_path):
    model = trained(CONFIGS["6 bits"])
    state, x = (
        dict(model.named_parameters()),
        torch.randn(200, 32, generator=torch.Generator().manual_seed(5)),
    )
    name = "blocks.1.attn.q.weight"
    x *= torch.linspace(0.1, 3, 32)
    factors = {name: gptq_factor(x.T @ x)}
    rounded = quantised(state, K, model.cfg, factors)
    path = write(tmp_path / "a.ptz", encode_artifact(rounded, K, model.cfg, False, "ans", b""))
    weights = read_artifact(path).weights
    wanted = rounded_parameters(model, K, None, factors)
    assert all(torch.equal(weights[n], w) for n, w in zip(state, wanted, strict=True))


def repaired_blob(rank: int = 3) -> bytes:
    """Return an artifact whose embedding has a repair."""
    model = trained(replace(CONFIGS["4 bits"], lqer_rank=rank))
    state = dict(model.named_parameters())
    x = torch.randn(200, 32, generator=torch.Generator().manual_seed(5)) + 1
    rounded = quantised(state, K, model.cfg, {HEAD: gptq_factor(x.T @ x)})
    return encode_artifact(rounded, K, model.cfg, False, "ans", b"")


def test_a_repair_comes_back_and_errs_less_in_the_logits(tmp_path):
    model = trained(CONFIGS["4 bits"])
    weight, errors = model.tok_emb.weight.detach(), []
    x = torch.randn(200, 32, generator=torch.Generator().manual_seed(5)) + 1
    for rank in (0, 1, 3, 32):
        cfg = replace(model.cfg, lqer_rank=rank)
        factors = {HEAD: gptq_factor(x.T @ x)}
        rounded = quantised(dict(model.named_parameters()), K, cfg, factors)
        assert (LEFT in rounded) == (RIGHT in rounded) == (rank > 0)
        blob = encode_artifact(rounded, K, cfg, False, "brotli", b"")
        own, read = decode_artifact(blob), read_artifact(write(tmp_path / "a.ptz", blob))
        assert {*read.weights} == {n for n, _ in model.named_parameters()}
        assert torch.equal(read.weights[HEAD], own.weights[HEAD])
        model.cfg = cfg
        kept = zip(
            model.named_parameters(), rounded_parameters(model, K, None, factors), strict=True
        )
        assert all(torch.equal(read.weights[n], w) for (n, _), w in kept)
        errors.append(float(((read.weights[HEAD] - weight) @ x.T).square().mean()))
    assert errors[0] > errors[1] > errors[2] > errors[3] and errors[3] < 0.1 * errors[0]


@pytest.mark.parametrize(
    ("left", "right", "says"),
    [
        ([6, 3, 96], None, "'tok_emb.right' is None"),
        (None, [6, 3, 32], "'tok_emb.left' is None, of no rank"),
        ([6, 0, 96], [6, 0, 32], "of no rank from 1 to 64"),
        ([6, 65, 96], [6, 65, 32], "of no rank from 1 to 64"),
        ([6, True, 96], [6, True, 32], "of no rank"),
        ([6, 3, 96, 1], [6, 3, 32], "of no rank"),
        ([5, 3, 96], [6, 3, 32], "'tok_emb.left' is [5, 3, 96], not [6, 3, 96]"),
        ([6, 3, 96], [6, 2, 32], "'tok_emb.right' is [6, 2, 32], not [6, 3, 32]"),
        ([6, 3, 10**12], [6, 3, 32], "not [6, 3, 96]"),
        ("x", {}, "of no rank"),
    ],
    ids=str,
)
def test_a_repair_of_another_shape_is_refused(tmp_path, left, right, says):
    parts = Parts(repaired_blob())
    tensors = {n: t for n, t in parts.header["tensors"].items() if n not in (LEFT, RIGHT)}
    tensors |= {n: t for n, t in ((LEFT, left), (RIGHT, right)) if t is not None}
    assert says in refused(write(tmp_path / "a.ptz", parts.forged(tensors=tensors)))


def test_finite_factors_of_an_infinite_repair_are_refused(tmp_path):
    model = trained(replace(CONFIGS["4 bits"], lqer_rank=3))
    state, x = dict(model.named_parameters()), torch.randn(200, 32)
    rounded = quantised(state, K, model.cfg, {HEAD: gptq_factor(x.T @ x)})
    for side in (LEFT, RIGHT):
        huge = torch.full_like(rounded[side].steps, 2.0**100)
        rounded[side] = rounded[side]._replace(steps=huge)
    blob = encode_artifact(rounded, K, model.cfg, False, "ans", b"")
    assert "not finite once it is repaired" in refused(write(tmp_path / "a.ptz", blob))


def test_reading_twice_writing_twice(tmp_path):
    for codec in CODECS:
        model = trained(CONFIGS["mixed"])
        blob = encoded(model, codec)
        assert encoded(model, codec) == blob and encoded(trained(CONFIGS["mixed"]), codec) == blob
        first, second = (read_artifact(write(tmp_path / n, blob)) for n in ("a", "b"))
        assert first.header == second.header and first.config == second.config
        assert all(torch.equal(w, second.weights[n]) for n, w in first.weights.items())


def test_config_header_and_tokenizer_survive(tmp_path, corpus):
    model = trained(CONFIGS["frontier features"], looping=True)
    tokenizer = (corpus.folder / "tokenizer.model").read_bytes()
    artifact = read_artifact(write(tmp_path / "a.ptz", encoded(model, tokenizer=tokenizer)))
    assert artifact.tokenizer == tokenizer
    assert artifact.header["tokenizer_sha256"] == hashlib.sha256(tokenizer).hexdigest()
    assert artifact.header["looping"] is True and build_model(artifact).looping is True
    assert artifact.header["k"] == K
    for name in train_gpt.MODEL_FIELDS:
        assert getattr(artifact.config, name) == getattr(model.cfg, name), name
    assert build_model(artifact).state_dict().keys() == model.state_dict().keys()


def test_without_its_tokenizer_it_still_names_it(tmp_path):
    blob = encoded(trained(CONFIGS["6 bits"]), embed_tokenizer=False)
    artifact = read_artifact(write(tmp_path / "a.ptz", blob))
    assert artifact.tokenizer == b"" and artifact.header["tokenizer_bytes"] == 0
    assert artifact.header["tokenizer_sha256"] == hashlib.sha256(b"a tokenizer").hexdigest()


def test_everything_that_the_model_reads_is_in_the_header():
    """A setting that changes the forward pass but is not in the header would be lost."""
    model_part = inspect.getsource(train_gpt).split("# ==== MODEL")[1].split("# ==== OPTIMISERS")[0]
    used = {
        n.attr
        for n in ast.walk(ast.parse(model_part[model_part.index("\n") :]))
        if isinstance(n, ast.Attribute)
        and (
            isinstance(n.value, ast.Name)
            and n.value.id == "cfg"
            or isinstance(n.value, ast.Attribute)
            and n.value.attr == "cfg"
        )
    }
    assert "model_dim" in used and used - {"seed"} <= set(train_gpt.MODEL_FIELDS)


def test_the_file_of_a_run_is_read_back(trainer_here, corpus, tmp_path):
    done = trainer_here(tmp_path, ITERATIONS=4, MAX_WALLCLOCK_SECONDS=0)
    assert done.returncode == 0, done.stderr
    said = next(e for e in done.events if e["event"] == "artifact")
    path = tmp_path / Path(said["path"]).name
    artifact = read_artifact(path)
    assert (
        said["bytes"] == path.stat().st_size
        and said["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    )
    assert said["bytes"] + said["code_bytes"] <= said["budget_bytes"]
    assert artifact.tokenizer == (corpus.folder / "tokenizer.model").read_bytes()
    assert artifact.config.vocab_size == corpus.vocab_size


# ---- Layout --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> GPT:
    return trained(CONFIGS["mixed"])


@pytest.fixture(scope="module")
def blob(model) -> bytes:
    return encoded(model)


class Parts:
    """An artifact taken apart, to be put together again with right checksums and wrong contents."""

    def __init__(self, blob: bytes):
        length = int.from_bytes(blob[12:16], "little")
        self.header = json.loads(blob[PRELUDE_BYTES : PRELUDE_BYTES + length])
        start = PRELUDE_BYTES + length
        self.payload = blob[start : start + self.header["payload_bytes"]]
        self.inside = blob[start + self.header["payload_bytes"] :]

    def forged(self, text: bytes | None = None, **changes) -> bytes:
        """Return an artifact with right sizes and checksums; None in `changes` drops a key."""
        sizes = dict(
            payload_bytes=len(self.payload),
            tokenizer_bytes=len(self.inside),
            payload_sha256=hashlib.sha256(self.payload + self.inside).hexdigest(),
        )
        header = {n: v for n, v in (self.header | sizes | changes).items() if v is not None}
        text = json.dumps(header).encode() if text is None else text
        start = ARTIFACT_MAGIC + struct.pack("<II", 1, len(text)) + hashlib.sha256(text).digest()
        return start + text + self.payload + self.inside

    def text(self, old: str, new: str) -> bytes:
        """With a piece of the header's JSON replaced, for what `json.dumps` would never write."""
        text = json.dumps(self.header)
        assert text.count(old) == 1, old
        return self.forged(text.replace(old, new).encode())


def test_the_documented_layout(blob):
    """docs/ARTIFACT.md, byte by byte."""
    assert blob[:8] == b"FAIRWAY\0" and blob[8:12] == b"\1\0\0\0"
    length, parts = int.from_bytes(blob[12:16], "little"), Parts(blob)
    text = blob[PRELUDE_BYTES : PRELUDE_BYTES + length]
    assert blob[16:48] == hashlib.sha256(text).digest() and text.startswith(b'{"model":{')
    assert (
        len(blob)
        == PRELUDE_BYTES + length + parts.header["payload_bytes"] + parts.header["tokenizer_bytes"]
    )
    assert brotli.decompress(parts.inside) == b"a tokenizer"


def test_forging_nothing_is_a_good_artifact(blob, tmp_path):
    artifact = read_artifact(write(tmp_path / "a.ptz", Parts(blob).forged()))
    assert artifact.tokenizer == b"a tokenizer"


def test_the_tensor_table_names_every_tensor_once_with_bits_and_shape(blob, model):
    table = Parts(blob).header["tensors"]
    assert table == {n: [tensor_bits(n, model.cfg), *p.shape] for n, p in model.named_parameters()}
    assert {bits for bits, *_ in table.values()} == {5, 6, 7, 16}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("codec", CODECS)
def test_the_trainer_decodes_its_own_file_as_the_reader_does(tmp_path, name, codec):
    blob = encoded(trained(CONFIGS[name]), codec)
    own, read = decode_artifact(blob), read_artifact(write(tmp_path / "a.ptz", blob))
    assert own._replace(weights={}) == read._replace(weights={})
    assert own.weights.keys() == read.weights.keys()
    for n, weight in read.weights.items():
        assert weight.dtype == torch.float32 and torch.equal(own.weights[n], weight), n


def test_the_trainer_refuses_a_file_that_changed_on_the_disk(blob):
    for changed in (blob[:-1], blob + b"x", blob[:-9] + bytes([blob[-9] ^ 1]) + blob[-8:]):
        with pytest.raises(UserError, match="differs from what was written; RESUME=1"):
            decode_artifact(changed)


# ---- Damage --------------------------------------------------------------------------------------


def refused(path: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        read_artifact(path)
    message = str(caught.value)
    assert (
        message.startswith(f"{path}: ")
        and "\n" not in message
        and len(message) < len(str(path)) + 700
    )
    return message


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not a Fairway artifact"),
        (b"FAIRWAY", "not a Fairway artifact"),
        (b"x" * 500, "not a Fairway artifact"),
        (b"FAIRWAY\0" + bytes(39), "not a Fairway artifact"),
        (b"FAIRWAY\0" + bytes(40), "version 0; this reader knows 1"),
        (b"FAIRWAY\0\2\0\0\0" + bytes(99), "version 2; this reader knows 1"),
        (
            b"FAIRWAY\0\1\0\0\0\xff\xff\xff\xff" + bytes(99),
            "no room for a header of 4294967295 bytes",
        ),
        (b"FAIRWAY\0\1\0\0\0\x64\0\0\0" + bytes(99), "no room for a header of 100 bytes"),
        (
            b"FAIRWAY\0\1\0\0\0\2\0\0\0" + bytes(99),
            "the header does not match its checksum: damaged",
        ),
    ],
)
def test_what_is_no_artifact(tmp_path, data, says):
    assert says in refused(write(tmp_path / "bad.ptz", data))


def test_what_cannot_be_opened(tmp_path):
    assert "cannot be read (No such file or directory)" in refused(tmp_path / "none.ptz")
    assert "cannot be read (Is a directory)" in refused(tmp_path)


def test_truncation(blob, tmp_path):
    for n in [*range(0, len(blob), 97), *range(PRELUDE_BYTES + 2), len(blob) - 1]:
        refused(write(tmp_path / "cut.ptz", blob[:n]))
    for more in (b"\0", b"x" * 100, blob):
        assert "bytes follow" in refused(write(tmp_path / "long.ptz", blob + more))


def test_flipped_bits(blob, tmp_path):
    rng, path = np.random.default_rng(6), tmp_path / "flipped.ptz"
    for at in [*range(PRELUDE_BYTES + 300), *rng.integers(0, len(blob), 400)]:
        path.write_bytes(blob[:at] + bytes([blob[at] ^ 1 << rng.integers(8)]) + blob[at + 1 :])
        refused(path)


# ---- Hostile: every checksum is right ------------------------------------------------------------


def model_change(says: str, **changes):
    return says, lambda parts: parts.forged(model=parts.header["model"] | changes)


def tensor_change(says: str, change):
    def forge(parts):
        change(table := parts.header["tensors"])
        return parts.forged(tensors=table)

    return says, forge


def header_change(says: str, **changes):
    return says, lambda parts: parts.forged(**changes)


def payload_change(says: str, change, **header):
    """Forge a payload: `change` gets its planes by tensor name (codes, steps, fp16 bytes)."""

    def forge(parts):
        shapes, names = [], []
        for name, (bits, *shape) in parts.header["tensors"].items():
            names += [name] if bits == 16 else [name, f"{name} steps"]
            shapes += [(2, int(np.prod(shape)))] if bits == 16 else [tuple(shape), (2, shape[0])]
        planes = dict(zip(names, decode_planes("brotli", parts.payload, shapes), strict=True))
        change(planes)
        parts.payload = encode_planes("brotli", list(planes.values()))
        return parts.forged(**header)

    return says, forge


def raw_payload(says: str, payload, inside: bytes | None = None, **header):
    def forge(parts):
        parts.payload = payload(parts) if callable(payload) else payload
        parts.inside = parts.inside if inside is None else inside
        return parts.forged(**header)

    return says, forge


def described(parts, **settings) -> dict:
    """Header fields of a model of other settings, its tensor table complete and consistent."""
    changed = parts.header["model"] | settings
    cfg = Config(**changed, train_batch_tokens=8 * changed["train_seq_len"])
    with torch.device("meta"):
        table = {n: [tensor_bits(n, cfg), *p.shape] for n, p in GPT(cfg).named_parameters()}
    return dict(model=changed, tensors=table)


def put(name: str, value: int, row: int = 0, column: int = 0):
    def change(planes):
        planes[name][row, column] = value

    return change


def put_value(name: str, value: int):
    def change(planes):
        planes[name][:, 0] = value >> 8, value & 255

    return change


Q, EMB = "blocks.0.attn.q.weight", "tok_emb.weight"
PACKED_BOMB = brotli.compress(bytes(2**28), quality=1)  # 256 MiB of zeros
HOSTILE = {
    # The tensor table
    "other shape": tensor_change(
        f"tensor '{Q}' is [6, 33, 32]", lambda t: t.update({Q: [6, 33, 32]})
    ),
    "huge shape": tensor_change(
        "tensor 'tok_emb.weight'", lambda t: t.update({EMB: [7, 10**9, 10**9]})
    ),
    "negative shape": tensor_change(f"tensor '{Q}'", lambda t: t.update({Q: [6, -32, -32]})),
    "other bits": tensor_change(
        f"tensor '{Q}' is [5, 32, 32]", lambda t: t.update({Q: [5, 32, 32]})
    ),
    "matrix as fp16": tensor_change(
        f"tensor '{Q}' is [16, 32, 32]", lambda t: t.update({Q: [16, 32, 32]})
    ),
    "missing tensor": tensor_change(f"tensor '{Q}' is None", lambda t: t.pop(Q)),
    "another tensor": tensor_change(
        "tensor 'extra.weight'", lambda t: t.update({"extra.weight": [6, 2, 2]})
    ),
    "name of a buffer": tensor_change("tensor 'cos'", lambda t: t.update({"cos": [16, 32, 8]})),
    "empty entry": tensor_change(f"tensor '{Q}' is []", lambda t: t.update({Q: []})),
    "no list": tensor_change(f"tensor '{Q}' is 6", lambda t: t.update({Q: 6})),
    "nested entry": tensor_change(f"tensor '{Q}'", lambda t: t.update({Q: [6, [32], [32]]})),
    "no tensors": tensor_change("2 layers, but 0 tensors", lambda t: t.clear()),
    "bits as a float": tensor_change(f"tensor '{Q}'", lambda t: t.update({Q: [6.0, 32, 32]})),
    "shape as floats": tensor_change(f"tensor '{Q}'", lambda t: t.update({Q: [6, 32.0, 32.0]})),
    "long name": tensor_change("tensor '", lambda t: t.update({"x" * 10**5: [6, 2, 2]})),
    "surrogate name": tensor_change("tensor '", lambda t: t.update({"\ud800": [6, 2, 2]})),
    # The model
    "a billion layers": model_change(
        "NUM_LAYERS is 1000000000; it must be from 1 to 256", num_layers=10**9
    ),
    "256 layers": model_change("256 layers, but", num_layers=256),
    "wide": model_change("not [16, 1, 16384]", model_dim=16_384),
    "long context": model_change("TRAIN_SEQ_LEN is 10000000", train_seq_len=10**7),
    "contradiction": model_change(
        "MODEL_DIM is 32; it must be a multiple of NUM_HEADS=3", num_heads=3
    ),
    "vocabulary as text": model_change("VOCAB_SIZE is '96', not int", vocab_size="96"),
    "vocabulary as float": model_change("VOCAB_SIZE is 96.0, not int", vocab_size=96.0),
    "vocabulary as bool": model_change("VOCAB_SIZE is True, not int", vocab_size=True),
    "vocabulary as null": model_change("VOCAB_SIZE is None, not int", vocab_size=None),
    "vocabulary as list": model_change("VOCAB_SIZE is [], not int", vocab_size=[]),
    "context as text": model_change("TRAIN_SEQ_LEN is 'x', not int", train_seq_len="x"),
    "context as list": model_change("TRAIN_SEQ_LEN is [64], not int", train_seq_len=[64]),
    "flag as number": model_change("SMEAR_GATE is 1, not bool", smear_gate=1),
    "negative loops": model_change("NUM_LOOPS is -1", num_loops=-1),
    "many loops": model_change("NUM_LOOPS is 1000", num_loops=1000),
    "1 bit": model_change("ATTN_BITS is 1; it must be from 2 to 8", attn_bits=1),
    "16 bits": model_change("ATTN_BITS is 16; it must be from 2 to 8", attn_bits=16),
    "NaN": model_change("", mlp_mult=float("nan")),
    "infinity": model_change("", rope_base=float("inf")),
    "minus infinity": model_change("", qk_gain_init=float("-inf")),
    "gain beyond floats": model_change("QK_GAIN_INIT", qk_gain_init=10**400),
    "gain beyond fp32": model_change("QK_GAIN_INIT", qk_gain_init=1e308),
    "spread beyond floats": model_change("TIED_EMBED_INIT_STD", tied_embed_init_std=10**400),
    "unknown setting": model_change("there is no model setting '__CLASS__'", __class__="GPT"),
    "training setting": model_change(
        "there is no model setting 'TRAIN_BATCH_TOKENS'", train_batch_tokens=8
    ),
    "missing setting": (
        "tensor 'tok_emb.weight' is",
        lambda p: p.forged(model={n: v for n, v in p.header["model"].items() if n != "vocab_size"}),
    ),
    "retired setting": model_change(
        "LOOP_ADALN is True, not False; use the train_gpt.py that wrote the file", loop_adaln=True
    ),
    "16 G weights": (
        "at most 48000000 are read",
        lambda p: p.forged(
            **described(p, vocab_size=65_536, model_dim=16_384, num_heads=8, mlp_mult=16.0)
        ),
    ),
    "just too many weights": (
        "at most 48000000 are read",
        lambda p: p.forged(**described(p, vocab_size=63_000, model_dim=1024, bigram_vocab_size=0)),
    ),
    "rope tables": (
        "out of range",
        lambda p: p.forged(**described(p, train_seq_len=65_536, model_dim=1024)),
    ),
    # The header
    "other version of types": header_change("the header must hold exactly", looping=1),
    "k as text": header_change("the header must hold exactly", k="5"),
    "k as int": header_change("the header must hold exactly", k=5),
    "k as NaN": header_change("", k=float("nan")),
    "k as infinity": header_change("", k=float("inf")),
    "codec as list": header_change("the header must hold exactly", codec=["ans"]),
    "size as float": header_change("the header must hold exactly", payload_bytes=1e300),
    "size as bool": header_change("the header must hold exactly", payload_bytes=True),
    "another key": header_change("the header must hold exactly", pickle="cos"),
    "missing key": header_change("the header must hold exactly", k=None),
    "unknown codec": header_change("codec 'lzma' is not one of zstd, brotli, ans", codec="lzma"),
    "auto as codec": header_change("codec 'auto' is not one of", codec="auto"),
    "long codec": header_change("codec 'xxx", codec="x" * 10**5),
    "negative sizes": header_change("", payload_bytes=-1, tokenizer_bytes=10**6),
    "sizes beyond the file": header_change("bytes follow", payload_bytes=2**62),
    "size too small": header_change("bytes follow", payload_bytes=5),
    "other checksum": header_change(
        "the payload does not match its checksum", payload_sha256="0" * 64
    ),
    "other tokenizer": header_change("tokenizer", tokenizer_sha256="0" * 64),
    "empty header": ("the header is not JSON", lambda p: p.forged(b"")),
    "no JSON": ("the header is not JSON", lambda p: p.forged(b"{model}")),
    "no UTF-8": ("the header is not JSON", lambda p: p.forged(b'{"model": "\xff"}')),
    "null": ("the header must hold exactly", lambda p: p.forged(b"null")),
    "list": ("the header must hold exactly", lambda p: p.forged(b"[]")),
    "deep": ("the header is not JSON", lambda p: p.forged(b"[" * 10**6)),
    "digits": (
        "the header is not JSON",
        lambda p: p.text('"vocab_size": 96', '"vocab_size": ' + "9" * 5000),
    ),
    "huge header": ("no room for a header of", lambda p: p.forged(b" " * (MOST_HEADER_BYTES + 1))),
    "duplicate setting": (
        "",
        lambda p: p.text('"vocab_size": 96', '"vocab_size": 96, "vocab_size": 96'),
    ),
    "duplicate tensor": ("", lambda p: p.text(f'"{Q}": [', f'"{Q}": [6, 32, 32], "{Q}": [')),
    "k beyond floats": ("", lambda p: p.text('"k": 5.0', '"k": 1e999')),
    "duplicate key": (
        "",
        lambda p: p.text('"codec": "brotli"', '"codec": "ans", "codec": "brotli"'),
    ),
    # The payload
    "code beyond 6 bits": payload_change(f"tensor '{Q}' has codes outside 6 bits", put(Q, 32)),
    "code below 6 bits": payload_change(
        f"tensor '{Q}' has codes outside 6 bits", put(Q, 256 - 32, 31, 31)
    ),
    "least code of a byte": payload_change(
        "tensor 'tok_emb.weight' has codes outside 7 bits", put(EMB, 128)
    ),
    "infinite step": payload_change(f"tensor '{Q}' is not finite", put_value(f"{Q} steps", 0x7F80)),
    "NaN step": payload_change(f"tensor '{Q}' is not finite", put_value(f"{Q} steps", 0x7FC0)),
    "overflowing step": payload_change(
        f"tensor '{Q}' is not finite", put_value(f"{Q} steps", 0x7F7F)
    ),
    "infinite gate": payload_change(
        "tensor 'smear.gate' is not finite", put_value("smear.gate", 0x7C00)
    ),
    "NaN gate": payload_change(
        "tensor 'smear.gate' is not finite", put_value("smear.gate", 0xFE01)
    ),
    "ans of brotli": header_change("ans: truncated", codec="ans"),
    "empty payload": raw_payload("brotli", b""),
    "payload and more": raw_payload("brotli", lambda p: p.payload + b"x"),
    "payload twice": raw_payload("brotli", lambda p: p.payload * 2),
    "short payload": raw_payload("wrong number of symbols", brotli.compress(b"short")),
    "brotli bomb": raw_payload("brotli: truncated or too long", PACKED_BOMB),
    "tokenizer bomb": raw_payload(
        "brotli: truncated or too long", lambda p: p.payload, PACKED_BOMB
    ),
    "tokenizer of no kind": raw_payload("", lambda p: p.payload, b"\xff" * 50),
    "tokenizer cut short": raw_payload(
        "brotli", lambda p: p.payload, brotli.compress(b"tokenizer" * 9)[:-1]
    ),
}


def largest(blob: bytes) -> bytes:
    """Return 100 kB that hold as many weights as a reader accepts, all zero."""
    parts = Parts(blob)
    header = described(
        parts,
        vocab_size=42_000,
        model_dim=1024,
        num_heads=1,
        num_kv_heads=1,
        bigram_vocab_size=0,
        num_layers=1,
        mlp_mult=0.25,
        train_seq_len=46_000,
    )
    sizes = [
        2 * np.prod(shape) if bits == 16 else np.prod(shape) + 2 * shape[0]
        for bits, *shape in header["tensors"].values()
    ]
    zeros = bytes(int(sum(sizes)))
    parts.payload = brotli.compress(zeros, quality=1)
    assert sum(np.prod(shape) for _, *shape in header["tensors"].values()) > 0.98 * MOST_WEIGHTS
    return parts.forged(codec="brotli", **header)


VERDICTS = """
import json, resource, sys
sys.path.insert(0, sys.argv[1])
from fairway.artifact_reader import read_artifact
def hook(event, args):
    if event in ("pickle.find_class", "subprocess.Popen", "os.system", "socket.connect"):
        raise SystemExit(event)
sys.addaudithook(hook)
used = 0
if sys.platform == "linux":
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
if used: resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
def peak():
    if not used:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # ru_maxrss would start at what the process had that started this one
    (line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])
before = peak()  # torch with CUDA takes 0.3 GB more than without
for path in sys.argv[2:]:
    try:
        artifact = read_artifact(path)
        verdict = "Artifact", ""
        del artifact
    except BaseException as e:
        verdict = type(e).__name__, str(e).removeprefix(path + ": ")
    print(json.dumps([path, *verdict, peak() - before]), flush=True)
"""


@pytest.fixture(scope="module")
def verdicts(blob, tmp_path_factory) -> dict[str, tuple[str, str, int]]:
    """Read every file in one process of at most 1 GiB more: outcome, reason, growth of memory."""
    folder = tmp_path_factory.mktemp("hostile")
    for i, (_, forge) in enumerate(HOSTILE.values()):
        (folder / f"{i:03}").write_bytes(forge(Parts(copy.copy(blob))))
    for i, depth in enumerate(
        range(930, 1000)
    ):  # around Python's limit: parsed, yet too deep to print
        nest = "[" * depth + "]" * depth
        (folder / f"deep {i:03}a").write_bytes(
            Parts(blob).text('"vocab_size": 96', f'"vocab_size": {nest}')
        )
        (folder / f"deep {i:03}b").write_bytes(Parts(blob).text(f'"{Q}": [6,', f'"{Q}": [{nest},'))
    (folder / "largest brotli").write_bytes(largest(blob))
    parts, size = Parts(blob), 3 * 2**30
    with open(
        folder / "sparse", "wb"
    ) as f:  # a file larger than any artifact, which takes no room on the disk
        f.write(
            parts.forged(payload_bytes=size - len(parts.inside))[
                : -len(parts.payload) - len(parts.inside)
            ]
        )
        f.truncate(f.tell() + size)
    paths = sorted(str(p) for p in folder.iterdir())
    done = subprocess.run(
        [sys.executable, "-c", VERDICTS, str(Path(train_gpt.__file__).parent), *paths],
        text=True,
        capture_output=True,
        timeout=120,
        env=dict(PATH=os.environ["PATH"], OMP_NUM_THREADS="1"),
    )
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert [path for path, *_ in said] == paths
    names = dict(zip((f"{i:03}" for i in range(len(HOSTILE))), HOSTILE, strict=True))
    return {names.get(Path(path).name, Path(path).name): tuple(rest) for path, *rest in said}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_artifacts_end_in_artifact_error(verdicts, name):
    kind, message, _ = verdicts[name]
    assert kind == "ArtifactError" and HOSTILE[name][0] in message
    assert "\n" not in message and 0 < len(message) < 700


def test_headers_as_deep_as_python_parses(verdicts):
    assert {kind for name, (kind, *_) in verdicts.items() if name.startswith("deep ")} == {
        "ArtifactError"
    }


def test_a_file_larger_than_any_artifact(verdicts):
    assert verdicts["sparse"][0] == "ArtifactError"


def test_hostile_artifacts_take_less_than_768_mib(verdicts):
    assert verdicts["largest brotli"][:2] == ("Artifact", "")
    assert max(peak for *_, peak in verdicts.values()) < 768 * 2**20


# ---- Mutants -------------------------------------------------------------------------------------


def mutant_header(parts: Parts, rng: np.random.Generator) -> bytes:
    """Replace one value of the header by a hostile one; the checksums stay right."""
    nasty = [
        0,
        1,
        -1,
        2,
        7,
        255,
        2**31,
        2**63,
        -(10**30),
        1.5,
        -0.0,
        1e300,
        None,
        True,
        False,
        "",
        "ans",
        "brotli",
        [],
        [1],
        {},
        {"a": 1},
        [16, 1],
        float("nan"),
        float("inf"),
        "\0",
        "ÿ" * 99,
    ]
    header = parts.header = copy.deepcopy(parts.header)
    for _ in range(rng.integers(1, 3)):
        place = header[["model", "tensors"][rng.integers(2)]] if rng.random() < 0.8 else header
        if not isinstance(place, dict) or not place:
            continue
        key = list(place)[rng.integers(len(place))]
        value = nasty[rng.integers(len(nasty))]
        if isinstance(place[key], list) and place[key] and rng.random() < 0.7:
            place[key] = list(place[key])
            place[key][rng.integers(len(place[key]))] = value
        elif rng.random() < 0.1:
            del place[key]
        else:
            place[key] = value
    return parts.forged(json.dumps(header).encode())


def mutant(good: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """Truncated, flipped, or spliced with another file."""
    kind, at = rng.integers(3), int(rng.integers(len(good)))
    if kind == 0:
        return good[:at]
    if kind == 1:
        data = np.frombuffer(good, np.uint8).copy()
        data[rng.integers(0, len(data), rng.integers(1, 9))] ^= np.uint8(1 << rng.integers(8))
        return data.tobytes()
    return good[:at] + other[int(rng.integers(len(other))) :]


def test_2000_mutants_end_in_artifact_or_shard_error(blob, corpus, tmp_path):
    rng, path = np.random.default_rng(8), tmp_path / "mutant"
    shard = (corpus.folder / "tiny_val_000000.bin").read_bytes()
    others, ends = (
        [encoded(trained(CONFIGS["8 bits"]), codec) for codec in CODECS],
        {"refused": 0, "read": 0},
    )
    for i in range(2000):
        kind = i % 4
        if kind < 2:
            data = mutant(blob, others[i % 2], rng)
        else:
            data = (
                mutant_header(Parts(others[i % 2]), rng) if kind == 2 else mutant(shard, blob, rng)
            )
        path.write_bytes(data)
        try:
            if kind == 3:
                tokens = read_shard(path, corpus.vocab_size)
                assert (
                    2 * len(tokens) + 1024 == len(data)
                    and tokens.max(initial=0) < corpus.vocab_size
                )
            else:
                artifact = read_artifact(path)
                assert kind == 2 or data in (blob, *others)
                build_model(artifact)
            ends["read"] += 1
        except (ArtifactError, UserError) as e:
            assert str(e).startswith(f"{path}: ") and "\n" not in str(e)
            ends["refused"] += 1
    assert ends["refused"] > 1500 and ends["read"] > 20  # harmless changes are read, and build


# ---- Code is never run ---------------------------------------------------------------------------


class Exploit:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_is_refused_and_not_run(tmp_path):
    proof, path = tmp_path / "code was run", tmp_path / "a.ptz"
    torch.save(Exploit(proof), path)
    assert "not a Fairway artifact" in refused(path)
    path.write_bytes(pickle.dumps(Exploit(proof)))
    assert "not a Fairway artifact" in refused(path)
    assert not proof.exists()
    pickle.loads(path.read_bytes())  # it was a real one
    assert proof.exists()


def test_nothing_on_the_way_to_a_model_can_unpickle():
    """No function that `read_artifact` and `build_model` reach calls a loader but JSON's."""
    tree = ast.parse(inspect.getsource(train_gpt) + inspect.getsource(artifact_reader))
    functions = {n.name: n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    reached, todo = (
        set(),
        ["read_artifact", "build_model", "unpack_brotli", "unpack_ans"],
    )
    called = set()
    while todo:
        name = todo.pop()
        if name in reached or name not in functions:
            continue
        reached.add(name)
        for node in ast.walk(functions[name]):
            if isinstance(node, ast.Name):
                todo.append(node.id)
                called.add(node.id)
            elif isinstance(node, ast.Attribute):
                called.add(ast.unparse(node))
    assert {
        "read_header",
        "header_config",
        "decode_tensors",
        "check_tensor",
        "decompress_brotli",
        "decode_planes",
        "GPT",
    } <= reached
    loaders = {
        c
        for c in called
        if c.split(".")[-1] in ("load", "loads", "eval", "exec", "literal_eval", "fromfile")
    }
    assert loaders == {"json.loads"} and "pickle" not in called
    assert not [
        n
        for n in tree.body
        if isinstance(n, ast.Import) and any("pickle" in a.name for a in n.names)
    ]
