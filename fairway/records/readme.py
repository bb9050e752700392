"""The README of a record, written from its runs: no figure in it is typed."""

from __future__ import annotations

import shlex
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from fairway.records.experiment import Result
from fairway.records.files import is_weights
from fairway.records.markdown import (
    bullets,
    markdown_cell,
    markdown_section,
    markdown_table,
    score_text,
)
from fairway.records.packed_code import is_code
from fairway.records.run import dict_at
from fairway.records.shipped_code import READABLE
from fairway.records.techniques import (
    bits_text,
    features,
    scoring_features,
    shape_text,
    training_features,
)
from fairway.records.trainer_source import (
    EVAL_SETTINGS,
    free_settings,
    setting_defaults,
    trainer_presets,
)

VAL_BYTES = 151_080_891  # bytes of the challenge's validation split, for any tokenizer
# The four conditions of #1017, and the certificate's rules that test each.
CONDITIONS = (
    ("C1 causal", ("causal", "target-blind")),
    ("C2 normalised", ("normalised", "target-blind", "canary")),
    ("C3 scored before learnt", ("score first",)),
    ("C4 one pass", ("one pass", "coverage")),
    ("beyond", ("claim", "bytes", "paid prefix", "smear", "sizes", "decoded")),
)


class Entry(NamedTuple):
    """The options of a packing: what cannot be read from the runs."""

    track: str
    slug: str
    author: str
    github_id: str
    name: str = ""  # default: the slug's words
    blurb: str = ""  # default: a sentence written from the settings
    date: str = ""  # default: today
    against: Path | None = None  # the record that this one follows
    pack_code: str = "lzma"  # two stubs and an archive; "none": plain files
    with_artifact: bool = False  # the folder carries the artifact of its first seed

    @property
    def folder(self) -> str:
        return f"track_{self.track}/{self.date}_{self.slug}"


class Record(NamedTuple):
    """All that the README is written from."""

    entry: Entry
    results: list[Result]
    submission: dict[str, Any]
    files: dict[str, bytes]  # relative name → content
    plain_bytes: int  # bytes of the readable code
    parent: str  # text: what changed since the record before; "" without one


