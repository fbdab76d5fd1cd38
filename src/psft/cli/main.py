"""The `psft` command: finds the module of a command and turns what happens into an exit code.

0 done; 1 the run failed; 2 the request was wrong; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import io
import os
import sys
import traceback

import psft
from psft.errors import RequestError, RunFailed

COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("psft.cli.train", "fine-tune a model on demonstrations"),
    "dpo": ("psft.cli.dpo", "preference optimisation (DPO) on top of a fine-tuned model"),
    "grpo": ("psft.cli.grpo", "reinforcement learning (GRPO with all of DAPO) on top of a fine-tuned model"),
    "run": (
        "psft.cli.run",
        "run the stages of a pipeline: train, evaluate, GRPO or DPO, report; goes on where it stopped",
    ),
    "plan": ("psft.cli.plan", "dry run of train, dpo or grpo: settings, steps, data, memory and time, without weights"),
    "recipes": ("psft.cli.recipes", "list the recipes, or print one"),
    "report": ("psft.cli.report", "one-file HTML, figures and tables from run folders, also while a run goes on"),
    "eval": ("psft.cli.eval", "evaluate a model on benchmarks: avg@k, pass@k, maj@k with errors; resumable"),
    "grade": ("psft.cli.grade", "grade answers from anywhere: mathematics, multiple choice, instructions"),
    "quickstart": ("psft.cli.quickstart", "train the bundled small model on this machine and show before and after"),
}
"""Command -> its module and what it does. A table, so that listing the commands imports none of them."""


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"psft {psft.__version__}")
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        advice = f"Did you mean {close[0]}?" if close else f"Commands: {', '.join(COMMANDS)}."
        print(f"psft: error: unknown command {name!r}. {advice}", file=sys.stderr)
        return 2
    return _run(name, arguments[1:])


def _run(name: str, argv: list[str]) -> int:
    try:
        is_asked_for_help = bool({"-h", "--help"} & set(argv))
        code = (
            _print_help_page(name, argv) if is_asked_for_help else importlib.import_module(COMMANDS[name][0]).run(argv)
        )
        sys.stdout.flush()
        return int(code or 0)
    except RequestError as error:
        print(f"psft {name}: error: {error}", file=sys.stderr)
        return 2
    except RunFailed as error:
        print(f"psft {name}: failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"psft {name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `psft recipes | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
            return 1
        return int(stop.code or 0)
    except Exception:
        traceback.print_exc()
        return 1


def _print_help_page(name: str, argv: list[str]) -> int:
    """Print what `psft NAME --help` prints, as it was kept or by the command itself. Returns the exit code."""
    from psft.cli.help_pages import keep_page, kept_page

    page, code = kept_page(name), 0
    if page is None:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            try:
                code = int(importlib.import_module(COMMANDS[name][0]).run(argv) or 0)
            except SystemExit as stop:
                if stop.code:
                    raise
        page = printed.getvalue()
        if code == 0:
            keep_page(name, page)
    print(page, end="")
    return code


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: psft COMMAND [options]",
            "",
            "Proximal Supervised Fine-Tuning: fine-tune a language model on demonstrations without wrecking it.",
            "",
            *lines,
            "",
            "psft COMMAND --help lists the options of a command.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
