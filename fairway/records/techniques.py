"""Settings of a run in the words of the field, with the pull requests that introduced a
technique.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fairway.records.experiment import Result
from fairway.records.run import dict_at


def features(s: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what a model adds to the plain one, and where that is from."""
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
    if on("skip_gates"):
        yield "gated skips", "#1855"
    if on("parallel_start_layer"):
        yield f"parallel lanes from layer {on('parallel_start_layer')}", "#1204, #1529"
    if on("num_loops"):
        yield (
            f"layers {on('loop_start')}–{on('loop_end')} run {1 + on('num_loops')} times",
            "#1204, #1285",
        )


def training_features(s: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what training adds to the plain one, and where that is from."""
    on = s.get
    if on("muon_row_normalize"):
        yield "rows normalised before Muon", "#1285"
    if on("muon_polar_express"):
        yield "Polar Express coefficients", "#1787"
    if on("sampled_frac"):
        yield f"a loss over few pieces until {on('sampled_frac'):.0%} of the run", ""
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
        yield "GPTQ on training batches, inside the training time", "#1019"


def scoring_features(result: Result) -> Iterator[tuple[str, str]]:
    """Yield what the evaluation does, and where that is from."""
    s = dict_at(result.run.score, "settings")
    if s.get("eval_mode") == "sliding":
        yield f"sliding windows, stride {s.get('eval_stride')}", "#50"
    elif s:
        yield "streams that keep keys and values", ""
    if s:
        yield "normalised n-gram and match experts of the past, mixed online", "#659, #727"
    if s.get("ttt", "none") != "none":
        yield f"score-first test-time training ({s['ttt']})", "#77, #549, #1413"


def shape_text(result: Result) -> str:
    s = result.run.settings
    count = result.run.event("model").get("parameters")
    parameters = f", {count:,} parameters" if type(count) is int else ""
    return (
        f"{s.get('num_layers')} layers of width {s.get('model_dim')}, {s.get('num_heads')} heads "
        f"on {s.get('num_kv_heads')} of keys and values, MLP {s.get('mlp_mult')}×, vocabulary "
        f"{s.get('vocab_size')}{parameters}"
    )


def bits_text(s: dict[str, Any]) -> str:
    return (
        f"attention int{s.get('attn_bits')}, MLP int{s.get('mlp_bits')}, embeddings "
        f"int{s.get('embed_bits')}"
    )


def technique_line(result: Result) -> str:
    """Return one line: shape, techniques, quantisation, scoring."""
    s, artifact = result.run.settings, result.run.event("artifact")
    parts = [
        shape_text(result),
        *(words for words, _ in [*features(s), *training_features(s)]),
        f"{bits_text(s)}, {artifact.get('codec', 'packed')}",
        *(words for words, _ in scoring_features(result)),
    ]
    return "; ".join(parts)


def default_blurb(results: list[Result]) -> str:
    """Return the summary of a record whose author gave none."""
    first = results[0]
    special = [
        words
        for words, _ in [*features(first.run.settings), *training_features(first.run.settings)]
    ]
    trained = f"A model of {shape_text(first)}" + (f"; {', '.join(special)}" if special else "")
    scored = ", ".join(words for words, _ in scoring_features(first))
    return f"{trained}. Scored {'with ' + scored if scored else 'as training left it'}."
