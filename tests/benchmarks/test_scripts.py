"""Every script once, on a tiny model: that each line runs and that the files hold what the tables need."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks import generation, gpu, head, memory, prologue, startup, steps, sweeps, tables, train_step
from benchmarks.harness import Spread, check_results, read_results
from benchmarks.quick import faster_dtype, largest_fitting

HEADLINE = {"psft_over_sft", "sft_over_trl_sft", "psft_over_trl_sft", "sft_over_plain_hf", "peak_memory_over_plain_hf"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


def test_quick_writes_the_five_ratios(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is measured in this process here. Goes red if a ratio is renamed or left out, or if equality is not
    checked."""
    monkeypatch.setattr(steps, "measure_apart", memory.measure)
    path = folder / "quick" / "q.json"
    arguments = ["--quick", "--tiny", "--out", str(path), "--repetitions", "1", "--dtype", "float32"]
    assert train_step.main([*arguments, "--batch-size", "2"]) == 0
    content = json.loads(path.read_text())
    assert set(check_results(content)["ratios"]) == HEADLINE
    assert len(content["equality"]) == 4
    assert all(value > 0 and math.isfinite(value) for value in content["ratios"].values())
    assert content["memory"]["psft"]["batch_size"] == 8
    assert str(Path.home()) not in path.read_text() and str(folder) not in path.read_text()


def test_peak_memory_is_that_since_it_was_reset() -> None:
    """192 MiB are taken before and 48 MiB after: more than 32 MiB, so glibc never serves them from what it kept. Goes
    red if the peak is that of the whole life of the process."""
    taken = torch.ones(192 << 18)
    del taken
    if not memory.reset_peak():
        pytest.skip("this system cannot set a process's peak back")
    before = memory.resident_bytes()
    assert before is not None
    again = torch.ones(48 << 18)
    assert 40 << 20 < memory.peak_bytes() - before < 96 << 20
    del again


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own() -> None:
    """Goes red if the script cannot run by itself, or prints anything after its result."""
    measured = memory.measure_apart("psft_k2", batch_size=4, dtype="float32", is_tiny=True)
    assert measured["arm"] == "psft_k2" and measured["peak_bytes"] > measured["weights_bytes"]
    with pytest.raises(RuntimeError, match="no-such"):
        memory.measure_apart("no-such", batch_size=4, dtype="float32", is_tiny=True)


def test_the_command_is_shown_without_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Goes red if results would publish the folders of the machine they were made on."""
    monkeypatch.setattr("sys.argv", ["/home/me/benchmarks/train_step.py", "--out", "/home/me/q.json", "--seed", "1"])
    assert prologue.command_shown() == "python train_step.py --out q.json --seed 1"


def test_quick_needs_a_file() -> None:
    """Goes red if it runs for three minutes and then has nowhere to write."""
    with pytest.raises(SystemExit):
        train_step.main(["--quick"])


def test_the_size_of_a_mini_batch_follows_from_the_time_left() -> None:
    """3.5 repetitions of 9.5 steps of 8 rows at 0.1 s a row take 26.6 s. Goes red if the size is not lowered."""
    assert largest_fitting(0.1, 27.0) == 8
    assert largest_fitting(0.1, 26.0) == 6
    assert largest_fitting(10.0, 1.0) == 2
    assert faster_dtype({"float32": 200.0, "bfloat16": 400.0}) == "bfloat16"
    assert faster_dtype({"float32": 250.0, "bfloat16": 180.0}) == "float32"


@pytest.mark.slow
def test_steps_and_overheads_and_k_sweep(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goes red if a suite writes another file than the tables look for. Memory is left to the test above."""
    taken = {"peak_bytes": 2**30, "resident_before_bytes": 2**29}
    monkeypatch.setattr(train_step, "memory_ratio", lambda *_, **__: ({"psft": taken, "hf": taken}, Spread.of([1.0])))
    common = ["--tiny", "--out", str(folder), "--repetitions", "1", "--discard", "0", "--dtype", "float32"]
    assert train_step.main([*common, "--suite", "steps", "--batch-size", "8", "--arms", "hf", "sft", "gem"]) == 0
    assert train_step.main([*common, "--suite", "overheads", "--batch-size", "4"]) == 0
    assert train_step.main([*common, "--suite", "k_sweep"]) == 0
    found = tables.load(folder)
    assert set(found["k_sweep"]["ratios"]) == {f"psft_k{k}" for k in (1, 2, 4, 8, 16)}
    assert found["overheads"]["ratios"]["trainer_over_bare_loop"] > 0
    assert tables.shown_spread(found["steps-8-float32"]["ratio_spreads"]["sft_over_plain_hf"]) in tables.headline(found)
    assert "psft, `gem`" in tables.steps(found)
    assert "| float32, batch 8 | 1.00 | 0.50 | 1.00 | 0.50 | 1.00 |" in tables.memory(found)
    assert "measured" in tables.overheads(found) and tables.NOT_MEASURED not in tables.overheads(found)


