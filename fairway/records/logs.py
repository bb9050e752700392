"""Training and evaluation logs as data, in four dialects: the baseline's, March's, April's, and
ours.

Nothing is guessed: what a log does not say is None. Any text gives a RunLog, in time proportional
to its length: lines are split at spaces and colons, and overlong numbers are no numbers.

    S/N train_loss: 2.1 train_time: 5.0m                    a step of training or validation
    final_int6_roundtrip_exact val_loss:1.92 val_bpb:1.14   a score; labels differ (#162)
    Serialized model int6+lzma: 15887228 bytes              a size
    gptq:calibrated 66 layers in 6.7s                       a time
"""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from fairway.records.files import RecordError, parse_json, read_text

LONGEST_LINE = 4096  # characters; the longest useful line of 157 logs has 2,300
LONGEST_SETTINGS = 1 << 16  # characters of the line with all settings in our logs
MOST_WORDS = 256  # words of a line that are read
MOST_SETTINGS, MOST_TIMES = 2000, 500
MOST_LINES = 100_000  # of a longer log, the first and last halves of that

RULE = re.compile(r"={100}\s*")
NUMBER = re.compile(r"[+-]?[0-9]{1,18}(\.[0-9]{0,18})?([eE][+-]?[0-9]{1,3})?")
DURATION = re.compile(r"([0-9]{1,12}(?:\.[0-9]{0,9})?)(ms|s|m)")
SETTING_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
GPU = re.compile(r"\|\s{1,9}[0-9]{1,3}\s{1,9}((?:NVIDIA|AMD|Tesla|GeForce)[^|]{1,60}?)\s{2,40}")
# Unix time, which the launcher of #1610 puts before each line.
STAMP = re.compile(r"[0-9]{10}\.[0-9]{1,6} ")
CALIBRATION = re.compile(r"(gptq|calib\w*):(calibrat|collect|generat|hessian)")
SECONDS_PER_UNIT = {"ms": 0.001, "s": 1.0, "m": 60.0}
IMPORT = re.compile(r"import [\w.]{1,80}(\s*$|\s?[,;]| as )|from [\w.]{1,80} import ")
TOP = re.compile(r"\w{0,2}(\"\"\"|''')|#|import |from ")  # first line of a code file
PYTHON = re.compile(r"(def |class |async def |@\w|if __name__|exec\()")

# 24 characters of a run's first line but for its code
HEADERS = (
    "Hyperparameters:",
    "val_bpb:enabled tokenize",
)
# These lines repeat parts of a score and are no score of the run.
PARTS = ("ablation:", "ladder:")
# Of weights or windows that the claimed score does not come from; printed on the way.
DIAGNOSTIC = ("diagnostic", "pre-quant", "prequant", "pre_quant")
MARCH = (
    "swa:",
    "ema:",
    "gptq",
    "final_int6",
    "sliding",
    "ttt",
    "XSA:",
    "late_qat",
    "mtp_num_heads",
    "lawa",
)


class LoggedStep(NamedTuple):
    """One line of training or validation."""

    kind: str  # "train" or "val"
    step: int
    of: int | None
    loss: float
    bpb: float | None
    seconds: float | None  # training time so far; April's logs round it to 6 s
    average_ms: float | None
    line: int  # counted from 1


class LoggedScore(NamedTuple):
    """One line with a score. Its label says nothing reliable about the method (#162)."""

    label: str
    loss: float | None
    bpb: float | None
    exact: bool  # six decimals or more
    seconds: float | None  # time of this evaluation
    line: int

    @property
    def diagnostic(self) -> bool:
        """True for a score of weights or windows that the claimed score does not come from."""
        return self.label.lower().startswith(DIAGNOSTIC)


class LoggedSize(NamedTuple):
    """One line with a size in bytes."""

    kind: str  # "code", "model" (raw), "artifact" (compressed) or "total"
    label: str
    bytes: int
    line: int


