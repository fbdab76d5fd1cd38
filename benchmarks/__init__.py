"""What psft costs, beside what others charge for the same rows, model and optimizer. Run it: `python -m benchmarks`.

    train_step.py   whole optimizer steps through each trainer's own `train()`, on SmolLM2-135M and GSM8K
    head.py         the LM head alone, on fixed tensors, against other kernels
    sweeps.py       sequence length, vocabulary and trained share, on a small random model
    gpu.py          the same on one NVIDIA GPU, with random weights of known shapes
    memory.py       peak memory of one arm, in a process of its own
    tables.py       writes the tables of docs/performance.md from results/*.json

Shared by all: harness.py (interleaving, ratios, JSON), clocks.py, equality.py (arms must agree before they are timed),
prologue.py (what the machine was), workload.py (rows and models), arms.py and trainer_arms.py (what is timed).
"""
