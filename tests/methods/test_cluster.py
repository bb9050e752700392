"""Cells through a local Ray cluster of two machines, one of which is lost on the way."""

import pytest

from fairway.cli import main
from fairway.methods import harness
from fairway.methods.cell import Spec
from fairway.methods.cluster import run_on_cluster
from fairway.methods.comparison import make_rows, read_cells
from fairway.methods.subject import named


def figures(out) -> list[str]:
    """Return what a table shows and no clock decides; as text, in which NaN equals NaN."""
    cells = read_cells(next((out / "raw").iterdir()))
    return [f"{r.method} {r.status} {r.bytes} {r.bpb} {r.at_equal_bytes}" for r in make_rows(cells)]


@pytest.mark.slow
def test_a_cluster_that_loses_a_machine_gives_the_same_table(subject_file, corpus, tmp_path):
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    common = ["compare", "--model", str(subject_file), "--data", str(corpus.folder)]
    common += ["--val-tokens", "200", "--methods", "fp32,int6-rms,int4-rms,int4-g32", "--audit"]
    assert main([*common, "--out", str(tmp_path / "here"), "--workers", "2"]) == 0
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    lost = cluster.add_node(num_cpus=1)
    lines: list[str] = []
    out = tmp_path / "there" / "raw" / named(subject_file)
    spec = Spec(str(subject_file), "", 0, str(corpus.folder), str(out), 200)
    cells = harness.cells_of(spec, ["fp32", "int6-rms", "int4-rms", "int4-g32"])

    def report(line: str) -> None:
        lines.append(line)
        if len(lines) == 1:
            cluster.remove_node(lost, allow_graceful=False)

    try:
        jobs = [harness.job_of(cell) for cell in cells]
        run_on_cluster(jobs, cluster.address, 2, harness.Reporter(report))
    finally:
        cluster.shutdown()
    assert len(lines) == 4
    assert figures(tmp_path / "there") == figures(tmp_path / "here")
    assert main([*common, "--out", str(tmp_path / "there")]) == 0  # nothing left to run


def test_a_cluster_that_is_not_there_is_one_line(subject_file, corpus, tmp_path, capsys):
    """Without Ray, the line names the file that installs it."""
    arguments = ["compare", "--model", str(subject_file), "--data", str(corpus.folder)]
    arguments += ["--out", str(tmp_path), "--cluster", "127.0.0.1:1"]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert "--cluster" in error and error.count("\n") == 1
    assert "ray start --head" in error or "requirements-methods.txt" in error
