"""What a pipeline file may say; everything else is refused, with file, stage and what to do."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from psft.errors import RequestError
from psft.pipelines import Pipeline, Reference, read_pipeline
from psft.pipelines.commands import arguments_of

GOOD = """
pipeline: mine
shared: {train: {seed: 3, max_steps: 5}, eval: {suite: [math, ood]}}
stages:
  - {name: a, command: train, recipe: quickstart, settings: {max_steps: 7}}
  - {name: b, command: eval, model: '${a.model}'}
  - {name: c, command: dpo, recipe: dpo-quickstart, model: '${a.last}'}
  - {name: d, command: report, settings: {base: ['${b.results}']}}
"""


def read(tmp_path: Path, text: str) -> Pipeline:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return read_pipeline(str(path))


def test_a_file_becomes_stages(tmp_path: Path) -> None:
    """Goes red if shared settings win over a stage's own, or a report leaves out a run."""
    pipeline = read(tmp_path, GOOD)
    assert pipeline.output_dir == "runs/mine" and [stage.name for stage in pipeline.stages] == list("abcd")
    a, b, c, d = pipeline.stages
    assert a.settings == {"seed": 3, "max_steps": 7} and b.model == Reference("a", "model")
    assert d.runs == (Reference("a", "folder"), Reference("c", "folder"))
    assert d.references() == [Reference("a", "folder"), Reference("c", "folder"), Reference("b", "results")]
    assert [stage.name for stage in pipeline.upstream(d)] == ["a", "b", "c"]
    assert pipeline.base_model(c) == "smollm2-135m-instruct"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("pipeline: mine", "pipeline: [1]", "give it a plain name"),
        ("shared:", "shard:", "unknown key 'shard'. Did you mean shared?"),
        ("shared: {train", "shared: {trane", "no command 'trane'. Did you mean train?"),
        ("name: b, command: eval", "name: b, comand: eval", "stage b: unknown key 'comand'. Did you mean command?"),
        ("name: b, command: eval", "name: b, command: evil", "stage b: no command 'evil'. Did you mean eval?"),
        ("name: c,", "name: a,", "stage a: an earlier stage has this name"),
        ("name: c,", "name: ../c,", "stage ../c: `name` is '../c'; give a plain one"),
        ("name: c,", "name: aside,", "stage aside: `name` is 'aside'"),
        ("'${a.model}'", "'${A.model}'", "stage b: ${A.model}: 'A' is no stage"),
        ("'${a.model}'", "'${c.model}'", "'c' stands after it, and stages run in order"),
        ("'${a.model}'", "'${b.model}'", "'b' stands after it"),
        ("'${a.model}'", "'${a.modle}'", "psft train leaves no 'modle'. Did you mean model?"),
        ("'${a.model}'", "'x/${a.model}'", "a reference is ${STAGE.RESULT} and stands alone"),
        ("'${b.results}'", "'${b.model}'", "psft eval leaves no 'model'"),
        ("model: '${a.model}'", "settings: {}", "stage b: `model` is missing"),
        ("{max_steps: 7}", "{output_dir: x}", "stage a: output_dir is the pipeline's own to set"),
        ("{max_steps: 7}", "{resume: true}", "stage a: resume is the pipeline's own to set"),
        ("{max_steps: 7}", "{model_name_or_path: x}", "`model: ...` instead of model_name_or_path"),
        ("{max_steps: 7}", "[1]", "stage a: `settings` must be a mapping"),
        ("recipe: quickstart", "recipe: dpo-quickstart", "is for psft dpo. Set `command: dpo`"),
        ("recipe: quickstart", "recipe: pipeline-quickstart-dpo", "is a pipeline, and one stage runs one command"),
        ("recipe: quickstart", "recipe: quickstrat", "did you mean quickstart?"),
        ("command: eval, model", "command: eval, recipe: x, model", "psft eval takes no recipe"),
        ("stages:", "stages: []\nmore:", "`stages` must be a list of stages"),
        ("pipeline: mine\n", "", "is no pipeline: it has no key `pipeline: NAME`"),
        ("max_steps: 7", "max_steps: 7, max_steps: 8", "is given twice"),
    ],
)
def test_what_is_wrong_is_refused_with_its_stage(tmp_path: Path, old: str, new: str, message: str) -> None:
    """Goes red if one of these passes, or the message does not name file, stage and what to do."""
    assert old in GOOD
    with pytest.raises(RequestError) as caught:
        read(tmp_path, GOOD.replace(old, new, 1))
    assert message in str(caught.value) and "mine.yaml" in str(caught.value)


def test_all_problems_come_together(tmp_path: Path) -> None:
    """Goes red if a person has to run again for each."""
    with pytest.raises(RequestError) as caught:
        read(tmp_path, GOOD.replace("recipe: quickstart", "recipe: nope").replace("${a.model}", "${x.model}"))
    assert "stage a:" in str(caught.value) and "stage b:" in str(caught.value)


def test_a_recipe_is_no_pipeline_and_the_command_is_named() -> None:
    """Goes red if the advice is lost."""
    with pytest.raises(RequestError, match="psft dpo dpo-quickstart runs it"):
        read_pipeline("dpo-quickstart")


def test_settings_reach_the_command_as_they_stand(tmp_path: Path) -> None:
    """Every kind of value is read back by the command's own parser. Goes red if inf, null, lists, mappings, commas or
    texts that look like flags are spelled in a way that it reads otherwise."""
    from psft.cli.arguments import parse_request
    from psft.config import DataArguments, PSFTFields

    settings = {
        "epsilon_high": math.inf, "objective_settings": {"a": 1, "b": [1, 2]}, "stop_when": ["nll>1", "drift>0.1"],
        "system_prompt": "--say it, plainly: [x]=${y", "max_rows": None, "eval_dataset": ["a=b.jsonl"],
        "columns": {"question": "q,1"}, "track_clipped_tokens": False, "train_batch_size": 8,
    }  # fmt: skip
    pipeline = read(tmp_path, "pipeline: p\nstages:\n- {name: a, command: train, model: m}\n")
    from dataclasses import replace

    stage = replace(pipeline.stages[0], settings=settings)
    arguments = arguments_of(stage, Path("out"), str, resume=False)
    assert arguments[0] == "train" and arguments[1] == "--model_name_or_path=m" and arguments[-1] == "--output_dir=out"
    given = parse_request(arguments[2:-1], [PSFTFields, DataArguments], command="train")
    assert {**given[PSFTFields], **given[DataArguments]} == settings
