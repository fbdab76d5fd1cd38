"""`psft train --num_processes N --accelerate KIND`: which launches are refused, and how real ones begin and end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from psft.accelerate import KINDS, config_file
from psft.cli import launch as launching
from psft.cli.main import main
from psft.errors import RequestError

pytestmark = pytest.mark.slow  # starts whole jobs of several processes

OBJECTIVE = """
import os, signal, time, torch

def gives_up(logps, completion_mask, *, normalizer, at=0, how="raise", _count=[0]):
    _count[0] += 1
    if _count[0] == at and torch.distributed.get_rank() == 1:
        if how == "raise":
            raise ValueError("the objective of rank 1 gives up")
        os.kill(os.getpid(), signal.SIGKILL)
    return -torch.where(completion_mask, logps, 0.0).sum() / normalizer

def slow(logps, completion_mask, *, normalizer, seconds=0.5):
    time.sleep(seconds)
    return -torch.where(completion_mask, logps, 0.0).sum() / normalizer
"""


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """A machine without accelerators, outside of any job."""
    for name in (*launching._LAUNCHED, launching.FOLDER, "RANK", "DS_ACCELERATOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(launching, "_devices", lambda: (0, "CPU"))


# What is asked for


@pytest.mark.parametrize("argv", [[], ["quickstart"], ["--num_processes", "1"], ["--help", "--num_processes", "2"]])
def test_without_a_launch_this_process_trains(argv):
    assert launching.requested(argv) is None


def test_one_process_with_a_copy_of_its_own_is_this_one():
    assert launching.requested(["--accelerate", "ddp", "--num_processes", "1"]) is None
    sharded = launching.requested(["--accelerate", "fsdp2", "--num_processes", "1"])
    assert sharded is not None and sharded.num_processes == 1


@pytest.mark.parametrize(
    "argv",
    [
        ["--num_processes", "2", "--accelerate", "fsdp2"],
        ["quickstart", "--lr", "1", "--num-processes=2", "--eval_dataset", "a", "b", "--accelerate=fsdp2"],
        ["two.yaml"],
        ["four.yaml", "--num_processes", "2"],
    ],
)
def test_a_launch_is_read_from_flags_and_recipe_and_flags_win(argv, tmp_path, monkeypatch):
    """Goes red if a setting of another kind stops the reading, or the recipe is passed over."""
    monkeypatch.chdir(tmp_path)
    Path("two.yaml").write_text("num_processes: 2\naccelerate: fsdp2\nobjective: sft\n")
    Path("four.yaml").write_text("num_processes: 4\naccelerate: fsdp2\nno_such_setting: 3\n")
    launch = launching.requested(argv)
    assert launch == launching.Launch(2, config_file("fsdp2"), on_cpu=True)


def test_processes_alone_each_hold_the_whole_model():
    assert launching.requested(["--num_processes", "2"]).config == config_file("ddp")


def test_a_kind_alone_starts_one_process_for_each_accelerator(monkeypatch):
    monkeypatch.setattr(launching, "_devices", lambda: (4, "CUDA"))
    assert launching.requested(["--accelerate", "fsdp2"]) == launching.Launch(4, config_file("fsdp2"), on_cpu=False)


def test_a_rank_starts_no_ranks(monkeypatch, tmp_path):
    """Goes red if ranks launch again, without end."""
    monkeypatch.setenv(launching.FOLDER, str(tmp_path))
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert launching.requested(["--num_processes", "2"]) is None


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num_processes", "0"], "num_processes=0 must be 1 or more"),
        (["--num_processes", "two"], "--num_processes: 'two' does not fit; expected a whole number"),
        (["--num_processes", "2", "--accelerate", "fspd2"], "none of ddp, fsdp2, zero2, zero3.*Did you mean fsdp2"),
        (["--num_processes", "2", "--accelerate", "mine.yaml"], "mine.yaml: no such file.*accelerate config"),
        (["--num_processes", "2", "--accelerate", "recipe.yaml"], "recipe.yaml is no configuration of accelerate"),
        (["--num_processes", "2", "--accelerate", "torn.yaml"], "torn.yaml is no configuration of accelerate"),
        (["--num_processes", "2", "--accelerate", "single.yaml"], "distributed_type NO.*one process, not 2"),
        (["--accelerate", "many.yaml"], "does not say num_processes. Give --num_processes"),
        (["--accelerate", "fsdp2"], "this machine has none. Say how many with --num_processes"),
    ],
)
def test_a_launch_that_cannot_be_is_refused_with_the_way_out(argv, message, tmp_path, monkeypatch, capsys):
    """Goes red if anything but one message and exit code 2 comes of it, or if processes are started first."""
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text("objective: sft\n")
    Path("torn.yaml").write_text("distributed_type: [\n")
    Path("single.yaml").write_text("distributed_type: 'NO'\n")
    Path("many.yaml").write_text("distributed_type: MULTI_GPU\n")
    monkeypatch.setattr(launching, "start", lambda *_: pytest.fail("started"))
    assert main(["train", *argv]) == 2
    error = capsys.readouterr().err
    with pytest.raises(RequestError, match=f"(?s){message}"):
        launching.requested(argv)
    assert error.startswith("psft train: error: ") and error.count("\n") == 1


def test_more_processes_than_accelerators_are_refused(monkeypatch):
    monkeypatch.setattr(launching, "_devices", lambda: (1, "CUDA"))
    with pytest.raises(RequestError, match="this machine has 1 CUDA device: .*--num_processes 1.*--use_cpu"):
        launching.requested(["--num_processes", "2"])
    assert launching.requested(["--num_processes", "2", "--use_cpu"]).on_cpu


@pytest.mark.parametrize("name", ["LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"])
def test_inside_a_launched_job_a_launch_is_refused(monkeypatch, name):
    """Goes red if each of torchrun's processes would start processes of its own."""
    monkeypatch.setenv(name, "0")
    with pytest.raises(RequestError, match=f"num_processes would start processes.*{name} is set.*Leave num_processes"):
        launching.requested(["--num_processes", "2"])
    assert launching.requested(["--lr", "1"]) is None


