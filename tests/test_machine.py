"""Cores a process may use: affinity, hyper-threads, a container's quota, ranks that share the machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from psft import machine


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"a/b/cpu.max": "400000 100000\n", "a/cpu.max": "250000 100000\n"}, 2.5),  # the parent is stricter
        ({"unified/a/b/cpu.max": "300000 100000\n"}, 3.0),
        ({"a/b/cpu.max": "junk\n"}, None),
    ],
)
def test_the_quota_of_cgroup_v2_is_the_strictest_on_the_way_up(files, quota, tmp_path):
    """Goes red if parents are left out, the largest is taken, or `max` is read as a number."""
    write(tmp_path / "proc", "0::/a/b\n")
    for name, text in files.items():
        write(tmp_path / "sys" / name, text)
    assert machine.cpu_quota(tmp_path / "proc", tmp_path / "sys") == quota


@pytest.mark.parametrize(("quota_us", "quota"), [("-1", None), ("50000", 0.5), ("800000", 8.0)])
def test_the_quota_of_cgroup_v1(quota_us, quota, tmp_path):
    """Goes red if -1, which means none, is taken for a quota, or the period is ignored."""
    write(tmp_path / "proc", "3:cpu,cpuacct:/job\n1:memory:/other\n0::/\n")
    write(tmp_path / "sys/cpu,cpuacct/job/cpu.cfs_quota_us", quota_us)
    write(tmp_path / "sys/cpu,cpuacct/job/cpu.cfs_period_us", "100000")
    assert machine.cpu_quota(tmp_path / "proc", tmp_path / "sys") == quota


def test_where_there_are_no_cgroups_there_is_no_quota(tmp_path):
    """Goes red if the missing file is an error."""
    assert machine.cpu_quota(tmp_path / "missing", tmp_path) is None


def test_two_hyper_threads_are_one_core(tmp_path, monkeypatch):
    """Goes red if siblings are counted apart, or processors outside the affinity mask are counted."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 4, 7}, raising=False)
    monkeypatch.setattr(machine, "cpu_quota", lambda: None)
    for number in range(8):
        write(tmp_path / f"cpu{number}/topology/thread_siblings_list", f"{number % 4},{number % 4 + 4}\n")
    assert (machine.logical_cores(), machine.physical_cores(tmp_path)) == (4, 3)
    assert machine.physical_cores(tmp_path / "missing") == 4


@pytest.mark.parametrize(("quota", "cores"), [(None, 8), (2.9, 2), (0.5, 1), (64.0, 8)])
def test_a_quota_bounds_the_cores(quota, cores, monkeypatch, tmp_path):
    """Goes red if the quota is ignored, rounded up (the threads would be stopped in turns), or leaves no core."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(machine, "cpu_quota", lambda: quota)
    assert machine.logical_cores() == machine.physical_cores(tmp_path) == cores


def test_a_launched_process_knows_its_number_and_how_many_share_the_machine(monkeypatch):
    """Goes red if RANK, which counts over all machines, is taken for the local one."""
    for name in (*machine.LOCAL_RANK, *machine._LOCAL_RANKS, "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (machine.local_rank(), machine.local_ranks()) == (0, 1)
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert (machine.local_rank(), machine.local_ranks()) == (1, 8)
