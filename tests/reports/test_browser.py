"""The page in a real browser, opened from disk: no console message, all figures, legible on a phone and on a desk.

Needs Chromium (Debian, Ubuntu: apt-get install chromium); skipped where there is none.
"""

from __future__ import annotations

import html
import json
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from reports.made_results import write_results
from reports.made_runs import MALICIOUS, make_run, write_clipped_tokens
from reports.test_page import ALWAYS, killed

from psft.reports import write_report
from psft.reports.benchmarks import IN_DOMAIN, OUT_OF_DOMAIN
from psft.runs import RunFolder

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
WIDTHS = (390, 1440)
PAGES = ("one", "overlaid", "seeds and sweep", "scored", "empty", "torn", "malicious")
HARNESS = Path(__file__).with_name("harness.js")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium"),
]


def chromium(target: str, profile: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Chromium without a window; --dump-dom and --screenshot end it by themselves."""
    assert CHROMIUM is not None
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync",
             "--no-first-run", "--disable-dev-shm-usage", f"--user-data-dir={profile}"]  # fmt: skip
    words = [CHROMIUM, *quiet, *options, target]
    return subprocess.run(words, capture_output=True, text=True, timeout=240, encoding="utf-8", errors="replace")


def build(root: Path) -> dict[str, Path]:
    """A page for each name of `PAGES`."""
    one = make_run(root / "one", num_steps=160)
    sft = make_run(root / "sft", num_steps=160, objective="sft")
    seeds = [make_run(root / f"seed{i}", num_steps=48, seed=i) for i in range(3)]
    bounds = [make_run(root / f"eps{e}", epsilon=e) for e in (0.1, float("inf"))]
    (root / "empty").mkdir()
    bad = make_run(root / 'bad"><img src=x onerror="document.title=\'run\'">', model={MALICIOUS: MALICIOUS})
    write_clipped_tokens(bad, 2, random.Random(0), extra=("<svg onload=document.title='run'>",))
    write_results(bad.path / "evaluation" / "m.json", {"amc": 0.5}, model=MALICIOUS, step=0)
    scored = [make_run(root / f"scored{i}", num_steps=48, seed=i) for i in range(2)]
    skills = dict.fromkeys((*IN_DOMAIN, *OUT_OF_DOMAIN), 0.5)
    for i, run in enumerate(scored):
        write_results(run.path / "evaluation" / "final" / "m.json", skills, step=48, seed=i)
    base = write_results(root / "base.json", dict.fromkeys(skills, 0.2))
    bad.append("eval.jsonl", {"step": 1, "benchmark": MALICIOUS, "metric": "accuracy", "value": 0.5, "stderr": 0.1})
    runs = {
        "one": [one],
        "overlaid": [one, sft],
        "seeds and sweep": [*seeds, *bounds],
        "scored": scored,
        "empty": [RunFolder(root / "empty")],
        "torn": [killed(root / "torn")],
        "malicious": [bad],
    }
    pages = {}
    for i, name in enumerate(PAGES):
        bases = [str(base)] if name == "scored" else []
        pages[name] = write_report([run.path for run in runs[name]], root / f"page{i}", images=False, bases=bases).page
    return pages


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What the browser saw: (page, width) -> findings of harness.js; and what it wrote on its console."""
    root = tmp_path_factory.mktemp("browser")
    pages = build(root)
    cases = [{"name": name, "url": page.as_uri(), "width": width} for name, page in pages.items() for width in WIDTHS]
    harness = root / "harness.html"
    embedded = json.dumps(cases).replace("<", "\\u003c")
    harness.write_text(
        f'<!doctype html><script type="application/json" id="cases">{embedded}</script><pre id="found"></pre>'
        f"<script>{HARNESS.read_text(encoding='utf-8')}</script>",
        encoding="utf-8",
    )
    options = ["--allow-file-access-from-files", "--virtual-time-budget=60000", "--enable-logging=stderr", "--dump-dom"]
    done = chromium(harness.as_uri(), root / "profile", *options)
    match = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert match is not None and match[1], done.stderr[-2000:]
    found = json.loads(html.unescape(match[1]))
    assert isinstance(found, list), found
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return {(item["name"], item["width"]): item for item in found}, console


every_page = pytest.mark.parametrize(("name", "width"), [(name, width) for name in PAGES for width in WIDTHS])


def test_the_console_stays_empty(seen):
    """Goes red if the script throws, or something offends against the page's own policy: an injected script would."""
    assert seen[1] == []


@every_page
def test_every_figure_is_there_and_drawn(seen, name, width):
    """Goes red if a plot has no height or nothing in it."""
    item = seen[0][name, width]
    assert set(ALWAYS) <= set(item["figures"]) and item["flat"] == []
    assert item["plots"] >= {"empty": 0, "torn": 10}.get(name, 20)


@every_page
def test_nothing_runs_over_the_edge(seen, name, width):
    """Goes red if a table or a long command is wider than the page, closed or with every part opened."""
    item = seen[0][name, width]
    assert item["width"] == width and item["overflow"] == 0 and item["overflowOpen"] == 0 and item["outside"] == []


@every_page
def test_text_is_legible(seen, name, width):
    """12 px at least, and no label of an axis over its neighbour. Goes red if charts are scaled like pictures."""
    item = seen[0][name, width]
    assert item["small"] == [] and item["clashes"] == []


@every_page
def test_values_can_be_read_off_every_plot(seen, name, width):
    """The pointer brings up values inside the window, and every plotted point can be had as a table row."""
    item = seen[0][name, width]
    assert item["tips"] == item["plots"] and item["rows"] >= 2 * item["plots"]


def test_what_tries_to_run_does_not(seen):
    """Goes red if escaping and the content security policy are both gone."""
    titles = {item["title"] for item in seen[0].values()}
    assert "run" not in titles and all(title.startswith("psft report") for title in titles)


def test_a_live_page_reads_itself_again(tmp_path):
    """Counts how often a frame loads in five seconds of the browser's clock. Goes red if the page never reloads."""
    loads = {}
    for name, parts in (("live", ()), ("ended", ("summary",))):
        folder = make_run(tmp_path / name, num_steps=8, parts=parts)
        page = write_report([folder.path], tmp_path / f"page-{name}", refresh_s=1.0, images=False).page
        harness = tmp_path / f"{name}.html"
        harness.write_text(
            f"<!doctype html><pre id=found>0</pre><iframe src='{page.as_uri()}' "
            "onload='found.textContent = Number(found.textContent) + 1'></iframe>"
        )
        done = chromium(harness.as_uri(), tmp_path / "profile", "--virtual-time-budget=5500", "--dump-dom")
        match = re.search(r'<pre id="found">(\d+)</pre>', done.stdout)
        assert match is not None, done.stderr[-2000:]
        loads[name] = int(match[1])
    assert loads["ended"] == 1 and loads["live"] >= 3
