"""Checkpoints that are whole or not there: written aside, listed with sizes and checksums, then renamed.

    staging_root(run, 40)     RUN/.checkpoint-40.part/checkpoint-40    everything is written here
    publish(run, 40)          RUN/checkpoint-40                        sealed by its manifest, so it is complete
    newest_complete(run)      the last one whose files are all there and unchanged

A crash leaves at most a folder that is not named as a checkpoint; the next run of the folder removes it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from psft.checksums import sha256_of

MANIFEST = "psft_manifest.json"
BEST = "best"
"""Name of the link to the checkpoint with the highest score, beside the checkpoints."""
_NAME = re.compile(r"checkpoint-(\d+)")
_LEFTOVER = re.compile(r"\.(checkpoint-\d+)\.(part|replaced)")


@dataclass(frozen=True)
class Checkpoint:
    """A folder RUN/checkpoint-N. problem: None if it is complete, else what is wrong with it."""

    path: Path
    step: int
    problem: str | None


def staging_root(run: Path, step: int) -> Path:
    """The folder in which checkpoint-`step` is written until it is whole."""
    return run / f".checkpoint-{step}.part"


def remove_leftovers(run: Path) -> None:
    """Delete what crashed writers left behind; a checkpoint that was about to be replaced gets its name back."""
    for item in list(run.iterdir()) if run.is_dir() else []:
        match = _LEFTOVER.fullmatch(item.name)
        if match and match[2] == "replaced" and not (run / match[1]).exists():
            os.replace(item, run / match[1])
        elif match and item.is_dir():
            shutil.rmtree(item)


def publish(run: Path, step: int) -> Path:
    """Seal what was written for `step` with a manifest and move it to its name; one of the same name is replaced.

    Raises:
        OSError: a full disk or a folder that cannot be written; what was complete before still is.
    """
    root, final = staging_root(run, step), run / f"checkpoint-{step}"
    staging = root / final.name
    files = {}
    for path in sorted(p for p in staging.rglob("*") if p.is_file() and p.name != MANIFEST):
        files[path.relative_to(staging).as_posix()] = {"size": path.stat().st_size, "sha256": _sha256(path, sync=True)}
    manifest = staging / MANIFEST
    with open(manifest, "w", encoding="utf-8") as file:
        json.dump({"step": step, "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    if final.exists():
        replaced = run / f".checkpoint-{step}.replaced"
        os.replace(final, replaced)
        os.replace(staging, final)
        shutil.rmtree(replaced, ignore_errors=True)
    else:
        os.replace(staging, final)
    shutil.rmtree(root, ignore_errors=True)
    with contextlib.suppress(OSError):  # some file systems have no way to sync a folder
        handle = os.open(run, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    return final


def checkpoints(run: Path, *, check_contents: bool = False) -> list[Checkpoint]:
    """Every checkpoint of a run, oldest step first, each with what is wrong with it.

    Args:
        check_contents: compare checksums, too; without it names and sizes only, which reads no file.
    """
    found = []
    for path in run.iterdir() if run.is_dir() else []:
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir():
            found.append(Checkpoint(path, int(match[1]), what_is_wrong(path, check_contents=check_contents)))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def newest_complete(run: Path) -> tuple[Checkpoint | None, list[Checkpoint]]:
    """The newest checkpoint whose every byte is as it was written, and the newer ones that were passed over."""
    passed_over: list[Checkpoint] = []
    for checkpoint in reversed(checkpoints(run)):
        problem = checkpoint.problem or what_is_wrong(checkpoint.path, check_contents=True)
        if problem is None:
            return checkpoint, passed_over
        passed_over.append(Checkpoint(checkpoint.path, checkpoint.step, problem))
    return None, passed_over


def what_is_wrong(folder: Path, *, check_contents: bool = True) -> str | None:
    """None for a complete checkpoint, else which file is missing, cut off or changed."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        wanted = [(name, int(entry["size"]), str(entry["sha256"])) for name, entry in files.items()]
    except FileNotFoundError:
        return f"{MANIFEST} is missing: it was not written to its end"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    for name, size, _ in wanted:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    for name, _, sha256 in wanted if check_contents else []:
        if _sha256(folder / name) != sha256:
            return f"{name} has changed since it was written"
    return None


def link_best(run: Path, step: int | None) -> None:
    """Let RUN/best lead to the checkpoint of this step, at once or not at all; None takes the link away.

    Raises:
        OSError: the file system has no links, or something else of that name is there.
    """
    link, aside = run / BEST, run / f".{BEST}.part"
    if link.exists() and not link.is_symlink():
        raise FileExistsError(errno.EEXIST, "something else than a link is there", str(link))
    if step is None:
        link.unlink(missing_ok=True)
        return
    aside.unlink(missing_ok=True)
    aside.symlink_to(f"checkpoint-{step}")
    os.replace(aside, link)


def linked_best(run: Path) -> Path | None:
    """The checkpoint that RUN/best leads to, if it is there."""
    link = run / BEST
    return run / os.readlink(link) if link.is_symlink() and link.is_dir() else None


def rotate(run: Path, *, limit: int | None, keep: Path | None = None) -> list[Path]:
    """Delete the oldest checkpoints until `limit` complete ones are left; the newest complete one always stays, and
    the one that RUN/best leads to.

    Args:
        limit: None or below 1 = delete nothing.
        keep: one more that stays, the best of the run.
    Returns:
        What was deleted. Incomplete ones go first and do not count.
    """
    if limit is None or limit < 1:
        return []
    found = checkpoints(run)
    complete = [checkpoint for checkpoint in found if checkpoint.problem is None]
    if not complete:
        return []
    protected = {complete[-1].path, keep, linked_best(run)} & {c.path for c in complete}
    surplus = [c.path for c in found if c.problem is not None and c.step < complete[-1].step]
    removable = [c.path for c in complete if c.path not in protected]
    surplus += removable[: max(len(complete) - max(limit, len(protected)), 0)]
    for path in surplus:
        shutil.rmtree(path, ignore_errors=True)
    return surplus


def _sha256(path: Path, *, sync: bool = False) -> str:
    found = sha256_of(path)
    if sync:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    return found