class RunLog(NamedTuple):
    """A log as data. A file with several runs gives the last one."""

    dialect: str  # "baseline", "march", "april", "fairway" or "unknown"
    source: str  # the code printed at the top; "" if none
    # Lower-case name → value as written; also val_tokens and val_bytes of the split.
    settings: dict[str, str]
    steps: list[LoggedStep]
    scores: list[LoggedScore]
    sizes: list[LoggedSize]
    hashes: dict[str, str]  # by name: code, settings, tokenizer, data, artifact, val
    # Seconds by the words before them: "gptq:calibrated", "serialize: per-group", …
    times: dict[str, float]
    # The last line of each of `times`; also of "stopping_early" and "train_time".
    lines: dict[str, int]
    # The train_time that no step follows: of stopping_early, or of GPTQ in the training time.
    trained: float | None
    gpus: dict[str, int]
    runs: int  # number of runs in the text; everything here is of the last
    text_lines: int
    cut: bool  # the last line was cut

    @property
    def seed(self) -> int | None:
        return parse_whole(self.settings.get("seed", ""))

    @property
    def world_size(self) -> int | None:
        return parse_whole(self.settings.get("world_size", self.settings.get("ws", "")))

    @property
    def tokens(self) -> int | None:
        """Number of scored targets in the validation split."""
        return parse_whole(self.settings.get("val_tokens", ""))

    @property
    def val_bytes(self) -> int | None:
        return parse_whole(self.settings.get("val_bytes", ""))

    @property
    def train_shards(self) -> int | None:
        return parse_whole(self.settings.get("train_shards", ""))

    @property
    def parameters(self) -> int | None:
        return parse_whole(self.settings.get("model_params", self.settings.get("params", "")))

    @property
    def vocab_size(self) -> int | None:
        return parse_whole(self.settings.get("vocab_size", ""))

    @property
    def hardware(self) -> str | None:
        """`8x NVIDIA H100 80GB HBM3` as nvidia-smi listed it, else the device that our logs
        name.
        """
        listed = ", ".join(f"{n}x {name}" for name, n in self.gpus.items())
        return listed or self.settings.get("device_name") or None

    @property
    def last_step(self) -> int | None:
        return self.steps[-1].step if self.steps else None

    @property
    def planned_steps(self) -> int | None:
        logged = next((s.of for s in reversed(self.steps) if s.of is not None), None)
        return parse_whole(self.settings.get("iterations", "")) if logged is None else logged

    @property
    def train_seconds(self) -> float | None:
        """Training time from the line that ended training, else from the last step.

        April's steps round to six seconds.
        """
        logged = next((s.seconds for s in reversed(self.steps) if s.seconds is not None), None)
        return logged if self.trained is None else self.trained

    @property
    def step_avg_ms(self) -> float | None:
        return next((s.average_ms for s in reversed(self.steps) if s.average_ms is not None), None)

    @property
    def calibration_seconds(self) -> float | None:
        """Time of GPTQ calibration: the largest stated value, since values may be running totals.

        Calibration follows the last step. `train_seconds` and times["gptq:reserving"] tell whether
        it ran inside the training time.
        """
        return max((s for name, s in self.times.items() if CALIBRATION.match(name)), default=None)

    @property
    def eval_seconds(self) -> float | None:
        """Time of all scoring after training.

        This is the sum of every score's eval_time (quantised, sliding windows, test-time training)
        without diagnostics, or the stated total_eval_time if that is larger. Loading, decompression
        and kernel compilation count only if one of the two includes them.
        """
        logged = [s.seconds for s in self.scores if s.seconds is not None and not s.diagnostic]
        if "total_eval_time" in self.times:
            logged = [max(sum(logged), self.times["total_eval_time"])]
        return round(sum(logged), 6) if logged else None

    @property
    def artifact_bytes(self) -> int | None:
        return self.size("artifact")

    @property
    def code_bytes(self) -> int | None:
        return self.size("code")

    @property
    def total_bytes(self) -> int | None:
        return self.size("total")

    def size(self, kind: str) -> int | None:
        """Return the last size of a kind. A total right after the raw model is of nothing that
        ships.
        """
        last, raw = None, False
        for size in self.sizes:
            raw = size.kind == "model" or (raw and size.kind != "artifact")
            if size.kind == kind and not (kind == "total" and raw):
                last = size.bytes
        return last

    @property
    def final(self) -> LoggedScore | None:
        """The score that the run claims: the last one, in its exact form if the log has both."""
        claimed = [s for s in self.scores if not s.diagnostic]
        if not claimed:
            return None
        last = claimed[-1]
        names = {last.label, f"{last.label}_exact"}
        exact = [
            s for s in claimed if s.exact and s.label in names and abs(s.line - last.line) <= 2
        ]
        return last if last.exact or not exact else exact[-1]

    @property
    def truncated(self) -> bool:
        """True if the log ends in the middle of a line or without a final score."""
        return self.cut or self.final is None


