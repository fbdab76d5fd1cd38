"""`psft plan` of a DPO recipe: what `psft dpo` would do with the same request."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from psft.cli.plan import (
    FoundData,
    architecture_of,
    common_notes,
    heading,
    indent,
    is_local,
    look_at_data,
    settled,
    shortened,
    table,
)
from psft.errors import RequestError

if TYPE_CHECKING:
    from psft.data import Prepared
    from psft.models.architectures import Architecture

_SHOWN = (
    "beta", "loss_type", "train_batch_size", "learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs",
    "max_steps", "weight_decay", "max_length", "truncation", "max_tokens_per_micro_batch", "precompute_ref_log_probs",
    "gradient_checkpointing", "bf16", "dataloader_drop_last", "seed", "output_dir",
)  # fmt: skip
_TRUNCATIONS = {
    "keep_start": "the end of each answer is cut off (TRL)",
    "llama_factory": "prompt and answers are cut in proportion, the prompt at its end (LLaMA-Factory)",
}


def run(argv: list[str]) -> int:
    """Prints the plan of a request. Returns the exit code.

    Raises:
        RequestError: what `psft dpo` would refuse: unknown settings, contradictions, unusable local data.
    """
    from psft.cli.arguments import parse_request
    from psft.cli.imports import without_collection, without_models
    from psft.config import DataArguments, LaunchArguments, ModelArguments, PlanArguments
    from psft.models.resolve import check_dtype
    from psft.recipes import load_recipe

    with without_collection(), without_models():
        from psft.trainers import DPOStageConfig

        sections = (PlanArguments, DataArguments, ModelArguments, DPOStageConfig, LaunchArguments)
        given = parse_request(argv, sections, command="plan", load_recipe=load_recipe)
        data, model = DataArguments(**given[DataArguments]), ModelArguments(**given[ModelArguments])
        settings = settled(DPOStageConfig, given[DPOStageConfig])
    ranks = given[LaunchArguments].get("num_processes") or 1
    if ranks < 1 or settings.train_batch_size % ranks:
        size = settings.train_batch_size
        raise RequestError(f"train_batch_size={size} cannot be shared by {ranks} ranks. Use a multiple of {ranks}.")
    check_dtype(model.dtype, force_pure_bf16=settings.force_pure_bf16)
    architecture = architecture_of(model)
    found = look_at_data(data, model, settings, _prepare)
    heading("Settings")
    processes = [(name, str(value)) for name, value in given[LaunchArguments].items() if value is not None]
    table([*_resolved_settings(data, model, settings, set(given[DPOStageConfig])), *processes])
    heading("Objective")
    table(_objective(settings, model))
    heading("Steps")
    table(_steps(found, settings))
    heading("Data")
    table(_data_facts(found, data, settings))
    if found.prepared is not None:
        from psft.data import render_pair

        print("\n" + indent(shortened(render_pair(found.prepared, found.tokenizer))))
    heading("Memory and time (a rough estimate from sizes, not a measurement)")
    print("\n".join(_costs(architecture, found, model, settings)))
    notes = [*found.notes, *common_notes("dpo", data, model, settings, architecture)]
    if notes:
        heading("Notes")
        print("\n".join(f"  - {note}" for note in notes))
    return 0


def _prepare(tokenizer: Any, data: Any, settings: Any) -> Prepared:
    from psft.cli.train import data_cache_folder
    from psft.data import prepare_preferences

    return prepare_preferences(
        data.dataset,
        tokenizer=tokenizer,
        max_length=settings.max_length,
        truncation=settings.truncation,
        split=data.dataset_split,
        config_name=data.dataset_config,
        dataset_format=data.dataset_format,
        columns=data.columns,
        system_prompt=data.system_prompt,
        on_bad_row=data.on_bad_row,
        max_rows=data.max_rows,
        num_processes=settings.dataset_num_proc,
        cache_dir=data_cache_folder(data),
    )


def _resolved_settings(data: Any, model: Any, settings: Any, given: set[str]) -> list[tuple[str, str]]:
    rows = [("model_name_or_path", str(model.model_name_or_path)), ("dataset", f"{data.dataset}")]
    rows += [("dataset_split", data.dataset_split)] if data.dataset and not is_local(data.dataset) else []
    rows += [("eval_dataset", ", ".join(data.eval_dataset))] if data.eval_dataset else []
    rows += [("system_prompt", data.system_prompt)] if data.system_prompt else []
    rows += [("on_bad_row", data.on_bad_row)]
    rows += [("lora", f"rank {model.lora_r}, alpha {model.lora_alpha}")] if model.use_peft else []
    for name in [*_SHOWN, *sorted(given - set(_SHOWN))]:
        value = getattr(settings, name, None)
        is_idle = name == ("num_train_epochs" if settings.max_steps > 0 else "max_steps")
        if value is not None and not is_idle:
            text = f"{value:g}" if isinstance(value, float) else str(getattr(value, "value", value))
            text = ", ".join(value) if isinstance(value, list) else text
            rows.append((name, text if name in given else f"{text}  (default)"))
    return rows


def _objective(settings: Any, model: Any) -> list[tuple[str, str]]:
    facts = []
    if settings.loss_type == ["sigmoid"]:
        facts.append(("loss", "-log sigmoid(beta (log-ratio of chosen - log-ratio of rejected)), mean over pairs"))
    else:
        facts.append(("loss", f"TRL's {', '.join(settings.loss_type)}, mean over pairs"))
    which = "the model without its adapter" if model.use_peft else "the model as it is before training"
    if settings.precompute_ref_log_probs:
        how = "one forward pass over all pairs before the first step, kept in checkpoints, 8 bytes a pair"
    else:
        copy = "no second copy" if model.use_peft else "a frozen copy stays in memory"
        how = f"{copy}, one forward pass without gradient at every step"
    return [*facts, ("reference", f"{which}: {how}")]


def _num_steps(found: FoundData, settings: Any) -> int | None:
    if settings.max_steps > 0:
        return int(settings.max_steps)
    if found.num_rows is None:
        return None
    return math.ceil(_steps_per_epoch(found.num_rows, settings) * settings.num_train_epochs)


def _steps_per_epoch(num_pairs: int, settings: Any) -> int:
    from psft.window.schedule import Schedule

    size = settings.train_batch_size
    return Schedule(num_pairs, size, size, drop_last=settings.dataloader_drop_last).num_steps(1.0)


def _steps(found: FoundData, settings: Any) -> list[tuple[str, str]]:
    size = settings.train_batch_size
    if found.num_rows is None:
        return [("pairs per step", str(size)), ("steps", "unknown: the number of pairs is not known")]
    length = "max_steps" if settings.max_steps > 0 else f"epochs: {settings.num_train_epochs:g}"
    return [
        ("pairs per step", str(size)),
        ("pairs", f"{found.num_rows}  ({found.source})"),
        ("steps per epoch", str(_steps_per_epoch(found.num_rows, settings))),
        ("steps in all", f"{_num_steps(found, settings)}  ({length})"),
    ]


def _data_facts(found: FoundData, data: Any, settings: Any) -> list[tuple[str, str]]:
    cut = f"max_length {settings.max_length}: {_TRUNCATIONS[settings.truncation]}"
    if found.prepared is None:
        return [(str(data.dataset), "not read: see the notes"), ("truncation", cut)]
    report = found.prepared.report
    spread = ", ".join(f"{name} {value}" for name, value in report.length_quantiles.items())
    facts = [
        ("format", report.format),
        ("pairs used", f"{report.num_used} of {report.num_rows}"),
        ("tokens", f"{report.num_tokens} in both sequences, {report.num_trained_tokens} of them in answers"),
        ("longer sequence", f"{spread} tokens"),
        ("truncated", f"{report.num_truncated} pairs ({cut})"),
        ("end token", f"{report.end_token}  (counted)"),
    ]
    if found.prepared.cached_in is not None:
        facts.append(("prepared before", f"read from {found.prepared.cached_in}"))
    if report.num_rejected:
        facts.append(("rejected", ", ".join(f"{count} x {reason}" for reason, count in report.reasons.items())))
    return facts


def _costs(architecture: Architecture | None, found: FoundData, model: Any, settings: Any) -> list[str]:
    from psft.cli.plan_costs import Extras, Lengths, cost_table

    if architecture is None:
        return [f"  not at hand: the sizes of {model.model_name_or_path}; no estimate"]
    if found.prepared is not None:
        report = found.prepared.report
        longest, mean = 2 * int(report.length_quantiles["max"]), report.num_tokens / report.num_used
    else:
        longest = 2 * (settings.max_length or architecture.context)
        mean = float(longest)
    lengths = Lengths(longest, mean, is_bound=found.prepared is None, num_rows=found.num_rows)
    size, is_once = architecture.num_matmul_parameters, settings.precompute_ref_log_probs
    extras = Extras(
        num_mini_batches=1,
        copied=0 if is_once or model.use_peft else architecture.num_parameters,
        streamed=0 if is_once else size,
        scored_once=size if is_once else 0,
    )
    rows, steps = settings.train_batch_size, _num_steps(found, settings)
    lines = cost_table(architecture, extras, lengths, model, settings, rows_per_step=rows, num_steps=steps)
    return ["  a row is a pair: both its sequences, each with the prompt.", *lines]
