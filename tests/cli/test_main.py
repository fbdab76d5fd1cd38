"""Laws of the `psft` command: quick help, exit codes, one line for a wrong request."""

import subprocess
import sys
import time
import types

import pytest

import psft
from psft.cli import main as cli
from psft.errors import RequestError

HEAVY = ("torch", "transformers", "trl", "datasets", "numpy", "pandas", "pyarrow")


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_help_is_instant_and_lists_every_command():
    """Goes red if psft.cli.main imports a command or anything heavy. The goal is 0.3 s; a busy machine gets 2 s."""
    start = time.perf_counter()
    done = python("import sys; from psft.cli.main import main; sys.exit(main(['--help']))")
    elapsed = time.perf_counter() - start
    assert done.returncode == 0 and all(f"  {name} " in done.stdout for name in cli.COMMANDS), done.stderr
    assert elapsed < 2.0


@pytest.mark.parametrize(
    "module", ["psft", "psft.config", "psft.errors", "psft.runs", "psft.cli.main", "psft.cli.arguments"]
)
def test_light_modules_load_nothing_heavy(module):
    """Goes red if one of them imports torch, transformers, trl, ..."""
    done = python(f"import sys, {module}; print([name for name in {HEAVY!r} if name in sys.modules])")
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_no_arguments_print_the_help(capsys):
    """Goes red if an empty request runs a command."""
    assert cli.main([]) == 0
    assert capsys.readouterr().out.startswith("usage: psft COMMAND")


def test_version(capsys):
    """Goes red if the version is written in a second place."""
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"psft {psft.__version__}\n"


def test_an_unknown_command_names_the_nearest(capsys):
    """Goes red if difflib is dropped."""
    assert cli.main(["trian"]) == 2
    assert capsys.readouterr().err == "psft: error: unknown command 'trian'. Did you mean train?\n"


@pytest.mark.parametrize(
    ("outcome", "code", "message"),
    [
        (0, 0, ""),
        (None, 0, ""),
        (1, 1, ""),
        (RequestError("data.jsonl:3: bad. Fix it."), 2, "psft train: error: data.jsonl:3: bad. Fix it.\n"),
        (KeyboardInterrupt(), 130, "psft train: interrupted\n"),
        (SystemExit(0), 0, ""),
        (SystemExit(2), 2, ""),
        (ValueError("ours"), 1, "ValueError: ours\n"),
    ],
)
def test_what_happens_becomes_an_exit_code(monkeypatch, capsys, outcome, code, message):
    """Goes red if an `except` is dropped, or RequestError is caught as the ValueError it is."""

    def run(argv: list[str]) -> int | None:
        assert argv == ["--max_steps", "3"]
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    module = types.ModuleType("psft_test_command")
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "psft_test_command", module)
    monkeypatch.setitem(cli.COMMANDS, "train", ("psft_test_command", "test"))
    assert cli.main(["train", "--max_steps", "3"]) == code
    error = capsys.readouterr().err
    assert error.endswith(message) and ("Traceback" in error) == isinstance(outcome, ValueError) * (code == 1)


def test_commands_keep_their_line_of_help():
    """Goes red if a module of the table is missing, or lacks HELP or run."""
    import importlib

    for name, (module_name, text) in cli.COMMANDS.items():
        module = importlib.import_module(module_name)
        assert callable(module.run) and isinstance(module.HELP, str) and module.HELP, name
        assert text and "\n" not in module.HELP
