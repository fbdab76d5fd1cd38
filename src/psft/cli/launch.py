"""Many processes: `psft train ... --num_processes N --accelerate KIND` starts N ranks of itself under accelerate.

    psft train ... --num_processes 2     the launcher: `start`. It trains nothing; it waits, hands signals on to its
                                         ranks, and ends with their exit code
      psft train ...   rank 0            the same command again: `run_rank`. It prints, and writes the run folder
      psft train ...   rank 1            silent

The first rank that fails says why, and it alone; accelerate then ends the others, within 30 s where one is stuck in a
collective operation. A rank whose launcher has gone ends itself, so that none writes into the folder of a later run.
"""

from __future__ import annotations

import atexit
import contextlib
import difflib
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from psft.accelerate import KINDS, config_file
from psft.config import SAME_SIGNAL_S, LaunchArguments
from psft.errors import RequestError, RunFailed, lost_a_peer, shown
from psft.machine import LOCAL_RANK, physical_cores

FOLDER = "PSFT_LAUNCH_FOLDER"
"""Environment variable of the ranks: a folder in which they tell their launcher how they ended."""
_FAILURE, _STOPPED = "failure.json", "stopped.json"
_LOST_PEER_S = 5.0  # a rank that lost another waits this long for that one's own reason


@dataclass(frozen=True)
class Launch:
    """A launch that this machine can do. num_processes: ranks over all machines. config: of accelerate."""

    num_processes: int
    config: Path
    on_cpu: bool


@dataclass(kw_only=True)
class _Peeked(LaunchArguments):
    use_cpu: bool = False


def requested(argv: Sequence[str], *, command: str = "train") -> Launch | None:
    """The launch that flags or recipe ask for; None where this process is to train alone, or is a rank already.

    Anything that is wrong with other settings, or with the recipe, is left for the command itself to report.

    Raises:
        RequestError: a launch that this machine cannot do, or inside a job that something else has launched.
    """
    if os.environ.get(FOLDER) or "-h" in argv or "--help" in argv:
        return None
    asked = _peek(argv, command)
    number, kind = asked.num_processes, asked.accelerate
    if number is None and kind is None:
        return None
    rank = next((name for name in LOCAL_RANK if name in os.environ), None)
    if rank is not None:
        what = " and ".join(name for name, value in (("num_processes", number), ("accelerate", kind)) if value)
        raise RequestError(
            f"{what} would start processes, and this is one of a job that is launched already ({rank} is set). "
            f"Leave {what} out here, or start psft {command} without torchrun, accelerate or mpirun."
        )
    if number is not None and number < 1:
        raise RequestError(f"num_processes={number} must be 1 or more.")
    if kind is None and number == 1:
        return None
    kind = kind or "ddp"
    if kind not in KINDS:
        return _from_file(kind, number, on_cpu=asked.use_cpu)
    devices, device_name = _devices()
    on_cpu = asked.use_cpu or devices == 0
    if kind.startswith("zero"):
        _check_deepspeed(kind, on_cpu=on_cpu)
    if number is None:
        if on_cpu:
            raise RequestError(
                f"accelerate={kind} starts one process for each accelerator, and "
                + ("use_cpu leaves them out" if devices else "this machine has none")
                + ". Say how many with --num_processes."
            )
        number = devices
    elif not on_cpu and number > devices:
        raise RequestError(
            f"num_processes={number}, and this machine has {devices} {device_name} device{'s' * (devices > 1)}: each "
            f"process needs its own. Give --num_processes {devices}, or train on the CPU with --use_cpu."
        )
    if kind == "ddp" and number == 1:
        return None
    return Launch(number, config_file(kind), on_cpu)


def _peek(argv: Sequence[str], command: str) -> _Peeked:
    """What flags and recipe say about the launch alone. Flags win."""
    from psft.cli.arguments import collect_settings, parse_request
    from psft.cli.values import convert
    from psft.recipes import load_recipe

    settings = collect_settings([_Peeked])
    given: dict[str, Any] = {}
    if argv and not argv[0].startswith("-"):
        with contextlib.suppress(ValueError):  # RequestError too: reading it in earnest says what is wrong and where
            recipe = load_recipe(argv[0])
            given = {name: convert(recipe[name], settings[name].hint) for name in settings if name in recipe}
    flags, is_ours = [], False
    for token in argv:
        if token.startswith("--"):
            is_ours = token[2:].partition("=")[0].replace("-", "_").removeprefix("no_") in settings
        if is_ours:
            flags.append(token)
    return _Peeked(**{**given, **parse_request(flags, [_Peeked], command=command)[_Peeked]})


