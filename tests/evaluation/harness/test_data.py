"""Laws of local data as lm-eval's rows."""

from __future__ import annotations

import json
import random

import pytest

from psft.errors import RequestError
from psft.evaluation.harness.data import find_file, prepare
from psft.evaluation.harness.registry import TABLE_11, choose_tasks


def rows_of(data, name, split):
    return [json.loads(line) for line in data.files[name][split].read_text().splitlines()]


def get(name, data_dir, **more):
    (task,) = choose_tasks([name])
    return prepare(task, find_file(task, data_dir), any_rows=True, **more)


def test_rows_are_those_of_the_file(data_dir):
    """Goes red if a choice is lost, an answer shifted, a quoted line break cut, or a split mistaken."""
    mmlu = get("alignment-tax/mmlu", data_dir)
    assert set(mmlu.files) == {"anatomy", "astronomy", "virology"} and set(mmlu.files["virology"]) == {"dev", "test"}
    assert rows_of(mmlu, "astronomy", "test")[3] == {
        "question": 'astronomy test 3,\n"really"?', "subject": "astronomy", "choices": ["1", "2", "None", "4"],
        "answer": 3,
    }  # fmt: skip
    cmmlu = rows_of(get("alignment-tax/cmmlu", data_dir), "anatomy", "dev")
    assert len(cmmlu) == 5
    assert cmmlu[1] == {"Question": "问题 dev 1", "A": "1.50", "B": "乙", "C": "丙", "D": "丁", "Answer": "B"}
    assert rows_of(get("alignment-tax/gsm8k", data_dir), "main", "test")[2] == {
        "question": "2 and 2?", "answer": "Sum.\n#### 4",
    }  # fmt: skip


def test_a_file_of_another_size_is_refused_and_another_copy_named(data_dir):
    """Goes red if the number of rows is not checked, by split, or a strange checksum is not said."""
    (task,) = choose_tasks(["alignment-tax/mmlu"])
    with pytest.raises(RequestError, match="has 10 test and 15 dev rows; .* has 14,042 test and 285 dev"):
        prepare(task, find_file(task, data_dir))
    assert "not the registered copy" in get("alignment-tax/mmlu", data_dir).notes[1]


def test_a_changed_file_is_read_again(data_dir):
    """Goes red if the rows in the cache are found by name, not by content."""
    before = get("alignment-tax/gsm8k", data_dir)
    path = data_dir / "gsm8k/test.jsonl"
    path.write_text(path.read_text().replace("#### 4", "#### 5"))
    after = get("alignment-tax/gsm8k", data_dir)
    assert rows_of(after, "main", "test")[2]["answer"].endswith("5") and before.sha256 != after.sha256
    assert rows_of(before, "main", "test")[2]["answer"].endswith("4")


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("mmlu/mmlu.zip", b"no zip", "cannot be read"),
        ("gsm8k/test.jsonl", b'{"question": "a"}\n', "row 1: field 'answer' is missing"),
        ("gpqa/gpqa_main.csv", b"Question,Correct Answer\nq,a\n", "'Incorrect Answer 1' is missing"),
    ],
)
def test_a_broken_file_is_named_with_its_row(data_dir, file, content, said):
    """Goes red if the error is Python's own."""
    (data_dir / file).write_bytes(content)
    with pytest.raises(RequestError, match=said):
        get(f"alignment-tax/{file.partition('/')[0]}", data_dir)


def test_gpqa_is_in_the_order_lm_eval_gives_it(data_dir):
    """lm-eval's own function, fresh, with its default seed. Goes red with another seed, order of options or cleaning.

    Dropping the cleaning of "  " was seen to turn it red.
    """
    pytest.importorskip("lm_eval", reason="compares with lm-eval, of the extra eval")
    import datasets
    from lm_eval.tasks._yaml_loader import load_yaml

    from psft.evaluation.harness.runner import packaged_folder
    from psft.evaluation.items import read_rows

    (task,) = choose_tasks(["alignment-tax/gpqa"])
    shuffle = load_yaml(packaged_folder(task) / "gpqa_main_cot_n_shot.yaml")["process_docs"]
    state = random.getstate()
    random.seed(0)
    theirs = shuffle(datasets.Dataset.from_list(list(read_rows(data_dir / task.file))))
    random.setstate(state)
    ours = rows_of(get("alignment-tax/gpqa", data_dir), "gpqa_main", "train")
    assert ours == [{key: row[key] for key in ours[0]} for row in theirs]
    assert len({row["answer"] for row in ours}) == 4


def test_the_shared_data_are_the_registered_copies(shared_data, tmp_path, monkeypatch):
    """Four of the five sets. Goes red if a registered row count or checksum is wrong."""
    monkeypatch.setenv("PSFT_CACHE", str(tmp_path))
    found = {task.short: find_file(task, shared_data) for task in TABLE_11}
    assert [name for name, path in found.items() if path is None] == ["gpqa"]
    for task in TABLE_11[:4]:
        assert prepare(task, found[task.short]).notes == ()
