"""`psft plan`: what `psft train`, or a stage after it, would do with the same request. No weights, no downloads."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psft.errors import RequestError, first_line, shown

if TYPE_CHECKING:
    from psft.config import LaunchArguments
    from psft.data import Prepared
    from psft.models.architectures import Architecture
    from psft.objectives import Objective

HELP = "Dry run of psft train, dpo, grpo or run: settings, steps, data, memory and time; no weights, no network."

_SHOWN = (
    "loss_aggregation",
    "ref_model_name_or_path",
    "target_clip_fraction",
    "target_drift",
    "controller_adjusts",
    "train_batch_size",
    "mini_batch_size",
    "sft_warmup_steps",
    "sft_warmup_mini_batch_size",
    "sft_warmup_learning_rate",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "num_train_epochs",
    "max_steps",
    "weight_decay",
    "max_length",
    "max_tokens_per_micro_batch",
    "gradient_checkpointing",
    "bf16",
    "dataloader_drop_last",
    "seed",
    "output_dir",
)


@dataclass
class FoundData:
    """What is known about the training set. num_rows: None if unknown; source says where the number is from."""

    num_rows: int | None
    source: str
    prepared: Prepared | None = None
    tokenizer: Any = None
    notes: list[str] = field(default_factory=list)


def run(argv: list[str]) -> int:
    """Prints the plan of a request. Returns the exit code.

    Raises:
        RequestError: what the command itself would refuse: unknown settings, contradictions, unusable local data.
    """
    stage = _stage_asked_for(argv)
    if stage == "run":
        from psft.cli import plan_pipeline

        return plan_pipeline.run(argv)
    if stage == "dpo":
        from psft.cli import plan_dpo

        return plan_dpo.run(argv)
    if stage == "grpo":
        from psft.cli import plan_grpo

        return plan_grpo.run(argv)
    if stage != "train":
        raise RequestError(f"psft plan knows train, dpo and grpo, not {shown(stage, 40)}.")
    return _plan_training(argv)


def _stage_asked_for(argv: Sequence[str]) -> str:
    """The command whose request this is: `--stage` says so, or the recipe."""
    from psft.recipes import stage_of

    for position, token in enumerate(argv):
        flag, equals, value = token.partition("=")
        if flag == "--stage":
            return value if equals else next(iter(argv[position + 1 :]), "")
    if argv and not argv[0].startswith("-"):
        with contextlib.suppress(RequestError):  # reading the request says what is wrong with a recipe, and where
            return stage_of(argv[0])
    return "train"


def _plan_training(argv: list[str]) -> int:
    from psft.cli.arguments import parse_request
    from psft.cli.imports import without_collection, without_models
    from psft.cli.objective_choice import leave_out_other_objective
    from psft.config import DataArguments, LaunchArguments, ModelArguments, PlanArguments
    from psft.models.resolve import check_dtype
    from psft.recipes import load_recipe

    with without_collection(), without_models():
        from psft.cli.objective_facts import objective_facts
        from psft.trainers import PSFTConfig

        sections = (PlanArguments, DataArguments, ModelArguments, PSFTConfig, LaunchArguments)
        given = parse_request(
            argv, sections, command="plan", load_recipe=load_recipe, reconcile=leave_out_other_objective
        )
        data, model = DataArguments(**given[DataArguments]), ModelArguments(**given[ModelArguments])
        launch = LaunchArguments(**given[LaunchArguments])
        settings = settled(PSFTConfig, given[PSFTConfig])
    _check_shares(settings, launch)
    check_dtype(model.dtype, force_pure_bf16=settings.force_pure_bf16)
    architecture = architecture_of(model)
    found = look_at_data(data, model, settings)

    objective = settings.resolved_objective()

    heading("Settings")
    processes = [(name, str(value)) for name, value in given[LaunchArguments].items() if value is not None]
    table([*_resolved_settings(data, model, settings, objective, set(given[PSFTConfig])), *processes])
    heading("Objective")
    table(objective_facts(objective, settings, use_peft=model.use_peft))
    heading("Steps")
    table(_steps(found, settings))
    heading("Data")
    table(_data_facts(found, data, settings))
    if found.prepared is not None:
        from psft.data import render_example

        print("\n" + indent(shortened(render_example(found.prepared, found.tokenizer))))
    heading("Micro-batches")
    table(_micro_batches(found, model, launch, settings, objective))
    heading("Memory and time (a rough estimate from sizes, not a measurement)")
    print("\n".join(_costs(architecture, found, model, settings, objective)))
    notes = _notes(data, model, settings, objective, found, architecture)
    if notes:
        heading("Notes")
        print("\n".join(f"  - {note}" for note in notes))
    return 0


def settled(kind: type, given: dict[str, Any]) -> Any:
    """The trainer's own settings, filled in and checked as the command does."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        return kind(**given)
    except RequestError:
        raise
    except (ValueError, TypeError) as error:
        raise RequestError(f"the settings do not fit together: {first_line(error)}. Change one of them.") from error


