"""`psft train --num_processes N --accelerate KIND`: what is launched, what is refused, and the files that are shipped.

Whole jobs of several processes are in tests/reliability/test_ranks.py.
"""

from pathlib import Path

import pytest

from psft.accelerate import KINDS, config_file
from psft.cli import launch as launching
from psft.cli.main import main
from psft.errors import RequestError
from psft.machine import LOCAL_RANK


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """A machine without accelerators, outside of any job."""
    for name in (*LOCAL_RANK, launching.FOLDER, "RANK", "DS_ACCELERATOR"):
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


@pytest.mark.slow
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
