"""The stages after fine-tuning: reinforcement learning (paper, figures 4 and 5) and DPO (figure 6)."""

from __future__ import annotations

from psft.reports.charts import Chart, Figure
from psft.reports.figures.common import Inputs, needs_command, steps_chart


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
