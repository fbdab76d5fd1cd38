"""The stages after fine-tuning: reinforcement learning (paper, figures 4 and 5), DPO (figure 6), all on one axis."""

from __future__ import annotations

import shlex

from psft.reports import series
from psft.reports.charts import Chart, Figure, Missing
from psft.reports.figures.common import Inputs, needs_command, steps_chart
from psft.reports.groups import Group, group_line
from psft.reports.lineage import model_of, stage_of, start_of, steps_before
from psft.reports.load import Run
from psft.reports.series import Points


def _of_stage(inputs: Inputs, marker: tuple[str, ...]) -> Inputs:
    """Only the groups whose runs have one of the stage's own numbers: entropy of other stages is on other tokens."""
    groups = [group for group in inputs.groups if any(run.has(name) for run in group.runs for name in marker)]
    return Inputs(groups, inputs.commands)


def reinforcement(inputs: Inputs) -> Figure:
    stage = _of_stage(inputs, ("reward_mean", "kept_group_share"))
    charts: list[Chart] = []
    if stage.groups:
        charts += steps_chart(stage, "entropy", "Entropy (paper, figure 4)", "nats per token")
        charts += steps_chart(stage, "reward_mean", "Mean reward (paper, figure 5)", "reward")
        charts += steps_chart(stage, "reward_std", "Spread of the rewards", "standard deviation")
        charts += steps_chart(stage, "kept_group_share", "Groups kept", "share of groups", y_form="percent")
        charts += steps_chart(stage, "completion_length_mean", "Length of the answers", "tokens")
    where = inputs.runs[0].path if inputs.runs else "RUN"
    return Figure(
        "reinforcement",
        "Reinforcement learning on top",
        "From a PSFT checkpoint the paper finds entropy that stays higher and rises more steeply, and rewards that "
        "start slowly and then overtake. Groups whose answers all score alike teach nothing and are not kept.",
        charts,
        missing=None
        if charts
        else needs_command(inputs, "None of these runs is a reinforcement-learning stage.", "grpo",
                           f"--model_name_or_path {where}"),
        paper="4, 5",
    )  # fmt: skip


def preference(inputs: Inputs) -> Figure:
    stage = _of_stage(inputs, ("rewards_margin", "rewards_chosen"))
    charts: list[Chart] = []
    if stage.groups:
        charts += steps_chart(stage, "entropy", "Entropy (paper, figure 6a)", "nats per token")
        charts += steps_chart(stage, "rewards_chosen", "Reward of chosen answers (figure 6b)", "implicit reward")
        charts += steps_chart(stage, "rewards_rejected", "Reward of rejected answers (figure 6b)", "implicit reward")
        charts += steps_chart(stage, "rewards_margin", "Chosen minus rejected", "implicit reward")
        charts += steps_chart(stage, "rewards_accuracy", "Pairs ranked right", "share of pairs", y_form="percent")
    where = inputs.runs[0].path if inputs.runs else "RUN"
    return Figure(
        "preference",
        "DPO: rewards and entropy",
        "A margin that widens says that chosen and rejected answers are told apart; in the paper it widens more from "
        "PSFT. Rewards are implicit: beta times the log-ratio to the reference.",
        charts,
        missing=None
        if charts
        else needs_command(inputs, "None of these runs is a DPO stage.", "dpo", f"--model_name_or_path {where}"),
        paper="6",
    )


def whole_way(inputs: Inputs) -> Figure | None:
    """Entropy of each model over all its stages; None where every run is a first stage."""
    runs = inputs.runs
    begun = [run for run in runs if start_of(run, runs) is not None]
    if not begun:
        later = [run for run in runs if stage_of(run) != "train" and model_of(run)]
        return _without_start(later, runs) if later else None
    of_way = {id(run) for run in begun} | {id(start.run) for run in begun if (start := start_of(run, runs)) is not None}
    groups = [group for group in inputs.groups if any(id(run) in of_way for run in group.runs)]

    def entropy(run: Run) -> Points | None:
        points = series.of_steps(run, "entropy")
        return None if points is None else (points[0] + steps_before(run, runs), *points[1:])

    lines = [
        group_line(
            group, entropy, inputs.budget, source="metrics.jsonl: entropy", period=series.steps_a_window(group.run)
        )
        for group in groups
    ]
    drawn = [line for line in lines if line is not None]
    if not drawn:
        return None
    title = "Entropy, each stage where the one before it ended"
    chart = Chart(title, "optimizer steps of all stages", "nats per token", drawn, marks=_beginnings(groups, runs))
    return Figure(
        "stages",
        "From demonstrations to what follows",
        "A stage stands to the right of the run whose weights it began with, after as many steps as those had seen. "
        "Fine-tuning measures entropy on the tokens of demonstrations, GRPO on the model's own answers, DPO on both "
        "answers of its pairs: within a stage the line is one quantity, at its beginning it may jump for that alone. "
        "In the paper, what PSFT keeps of entropy is what RL then has to work with.",
        [chart],
        paper="4",
    )


def _beginnings(groups: list[Group], runs: list[Run]) -> list[tuple[float, str, int | None]]:
    found = {
        (float(steps_before(run, runs)), f"{stage_of(run)} begins", group.style)
        for group in groups
        for run in group.runs
        if start_of(run, runs) is not None
    }
    return sorted(found)


def _without_start(later: list[Run], runs: list[Run]) -> Figure:
    models = dict.fromkeys(str(model_of(run)) for run in later)
    folders = " ".join(shlex.quote(path) for path in (*models, *(run.path for run in runs)))
    return Figure(
        "stages",
        "From demonstrations to what follows",
        "Entropy of a model over all its stages, one after the other.",
        missing=Missing(
            "None of these runs is the one that a later stage began from. If that was a run of psft, report on it too:",
            f"psft report {folders}",
        ),
        paper="4",
    )
