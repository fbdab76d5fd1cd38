"""The verdict in words on runs made for each of its answers, and the next run it gives: a command psft takes."""

import shlex

import pytest
from reports.made_runs import make_run

from psft.reports.advice import next_run
from psft.reports.load import load_run
from psft.reports.rerun import drop_flags
from psft.reports.verdict import findings
from psft.runs import RunFolder


def judge(folder):
    run = load_run(folder, "run")
    found = findings(run)
    return {name: (finding.state, finding.answer) for name, finding in found.items()}, next_run(run, found)


def with_nll(path, values, **fields):
    """A run whose held-out NLL goes through `values`, 12 steps apart, standard error 0.01."""
    folder = make_run(path, parts=("probe", "summary"), **fields)
    for i, value in enumerate(values):
        folder.append("eval.jsonl", {"step": 12 * i, "benchmark": "h", "metric": "nll", "k": None, "value": value,
                                     "stderr": 0.01})  # fmt: skip
    return folder


def test_a_run_that_goes_well_is_told_to_go_on(tmp_path):
    """Goes red if a plain good run gets a warning, or the best value at the end is not a reason to train longer."""
    found, advice = judge(with_nll(tmp_path, [1.2, 0.9, 0.8, 0.75, 0.7]))
    assert {state for state, _ in found.values()} == {"good"}
    assert "train twice as long" in advice.why and "--num_train_epochs 8" in advice.command


@pytest.mark.parametrize(
    ("values", "answer"),
    [
        ([1.2, 0.8, 0.79, 0.79, 0.79], "yes"),
        ([1.2, 1.21, 1.19, 1.2, 1.19], "not measurably"),  # inside two standard errors
        ([1.2, 0.8, 0.85, 0.9, 1.0], "yes, then it got worse"),
        ([0.8, 0.85, 0.9, 0.95, 1.0], "no, it got worse"),
    ],
)
def test_learned_is_read_off_held_out_nll(tmp_path, values, answer):
    """Goes red if a change inside the error counts, or first and best are mixed up."""
    assert judge(with_nll(tmp_path, values))[0]["learned"][1] == answer


def test_what_was_learnt_before_the_first_evaluation_is_not_denied(tmp_path):
    """Goes red if a run first measured at step 12 is said to have learnt nothing, and told to raise its rate."""
    folder = with_nll(tmp_path, [])
    for step, value in ((12, 0.8), (48, 0.8)):
        row = {"step": step, "benchmark": "h", "metric": "nll", "k": None, "value": value, "stderr": 0.01}
        folder.append("eval.jsonl", row)
    found, advice = judge(folder)
    assert found["learned"] == ("warn", "not since step 12") and "--eval_on_start true" in advice.command


def test_without_held_out_data_training_nll_says_so_much_and_no_more(tmp_path):
    found, advice = judge(make_run(tmp_path, parts=("summary",)))
    assert found["learned"] == ("warn", "on its training data") and "--eval_dataset" in advice.why


@pytest.mark.parametrize(
    ("last", "nll", "state"),
    [(0.5, 0.7, "good"), (0.2, 1.0, "bad"), (0.2, 0.3, "good"), (0.2, None, "bad")],
)
def test_low_entropy_is_a_collapse_only_where_the_model_is_surer_than_right(tmp_path, last, nll, state):
    """Entropy from 1 to `last`. Goes red if a model whose entropy is near its NLL counts as collapsed."""
    change = lambda row: {**row, "entropy": 1.0 if row["step"] < 20 else last}  # noqa: E731
    folder = with_nll(tmp_path, [1.2, 1.0, nll] if nll else [], change=change)
    assert judge(folder)[0]["collapsed"][0] == state


