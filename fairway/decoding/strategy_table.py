"""Every way to decode, on the same prompts, side by side: what each strategy writes, how likely and
how varied its texts are, and how fast it is (`fairway generate --compare`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from fairway.decoding.strategies import Strategy
from fairway.decoding.strategy_options import STRATEGY_NAMES
from fairway.decoding.writing import (
    GeneratedText,
    Writer,
    search_texts,
    time_plain_decoding,
    write_text,
)

SHOWN_PENALTY = 1.3  # of the row "greedy, penalty", unless the user sets one
BEAMS = 4


@dataclass(frozen=True)
class StrategyComparison:
    """A comparison to make: all strategies take the numbers of `strategy`."""

    prompts: tuple[bytes, ...]
    strategy: Strategy
    tokens: int
    samples: int  # texts of each strategy that samples, after each prompt
    seed: int
    drafts: tuple[str, ...]
    most: int  # guesses that are verified at once
    length_penalty: float = 1.0

    @property
    def strategies(self) -> dict[str, Strategy | None]:
        """The strategies by name; None is beam search."""
        plain = replace(self.strategy, repetition_penalty=1.0)
        penalty = self.strategy.repetition_penalty
        penalty = penalty if penalty > 1 else SHOWN_PENALTY
        return {name: replace(plain, name=name) for name in STRATEGY_NAMES} | {
            "greedy, penalty": replace(plain, name="greedy", repetition_penalty=penalty),
            "beam": None,
        }

    @property
    def runs(self) -> int:
        """Number of texts that `compare_strategies` writes."""
        texts = sum(self.repeats(name) for name in self.strategies)
        return len(self.prompts) * (texts + 4 * len(self.drafts))

    def repeats(self, name: str) -> int:
        """Number of texts of this strategy after each prompt: 1 if it always writes the same."""
        return 1 if name == "beam" or name.startswith("greedy") else self.samples


def compare_strategies(
    writer: Writer, task: StrategyComparison, on_progress: Callable[[int], None] = lambda done: None
) -> dict[str, Any]:
    """Return the figures behind `comparison_tables`; `on_progress(1)` follows each of task.runs."""
    text_rows, strategy_rows = [], []
    for name, strategy in task.strategies.items():
        by_prompt = {
            prompt: [
                write_one(writer, task, prompt, strategy, task.seed + nth, on_progress)
                for nth in range(task.repeats(name))
            ]
            for prompt in task.prompts
        }
        for prompt, texts in by_prompt.items():
            row = dict(prompt=prompt.decode("utf-8", "replace"), strategy=name)
            text_rows.append(row | text_averages(texts) | dict(text=texts[0].text))
        all_texts = [text for texts in by_prompt.values() for text in texts]
        strategy_rows.append(dict(strategy=name) | text_averages(all_texts))
    draft_rows = [
        measure_draft(writer, task, draft, name, on_progress)
        for draft in task.drafts
        for name in ("greedy", "top-p")
    ]
    return dict(
        tokens=task.tokens,
        samples=task.samples,
        seed=task.seed,
        texts=text_rows,
        strategies=strategy_rows,
        drafts=draft_rows,
    )


def write_one(
    writer: Writer,
    task: StrategyComparison,
    prompt: bytes,
    strategy: Strategy | None,
    seed: int,
    on_progress: Callable[[int], None],
) -> GeneratedText:
    """Write one text after a prompt; Ctrl-C ends the comparison, as half a text has no averages."""
    tokens = writer.tokens(prompt)
    if strategy is None:
        text = search_texts(writer, tokens, BEAMS, task.tokens, task.length_penalty)[0]
    else:
        steps, _ = writer.steps(tokens, strategy, seed)
        text = write_text(steps, writer.speller, task.tokens, fresh=len(tokens) == 1)
    if text.ended == "interrupted":
        raise KeyboardInterrupt
    on_progress(1)
    return text


def text_averages(texts: Sequence[GeneratedText]) -> dict[str, float]:
    """Return averages over texts. Log-probabilities are the model's own, in nats: `mean_logp` of a
    token, `text_logp` of a text.
    """
    tokens = sum(len(text.tokens) for text in texts)
    logp = sum(sum(text.logps) for text in texts)
    return dict(
        count=len(texts),
        distinct=len({text.text for text in texts}),
        mean_tokens=tokens / len(texts),
        mean_logp=logp / max(tokens, 1),
        text_logp=logp / len(texts),
        tokens_per_second=tokens / max(sum(text.seconds for text in texts), 1e-9),
    )


def measure_draft(
    writer: Writer,
    task: StrategyComparison,
    draft: str,
    name: str,
    on_progress: Callable[[int], None],
) -> dict[str, Any]:
    """Time a drafter and plain decoding on each prompt in turn, so that a busy machine slows
    both.
    """
    strategy, all_stats, plain_seconds = replace(task.strategy, name=name), [], 0.0
    for prompt in task.prompts:
        tokens = writer.tokens(prompt)
        steps, stats = writer.steps(tokens, strategy, task.seed, draft, task.most)
        while stats.tokens < task.tokens:
            next(steps)
        on_progress(1)
        plain_seconds += time_plain_decoding(writer, tokens, strategy, task.seed, stats.tokens)
        on_progress(1)
        all_stats.append(stats)
    total = {
        key: sum(getattr(stats, key) for stats in all_stats)
        for key in ("tokens", "verifications", "drafted", "accepted", "seconds", "draft_seconds")
    }
    return dict(
        draft=draft,
        strategy=name,
        **total,
        plain_seconds=plain_seconds,
        acceptance=total["accepted"] / max(total["drafted"], 1),
        tokens_per_verification=total["tokens"] / total["verifications"],
        ratio=plain_seconds / total["seconds"],
    )


# ==== TABLES ======================================================================================
def comparison_tables(results: Mapping[str, Any]) -> list[Table]:
    """Return the tables of what `compare_strategies` returned: the texts after each prompt, all
    strategies, all drafters.
    """
    prompts = list(dict.fromkeys(row["prompt"] for row in results["texts"]))
    return [
        *(texts_table(prompt, results["texts"]) for prompt in prompts),
        strategies_table(results["strategies"]),
        *([drafts_table(results["drafts"])] if results["drafts"] else []),
    ]


def empty_table(title: str, *columns: str, text_column: str = "") -> Table:
    """Return a table with names at the left, numbers at the right and, last, a column of text."""
    out = Table(
        title=Text(title),
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    out.add_column(columns[0], no_wrap=True)
    for column in columns[1:]:
        out.add_column(column, justify="right", no_wrap=True)
    if text_column:
        out.add_column(text_column, overflow="fold", ratio=1)
        out.expand = True
    return out


def texts_table(prompt: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return one text of each strategy after `prompt`."""
    title = f"After {prompt!r}" if prompt else "From the start of a document"
    out = empty_table(title, "strategy", "log p/tok", "tok/s", text_column="text")
    for row in rows:
        if row["prompt"] == prompt:
            out.add_row(
                row["strategy"],
                f"{row['mean_logp']:.2f}",
                f"{row['tokens_per_second']:.0f}",
                Text(row["text"].replace("\n", "↵")),  # Text: model output is no markup
            )
    return out


def strategies_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the averages of each strategy over all prompts."""
    columns = ("strategy", "texts", "distinct", "tokens", "log p/tok", "log p", "tok/s")
    out = empty_table("All prompts", *columns)
    for row in rows:
        out.add_row(
            row["strategy"],
            f"{row['count']}",
            f"{row['distinct']}",
            f"{row['mean_tokens']:.1f}",
            f"{row['mean_logp']:.2f}",
            f"{row['text_logp']:.1f}",
            f"{row['tokens_per_second']:.0f}",
        )
    return out


def drafts_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return acceptance and speed-up of each drafter."""
    columns = ("draft", "strategy", "accepted", "tok/verify", "speed-up")
    out = empty_table("Speculative decoding", *columns)
    for row in rows:
        out.add_row(
            Text(row["draft"]),
            row["strategy"],
            f"{row['acceptance']:.0%} of {row['drafted']}",
            f"{row['tokens_per_verification']:.2f}",
            f"{row['ratio']:.2f}x",
        )
    return out
