"""The commands of README, docs/objectives.md and docs/telemetry.md, and the example, run on the tiny model."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from psft.cli.main import main
from psft.objectives import objective_names

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8")
TELEMETRY = (ROOT / "docs" / "telemetry.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(
    r"^    (?:PYTHONPATH=\. |\.venv/bin/)?(psft (?:train|plan) quickstart .*)$", PAGE + README + TELEMETRY, re.MULTILINE
)
EXAMPLE = re.search(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_documented_command_runs(command, tiny_model_path, tmp_path, monkeypatch, capsys):
    """Goes red if a documented flag, setting or module:function is not what the code takes."""
    assert EXAMPLE is not None
    (tmp_path / "my_objective.py").write_text(EXAMPLE.group(1))
    monkeypatch.syspath_prepend(tmp_path)  # PYTHONPATH=.
    monkeypatch.delitem(sys.modules, "my_objective", raising=False)
    data = tmp_path / "data.jsonl"
    data.write_text(
        "".join(json.dumps({"question": f"1 + {n}?", "answer": f"It is {n + 1}."}) + "\n" for n in range(8))
    )
    words = [
        str(tiny_model_path) if word == "smollm2-135m-instruct" else word
        for word in shlex.split(command, comments=True)[1:]
    ]
    small = [
        "--model_name_or_path", str(tiny_model_path), "--dataset", str(data), "--eval_dataset", f"held={data}",
        "--train_batch_size", "4", "--mini_batch_size", "2", "--max_steps", "4", "--bf16", "false",
        "--output_dir", str(tmp_path / "run"),
    ]  # fmt: skip
    monkeypatch.setenv("PSFT_CACHE", str(tmp_path / "cache"))
    assert main([*words, *small]) == 0
    if words[0] == "train":
        assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 4
    else:
        assert "a frozen copy stays in memory" in capsys.readouterr().out


def test_the_pages_have_commands():
    """Goes red if the pattern above finds none, so that nothing is tested."""
    assert len(COMMANDS) >= 10 and any("my_objective:focal_loss" in command for command in COMMANDS)


def test_every_fault_has_a_test_of_that_name():
    """Goes red if a row of docs/reliability.md names a test that is not there, or none."""
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    table = page.partition("## Faults")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][2:]
    assert len(rows) > 20
    for row in rows:
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", row)
        assert named, row
        for path, name in named:
            assert f"\ndef {name}(" in (ROOT / "tests" / path).read_text(encoding="utf-8"), (path, name)


@pytest.mark.parametrize("name", objective_names())
def test_every_objective_has_its_section_and_its_defaults(name):
    """Goes red if an objective is added, or a default changed, without the page."""
    from psft.objectives import resolve_objective, setting_names

    section = re.search(rf"^### {name}\n(.*?)(?=^##)", PAGE, re.MULTILINE | re.DOTALL)
    assert section is not None and f"| `{name}`" in PAGE
    defaults = dict(resolve_objective(name, {}).settings)
    for setting in setting_names(name):
        (line,) = [line for line in section.group(1).splitlines() if line.startswith(f"| `{setting}`")]
        if setting in defaults:
            value = defaults[setting]
            assert (f"{value:g}" if isinstance(value, float) else str(value)) in line.split("|")[2]
