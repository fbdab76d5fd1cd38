"""YAML files that run lm-eval's own tasks on local rows: each includes the task as packaged and swaps its data.

    include: .../lm_eval/tasks/truthfulqa/truthfulqa_mc1.yaml
    task: truthfulqa_mc1
    dataset_path: json
    dataset_name: null
    dataset_kwargs: {data_files: {validation: .../validation.jsonl}}

Names stay lm-eval's, so `lm_eval run --include_path FOLDER --tasks NAME` runs the same. Groups are copied with one
correction (`mend`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from psft.errors import RequestError, shown

Files = Mapping[str, Mapping[str, Path]]


def write_task_files(
    place: Path,
    task: str,
    *,
    packaged: Path,
    files: Files | None,
    default_num_fewshot: int | None = None,
    num_fewshot: int | None = None,
) -> None:
    """Write the files of a task, or of a group and all its tasks.

    Args:
        place: folder they are written to.
        packaged: folder with lm-eval's own YAML files of it.
        files: of local rows, by lm-eval's dataset_name and split. None = the data come from the hub. Tasks of a group
            for which there are none are left out.
        default_num_fewshot: where the task names no number. num_fewshot: instead of the task's, too; None = keep it.
    Raises:
        RequestError: lm-eval has no such task, the data have nothing for it, or fewer examples than are to be shown.
    """
    import yaml
    from lm_eval.tasks import TaskManager

    index: Mapping[str, Any] = TaskManager(include_path=str(packaged), include_defaults=False).task_index
    if task not in index:
        raise RequestError(f"lm-eval has no task {shown(task)}. `lm_eval ls tasks` lists those there are.")
    leaves = {name: index[name] for name in _leaves(index, task)}
    if files is not None:
        leaves = {name: entry for name, entry in leaves.items() if entry.cfg.get("dataset_name") in files}
        if not leaves:
            raise RequestError(f"the data hold nothing for lm-eval's task {shown(task)}. Check its name.")
    made = {name: _leaf(name, entry, files) for name, entry in leaves.items()}
    for name, content in made.items():
        given = leaves[name].cfg.get("num_fewshot")
        wanted = num_fewshot if num_fewshot is not None else (default_num_fewshot if given is None else None)
        if wanted is not None and given != 0:  # lm-eval lets nobody change a zero, nor do we
            content["num_fewshot"] = wanted
        _check_examples(name, leaves[name].cfg, content, files)
    if index[task].cfg is not None and "group" in index[task].cfg:
        group = _only(index, index[task].cfg, leaves)
        made[task] = mend(group, [entry.cfg for entry in leaves.values()])
    place.mkdir(parents=True, exist_ok=True)
    for name, content in made.items():
        text = yaml.safe_dump(content, allow_unicode=True, sort_keys=False)
        (place / f"{name}.yaml").write_text(text, encoding="utf-8")


def _leaves(index: Mapping[str, Any], name: str) -> Iterator[str]:
    """Names of the tasks in a group or tag, itself if it is a task."""
    entry = index[name]
    if entry.tags and not (entry.cfg and "task" in entry.cfg):
        for child in sorted(entry.tags):
            yield from _leaves(index, child)
    elif entry.cfg is not None and "group" in entry.cfg:
        yield from _members(index, entry.cfg)
    else:
        yield name


def _members(index: Mapping[str, Any], group: Mapping[str, Any]) -> Iterator[str]:
    for member in _listed(group):
        yield from _below(index, member)


def _below(index: Mapping[str, Any], member: Any) -> Iterator[str]:
    """Names of the tasks behind one entry of a group's list: a name, or a group written into the list."""
    if isinstance(member, str):
        yield from _leaves(index, member)
    elif "group" in member and member["group"] not in index:
        yield from _members(index, member)
    else:
        yield from _leaves(index, member.get("group") or member["task"])


def _listed(group: Mapping[str, Any]) -> list[Any]:
    members = group.get("task") or []
    return [members] if isinstance(members, str) else list(members)


def _only(index: Mapping[str, Any], group: Mapping[str, Any], leaves: Collection[str]) -> dict[str, Any]:
    """The group without entries of its list, and of its groups' lists, that lead to none of the tasks."""
    kept = [member for member in _listed(group) if any(name in leaves for name in _below(index, member))]
    inner = [_only(index, one, leaves) if isinstance(one, dict) and "group" in one else one for one in kept]
    return {**group, "task": inner}


def _leaf(name: str, entry: Any, files: Files | None) -> dict[str, Any]:
    content: dict[str, Any] = {"include": str(entry.yaml_path), "task": name}
    if files is None:
        return content
    own = files[entry.cfg["dataset_name"]]
    content |= {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(path) for split, path in own.items()}},
    }
    if name.startswith("gpqa_"):
        content["process_docs"] = None  # the rows are in order already, see data._read_gpqa
    return content


def _check_examples(name: str, packaged: Mapping[str, Any], content: Mapping[str, Any], files: Files | None) -> None:
    """lm-eval fails on this later, with an assertion."""
    wanted = content.get("num_fewshot", packaged.get("num_fewshot")) or 0
    listed = (packaged.get("fewshot_config") or {}).get("samples")
    if isinstance(listed, list):
        available = len(listed)
    elif files is None:
        return
    else:
        splits = files[packaged["dataset_name"]]
        named = [packaged.get(key) for key in ("fewshot_split", "training_split", "validation_split", "test_split")]
        split = next(str(split) for split in named if split in splits)
        with splits[split].open("rb") as file:
            available = sum(1 for _ in file) - (packaged.get("fewshot_split") is None)  # the item itself is not shown
    if wanted > available:
        raise RequestError(
            f"{name}: {wanted} examples are to be shown, there are {available}. Set --num_fewshot lower."
        )


def mend(group: Mapping[str, Any], leaves: list[Mapping[str, Any]]) -> dict[str, Any]:
    """The group with aggregates of metrics that its tasks have, its subgroups too.

    lm-eval 0.4.13 aggregates `acc` for mmlu_flan_n_shot_generative, whose tasks have `exact_match`: the group gets no
    score (lm-evaluation-harness issue 3986). A group whose metrics its tasks have is left as it is.
    """
    known = [str(metric["metric"]) for leaf in leaves for metric in leaf.get("metric_list") or []]
    made = dict(group)
    asked = made.get("aggregate_metric_list")
    if asked and known and not any(metric["metric"] in known for metric in asked):
        made["aggregate_metric_list"] = [
            {"metric": name, "weight_by_size": asked[0].get("weight_by_size", True)} for name in dict.fromkeys(known)
        ]
    members = made.get("task")
    if isinstance(members, list):
        made["task"] = [mend(one, leaves) if isinstance(one, dict) and "group" in one else one for one in members]
    return made
