"""Laws of the sample file: whole lines, no key twice, nothing lost but a torn last line."""

import json

import pytest

from psft.errors import RequestError
from psft.evaluation.samples import KeyedFile, sample_key, seed_of

FIELDS = {
    "model": "m", "benchmark": "b", "data": "d", "item": "i", "prompt": "p", "sampling": {"top_p": 0.95}, "seed": 0,
    "index": 0,
}  # fmt: skip


def row(key: str, **fields: object) -> dict[str, object]:
    return {"key": key, "response": f"answer of {key}", **fields}


def test_rows_come_back_and_no_key_is_written_twice(tmp_path):
    """Goes red if `append` does not look at the keys that are there, in the file or in the same call."""
    path = tmp_path / "samples.jsonl"
    with KeyedFile(path) as file:
        assert file.append([row("a"), row("b"), row("a")]) == 2
        assert file.append([row("b", response="other")]) == 0
    with KeyedFile(path) as file:
        assert file.append([row("a")]) == 0 and len(file) == 2
        assert file.read("b")["response"] == "answer of b" and file.read("a")["key"] == "a"
    assert len(path.read_text().splitlines()) == 2


def test_a_torn_last_line_is_cut_wherever_it_was_torn(tmp_path):
    """Goes red without the cut: the next row would be glued to the torn one."""
    path = tmp_path / "samples.jsonl"
    with KeyedFile(path) as file:
        file.append([row("a"), row("b", response="é\n{}")])
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for end in range(first, len(whole)):
        path.write_bytes(whole[:end])
        assert KeyedFile(path, is_writer=False).keys == {"a"}
        with KeyedFile(path) as file:
            assert file.keys == {"a"}
            file.append([row("c")])
        assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["a", "c"]


def test_a_broken_line_elsewhere_is_named(tmp_path):
    """Goes red if broken lines are passed over: what they held would be counted as never asked."""
    path = tmp_path / "samples.jsonl"
    path.write_text('{"key": "a"}\nnot JSON\n{"key": "b"}\n')
    with pytest.raises(RequestError, match=r"samples\.jsonl:2: no row of psft eval"):
        KeyedFile(path)


def test_a_key_that_stands_there_twice_counts_once(tmp_path):
    """Files joined by hand. Goes red if the later row wins, since grades were made of the first."""
    path = tmp_path / "samples.jsonl"
    path.write_text('{"key": "a", "response": "1"}\n{"key": "a", "response": "2"}\n')
    file = KeyedFile(path, is_writer=False)
    assert len(file) == 1 and file.num_duplicates == 1 and file.read("a")["response"] == "1"


def test_two_writers_are_refused(tmp_path):
    """Goes red without the lock. A lock belongs to an open file, so a second opening here is as one elsewhere."""
    path = tmp_path / "samples.jsonl"
    with KeyedFile(path):
        with pytest.raises(RequestError, match="is being written by another psft eval"):
            KeyedFile(path)
        KeyedFile(path, is_writer=False).close()
    KeyedFile(path).close()


@pytest.mark.parametrize("name", list(FIELDS))
def test_a_key_depends_on_every_field(name):
    """Goes red if a field is left out of the hash: samples of other settings would be taken for these."""
    other = {**FIELDS, name: {"top_p": 1.0} if name == "sampling" else 1 if name in ("seed", "index") else "other"}
    assert sample_key(**other) != sample_key(**FIELDS)
    assert sample_key(**FIELDS) == sample_key(**dict(reversed(FIELDS.items())))
    assert 0 <= seed_of(sample_key(**FIELDS)) < 2**31 and seed_of("ffffffff00") == 2**31 - 1


def test_half_a_surrogate_can_be_kept(tmp_path):
    """A tokenizer may decode to one. Goes red with a plain encode()."""
    path = tmp_path / "samples.jsonl"
    with KeyedFile(path) as file:
        file.append([row("a", response="\ud83d")])
        assert file.read("a")["response"] == "\ud83d"
