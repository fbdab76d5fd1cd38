"""What each command imports: the time until it answers is mostly that. Held by names, not by seconds."""

from __future__ import annotations

import gc
import json
import os
import resource
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest

import psft
from psft.cli import help_pages, main
from psft.cli.imports import without_collection

TRAINERS = {"trl.trainer.sft_trainer", "transformers.trainer", "datasets", "pandas"}
MODELS = {"peft", "sympy", "torch._dynamo", "transformers.modeling_utils"}
ACCIDENTS = {"sklearn", "scipy", "tensorboard", "IPython", "matplotlib", "wandb", "reasoning_gym"}


def imported(tmp_path: Path, *argv: str) -> tuple[set[str], str]:
    """Modules that `psft ARGV` has imported at its end, and what it printed; its cache is tmp_path / "cache"."""
    code = (
        "import json, sys; from psft.cli.main import main; code = main(sys.argv[2:]); "
        "json.dump(list(sys.modules), open(sys.argv[1], 'w')); sys.exit(code)"
    )
    out = tmp_path / "modules.json"
    source = str(Path(psft.__file__).parents[1])
    environment = {**os.environ, "PSFT_CACHE": str(tmp_path / "cache"), "PYTHONPATH": source}
    done = subprocess.run(
        [sys.executable, "-c", code, str(out), *argv], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(out.read_text())), done.stdout


def test_lists_of_commands_and_recipes_need_no_package(tmp_path):
    """Goes red if psft.cli.main, psft.config or the recipes import anything heavy, or the table imports its modules."""
    for argv in (["--help"], ["recipes"], ["recipes", "quickstart"], ["--version"]):
        modules, _ = imported(tmp_path, *argv)
        assert modules & ({"torch", "transformers", "trl", "numpy", "pyarrow"} | TRAINERS | ACCIDENTS) == set(), argv


def test_a_plan_imports_no_trainer(tmp_path, tiny_model_path):
    """It needs PSFTConfig, hence torch, TRL's configuration and what those bring. Goes red if psft.trainers brings the
    trainer with it, the data room `datasets`, or Arrow pandas (`pa.array`, `to_numpy`); if transformers brings models,
    PEFT or torch's compiler; or if demonstrations that were prepared before are generated again."""
    request = ["--model_name_or_path", str(tiny_model_path), "--dataset", "reasoning-gym:gsm_symbolic?size=8&seed=1"]
    modules, first = imported(tmp_path, "plan", *request)
    assert {"trl.trainer.sft_config", "reasoning_gym"} <= modules and modules & TRAINERS == set()
    modules, again = imported(tmp_path, "plan", *request)
    assert modules & (TRAINERS | MODELS | ACCIDENTS) == set()
    assert "8 of 8" in first and "prepared before" not in first
    assert f"prepared before  read from {tmp_path / 'cache' / 'prepared'}" in again


def test_the_help_of_a_command_is_made_once(tmp_path):
    """Goes red if a page is made again, or what is kept is another text than what was printed."""
    modules, page = imported(tmp_path, "train", "--help")
    assert "torch" in modules and "--epsilon_high" in page and "--learning_rate" in page
    modules, again = imported(tmp_path, "train", "--help")
    assert "torch" not in modules and "numpy" not in modules and again == page


def test_a_help_page_is_not_that_of_other_files_or_versions(tmp_path, monkeypatch):
    """Goes red if the page's name leaves out the files that declare the settings, or the versions; or if a page that
    is no longer of use stays."""
    monkeypatch.setenv("PSFT_CACHE", str(tmp_path))
    help_pages.keep_page("train", "old")
    assert help_pages.kept_page("train") == "old" and help_pages.kept_page("plan") is None
    with monkeypatch.context() as patch:
        patch.setattr(help_pages.importlib.metadata, "version", lambda name: "99")
        assert help_pages.kept_page("train") is None
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "settings.py").write_text("old")
    found = type("Spec", (), {"submodule_search_locations": [str(tmp_path / "package")]})
    monkeypatch.setattr(help_pages, "_DECLARED_IN", (("package", "*.py"),))
    monkeypatch.setattr(help_pages.importlib.util, "find_spec", lambda name: found)
    help_pages.keep_page("train", "new")
    assert help_pages.kept_page("train") == "new" and len(list((tmp_path / "help").iterdir())) == 1
    (tmp_path / "package" / "settings.py").write_text("other")
    assert help_pages.kept_page("train") is None


@pytest.mark.parametrize("code", [0, 2])
def test_only_the_page_of_a_command_that_went_well_is_kept(code, tmp_path, monkeypatch, capsys):
    """Goes red if half a page is kept, or a command's refusal turns into success the second time."""
    monkeypatch.setenv("PSFT_CACHE", str(tmp_path))
    module = SimpleNamespace(run=lambda argv: print("page") or code)
    monkeypatch.setattr(main.importlib, "import_module", lambda name: module)
    for _ in range(2):
        assert main.main(["report", "--help"]) == code
        assert capsys.readouterr().out == "page\n"
    assert (tmp_path / "help").exists() is (code == 0)


def test_settings_made_without_models_are_what_they_are_with_them():
    """In a process of its own. Goes red if a stand-in outlives its purpose: PEFT would be another one afterwards, a
    model of it not known for one, or Kubeflow's tracker left out of where it belongs."""
    code = """
        import os, sys
        from psft.cli.imports import without_models
        with without_models():
            from transformers import TrainingArguments
            plain = TrainingArguments("out", report_to="none")
        assert plain.report_to == [] and "peft" not in sys.modules and "sympy" not in sys.modules
        os.environ["KUBEFLOW_TRAINER_SERVER_URL"] = "https://somewhere"
        with without_models():
            assert TrainingArguments("out", report_to="none").report_to == ["kubeflow"]
        del os.environ["KUBEFLOW_TRAINER_SERVER_URL"]
        from transformers import integrations, trainer_utils
        assert integrations.is_kubeflow_available is integrations.integration_utils.is_kubeflow_available
        from peft import PeftMixedModel, PeftModel
        for kind in (PeftModel, PeftMixedModel):
            assert trainer_utils._is_peft_model(kind.__new__(kind))
            assert trainer_utils.PeftModel is not PeftModel
        assert not trainer_utils._is_peft_model(plain)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_garbage_is_collected_again_after_imports():
    """Goes red if it stays off, after an error too, or is switched on where somebody has it off."""
    with pytest.raises(ValueError, match="x"), without_collection():
        assert not gc.isenabled()
        raise ValueError("x")
    assert gc.isenabled()
    gc.disable()
    try:
        with without_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.slow
def test_commands_answer_in_time(tmp_path):
    """Processor seconds, as other work on the machine would count in the clock's. The goals are 0.3 s and 5 s; each
    gets twice as much. Goes red if a command imports what it does not need."""

    def seconds(*argv: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        imported(tmp_path, *argv)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert seconds("--help") < 0.6
    seconds("plan", "quickstart")  # compiles what was never imported
    for recipe in ("quickstart", "math-qwen2.5-7b-psft"):
        assert seconds("plan", recipe) < 10
    seconds("train", "--help")
    assert seconds("train", "--help") < 0.6