def _from_file(name: str, number: int | None, *, on_cpu: bool) -> Launch:
    """A launch by the person's own configuration file."""
    path = Path(name).expanduser()
    is_file_name = name.endswith((".yaml", ".yml", ".json")) or os.sep in name
    if not is_file_name:
        close = difflib.get_close_matches(name.lower(), KINDS, n=1, cutoff=0.5)
        raise RequestError(
            f"accelerate={shown(name, 80)} is none of {', '.join(KINDS)}, nor a FILE.yaml."
            + (f" Did you mean {close[0]}?" if close else "")
        )
    if not path.is_file():
        raise RequestError(
            f"accelerate={shown(name)}: no such file. Check the path, or use one of {', '.join(KINDS)}; "
            "accelerate config --config_file FILE.yaml asks its way to a file."
        )
    from accelerate.commands.config import load_config_from_file

    try:
        config: Any = load_config_from_file(str(path))
        kind, in_file = str(config.distributed_type.value), int(getattr(config, "num_processes", 0))
    except Exception as error:  # whatever YAML, accelerate or its dataclasses make of a file that is something else
        raise RequestError(
            f"accelerate={shown(name)} is no configuration of accelerate: {shown(error)}. Correct it; "
            "accelerate config --config_file FILE.yaml asks its way to one."
        ) from error
    number = number or in_file
    if number < 1:
        raise RequestError(f"accelerate={shown(name)} does not say num_processes. Give --num_processes.")
    if number > 1 and kind in ("NO", "MULTI_CPU"):
        raise RequestError(
            f"accelerate={shown(name)} has distributed_type {kind}, by which accelerate starts one process, not "
            f"{number}. Set it to MULTI_GPU (on a CPU, too) or use --accelerate ddp."
        )
    on_cpu = on_cpu or bool(config.use_cpu) or _devices()[0] == 0
    if kind == "DEEPSPEED":
        _check_deepspeed(shown(name), on_cpu=on_cpu)
    return Launch(number, path, on_cpu)


def _devices() -> tuple[int, str]:
    """How many accelerators this machine has, and what torch calls them."""
    import torch

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return (torch.accelerator.device_count(), found.type.upper()) if found is not None else (0, "CPU")


def _check_deepspeed(name: str, *, on_cpu: bool) -> None:
    from importlib.util import find_spec

    if find_spec("deepspeed") is None:
        raise RequestError(
            f"accelerate={name} needs DeepSpeed, which is not installed. Install it: pip install deepspeed; or use "
            "--accelerate fsdp2, which cuts the model up in the same way."
        )
    if on_cpu and os.environ.get("DS_ACCELERATOR") != "cpu":
        raise RequestError(
            f"accelerate={name} needs an accelerator, and this run has none. On a CPU use ddp or fsdp2, or set "
            "DS_ACCELERATOR=cpu for DeepSpeed's own support of it."
        )


def start(launch: Launch, arguments: Sequence[str]) -> int:
    """Start the ranks, each as `python -m psft.cli.main` with `arguments`; wait for them; return the exit code.

    Raises:
        RunFailed: a rank ended without a word of its own: killed, or crashed outside Python.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    signals = _Signals()
    with tempfile.TemporaryDirectory(prefix="psft-launch-") as temporary:
        folder = Path(temporary)
        options = ["--config_file", str(launch.config), "--num_processes", str(launch.num_processes)]
        options += ["--num_cpu_threads_per_process", str(_threads(launch))]
        asked = launch_command_parser().parse_args([*options, "--module", "psft.cli.main", *arguments])
        # Not SIGINT and SIGTERM: torchrun would send them to the workers that read data, too, and then soon SIGKILL
        asked.signals_to_handle = "SIGHUP,SIGQUIT"
        try:
            with _environment(folder, launch), signals.handed_on(), _without_noise():
                launch_command(asked)
        except ChildFailedError as error:
            return _exit_code(folder, signals.number, error)
        except SignalException as error:
            return 128 + error.sigval
        stopped = _read(folder / _STOPPED)
        return 0 if stopped is None else int(stopped["code"])


def _exit_code(folder: Path, stop: int | None, error: Any) -> int:
    told = _read(folder / _FAILURE)
    if stop is not None and (told is None or told["is_lost_peer"]):
        return 128 + stop  # before they could stop as they should, or because of a second signal
    # A rank that was ended by accelerate, as another had failed, dies of SIGTERM: not the first cause.
    died = {rank: f for rank, f in error.failures.items() if f.exitcode < 0 and f.exitcode != -signal.SIGTERM}
    if told is not None and not (told["is_lost_peer"] and died):
        return int(told["code"])
    rank, failure = min((died or error.failures).items(), key=lambda item: item[1].timestamp)
    how = f"ended with exit code {failure.exitcode}"
    if failure.exitcode < 0:
        how = f"was killed by {signal.Signals(-failure.exitcode).name}"
        how += " (a machine that runs out of memory does that)" if failure.exitcode == -signal.SIGKILL else ""
    raise RunFailed(
        f"rank {rank} {how}, and the other ranks were ended. Complete checkpoints are as they were: go on with "
        "--resume."
    )


class _Signals:
    """Ctrl-C and SIGTERM on their way from the launcher to its ranks. number: the first that came, or None.

    The ranks sit in sessions of their own, where a terminal's Ctrl-C does not reach them. A second signal kills them.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._first_at = 0.0

    @contextlib.contextmanager
    def handed_on(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._received) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _received(self, number: int, frame: FrameType | None) -> None:
        import psutil  # a dependency of accelerate

        ranks = psutil.Process().children()
        if self.number is None:
            self.number, self._first_at = number, time.monotonic()
            if not ranks:
                raise SystemExit(128 + number)
            for rank in ranks:
                with contextlib.suppress(psutil.Error):
                    rank.send_signal(number)
        elif time.monotonic() - self._first_at > SAME_SIGNAL_S:
            for rank in ranks:
                _kill(rank.pid)