# ==== SECTIONS ====================================================================================
def readme_text(record: Record) -> str:
    sections = [
        summary_section(record),
        limits_section(record),
        results_section(record),
        picture_markdown(record),
        markdown_section(
            "What changed",
            record.parent or "No record before was named, so that nothing is compared.",
        ),
        architecture_section(record),
        training_section(record),
        quantisation_section(record),
        ladder_section(record),
        compliance_section(record),
        commands_section(record),
        lineage_section(record),
        files_section(record),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def seed_list(record: Record) -> str:
    return ", ".join(str(r.seed) for r in record.results)


def summary_section(record: Record) -> str:
    data, count = record.submission, len(record.results)
    spread = f" ± {score_text(data['val_bpb_std'])}" if count > 1 else ""
    return "\n\n".join(
        [
            f"# {markdown_cell(data['name'])}: {score_text(data['val_bpb'])} BPB",
            markdown_cell(data["blurb"]),
            f"**{score_text(data['val_bpb'])}{spread} bits per byte**, the mean of {count} "
            f"seed{'s' * (count > 1)} ({score_text(data['val_loss'])} nats per token); "
            f"{data['bytes_total']:,} bytes at most, {data['bytes_code']:,} of them code; trained "
            f"on {markdown_cell(data['hardware'])} in {data['compliance']['train_time_max_s']} s "
            "at most.",
        ]
    )


def limits_section(record: Record) -> str:
    """Say what a reader might assume, and must not."""
    data, first, sentences = record.submission, record.results[0], []
    if first.bytes != VAL_BYTES:
        sentences.append(
            f"This is not the challenge's FineWeb split: {first.tokens:,} tokens, {first.bytes:,} "
            f"bytes of the corpus `{corpus_name(first)}` were scored, so that no figure here "
            "compares with the challenge's."
        )
    if not all("H100" in part and part.startswith("8x ") for part in data["hardware"].split("; ")):
        sentences.append(f"It was not run on 8×H100, but on {markdown_cell(data['hardware'])}.")
    if first.run.score is None:
        sentences.append(
            "eval_final.py was not run: the score is that of the artifact as training ended."
        )
    elif lacking := [str(r.seed) for r in record.results if certified([r]) is None]:
        sentences.append(
            "The four conditions were not all tested by a certificate for seed "
            f"{', '.join(lacking)}."
        )
    if len(record.results) < 3:
        sentences.append(f"Runs: {len(record.results)}; three seeds are the custom.")
    if not record.parent:
        sentences.append("No significance test was made.")
    return markdown_section("What was not done", " ".join(sentences)) if sentences else ""


def certificate_verdicts(result: Result) -> dict[str, str]:
    """Return the certificate's verdict for each rule; {} without a certificate."""
    rules = (result.run.certificate or {}).get("rules")
    return (
        {str(r.get("rule")): str(r.get("verdict")) for r in rules if isinstance(r, dict)}
        if isinstance(rules, list)
        else {}
    )


def certified(results: list[Result]) -> bool | None:
    """Tell whether every rule that was run held in every run; None if a run lacks one of C1 to
    C4.
    """
    asked = {rule for condition, rules in CONDITIONS if condition.startswith("C") for rule in rules}
    if any(asked - certificate_verdicts(r).keys() for r in results):
        return None
    return all(verdict != "FAIL" for r in results for verdict in certificate_verdicts(r).values())


def corpus_name(result: Result) -> str:
    return str(result.run.settings.get("data_path") or "embedded").rstrip("/").split("/")[-1]


def results_section(record: Record) -> str:
    data = record.submission
    rows = [
        [
            seed,
            r["steps"],
            f"{r['step_avg_ms']:.2f}",
            score_text(r["pre_quant_val_bpb"]),
            score_text(result.plain_bpb),
            f"{score_text(r['val_bpb'])}",
            score_text(r["val_loss"]),
            f"{r['artifact_bytes']:,}",
            r["train_time_s"],
            r["eval_time_s"],
        ]
        for (seed, r), result in zip(data["seed_results"].items(), record.results, strict=True)
    ]
    empty = [""] * 4
    means = [score_text(data["val_bpb"]), score_text(data["val_loss"])]
    rows.append(["mean", *empty, *means, "", "", ""])
    if len(record.results) > 1:
        spreads = [score_text(data["val_bpb_std"]), score_text(data["val_loss_std"])]
        rows.append(["std", *empty, *spreads, "", "", ""])
    head = (
        *("seed", "steps", "ms/step", "before quantising", "artifact", "final BPB", "final nats"),
        *("artifact bytes", "training s", "evaluation s"),
    )
    return markdown_section(
        "Results",
        markdown_table(head, rows),
        "Artifact: its score in windows side by side, read back from disk. Scored: "
        f"{record.results[0].tokens:,} tokens, {record.results[0].bytes:,} bytes, each token once.",
    )


def picture_markdown(record: Record) -> str:
    return (
        (
            f"![Training loss of seeds {seed_list(record)}, and what each part of the evaluation "
            "gained](picture.png)"
        )
        if "picture.png" in record.files
        else ""
    )


def architecture_section(record: Record) -> str:
    first = record.results[0]
    s = first.run.settings
    return markdown_section(
        "Architecture",
        bullets(
            [
                shape_text(first),
                f"tied embeddings, logits softly capped at {s.get('logit_softcap')}, RoPE base "
                f"{s.get('rope_base')}, query gain {s.get('qk_gain_init')}",
                *(words for words, _ in features(s)),
            ]
        ),
    )


def training_section(record: Record) -> str:
    s = record.results[0].run.settings
    return markdown_section(
        "Training",
        bullets(
            [
                f"{s.get('train_batch_tokens')} tokens a step in sequences of "
                f"{s.get('train_seq_len')}, at most {s.get('iterations')} steps and "
                f"{s.get('max_wallclock_seconds')} s; the rate falls over the last "
                f"{s.get('warmdown_frac')} of the run",
                f"Muon {s.get('matrix_lr')} (momentum {s.get('muon_momentum')}, weight decay "
                f"{s.get('muon_wd')}), AdamW {s.get('scalar_lr')} (weight decay "
                f"{s.get('adam_wd')}), embeddings {s.get('tied_embed_lr')} (weight decay "
                f"{s.get('embed_wd')}), gradients clipped at {s.get('grad_clip_norm')}",
                *(words for words, _ in training_features(s)),
            ]
        ),
        "Every setting stands at the top of each log.",
    )


def quantisation_section(record: Record) -> str:
    first = record.results[0]
    artifact, s = first.run.event("artifact"), first.run.settings
    rows = []
    for result in record.results:
        gap = result.plain_bpb - result.raw_bpb
        exported = result.run.event("artifact")
        weights = result.run.event("averages").get("kept", "last")
        rows.append(
            [
                result.seed,
                weights,
                exported.get("codec"),
                exported.get("k"),
                f"{result.artifact_bytes:,}",
                f"{gap:+.6f}",
            ]
        )
    return markdown_section(
        "Quantisation",
        f"{bits_text(s)}; step = k·σ of a row / levels, with k as small as the budget of "
        f"{artifact.get('budget_bytes', 0):,} bytes allows; the codec that gave fewest bytes.",
        markdown_table(("seed", "weights", "codec", "k", "bytes", "BPB, quantised less raw"), rows),
    )


def ladder_section(record: Record) -> str:
    """List what each part of the evaluation gained, as the mean over seeds, and the mixture's
    weights.
    """
    ladders = [r.run.score.get("ladder") for r in record.results if r.run.score]
    if not ladders or not all(
        isinstance(rungs, list) and len(rungs) == len(ladders[0]) for rungs in ladders
    ):
        return ""
    rows, before = [], None
    for i, rung in enumerate(ladders[0]):
        bpb = statistics.fmean(float(rungs[i]["bpb"]) for rungs in ladders)
        rows.append(
            [rung["name"], score_text(bpb), "" if before is None else f"{before - bpb:+.6f}"]
        )
        before = bpb
    return markdown_section(
        "The score, step by step",
        markdown_table(("what", "BPB", "gain"), rows),
        mixture_paragraph(record),
    )


def mixture_paragraph(record: Record) -> str:
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
        f"Pool: {markdown_cell(s.get('mix_mode'))}; weights: "
        f"{markdown_cell(s.get('mix_weights'))}; seed {record.results[0].seed}, mean weight over "
        "the first and the last tenth of the split:\n\n"
        + markdown_table(("expert", "first tenth", "last tenth"), rows)
    )


