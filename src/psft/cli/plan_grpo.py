"""`psft plan` of a GRPO recipe: what `psft grpo` would do with the same request. No model, no answers."""

from __future__ import annotations

from typing import Any

from psft.cli.plan import FoundData, architecture_of, common_notes, heading, is_local, look_at_data, settled, table

_SHOWN = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "max_steps", "num_train_epochs", "weight_decay", "epsilon",
    "epsilon_high", "beta", "loss_type", "scale_rewards", "temperature", "top_p", "max_prompt_length",
    "max_completion_length", "overlong_buffer", "overlong_weight", "mask_truncated_completions", "dynamic_sampling",
    "dynamic_sampling_by", "max_sampling_rounds", "use_vllm", "gradient_checkpointing", "bf16", "seed", "output_dir",
)  # fmt: skip


def run(argv: list[str]) -> int:
    """Prints the plan of a request. Returns the exit code.

    Raises:
        RequestError: what `psft grpo` would refuse: unknown settings or rewards, contradictions, unusable local data.
    """
    from psft.cli.arguments import parse_request
    from psft.cli.grpo import read_prompts
    from psft.cli.imports import without_collection
    from psft.config import DataArguments, LaunchArguments, ModelArguments, PlanArguments
    from psft.models.resolve import check_dtype
    from psft.recipes import load_recipe

    with without_collection():
        from psft.trainers import GRPOStageConfig

        sections = (PlanArguments, DataArguments, ModelArguments, GRPOStageConfig, LaunchArguments)
        given = parse_request(argv, sections, command="plan", load_recipe=load_recipe)
        data, model = DataArguments(**given[DataArguments]), ModelArguments(**given[ModelArguments])
        settings = settled(GRPOStageConfig, given[GRPOStageConfig])
    check_dtype(model.dtype, force_pure_bf16=settings.force_pure_bf16)
    rewards = settings.reward_set()

    def prepare(tokenizer: Any, data: Any, settings: Any) -> Any:
        return read_prompts(data, settings, tokenizer, rewards)

    found = _look_at_prompts(data, model, settings, prepare)
    heading("Settings")
    table(_resolved_settings(data, model, settings, set(given[GRPOStageConfig])))
    heading("Rewards")
    table([(name, f"weight {weight:g}") for name, weight in rewards.weights.items()])
    print(f"  a reward that fails: {settings.on_reward_failure}")
    heading("Batches")
    table(_batches(found, settings))
    heading("Prompts")
    table(_prompts(found, data))
    settings.max_length = None  # what the notes on a model's context look at
    architecture = architecture_of(model)
    notes = [*found.notes, *common_notes("grpo", data, model, settings, architecture)]
    longest = (settings.max_prompt_length or 0) + settings.max_completion_length
    if architecture is not None and longest > architecture.context:
        notes.append(f"prompt and answer may have {longest} tokens, and the model is made for {architecture.context}")
    notes.append("memory and time are not estimated: they depend on how long the answers become")
    heading("Notes")
    print("\n".join(f"  - {note}" for note in notes))
    return 0


def _look_at_prompts(data: Any, model: Any, settings: Any, prepare: Any) -> FoundData:
    """As `look_at_data`; tasks of reasoning-gym can be counted without a tokenizer."""
    from psft.data.gym import PREFIX, open_gym_task
    from psft.models.resolve import local_folder

    name = model.model_name_or_path
    has_tokenizer = name is not None and local_folder(name, model.model_revision) is not None
    if has_tokenizer or not (data.dataset or "").startswith(PREFIX):
        return look_at_data(data, model, settings, prepare)
    num_rows = min(len(open_gym_task(data.dataset)), data.max_rows or 10**9)
    note = f"not at hand: the tokenizer of {name}, so copies and long prompts are not counted (plan downloads nothing)"
    return FoundData(num_rows, "counted", notes=[note])


def _resolved_settings(data: Any, model: Any, settings: Any, given: set[str]) -> list[tuple[str, str]]:
    rows = [("model_name_or_path", str(model.model_name_or_path)), ("dataset", f"{data.dataset}")]
    rows += [("dataset_split", data.dataset_split)] if data.dataset and not is_local(data.dataset) else []
    rows += [("system_prompt", data.system_prompt)] if data.system_prompt else []
    rows += [("lora", f"rank {model.lora_r}, alpha {model.lora_alpha}")] if model.use_peft else []
    shown_elsewhere = {"rewards", "train_batch_size", "mini_batch_size", "num_generations"}
    for name in [*_SHOWN, *sorted(given - set(_SHOWN) - shown_elsewhere)]:
        value = getattr(settings, name, None)
        is_idle = name == ("num_train_epochs" if settings.max_steps > 0 else "max_steps")
        if value is not None and not is_idle:
            text = f"{value:g}" if isinstance(value, float) else str(getattr(value, "value", value))
            rows.append((name, text if name in given else f"{text}  (default)"))
    return rows


def _batches(found: FoundData, settings: Any) -> list[tuple[str, str]]:
    size, mini, answers = settings.train_batch_size, settings.mini_batch_size, settings.num_generations
    steps = size // mini
    facts = [
        ("train batch", f"{size} prompts x {answers} answers = {size * answers}, one old policy"),
        ("optimizer step", f"{mini} prompts x {answers} answers = {mini * answers}; {steps} to a batch"),
        ("forward pass", f"{settings.per_device_train_batch_size} answers on a device"),
    ]
    if settings.max_steps > 0:
        num_steps: int | None = settings.max_steps
    else:
        num_steps = None if found.num_rows is None else int(found.num_rows // size * steps * settings.num_train_epochs)
    if num_steps is not None:
        num_batches = -(-num_steps // steps)
        facts += [("steps in all", f"{num_steps}, in {num_batches} batches")]
        facts += [("answers in all", f"{num_batches * size * answers:,}, and those of groups that are dropped")]
    return facts


def _prompts(found: FoundData, data: Any) -> list[tuple[str, str]]:
    if found.prepared is None:
        rows = "unknown" if found.num_rows is None else f"{found.num_rows:,} rows, copies among them"
        return [(str(data.dataset), f"{rows}  ({found.source}); not read: see the notes")]
    report: Any = found.prepared.report
    return [("prompts used", report.line)]
