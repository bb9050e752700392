"""Every way to decode, on the same prompts, side by side: what each writes, how likely, how varied and how fast."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from fairway.decoding.strategies import FILTERS, Strategy
from fairway.decoding.writing import Writer, Written, measure_plain, search, write

PENALTY = 1.3  # of the row that shows what a repetition penalty does, unless another is set
BEAMS = 4


@dataclass(frozen=True)
class Task:
    prompts: tuple[bytes, ...]
    strategy: Strategy  # whose numbers all strategies take
    tokens: int
    samples: int  # of each strategy that samples
    seed: int
    drafts: tuple[str, ...]
    most: int  # drafts that are verified at once
    length_penalty: float = 1.0

    @property
    def strategies(self) -> dict[str, Strategy | None]:
        """By name; None: beam search."""
        alone = replace(self.strategy, repetition_penalty=1.0)
        penalty = (
            self.strategy.repetition_penalty if self.strategy.repetition_penalty > 1 else PENALTY
        )
        return {name: replace(alone, name=name) for name in FILTERS} | {
            "greedy, penalty": replace(alone, name="greedy", repetition_penalty=penalty),
            "beam": None,
        }

    @property
    def runs(self) -> int:
        """Texts that `compare` writes."""
        times = sum(self.times(name) for name in self.strategies)
        return len(self.prompts) * (times + 4 * len(self.drafts))

    def times(self, name: str) -> int:
        return 1 if name == "beam" or name.startswith("greedy") else self.samples


def compare(
    writer: Writer, task: Task, told: Callable[[int], None] = lambda done: None
) -> dict[str, Any]:
    """All that the tables show; `told` hears of each text of Task.runs."""
    texts, samples = [], []
    for name, strategy in task.strategies.items():
        written = {
            prompt: [
                write_one(writer, task, prompt, strategy, task.seed + nth, told)
                for nth in range(task.times(name))
            ]
            for prompt in task.prompts
        }
        texts += [
            dict(prompt=as_text(prompt), strategy=name, **of_texts(found), text=found[0].text)
            for prompt, found in written.items()
        ]
        samples.append(
            dict(strategy=name, **of_texts([one for found in written.values() for one in found]))
        )
    drafts = [
        of_draft(writer, task, draft, name, told)
        for draft in task.drafts
        for name in ("greedy", "top-p")
    ]
    return dict(
        tokens=task.tokens,
        samples=task.samples,
        seed=task.seed,
        texts=texts,
        strategies=samples,
        drafts=drafts,
    )


def as_text(prompt: bytes) -> str:
    return prompt.decode("utf-8", "replace")


def write_one(
    writer: Writer,
    task: Task,
    prompt: bytes,
    strategy: Strategy | None,
    seed: int,
    told: Callable[[int], None],
) -> Written:
    tokens = writer.tokens(prompt)
    if strategy is None:
        out = search(writer, tokens, BEAMS, task.tokens, task.length_penalty)[0]
    else:
        out = write(
            writer.steps(tokens, strategy, seed)[0],
            writer.speller,
            task.tokens,
            fresh=len(tokens) == 1,
        )
    if out.ended == "interrupted":
        raise KeyboardInterrupt
    told(1)
    return out


def of_texts(found: Sequence[Written]) -> dict[str, float]:
    """Averages over texts; log-probabilities are the model's own, a token's in nats, and a text's."""
    tokens, logp = sum(len(one.tokens) for one in found), sum(sum(one.logps) for one in found)
    return dict(
        count=len(found),
        distinct=len({one.text for one in found}),
        mean_tokens=tokens / len(found),
        mean_logp=logp / max(tokens, 1),
        text_logp=logp / len(found),
        tokens_per_second=tokens / max(sum(one.seconds for one in found), 1e-9),
    )


def of_draft(
    writer: Writer, task: Task, draft: str, name: str, told: Callable[[int], None]
) -> dict[str, Any]:
    """A draft beside plain decoding, prompt by prompt in turn, so that a busy machine slows both."""
    strategy, all_stats, plain_seconds = replace(task.strategy, name=name), [], 0.0
    for prompt in task.prompts:
        tokens = writer.tokens(prompt)
        steps, stats = writer.steps(tokens, strategy, task.seed, draft, task.most)
        while stats.tokens < task.tokens:
            next(steps)
        told(1)
        plain_seconds += measure_plain(writer, tokens, strategy, task.seed, stats.tokens)
        told(1)
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


# ==== ON A SCREEN =====================================================================================================
def tables(found: Mapping[str, Any]) -> list[Table]:
    """What `compare` found."""
    prompts = list(dict.fromkeys(row["prompt"] for row in found["texts"]))
    return [
        *(texts_table(prompt, found["texts"]) for prompt in prompts),
        strategies_table(found["strategies"]),
        *([drafts_table(found["drafts"])] if found["drafts"] else []),
    ]


def table(title: str, *columns: str, text: str = "") -> Table:
    """Names at the left, numbers at the right, and a last column of text if there is one."""
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
    if text:
        out.add_column(text, overflow="fold", ratio=1)
        out.expand = True
    return out


def texts_table(prompt: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    out = table(
        f"After {prompt!r}" if prompt else "From the start of a document",
        "strategy",
        "log p/tok",
        "tok/s",
        text="text",
    )
    for row in rows:
        if row["prompt"] == prompt:
            out.add_row(
                row["strategy"],
                f"{row['mean_logp']:.2f}",
                f"{row['tokens_per_second']:.0f}",
                Text(row["text"].replace("\n", "↵")),
            )
    return out


def strategies_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    out = table(
        "All prompts", "strategy", "texts", "distinct", "tokens", "log p/tok", "log p", "tok/s"
    )
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
    out = table("Speculative decoding", "draft", "strategy", "accepted", "tok/verify", "speed-up")
    for row in rows:
        out.add_row(
            Text(row["draft"]),
            row["strategy"],
            f"{row['acceptance']:.0%} of {row['drafted']}",
            f"{row['tokens_per_verification']:.2f}",
            f"{row['ratio']:.2f}x",
        )
    return out
