"""Laws of the page: whole for every state of a run, nothing from a run folder becomes markup, nothing is fetched."""

import random
import re
import subprocess
import sys

import pytest
from reports.made_runs import MALICIOUS, make_run, write_clipped_tokens
from reports.read_page import Page

from psft.cli.main import COMMANDS
from psft.reports import palette, write_report
from psft.runs import RunFolder

ALWAYS = (
    "likelihood", "entropy", "drift", "gradient", "clip", "log_ratios", "clipped_tokens", "score_entropy",
    "out_of_domain", "alignment_tax", "epsilon_sweep", "reinforcement", "preference",
)  # fmt: skip
"""Figures that are on every page, drawn or with what to run to get them."""


def page(paths, out, **options):
    return Page(write_report([getattr(p, "path", p) for p in paths], out, images=False, **options).page)


def killed(path):
    folder = make_run(path, parts=("heldout", "probe"))
    file = path / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-30])
    return folder


STATES = {
    "empty": lambda path: path.mkdir() or RunFolder(path),
    "before the first step": lambda path: make_run(path, num_steps=0, parts=()),
    "one step": lambda path: make_run(path, num_steps=1, parts=()),
    "torn": killed,
    "nothing measured": lambda path: make_run(path, parts=()),
    "sft": lambda path: make_run(path, objective="sft"),
    "every value null": lambda path: make_run(path, change=lambda row: {"step": row["step"], "nll": None}),
    "no run.json": lambda path: (make_run(path).path / "run.json").unlink() or RunFolder(path),
    "whole": make_run,
}


@pytest.mark.parametrize("state", STATES)
def test_every_state_of_a_run_gives_a_whole_page(tmp_path, state):
    """Goes red if a builder raises on missing data, or leaves its place empty."""
    read = page([STATES[state](tmp_path / "run")], tmp_path / "out")
    shown = {attributes["id"].removeprefix("figure-") for attributes in read.having("figure")}
    assert set(ALWAYS) <= shown == set(read.data["figures"])
    for name in shown:
        figure = read.data["figures"][name]
        assert bool(figure["missing"]) != bool(figure["charts"] or figure["clouds"]), name
    assert len(read.having("svg", **{"class": "plot"})) == sum(len(f["charts"]) for f in read.data["figures"].values())
    assert read.html.rstrip().endswith("</html>") and not re.search(r' (d|x|y|x1|y1|width)="[^"]*(nan|inf)', read.html)


def test_torn_and_damaged_files_are_told_on_the_page(tmp_path):
    read = page([killed(tmp_path / "run")], tmp_path / "out")
    assert "metrics.jsonl ends in half a row" in read.text and "What could not be read" in read.text


def test_nothing_from_a_run_folder_becomes_markup(tmp_path):
    """Run names, tokens, contexts, settings, alerts, benchmarks, errors that try to be markup.

    Goes red if autoescape is off, a Markup is built by an f-string, or the JSON keeps its `<`.
    """
    path = tmp_path / "\"><img src=x onerror=alert(1)>'"
    folder = make_run(
        path,
        alerts=[{"step": 1, "name": "x", "message": MALICIOUS}],
        command=["psft", "train", MALICIOUS],
        model={"model_name_or_path": MALICIOUS, MALICIOUS: 1},
    )
    write_clipped_tokens(folder, 2, random.Random(0), extra=("<!--<script>", "]]>", "\u2028", "<b onclick=x>"))
    folder.append("eval.jsonl", {"step": 0, "benchmark": MALICIOUS, "metric": MALICIOUS, "value": 0.5})
    folder.append("eval.jsonl", {"step": 9, "benchmark": MALICIOUS, "metric": "nll", "value": 0.5})
    with open(path / "eval.jsonl", "a") as file:
        file.write('{"step": 9, "benchmark": "half a pair \\ud800", "metric": "accuracy", "value": 0.5}\n')
    folder.append("probe.jsonl", {"step": 0, "group": MALICIOUS, "drift_nats_per_token": 0.1, "stderr": 0.1})
    folder.write_json("summary.json", {"exit_reason": f"failed: {MALICIOUS}", "steps": 48})
    other = make_run(tmp_path / "other", objective="sft")
    for paths in ([folder], [folder, other]):
        read = page(paths, tmp_path / f"out{len(paths)}")
        assert len(read.scripts) == 2 and not read.having("img") and not read.having("b")
        assert not [name for _, attributes in read.tags for name in attributes if name.startswith("on")]
        assert read.text.count("document.title='run'") > 10  # it is shown, as text
        assert "<script" not in read.scripts[0] and "<!--" not in read.scripts[0]
        assert MALICIOUS in str(read.data)  # and the data is what it was


def test_the_page_fetches_nothing_and_runs_its_own_script_alone(tmp_path):
    """Goes red if a font, a style sheet or a script comes from elsewhere, or the policy lets one."""
    read = page([make_run(tmp_path / "run")], tmp_path / "out")
    (policy,) = read.having("meta", **{"http-equiv": "Content-Security-Policy"})
    assert "default-src 'none'" in policy["content"] and "'unsafe-inline'; script" in policy["content"]
    assert re.search(r"script-src 'sha256-[^']+'", policy["content"])
    for tag, attributes in read.tags:
        for name in ("src", "href", "action", "xlink:href"):
            target = attributes.get(name)
            assert target is None or target.startswith(("#", "figures/")), (tag, target)
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
    assert "url(" not in read.html and "@import" not in read.html