def test_a_saw_tooth_is_a_collapse_and_sft_is_told_of_psft(tmp_path):
    """Goes red if the alert does not reach the verdict."""
    falls = lambda row: {**row, "entropy": 1.2 - 0.15 * ((row["step"] - 1) // 40) + 0.001 * (row["step"] % 3)}  # noqa: E731
    found, advice = judge(make_run(tmp_path, num_steps=160, objective="sft", change=falls))
    assert found["collapsed"] == ("bad", "it falls at every epoch") and "--objective psft" in advice.command


@pytest.mark.parametrize(
    ("drift", "stderr", "answer"),
    [
        (0.2, 0.01, "yes"),
        (0.11, 0.01, "little"),
        (0.01, 0.01, "nothing measurable"),
        (-0.01, 0.01, "nothing measurable"),
    ],
)
def test_forgetting_is_drift_beyond_two_standard_errors(tmp_path, drift, stderr, answer):
    """Goes red if the error is left out, or another group than `all` decides."""
    folder = make_run(tmp_path, parts=("heldout", "summary"))
    for step, value in ((0, 0.0), (48, drift)):
        for group, factor in (("all", 1), ("chat", 9)):
            folder.append("probe.jsonl", {"step": step, "group": group, "drift_nats_per_token": factor * value,
                                          "stderr": stderr})  # fmt: skip
    assert judge(folder)[0]["forgot"][1] == answer


def test_a_probe_of_the_untrained_model_alone_says_nothing_about_forgetting(tmp_path):
    """Goes red if drift at step 0, which is 0 by definition, is taken for "nothing forgotten"."""
    folder = make_run(tmp_path / "run", parts=())
    folder.append("probe.jsonl", {"step": 0, "group": "all", "drift_nats_per_token": 0.0, "stderr": 0.0})
    assert judge(folder)[0]["forgot"] == ("unknown", "not measured yet")


def test_one_measurement_of_held_out_data_is_named_and_not_asked_for(tmp_path):
    """Goes red if a run that has held-out data is told to give some."""
    run = load_run(with_nll(tmp_path / "run", [1.2]), "run")
    learned = findings(run)["learned"]
    assert learned.answer == "on its training data"
    assert "that of h has been measured once, at step 0" in learned.text and "eval_dataset" not in learned.text


def test_a_run_that_keeps_no_checkpoints_is_not_told_to_go_on_from_one(tmp_path):
    """Goes red if --resume is advised where save_strategy=no leaves nothing to resume."""
    folder = make_run(tmp_path / "run", parts=())
    info = folder.read_json("run.json")
    folder.write_json("run.json", {**info, "config": {**info["config"], "save_strategy": "no"}})
    advice = judge(folder)[1]
    assert "keeps no checkpoints" in advice.why and "--resume" not in advice.command
    assert "--save_strategy steps" in advice.command


def test_scores_lost_out_of_domain_are_forgetting_too(tmp_path):
    """Goes red if a fall inside the errors counts, or in-domain scores do."""
    folder = make_run(tmp_path, parts=("heldout", "probe", "summary"))
    for name, last in (("gpqa", 0.1), ("ifeval", 0.49), ("aime24", 0.0)):
        for step, value in ((0, 0.5), (48, last)):
            folder.append("eval.jsonl", {"step": step, "benchmark": name, "metric": "accuracy", "k": 8, "value": value,
                                         "stderr": 0.02})  # fmt: skip
    run = load_run(folder, "run")
    finding = findings(run)["forgot"]
    assert finding.answer == "yes" and "GPQA, avg@8 50.0% to 10.0%" in finding.text
    assert "IFEval" not in finding.text and "AIME" not in finding.text


@pytest.mark.parametrize(
    ("fields", "change", "answer", "advised"),
    [
        ({}, {"clip_fraction": 0.005}, "hardly", "--target_clip_fraction 0.02"),
        ({}, {"clip_fraction": 0.5}, "very much", "--learning_rate 3e-06"),
        ({"epsilon": float("inf")}, {}, "switched off", ""),
        ({"objective": "sft"}, {}, "no clip", ""),
        ({}, {"clip_fraction": 0.0, "mini_batch": 1, "num_mini_batches": 1}, "it cannot", "--mini_batch_size 4"),
    ],
)
def test_whether_the_clip_acts(tmp_path, fields, change, answer, advised):
    """Goes red if mini-batch 1 counts, or an objective without a bound is told to change it."""
    folder = with_nll(tmp_path, [1.2, 0.8, 0.7, 0.71], change=lambda row: {**row, **change}, **fields)
    found, advice = judge(folder)
    assert found["clip"][1] == answer and advised in advice.command


def test_an_unfinished_run_is_told_to_resume(tmp_path):
    found, advice = judge(make_run(tmp_path, parts=("heldout",)))
    assert found["ended"][0] == "unknown" and advice.command.endswith("--resume")
    assert f"--output_dir {tmp_path}" in advice.command  # the same folder, unlike every other advice


def test_a_run_that_its_own_rule_stopped_names_the_rule(tmp_path):
    """Goes red if such a run counts as going on, and is told to resume."""
    folder = with_nll(tmp_path, [1.2, 0.9, 0.8, 0.75, 0.7])
    reason = "stopped: drift>0.05 was met at step 48 with 0.06"
    folder.write_json("summary.json", {"exit_reason": reason, "steps": 48, "wall_time_s": 3})
    run = load_run(folder, "run")
    finding = findings(run)["ended"]
    assert run.is_over and finding.answer == "stopped" and "drift>0.05 was met" in finding.text
    assert "--resume" not in next_run(run, findings(run)).command


def test_bad_steps_are_told_and_a_failed_run_names_its_reason(tmp_path):
    bad = [{"step": 7, "loss": None, "rows": [1]}]
    folder = make_run(tmp_path, parts=("heldout",), bad_steps=bad)
    folder.write_json("summary.json", {"exit_reason": "failed: RunFailed: 10 bad steps", "steps": 48, "wall_time_s": 3})
    run = load_run(folder, "run")
    finding = findings(run)["ended"]
    assert finding.state == "bad" and "10 bad steps" in finding.text and "step 7" in finding.text
    assert "--learning_rate 3e-06" in next_run(run, findings(run)).command


def test_overfitting_is_cut_at_the_best_step(tmp_path):
    _, advice = judge(with_nll(tmp_path, [1.2, 0.8, 0.85, 0.9, 1.0]))
    assert "--max_steps 12" in advice.command and "step 12" in advice.why


def test_gradient_spikes_without_a_clip_bring_the_clip_back(tmp_path):
    spike = lambda row: {**row, "grad_norm": 90.0 if row["step"] == 30 else 1.0}  # noqa: E731
    folder = with_nll(tmp_path, [1.2, 0.8, 0.7, 0.69], change=spike, epsilon=float("inf"))
    assert "--epsilon_high 0.28" in judge(folder)[1].command


def test_what_stands_beside_it_is_not_advised_again(tmp_path):
    """Goes red if SFT is told to try PSFT on a page that holds it, or is kept from it by a run of another rate."""

    def forgetful(name, objective, rate):
        folder = make_run(tmp_path / name, objective=objective, parts=("heldout",))
        folder.append("probe.jsonl", {"step": 48, "group": "all", "drift_nats_per_token": 0.3, "stderr": 0.01})
        info = folder.read_json("run.json")
        folder.write_json("run.json", {**info, "config": {**info["config"], "learning_rate": rate}})
        folder.write_json("summary.json", {"exit_reason": "finished", "steps": 48})
        return load_run(folder, name)

    sft, same, other = (forgetful(*how) for how in (("sft", "sft", 1e-5), ("a", "psft", 1e-5), ("b", "psft", 1e-6)))
    assert "--objective psft" in next_run(sft, findings(sft), [sft, other]).command
    advice = next_run(sft, findings(sft), [sft, other, same])
    assert "the same with PSFT is a." in advice.why and "--learning_rate 3e-06" in advice.command


def test_advice_is_a_command_that_psft_takes(tmp_path):
    """Every change the rules make, through psft's own parser. Goes red if a setting is misspelt."""
    from psft.cli.arguments import parse_request
    from psft.config import DataArguments, LaunchArguments, ModelArguments
    from psft.recipes import load_recipe
    from psft.trainers.psft_config import PSFTConfig

    up, down = [1.2, 0.8, 0.7, 0.65, 0.6], [1.2, 0.8, 0.85, 0.9, 1.0]
    cases = [
        (up, {}, {}),
        (up, {"clip_fraction": 0.005}, {}),
        (up, {"clip_fraction": 0.5}, {}),
        (up, {"clip_fraction": 0.0, "mini_batch": 1, "num_mini_batches": 1}, {}),
        (down, {}, {}),
        (down, {}, {"objective": "sft"}),
        ([1.2, 1.2, 1.2], {}, {}),
        ([0.8, 0.9, 1.0], {}, {}),
        ([1.2, 0.7, 0.7, 0.7, 0.71], {}, {}),
    ]
    changed = set()
    for i, (values, change, fields) in enumerate(cases):
        folder = with_nll(tmp_path / str(i), values, change=lambda row, c=change: {**row, **c}, **fields)
        words = shlex.split(judge(folder)[1].command)
        flags = [word for word in words if word.startswith("--")]
        assert words[:2] == ["psft", "train"] and len(flags) == len(set(flags)), words
        sections = (DataArguments, ModelArguments, PSFTConfig, LaunchArguments)
        given = parse_request(words[2:], sections, command="train", load_recipe=load_recipe)
        assert given[PSFTConfig]["output_dir"].startswith(f"{tmp_path / str(i)}-")
        changed |= set(words[2:]) & {f"--{name}" for name in given[PSFTConfig]}
    expected = ("learning_rate", "num_train_epochs", "target_clip_fraction", "mini_batch_size", "max_steps", "seed")
    assert {f"--{name}" for name in expected} <= changed


def test_flags_are_dropped_with_their_values_however_they_are_written():
    """Goes red if `--a-b`, `--a_b=` or a list of values leaves something behind."""
    words = [
        "psft",
        "train",
        "recipe",
        "--output-dir",
        "x",
        "--seed=3",
        "--eval_dataset",
        "a",
        "b",
        "--bf16",
        "--resume",
    ]
    assert drop_flags(words, {"output_dir", "seed", "eval_dataset", "resume"}) == ["psft", "train", "recipe", "--bf16"]


def test_a_script_gets_settings_for_python(tmp_path):
    """Goes red if a run of the user's own program is given a psft command that never made it."""
    folder = with_nll(tmp_path, [1.2, 0.9, 0.8, 0.75, 0.7], command=["train.py"])
    assert judge(folder)[1].command == f"PSFTConfig(num_train_epochs=8, output_dir='{tmp_path}-longer')"
    assert isinstance(folder, RunFolder)