def _kill(process: int) -> None:
    """Kill a process, and with it its group if it leads one: the workers that read data for a rank."""
    with contextlib.suppress(OSError):
        if os.getpgid(process) == process:
            os.killpg(process, signal.SIGKILL)
        else:
            os.kill(process, signal.SIGKILL)


@contextlib.contextmanager
def _environment(folder: Path, launch: Launch) -> Iterator[None]:
    before = dict(os.environ)
    os.environ[FOLDER] = str(folder)
    if launch.on_cpu and os.environ.get("DS_ACCELERATOR") != "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _without_noise() -> Iterator[None]:
    """The ranks say what there is to say; torchrun's account of how it ended them is left out."""
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _threads(launch: Launch) -> int:
    if os.environ.get("OMP_NUM_THREADS", "").isdigit():
        return int(os.environ["OMP_NUM_THREADS"])
    return max(physical_cores() // launch.num_processes, 1) if launch.on_cpu else 1


def run_rank(body: Callable[[], int]) -> int:
    """Run a command's body, in a rank of a launch with what that takes; elsewhere as it is. Returns the exit code.

    In a rank: an exception is passed on if this rank is the first to fail, else the rank ends in silence. A code of the
    body, a stop by signal, goes to the launcher, and the rank ends with 0, so that the others may finish, too.
    """
    named, rank = os.environ.get(FOLDER), int(os.environ.get("RANK") or 0)
    if rank:
        _be_quiet()
    if not named:
        return body()
    folder = Path(named)
    _follow(os.getppid())
    try:
        code = body()
    except BaseException as error:
        code = _code_of(error)
        if code:
            # Not through the interpreter's end, where a process group that lost a member may wait for it
            atexit.register(_leave, code)
        if code and not _is_first(folder, rank, code, error):
            raise SystemExit(code) from None
        if code == 1 and not isinstance(error, (RunFailed, SystemExit)):
            print(f"\npsft: rank {rank} of {os.environ.get('WORLD_SIZE', '?')} failed:", file=sys.stderr)
        raise
    if code and not rank:
        with contextlib.suppress(OSError):  # launcher and folder may be gone
            (folder / _STOPPED).write_text(json.dumps({"code": code}), encoding="utf-8")
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


def _code_of(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 2 if isinstance(error, RequestError) else 130 if isinstance(error, KeyboardInterrupt) else 1


def _leave(code: int) -> None:
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _is_first(folder: Path, rank: int, code: int, error: BaseException) -> bool:
    """Whether no rank has failed before this one; the first one's code is written down for the launcher."""
    is_lost_peer = lost_a_peer(error)
    if is_lost_peer:
        end = time.monotonic() + _LOST_PEER_S
        while time.monotonic() < end and not (folder / _FAILURE).exists():
            time.sleep(0.1)
    try:
        with (folder / _FAILURE).open("x", encoding="utf-8") as file:  # of two ranks one gets to make it
            json.dump({"rank": rank, "code": code, "is_lost_peer": is_lost_peer}, file)
    except FileExistsError:
        return False
    except OSError:
        pass  # launcher and folder are gone
    return True


def _follow(launcher: int) -> None:
    """End this rank soon after its launcher: nobody would collect it, and a resumed run would meet its writing."""

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(1.0)
        os.write(2, b"psft: the launcher is gone, so this rank ends. Complete checkpoints are as they were.\n")
        _kill(os.getpid())

    threading.Thread(target=watch, daemon=True).start()


def _be_quiet() -> None:
    """Leave progress, tables, news and warnings to rank 0; errors are still told."""
    os.environ["TQDM_DISABLE"] = "1"
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return dict(content)