def _check_shares(settings: Any, launch: LaunchArguments) -> None:
    """Refuse, as the ranks would, a mini-batch that they cannot share."""
    number, rows = 1 if launch.num_processes is None else launch.num_processes, settings.mini_batch_size
    if number < 1:
        raise RequestError(f"num_processes={number} must be 1 or more.")
    if rows % number:
        raise RequestError(f"mini_batch_size={rows} cannot be shared by {number} ranks. Use a multiple of {number}.")


def _prepare(tokenizer: Any, data: Any, settings: Any) -> Prepared:
    from psft.cli.train import data_cache_folder
    from psft.data import prepare_dataset

    return prepare_dataset(
        data.dataset,
        tokenizer=tokenizer,
        max_length=settings.max_length,
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


def look_at_data(
    data: Any, model: Any, settings: Any, prepare: Callable[[Any, Any, Any], Prepared] = _prepare
) -> FoundData:
    """Tokenises what is on this machine; for anything else the known number of rows, with a note.

    Args:
        prepare: (tokenizer, `DataArguments`, settings) -> the tokenised training set.
    """
    from psft.data.sources import read_rows
    from psft.models.resolve import load_tokenizer, local_folder
    from psft.recipes import known_dataset

    if data.dataset is None:
        return FoundData(None, "no dataset named", notes=["name the demonstrations with --dataset"])
    if not is_local(data.dataset):
        known = known_dataset(data.dataset, data.dataset_split)
        where = f"not at hand: data set {data.dataset} is on the hub, and plan downloads nothing"
        if known is None:
            return FoundData(None, "unknown", notes=[f"{where}; its number of rows is unknown"])
        rows = min(known[0], data.max_rows or known[0])
        return FoundData(rows, known[1], notes=[f"{where}; its number of rows is from psft's table"])
    name = model.model_name_or_path
    notes = []
    if name and local_folder(name, model.model_revision) is not None:
        try:
            tokenizer = load_tokenizer(
                name,
                settings.chat_template_path,
                model.model_revision,
                trust_remote_code=settings.trust_remote_code,
                allow_pickle=settings.allow_pickle,
            )
        except RequestError as error:
            notes.append(f"not at hand: {error}")
        else:
            prepared = prepare(tokenizer, data, settings)
            return FoundData(prepared.report.num_used, "counted", prepared, tokenizer)
    else:
        notes.append(f"not at hand: the tokenizer of {name}, so tokens are not counted (plan downloads nothing)")
    num_rows = sum(1 for _ in read_rows(data.dataset, split=data.dataset_split, max_rows=data.max_rows))
    return FoundData(num_rows, "counted", notes=notes)


def is_local(source: str) -> bool:
    """Whether `source` needs no network. A path that is missing counts: reading it says so."""
    from psft.data.files import FILE_SUFFIXES

    looks_like_path = source.startswith((".", "/", "~")) or source.lower().endswith(FILE_SUFFIXES)
    return (
        source.startswith(("reasoning-gym:", "reasoning-gym-pairs:"))
        or looks_like_path
        or Path(source).expanduser().exists()
    )


def _resolved_settings(
    data: Any, model: Any, settings: Any, objective: Objective, given: set[str]
) -> list[tuple[str, str]]:
    rows = [("model_name_or_path", str(model.model_name_or_path)), ("dataset", f"{data.dataset}")]
    rows += [("dataset_split", data.dataset_split)] if data.dataset and not is_local(data.dataset) else []
    rows += [("eval_dataset", ", ".join(data.eval_dataset))] if data.eval_dataset else []
    rows += [("system_prompt", data.system_prompt)] if data.system_prompt else []
    rows += [("lora", f"rank {model.lora_r}, alpha {model.lora_alpha}")] if model.use_peft else []
    shown = {"objective": settings.objective, **objective.settings}
    others = [*_SHOWN, *sorted(given - {*_SHOWN, *shown, "objective_settings"})]
    shown |= {name: getattr(settings, name, None) for name in others}
    given = given | (settings.objective_settings or {}).keys()
    for name, value in shown.items():
        is_idle = name == ("num_train_epochs" if settings.max_steps > 0 else "max_steps")
        is_idle = is_idle or (name.startswith("sft_warmup") and not settings.sft_warmup_steps)
        if value is not None and not is_idle:
            text = f"{value:g}" if isinstance(value, float) else str(getattr(value, "value", value))
            rows.append((name, text if name in given else f"{text}  (default)"))
    return rows


def _schedule(found: FoundData, settings: Any, *, with_warmup: bool = True) -> Any:
    from psft.window.schedule import Schedule

    return Schedule(
        found.num_rows or 0,
        settings.train_batch_size,
        settings.mini_batch_size,
        drop_last=settings.dataloader_drop_last,
        warmup_steps=settings.sft_warmup_steps if with_warmup else 0,
        warmup_mini_batch_size=settings.sft_warmup_mini_batch_size,
    )


def _steps(found: FoundData, settings: Any) -> list[tuple[str, str]]:
    from psft.window.schedule import plan_epoch

    per_window = settings.train_batch_size // settings.mini_batch_size
    facts = [
        ("mini-batches per window", f"{per_window}  ({settings.train_batch_size} rows / {settings.mini_batch_size})"),
    ]
    if found.num_rows is None:
        return [*facts, ("windows per epoch", "unknown: the number of rows is not known")]
    epoch = plan_epoch(
        found.num_rows,
        train_batch_size=settings.train_batch_size,
        mini_batch_size=settings.mini_batch_size,
        drop_last=settings.dataloader_drop_last,
    )
    facts += [
        ("rows", f"{found.num_rows}  ({found.source})"),
        ("windows per epoch", str(epoch.num_windows)),
        ("steps per epoch", f"{epoch.num_steps}" + ("  (after the warm-up)" if settings.sft_warmup_steps else "")),
    ]
    if epoch.num_rows_dropped:
        facts.append(
            ("rows left out per epoch", f"{epoch.num_rows_dropped}  (they fill no window; dataloader_drop_last)")
        )
    total = _num_steps(found, settings)
    warmup = min(settings.sft_warmup_steps, total)
    if warmup:
        facts.append(("warm-up steps of plain SFT", str(warmup)))
        facts.append(("steps after the warm-up", str(total - warmup)))
    facts.append(("steps in all", f"{total}  ({_length_of_run(settings)})"))
    return facts


def _length_of_run(settings: Any) -> str:
    return "max_steps" if settings.max_steps > 0 else f"{settings.num_train_epochs:g} epochs"


def _num_steps(found: FoundData, settings: Any) -> int:
    if settings.max_steps > 0:
        return int(settings.max_steps)
    return int(_schedule(found, settings).num_steps(settings.num_train_epochs))


def _data_facts(found: FoundData, data: Any, settings: Any) -> list[tuple[str, str]]:
    if found.prepared is None:
        return [(str(data.dataset), "not read: see the notes")]
    report = found.prepared.report
    spread = ", ".join(f"{name} {value}" for name, value in report.length_quantiles.items())
    facts = [
        ("format", report.format),
        ("rows used", f"{report.num_used} of {report.num_rows}"),
        ("tokens", f"{report.num_tokens}, {report.num_trained_tokens} of them trained"),
        ("tokens per row", spread),
        ("truncated", f"{report.num_truncated} rows (max_length {settings.max_length})"),
        ("end token", f"{report.end_token}  (trained)"),
    ]
    if found.prepared.cached_in is not None:
        facts.append(("prepared before", f"read from {found.prepared.cached_in}"))
    if report.num_rejected:
        facts.append(("rejected", ", ".join(f"{count} x {reason}" for reason, count in report.reasons.items())))
    return facts


def _micro_batches(
    found: FoundData, model: Any, launch: LaunchArguments, settings: Any, objective: Objective
) -> list[tuple[str, str]]:
    from psft.cli.plan_batches import micro_batch_facts
    from psft.data.table import row_lengths
    from psft.models.resolve import local_folder

    lengths = None if found.prepared is None else row_lengths(found.prepared.table)
    name = model.model_name_or_path
    folder = None if name is None else local_folder(name, model.model_revision)
    return micro_batch_facts(lengths, folder, model, settings, objective, num_ranks=launch.num_processes or 1)


def _costs(
    architecture: Architecture | None, found: FoundData, model: Any, settings: Any, objective: Objective
) -> list[str]:
    from psft.cli.plan_costs import Lengths, cost_lines
    from psft.models.architectures import find_architecture

    if architecture is None:
        return [f"  not at hand: the sizes of {model.model_name_or_path}; no estimate"]
    longest, mean = _lengths(found, architecture, settings)
    lengths = Lengths(longest, mean, is_bound=found.prepared is None, num_rows=found.num_rows)
    named = settings.ref_model_name_or_path
    reference = find_architecture(named, settings.ref_model_revision) if named else architecture
    num_steps = _num_steps(found, settings) if found.num_rows or settings.max_steps > 0 else None
    return cost_lines(architecture, reference, lengths, model, settings, objective, num_steps=num_steps)


def _lengths(found: FoundData, model: Architecture, settings: Any) -> tuple[int, float]:
    """Longest and average tokens of a row; without data both are max_length (or the model's context)."""
    if found.prepared is not None:
        report = found.prepared.report
        return int(report.length_quantiles["max"]), report.num_tokens / report.num_used
    bound = settings.max_length or model.context
    return bound, float(bound)


def _notes(
    data: Any, model: Any, settings: Any, objective: Objective, found: FoundData, architecture: Architecture | None
) -> list[str]:
    from psft.cli.objective_facts import objective_notes

    common = common_notes("train", data, model, settings, architecture)
    return [*found.notes, *objective_notes(objective, settings), *_benchmark_notes(settings), *common]


def architecture_of(model: Any) -> Architecture | None:
    """Sizes of the model; of one that a recipe is to make, those of what the recipe starts from."""
    from psft.models.architectures import find_architecture
    from psft.recipes import load_recipe, maker_of

    name = model.model_name_or_path
    if not name:
        return None
    if (found := find_architecture(name, model.model_revision)) is not None:
        return found
    maker = maker_of(name)
    return None if maker is None else find_architecture(load_recipe(maker[1])["model_name_or_path"])


def common_notes(command: str, data: Any, model: Any, settings: Any, architecture: Architecture | None) -> list[str]:
    """What a person should know about model, data and folder before `psft COMMAND`."""
    from psft.models.quickstart import NAME
    from psft.models.resolve import local_folder
    from psft.recipes import maker_of

    notes = []
    if model.model_name_or_path is None:
        notes.append("name the model with --model_name_or_path")
    elif local_folder(model.model_name_or_path, model.model_revision) is None:
        maker = maker_of(model.model_name_or_path)
        how = "builds it in the cache once (92 MB download)" if model.model_name_or_path == NAME else "downloads it"
        how = f"psft {command} {how}" if maker is None else f"psft {maker[0]} {maker[1]} makes it"
        notes.append(f"not at hand: model {model.model_name_or_path}; {how}")
    if settings.output_dir and any(
        (Path(settings.output_dir) / file).exists() for file in ("run.json", "metrics.jsonl")
    ):
        if not settings.overwrite_output_dir:
            notes.append(
                f"{settings.output_dir} holds another run: psft {command} will refuse it; name another --output_dir"
            )
    for source in data.eval_dataset or []:
        name, separator, where = source.partition("=")
        where = where if separator and not name.startswith("reasoning-gym:") else source
        if not is_local(where):
            notes.append(f"not at hand: evaluation data {where}")
    if architecture is not None and settings.max_length and settings.max_length > architecture.context:
        notes.append(
            f"max_length {settings.max_length} is more than the {architecture.context} tokens the model is made for"
        )
    return notes


def _benchmark_notes(settings: Any) -> list[str]:
    """What an evaluation while training takes, or why it would be refused."""
    if not settings.eval_suite:
        return []
    from psft.evaluation.in_training import cost_in_words, fetched_benchmarks, load_benchmarks

    try:
        if absent := fetched_benchmarks(settings):
            names = ", ".join(benchmark.shown_name for benchmark in absent)
            return [f"not at hand: {names}; psft train fetches what it evaluates while training"]
        return [f"each evaluation: {cost_in_words(load_benchmarks(settings))}"]
    except RequestError as error:
        return [f"psft train will refuse: {error}"]


def heading(title: str) -> None:
    """Print the title of a section."""
    print(f"\n{title}\n{'-' * len(title)}")


def table(rows: list[tuple[str, str]]) -> None:
    """Print names and values, aligned."""
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")


def indent(text: str) -> str:
    """Text as an example stands in the plan."""
    return "\n".join(f"  | {line}" for line in text.splitlines())


def shortened(text: str, most: int = 3000) -> str:
    """The beginning and the end of a long example, so that the end token stays in sight. Sizes in characters."""
    if len(text) <= most:
        return text
    return f"{text[: most // 2]}\n[... {len(text) - most} characters ...]\n{text[-(most // 2) :]}"
