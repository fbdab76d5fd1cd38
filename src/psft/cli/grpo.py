"""`psft grpo`: reinforcement learning with verifiable rewards on top of a fine-tuned model, into a run folder."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psft.errors import RequestError

if TYPE_CHECKING:
    from psft.cli.train import PreparedRun
    from psft.config import DataArguments, ModelArguments
    from psft.data.prompts import PreparedPrompts
    from psft.rewards.reward_set import RewardSet
    from psft.trainers import GRPOStageConfig

HELP = "reinforcement learning (GRPO with all of DAPO) on top of a fine-tuned model"
EXAMPLE = "psft grpo grpo-quickstart"


def run(argv: list[str]) -> int:
    """`psft grpo [RECIPE] [--flag value]...`"""
    from psft.cli.launch import requested, run_rank, start

    launch = requested(argv, command="grpo")
    return start(launch, ["grpo", *argv]) if launch is not None else run_rank(lambda: _grpo(argv))


def _grpo(argv: list[str]) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("psft").setLevel(logging.INFO)
    run = prepare_run(read_request(argv))
    trainer: Any = run.trainer
    try:
        run.train()
    finally:
        trainer.rewards.close()
    if trainer.is_world_process_zero():
        print(f"\n{run.closing_lines()}")
        if failed := sum(trainer.rewards.counts.values()):
            print(f"{failed} rewards failed: {trainer.args.output_dir}/reward_failures.jsonl")
    return int(trainer.stop_signal.exit_code)


@dataclass(frozen=True)
class GRPORequest:
    """What a person asked for, each part checked by itself."""

    config: GRPOStageConfig
    data: DataArguments
    model: ModelArguments
    output_dir: Path
    model_name: str


def read_request(argv: Sequence[str], *, command: str = "grpo") -> GRPORequest:
    """Read recipe and flags. Everything wrong with the settings is reported at once, before anything is loaded.

    Raises:
        RequestError: unknown or contradictory settings, or none for the model, the data or the rewards.
    """
    from psft.cli.arguments import parse_request
    from psft.cli.imports import without_collection
    from psft.cli.train import checked, model_and_dataset
    from psft.config import DataArguments, LaunchArguments, ModelArguments
    from psft.recipes import load_recipe

    with without_collection():
        from psft.trainers import GRPOStageConfig

    sections = [GRPOStageConfig, DataArguments, ModelArguments, LaunchArguments]
    per_section = parse_request(argv, sections, command=command, load_recipe=load_recipe)
    model = ModelArguments(**per_section[ModelArguments])
    data = DataArguments(**per_section[DataArguments])
    name, _ = model_and_dataset(model, data, EXAMPLE)
    settings = per_section[GRPOStageConfig]
    if not settings.get("rewards"):
        raise RequestError(
            "--rewards is missing. Say what answers are rewarded for: math=1 (the data's gold answers), "
            "reasoning_gym=1, or my_rewards:score=1 for a function of your own."
        )
    if data.eval_dataset:
        raise RequestError("eval_dataset is not measured by psft grpo. Remove it; psft eval measures checkpoints.")
    if data.dataset_format != "auto":
        raise RequestError(
            "dataset_format has no effect on prompts. Remove it; --columns prompt=FIELD,gold=FIELD names fields."
        )
    for setting in ("num_threads", "matmul_precision"):  # this process is psft's own, unlike a script's
        settings.setdefault(setting, "auto")
    settings.setdefault("output_dir", f"runs/{Path(name).name}-grpo")
    config = checked(GRPOStageConfig, settings)
    return GRPORequest(config, data, model, Path(str(config.output_dir)), name)


def prepare_run(request: GRPORequest) -> PreparedRun:
    """Load prompts and model and build the trainer. The run folder is claimed once nothing about the request can fail.

    Raises:
        RequestError: unusable data, rewards, model or combination, or an output folder that holds another run.
    """
    from psft.cli.imports import without_collection
    from psft.cli.run_folder import FolderClaim
    from psft.cli.train import PreparedRun, about_request, lora_config

    with without_collection():
        from psft.models import load_model, load_tokenizer, resolve_model
        from psft.models.attention import choose_attention
        from psft.trainers import GRPOStageTrainer

    config, data, model = request.config, request.data, request.model
    claim = FolderClaim(request.output_dir, config)
    rewards = config.reward_set()
    rewards.prepare()
    trusted = {"trust_remote_code": config.trust_remote_code, "allow_pickle": config.allow_pickle}
    model_folder = resolve_model(request.model_name, model.model_revision, None, **trusted)
    tokenizer = load_tokenizer(request.model_name, config.chat_template_path, model.model_revision, **trusted)
    with claim.collecting() as rejected:
        with claim.keeping_rejected():
            prompts = read_prompts(data, config, tokenizer, rewards, rejected)
        if config.process_index == 0:
            print(f"train: {prompts.report.line}")
        attention = choose_attention(
            model.attn_implementation,
            model_folder,
            padding_free=False,
            is_half=bool(config.bf16 or config.fp16 or model.dtype == "bfloat16"),
            device_type=config.device.type,
            trust_remote_code=config.trust_remote_code,
        )
        weights = load_model(
            request.model_name,
            dtype=model.dtype,
            force_pure_bf16=config.force_pure_bf16,
            attn_implementation=attention.name,
            revision=model.model_revision,
            **trusted,
        )
        trainer = GRPOStageTrainer(
            weights, config, prompts.dataset, processing_class=tokenizer, peft_config=lora_config(model)
        )
        claim.take(trainer)
    reports: dict[str, Any] = {"train": prompts.report}
    trainer.recorder.extra = about_request(model, data, reports)
    return PreparedRun(trainer, reports)  # type: ignore[arg-type]  # asks of a trainer what every stage has


def read_prompts(
    data: DataArguments, config: GRPOStageConfig, tokenizer: Any, rewards: RewardSet, rejected: Path | None = None
) -> PreparedPrompts:
    """The prompts of a request, each with what the rewards need.

    Args:
        rejected: where rows that cannot be used are written.
    """
    from psft.data.prompts import prepare_prompts

    assert data.dataset is not None
    return prepare_prompts(
        data.dataset,
        tokenizer=tokenizer,
        max_prompt_length=config.max_prompt_length,
        check=rewards.check,
        split=data.dataset_split,
        config_name=data.dataset_config,
        columns=data.columns,
        system_prompt=data.system_prompt,
        on_bad_row=data.on_bad_row,
        max_rows=data.max_rows,
        keeps_duplicates=config.keep_duplicates,
        rejected_path=rejected,
    )