def test_deepspeed_is_asked_for_by_name_where_it_is_missing(monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "deepspeed" else find(name))
    with pytest.raises(RequestError, match="zero2 needs DeepSpeed.*pip install deepspeed.*fsdp2"):
        launching.requested(["--num_processes", "2", "--accelerate", "zero2"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(RequestError, match="zero3 needs an accelerator.*On a CPU use ddp or fsdp2"):
        launching.requested(["--num_processes", "2", "--accelerate", "zero3"])


def test_the_plan_knows_the_settings_of_a_launch(capsys):
    """Goes red if a recipe that trains cannot be planned."""
    assert main(["plan", "quickstart", "--num_processes", "4", "--accelerate", "fsdp2"]) == 0
    shown = capsys.readouterr().out
    assert "num_processes" in shown and "fsdp2" in shown
    assert main(["plan", "quickstart", "--num_processes", "3"]) == 2
    assert "cannot be shared by 3 ranks" in capsys.readouterr().err


# The files that are shipped


@pytest.mark.parametrize("kind", KINDS)
def test_accelerate_reads_every_file(kind):
    """Goes red if a key is not accelerate's, or a file switches mixed precision on over the run's own setting."""
    from accelerate.commands.config import load_config_from_file

    config = load_config_from_file(str(config_file(kind)))
    assert config.mixed_precision == "no" and config.num_machines == 1 and config.main_process_port == 0
    expected = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    assert config.distributed_type.value == expected[kind]


def test_fsdp2_cuts_layer_by_layer_and_writes_whole_checkpoints(monkeypatch):
    """Goes red if accelerate's plugin makes something else of the file: FSDP1, shards on disk, all in one piece."""
    from accelerate.utils import FullyShardedDataParallelPlugin

    for name, value in _environment_of("fsdp2").items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True and plugin.cpu_ram_efficient_loading
    assert "FULL_STATE_DICT" in str(plugin.state_dict_type) and "transformer" in str(plugin.auto_wrap_policy)


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_leaves_sizes_to_the_run(monkeypatch, stage):
    """The configuration as DeepSpeed would get it; accelerate makes it without DeepSpeed.

    Goes red if the stage is another, or a batch size, a clip or an accumulation is fixed that the trainer fills in.
    """
    from accelerate.utils import DeepSpeedPlugin

    for name, value in _environment_of(f"zero{stage}").items():
        monkeypatch.setenv(name, value)
    config = DeepSpeedPlugin().deepspeed_config
    zero = config["zero_optimization"]
    assert zero["stage"] == stage and zero["stage3_gather_16bit_weights_on_model_save"] is (stage == 3)
    sizes = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"
    assert [config[name] for name in sizes] == ["auto"] * 4


def _environment_of(kind):
    """The variables by which `accelerate launch` tells its ranks what the file says."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    options = ["--config_file", str(config_file(kind)), "--num_processes", "2", "--num_cpu_threads_per_process", "1"]
    arguments, defaults, _ = _validate_launch_command(launch_command_parser().parse_args([*options, "script.py"]))
    if kind == "fsdp2":
        return {name: value for name, value in prepare_multi_gpu_env(arguments).items() if name.startswith("FSDP_")}
    arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    return {n: v for n, v in prepare_deepspeed_cmd_env(arguments)[1].items() if n.startswith("ACCELERATE_")}


# Real launches: two ranks, gloo


@pytest.fixture
def start(tiny_model_path, demonstrations, tiny_tokenizer, tmp_path):
    """start(*flags) -> a running `psft train` of two ranks on the tiny model, into tmp_path/run."""
    data = tmp_path / "rows.jsonl"
    with data.open("w") as lines:
        for row in demonstrations:
            begin = row["labels"].index(next(label for label in row["labels"] if label != -100))
            text = [tiny_tokenizer.decode(row["input_ids"][part]) for part in (slice(begin), slice(begin, None))]
            lines.write(json.dumps({"prompt": text[0], "completion": text[1]}) + "\n")
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "own_objective.py").write_text(OBJECTIVE)
    started = []

    def begin(*flags):
        command = [
            sys.executable, "-m", "psft.cli.main", "train", "--model_name_or_path", str(tiny_model_path),
            "--dataset", str(data), "--output_dir", str(tmp_path / "run"), "--max_steps", "8",
            "--train_batch_size", "16", "--mini_batch_size", "4", "--max_tokens_per_micro_batch", "96",
            "--learning_rate", "1e-3", "--lr_scheduler_type", "constant", "--bf16", "false", "--report_to", "none",
            "--save_strategy", "no", "--gradient_checkpointing", "false", "--disable_tqdm", "true",
            "--num_processes", "2", *flags,
        ]  # fmt: skip
        inherited = os.environ.get("PYTHONPATH")
        path = os.pathsep.join([str(tmp_path / "lib"), *([inherited] if inherited else [])])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()  # its ranks follow
            process.communicate()


def steps_of(folder):
    path = folder / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.open()] if path.exists() else []


def wait_for_steps(folder, number, limit_s=120.0):
    end = time.monotonic() + limit_s
    while len(steps_of(folder)) < number and time.monotonic() < end:
        time.sleep(0.02)


def ended(process, limit_s=150.0):
    """(exit code, stdout, stderr)"""
    out, errors = process.communicate(timeout=limit_s)
    return process.returncode, out, errors


def test_two_ranks_train_one_run_and_one_of_them_talks(start, tmp_path):
    """Goes red if the ranks are not started, if each prints, or if another than rank 0 writes."""
    process = start(
        "--eval_dataset", f"rows={tmp_path / 'rows.jsonl'}", "--eval_split", "train", "--logging_steps", "4"
    )
    code, out, errors = ended(process)
    assert code == 0, errors
    lines = out.splitlines()
    assert sum(line.startswith("train: 32 rows") for line in lines) == 1
    assert sum(line.startswith("rows_nll") for line in lines) == 1, "the closing table"
    assert sum("'learning_rate'" in line for line in lines) == 2
    assert steps_of(tmp_path / "run") == list(range(1, 9))
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert info["world_size"] == 2 and info["distributed_type"] == "MULTI_CPU" and "--num_processes" in info["command"]
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_a_wrong_request_is_told_once_and_exits_with_2(start, tmp_path):
    """Goes red if torchrun's exit code comes through, its account of the ranks, or the message twice."""
    code, out, errors = ended(start("--max_tokens_per_micro_batch", "20"))
    assert code == 2
    assert errors.count("psft train: error: max_tokens_per_micro_batch=20 is a hard cap") == 1
    assert "Traceback" not in errors and "ChildFailed" not in errors
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize("kind", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_an_exception_on_one_rank_ends_all_with_its_traceback(start, tmp_path, kind):
    """Goes red if the other rank waits for it, or answers with a traceback of its own about a lost connection."""
    flags = ["--objective", "own_objective:gives_up", "--objective_settings", "at=9"]  # in the third step or later
    process = start("--accelerate", kind, *flags)
    wait_for_steps(tmp_path / "run", 2)
    since = time.monotonic()
    code, _, errors = ended(process)
    assert time.monotonic() - since < 60
    assert code == 1 and errors.count("Traceback") == 1
    assert "rank 1 of 2 failed" in errors and "ValueError: the objective of rank 1 gives up" in errors
    assert "closed by peer" not in errors and "ChildFailed" not in errors


def test_a_killed_rank_is_named_and_the_run_goes_on_from_its_checkpoint(start, tmp_path):
    """Goes red if the launcher waits, ends with 0, or blames the rank that lost the connection."""
    flags = ["--objective", "own_objective:gives_up", "--save_strategy", "steps", "--save_steps", "2"]
    code, _, errors = ended(start(*flags, "--objective_settings", "at=9,how=kill"))
    assert code == 1 and "psft train: failed: rank 1 was killed by SIGKILL" in errors and "--resume" in errors
    assert "Traceback" not in errors
    assert len(steps_of(tmp_path / "run")) < 8
    settings = ["--resume", "--allow_changed", "objective", "--objective_settings", "at=0"]
    code, _, errors = ended(start(*flags, *settings))
    assert code == 0, errors
    assert steps_of(tmp_path / "run") == list(range(1, 9))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["resumed"][0]["step"] >= 2


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
@pytest.mark.parametrize("to_all", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_signal_stops_all_ranks_after_the_step_with_one_checkpoint(start, tmp_path, number, to_all):
    """To the launcher alone, as a terminal sends it, or to every process of the job, as a scheduler does.

    Goes red if ranks get it twice and stop at once, if a worker that reads data dies of it, or if the exit code is 1.
    """
    process = start("--max_steps", "400", "--save_strategy", "steps", "--save_steps", "1000",
                    "--dataloader_num_workers", "1")  # fmt: skip
    wait_for_steps(tmp_path / "run", 3)
    launcher = psutil.Process(process.pid)
    others = launcher.children(recursive=True) if to_all else []
    assert len(others) >= 4 or not to_all
    for one in [launcher, *others]:
        one.send_signal(number)
    code, _, errors = ended(process)
    assert code == 128 + number, errors
    assert errors.count("finishing this step") == 1 and "Traceback" not in errors
    steps = steps_of(tmp_path / "run")
    assert len(steps) < 400
    assert (tmp_path / "run" / f"checkpoint-{len(steps)}" / "psft_manifest.json").exists()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["exit_reason"] == "interrupted"


@pytest.mark.slow
def test_a_second_signal_ends_all_ranks_at_once(start, tmp_path):
    """Goes red if the second one waits for the step, too."""
    flags = ["--objective", "own_objective:slow", "--objective_settings", "seconds=20"]
    process = start(*flags, "--save_strategy", "steps", "--save_steps", "1000", "--eval_strategy", "no")
    end = time.monotonic() + 120
    while not (tmp_path / "run" / "run.json").exists() and time.monotonic() < end:
        time.sleep(0.1)
    time.sleep(3)  # in the first step, or just before it
    ranks = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGINT)
    time.sleep(launching.SAME_SIGNAL_S + 0.5)
    since = time.monotonic()
    process.send_signal(signal.SIGINT)
    code, _, errors = ended(process)
    assert code == 130 and time.monotonic() - since < 10, errors
    assert not any(rank.is_running() for rank in ranks) and "Traceback" not in errors


@pytest.mark.slow
def test_ranks_end_with_their_launcher(start, tmp_path):
    """Goes red if ranks go on writing after the launcher was killed: a resumed run would meet them in its folder."""
    process = start("--max_steps", "100000")
    wait_for_steps(tmp_path / "run", 3)
    ranks = psutil.Process(process.pid).children()
    assert len(ranks) == 2
    process.kill()
    _, alive = psutil.wait_procs(ranks, timeout=20)
    assert not alive
