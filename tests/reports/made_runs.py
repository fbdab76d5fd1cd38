"""Run folders as a training run leaves them, synthesised: every file, numbers from a seed. No torch."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

from psft.runs import RunFolder
from psft.runs.rows import LOG_RATIO_EDGES

KINDS = ("all", "chat", "code")
MALICIOUS = "</script><script>document.title='run'</script>"


def run_json(
    path: Path, *, seed: int = 0, objective: str = "psft", epsilon: float = 0.28, **extra: Any
) -> dict[str, Any]:
    """What run.json holds, in the trainer's words."""
    settings = {"epsilon_high": epsilon} if objective == "psft" else {}
    command = ["/somewhere/bin/psft", "train", "quickstart", "--learning_rate", "1e-5", "--seed", str(seed)]
    return {
        "command": [*command, "--output_dir", str(path)],
        "started_at": "2026-01-02T03:04:05+00:00",
        "seed": seed,
        "objective": {"name": objective, "settings": settings},
        "config": {
            "learning_rate": 1e-5, "num_train_epochs": 4, "max_steps": -1, "seed": seed, "output_dir": str(path),
            "objective": objective, "train_batch_size": 32, "mini_batch_size": 4, **settings,
        },
        "warmup": None,
        "num_train_rows": 160,
        "world_size": 1,
        "data_reports": {"train": {"source": "made", "num_used": 158, "length_quantiles": {"p50": 120}}},
        "environment": {"versions": {"psft": "0.1.0"}, "git": {"commit": "abc1234", "modified": False}},
        **extra,
    }  # fmt: skip


def metrics_row(
    step: int, num_steps: int, noise: random.Random, *, epochs: int = 4, epsilon: float = 0.28
) -> dict[str, Any]:
    """A plausible row: NLL and entropy fall, the clip acts more the later in the window."""
    place = (step - 1) % 8 + 1
    clipped = 0.0 if place == 1 or math.isinf(epsilon) else max(0.0, 0.01 * place + noise.gauss(0, 0.003))
    counts = [noise.randrange(1, 900) for _ in range(len(LOG_RATIO_EDGES) + 1)]
    return {
        "step": step, "stage": "train", "window": (step - 1) // 8, "mini_batch": place, "num_mini_batches": 8,
        "epsilon_high": epsilon, "epoch": step / (num_steps / epochs), "tokens": noise.randrange(500, 900),
        "loss": -1 + noise.random() / 100, "nll": 0.5 + 0.8 * math.exp(-4 * step / num_steps) + noise.gauss(0, 0.02),
        "entropy": 0.6 + 0.4 * math.exp(-3 * step / num_steps) + noise.gauss(0, 0.02),
        "clip_fraction": clipped, "clippable_fraction": 0.6, "gradient_kept": 1 - clipped,
        "log_ratio_histogram": counts if place > 1 else [0] * 7 + [700] + [0] * 7,
        "log_ratio_abs_max": noise.random(), "grad_norm": math.exp(noise.gauss(0, 0.2)), "learning_rate": 1e-5,
        "tokens_per_second": 2000 + noise.random(), "peak_memory_bytes": 2**31,
    }  # fmt: skip


def make_run(
    path: Path,
    *,
    num_steps: int = 48,
    seed: int = 0,
    objective: str = "psft",
    epsilon: float = 0.28,
    epochs: int = 4,
    parts: tuple[str, ...] = ("heldout", "probe", "scores", "tax", "tokens", "summary"),
    change: Any = None,
    **extra: Any,
) -> RunFolder:
    """A run folder. parts: what else than run.json and metrics.jsonl it holds.

    change: (row of metrics.jsonl) -> the row to write. extra: entries of run.json.
    """
    noise = random.Random(seed)
    folder = RunFolder(path)
    folder.write_json("run.json", run_json(path, seed=seed, objective=objective, epsilon=epsilon, **extra))
    every = max(1, num_steps // 4)
    for step in range(num_steps + 1):
        if step % every == 0:
            for row in measured(step, num_steps, noise, parts):
                folder.append(row.pop("file"), row)
        if step:
            row = metrics_row(step, num_steps, noise, epochs=epochs, epsilon=epsilon)
            if objective != "psft":
                del row["epsilon_high"]  # and what has no ratio says null
                row |= {k: None for k in row if k.startswith(("clip", "log_ratio", "gradient_"))}
            folder.append("metrics.jsonl", row if change is None else change(row))
    if "tokens" in parts:
        write_clipped_tokens(folder, epochs, noise)
    if "summary" in parts:
        folder.write_json("summary.json", {"exit_reason": "finished", "steps": num_steps, "wall_time_s": 250.25})
    return folder


def measured(step: int, num_steps: int, noise: random.Random, parts: tuple[str, ...]) -> list[dict[str, Any]]:
    """Rows of eval.jsonl and probe.jsonl at one step; `file` says which."""
    rows: list[dict[str, Any]] = []

    def value(benchmark: str, metric: str, value: float, k: int | None = None) -> None:
        row = {"step": step, "benchmark": benchmark, "metric": metric, "k": k, "value": value, "n": 100}
        rows.append({"file": "eval.jsonl", **row, "stderr": 0.01 + noise.random() / 100})

    if "heldout" in parts:
        value("heldout", "nll", 0.6 + 0.5 * math.exp(-4 * step / num_steps) + noise.random() / 100)
        value("heldout", "entropy", 0.6 + 0.4 * math.exp(-3 * step / num_steps))
    if "scores" in parts:
        for name, k in (("aime24", 32), ("MATH-500", 8), ("gpqa", 8), ("ifeval", 8), ("my_benchmark", None)):
            value(name, "accuracy", noise.random(), k)
    if "tax" in parts and step in (0, num_steps):
        for name in ("gsm8k_cot", "mmlu_flan", "truthfulqa_mc1", "cmmlu", "gpqa_cot"):
            value(name, "acc", noise.random())
    if "probe" in parts:
        for kind in KINDS:
            drift = 0.02 * step / num_steps + noise.gauss(0, 0.001)
            rows.append({"file": "probe.jsonl", "step": step, "group": kind, "drift_nats_per_token": drift,
                         "stderr": 0.002, "entropy": 2.0, "tokens": 900, "prompts": 64})  # fmt: skip
    return rows


def write_clipped_tokens(folder: RunFolder, epochs: int, noise: random.Random, extra: tuple[str, ...] = ()) -> None:
    """clipped_tokens.parquet: `psft.runs.rows.ClippedTokenRow`, awkward tokens among them."""
    import pyarrow as pa
    import pyarrow.parquet

    words = (" wait", "alternatively", " ", "\n", "\t\u0007", "=1+1", "\u6570", 'a,b"c', MALICIOUS, *extra)
    rows = [
        {
            "epoch": epoch, "token_id": i, "token": word, "clipped": noise.randrange(0, 200), "seen": 200 + i,
            "contexts": [f"before \u27e6{word}\u27e7 after", f"<b>\u27e6{word}\u27e7"],
        }
        for epoch in range(1, epochs + 1)
        for i, word in enumerate(words)
    ]  # fmt: skip
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), folder.path / "clipped_tokens.parquet")
