"""Draw the README's pictures: docs/pipeline.svg and docs/compression.svg.

    .venv/bin/python bench/pictures.py

The second one plots bench/results/compress.txt. Both are plain SVG that follows the reader's light
or dark theme.
"""

from __future__ import annotations

import json
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STYLE = """
  text { font-family: -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328 }
  .soft { fill: #59636e } .mono { font-family: ui-monospace, Menlo, Consolas, monospace }
  .box { fill: #f6f8fa; stroke: #8c959f } .file { fill: #ddf4ff; stroke: #54aeff }
  .line { stroke: #6e7781; fill: none } .grid { stroke: #d1d9e0 } .tip { fill: #6e7781 }
  .ours { fill: #0969da } .alone { fill: #8250df } .other { fill: #9a6700 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .soft { fill: #9198a1 }
    .box { fill: #161b22; stroke: #6e7681 } .file { fill: #0c2d6b; stroke: #388bfd }
    .line { stroke: #8b949e } .grid { stroke: #30363d } .tip { fill: #8b949e }
    .ours { fill: #58a6ff } .alone { fill: #bc8cff } .other { fill: #d29922 }
  }
"""


def svg(width: int, height: int, title: str, parts: list[str]) -> str:
    """Return one SVG document; `title` is what a screen reader says."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" role="img" aria-label="{escape(title)}">',
            f"<style>{STYLE}</style>",
            *parts,
            "</svg>\n",
        ]
    )


def label(x: float, y: float, text: str, size: int = 13, kind: str = "", at: str = "middle") -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{at}" class="{kind}">'
        f"{escape(text)}</text>"
    )


# ==== THE PIPELINE ================================================================================
# Boxes are programs, blue boxes the files between them; the lower row uses an artifact.
PROGRAMS = [
    ("data/", "text to shards"),
    ("train_gpt.py", "or train_gpt_mlx.py"),
    ("eval_final.py", "score, certificate"),
    ("fairway pack", "check, table, pr"),
]
FILES = [("shards", "tokens"), ("artifact", "≤ 16,000,000 B with code"), ("eval/", "score.json")]
BRANCHES = [
    ("fairway compress", "any file to bits and back"),
    ("fairway generate", "text"),
    ("fairway export-coreml", "Neural Engine"),
    ("build_correction_table.py", "a diagnosis, no score"),
]


def box(x: float, y: float, width: float, name: str, note: str, kind: str) -> list[str]:
    middle = x + width / 2
    return [
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="46" rx="6" class="{kind}"/>',
        label(middle, y + 20, name, 13, "mono"),
        label(middle, y + 37, note, 11, "soft"),
    ]


def arrow(points: list[tuple[float, float]]) -> list[str]:
    """Return a line through `points` with a tip at its end, which points right or down."""
    path = " ".join(f"{x:g},{y:g}" for x, y in points)
    (x, y), down = points[-1], points[-1][0] == points[-2][0]
    tip = (
        [(x, y), (x - 4, y - 7), (x + 4, y - 7)]
        if down
        else [(x, y), (x - 7, y - 4), (x - 7, y + 4)]
    )
    corners = " ".join(f"{a:g},{b:g}" for a, b in tip)
    return [
        f'<polyline points="{path}" class="line"/>',
        f'<polygon points="{corners}" class="tip"/>',
    ]


def pipeline() -> str:
    program, file, gap, top, low = 128.0, 100.0, 17.0, 18.0, 138.0
    widths = [program, file, program, 160.0, program, file, program]
    names = [PROGRAMS[0], FILES[0], PROGRAMS[1], FILES[1], PROGRAMS[2], FILES[2], PROGRAMS[3]]
    parts, x, artifact = [], 8.0, 0.0
    for i, (width, (name, note)) in enumerate(zip(widths, names, strict=True)):
        parts += box(x, top, width, name, note, "file" if i % 2 else "box")
        if i == 3:
            artifact = x + width / 2
        if i + 1 < len(widths):
            parts += arrow([(x + width, top + 23), (x + width + gap, top + 23)])
        x += width + gap
    total = x - gap + 8
    width, space = 212.0, (total - 16 - 4 * 212.0) / 3
    parts.append(
        f'<polyline points="{artifact:g},{top + 46:g} {artifact:g},{low - 37:g}" class="line"/>'
    )
    for i, (name, note) in enumerate(BRANCHES):
        left = 8 + i * (width + space)
        parts += arrow(
            [(artifact, low - 37), (left + width / 2, low - 37), (left + width / 2, low)]
        )
        parts += box(left, low, width, name, note, "box")
    title = (
        "text, shards, training, artifact, score, record; the artifact also compresses and writes"
    )
    return svg(round(total), round(low + 46 + 12), title, parts)


# ==== BITS PER BYTE, AGAINST OTHER COMPRESSORS ====================================================
TEXTS = (
    "presidential addresses (kind it was trained on)",
    "challenge's validation text",
    "web text",
    "WikiText-2",
)
LEFT, SCALE, LOW, HIGH = 270, 190, 1.4, 3.6


def compression(results: str) -> str:
    """Return a row of dots for each text: one for each compressor, ours in colour."""
    texts = json.loads(results.strip().splitlines()[-1])["texts"]
    place = lambda bits: LEFT + SCALE * (bits - LOW)  # noqa: E731  a scale, used six times
    bottom, parts = 76 + 58 * len(texts), []
    for tick in range(int(LOW * 2 + 1), int(HIGH * 2) + 1):
        x = place(tick / 2)
        parts.append(f'<line x1="{x:g}" y1="46" x2="{x:g}" y2="{bottom:g}" class="grid"/>')
        parts.append(label(x, bottom + 16, f"{tick / 2:g}", 11, "soft"))
    for row, (text, name) in enumerate(zip(texts, TEXTS, strict=True)):
        y = 82 + 58 * row
        parts.append(label(LEFT - 14, y + 4, name, 12, "", "end"))
        for result in text["rows"]:
            ours = result["name"].startswith("ours")
            kind = "other" if not ours else "ours" if "experts" in result["name"] else "alone"
            x = place(result["bits_per_byte"])
            parts.append(f'<circle cx="{x:.1f}" cy="{y}" r="{6 if ours else 4}" class="{kind}"/>')
            if ours or result["name"].split()[0] in ("gzip", "xz", "PPMd,"):
                word = {"ours": "ours", "alone": "model alone"}.get(
                    kind, result["name"].split()[0].strip(",")
                )
                side = "end" if kind == "ours" else "start" if ours else "middle"
                nudge = {"end": 6, "start": -6, "middle": 0}[side]
                parts.append(label(x + nudge, y - 11 if ours else y + 19, word, 10, "soft", side))
    parts.append(label(LEFT - 14, bottom + 16, "bits per byte, lower is better", 11, "soft", "end"))
    head = "About 620,000 bytes of text, compressed and decoded; the model itself is not counted"
    parts.append(label(16, 26, head, 14, "", "start"))
    return svg(760, bottom + 30, head, parts)


def main() -> None:
    results = (ROOT / "bench/results/compress.txt").read_text(encoding="utf-8")
    for name, text in (("pipeline", pipeline()), ("compression", compression(results))):
        path = ROOT / "docs" / f"{name}.svg"
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
