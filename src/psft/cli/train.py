"""`psft train`: from a request to a trained model in a run folder."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psft.errors import RequestError
from psft.machine import cache_folder

if TYPE_CHECKING:
    from psft.config import DataArguments, ModelArguments
    from psft.data import DataReport, Prepared
    from psft.trainers import DPOStageTrainer, PSFTConfig, PSFTTrainer

HELP = "fine-tune a model on demonstrations"


def run(argv: list[str]) -> int:
    """`psft train [RECIPE] [--flag value]...`"""
    from psft.cli.launch import requested, run_rank, start

    launch = requested(argv)
    return start(launch, ["train", *argv]) if launch is not None else run_rank(lambda: _train(argv))


def _train(argv: list[str]) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("psft").setLevel(logging.INFO)
    request = read_request(argv, command="train")
    run = prepare_run(request)
    run.train()
    if run.trainer.is_world_process_zero():
        print(f"\n{run.closing_lines()}")
    return run.trainer.stop_signal.exit_code


@dataclass(frozen=True)
class Request:
    """What a person asked for, each part checked by itself."""

    config: PSFTConfig
    data: DataArguments
    model: ModelArguments
    output_dir: Path
    model_name: str
    dataset: str


def read_request(argv: Sequence[str], *, command: str) -> Request:
    """Read recipe and flags. Everything wrong with the settings is reported at once, before anything is loaded.

    Args:
        argv: command line after the command's name.
    Raises:
        RequestError: unknown or contradictory settings, or none for the model or the data.
    """
    from psft.cli.arguments import parse_request
    from psft.cli.imports import without_collection
    from psft.cli.objective_choice import leave_out_other_objective
    from psft.config import DataArguments, LaunchArguments, ModelArguments
    from psft.recipes import load_recipe

    with without_collection():
        from psft.trainers import PSFTConfig

    sections = [PSFTConfig, DataArguments, ModelArguments, LaunchArguments]
    per_section = parse_request(
        argv, sections, command=command, load_recipe=load_recipe, reconcile=leave_out_other_objective
    )
    model = ModelArguments(**per_section[ModelArguments])
    data = DataArguments(**per_section[DataArguments])
    name, dataset = model_and_dataset(model, data, f"psft {command} quickstart")
    settings = per_section[PSFTConfig]
    for setting in ("num_threads", "matmul_precision"):  # this process is psft's own, unlike a script's
        settings.setdefault(setting, "auto")
    settings.setdefault("output_dir", f"runs/{Path(name).name}-{settings.get('objective', 'psft').replace(':', '-')}")
    if data.eval_dataset:
        settings.setdefault("eval_on_start", True)
        settings.setdefault("eval_strategy", "steps" if "eval_steps" in settings else "epoch")
    config = checked(PSFTConfig, settings)
    if config.packing:
        raise RequestError(
            "packing joins rows before windows and mini-batches are counted in them. Use padding_free=true: it joins "
            "the rows of each micro-batch, up to max_tokens_per_micro_batch."
        )
    return Request(config, data, model, Path(str(config.output_dir)), name, dataset)


def model_and_dataset(model: ModelArguments, data: DataArguments, example: str) -> tuple[str, str]:
    """The names of both.

    Args:
        example: a command with a recipe, for the message.
    Raises:
        RequestError: one of them is missing.
    """
    name, dataset = model.model_name_or_path, data.dataset
    if not name or not dataset:
        missing = [f"--{n} is missing" for n, v in (("model_name_or_path", name), ("dataset", dataset)) if not v]
        raise RequestError("; ".join(missing) + f". Give both, or a recipe: {example}.")
    return name, dataset


def checked(kind: type, settings: dict[str, Any]) -> Any:
    """`kind(**settings)`; whatever is wrong with them as a `RequestError`."""
    from psft.cli.imports import without_collection

    try:
        with without_collection():  # transformers imports some more of itself now
            return kind(**settings)
    except RequestError:
        raise
    except (ValueError, TypeError) as error:  # transformers and TRL check their own settings this way
        raise RequestError(" ".join(str(error).split())) from error


@dataclass
class PreparedRun:
    """A trainer ready to go, with what was found in the data."""

    trainer: PSFTTrainer | DPOStageTrainer
    reports: dict[str, DataReport]

    def train(self) -> None:
        """Train, measure held-out data at the end, save model, tokenizer and model card into the run folder.

        A run that a signal stopped before its last step leaves its last checkpoint instead; after it, the model.
        """
        from psft.cli.live_view import live_view

        trainer = self.trainer
        if trainer.benchmarks is not None and trainer.is_world_process_zero():
            trainer.benchmarks.announce()
        with live_view(trainer):
            trainer.train()
        is_stopped = trainer.stop_signal.number is not None
        if is_stopped and trainer.state.global_step < trainer.state.max_steps:
            return
        with trainer.recorder.failures_in_words():
            is_evaluated = trainer.recorder.last_evaluated_step == trainer.state.global_step
            if trainer.eval_dataset and not is_stopped and not is_evaluated:
                trainer.evaluate()
                trainer.recorder.write_summary()
            trainer.save_model(trainer.args.output_dir)
            if trainer.is_world_process_zero():
                trainer.create_model_card(model_name=trainer.recorder.folder.path.name)

    def closing_lines(self) -> str:
        """What to know at the end: where the model is and how the measured values moved."""
        summary = self.trainer.recorder.folder.read_json("summary.json")
        first, last = summary["first"], summary["last"]
        lines = [f"{'':24}{'first':>10}{'last':>10}"]
        lines += [f"{name:24}{_shown(first[name])}{_shown(last[name])}" for name in first if name in last]
        lines.append(
            f"\n{summary['steps']} steps in {summary['wall_time_s']:.0f} s. "
            f"Model and records: {self.trainer.args.output_dir}"
        )
        best = summary.get("best_checkpoint")
        if best is not None:
            lines.append(
                f"Best checkpoint: step {best['step']}, {best['by']} {100 * best['score']:.1f} %: "
                f"{Path(str(self.trainer.args.output_dir)) / 'best'}"
            )
        if self.trainer.stop_signal.number is not None:
            is_kept = self.trainer.args.save_strategy != "no"
            lines.append(
                "Stopped by a signal. Go on with --resume."
                if is_kept
                else "Stopped by a signal; save_strategy=no keeps no checkpoint to go on from."
            )
        return "\n".join(lines)


def _shown(value: float | None) -> str:
    return f"{'not finite':>10}" if value is None else f"{value:10.4f}"  # JSON has no NaN: summary.json says null


def prepare_run(request: Request) -> PreparedRun:
    """Load data and model and build the trainer. The run folder is claimed once nothing about the request can fail.

    Raises:
        RequestError: unusable data, model or combination, or an output folder that holds another run.
    """
    from psft.cli.imports import without_collection
    from psft.cli.run_folder import FolderClaim

    with without_collection():
        from psft.models import load_model, load_tokenizer, resolve_model
        from psft.models.attention import choose_attention
        from psft.trainers import PSFTTrainer

    config, data, model = request.config, request.data, request.model
    claim = FolderClaim(request.output_dir, config)
    trusted = {"trust_remote_code": config.trust_remote_code, "allow_pickle": config.allow_pickle}
    model_folder = resolve_model(request.model_name, model.model_revision, None, **trusted)
    tokenizer = load_tokenizer(request.model_name, config.chat_template_path, model.model_revision, **trusted)
    config.chat_template_path = None  # the tokenizer has it now
    # Rows arrive tokenised, cut and checked: TRL has nothing left to prepare.
    config.dataset_kwargs = {"skip_prepare_dataset": True}
    with claim.collecting() as rejected:
        with claim.keeping_rejected():
            prepared = _prepare_data(request, tokenizer, rejected)
        for name, part in prepared.items() if config.process_index == 0 else ():
            print(data_line(name, part))
        attention = choose_attention(
            model.attn_implementation,
            model_folder,
            padding_free=config.padding_free,
            is_half=bool(config.bf16 or config.fp16 or model.dtype == "bfloat16"),
            device_type=config.device.type,
            trust_remote_code=config.trust_remote_code,
        )
        if attention.why is not None and config.process_index == 0:
            print(attention.why)
        weights = load_model(
            request.model_name,
            dtype=model.dtype,
            force_pure_bf16=config.force_pure_bf16,
            attn_implementation=attention.name,
            revision=model.model_revision,
            **trusted,
        )
        train = prepared.pop("train")
        max_length = config.max_length
        if config.padding_free:
            config.max_length = None  # TRL refuses a limit that it cannot enforce on such rows; ours are cut already
        trainer = PSFTTrainer(
            model=weights,
            args=config,
            train_dataset=train.dataset,
            eval_dataset={name: part.dataset for name, part in prepared.items()} or None,
            processing_class=tokenizer,
            peft_config=lora_config(model),
        )
        config.max_length = max_length
        trainer.schedule()  # refuses impossible batch sizes before the folder is claimed
        claim.take(trainer)
    reports = {"train": train.report, **{name: part.report for name, part in prepared.items()}}
    trainer.recorder.extra = about_request(model, data, reports)
    return PreparedRun(trainer, reports)


def about_request(model: ModelArguments, data: DataArguments, reports: dict[str, DataReport]) -> dict[str, Any]:
    """What run.json says about where model and data are from."""
    return {
        "model": {f.name: getattr(model, f.name) for f in fields(model)},
        "data": {f.name: getattr(data, f.name) for f in fields(data)},
        "data_reports": {name: report.to_dict() for name, report in reports.items()},
    }


def _prepare_data(request: Request, tokenizer: Any, rejected: Path) -> dict[str, Prepared]:
    """The training set under "train" and every held-out set under its name."""
    from psft.data import prepare_dataset

    data, config = request.data, request.config

    shared: dict[str, Any] = {
        "tokenizer": tokenizer,
        "max_length": config.max_length,
        "dataset_format": data.dataset_format,
        "columns": data.columns,
        "system_prompt": data.system_prompt,
        "on_bad_row": data.on_bad_row,
        "num_processes": config.dataset_num_proc,
        "cache_dir": data_cache_folder(data),
    }
    prepared = {
        "train": prepare_dataset(
            request.dataset, split=data.dataset_split, config_name=data.dataset_config, max_rows=data.max_rows,
            rejected_path=rejected, description="training data", **shared,
        )
    }  # fmt: skip
    for name, source in named_sources(data.eval_dataset or []).items():
        prepared[name] = prepare_dataset(
            source,
            split=data.eval_split,
            config_name=data.dataset_config,
            description=f"held-out data {name}",
            **shared,
        )
    return prepared


def data_cache_folder(data: DataArguments) -> Path | None:
    """Where prepared data are kept and looked for; None: nowhere.

    Raises:
        RequestError: a folder is named and nothing is to be kept.
    """
    if not data.data_cache:
        if data.data_cache_dir is not None:
            raise RequestError("data_cache_dir has no effect with no_data_cache. Give one of them.")
        return None
    if data.data_cache_dir is not None:
        return Path(data.data_cache_dir).expanduser()
    return cache_folder() / "prepared"


def named_sources(sources: Sequence[str]) -> dict[str, str]:
    """Held-out sources by name: NAME=SOURCE as given, else the source's own short name.

    Raises:
        RequestError: two of one name, or one called train.
    """
    named: dict[str, str] = {}
    for text in sources:
        name, equals, source = text.partition("=")
        if not equals or not name.replace("_", "").replace("-", "").isalnum():  # a "=" inside a path or query
            source = text
            name = Path(text.partition("?")[0]).name.partition(".")[0] or "heldout"
        if name in named or name == "train":
            raise RequestError(f"eval_dataset {text}: the name '{name}' is taken. Give it another: NAME=SOURCE.")
        named[name] = source
    return named


def data_line(name: str, part: Prepared) -> str:
    """What was found in a source, in one line."""
    report = part.report
    share = report.num_trained_tokens / max(report.num_tokens, 1)
    counts = {"truncated": report.num_truncated, "rejected": report.num_rejected}
    notes = "".join(f", {count:,} {what}" for what, count in counts.items() if count)
    return (
        f"{name}: {report.num_used:,} rows of {report.source} ({report.format}), {report.num_tokens:,} tokens, "
        f"{share:.0%} trained, end token {report.end_token}{notes}"
        + ("" if part.cached_in is None else f"; prepared before, read from {part.cached_in}")
    )


def lora_config(model: ModelArguments) -> Any:
    """The `LoraConfig` that is asked for, or None."""
    if not model.use_peft:
        return None
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise RequestError("use_peft needs the peft package. Install it: pip install 'psft[peft]'.") from error
    return LoraConfig(
        r=model.lora_r,
        lora_alpha=model.lora_alpha,
        lora_dropout=model.lora_dropout,
        target_modules=model.lora_target_modules or "all-linear",
        task_type="CAUSAL_LM",
    )
