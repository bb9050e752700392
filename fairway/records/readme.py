"""The README of a record, written from its runs: no figure in it was typed."""

from __future__ import annotations

import ast
import html
import shlex
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fairway.records.run import Run, dict_at
from fairway.records.syntax import parse

PLACES = 6  # decimals of every score that is written: a thousandth of what seeds differ by
ARCHIVE, READABLE = "code.xz", "source"
VAL_BYTES = 151_080_891  # of the challenge's validation split, whatever the tokenizer
# The four conditions of #1017, and the certificate's rules that test each.
CONDITIONS = (
    ("C1 causal", ("causal", "target-blind")),
    ("C2 normalised", ("normalised", "target-blind", "canary")),
    ("C3 scored before learnt", ("score first",)),
    ("C4 one pass", ("one pass", "coverage")),
    ("beyond", ("claim", "bytes", "paid prefix", "smear", "sizes", "decoded")),
)


class Entry(NamedTuple):
    """What no run can know: everything else in a record is read from the runs."""

    track: str
    slug: str
    author: str
    github_id: str
    name: str = ""  # unset: the slug's words
    blurb: str = ""  # unset: a sentence made of the settings
    date: str = ""  # unset: today
    against: Path | None = None  # the record that this one follows
    pack_code: str = ""  # "lzma": two stubs and an archive

    @property
    def folder(self) -> str:
        return f"track_{self.track}/{self.date}_{self.slug}"


class Result(NamedTuple):
    """What one run measured. Losses in nats a token, times in seconds."""

    run: Run
    seed: int
    loss: (
        float  # these four: of the evaluation, or of the trainer's own scoring where there was none
    )
    bpb: float
    tokens: int
    bytes: int
    eval_seconds: float
    raw_bpb: float  # the model before it was quantised
    plain_bpb: float  # the artifact in windows side by side, as training ends
    steps: int
    train_seconds: float
    artifact_bytes: int

    @property
    def step_avg_ms(self) -> float:
        return 1000 * self.train_seconds / max(self.steps, 1)


class Record(NamedTuple):
    """All that the README is written from."""

    entry: Entry
    results: list[Result]
    submission: dict[str, Any]
    files: dict[str, bytes]  # of the folder, by relative name
    plain_bytes: int  # of the code, readable
    parent: str  # what changed against the record before, as text; "" without one


def is_code(name: str) -> bool:
    """Whether a file of a record counts as code."""
    return name.endswith((".py", ".xz")) and not name.startswith(f"{READABLE}/")


def cell(text: object) -> str:
    """Anyone's text as text of a markdown page or table: one line, without HTML, links or cell ends of its own."""
    plain = html.escape("".join(c if c.isprintable() else " " for c in str(text)), quote=False)
    return " ".join(plain.split()).translate({ord(c): f"&#{ord(c)};" for c in "|[]\\"})


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell(value) for value in line) + " |" for line in lines)


def score(value: float) -> str:
    """As submission.json has it."""
    return f"{value:.{PLACES}f}"


