"""The report: what a page must hold for any runs, and that a browser shows all of it."""

import hashlib
import html
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import to_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from fairway.records.files import RecordError
from fairway.records.run import read_run
from fairway.report import (
    FIGURES,
    artifact,
    data,
    draw_picture,
    split,
    style,
    take_figures,
    write_report,
)
from fairway.shards import write_shard
from train_gpt import BOS_ID

HOSTILE = '<script>alert("$x_1$")<b>&_'


def write_json(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_events(folder: Path, run_id: str, events: list[dict]) -> None:
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    (logs / f"{run_id}.txt").write_text("a log\n")
    (logs / f"{run_id}.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))


def write_artifact(folder: Path, tokenizer: bytes) -> str:
    """Write an artifact with a header by docs/ARTIFACT.md and 900 zeros as weights; return its
    hash.
    """
    import brotli

    stored = brotli.compress(tokenizer)
    header = json.dumps(
        dict(
            payload_bytes=900,
            tokenizer_bytes=len(stored),
            tokenizer_sha256=hashlib.sha256(tokenizer).hexdigest(),
            tensors={
                "tok_emb.weight": [8, 64, 8],
                "blocks.0.mlp.fc.weight": [6, 16, 8],
                "blocks.0.gate": [16],
            },
        )
    ).encode()
    whole = (
        b"FAIRWAY\0"
        + (1).to_bytes(4, "little")
        + len(header).to_bytes(4, "little")
        + hashlib.sha256(header).digest()
        + header
        + bytes(900)
        + stored
    )
    (folder / "final_model.int6.ptz").write_bytes(whole)
    return hashlib.sha256(whole).hexdigest()


def training(sha256: str = "", size: int = 1500) -> list[dict]:
    """Return the events of a training run of 40 logged steps."""
    steps = [
        dict(event="train", step=s, tokens=64 * s, seconds=0.5 * s, loss=3 + 4 / s)
        for s in range(1, 41)
    ]
    return [
        dict(
            event="start",
            settings=dict(seed=7),
            device="cpu",
            world_size=1,
            sha256=dict(code="c0de"),
        ),
        dict(event="model", parameters=700, tensors={"tok_emb.weight": [64, 8]}),
        *steps,
        dict(event="qat", step=20),
        dict(event="val", step=40, loss=3.2, bpb=1.7, seconds=20.0),
        dict(
            event="quantised",
            tensors={
                "tok_emb.weight": [0.04, 6.5],
                "blocks.0.mlp.fc.weight": [0.03, 5.1],
                "blocks.1.mlp.fc.weight": [0.05, 5.2],
            },
        ),
        dict(event="artifact", bytes=size, code_bytes=500, codec="brotli", sha256=sha256),
        dict(event="final", loss=3.25, bpb=1.71, tokens=64, bytes=200),
    ]


def write_comparison(folder: Path, seed: int) -> None:
    """Write the table that `fairway compare --table` leaves next to a run."""
    rows = [
        dict(method="fp32", group="baselines", bpb=1.6, bytes=4e6, tokens_per_second=100.0 + seed),
        dict(method="int4-<b>", group="weight-only", bpb=1.7, bytes=5e5, tokens_per_second=90.0),
        dict(method="worse", group="weight-only", bpb=1.9, bytes=6e5, tokens_per_second=80.0),
        dict(method="absent", group="runtimes", bpb=None, bytes=None, tokens_per_second=None),
    ]
    (folder / "results").mkdir()
    write_json(folder / "results" / "m.json", dict(model="m", rows=rows))


def write_run(folder: Path, run_id: str, corpus, seed: int) -> Path:
    """Write a run that has everything a report can show, on a corpus of a few documents."""
    folder.mkdir()
    model = (corpus.folder / "tokenizer.model").read_bytes()
    tokens = to_tokens(corpus.tokenizer, corpus.texts[:40])
    write_shard(folder / "shards" / "tiny_val_000000.bin", tokens)
    sha256 = write_artifact(folder, model)
    size = (folder / "final_model.int6.ptz").stat().st_size
    write_events(folder, run_id, training(sha256, size))
    rows, rng = len(tokens) - 1, np.random.default_rng(seed)
    neural, mixture = -rng.gamma(2.0, 1.6, rows), -rng.gamma(2.0, 1.5, rows)
    for name, column in (("columns/sliding/logp.npy", neural), ("final_logp.npy", mixture)):
        (folder / "eval" / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(folder / "eval" / name, column)
    ladder = [
        dict(name=name, loss=-float(c.mean()), bpb=-float(c.mean()) / 2)
        for name, c in (("neural, sliding", neural), ("+ experts, mixed: final", mixture))
    ]
    verdicts = [
        dict(rule="causal", verdict="ok", figure="49 cuts"),
        dict(rule="sizes", verdict="FAIL", figure="<b>"),
    ]
    write_comparison(folder, seed)
    write_json(
        folder / "eval/score.json",
        dict(
            val_bpb=ladder[-1]["bpb"],
            val_loss=ladder[-1]["loss"],
            tokens=rows,
            bytes=2 * rows,
            ladder=ladder,
            ablation=[dict(name="+ ngram", bpb=1.6), dict(name="all, log", bpb=1.65)],
            correction=dict(oracle_bpb=1.1, charged_bpb=1.9),
            seconds=dict(load=1.0),
            sizes=dict(
                artifact=size, code={"train_gpt.py": 400, "fairway/scoring/experts/match.py": 90}
            ),
            sha256=dict(
                artifact=sha256,
                data=hashlib.sha256(tokens).hexdigest(),
                tokenizer=hashlib.sha256(model).hexdigest(),
            ),
            settings=dict(
                eval_mode="sliding", ttt="none", val_files="", data_path=str(folder / "shards")
            ),
            weights=dict(experts=["neural", "ngram"], trace=[[0.7, 0.3], [0.6, 0.4], [0.5, 0.5]]),
            certificate=dict(passed=False),
        ),
    )
    write_json(folder / "eval/certificate.json", dict(passed=False, rules=verdicts))
    return folder


class Outline(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, text):
        self.words += text

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, corpus) -> list[Path]:
    base = tmp_path_factory.mktemp("runs")
    return [
        write_run(base / f"run{i}", name, corpus, i) for i, name in enumerate([HOSTILE, "_second"])
    ]


@pytest.fixture(scope="module")
def report(tmp_path_factory, folders) -> Path:
    """Return the report of two complete runs."""
    return write_report(folders, tmp_path_factory.mktemp("report") / "new" / "folder")


@pytest.fixture(scope="module")
def text(report) -> str:
    return report.read_text()


# ==== THE PAGE ====================================================================================
def test_a_page_is_small_and_self_contained(report, text):
    assert report.stat().st_size < 1_500_000
    assert not re.search(
        r"https?:|@import|url\((?!#)|<script|<link|<iframe|\bsrc=|javascript:|\bon\w+=", text
    )
    links = [a["href"] for a in Outline(text).all("a")]
    assert links and all(link.startswith("#") and f'id="{link[1:]}"' in text for link in links)


def test_every_figure_is_there_in_two_shapes_and_says_its_finding(text):
    page = Outline(text)
    pictures = page.all("svg")
    assert len(pictures) == 2 * len(FIGURES) and len(page.all("figure")) == len(
        page.all("figcaption")
    ) == len(FIGURES)
    assert all(p["role"] == "img" and re.search(r"\d", p["aria-label"]) for p in pictures)
    assert [p["class"] for p in pictures] == ["wide", "narrow"] * len(FIGURES)
    assert "missing" not in [p.get("class") for p in page.all("p")]
    assert {h for h in ("h1", "h2", "h3", "nav", "main") if page.all(h)} == {
        "h1",
        "h2",
        "h3",
        "nav",
        "main",
    }
    assert all(cell["scope"] in ("row", "col") for cell in page.all("th"))


def test_figures_take_every_colour_from_the_page_and_share_no_ids(text):
    drawings = "".join(re.findall(r"<svg.*?</svg>", text, re.S))
    assert not re.search(r"#[0-9a-fA-F]{6}\b", re.sub(r'url\(#[^)]*\)|href="#[^"]*"', "", drawings))
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]+)\)", drawings)) <= set(ids)
    assert all(text.count(f"--{name}:") == 3 for name in style.COLOURS)  # light, dark, print


