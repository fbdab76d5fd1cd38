"""Laws of the data cache: an entry is used exactly where it would be made again, byte for byte, and never if torn."""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jobs
import pytest

from psft.data import digests, encode, prepare, prepare_dataset, prepared_cache
from psft.data.workers import in_order
from psft.errors import RequestError

ROWS = [{"question": f"{i} + 1 = ?", "answer": f"It is {i + 1}.\n#### {i + 1}"} for i in range(40)]


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Forty good rows, and one for each way to be left out or counted apart."""
    odd = ["{not json", {"question": "x", "answer": ""}, {"question": "y" * 3000, "answer": "z"}]
    odd.append({"question": "What is <|im_end|>?", "answer": "A token."})
    return write_lines(tmp_path / "rows.jsonl", [*ROWS[:20], *odd, *ROWS[20:]])


@pytest.fixture
def prepared(source: Path, tiny_tokenizer: Any, tmp_path: Path):
    """prepared(**options) -> (Prepared, lines of rejected.jsonl), with the cache in tmp_path / "cache"."""

    def run(path: Path = source, **options: Any) -> tuple[Any, str]:
        rejected = tmp_path / "rejected.jsonl"
        rejected.unlink(missing_ok=True)
        settings = {
            "tokenizer": tiny_tokenizer, "max_length": 512, "on_bad_row": "skip", "rejected_path": rejected,
            "cache_dir": tmp_path / "cache",
        }  # fmt: skip
        found = prepare_dataset(str(path), **{**settings, **options})
        return found, rejected.read_text() if rejected.exists() else ""

    return run


def entries(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").glob("*.arrow"))


def test_an_entry_gives_what_preparing_gives(prepared, tmp_path, monkeypatch, caplog):
    """Goes red if a row, a count, a rejection or a warning is lost on the way through the files, or none are read."""
    direct, direct_rejections = prepared(cache_dir=None)
    first, _ = prepared()
    monkeypatch.setattr(prepare, "in_order", None)  # whoever encodes again fails
    caplog.clear()
    again, rejections = prepared()
    assert again.table.equals(direct.table) and first.table.equals(direct.table)
    assert again.dataset[:] == direct.dataset[:]
    assert again.report == direct.report == first.report
    assert rejections == direct_rejections and rejections.count("\n") == 3
    assert "'<|im_end|>' in " in caplog.text
    assert (direct.cached_in, first.cached_in, again.cached_in) == (None, None, tmp_path / "cache")


def test_bad_rows_stop_a_run_that_reads_an_entry_as_they_stop_one_that_prepares(prepared):
    """Goes red if `on_bad_row` is looked at only when rows are prepared."""
    prepared()
    with pytest.raises(RequestError, match="3 of 44 rows cannot be used.*rows.jsonl:21: not JSON"):
        prepared(on_bad_row="error")


def changed_tokenizer(make: Any, what: str) -> Any:
    tokenizer = make()
    if what == "template":
        tokenizer.chat_template = "{{ 'A chat.' }}" + tokenizer.chat_template
    elif what == "token":
        tokenizer.add_tokens(["clips"])
    return tokenizer


@pytest.mark.parametrize(
    "change",
    ["content", "name", "max_length", "system_prompt", "max_rows", "columns", "template", "token", "code", "version"],
)
def test_whatever_rows_depend_on_makes_another_entry(
    change, prepared, source, tmp_path, make_tiny_tokenizer, monkeypatch
):
    """Goes red if a part is left out of the key: an entry of other rows would be used in silence."""
    prepared()
    options: dict[str, Any] = {}
    path = source
    if change == "content":
        write_lines(source, ROWS[:-1])
    elif change == "name":  # rejected rows name their file
        path = source.rename(tmp_path / "other.jsonl")
    elif change in ("template", "token"):
        options["tokenizer"] = changed_tokenizer(make_tiny_tokenizer, change)
    elif change == "code":
        digests.digest_of_code.cache_clear()
        original = digests.digest_of_file
        monkeypatch.setattr(digests, "digest_of_file", lambda p: original(p) + ("x" if p.name == "render.py" else ""))
    elif change == "version":
        digests.digest_of_code.cache_clear()
        monkeypatch.setattr(digests, "_version", lambda name: "99")
    else:
        changes = {"max_length": 40, "system_prompt": "Be brief.", "max_rows": 30, "columns": {"system": "question"}}
        options[change] = changes[change]
    try:
        again, _ = prepared(path, **options)
        assert again.cached_in is None and len(entries(tmp_path)) == 2
        assert again.table.equals(prepared(path, **options, cache_dir=None)[0].table)
    finally:
        digests.digest_of_code.cache_clear()


def test_a_copy_of_a_source_or_tokenizer_finds_the_entry(prepared, source, tmp_path, make_tiny_tokenizer):
    """Goes red if dates, or anything that differs between two loadings of one tokenizer, are part of the key."""
    prepared()
    os.utime(source, (1, 1))
    tokenizer = make_tiny_tokenizer()
    tokenizer(["a call", "leaves no trace"], truncation=True, max_length=2, padding=True)
    assert tokenizer.backend_tokenizer.truncation and tokenizer.backend_tokenizer.padding
    assert prepared(tokenizer=tokenizer)[0].cached_in is not None
    assert tokenizer.backend_tokenizer.truncation and tokenizer.backend_tokenizer.padding
    tokenizer.save_pretrained(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    from transformers import AutoTokenizer

    names = [digests.digest_of_tokenizer(AutoTokenizer.from_pretrained(tmp_path / folder)) for folder in "ab"]
    assert names[0] == names[1] is not None


@pytest.mark.parametrize(
    ("kind", "other"), [("file", ROWS[:-1]), ("folder", ROWS[:-1]), ("dataset", ROWS[:-1]), ("dataset", ROWS[::-1])]
)
def test_the_digest_of_a_source_is_that_of_its_content(kind, other, tmp_path):
    """Goes red if a row more or another order has the same name, or a copy another name."""
    import datasets

    def digest(rows: list[Any], name: str) -> str:
        dataset = datasets.Dataset.from_list(rows)
        if kind == "dataset":
            return digests.digest_of_dataset(dataset)
        if kind == "file":
            return digests.digest_of_file(write_lines(tmp_path / name, rows))
        (tmp_path / name).mkdir()
        write_lines(tmp_path / name / "data.jsonl", rows)
        return digests.digest_of_folder(tmp_path / name)

    assert digest(ROWS, "a") == digest(ROWS, "b") != digest(other, "c")


def test_a_slice_of_a_data_set_is_named_by_its_own_rows():
    """Goes red if the whole table behind a selection is digested, or a selection's order is ignored."""
    import datasets

    whole = datasets.Dataset.from_list(ROWS)
    selected = whole.select([3, 1, 2])
    assert digests.digest_of_dataset(selected) == digests.digest_of_dataset(
        datasets.Dataset.from_list([ROWS[3], ROWS[1], ROWS[2]])
    )
    assert digests.digest_of_dataset(selected) != digests.digest_of_dataset(whole.select([1, 2, 3]))