# ==== WORDS FOR SETTINGS ==============================================================================================
def features(s: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What a model has beyond the plain one, and the pull requests from which it is known."""
    on = s.get
    if on("smear_gate"):
        yield "SmearGate that stops at document starts", "#65, #162, #1851"
    if on("bigram_vocab_size"):
        yield f"hashed bigrams {on('bigram_vocab_size')}×{on('bigram_dim')}", "#162, #180"
    if on("ortho_init"):
        yield "orthogonal initialisation", "#162"
    if on("leaky_slope"):
        yield f"squared LeakyReLU ({on('leaky_slope')})", "#549"
    if on("xsa_last_n"):
        yield f"XSA on the last {on('xsa_last_n')} layers", "#265, #287"
    if on("rope_dims"):
        yield f"RoPE on {on('rope_dims')} dimensions", "#315"
    if on("ln_scale"):
        yield "inputs scaled by depth", "#315"
    if on("attn_gate"):
        yield "gated attention heads", "#1667, #1787"
    if on("parallel_start_layer"):
        yield f"parallel lanes from layer {on('parallel_start_layer')}", "#1204, #1529"
    if on("num_loops"):
        yield (
            f"layers {on('loop_start')}–{on('loop_end')} run {1 + on('num_loops')} times",
            "#1204, #1285",
        )


def training_features(s: dict[str, Any]) -> Iterator[tuple[str, str]]:
    on = s.get
    if on("muon_row_normalize"):
        yield "rows normalised before Muon", "#1285"
    if on("muon_polar_express"):
        yield "Polar Express coefficients", "#1787"
    if on("qat_start_frac", 1) < 1:
        yield f"quantisation-aware from {on('qat_start_frac'):.0%} of the run", "#65"
    if on("swa_start_frac", 1) < 1:
        yield (
            f"weights averaged from {on('swa_start_frac'):.0%} of the run, if held-out text gains",
            "#162, #180",
        )
    if on("ema_decay"):
        yield f"EMA {on('ema_decay')}, if held-out text gains", "#287"
    if on("gptq"):
        yield f"GPTQ on {on('gptq_batches')} training batches, inside the training time", "#1019"


def scoring_features(result: Result) -> Iterator[tuple[str, str]]:
    s = dict_at(result.run.score, "settings")
    if s.get("eval_mode") == "sliding":
        yield f"sliding windows, stride {s.get('eval_stride')}", "#50"
    elif s:
        yield "streams that keep keys and values", ""
    if s:
        yield "normalised n-gram and match experts of the past, mixed online", "#659, #727"
    if s.get("ttt", "none") != "none":
        yield f"score-first test-time training ({s['ttt']})", "#77, #549, #1413"


def shape(result: Result) -> str:
    s = result.run.settings
    count = result.run.event("model").get("parameters")
    parameters = f", {count:,} parameters" if type(count) is int else ""
    return (
        f"{s.get('num_layers')} layers of width {s.get('model_dim')}, {s.get('num_heads')} heads on "
        f"{s.get('num_kv_heads')} of keys and values, MLP {s.get('mlp_mult')}×, vocabulary {s.get('vocab_size')}"
        f"{parameters}"
    )


def bits(s: dict[str, Any]) -> str:
    return f"attention int{s.get('attn_bits')}, MLP int{s.get('mlp_bits')}, embeddings int{s.get('embed_bits')}"


def technique(result: Result) -> str:
    """One line: shape, what is special, how it is packed and scored."""
    s, artifact = result.run.settings, result.run.event("artifact")
    parts = [
        shape(result),
        *(words for words, _ in [*features(s), *training_features(s)]),
        f"{bits(s)}, {artifact.get('codec', 'packed')}",
        *(words for words, _ in scoring_features(result)),
    ]
    return "; ".join(parts)


def blurb(results: list[Result]) -> str:
    """The summary, where the author gave none."""
    first = results[0]
    special = [
        words
        for words, _ in [*features(first.run.settings), *training_features(first.run.settings)]
    ]
    trained = f"A model of {shape(first)}" + (f"; {', '.join(special)}" if special else "")
    scored = ", ".join(words for words, _ in scoring_features(first))
    return f"{trained}. Scored {'with ' + scored if scored else 'as training left it'}."


# ==== SECTIONS ========================================================================================================
def readme(record: Record) -> str:
    sections = [
        summary(record),
        not_done(record),
        results(record),
        picture(record),
        section(
            "What changed",
            record.parent or "No record before was named, so that nothing is compared.",
        ),
        architecture(record),
        training(record),
        quantisation(record),
        ladder(record),
        compliance(record),
        commands(record),
        lineage(record),
        included(record),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def section(title: str, *paragraphs: str) -> str:
    return "\n\n".join([f"## {title}", *filter(None, paragraphs)])


def seeds_of(record: Record) -> str:
    return ", ".join(str(r.seed) for r in record.results)


def summary(record: Record) -> str:
    data, count = record.submission, len(record.results)
    spread = f" ± {score(data['val_bpb_std'])}" if count > 1 else ""
    return "\n\n".join(
        [
            f"# {cell(data['name'])}: {score(data['val_bpb'])} BPB",
            cell(data["blurb"]),
            f"**{score(data['val_bpb'])}{spread} bits a byte**, the mean of {count} seed{'s' * (count > 1)} "
            f"({score(data['val_loss'])} nats a token); {data['bytes_total']:,} bytes at most, "
            f"{data['bytes_code']:,} of them code; trained on {cell(data['hardware'])} in "
            f"{data['compliance']['train_time_max_s']} s at most.",
        ]
    )


def not_done(record: Record) -> str:
    """What a reader might take for granted, and must not."""
    data, first, said = record.submission, record.results[0], []
    if first.bytes != VAL_BYTES:
        said.append(
            f"This is not the challenge's FineWeb split: {first.tokens:,} tokens, {first.bytes:,} bytes of the "
            f"corpus `{corpus(first)}` were scored, so that no figure here compares with the challenge's."
        )
    if not all("H100" in part and part.startswith("8x ") for part in data["hardware"].split("; ")):
        said.append(f"It was not run on 8×H100, but on {cell(data['hardware'])}.")
    if first.run.score is None:
        said.append(
            "eval_final.py was not run: the score is that of the artifact as training ended."
        )
    elif lacking := [str(r.seed) for r in record.results if certified([r]) is None]:
        said.append(
            f"The four conditions were not all tested by a certificate for seed {', '.join(lacking)}."
        )
    if len(record.results) < 3:
        said.append(f"Runs: {len(record.results)}; three seeds are the custom.")
    if not record.parent:
        said.append("No significance test was made.")
    return section("What was not done", " ".join(said)) if said else ""


def verdicts(result: Result) -> dict[str, str]:
    """What the certificate says of each rule; {} without one."""
    rules = (result.run.certificate or {}).get("rules")
    return (
        {str(r.get("rule")): str(r.get("verdict")) for r in rules if isinstance(r, dict)}
        if isinstance(rules, list)
        else {}
    )


def certified(results: list[Result]) -> bool | None:
    """Whether every rule that was run held, in every run; None where a run's certificate lacks one of C1 to C4."""
    asked = {rule for condition, rules in CONDITIONS if condition.startswith("C") for rule in rules}
    if any(asked - verdicts(r).keys() for r in results):
        return None
    return all(verdict != "FAIL" for r in results for verdict in verdicts(r).values())


def corpus(result: Result) -> str:
    return str(result.run.settings.get("data_path") or "embedded").rstrip("/").split("/")[-1]


def results(record: Record) -> str:
    data = record.submission
    rows = [
        [
            seed,
            r["steps"],
            f"{r['step_avg_ms']:.2f}",
            score(r["pre_quant_val_bpb"]),
            score(result.plain_bpb),
            f"{score(r['val_bpb'])}",
            score(r["val_loss"]),
            f"{r['artifact_bytes']:,}",
            r["train_time_s"],
            r["eval_time_s"],
        ]
        for (seed, r), result in zip(data["seed_results"].items(), record.results, strict=True)
    ]
    rows.append(
        ["mean", "", "", "", "", score(data["val_bpb"]), score(data["val_loss"]), "", "", ""]
    )
    if len(record.results) > 1:
        rows.append(
            [
                "std",
                "",
                "",
                "",
                "",
                score(data["val_bpb_std"]),
                score(data["val_loss_std"]),
                "",
                "",
                "",
            ]
        )
    head = (
        "seed",
        "steps",
        "ms/step",
        "before quantising",
        "artifact",
        "final BPB",
        "final nats",
        "artifact bytes",
        "training s",
        "evaluation s",
    )
    return section(
        "Results",
        table(head, rows),
        f"Artifact: its score in windows side by side, read back from disk. "
        f"Scored: {record.results[0].tokens:,} tokens, {record.results[0].bytes:,} bytes, each token once.",
    )


def picture(record: Record) -> str:
    return (
        (
            f"![Training loss of seeds {seeds_of(record)}, and what each part of the evaluation gained]"
            "(picture.png)"
        )
        if "picture.png" in record.files
        else ""
    )


def bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {cell(line)}" for line in lines)


def architecture(record: Record) -> str:
    first = record.results[0]
    s = first.run.settings
    return section(
        "Architecture",
        bullets(
            [
                shape(first),
                f"tied embeddings, logits softly capped at {s.get('logit_softcap')}, RoPE base "
                f"{s.get('rope_base')}, query gain {s.get('qk_gain_init')}",
                *(words for words, _ in features(s)),
            ]
        ),
    )


def training(record: Record) -> str:
    s = record.results[0].run.settings
    return section(
        "Training",
        bullets(
            [
                f"{s.get('train_batch_tokens')} tokens a step in sequences of {s.get('train_seq_len')}, at most "
                f"{s.get('iterations')} steps and {s.get('max_wallclock_seconds')} s; the rate falls over the last "
                f"{s.get('warmdown_frac')} of the run",
                f"Muon {s.get('matrix_lr')} (momentum {s.get('muon_momentum')}, weight decay {s.get('muon_wd')}), AdamW "
                f"{s.get('scalar_lr')} (weight decay {s.get('adam_wd')}), embeddings {s.get('tied_embed_lr')} (weight decay "
                f"{s.get('embed_wd')}), gradients clipped at {s.get('grad_clip_norm')}",
                *(words for words, _ in training_features(s)),
            ]
        ),
        "Every setting stands at the top of each log.",
    )


def quantisation(record: Record) -> str:
    first = record.results[0]
    artifact, s = first.run.event("artifact"), first.run.settings
    rows = []
    for result in record.results:
        gap = result.plain_bpb - result.raw_bpb
        made = result.run.event("artifact")
        kept = result.run.event("averages").get("kept", "last")
        rows.append(
            [
                result.seed,
                kept,
                made.get("codec"),
                made.get("k"),
                f"{result.artifact_bytes:,}",
                f"{gap:+.6f}",
            ]
        )
    return section(
        "Quantisation",
        f"{bits(s)}; step = k·σ of a row / levels, with k as small as the budget of "
        f"{artifact.get('budget_bytes', 0):,} bytes allows; the codec that gave fewest bytes.",
        table(("seed", "weights", "codec", "k", "bytes", "BPB, quantised less raw"), rows),
    )


def ladder(record: Record) -> str:
    """What each part of the evaluation gained, the mean over seeds, and how the mixture's weights moved."""
    ladders = [r.run.score.get("ladder") for r in record.results if r.run.score]
    if not ladders or not all(
        isinstance(rungs, list) and len(rungs) == len(ladders[0]) for rungs in ladders
    ):
        return ""
    rows, before = [], None
    for i, rung in enumerate(ladders[0]):
        bpb = statistics.fmean(float(rungs[i]["bpb"]) for rungs in ladders)
        rows.append([rung["name"], score(bpb), "" if before is None else f"{before - bpb:+.6f}"])
        before = bpb
    return section("The score, step by step", table(("what", "BPB", "gain"), rows), mixture(record))


def mixture(record: Record) -> str:
    first = record.results[0].run.score
    weights, s = dict_at(first, "weights"), dict_at(first, "settings")
    experts, trace = weights.get("experts"), weights.get("trace")
    if not isinstance(experts, list) or not isinstance(trace, list) or not trace:
        return ""
    tenth = max(1, len(trace) // 10)
    ends = [
        [statistics.fmean(row[i] for row in part) for i in range(len(experts))]
        for part in (trace[:tenth], trace[-tenth:])
    ]
    rows = [[name, f"{a:.3f}", f"{b:.3f}"] for name, a, b in zip(experts, *ends, strict=True)]
    return (
        f"Pool: {cell(s.get('mix_mode'))}; weights: {cell(s.get('mix_weights'))}; seed {record.results[0].seed}, "
        "mean weight over the first and the last tenth of the split:\n\n"
        + table(("expert", "first tenth", "last tenth"), rows)
    )


def compliance(record: Record) -> str:
    """C1 to C4, and what the certificate found on each seed."""
    found, s = [verdicts(result) for result in record.results], record.results[0].run.settings
    head = ("condition", "rule", *(f"seed {r.seed}" for r in record.results))
    rows = [
        [condition, rule, *(given.get(rule, "not run") for given in found)]
        for condition, rules in CONDITIONS
        for rule in rules
    ]
    data = record.submission["compliance"]
    facts = bullets(
        [
            f"{record.submission['bytes_total']:,} bytes of at most 16,000,000: the largest artifact, and all code that "
            "ships",
            f"training {data['train_time_max_s']} s, evaluation {data['eval_time_max_s']} s at most, less what only "
            "explains or judges the score (600 s each are allowed)",
            f"calibration: GPTQ on training batches, {s.get('gptq_reserve_seconds')} s of the training time kept for it"
            if s.get("gptq")
            else "calibration: none",
        ]
    )
    text = (
        (
            "The certificate runs the scorer against each rule: its future replaced, its targets swapped, its "
            "distributions summed, its text scored again."
        )
        if any(found)
        else "No certificate was made."
    )
    return section("Rule compliance", facts, text, table(head, rows) if any(found) else "")


def commands(record: Record) -> str:
    """What repeats it, from inside this folder."""
    first, data = record.results[0], record.submission
    start = first.run.event("start")
    world = start.get("world_size", 1)
    python = "python" if world == 1 else f"torchrun --standalone --nproc_per_node={world}"
    where = "data" if corpus(first) == "embedded" else "data/datasets"
    artifact = str(first.run.event("artifact").get("path", "final_model.int6.ptz")).split("/")[-1]
    extra = first.run.settings.get("extra_code_files")
    if extra and record.entry.pack_code:
        extra = f"eval_final.py,{ARCHIVE}"
    lines = [
        "pip install -r requirements.txt",
        f"export DATA_PATH=../../../{where}/{shlex.quote(corpus(first))}  # its data_sha256 is "
        f"{str(dict_at(start, 'sha256').get('data'))[:12]}…",
        *([f"export EXTRA_CODE_FILES={shlex.quote(extra)}"] if extra else []),
        f"for seed in {' '.join(map(str, data['seeds']))}; do",
        "  export OUT_DIR=out/seed$seed",
        f"  {' '.join(['SEED=$seed RUN_ID=train_seed$seed', *overrides(record)])} {python} train_gpt.py",
    ]
    if first.run.score is not None:
        certify = " --certify" if any(r.run.certificate for r in record.results) else ""
        given = "".join(f"{word} " for word in evaluation_overrides(record))
        lines.append(
            f"  CHECKPOINT=$OUT_DIR/{shlex.quote(artifact)} {given}{python} eval_final.py{certify}"
        )
    return "\n\n".join(
        [
            section(
                "Run command",
                "\n".join(["```bash", *lines, "done", "```"]),
                "DATA_PATH is where a checkout of the repository has these shards, seen from a folder in records/; set "
                "it to wherever they are.",
            ),
            section(
                "Requirements",
                f"Python 3.11 or newer; the pinned packages of requirements.txt; PyTorch "
                f"{cell(data['pytorch_version'])} was used, on {cell(data['hardware'])}.",
            ),
            section(
                "Reproduction",
                "The commands above train each seed and score it. Each log opens with the source it "
                "ran, and with hashes of code, settings, tokenizer and data; compare them with yours. Scores repeat "
                "exactly only on the same machine: a training limited by time takes other steps on another.",
            ),
        ]
    )


# ==== SETTINGS THAT A PRESET LACKS ====================================================================================
NOT_GIVEN = {
    "seed",
    "run_id",
    "out_dir",
    "data_path",
    "tokenizer_path",
    "extra_code_files",
    "checkpoint",
    "val_files",
}


def code_of(record: Record, name: str) -> str:
    found = record.files.get(f"source/{name}") or record.files.get(name) or b""
    return found.decode("utf-8", "replace")


def assignments(settings: dict[str, Any], usual: dict[str, Any]) -> list[str]:
    """NAME=value for every setting that is not as usual."""
    return [
        f"{name.upper()}={shlex.quote(str(int(value) if type(value) is bool else value))}"
        for name, value in settings.items()
        if name not in NOT_GIVEN and usual.get(name, ...) != value
    ]


def overrides(record: Record) -> list[str]:
    """PRESET, and the settings that differ from it, as the shipped train_gpt.py defines both."""
    start, source = record.results[0].run.event("start"), code_of(record, "train_gpt.py")
    preset, settings = start.get("preset"), record.results[0].run.settings
    chosen = presets(source).get(preset)
    return [
        *([f"PRESET={shlex.quote(str(preset))}"] if chosen is not None else []),
        *assignments(settings, defaults(source, "Config") | (chosen or {})),
    ]


def evaluation_overrides(record: Record) -> list[str]:
    settings = dict_at(record.results[0].run.score, "settings")
    return assignments(
        settings, defaults(code_of(record, "fairway/scoring/settings.py"), "EvalConfig")
    )


def tree_of(source: str) -> ast.Module:
    return parse(source)[0] or ast.Module([], [])


def defaults(source: str, of: str) -> dict[str, Any]:
    """`name: type = knob(default, …)` of a class of settings, read and not run."""
    found = {}
    for node in (
        n
        for c in tree_of(source).body
        if isinstance(c, ast.ClassDef) and c.name == of
        for n in c.body
    ):
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call) and node.value.args:
            found[ast.unparse(node.target)] = value_of(node.value.args[0], {})
    return found


def presets(source: str) -> dict[str, Any]:
    """PRESETS of the trainer: dicts, dict(…) and their unions, read and not run."""
    names: dict[str, Any] = {}
    for node in tree_of(source).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if (
            isinstance(target, ast.Name)
            and isinstance(node, ast.Assign | ast.AnnAssign)
            and node.value
        ):
            names[target.id] = value_of(node.value, names)
    found = names.get("PRESETS")
    return found if isinstance(found, dict) else {}


def value_of(node: ast.expr, names: dict[str, Any]) -> Any:
    """Of a constant, a name known by now, dict(…), {…} or a | b; None of all else."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "dict" and not node.args:
        return {k.arg: value_of(k.value, names) for k in node.keywords}
    if isinstance(node, ast.Dict):
        return {
            ast.literal_eval(k): value_of(v, names)
            for k, v in zip(node.keys, node.values, strict=True)
            if isinstance(k, ast.Constant)
        }
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        left, right = value_of(node.left, names), value_of(node.right, names)
        return left | right if isinstance(left, dict) and isinstance(right, dict) else None
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None


# ==== WHERE IT COMES FROM, AND WHAT LIES HERE =========================================================================
def lineage(record: Record) -> str:
    first = record.results[0]
    s = first.run.settings
    known = [
        *features(s),
        *training_features(s),
        ("quantiser steps of k·σ", "#1394"),
        *scoring_features(first),
    ]
    return section(
        "Lineage and credits",
        "Made with Fairway; `#N` are pull requests of openai/parameter-golf from "
        "which a technique is known.",
        bullets([f"{words}: {credit}" for words, credit in known if credit]),
    )


def included(record: Record) -> str:
    files = {
        name: len(content)
        for name, content in record.files.items()
        if not name.startswith(f"{READABLE}/")
    }
    rows = [
        [f"`{name}`", f"{size:,}", "code" if is_code(name) else ""]
        for name, size in sorted(files.items())
    ]
    if len(files) < len(record.files):
        rows.append(
            [f"`{READABLE}/`", f"{record.plain_bytes:,}", "the packed code to be read; not counted"]
        )
    rows.append(["`README.md`", "", ""])
    return section("Included files", table(("file", "bytes", "counted as"), rows))
