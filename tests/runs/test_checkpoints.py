"""Checkpoints are whole or not there."""

import os
from pathlib import Path

import pytest

from psft.runs.checkpoints import (
    checkpoints,
    newest_complete,
    publish,
    remove_leftovers,
    rotate,
    staging_root,
    what_is_wrong,
)


def write(run: Path, step: int, content: bytes = b"weights") -> Path:
    folder = staging_root(run, step) / f"checkpoint-{step}"
    (folder / "sub").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(content)
    (folder / "sub" / "state with space\n.bin").write_bytes(b"\0" * 10)
    return folder


def test_a_published_checkpoint_is_complete_and_an_unpublished_one_is_none(tmp_path):
    write(tmp_path, 4)
    publish(tmp_path, 4)
    write(tmp_path, 8)  # the writer died here
    chosen, passed_over = newest_complete(tmp_path)
    assert chosen.step == 4 and passed_over == []
    assert [c.path.name for c in checkpoints(tmp_path)] == ["checkpoint-4"]
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda f: (f / "model.safetensors").write_bytes(b"weight"), "6 bytes instead of 7"),
        (lambda f: (f / "model.safetensors").write_bytes(b"weighty"), "has changed"),
        (lambda f: (f / "model.safetensors").unlink(), "is missing"),
        (lambda f: (f / "psft_manifest.json").unlink(), "not written to its end"),
        (lambda f: (f / "psft_manifest.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "psft_manifest.json").write_text('{"files": 3}'), "cannot be read"),
    ],
)
def test_every_damage_is_seen_and_named(tmp_path, damage, reason):
    """Goes red if a checksum is not compared, or a broken manifest raises."""
    for step in (4, 8):
        write(tmp_path, step)
        publish(tmp_path, step)
    damage(tmp_path / "checkpoint-8")
    chosen, passed_over = newest_complete(tmp_path)
    assert chosen.step == 4
    assert [c.step for c in passed_over] == [8] and reason in passed_over[0].problem


def test_writing_a_step_again_replaces_it_and_a_crash_in_between_loses_neither(tmp_path, monkeypatch):
    """Goes red if the old one is deleted before the new one has its name, or is not put back."""
    write(tmp_path, 4, b"before")
    publish(tmp_path, 4)
    write(tmp_path, 4, b"after")
    replace = os.replace

    def die_at_the_second(source, target):
        if str(source).endswith("checkpoint-4") and "part" in str(source):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", die_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path, 4)
    monkeypatch.undo()
    remove_leftovers(tmp_path)
    assert what_is_wrong(tmp_path / "checkpoint-4") is None
    assert (tmp_path / "checkpoint-4" / "model.safetensors").read_bytes() == b"before"
    write(tmp_path, 4, b"after")
    publish(tmp_path, 4)
    assert (tmp_path / "checkpoint-4" / "model.safetensors").read_bytes() == b"after"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4"]


def test_rotation_counts_complete_ones_and_never_deletes_the_last(tmp_path):
    """Goes red if torn checkpoints count towards the limit, so that the last complete one is deleted for them."""
    for step in (4, 8, 12, 16):
        write(tmp_path, step)
        publish(tmp_path, step)
    (tmp_path / "checkpoint-12" / "model.safetensors").unlink()
    (tmp_path / "checkpoint-16" / "model.safetensors").unlink()
    assert rotate(tmp_path, limit=None) == [] and rotate(tmp_path, limit=0) == []
    rotate(tmp_path, limit=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-12", "checkpoint-16", "checkpoint-8"]
    write(tmp_path, 20)
    publish(tmp_path, 20)
    rotate(tmp_path, limit=2)  # torn ones before the newest complete one go, in the order of steps, not of names
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-20", "checkpoint-8"]


def test_rotation_keeps_the_best(tmp_path):
    for step in (4, 8, 12, 16):
        write(tmp_path, step)
        publish(tmp_path, step)
    rotate(tmp_path, limit=2, keep=tmp_path / "checkpoint-4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-16", "checkpoint-4"]