def compliance_section(record: Record) -> str:
    """List C1 to C4, and the certificate's verdicts for each seed."""
    by_seed, s = (
        [certificate_verdicts(result) for result in record.results],
        record.results[0].run.settings,
    )
    head = ("condition", "rule", *(f"seed {r.seed}" for r in record.results))
    rows = [
        [condition, rule, *(seed_verdicts.get(rule, "not run") for seed_verdicts in by_seed)]
        for condition, rules in CONDITIONS
        for rule in rules
    ]
    data = record.submission["compliance"]
    facts = bullets(
        [
            f"{record.submission['bytes_total']:,} bytes of at most 16,000,000: the largest "
            "artifact, and all code that ships",
            f"training {data['train_time_max_s']} s, evaluation {data['eval_time_max_s']} s at "
            "most, without what only explains or judges the score (600 s each are allowed)",
            "calibration: GPTQ on training batches, inside the training time"
            if s.get("gptq")
            else "calibration: none",
        ]
    )
    text = (
        (
            "The certificate runs the scorer against each rule: it replaces the future, swaps "
            "targets, sums distributions, and scores the text again."
        )
        if any(by_seed)
        else "No certificate was made."
    )
    return markdown_section(
        "Rule compliance", facts, text, markdown_table(head, rows) if any(by_seed) else ""
    )


def commands_section(record: Record) -> str:
    """Give the commands that repeat the record from inside its folder."""
    first, data = record.results[0], record.submission
    start = first.run.event("start")
    world = start.get("world_size", 1)
    python = "python" if world == 1 else f"torchrun --standalone --nproc_per_node={world}"
    where = "data" if corpus_name(first) == "embedded" else "data/datasets"
    artifact = str(first.run.event("artifact").get("path", "final_model.int6.ptz")).split("/")[-1]
    lines = [
        "pip install -r requirements.txt",
        f"export DATA_PATH=../../../{where}/{shlex.quote(corpus_name(first))}  # its data_sha256 "
        f"is {str(dict_at(start, 'sha256').get('data'))[:12]}…",
        f"for seed in {' '.join(map(str, data['seeds']))}; do",
        "  export OUT_DIR=out/seed$seed",
        f"  {' '.join([*training_words(record), python])} train_gpt.py",
    ]
    certificate = ""
    if first.run.score is not None:
        words = [f"CHECKPOINT=$OUT_DIR/{shlex.quote(artifact)}", *evaluation_overrides(record)]
        lines.append(f"  {' '.join([*words, python])} eval_final.py")
        if any(result.run.certificate for result in record.results):
            certificate = (
                "The certificate's rules are no part of the score, so they do not ship here. From "
                "a checkout of the repository, eval_final.py --certify makes it again."
            )
    return "\n\n".join(
        [
            markdown_section(
                "Run command",
                "\n".join(["```bash", *lines, "done", "```"]),
                "DATA_PATH is where a checkout of the repository has these shards, seen from a "
                "folder in records/; set it to wherever they are.",
                certificate,
            ),
            markdown_section(
                "Requirements",
                "Python 3.11 or newer; the pinned packages of requirements.txt; PyTorch "
                f"{markdown_cell(data['pytorch_version'])} was used, on "
                f"{markdown_cell(data['hardware'])}.",
            ),
            markdown_section(
                "Reproduction",
                "The commands above train each seed and score it. Each log opens with the source "
                "that ran, and with hashes of code, settings, tokenizer and data; compare them "
                "with yours. Scores repeat exactly only on the same machine: a faster one takes "
                "more steps in the same time.",
            ),
        ]
    )


