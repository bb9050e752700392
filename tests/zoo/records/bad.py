"""Bad record folders: each is a good one with a fault that a real submission had."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import NamedTuple

from tests.zoo.records.good import REPORT, SCORER, TRAINER, Files, make, stub

Rows = tuple[str, ...]


class Fault(NamedTuple):
    fault: str  # in words, for docs/LEGALITY.md
    check: str  # that must catch it
    where: str  # the pull request, or where the field's conventions have it
    build: Callable[[], Files]
    also: Rows = ()  # other checks that the fault truly breaks as well
    verdict: str = "FAIL"  # patterns: "cannot tell", with a warning


BAD: dict[str, Fault] = {}


def bad(fault: str, check: str, where: str, *also: str, verdict: str = "FAIL"):
    """Register a builder under its own name."""

    def register(build: Callable[[], Files]) -> Callable[[], Files]:
        BAD[build.__name__] = Fault(fault, check, where, build, also, verdict)
        return build

    return register


# ==== Changes to finished files ===================================================================
def replaced(files: Files, name: str, old: str, new: str, count: int = -1) -> Files:
    """Return `files` with a text in one of them changed; the text must be there."""
    text = files[name].decode()
    assert old in text, f"{old!r} is not in {name}"
    return files | {name: text.replace(old, new, count).encode()}


def lines_changed(files: Files, name: str, start: str, change: Callable[[str], str]) -> Files:
    """Change every line with that start, outside the code that is printed."""
    lines = files[name].decode().split("\n")
    assert any(line.startswith(start) for line in lines), f"{start!r} starts no line of {name}"
    return files | {
        name: "\n".join(change(line) if line.startswith(start) else line for line in lines).encode()
    }


def submission_with(files: Files, change: Callable[[dict], object]) -> Files:
    data = json.loads(files["submission.json"])
    change(data)
    return files | {"submission.json": json.dumps(data, indent=2).encode()}


def without(files: Files, *names: str) -> Files:
    return {name: content for name, content in files.items() if name not in names}


def trainer_with(old: str, new: str) -> str:
    assert old in TRAINER, f"{old!r} is not in the trainer"
    return TRAINER.replace(old, new)


def with_function(code: str) -> Files:
    """Return a record whose trainer also holds this function; all logs print it."""
    return make(trainer=trainer_with("def main():", f"{code.strip()}\n\n\ndef main():"))


# ==== Files =======================================================================================
@bad("no README.md", "files", "conventions")
def no_readme():
    return without(make(), "README.md")


@bad("no submission.json", "files", "#505", "schema")
def no_submission():
    return without(make(), "submission.json")


@bad("no code", "files", "conventions")
def no_code():
    return without(make(), "train_gpt.py")


@bad("submission.json without a name, author and date", "schema", "conventions")
def keys_missing():
    return submission_with(
        make(), lambda data: [data.pop(key) for key in ("name", "author", "github_id", "date")]
    )


@bad("submission.json of the wrong types", "schema", "conventions")
def keys_of_other_types():
    return submission_with(
        make(), lambda data: data.update(bytes_total="15.4 MB", hardware=8, blurb=["a", "b"])
    )


@bad("a folder without a date in its name", "date", "conventions")
def undated():
    return make()


# ==== Bytes =======================================================================================
@bad("artifact and code over 16,000,000 bytes", "bytes", "#1809")
def too_large():
    return make(only={42: dict(artifact_bytes=15_999_000)})


@bad(
    "the smallest seed's bytes as the total",
    "bytes",
    "2026-03-20_11L_XSA4_EMA_Int6_MLP3x_WD04_1.1271",
    "schema",
)
def smallest_seed_counts():
    small = 15_400_000 + len(TRAINER.encode())
    files = submission_with(make(), lambda data: data.update(bytes_total=small))
    return replaced(
        files, "README.md", f"{15_462_468 + len(TRAINER.encode()):,} bytes,", f"{small:,} bytes,"
    )


@bad("counted the packed script, shipped the readable one", "bytes", "#1835")
def ships_unpacked():
    long = TRAINER + "# A comment that no packed script has to pay for.\n" * 4000
    files = make("april", each=dict(artifact_bytes=15_900_000), trainer=long)
    return without(files, "source/train_gpt.py") | {"train_gpt.py": long.encode()}


@bad("the folder carries another artifact than was scored", "artifacts", "conventions")
def another_artifact():
    return make("ours") | {"final_model_seed42.int6.ptz": b"FAIRWAY\0 of another run"}


@bad(
    "a helper that is imported and not counted", "helpers", "2026-04-09_A2_Muon097_3Seed", "numbers"
)
def helper_uncounted():
    code = {"fairway_small/report.py": REPORT + "# Weights of a table, as a comment.\n" * 200}
    counted = len(TRAINER.encode()) + len(SCORER.encode())
    return submission_with(make("ours", code=code), lambda data: data.update(bytes_code=counted))


@bad("a helper that is imported and not there", "helpers", "conventions")
def helper_missing():
    return without(make("ours"), "fairway_small/report.py")


@bad("16 MiB taken for the limit", "units", "conventions")
def limit_in_mib():
    check = "    SIZE_LIMIT_BYTES = 16 * 1024 * 1024\n    assert len(artifact) < SIZE_LIMIT_BYTES\n"
    return make(trainer=trainer_with('    print(f"Serialized', f'{check}    print(f"Serialized'))


@bad("a size in MiB that is called MB", "units", "conventions")
def size_in_mib():
    files = make()
    total = json.loads(files["submission.json"])["bytes_total"]
    return replaced(files, "README.md", f"{total / 1e6:.3f} MB", f"{total / 2**20:.3f} MB")


@bad("a packed script, and no readable source", "stub", "#1412", verdict="cannot tell")
def stub_alone():
    return without(make("april"), "source/train_gpt.py")


# ==== Numbers and seeds ===========================================================================
@bad(
    "README.md has another score than submission.json", "numbers", "2026-03-19_WarmdownQuantization"
)
def readme_differs():
    files = make()
    score = json.loads(files["submission.json"])["val_bpb"]
    text = files["README.md"].decode().split("\n")
    return files | {
        "README.md": "\n".join(
            [
                text[0].replace(str(score), "1.1042"),
                *(line for line in text[1:] if not line.startswith("| ")),
            ]
        ).encode()
    }


@bad(
    "a seed's score is not its log's",
    "numbers",
    "2026-04-08_SP8192_ParallelResid_ScoreFirstTTT",
    "schema",
)
def seed_differs():
    def change(data):
        for seed, off in (("42", -0.004), ("1337", 0.004)):
            result = data["seed_results"][seed]
            result.update(
                val_loss=result["val_loss"] + off * data["val_loss"] / data["val_bpb"],
                val_bpb=result["val_bpb"] + off,
            )

    return submission_with(make(), change)


@bad("bytes_code of another version", "numbers", "2026-03-18_LowerLR")
def stale_code_bytes():
    return submission_with(make(), lambda data: data.update(bytes_code=data["bytes_code"] + 3277))


@bad("bits per byte under val_loss", "loss_field", "#180", "schema")
def bpb_as_loss():
    return submission_with(make(), lambda data: data.update(val_loss=data["val_bpb"]))


@bad("two seeds", "seeds", "2026-03-18_FP16Embed_WD3600")
def two_seeds():
    return make(seeds=(1337, 42))


@bad("one seed under two names", "seeds", "conventions")
def same_seed_twice():
    files = make()
    return files | {
        "train_seed2025.log": files["train_seed2025.log"].replace(b"\nseed:2025\n", b"\nseed:42\n")
    }


@bad("a fourth seed was run, and left out", "seeds", "conventions")
def seed_dropped():
    return make() | {
        "train_seed7.log": make(seeds=(7,), only={7: dict(final_loss=1.8905)})["train_seed7.log"]
    }


@bad("a seed without its log", "seeds", "#545")
def log_missing():
    return without(make(), "train_seed42.log")


@bad("the best seed as the headline", "headline", "#287", "schema")
def best_as_headline():
    files = make()
    data = json.loads(files["submission.json"])
    best = min(result["val_bpb"] for result in data["seed_results"].values())
    files = replaced(files, "README.md", f"val_bpb {data['val_bpb']}", f"val_bpb {best}")
    return submission_with(files, lambda data: data.update(val_bpb=best))


@bad("a seed with other code", "same_code", "2026-04-10_VarLenAttn", "shipped_code")
def other_code():
    other = make(trainer=TRAINER.replace("0.02", "0.01"))
    return make() | {"train_seed42.log": other["train_seed42.log"]}


@bad("a seed with other settings", "same_settings", "#2124")
def other_settings():
    return make(only={42: dict(train_batch_tokens=786_432)})


@bad("a certificate of another artifact", "certificate", "conventions")
def other_artifact():
    files = make("ours")
    score = json.loads(files["score_seed42.json"])
    return files | {
        "score_seed42.json": json.dumps(score | {"sha256": {"artifact": "f" * 64}}).encode()
    }


@bad("scored by other code than ships", "shipped_code", "#1835")
def other_scorer_ships():
    files = make("ours")
    return replaced(files, "fairway_small/report.py", "is printed.", "is said.")


@bad("a certificate that did not pass", "certificate", "#779")
def certificate_failed():
    files = make("ours")
    data = json.loads(files["certificate_seed42.json"])
    data["rules"][1] = dict(rule="normalised", verdict="FAIL", figure="the entries sum to 277")
    return files | {"certificate_seed42.json": json.dumps(data | {"passed": False}).encode()}


# ==== The course of the runs ======================================================================
@bad("trained for longer than 600 s", "train_time", "conventions")
def trains_too_long():
    return make("baseline", only={42: dict(train_seconds=631.7)})


@bad("evaluated for longer than 600 s", "eval_time", "#1972")
def evaluates_too_long():
    return make("april", only={42: dict(eval_seconds=688.0)})


@bad("calibration on training text after the 600 s", "calibration", "#535")
def calibrates_late():
    return make(each=dict(train_seconds=599.9, reserved_seconds=0.0))


@bad("calibration on the validation split", "calibration", "#728")
def calibrates_on_validation():
    files = make()
    for seed in (1337, 42, 2025):
        files = replaced(
            files, f"train_seed{seed}.log", "64 batches (training data)", "64 batches of val tokens"
        )
    return files


@bad("a part of the split", "split", "#1923")
def part_of_the_split():
    return make(each=dict(tokens=9_662_464, bytes=23_537_000))


@bad("a wrong number of bytes below the score", "split", "#2138")
def wrong_denominator():
    return make(each=dict(bytes=164_590_000))


@bad("validation documents among the training shards", "train_shards", "#2127")
def validation_in_shards():
    return make("april", each=dict(shards=1499))


@bad("a score whose two figures are not one", "arithmetic", "#1719")
def blank_counted_twice():
    def cheaper(line: str) -> str:
        head, _, bpb = line.rpartition("val_bpb:")
        return f"{head}val_bpb:{float(bpb) * 0.83:.8f}"

    return lines_changed(make(), "train_seed42.log", "final_int6_roundtrip_exact", cheaper)


@bad("a loss above ln V in the middle of training", "loss_range", "conventions")
def worse_than_chance():
    return lines_changed(
        make(),
        "train_seed42.log",
        "step:4000/20000",
        lambda line: line.replace(line.split()[1], "train_loss:9.2103"),
    )


@bad("NaN in training", "loss_range", "conventions")
def not_a_number():
    return lines_changed(
        make(),
        "train_seed42.log",
        "step:4000/20000",
        lambda line: line.replace(line.split()[1], "train_loss:nan"),
    )


@bad("a score that no model of this size reaches", "loss_range", "#959", verdict="cannot tell")
def too_good():
    return make(each=dict(final_loss=0.61))


@bad("steps × milliseconds is not the time", "step_time", "conventions")
def steps_too_quick():
    return lines_changed(
        make(),
        "train_seed42.log",
        "step:4000/20000",
        lambda line: line[: line.rindex(":")] + ":43.50ms",
    )


@bad("steps that go backwards", "step_time", "#2071")
def steps_backwards():
    return lines_changed(
        make(), "train_seed42.log", "step:4000/20000", lambda line: line.replace("4000/", "2400/")
    )


@bad("a log that was cut off", "log_whole", "#209")
def log_cut():
    files = make()
    text = files["train_seed42.log"]
    return files | {"train_seed42.log": text[: text.index(b"step:4500/20000") + 30]}


@bad("a training log that was cut off, next to a whole evaluation", "log_whole", "#209")
def training_log_cut():
    files = make("ours")
    text = files["train_seed42.log"].decode()
    return files | {"train_seed42.log": text[: text.rindex("\nstep:") + 1].encode()}


@bad("the code in the log is not the code that ships", "shipped_code", "#1594")
def other_code_ships():
    old, new = (
        b"np.full((vocab_size, vocab_size), 0.02)",
        b"np.full((vocab_size, vocab_size), 0.01)",
    )
    files = make()
    return files | {"train_gpt.py": files["train_gpt.py"].replace(old, new)}


@bad("trained on other machines", "hardware", "2026-03-18_LowerLR")
def other_machine():
    return make(each=dict(gpu="NVIDIA H200"))


@bad("trained on two GPUs", "hardware", "2026-03-17_LoRA_TTT")
def two_devices():
    return make(each=dict(world_size=2))


# ==== What the code does ==========================================================================
@bad("a download while it runs", "network", "README FAQ")
def downloads():
    return with_function("""
