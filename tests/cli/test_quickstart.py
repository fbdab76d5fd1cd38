"""`psft quickstart` from beginning to end, on the tiny model."""

from __future__ import annotations

from psft.cli import quickstart
from psft.cli.main import main


def test_it_ends_with_the_path_of_its_report(tiny_model_path, tmp_path, monkeypatch, capsys):
    """Goes red if no page is written, if another is named, or if the probe has not measured the last step."""
    monkeypatch.setattr(quickstart, "NUM_PROBLEMS", 2)
    monkeypatch.setattr(quickstart, "MAX_NEW_TOKENS", 4)
    task = "reasoning-gym:gsm_symbolic"
    arguments = [
        "--model_name_or_path", str(tiny_model_path), "--dataset", f"{task}?size=8&seed=0",
        "--eval_dataset", f"heldout={task}?size=2&seed=9", "--output_dir", str(tmp_path / "run"), "--max_steps", "4",
        "--train_batch_size", "4", "--mini_batch_size", "2", "--bf16", "false", "--disable_tqdm", "true",
    ]  # fmt: skip
    assert main(["quickstart", *arguments]) == 0
    page = tmp_path / "run" / "report" / "index.html"
    said = capsys.readouterr().out
    assert f"as a page: {page}" in said and "held-out NLL" in said
    text = page.read_text(encoding="utf-8")
    assert "drift" in text and "</html>" in text
    assert '"step": 4' in (tmp_path / "run" / "probe.jsonl").read_text()