# ==== SETTINGS THAT DIFFER FROM THE PRESET ========================================================
def shipped_source(record: Record, name: str) -> str:
    content = record.files.get(f"{READABLE}/{name}") or record.files.get(name) or b""
    return content.decode("utf-8", "replace")


def setting_assignments(
    settings: dict[str, Any], usual: dict[str, Any], free: set[str]
) -> list[str]:
    """Return NAME=value for every setting that is neither free nor at its usual value."""
    left_out = free | {"extra_code_files"}  # names files; `training_words` knows them
    return [
        f"{name.upper()}={shlex.quote(str(int(value) if type(value) is bool else value))}"
        for name, value in settings.items()
        if name not in left_out and usual.get(name, ...) != value
    ]


def training_words(record: Record) -> list[str]:
    """Return the assignments of a training: PRESET, and the settings that differ from it."""
    start, source = record.results[0].run.event("start"), shipped_source(record, "train_gpt.py")
    preset, settings = start.get("preset"), record.results[0].run.settings
    chosen = trainer_presets(source).get(preset)
    usual = setting_defaults(source, "Config") | (chosen or {})
    extra = str(settings.get("extra_code_files") or "")
    # Naming the readable files makes training reserve the same bytes again.
    if record.entry.pack_code == "lzma":
        extra = ",".join(f"{READABLE}/{name}" for name in filter(None, extra.split(",")))
    return [
        "SEED=$seed RUN_ID=train_seed$seed",
        *([f"PRESET={shlex.quote(str(preset))}"] if chosen is not None else []),
        *setting_assignments(settings, usual, free_settings(source, "Config")),
        *([f"EXTRA_CODE_FILES={shlex.quote(extra)}"] if extra else []),
    ]


def evaluation_overrides(record: Record) -> list[str]:
    """Return the settings of the evaluation that differ from their defaults."""
    source = shipped_source(record, EVAL_SETTINGS)
    return setting_assignments(
        dict_at(record.results[0].run.score, "settings"),
        setting_defaults(source, "EvalConfig"),
        free_settings(source, "EvalConfig"),
    )


# ==== WHERE IT COMES FROM, AND WHAT LIES HERE =====================================================
def lineage_section(record: Record) -> str:
    first = record.results[0]
    s = first.run.settings
    known = [
        *features(s),
        *training_features(s),
        ("quantiser steps of k·σ", "#1394"),
        *scoring_features(first),
    ]
    return markdown_section(
        "Lineage and credits",
        "Made with Fairway; `#N` are pull requests of openai/parameter-golf from "
        "which a technique is known.",
        bullets([f"{words}: {credit}" for words, credit in known if credit]),
    )


def files_section(record: Record) -> str:
    files = {
        name: len(content)
        for name, content in record.files.items()
        if not name.startswith(f"{READABLE}/")
    }
    rows = [
        [f"`{name}`", f"{size:,}", "code" if is_code(name) else "artifact" * is_weights(name)]
        for name, size in sorted(files.items())
    ]
    if len(files) < len(record.files):
        rows.append(
            [f"`{READABLE}/`", f"{record.plain_bytes:,}", "the packed code, readable; not counted"]
        )
    rows.append(["`README.md`", "", ""])
    return markdown_section("Included files", markdown_table(("file", "bytes", "counted as"), rows))