# ==== Numbers =====================================================================================
def parse_number(text: str) -> float | None:
    """`parse_number("-2e-5")` is -2e-5; None for NaN, infinities, and numbers longer than logs
    have.
    """
    if not NUMBER.fullmatch(text):
        return None
    value = float(text)
    return value if math.isfinite(value) else None


def parse_whole(text: str) -> int | None:
    """`parse_whole("12")` is 12; None for anything but digits."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 18 else None


def parse_seconds(text: str) -> float | None:
    """Return seconds of `1401ms`, `12.7s` or `10.0m`; None without a unit."""
    match = DURATION.fullmatch(text)
    return round(float(match[1]) * SECONDS_PER_UNIT[match[2]], 6) if match else None


def parse_fields(line: str, spaced: int = MOST_WORDS) -> dict[str, str]:
    """`parse_fields("a:1 b: 2 c")` is {"a": "1", "b": "2"}; of a repeated name, the first counts.

    Only among the first `spaced` words may a space separate a value from its name.
    """
    fields: dict[str, str] = {}
    words = line.split(None, MOST_WORDS)[:MOST_WORDS]
    for i, word in enumerate(words):
        name, colon, value = word.partition(":")
        if colon and name:
            if not value and i < spaced and i + 1 < len(words) and ":" not in words[i + 1]:
                value = words[i + 1]
            fields.setdefault(name.strip("(,;"), value.strip("(),;"))
    return fields


# ==== Lines =======================================================================================
def read_step(text: str, line: int) -> LoggedStep | None:
    """Return the step that a line logs; None if it logs none."""
    named = text.startswith("step:")
    head = text[5:].split(None, 1) if named else text.split(None, 1)
    if not head or not head[0][:1].isdigit():
        return None
    at, slash, of = head[0].partition("/")
    if parse_whole(at) is None or (parse_whole(of) is None if slash else not named):
        return None
    fields = parse_fields(text[5:] if named else text)
    for kind, name in (("val", "val_loss"), ("train", "train_loss"), ("train", "loss")):
        loss = parse_number(fields.get(name, ""))
        if loss is not None:
            return LoggedStep(
                kind,
                int(at),
                parse_whole(of),
                loss,
                parse_number(fields.get("val_bpb", "")) if kind == "val" else None,
                parse_seconds(fields.get("train_time", fields.get("t", ""))),
                parse_milliseconds(fields.get("step_avg", fields.get("avg", ""))),
                line,
            )
    return None


def parse_milliseconds(text: str) -> float | None:
    """`parse_milliseconds("91.5ms")` is 91.5; None without that unit."""
    return parse_number(text[:-2]) if text.endswith("ms") else None


def read_score(text: str, line: int) -> LoggedScore | None:
    """Return the score that a line states; None if it states none.

    Such a line starts with a label, or with the score itself, as the last line of an evaluation
    does.
    """
    if (
        text[:1].isspace()
        or text.startswith(PARTS)
        or ("val_loss:" not in text and "val_bpb:" not in text)
    ):
        return None
    fields = parse_fields(text)
    loss, bpb = fields.get("val_loss", ""), fields.get("val_bpb", "")
    words = text[
        : min(at for at in (text.find("val_loss:"), text.find("val_bpb:")) if at >= 0)
    ].split()
    known = (parse_number(loss) is not None) + (parse_number(bpb) is not None)
    if known < (1 if words else 2):
        return None
    decimals = [
        len(value.partition(".")[2]) for value in (loss, bpb) if parse_number(value) is not None
    ]
    return LoggedScore(
        " ".join(w for w in words if ":" not in w or w.endswith(":")),
        parse_number(loss),
        parse_number(bpb),
        min(decimals) >= 6,
        parse_seconds(fields.get("eval_time", fields.get("time", ""))),
        line,
    )


def read_sizes(text: str, line: int) -> list[LoggedSize]:
    """Return the sizes that a line states."""
    for start, kind in (
        ("Serialized model", "artifact"),
        ("Code size", "code"),
        ("Total submission size", "total"),
    ):
        if text.startswith(start):
            label, colon, rest = text[len(start) :].partition(":")
            words, label = rest.split(), label.strip()
            if (
                not colon
                or len(words) < 2
                or parse_whole(words[0]) is None
                or not words[1].startswith("bytes")
            ):
                return []
            kind = "model" if kind == "artifact" and not label else kind
            return [
                *parts_of_total(parse_fields(rest), line),
                LoggedSize(kind, label, int(words[0]), line),
            ]
    fields = parse_fields(text) if text.startswith(("artifact:", "budget:")) else {}
    if "bytes" in fields and "sha256" in fields:
        fields["artifact"] = fields["bytes"]
    total = parse_whole(fields.get("budget", "").partition("/")[0])
    return [
        *parts_of_total(fields, line),
        *([LoggedSize("total", "", total, line)] if total is not None else []),
    ]


def parts_of_total(fields: dict[str, str], line: int) -> list[LoggedSize]:
    """Return the sizes in parentheses after a total: `(artifact:734192 code:329127 …)`."""
    sizes = ((kind, parse_whole(fields.get(kind, ""))) for kind in ("artifact", "code"))
    return [LoggedSize(kind, "", size, line) for kind, size in sizes if size is not None]


def read_time(text: str) -> tuple[str, float] | None:
    """Return the name and the seconds of a line that states a time; None if it states none.

    Forms: `… in 12.7s`, `… (137.6s)`, `… elapsed=407.5s`, `… time:76.2s`, `gptq:reserving 12s`.
    """
    words = text.split(None, MOST_WORDS)[:MOST_WORDS]
    if (
        text[:1].isspace()
        or not words
        or ":" not in words[0] + (words[1] if len(words) > 1 else "")
    ):
        return None
    name = (
        words[0].lower().rstrip(":") if not words[0].endswith(":") else " ".join(words[:2]).lower()
    )
    if name == "gptq:reserving" and len(words) > 1:
        took = parse_seconds(words[1].rstrip(","))
        return None if took is None else (name, took)
    for before, word in zip(["", *words], words, strict=False):
        key, mark, value = word.rpartition("=" if word.startswith("elapsed=") else ":")
        if (
            before == "in"
            or (word[0] == "(" and word[-1] == ")")
            or (mark and key in ("elapsed", "time"))
        ):
            took = parse_seconds((value if mark else word).strip("(),"))
            if took is not None:
                return name, took
    return None


# ==== The whole ===================================================================================
def code_parts(lines: list[str]) -> list[range]:
    """Return the ranges of lines that hold code.

    Lines of 100 `=` separate parts. A part that imports is code, and so are the parts after it that
    define or import, since code may hold such a line itself.
    """
    bounds = [
        -1,
        *(i for i, line in enumerate(lines) if len(line) < 200 and RULE.fullmatch(line)),
        len(lines),
    ]
    parts: list[range] = []
    for low, high in zip(bounds[:-1], bounds[1:], strict=True):
        part = lines[low + 1 : high]
        imports = any(IMPORT.match(x) for x in part)
        if parts and parts[-1].stop == low and (imports or any(PYTHON.match(x) for x in part)):
            parts[-1] = range(parts[-1].start, high)
        elif imports:
            parts.append(range(low + 1 + log_above(part), high))
    return parts


def log_above(part: list[str]) -> int:
    """Return the number of log lines at the top of a part of code.

    Some logs lack the separator between code and the settings, or an earlier run's end, above it.
    """
    if TOP.match(next(x for x in part if x.strip())):
        return 0
    first, above = next(i for i, x in enumerate(part) if IMPORT.match(x)), 0
    for i, line in enumerate(part[:first]):
        short = line if len(line) <= LONGEST_LINE else ""
        setting = line.startswith("  ") and above == i and part[0].strip() == "Hyperparameters:"
        if (
            (
                setting
                or line.strip() == "Hyperparameters:"
                or short.startswith(("stopping_early", "peak memory"))
            )
            or read_step(short, 0)
            or read_score(short, 0)
            or read_sizes(short, 0)
        ):
            above = i + 1
    return above


class LogReader:
    """The log read so far. A new run in the same file discards what came from the run before."""

    def __init__(self) -> None:
        self.runs = 0
        self.steps: list[LoggedStep] = []
        self.begin()

    def begin(self) -> None:
        """Forget everything except the steps of the run before, which a resumed run continues."""
        self.runs += 1
        self.earlier = self.steps  # for a run that resumes the one before
        self.starts: set[str] = set()
        self.marks: set[str] = set()  # dialects that lines are typical for
        self.settings: dict[str, str] = {}
        self.steps: list[LoggedStep] = []
        self.scores: list[LoggedScore] = []
        self.sizes: list[LoggedSize] = []
        self.hashes: dict[str, str] = {}
        self.times: dict[str, float] = {}
        self.lines: dict[str, int] = {}
        self.trained: float | None = None
        self.gpus: Counter[str] = Counter()
        self.block = ""  # the heading of the current block of settings

    def start(self, mark: str) -> None:
        """Note code or the first line of a header; seen twice, or after steps, it starts another
        run.
        """
        if self.steps or mark in self.starts:
            self.begin()
        self.starts.add(mark)

    def read(self, text: str, line: int) -> None:
        """Read one line; `line` is its number, from 1."""
        mark = text[:24].strip()
        if mark in HEADERS:
            self.start(mark)
        if text.startswith("settings: {") and len(text) <= LONGEST_SETTINGS:
            self.marks.add("fairway")
            self.flatten("", text.removeprefix("settings: "))
        elif len(text) <= LONGEST_LINE and text:
            self.marks.add(dialect_mark(text))
            if step := read_step(text, line):
                self.steps.append(step)
                self.trained = None
            elif score := read_score(text, line):
                self.scores.append(score)
            else:
                self.read_other(text, line)

    def flatten(self, name: str, value: Any) -> None:
        """Read our settings, JSON in one line; nested objects become dotted names."""
        try:
            value = parse_json(value, "settings") if not name else value
        except RecordError:
            return
        for key, inner in value.items() if isinstance(value, dict) else ():
            full = f"{name}.{key}" if name else key
            if isinstance(inner, dict) and full.count(".") < 4:
                self.flatten(full, inner)
            else:
                self.set(full, str(inner))

    def set(self, name: str, value: str) -> None:
        if value and len(self.settings) < MOST_SETTINGS and len(value) <= LONGEST_LINE:
            self.settings.setdefault(name.lower()[:200], value)

    def read_other(self, text: str, line: int) -> None:
        """Read a line that is neither step nor score: sizes, times, settings."""
        sizes = read_sizes(text, line)
        self.sizes += sizes
        if gpu := GPU.match(text):
            self.gpus[re.sub(r"\s+(On|Off)$", "", gpu[1])] += 1
        if not self.steps:
            self.read_header(text)
        if sizes:
            return
        fields = parse_fields(text)
        if (total := parse_seconds(fields.get("total_eval_time", ""))) is not None:
            self.note("total_eval_time", total, line)
        elif (took := read_time(text)) and len(self.times) < MOST_TIMES:
            self.note(*took, line)
        if (trained := parse_seconds(fields.get("train_time", ""))) is not None:
            self.trained, self.lines["train_time"] = trained, line
        if text.startswith("stopping_early"):
            self.lines["stopping_early"] = line
        elif (
            text.startswith("resumed step:")
            and self.earlier
            and (at := parse_whole(fields["step"])) is not None
        ):
            self.steps, self.earlier, self.runs = (
                [s for s in self.earlier if s.step <= at],
                [],
                self.runs - 1,
            )

    def note(self, name: str, took: float, line: int) -> None:
        self.times[name], self.lines[name] = took, line

    def read_header(self, text: str) -> None:
        """Read settings above the first step.

        Forms: `  name: value` in a block, `name=value …` below a heading, `name:value …`.
        """
        if text.startswith("  ") and self.block == "Hyperparameters:":
            name, _, value = text.strip().partition(":")
            if SETTING_NAME.fullmatch(name):
                self.set(name, value.strip())
            return
        if self.block.startswith("--- Hyperparameters"):
            for name, _, value in (word.partition("=") for word in text.split()):
                if SETTING_NAME.fullmatch(name):
                    self.set(name, value)
        self.block, fields = text.strip(), parse_fields(text, spaced=1)
        if text.startswith(("val_loader:", "train_loader:")):
            prefix = text.partition("_")[0]
            fields = {
                name if name == "train_shards" else f"{prefix}_{name}": value
                for name, value in fields.items()
            }
            fields["dataset"] = (
                text.split()[0].split(":")[2] if text.startswith("train_loader:dataset:") else ""
            )
        if text.startswith("run_id:") and " device:" in text:  # the only value with spaces
            self.set("device_name", text.partition(" device:")[2].partition(" torch:")[0].strip())
        for name, value in fields.items():
            if name.endswith("sha256") and re.fullmatch("[0-9a-f]{64}", value):
                self.hashes.setdefault(
                    {"sha256": "artifact", "val_sha256": "val"}.get(name, name[:-7]), value
                )
            elif SETTING_NAME.fullmatch(name) and not text[:1].isspace():
                self.set(name, value)

    def dialect(self) -> str:
        """Return the dialect of the lines seen: "fairway", "april", "march", "baseline" or
        "unknown".
        """
        if "fairway" in self.marks:
            return "fairway"
        if "april" in self.marks:
            return "april"
        if not self.marks & {"step", "zlib"} or not (self.steps or self.scores):
            return "unknown"
        return (
            "march"
            if "march" in self.marks
            or any("sliding" in s.label or "ttt" in s.label for s in self.scores)
            else "baseline"
        )


def dialect_mark(text: str) -> str:
    """Return the dialect that a line is typical for; "" if it is typical for none."""
    if text.startswith("code_sha256:") or (text.startswith("artifact:") and " sha256:" in text):
        return "fairway"
    if text.startswith("Hyperparameters:") or (text[:1].isdigit() and read_step(text, 0)):
        return "april"
    if text.startswith(MARCH):
        return "march"
    return (
        "step"
        if text.startswith("step:")
        else "zlib"
        if text.startswith("final_int8_zlib_roundtrip")
        else ""
    )


def log_lines(text: str) -> list[str]:
    """Return the lines of a log without time stamps; of a huge one, its first and last lines."""
    if text.count("\n") > MOST_LINES:
        lines = text.split("\n", MOST_LINES // 2)[:-1] + text.rsplit("\n", MOST_LINES // 2)[1:]
    else:
        lines = text.split("\n")
    return [
        line[STAMP.match(line).end() :] if line[:1].isdigit() and STAMP.match(line) else line
        for line in (line.rstrip("\r") for line in lines)
    ]


def parse_log(text: str) -> RunLog:
    """Return any text as a RunLog. Line numbers are exact up to MOST_LINES lines."""
    lines = log_lines(text)
    codes, reading, at = code_parts(lines), LogReader(), 0
    for code in [*codes, range(len(lines), len(lines))]:
        for i in range(at, code.start):
            reading.read(lines[i], i + 1)
        at = code.stop
        if code:
            reading.start("code")
    source = (
        "\n".join(lines[codes[-1].start : codes[-1].stop])
        if codes and "code" in reading.starts
        else ""
    )
    last = "" if codes and codes[-1].stop == len(lines) else lines[-1]
    return RunLog(
        reading.dialect(),
        source,
        reading.settings,
        reading.steps,
        reading.scores,
        reading.sizes,
        reading.hashes,
        reading.times,
        reading.lines,
        reading.trained,
        dict(reading.gpus),
        reading.runs,
        text_lines=len(lines) - (not lines[-1]),
        cut=is_cut_short(last),
    )


def is_cut_short(last: str) -> bool:
    """Tell whether a last line without a newline was cut.

    It was if one number of a score has fewer decimals than the other, or if its time has no unit.
    Some complete logs lack the newline.
    """
    score = read_score(last, 0) if len(last) <= LONGEST_LINE else None
    if score is None:
        return bool(last) and last.startswith(
            ("step:", "final_", "Serialized model", "Total submission")
        )
    fields = parse_fields(last)
    decimals = {len(fields.get(name, "").partition(".")[2]) for name in ("val_loss", "val_bpb")}
    return len(decimals) > 1 or ("eval_time" in fields and score.seconds is None)


def read_log(path: str | Path) -> RunLog:
    """Read a log file; RecordError only if it cannot be read as text at all."""
    return parse_log(read_text(path))
