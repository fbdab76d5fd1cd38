"""The cap that is found on a device whose law of memory is known."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trainers.fake_device import FakeDevice

from psft.errors import RunFailed
from psft.trainers.cap_measuring import SAFE_SHARE, measure_cap
from psft.trainers.device_meter import is_out_of_memory, meter_of


def measured(device, *, most_rows=10_000, reserved=0, least=int):
    return measure_cap(
        device.run, device, row_tokens=device.row_tokens, most_rows=most_rows, reserved_bytes=reserved, least=least
    )


def most_tokens(device, *, reserved=0):
    """By the law: what the safe share of the memory left after gradients and optimizer takes."""
    room = SAFE_SHARE * (device.total - device.held - reserved) - device.fixed
    return room / (device.a + device.b * device.row_tokens)


@given(
    st.integers(1, 3000), st.floats(1, 50), st.floats(0, 0.1), st.integers(0, 10**6), st.integers(0, 10**7),
    st.integers(0, 98 * 10**7), st.integers(1, 10_000),
)  # fmt: skip
def test_the_cap_is_what_the_safe_share_holds_whatever_the_law(row_tokens, a, b, fixed, gradients, reserved, most_rows):
    """Goes red if gradients or optimizer state are not counted (also where a whole mini-batch runs without the latter),
    if the fixed part is taken for a part of each token, or if short rows are probed, which hides the square."""
    device = FakeDevice(
        10**9, row_tokens=row_tokens, a=a, b=b, fixed=fixed, weights=10**7, gradients=gradients
    )  # fmt: skip
    found = measured(device, reserved=reserved, most_rows=most_rows)
    right = most_tokens(device, reserved=reserved)
    most = most_rows * row_tokens
    assert row_tokens <= found.tokens <= max(min(right * 1.001 + 1, most), row_tokens)
    assert found.tokens >= min(right * 0.999 - 65, most)
    if found.tokens <= right:  # more than a row
        full_rows = found.tokens // row_tokens
        device.run(full_rows)  # it fits, and leaves what is reserved
        assert device.held + device.needs(full_rows) + reserved <= device.total
    assert found.bytes_at_cap == pytest.approx(fixed + found.tokens * (a + b * row_tokens), rel=0.01, abs=2000)


@pytest.mark.parametrize("reserved", [0, 30_000, 55_000, 59_000])
def test_a_whole_mini_batch_that_runs_now_has_to_fit_beside_the_optimizer_too(reserved):
    """52 rows of 10 tokens are the first probe and all there is. Goes red if a probe that ran is taken for one that
    fits: the moments of the optimizer are not there yet, and the second step would run out of memory."""
    device = FakeDevice(80_000, row_tokens=10, a=20, b=0.5, fixed=500)
    found = measured(device, most_rows=52, reserved=reserved)
    right = most_tokens(device, reserved=reserved)
    assert found.tokens <= max(min(right, 520), 10)
    assert found.tokens >= min(right - 65, 520)
    if found.tokens > 10:
        assert device.held + device.needs(found.tokens // 10) + reserved <= device.total


def test_no_more_is_probed_than_half_of_the_room_and_few_times():
    device = FakeDevice(10**9, row_tokens=100)
    found = measured(device)
    assert len(device.rows_run) == 4 and device.rows_run[:3] == [1, 6, 12]
    assert device.needs(device.rows_run[-1]) <= 0.5 * SAFE_SHARE * device.total
    assert [tokens for tokens, _ in found.probes] == [600, 1200, 100 * device.rows_run[-1]]


def test_a_mini_batch_that_fits_whole_is_the_cap():
    """Goes red if the cap grows beyond what a mini-batch of this device can use."""
    device = FakeDevice(10**9, row_tokens=300)
    assert measured(device, most_rows=4).tokens == 1200
    assert device.rows_run == [1, 2, 4]
    assert measured(FakeDevice(10**9, row_tokens=300), most_rows=1).tokens == 300


def test_a_head_that_fills_up_with_the_first_tokens_does_not_steepen_the_line():
    """The head's chunks take memory up to 900 tokens, then no more. Goes red if the line is laid through the first two
    probes alone."""

    class Saturating(FakeDevice):
        def needs(self, num_rows, row_tokens=None):
            return super().needs(num_rows, row_tokens) + 1000 * min(num_rows * self.row_tokens, 900)

    device = Saturating(10**8, row_tokens=100, a=20, b=0)
    right = (SAFE_SHARE * (device.total - 20_000) - 500 - 900_000) / 20
    assert measured(device, most_rows=10**6).tokens == pytest.approx(right, rel=0.01)


def test_a_device_that_runs_out_while_it_is_probed_keeps_to_what_ran():
    """Fragments the law does not know: 6 rows run, 12 do not. Goes red if the error gets through, or the cap is what
    the line would say."""
    device = FakeDevice(10**9, row_tokens=100)
    device.oom_at = 12
    found = measured(device)
    assert found.tokens == 600 and found.bytes_per_token is None
    later = FakeDevice(10**9, row_tokens=100)
    later.oom_at = 100  # the third probe
    assert measured(later).tokens == 1200
    first = FakeDevice(10**9, row_tokens=100)
    first.oom_at = 5
    assert measured(first).tokens == 300 and first.rows_run == [1, 6, 3, 5]
    first.oom_at = 2
    assert measured(first).tokens == 100


def test_a_longest_row_that_does_not_fit_is_told_with_what_to_do():
    device = FakeDevice(25_000, row_tokens=100)
    with pytest.raises(RunFailed, match="longest row, 100 tokens, does not fit.*max_length.*gradient_checkpointing"):
        measured(device)
    with pytest.raises(ZeroDivisionError):  # any other error is one
        measure_cap(lambda n: 1 // 0, device, row_tokens=1, most_rows=1, reserved_bytes=0, least=int)


def test_ranks_agree_on_the_smallest_and_probe_alike():
    """Two ranks in lockstep, one with less free memory and tokens that take more. Goes red if ranks probe different
    rows, or keep their own cap."""
    import threading

    devices = [FakeDevice(10**6, row_tokens=100), FakeDevice(10**6, row_tokens=100, a=40)]
    devices[1].others = 400_000
    barrier, values, found = threading.Barrier(2, timeout=10), [0, 0], [None, None]

    def least(rank):
        def of(value):
            values[rank] = value
            barrier.wait()
            smallest = min(values)
            barrier.wait()
            return smallest

        return of

    def work(rank):
        found[rank] = measured(devices[rank], least=least(rank)).tokens

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    [thread.start() for thread in threads]
    [thread.join(20) for thread in threads]
    assert devices[0].rows_run == devices[1].rows_run
    assert found[0] == found[1] == pytest.approx(SAFE_SHARE * (600_000 - 20_000) / (40 + 50), rel=0.02)


def test_only_what_an_allocator_raises_counts_as_out_of_memory():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"))
    assert not is_out_of_memory(RuntimeError("size mismatch")) and not is_out_of_memory(ValueError("out of memory"))
    assert not is_out_of_memory(RunFailed("memory ran out: out of memory"))
    assert meter_of(torch.device("cpu")) is None


def test_a_cuda_device_has_free_what_the_driver_and_the_cache_have(monkeypatch):
    """The arithmetic alone; no device is here. Goes red if cached blocks are not counted, or what is in use is."""
    counts = {
        "get_device_properties": SimpleNamespace(name="Some GPU", total_memory=1000), "mem_get_info": (300, 1000),
        "memory_reserved": 600, "memory_allocated": 450, "max_memory_allocated": 580, "synchronize": None,
    }  # fmt: skip
    for name, value in counts.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    meter = meter_of(torch.device("cuda"))
    assert (meter.name, meter.total, meter.free(), meter.in_use(), meter.peak()) == ("Some GPU", 1000, 450, 450, 580)