def test_head_on_small_tensors(folder: Path) -> None:
    """Goes red if a head gives another loss or gradient than plain logits, or scores unscored positions."""
    arguments = ["--tokens", "128", "--vocab", "300", "--hidden", "16", "--repetitions", "1", "--memory-tokens", "64"]
    assert head.main([*arguments, "--out", str(folder), "--dtype", "bfloat16", "--no-memory"]) == 0
    content = read_results(folder / "head-bfloat16.json")
    assert content["bf16_errors"]["trl_compact"]["gradient_error"] > 0
    assert content["samples"]["trl_compact"][0]["details"]["trained_tokens"] == round(0.387 * 128)
    assert "liger" in content["settings"]["skipped"] or "liger" in content["summary"]
    assert "TRL kernel, scored rows" in tables.head(tables.load(folder))


def test_memory_of_a_head_grows_with_the_rows_where_logits_do() -> None:
    """8192 rows of 1024 words: logits, their softmax and their gradient are 34 MB each. Goes red if the gradient of the
    hidden states, 67 MB here, is not taken off, or if the peak is that of something before."""
    torch.ones(256 << 18).sum()  # 256 MiB, gone before the pass
    measured = head.memory_of("plain_all", head.Sizes(8192, 1.0, 1024, 2048), "float32")
    assert measured["hidden_gradient_bytes"] == 4 * 2048 * 8192
    logits = 4 * 8192 * 1024
    assert 0.5 * logits < measured["beyond_bytes"] < 2 * logits


@pytest.mark.slow
def test_sweeps(folder: Path) -> None:
    """Goes red if a point is left out of the table."""
    assert sweeps.main(["--tiny", "--out", str(folder), "--repetitions", "1", "--dtype", "float32"]) == 0
    assert len(read_results(folder / "sweeps.json")["points"]) == len(sweeps.TINY_POINTS)
    assert "| 128 | 512 | 50% |" in tables.sweeps(tables.load(folder))


def test_generation(folder: Path, tiny_model_path: Path) -> None:
    """Goes red if arms answer other requests, if the table looks for another file, or a ratio is turned over."""
    arguments = ["--model", str(tiny_model_path), "--answers", "5", "--max-tokens", "6", "--batch-sizes", "3"]
    assert generation.main([*arguments, "--out", str(folder / "generation.json"), "--repetitions", "1"]) == 0
    content = read_results(folder / "generation.json")
    (one,), (three,) = (content["samples"][name] for name in ("batch_1", "batch_3"))
    assert 5 <= one["details"]["answer_tokens"] <= 30 and 5 <= three["details"]["answer_tokens"] <= 30
    assert content["ratios"] == {"batch_3_over_one": pytest.approx(one["seconds"] / three["seconds"])}
    assert f"| 1 | {1 / one['seconds']:.1f} [" in tables.generation({"generation": content})