def test_names_and_verdicts_cannot_become_markup(text):
    assert "<script" not in text and "<b>" not in text
    assert "FAIL" in Outline(text).words and "<b>" in Outline(text).words


def test_both_runs_are_named_on_the_page_and_in_every_figure(text):
    names = [HOSTILE[:23] + "…", "_second"]
    assert f"Report on {', '.join(names)}" in Outline(text).words
    for drawing in re.findall(r"<svg.*?</svg>", text, re.S):
        assert all(name in html.unescape(drawing) for name in names)


def test_runs_with_equal_names_get_different_labels(folders, tmp_path):
    run = read_run(folders[0])._replace(run_id="x", folder=tmp_path / "a")
    twin, alike = run._replace(folder=tmp_path / "b"), run._replace(folder=tmp_path / "c" / "a")
    assert data.run_names([run, run._replace(run_id="y")]) == ["x", "y"]
    assert data.run_names([run, twin]) == ["a", "b"]
    assert data.run_names([run, alike]) == ["x (1)", "x (2)"]
    alike = alike._replace(events=[dict(event="start", settings=dict(seed=8))])
    assert data.run_names([run, alike]) == ["x, seed 7", "x, seed 8"]


def test_numbers_are_those_of_the_run(text, folders):
    words = Outline(text).words
    for folder in folders:
        score = json.loads((folder / "eval/score.json").read_text())
        assert f"{score['val_bpb']:.6f}" in words
        used = (folder / "final_model.int6.ptz").stat().st_size + 490  # of code
        assert f"{used:,} of 16,000,000 bytes" in words and f"{16_000_000 - used:,}" in words
    assert "no record may use it" in words and "1.1000" in words
    assert "1 of 2 rules ok; not: sizes" in words