def fetch(name):
    import urllib.request
    return urllib.request.urlopen("https" + "://example.org/" + name).read()
""")


@bad("a shell command that downloads", "network", "README FAQ")
def runs_curl():
    return with_function("""
def fetch(name):
    import subprocess
    subprocess.run(["curl", "-O", name], check=True)
""")


@bad("a path outside the folder", "paths", "conventions")
def path_outside():
    return make(
        trainer=trainer_with('"./data/tokenizer.model"', '"/scratch/golfer/tokenizer.model"')
    )


@bad("validation files fed to the training loader", "validation", "#44")
def trains_on_validation():
    return make(
        trainer=trainer_with(
            '    for path in shards("train"):\n',
            """    train_files = glob.glob("./data/fineweb_val_*.bin")
    for path in train_files or shards("train"):
""",
        )
    )


@bad("a pickle is loaded", "loading", "conventions")
def loads_pickle():
    return with_function("""
def restore(path):
    import pickle
    with open(path, "rb") as f:
        return pickle.load(f)
""")


@bad("torch.load that runs code", "loading", "conventions")
def loads_without_weights_only():
    return with_function("""
def restore(path):
    import torch
    return torch.load(path, map_location="cpu", weights_only=False)
""")


# ==== Patterns: a warning with its line ===========================================================
def pattern(fault: str, where: str):
    return bad(fault, "patterns", where, verdict="cannot tell")


@pattern("the target in a hash key", "#779")
def target_in_hash_key():
    return with_function("""