@pytest.mark.parametrize("checkpointing", ["off", pytest.param("on", marks=pytest.mark.slow)])
def test_gpu_dry_run(folder: Path, checkpointing: str) -> None:
    """All arms. Goes red if an arm is not what its family says, or if the file has another name than the table looks
    for."""
    arguments = ["--dry-run", "--out", str(folder), "--shape", gpu.SHAPES[0], "--repetitions", "1"]
    assert gpu.main([*arguments, "--checkpointing", checkpointing]) == 0
    content = read_results(folder / f"dry-Qwen2.5-0.5B-Instruct-checkpointing-{checkpointing}.json")
    assert content["settings"]["gradient_checkpointing"] == (checkpointing == "on")
    assert {"psft_over_sft", "sft_over_trl_sft_padding_free"} <= set(content["ratios"])
    as_gpu = {f"gpu-Qwen2.5-0.5B-Instruct-checkpointing-{checkpointing}": content}
    assert "psft, `psft`, K = 8, padding-free" in tables.gpu(as_gpu)


def test_gpu_refuses_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Goes red if it begins on a CPU with the real shapes."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "--dry-run" in capsys.readouterr().err


def test_page_is_what_the_results_make_it() -> None:
    """Goes red if a figure of docs/performance.md was typed by hand, or results were committed without the page."""
    assert tables.main(["--check"]) == 0


def test_a_table_is_replaced_and_the_text_around_it_is_not() -> None:
    """Goes red if a marker is lost, or an unknown one passes."""
    page = "before\n" + "".join(f"<!-- table: {name} -->\nold\n<!-- end -->\n" for name in tables.TABLES) + "after\n"
    new = tables.rewritten(page, {})
    assert new.startswith("before\n") and new.endswith("after\n") and "old" not in new
    assert tables.NOT_MEASURED in new
    assert tables.rewritten(new, {}) == new
    with pytest.raises(ValueError, match="tables without a marker"):
        tables.rewritten("<!-- table: steps -->\n<!-- end -->\n", {})
    with pytest.raises(ValueError, match=r"markers without a table: \['no-such'\]"):
        tables.rewritten(f"{page}<!-- table: no-such -->\n<!-- end -->\n", {})


def test_starts_are_timed_until_what_they_wait_for(tmp_path: Path) -> None:
    """Goes red if a process that fails counts as one that is done, the clock does not stop at the file, or the table
    cannot be made of the results."""
    path = tmp_path / "startup.json"
    assert startup.main(["--out", str(path), "--repetitions", "1", "--only", "help"]) == 0
    content = read_results(path)
    (block,) = content["samples"]["help"]
    assert 0 < block["details"]["processor_s"] and 0 < block["seconds"]
    assert "`psft --help` | ≤ 0.3 | 0." in tables.startup({"startup": content})
    with pytest.raises(RuntimeError, match="plan no-such-recipe: exit code 2: .*no-such-recipe"):
        startup.time_start(startup.Start(("plan", "no-such-recipe")), tmp_path)
    with pytest.raises(RuntimeError, match="exit code 0"):
        startup.time_start(startup.Start(("--help",), until="run.json"), tmp_path)


@pytest.mark.slow
def test_training_is_timed_until_it_begins_and_until_its_first_step(tmp_path: Path, tiny_model_path: Path) -> None:
    """Goes red if a recipe's flags are not taken, or the two moments are one."""
    request = ["--model_name_or_path", str(tiny_model_path), "--dataset", "reasoning-gym:gsm_symbolic?size=64&seed=1"]
    found = {name: startup.time_start(startup.starts(request)[name], tmp_path) for name in startup.starts(request)}
    assert 0 < found["plan"].seconds and 0 < found["train_ready"].details["processor_s"]
    assert found["train_ready"].details["processor_s"] < found["train_first_step"].details["processor_s"]