def test_pictures_are_next_to_the_page(report):
    names = sorted(p.name for p in report.parent.iterdir())
    assert names == sorted(["report.html", *(f"report_{figure.key}.png" for figure in FIGURES)])
    assert all(
        (report.parent / n).read_bytes()[:4] == b"\x89PNG" for n in names if n.endswith("png")
    )


# ==== WHAT IS NOT THERE ===========================================================================
def test_missing_data_remove_only_their_figure_and_bytes_repeat(tmp_path):
    """Report a run that was trained and not scored, twice."""
    write_events(tmp_path / "run", "alone", training()[:30])
    pages = []
    for out in ("a", "b"):
        (tmp_path / out).mkdir()
        (tmp_path / out / "report_ladder.png").write_bytes(b"an older report's")
        pages.append(write_report([tmp_path / "run"], tmp_path / out).read_text())
        assert {p.name for p in (tmp_path / out).glob("*.png")} == {
            "report_loss_time.png",
            "report_loss_tokens.png",
        }
    assert pages[0] == pages[1]
    for name in ("report_loss_time.png", "report_loss_tokens.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert len(Outline(pages[0]).all("svg")) == 4
    lacking = re.findall(r'<p class="missing">(.*?)</p>', pages[0])
    assert len(lacking) == len(FIGURES) - 2 + 2
    assert all("python" in text or "fairway compare" in text for text in lacking)


WITH_TOKENS = {"by_document", "by_rank", "passages"}
WITH_LOSSES = WITH_TOKENS | {"by_split"}


@pytest.mark.parametrize(
    ("break_it", "figures", "said"),
    [
        (lambda f: shutil.rmtree(f / "shards"), WITH_TOKENS, "no shards match"),
        (
            lambda f: (f / "shards/tiny_val_000000.bin").write_bytes(b"0123456789"),
            WITH_TOKENS,
            "not those",
        ),
        (
            lambda f: write_shard(f / "shards/tiny_val_000000.bin", np.full(9, BOS_ID)),
            WITH_TOKENS,
            "not those",
        ),
        (
            lambda f: (f / "eval/final_logp.npy").write_bytes(b"\x93NUMPY\1\0v\0{"),
            WITH_LOSSES,
            "rows",
        ),
        (lambda f: (f / "eval/final_logp.npy").write_bytes(b""), WITH_LOSSES, "rows"),
        (lambda f: np.save(f / "eval/final_logp.npy", np.array([{}])), WITH_LOSSES, "rows"),
        (
            lambda f: np.save(
                f / "eval/final_logp.npy", np.load(f / "eval/final_logp.npy") * math.nan
            ),
            WITH_LOSSES,
            "another evaluation",
        ),
        (
            lambda f: (f / "eval/score.json").write_text('{"val_bpb": NaN}'),
            WITH_LOSSES | {"ladder", "weights"},
            "eval_final.py",
        ),
        (lambda f: (f / "final_model.int6.ptz").unlink(), {"passages"}, "no tokenizer"),
        (lambda f: shutil.rmtree(f / "results"), {"methods"}, "fairway compare"),
        (lambda f: (f / "results/m.json").write_text('{"rows": 7}'), {"methods"}, "no finished"),
        (
            lambda f: (f / "results/m.json").write_text('{"rows": [{"bpb": "1", "bytes": []}]}'),
            {"methods"},
            "no finished",
        ),
        (lambda f: (f / "results/m.json").write_text("[1"), {"methods"}, "make it again"),
        (lambda f: (f / "results/m.json").write_text("[1]"), {"methods"}, "make it again"),
    ],
)
def test_damage_removes_only_the_figures_that_need_the_file(
    folders, tmp_path, break_it, figures, said
):
    folder = shutil.copytree(folders[0], tmp_path / "run")
    score = json.loads((folder / "eval/score.json").read_text())
    score["settings"]["data_path"] = str(folder / "shards")
    write_json(folder / "eval/score.json", score)
    break_it(folder)
    taken = take_figures(read_run(folder), 3)
    lacking = {key: str(found) for key, found in taken.items() if isinstance(found, data.Missing)}
    assert set(lacking) == figures
    assert all(said in text and "\n" not in text for text in lacking.values())


def test_no_run_and_too_many_are_refused_in_one_line(tmp_path, folders):
    for runs, message in (
        ([], "no run is named"),
        (folders * 5, "10 runs"),
        ([tmp_path / "none"], "no folder"),
    ):
        with pytest.raises(RecordError, match=message):
            write_report(runs, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError, match="file: "):
        write_report(folders[:1], tmp_path / "file")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# ==== HOSTILE RUNS ================================================================================
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=9)
    | st.sampled_from([10**30, -1, "NaN", 1e308, "\ud800", "</p>"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


def spots(value, path=()):
    """Yield the places at which a JSON document may be changed."""
    yield path
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, part in inner:
        yield from spots(part, (*path, key))


def changed(value, path, new):
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = changed(copy[path[0]], path[1:], new)
    return copy


@settings(max_examples=60)
@given(choice=st.randoms(use_true_random=False), new=VALUES, which=st.booleans())
def test_any_value_in_place_of_another_gives_figures_or_a_line(folders, choice, new, which):
    run = read_run(folders[0])
    found = run.score if which else run.events
    run = run._replace(
        **{
            "score" if which else "events": changed(
                found, choice.choice(list(spots(found))[1:]), new
            )
        }
    )
    run = run._replace(events=[e for e in run.events if isinstance(e, dict)])
    taken = take_figures(run, 1)
    for figure in FIGURES:
        found = taken[figure.key]
        assert "\n" not in (str(found) if isinstance(found, data.Missing) else figure.say(found))
    assert all(type(v) is str for v in data.summary_values(run).values())


def test_any_json_value_becomes_a_number_or_clean_text():
    assert all(math.isnan(data.finite_number(v)) for v in (None, True, "1", [], {}, 10**400, 1e300))
    assert (data.finite_number(3), data.whole_number(3)) == (3.0, 3)
    assert all(data.whole_number(v) is None for v in (-1, True, 1 << 60, 1.0, "1"))
    assert (
        data.clean_text("a\nb\x00\u202e<") == "a b  <"
        and data.clean_text({}) == ""
        and len(data.clean_text("x" * 10**6)) == 80
    )


# ==== PARTS =======================================================================================
@given(st.lists(st.floats(1, 1e6), min_size=1, max_size=20))
def test_rectangles_fill_the_whole_and_have_their_areas(sizes):
    from fairway.report.figures import squarified

    sizes = sorted(sizes, reverse=True)
    boxes = squarified(sizes, 0, 0, 300, 200)
    assert np.allclose(
        [w * h for _, _, w, h in boxes], np.array(sizes) * 60_000 / sum(sizes), rtol=1e-6
    )
    assert all(
        -1e-6 <= x and x + w <= 300 + 1e-6 and -1e-6 <= y and y + h <= 200 + 1e-6
        for x, y, w, h in boxes
    )


def test_a_smoothed_line_meets_single_points_and_averages_many():
    x = np.array([1.0, 10, 100, *np.linspace(1000, 1100, 50)])
    y = np.array([7.0, 6, 5, *np.tile([3.9, 4.1], 25)])
    at, mean = data.smooth_curve(x, y)
    assert abs(np.interp(1.0, np.log10(at), mean) - 6) < 0.05
    assert abs(mean[-1] - 4) < 0.1 and mean.min() > 3.85 and mean.max() <= 7


@pytest.mark.parametrize("part", [1, 2, 100])
def test_loss_by_place_is_the_mean_of_the_right_tokens(monkeypatch, part):
    monkeypatch.setattr(split, "PART", part)
    run = split.ScoredSplit.__new__(split.ScoredSplit)
    run.__dict__.update(
        rows=5,
        tokens=np.array([BOS_ID, 5, 5, BOS_ID, 5, 6], "<u2"),
        columns={"mixture": -np.array([1.0, 2.0, 8.0, 3.0, 4.0])},
    )
    found = split.by_document(run)["mixture"]
    assert found.x.tolist() == [1, 2, 3] and found.mean.tolist() == [2.0, 3.0, 8.0]
    found = split.by_rank(run)["mixture"]  # 5 comes first, then 1 and 6
    assert found.mean.tolist() == [2.0, 6.0] and found.share.tolist() == [0.6, 0.4]


def test_the_worst_passages_cost_most_and_bytes_of_a_character_are_joined(corpus):
    pieces = corpus.tokenizer.encode("the 日")
    spelled = split.token_texts(corpus.tokenizer, [BOS_ID, *pieces], [9.0, *range(len(pieces))])
    assert spelled[0] == ("⟨new document⟩", 9.0) and "".join(t for t, _ in spelled[1:]) == "the 日"
    run = split.ScoredSplit.__new__(split.ScoredSplit)
    logp = np.full(400, -1.0)
    logp[120:168], logp[240:288] = -5.0, -3.0
    run.__dict__.update(
        rows=400, tokens=np.full(401, pieces[0], "<u2"), tokenizer=corpus.tokenizer, mixture=logp
    )
    found = split.worst_passages(run, 2)
    assert [(p.first, round(p.mean * math.log(2), 6)) for p in found] == [(120, 5.0), (240, 3.0)]


def test_an_artifact_states_its_sizes_and_a_bomb_is_no_tokenizer(folders):
    import brotli

    run, unpacked = read_run(folders[0]), artifact.brotli_content
    made = artifact.read_artifact_file(run)
    assert (
        made.payload_bytes == 900
        and made.header_bytes + 900 + made.tokenizer_bytes == run.artifact.stat().st_size
    )
    assert (
        unpacked(made.tokenizer)[:1] and unpacked(brotli.compress(bytes(1 << 24), quality=1)) == b""
    )
    assert unpacked(made.tokenizer[:-2]) == unpacked(b"\xff\xff") == b""


@given(at=st.integers(0, 400), byte=st.integers(0, 255), cut=st.booleans())
def test_a_damaged_artifact_is_weighed_or_missing(folders, tmp_path_factory, at, byte, cut):
    run, path = read_run(folders[0]), tmp_path_factory.getbasetemp() / "damaged.ptz"
    whole = run.artifact.read_bytes()
    path.write_bytes(whole[:at] if cut else whole[:at] + bytes([byte]) + whole[at + 1 :])
    try:
        assert artifact.read_artifact_file(
            run._replace(artifact=path)
        ) == artifact.read_artifact_file(run)
    except data.Missing:
        assert cut or whole[at] != byte
    assert artifact.byte_breakdown(run._replace(artifact=path)).used == len(whole) + 490


def test_picture_is_one_png_and_needs_events_only(tmp_path, folders):
    write_events(tmp_path / "run", "alone", training())
    draw_picture([*folders, tmp_path / "run"], tmp_path / "picture.png")
    draw_picture([tmp_path / "run"], tmp_path / "alone.png")
    assert all((tmp_path / n).read_bytes()[:4] == b"\x89PNG" for n in ("picture.png", "alone.png"))
    write_events(tmp_path / "empty", "empty", [])
    with pytest.raises(RecordError, match="no training events"):
        draw_picture([tmp_path / "empty"], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


# ==== A BROWSER ===================================================================================
PROBE = """<script>addEventListener("load", () => {
const box = e => e.getBoundingClientRect(), visible = e => box(e).width > 0;
const all = q => [...document.querySelectorAll(q)];
const scale = e => e.ownerSVGElement
    ? box(e.ownerSVGElement).width / e.ownerSVGElement.viewBox.baseVal.width : 1;
const letter = e => parseFloat(getComputedStyle(e).fontSize) * scale(e);
parent.postMessage("probe:" + JSON.stringify({
    width: innerWidth, scroll: document.documentElement.scrollWidth,
    figures: all("figure").map(f => [...f.querySelectorAll("svg")].filter(visible)
        .map(s => [box(s).left, box(s).right, box(s).height])),
    letter: Math.min(...all("p,td,th,li,svg text").filter(visible).map(letter))
}) + ":probe", "*")})</script>"""


def test_a_browser_shows_every_figure_within_the_page(text, tmp_path):
    """Show the page in frames of both widths, since a window has a least width; in CSS pixels."""
    widths = (400, 1400)
    chromium = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if not chromium:
        pytest.skip("no chromium is installed")
    (tmp_path / "page.html").write_text(text.replace("</body>", PROBE + "</body>"))
    frames = "".join(
        f'<iframe src="page.html" style="width:{width}px;height:900px;border:0"></iframe>'
        for width in widths
    )
    (tmp_path / "frame.html").write_text(
        f"<script>onmessage = e => document.title += e.data</script>{frames}"
    )
    done = subprocess.run(
        [
            chromium,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--enable-logging=stderr",
            "--window-size=1600,1000",
            "--virtual-time-budget=3000",
            "--dump-dom",
            (tmp_path / "frame.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "CONSOLE" not in done.stderr
    probes = map(json.loads, re.findall(r"probe:(.*?):probe", html.unescape(done.stdout)))
    by_width = {probe["width"]: probe for probe in probes}
    assert set(by_width) == set(widths)
    for width, probe in by_width.items():
        assert probe["scroll"] <= width
        assert [len(boxes) for boxes in probe["figures"]] == [1] * len(FIGURES)
        for [(left, right, height)] in probe["figures"]:
            assert left >= 0 and right <= width and height > 100
        assert probe["letter"] >= 14