def test_a_tokenizer_with_code_of_its_own_is_never_named(tiny_tokenizer):
    """Goes red if a class that came with a model is trusted to do what transformers' own does."""

    class Own(type(tiny_tokenizer)):  # type: ignore[misc]
        pass

    own = Own(tokenizer_object=tiny_tokenizer.backend_tokenizer)
    assert digests.digest_of_tokenizer(own) is None
    assert digests.digest_of_tokenizer(tiny_tokenizer) is not None


@pytest.mark.parametrize("damage", ["flip", "cut", "no rows", "facts", "facts cut", "facts of another kind"])
def test_a_damaged_entry_is_made_again_with_a_warning(damage, prepared, tmp_path, caplog):
    """Goes red if a changed byte reaches the training, or a damaged file ends the run."""
    expected, _ = prepared(cache_dir=None)
    _, rejections = prepared()
    (rows,) = entries(tmp_path)
    facts = rows.with_suffix(".json")
    if damage == "flip":
        content = bytearray(rows.read_bytes())
        content[len(content) // 2] ^= 1
        rows.write_bytes(content)
    elif damage == "cut":
        rows.write_bytes(rows.read_bytes()[:-200])
    elif damage == "no rows":
        rows.unlink()
    elif damage == "facts":
        assert '"num_truncated": 0' in facts.read_text()
        facts.write_text(facts.read_text().replace('"num_truncated": 0', '"num_truncated": 1'))
    else:
        facts.write_text("[]" if damage.endswith("kind") else facts.read_text()[:-9])
    again, rejections_again = prepared()
    assert "cannot be used and are made again" in caplog.text
    assert again.cached_in is None and again.table.equals(expected.table)
    assert (again.report, rejections_again) == (expected.report, rejections)
    caplog.clear()
    assert prepared()[0].cached_in is not None and "made again" not in caplog.text


def test_a_cache_that_cannot_be_written_costs_a_warning(prepared, tmp_path, monkeypatch, caplog):
    """Goes red if a full disk ends the run, or leaves half an entry."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    found, _ = prepared()
    assert found.report.num_used == 41 and "not kept" in caplog.text and "0.0 GiB are free" in caplog.text
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
    (tmp_path / "file").write_text("")
    assert prepared(cache_dir=tmp_path / "file" / "below")[0].report == found.report


def test_entries_unused_for_longest_make_room(prepared, source, tmp_path, monkeypatch):
    """Goes red if the newest goes, if use does not count, or nothing ever goes."""
    for max_rows in (10, 11, 12):
        prepared(max_rows=max_rows)
    for age, facts in enumerate(sorted((tmp_path / "cache").glob("*.json"), key=lambda path: path.stat().st_mtime)):
        os.utime(facts, (age, age))
    prepared(max_rows=10)  # the oldest is used again
    size = sum(path.stat().st_size for path in entries(tmp_path))
    monkeypatch.setattr(prepared_cache, "LIMIT", size)
    prepared(max_rows=13)
    assert prepared(max_rows=10)[0].cached_in is not None
    assert prepared(max_rows=12)[0].cached_in is not None
    assert not list((tmp_path / "cache").glob("*.part"))
    assert len(entries(tmp_path)) == 3
    assert prepared(max_rows=11)[0].cached_in is None


def test_of_those_who_start_together_one_prepares_and_the_others_read(
    source, make_tiny_tokenizer, tmp_path, monkeypatch
):
    """Threads stand for processes: a lock of the file system parts them as well. Goes red if there is none: each would
    prepare, and write over the others."""
    original, made, barrier = prepare._encode, [], threading.Barrier(3)

    def slow(*args: Any, **kwargs: Any) -> Any:
        made.append(1)
        time.sleep(0.3)
        return original(*args, **kwargs)

    def prepare_at_once(tokenizer: Any) -> tuple[bool, Any]:
        barrier.wait()
        found = prepare_dataset(
            str(source), tokenizer=tokenizer, max_length=512, on_bad_row="skip", cache_dir=tmp_path / "cache"
        )
        return found.cached_in is not None, found.table.to_pydict()

    monkeypatch.setattr(prepare, "_encode", slow)
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(prepare_at_once, [make_tiny_tokenizer() for _ in range(3)]))
    assert len(made) == 1 and sorted(is_cached for is_cached, _ in found) == [False, True, True]
    assert found[0][1] == found[1][1] == found[2][1]


@pytest.mark.parametrize("how", ["appended", "written again", "removed"])
def test_a_source_that_is_written_while_it_is_read_is_not_kept(how, prepared, source, tmp_path, monkeypatch, caplog):
    """Goes red if the name of an entry is that of the content before reading, or of the content after it."""
    original, content = prepare._encode, source.read_bytes()

    def meanwhile(*args: Any, **kwargs: Any) -> Any:
        outcome = original(*args, **kwargs)
        if how == "appended":
            source.write_bytes(content + content.splitlines(keepends=True)[0])
        elif how == "written again":  # what was read in between nobody knows
            source.write_bytes(b"")
            source.write_bytes(content)
        else:
            source.unlink()
        return outcome

    monkeypatch.setattr(prepare, "_encode", meanwhile)
    found, _ = prepared()
    assert (found.report.num_rows, found.cached_in) == (44, None) and entries(tmp_path) == []
    assert "rows.jsonl was written while it was read" in caplog.text
    monkeypatch.setattr(prepare, "_encode", original)
    source.write_bytes(content)
    assert prepared()[0].cached_in is None and len(entries(tmp_path)) == 1


def test_who_has_no_lock_writes_nothing(prepared, tmp_path, monkeypatch, caplog):
    """Goes red if a process writes beside one that may be writing the same entry."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(37, "No locks available")

    with monkeypatch.context() as patch:
        patch.setattr("filelock.FileLock.acquire", refuse)
        with caplog.at_level(logging.INFO, logger="psft"):
            assert prepared()[0].report.num_used == 41
        assert entries(tmp_path) == [] and "not kept" in caplog.text and "No locks available" in caplog.text
        prepared()
    prepared()
    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    assert prepared()[0].cached_in is not None  # reading needs none


def test_a_later_rank_leaves_the_lock_to_the_first_for_a_moment(tmp_path, monkeypatch):
    """Goes red if any rank may be the one that prepares, where rank 0 alone shows progress, or waits for ever."""

    def seconds_to_lock(key: str) -> float:
        start = time.monotonic()
        with prepared_cache.PreparedCache(tmp_path, key).locked():
            return time.monotonic() - start

    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(prepared_cache, "_HEAD_START_S", 0.3)
    assert seconds_to_lock("a") >= 0.3
    monkeypatch.setattr(prepared_cache, "_HEAD_START_S", 60.0)
    threading.Timer(0.2, (tmp_path / "b.lock").touch).start()
    assert seconds_to_lock("b") < 30
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert seconds_to_lock("c") < 30


def test_several_processes_give_what_one_gives(tiny_tokenizer, tmp_path, monkeypatch):
    """Goes red if batches change places, a worker's rejections are lost, or counts are those of one worker."""
    monkeypatch.setattr(prepare, "_BATCH_ROWS", 4)
    monkeypatch.setattr(prepare, "_SMALL", 8)
    rows: list[Any] = [
        {**ROWS[i % 40], "question": f"case {i}" + (" <|im_start|>" if i % 11 == 5 else " é" * (i % 4))}
        for i in range(90)
    ]
    rows[7], rows[50], rows[61] = "{broken", {"question": "?", "answer": " "}, {"question": "q" * 900, "answer": "a"}
    path = write_lines(tmp_path / "rows.jsonl", rows)
    seen = []
    original = prepare.in_order

    def counting(function: Any, items: Any, num_processes: int) -> Any:
        seen.append(num_processes)
        return original(function, items, num_processes)

    monkeypatch.setattr(prepare, "in_order", counting)
    results = []
    for num_processes in (1, 3):
        rejected = tmp_path / f"rejected{num_processes}.jsonl"
        found = prepare_dataset(
            str(path), tokenizer=tiny_tokenizer, max_length=120, on_bad_row="skip", rejected_path=rejected,
            num_processes=num_processes,
        )  # fmt: skip
        results.append((found.table.to_pydict(), found.report, rejected.read_text()))
    assert results[0] == results[1] and seen == [1, 3]
    assert results[0][1].num_rejected == 3 and results[0][1].num_with_special_text == 8
    prepare_dataset(str(path), tokenizer=tiny_tokenizer, max_length=120, on_bad_row="skip", max_rows=8, num_processes=3)
    assert seen[-1] == 1  # few rows are not worth a process


def test_a_few_rows_of_a_huge_file_are_not_worth_its_digest(prepared, tmp_path, monkeypatch):
    """Goes red if the whole file is read for its name though a moment would do for its first rows."""
    monkeypatch.setattr(prepare, "_QUICK_DIGEST", 10)
    for max_rows, num_entries in ((5, 0), (5000, 1), (None, 2)):
        prepared(max_rows=max_rows)
        assert len(entries(tmp_path)) == num_entries


def test_what_reaches_the_log_is_words(prepared, caplog, monkeypatch):
    """Goes red if a source whose tokenizer cannot be named is kept, or that is not said."""
    monkeypatch.setattr(prepare, "digest_of_tokenizer", lambda tokenizer: None)
    with caplog.at_level(logging.INFO, logger="psft"):
        assert prepared()[0].cached_in is None and prepared()[0].cached_in is None
    assert "not kept: this tokenizer runs code" in caplog.text


def test_a_template_is_stopped_in_another_process_as_here(make_tiny_tokenizer, tmp_path, monkeypatch):
    """Goes red if the limits, which need a main thread, do not hold there, or the row is not named."""
    with pytest.raises(RequestError, match="the chat template was stopped: it ran for 0.3 s"):
        list(in_order(jobs.run_a_template_that_never_ends, [0.3], 2))
    monkeypatch.setattr(prepare, "_BATCH_ROWS", 4)
    monkeypatch.setattr(prepare, "_SMALL", 8)
    tokenizer = make_tiny_tokenizer()
    flood = "{% for i in range(99999) %}{{ 'a flood of text' }}{% endfor %}"
    tokenizer.chat_template = f"{{% if 'bomb' in messages[0].content %}}{flood}{{% endif %}}" + tokenizer.chat_template
    rows = [{**row, "question": "bomb"} if number == 17 else row for number, row in enumerate(ROWS)]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    with pytest.raises(RequestError, match="rows.jsonl:18: the chat template was stopped: it wrote 1[0-9]{6} char"):
        prepare_dataset(str(path), tokenizer=tokenizer, max_length=512, num_processes=2)


def test_one_process_prepares_where_another_may_lack_the_tokenizers_code(tiny_tokenizer, tmp_path, monkeypatch, caplog):
    """Goes red if such a tokenizer is sent to other processes all the same, or that is not said."""
    monkeypatch.setattr(prepare, "_SMALL", 8)
    monkeypatch.setattr(prepare, "digest_of_tokenizer", lambda tokenizer: None)
    monkeypatch.setattr(encode, "digest_of_tokenizer", None)  # whoever sends it fails
    path = write_lines(tmp_path / "rows.jsonl", ROWS)
    with caplog.at_level(logging.INFO, logger="psft"):
        found = prepare_dataset(str(path), tokenizer=tiny_tokenizer, max_length=512, num_processes=2)
    assert found.report.num_used == 40 and "one process prepares the data" in caplog.text


@pytest.mark.parametrize("cores", [1, 6, 200])
def test_ranks_share_the_cores_and_no_more_processes_start_than_can_be_kept_busy(cores, tiny_tokenizer, monkeypatch):
    """Goes red if each of eight ranks without a cache starts a process a core, or two hundred are started."""
    monkeypatch.setattr(prepare, "logical_cores", lambda: cores)
    monkeypatch.setattr(prepare, "local_ranks", lambda: 2)
    assert prepare._processes(None, tiny_tokenizer) == {1: 1, 6: 3, 200: 16}[cores]
    assert prepare._processes(40, tiny_tokenizer) == 40
