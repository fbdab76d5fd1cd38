"""One pinned loss series per objective: a tiny model, two windows of four steps, float64 weights.

`loss_series.json` holds the numbers with the versions and the machine that made them. They are recorded anew by

    PSFT_RECORD_GOLDEN=1 python -m pytest tests/golden

in a commit of its own that says why they changed.
"""

import json
import os
import platform
from pathlib import Path

import pytest
import torch
import transformers
import trl
from forms import FORMS, needs_cache

SERIES = Path(__file__).with_name("loss_series.json")
IS_RECORDING = bool(os.environ.get("PSFT_RECORD_GOLDEN"))


@pytest.mark.parametrize("form", FORMS)
def test_the_losses_are_those_recorded(form, make_trainer, make_tiny_model, tmp_path):
    """Goes red if anything between a row and the optimizer changes a number: order, mask, window, loss, schedule."""
    cache = {"ref_cache_dir": str(tmp_path / "cache")} if needs_cache(form) else {}
    trainer = make_trainer(
        "golden", model=make_tiny_model().double(), objective=form.split("-")[0], learning_rate=1e-2, weight_decay=0.1,
        lr_scheduler_type="cosine", warmup_steps=2, **cache, **FORMS[form],
    )  # fmt: skip
    trainer.train()
    rows = [json.loads(line) for line in (Path(trainer.args.output_dir) / "metrics.jsonl").open()]
    losses = [row["loss"] for row in rows]
    if IS_RECORDING:
        record(form, losses)
    recorded = json.loads(SERIES.read_text())["losses"][form]
    assert losses == pytest.approx(recorded, rel=2e-5, abs=1e-6)


def record(form, losses):
    held = json.loads(SERIES.read_text()) if SERIES.exists() else {"losses": {}}
    made_by = {
        "torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__,
        "python": platform.python_version(), "processor": platform.processor() or platform.machine(),
    }  # fmt: skip
    known = {name: series for name, series in held["losses"].items() if name in FORMS}
    series = {**known, form: losses}
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(series[name])}" for name in FORMS if name in series)
    SERIES.write_text(f'{{"made_by": {json.dumps(made_by)},\n "losses": {{\n{lines}\n}}}}\n')