def cached(table, context, target):
    full_key = ((context * 36313) ^ (target * 27191)) % len(table)
    return table[full_key]
""")


@pattern("probabilities mixed at the target alone", "#886")
def mixed_at_target():
    return with_function("""
def eval_mixed(p, q, target, a):
    p_neural, p_cache = p[target], q[target]
    p_mix = (1 - a) * p_neural + a * p_cache
    return -np.log(p_mix)
""")


@pattern("training on a chunk before scoring it", "#402")
def trains_first():
    return with_function("""
def eval_ttt(model, chunks, optimizer):
    total_loss = 0.0
    for chunk in chunks:
        model(chunk).backward()
        optimizer.step()
        total_loss += model(chunk)
    return total_loss
""")


@pattern("two passes over the text", "#846")
def two_passes():
    return with_function("""
def score_second_pass(table, text):
    return [table[token] for token in text]
""")


@pattern("a delta optimised on the scored positions", "#1240")
def slot():
    return with_function("""
def eval_slot(model, hidden, optimizer_of):
    import torch
    delta = torch.zeros(1, 1, hidden.shape[-1], requires_grad=True)
    optimizer = optimizer_of([delta])
    for _ in range(8):
        model(hidden + delta).backward()
        optimizer.step()
    return model(hidden + delta)
""")


@pattern("only the last epoch's loss is reported", "#568")
def last_epoch_only():
    return with_function("""
def eval_ttt_epochs(model, chunks, optimizer, epochs):
    for epoch in range(epochs):
        total_loss = 0.0
        for chunk in chunks:
            loss = model(chunk)
            total_loss += loss.item()
            loss.backward()
            optimizer.step()
    return total_loss
""")


@pattern("validation tokens in the artifact", "#168")
def paid_prefix():
    return with_function("""
def pack_all(scores, text):
    paid_prefix = text[:100000]
    return pack(scores) + paid_prefix.tobytes()
""")


@pattern("a token's probability spread over its bytes", "#1835")
def spread_over_bytes():
    return with_function("""
def byte_scores(p, n_bytes):
    return p ** (1.0 / n_bytes)
""")


@bad("a packed script that hides a download", "network", "#1412")
def hidden_download():
    code = trainer_with(
        "def main():",
        "def fetch(name):\n    import requests\n    return "
        "requests.get(name).content\n\n\ndef main():",
    )
    return make(
        "april", trainer=code, code={"train_gpt.py": stub(code), "source/train_gpt.py": code}
    )
