"""A device whose law of memory is known: what `psft.trainers.device_meter.DeviceMeter` promises, without a device."""

import torch


class FakeDevice:
    """A micro-batch of n rows of T tokens takes `fixed + n (a T + b T^2)` bytes while it runs.

    It is a `DeviceMeter`. `run(n)` is a forward and backward pass: the first allocates gradients that stay, and one
    that does not fit raises what PyTorch raises. rows_run: the n of every pass. others: bytes of other processes.
    """

    name = "Fake Accelerator 80GB"

    def __init__(self, total=80_000, *, row_tokens=10, a=20, b=0.5, fixed=500, weights=10_000, gradients=10_000):
        self.total, self.row_tokens, self.others = total, row_tokens, 0
        self.a, self.b, self.fixed = a, b, fixed
        self.held, self.gradients = weights, gradients
        self.cached = 0
        self._peak = self.held
        self.rows_run = []
        self.oom_at = None

    def needs(self, num_rows, row_tokens=None):
        t = row_tokens or self.row_tokens
        return int(self.fixed + num_rows * (self.a * t + self.b * t * t))

    def run(self, num_rows, row_tokens=None):
        self.rows_run.append(num_rows)
        needed = self.held + self.gradients + self.needs(num_rows, row_tokens)
        if needed + self.others > self.total or (self.oom_at is not None and num_rows >= self.oom_at):
            self._peak = max(self._peak, self.total - self.others)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        self._peak = max(self._peak, needed)
        self.held, self.gradients, self.cached = self.held + self.gradients, 0, 1000

    def free(self):
        return self.total - self.others - self.held

    def in_use(self):
        return self.held

    def reset_peak(self):
        self._peak = self.held

    def peak(self):
        return self._peak

    def release(self):
        self.cached = 0
