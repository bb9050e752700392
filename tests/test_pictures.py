"""The README's pictures are what bench/pictures.py draws from the committed results."""

import xml.etree.ElementTree as ET

from conftest import ROOT

from bench import pictures


def test_the_pictures_are_up_to_date_and_well_formed():
    results = (ROOT / "bench/results/compress.txt").read_text(encoding="utf-8")
    drawn = {"pipeline": pictures.pipeline(), "compression": pictures.compression(results)}
    for name, text in drawn.items():
        assert (ROOT / f"docs/{name}.svg").read_text(encoding="utf-8") == text, name
        assert ET.fromstring(text).tag.endswith("svg")
