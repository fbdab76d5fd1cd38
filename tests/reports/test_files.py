"""The files beside the page: images where matplotlib is installed, tables, and nothing left of an earlier report."""

import csv

import pytest
from reports.made_runs import make_run
from reports.read_page import Page

from psft.errors import RequestError
from psft.reports import write_report
from psft.reports.tables import file_name


def test_images_are_whole_files_that_the_page_links(tmp_path):
    """Goes red if a figure with data has no image, or the page links one that is not there."""
    pytest.importorskip("matplotlib")
    run = make_run(tmp_path / "a", epochs=2, parts=("tokens", "tax"))
    written = write_report([run.path], tmp_path / "out")
    read = Page(written.page)
    links = [a["href"] for a in read.having("a") if a["href"].startswith("figures/")]
    with_data = [name for name, figure in read.data["figures"].items() if figure["charts"] or figure["clouds"]]
    assert sorted(links) == sorted(f"figures/{name}.{ending}" for name in with_data for ending in ("png", "pdf"))
    for link in links:
        raw = (tmp_path / "out" / link).read_bytes()
        assert raw.startswith(b"\x89PNG") and b"IEND" in raw[-12:] if link.endswith("png") else raw.startswith(b"%PDF")
        assert len(raw) > 3000


def test_without_matplotlib_the_page_is_whole_and_links_no_image(tmp_path, monkeypatch, capsys):
    """Goes red if matplotlib is needed for the page, or its absence is not said."""
    from psft.cli.main import main

    monkeypatch.setattr("psft.reports.plot.importlib.util.find_spec", lambda name: None)
    folder = make_run(tmp_path / "run")
    assert main(["report", str(folder.path), "--out", str(tmp_path / "out")]) == 0
    assert "pip install 'psft[report]'" in capsys.readouterr().err
    assert not (tmp_path / "out" / "figures").exists()
    assert not [a for a in Page(tmp_path / "out" / "index.html").having("a") if a["href"].startswith("figures/")]


def test_runs_of_awkward_names_get_files_of_their_own(tmp_path):
    """Goes red if two names fold into one file, or a name leaves the folder."""
    names = ["a b", "a_b", "A_b", "..", "\u6570"]
    paths = [
        make_run(tmp_path / "runs" / f"{i}" / name, num_steps=4, parts=()).path
        for i, name in enumerate(names)
        if name != ".."
    ]
    write_report(paths, tmp_path / "out", images=False)
    files = sorted(path.name.lower() for path in (tmp_path / "out" / "tables" / "metrics").iterdir())
    assert len(set(files)) == len(paths) == 4
    assert file_name("..") == "run" and file_name("../x/..") == "x" and "/" not in file_name("/etc/passwd")


def test_a_second_report_leaves_nothing_of_the_first(tmp_path):
    """Goes red if tables of runs that are no longer there stay; files of the user's own must."""
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b", parts=())
    write_report([first.path], tmp_path / "out", images=False)
    own = tmp_path / "out" / "tables" / "mine.csv"
    own.write_text("keep")
    write_report([second.path], tmp_path / "out", images=False)
    left = sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out" / "tables").rglob("*.csv"))
    assert left == ["tables/figures/clip.csv", "tables/figures/log_ratios.csv", "tables/metrics/b.csv",
                    "tables/mine.csv", "tables/runs.csv"]  # fmt: skip


def test_the_table_of_runs_has_the_verdict_and_its_numbers(tmp_path):
    folder = make_run(tmp_path / "run")
    write_report([folder.path], tmp_path / "out", images=False)
    with open(tmp_path / "out" / "tables" / "runs.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    last = [r["value"] for r in folder.read_rows("eval.jsonl") if r["metric"] == "nll"][-1]
    assert row["run"] == "run" and row["learned"] == "yes" and float(row["learned_last"]) == last and row["seed"] == "0"


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    """Goes red if the error of the file system reaches the person."""
    folder = make_run(tmp_path / "run", num_steps=1, parts=())
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="--out"):
        write_report([folder.path], tmp_path / "file" / "out", images=False)