def test_every_chart_has_words_a_table_and_its_place_in_the_data(tmp_path):
    """Goes red if a plot has no text alternative, or its table is left out."""
    read = page([make_run(tmp_path / "a"), make_run(tmp_path / "b", objective="sft")], tmp_path / "out")
    assert read.having("html")[0]["lang"] == "en"
    plots = read.having("svg", **{"class": "plot"})
    assert len(plots) > 15
    for plot in plots:
        figure, _, place = plot["data-chart"].partition(":")
        chart = read.data["figures"][figure]["charts"][int(place)]
        assert plot["role"] == "img" and plot["tabindex"] == "0"
        assert plot["aria-label"].startswith(chart["title"])
        assert all(line["label"] in plot["aria-label"] for line in chart["lines"])
    tables = [t for t in read.having("details") if t.get("class") == "table" and "data-chart" in t]
    assert [t["data-chart"] for t in tables] == [p["data-chart"] for p in plots]
    levels = [int(tag[1]) for tag, _ in read.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False))


def test_ids_are_unique_and_links_lead_somewhere(tmp_path):
    """Goes red if two runs of one group share an anchor."""
    runs = [make_run(tmp_path / f"s{i}", seed=i, parts=("summary",)) for i in range(2)]
    read = page([*runs, make_run(tmp_path / "x", objective="sft", parts=())], tmp_path / "out")
    ids = [attributes["id"] for _, attributes in read.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = {a["href"] for tag, a in read.tags if tag in ("a", "use") and a.get("href", "").startswith("#")}
    assert len(links) > 10 and {link[1:] for link in links} <= set(ids)


def test_missing_data_says_what_to_run(tmp_path):
    """Goes red if a command is named that this version lacks, or a run's own command is not used."""
    folder = make_run(tmp_path / "run", parts=())
    without = page([folder], tmp_path / "a", commands=("train", "report")).data["figures"]
    assert "does not have yet" in without["score_entropy"]["missing"]["reason"]
    assert without["score_entropy"]["missing"]["command"] == ""
    having = page([folder], tmp_path / "b", commands=(*COMMANDS, "eval", "grpo", "dpo")).data["figures"]
    assert having["score_entropy"]["missing"]["command"] == f"psft eval {folder.path} --suite math"
    assert having["reinforcement"]["missing"]["command"].startswith("psft grpo")
    drift = having["drift"]["missing"]["command"]
    assert drift.startswith("psft train quickstart") and "--probe_every 50" in drift and "-probe" in drift
    sweep = having["epsilon_sweep"]["missing"]["command"]
    assert "--epsilon_high inf" in sweep


def test_a_run_that_goes_on_is_not_told_to_count_what_it_counts(tmp_path):
    """Goes red if a first epoch that is not over is taken for a setting that is off."""
    folder = make_run(tmp_path / "run", parts=())
    info = folder.read_json("run.json")
    folder.write_json("run.json", {**info, "config": {**info["config"], "track_clipped_tokens": True}})
    page = Page(write_report([folder.path], tmp_path / "out", images=False).page)
    assert "stand here once the first epoch, or the run, has ended" in page.text
    assert "--track_clipped_tokens" not in page.text


def test_what_has_no_ratio_is_not_called_unreadable(tmp_path):
    """Goes red if the nulls that sft records in place of a histogram are taken for damage."""
    folder = make_run(tmp_path / "run", objective="sft")
    assert '"log_ratio_histogram": null' in (folder.path / "metrics.jsonl").read_text()
    page = Page(write_report([folder.path], tmp_path / "out", images=False).page)
    assert "could not be read" not in page.text


def test_differences_between_runs_are_marked(tmp_path):
    """Goes red if a setting that one run lacks counts as shared."""
    runs = [make_run(tmp_path / "a", seed=1), make_run(tmp_path / "b", objective="sft", num_threads=2)]
    read = page(runs, tmp_path / "out")
    differing = read.data["settings"]["differing"]
    assert differing["objective.name"] == ["psft", "sft"] and differing["seed"] == ["1", "0"]
    assert differing["num_threads"] == ["\u2013", "2"] and "config.learning_rate" in read.data["settings"]["common"]
    assert len(read.having("mark")) >= 2 * len(differing)


def test_a_live_page_says_so_and_reads_itself_again(tmp_path):
    """Goes red if a finished run's page goes on reloading."""
    live = page([make_run(tmp_path / "a", parts=())], tmp_path / "out", refresh_s=5.0)
    assert live.data["refresh_s"] == 5 and "Live." in live.text and not (tmp_path / "out" / "tables").exists()
    ended = page([make_run(tmp_path / "b")], tmp_path / "out", refresh_s=5.0)
    assert ended.data["refresh_s"] is None and "Live." not in ended.text and (tmp_path / "out" / "tables").exists()


def test_colours_stand_out_from_the_page_light_and_dark():
    """3 : 1 at least, WCAG 2.2 1.4.11. Goes red if a colour is made paler."""
    for colours, ground in ((palette.COLOURS, palette.PAGE), (palette.DARK_COLOURS, palette.DARK_PAGE)):
        assert len(set(colours)) == len(colours) == 8
        assert min(palette.contrast(colour, ground) for colour in colours) >= 3
    assert palette.contrast("#000000", "#ffffff") == 21


def test_forty_settings_have_looks_of_their_own():
    """Goes red if colour, dash and marker change in step."""
    from psft.reports import svg

    assert len({(svg.classes(style), svg.marker(style)) for style in range(40)}) == 40
    assert len({svg.classes(style) for style in range(16)}) == 16


def test_reports_load_no_torch_and_start_without_matplotlib():
    """Goes red if a report imports a trainer, or matplotlib before it draws."""
    code = (
        "import sys, psft.reports, psft.reports.page, psft.reports.plot, psft.cli.report; "
        "print([m for m in ('torch', 'transformers', 'trl', 'matplotlib', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
