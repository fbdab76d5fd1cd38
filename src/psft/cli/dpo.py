"""`psft dpo`: preference optimisation on top of a fine-tuned model, from a request to a model in a run folder."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from psft.cli.train import PreparedRun
    from psft.config import DataArguments, ModelArguments
    from psft.data import Prepared
    from psft.trainers import DPOStageConfig

HELP = "preference optimisation (DPO) on top of a fine-tuned model"
EXAMPLE = "psft dpo dpo-quickstart --dataset PAIRS.jsonl"


def run(argv: list[str]) -> int:
    """`psft dpo [RECIPE] [--flag value]...`"""
    from psft.cli.launch import requested, run_rank, start

    launch = requested(argv, command="dpo")
    return start(launch, ["dpo", *argv]) if launch is not None else run_rank(lambda: _dpo(argv))


def _dpo(argv: list[str]) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("psft").setLevel(logging.INFO)
    run = prepare_run(read_request(argv))
    run.train()
    if run.trainer.is_world_process_zero():
        print(f"\n{run.closing_lines()}")
    return run.trainer.stop_signal.exit_code


@dataclass(frozen=True)
class DPORequest:
    """What a person asked for, each part checked by itself."""

    config: DPOStageConfig
    data: DataArguments
    model: ModelArguments
    output_dir: Path
    model_name: str
    dataset: str


def read_request(argv: Sequence[str], *, command: str = "dpo") -> DPORequest:
    """Read recipe and flags. Everything wrong with the settings is reported at once, before anything is loaded.

    Raises:
        RequestError: unknown or contradictory settings, or none for the model or the data.
    """
    from psft.cli.arguments import parse_request
    from psft.cli.imports import without_collection
    from psft.cli.train import checked, model_and_dataset
    from psft.config import DataArguments, LaunchArguments, ModelArguments
    from psft.recipes import load_recipe

    with without_collection():
        from psft.trainers import DPOStageConfig

    sections = [DPOStageConfig, DataArguments, ModelArguments, LaunchArguments]
    per_section = parse_request(argv, sections, command=command, load_recipe=load_recipe)
    model = ModelArguments(**per_section[ModelArguments])
    data = DataArguments(**per_section[DataArguments])
    name, dataset = model_and_dataset(model, data, EXAMPLE)
    settings = per_section[DPOStageConfig]
    for setting in ("num_threads", "matmul_precision"):  # this process is psft's own, unlike a script's
        settings.setdefault(setting, "auto")
    settings.setdefault("output_dir", f"runs/{Path(name).name}-dpo")
    if data.eval_dataset:
        settings.setdefault("eval_on_start", True)
        settings.setdefault("eval_strategy", "steps" if "eval_steps" in settings else "epoch")
    config = checked(DPOStageConfig, settings)
    return DPORequest(config, data, model, Path(str(config.output_dir)), name, dataset)


def prepare_run(request: DPORequest) -> PreparedRun:
    """Load pairs and model and build the trainer. The run folder is claimed once nothing about the request can fail.

    Raises:
        RequestError: unusable data, model or combination, or an output folder that holds another run.
    """
    from psft.cli.imports import without_collection
    from psft.cli.run_folder import FolderClaim
    from psft.cli.train import PreparedRun, about_request, data_line, lora_config

    with without_collection():
        from psft.models import load_model, load_tokenizer, resolve_model
        from psft.models.attention import choose_attention
        from psft.trainers import DPOStageTrainer

    config, data, model = request.config, request.data, request.model
    claim = FolderClaim(request.output_dir, config)
    trusted = {"trust_remote_code": config.trust_remote_code, "allow_pickle": config.allow_pickle}
    model_folder = resolve_model(request.model_name, model.model_revision, None, **trusted)
    tokenizer = load_tokenizer(request.model_name, config.chat_template_path, model.model_revision, **trusted)
    with claim.collecting() as rejected:
        with claim.keeping_rejected():
            prepared = prepare_pairs(request, tokenizer, rejected)
        for name, part in prepared.items() if config.process_index == 0 else ():
            print(data_line(name, part))
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
        train = prepared.pop("train")
        trainer = DPOStageTrainer(
            model=weights,
            args=config,
            train_dataset=train.dataset,
            eval_dataset={name: part.dataset for name, part in prepared.items()} or None,
            processing_class=tokenizer,
            peft_config=lora_config(model),
        )
        trainer.check_batches()
        claim.take(trainer)
    reports = {"train": train.report, **{name: part.report for name, part in prepared.items()}}
    trainer.recorder.extra = about_request(model, data, reports)
    return PreparedRun(trainer, reports)


def prepare_pairs(request: Any, tokenizer: Any, rejected: Path | None) -> dict[str, Prepared]:
    """The training pairs under "train" and every held-out set under its name.

    Args:
        request: has data, dataset and config.
    """
    from psft.cli.train import data_cache_folder, named_sources
    from psft.data import prepare_preferences

    data, config = request.data, request.config
    shared: dict[str, Any] = {
        "tokenizer": tokenizer,
        "max_length": config.max_length,
        "truncation": config.truncation,
        "dataset_format": data.dataset_format,
        "columns": data.columns,
        "system_prompt": data.system_prompt,
        "on_bad_row": data.on_bad_row,
        "config_name": data.dataset_config,
        "num_processes": config.dataset_num_proc,
        "cache_dir": data_cache_folder(data),
    }
    prepared = {
        "train": prepare_preferences(
            request.dataset, split=data.dataset_split, max_rows=data.max_rows, rejected_path=rejected,
            description="training pairs", **shared,
        )
    }  # fmt: skip
    for name, source in named_sources(data.eval_dataset or []).items():
        prepared[name] = prepare_preferences(
            source, split=data.eval_split, description=f"held-out pairs {name}", **shared
        )
    return prepared
