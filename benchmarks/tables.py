"""The tables of docs/performance.md, written from benchmarks/results/*.json: no figure of that page is typed by hand.

    python -m benchmarks.tables            rewrite what stands between the markers
    python -m benchmarks.tables --check    exit code 1 if that would change anything

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. What has not been measured says so.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.harness import Spread, read_results

RESULTS = Path(__file__).resolve().parent / "results"
PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
NOT_MEASURED = "not measured yet"
_MARKED = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

Results = Mapping[str, dict[str, Any]]
"""By file name without .json."""

_SETTINGS = tuple((size, dtype) for dtype in ("float32", "bfloat16") for size in (8, 32))
_ARMS = {
    "hf": "transformers Trainer, logits + cross-entropy",
    "hf_compact": "the same, trained rows only",
    "trl_sft": "TRL SFTTrainer, nll",
    "trl_dft": "TRL SFTTrainer, dft",
    "trl_sft_padding_free": "TRL SFTTrainer, nll, padding-free",
    "sft": "psft, `sft`",
    "sft_padding_free": "psft, `sft`, padding-free",
    "dft": "psft, `dft`",
    "gem": "psft, `gem`",
    "sft_kl": "psft, `sft_kl` (full KL)",
    **{f"psft_k{k}": f"psft, `psft`, K = {k}" for k in (1, 2, 4, 8, 16)},
    "psft_k8_padding_free": "psft, `psft`, K = 8, padding-free",
    "plain_all": "logits + cross-entropy, all positions",
    "plain_compact": "the same, scored rows",
    "trl_shipped": "TRL kernel, as SFTTrainer calls it",
    "trl_compact": "TRL kernel, scored rows",
    "torch_fused": "torch `linear_cross_entropy`, scored rows",
    "liger": "Liger fused linear cross-entropy, scored rows",
    "ours_differentiable": "psft, any differentiable loss (`token_statistics`)",
    "ours": "psft, gradient in the forward (`token_loss`)",
    "ours_psft": "the same, clipped ratio",
}
_FIGURES = (  # ratio, how it is called, target, floor or known
    ("psft_over_sft", "psft (K = 8) / our sft", "≤ 1.31", "1.292: 1 + (K − 1) / 3K"),
    ("sft_over_trl_sft", "our sft / TRL sft", "≤ 0.40", "0.30 by a prototype, bf16 on AVX512-BF16"),
    ("psft_over_trl_sft", "psft (K = 8) / TRL sft", "≤ 0.50", "0.39 by the same"),
    ("sft_over_plain_hf", "our sft / plain logits", "≤ 0.62", "0.54 by the same"),
    ("peak_memory_over_plain_hf", "peak memory, psft / plain logits", "≤ 0.5", "weights, gradients and AdamW"),
)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(header)} |", f"| {' | '.join('---' for _ in header)} |"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def shown_spread(spread: Mapping[str, float] | None, digits: int = 2) -> str:
    """Median and range, or that there is none."""
    if spread is None:
        return NOT_MEASURED
    return f"{spread['median']:.{digits}f} [{spread['min']:.{digits}f}, {spread['max']:.{digits}f}]"


def source_line(content: Mapping[str, Any]) -> str:
    """Where the figures of one file are from."""
    prologue = content["prologue"]
    versions, git, load = prologue["versions"], prologue.get("git") or {}, prologue["load_average"]
    commit = (git.get("commit") or "unknown")[:10] + (" with changes" if git.get("modified") else "")
    repetitions = {len(blocks) for blocks in content["samples"].values()}
    machine = prologue["device"] if prologue["device"] != "cpu" else prologue["processor"]
    return (
        f"{machine}, {prologue['threads']} threads, {prologue['clock']} clock, load average "
        f"{'unknown' if load is None else load[0]} at the start; float32 products by `{prologue['matmul_precision']}`, "
        f"error {prologue['matmul_error']['float32']:.1e}; torch {versions['torch']}, transformers "
        f"{versions['transformers']}, TRL {versions['trl']}; {', '.join(map(str, sorted(repetitions)))} repetitions; "
        f"commit {commit}, {prologue['at'][:10]}."
    )


def sources(names: Sequence[str], found: Results) -> str:
    """The source lines of some files, equal ones once."""
    lines = dict.fromkeys(source_line(found[name]) for name in names if name in found)
    return "".join(f"\n\n{line}" for line in lines)


def headline(found: Results) -> str:
    names = [f"steps-{size}-{dtype}" for size, dtype in _SETTINGS]
    header = ["figure", "target", "floor or known", *(f"{dtype}, batch {size}" for size, dtype in _SETTINGS)]
    if "quick" in found:
        names.append("quick")
        header.append("`--quick`: {dtype}, batch {batch_size}".format(**found["quick"]["settings"]))
    rows = []
    for key, called, target, floor in _FIGURES:
        cells = [shown_spread(found.get(name, {}).get("ratio_spreads", {}).get(key)) for name in names]
        rows.append([called, target, floor, *cells])
    return markdown(header, rows) + sources(names, found)


def _steps_table(content: Mapping[str, Any]) -> str:
    summary = content["summary"]
    rows = []
    for name, arm in summary.items():
        peak = [b["details"].get("peak_bytes") for b in content["samples"][name]]
        row = [_ARMS.get(name, name), shown_spread(arm["seconds"]), f"{arm['real_tokens_per_second']['median']:.0f}"]
        row += [f"{arm['trained_tokens_per_second']['median']:.0f}", shown_spread(arm["over_hf"])]
        rows.append([*row, f"{max(peak) / 2**30:.1f}"] if all(peak) else row)
    header = ["arm", "seconds a step", "tokens/s", "trained tokens/s", "over plain logits"]
    if rows and len(rows[0]) > len(header):
        header.append("peak GiB")
    return markdown(header, rows)


def steps(found: Results) -> str:
    parts = []
    for size, dtype in _SETTINGS:
        content = found.get(f"steps-{size}-{dtype}")
        title = f"**{dtype}, batch {size}**"
        body = NOT_MEASURED if content is None else _steps_table(content)
        parts.append(f"{title}\n\n{body}")
    return "\n\n".join(parts)


def k_sweep(found: Results) -> str:
    content = found.get("k_sweep")
    rows = []
    for k in (1, 2, 4, 8, 16):
        spread = None if content is None else content["ratio_spreads"][f"psft_k{k}"]
        rows.append([str(k), f"{1 + (k - 1) / (3 * k):.3f}", shown_spread(spread, 3)])
    return markdown(["K", "floor 1 + (K − 1) / 3K", "psft / sft"], rows) + sources(["k_sweep"], found)


def head(found: Results) -> str:
    files = {dtype: found.get(f"head-{dtype}") for dtype in ("float32", "bfloat16")}
    names = dict.fromkeys(name for content in files.values() if content for name in content["summary"])
    if not names:
        return NOT_MEASURED
    rows = []
    for name in names:
        row = [_ARMS.get(name, name)]
        for content in files.values():
            arm = (content or {}).get("summary", {}).get(name)
            row.append(shown_spread(None if arm is None else {k: v * 1000 for k, v in arm["seconds"].items()}, 0))
        error = ((files["bfloat16"] or {}).get("bf16_errors") or {}).get(name)
        rows.append([*row, f"{error['gradient_error']:.1e}" if error else NOT_MEASURED])
    header = ["head", "float32, ms", "bfloat16, ms", "gradient error in bfloat16"]
    return markdown(header, rows) + _head_ratios(files) + sources([f"head-{d}" for d in files], found)


def _head_ratios(files: Mapping[str, Any]) -> str:
    rows = []
    targets = {"float32": "≤ 0.55", "bfloat16": "≤ 0.45"}
    known = {"float32": "0.51", "bfloat16": "0.26 (with less precision)"}
    for dtype, content in files.items():
        spread = None if content is None else content["ratio_spreads"].get("head_over_trl_compact")
        rows.append([f"head / TRL kernel compacted, {dtype}", targets[dtype], known[dtype], shown_spread(spread)])
        flat = None if content is None else content["ratio_spreads"].get("head_memory_largest_over_smallest")
        rows.append([f"memory, most / least over 1024 to 8192 rows, {dtype}", "≤ 1.05", "1", shown_spread(flat)])
    return "\n\n" + markdown(["figure", "target", "floor or known", "measured"], rows)


def head_memory(found: Results) -> str:
    content = found.get("head-float32")
    if content is None or not content["memory"]:
        return NOT_MEASURED
    tokens = sorted({row["tokens"] for row in content["memory"]})
    cells = {(row["arm"], row["tokens"]): f"{row['beyond_bytes'] / 2**20:.0f}" for row in content["memory"]}
    names = dict.fromkeys(row["arm"] for row in content["memory"])
    rows = [[_ARMS.get(name, name), *(cells.get((name, n), "–") for n in tokens)] for name in names]
    return markdown(["MiB", *(f"{n} rows" for n in tokens)], rows)


def memory(found: Results) -> str:
    rows = []
    for size, dtype in _SETTINGS:
        content = found.get(f"steps-{size}-{dtype}")
        if content is None:
            rows.append([f"{dtype}, batch {size}", *[NOT_MEASURED] * 5])
            continue
        ours, plain = content["memory"]["psft"], content["memory"]["hf"]
        cells = [f"{one[key] / 2**30:.2f}" for one in (plain, ours) for key in ("peak_bytes", "resident_before_bytes")]
        rows.append([f"{dtype}, batch {size}", *cells, f"{ours['peak_bytes'] / plain['peak_bytes']:.2f}"])
    header = ["", "plain, peak GiB", "before the step", "psft, peak GiB", "before the step", "ratio of peaks"]
    return markdown(header, rows)


def overheads(found: Results) -> str:
    content = found.get("overheads")
    figures = (
        ("trainer_over_bare_loop", "trainer / bare loop of the same operations", "≤ 1.02"),
        ("telemetry_on_over_off", "step with telemetry / without", "≤ 1.03"),
        ("entropy_on_over_off", "step with entropies and top-1 hits / without", "≤ 1.03"),
    )
    spreads = {} if content is None else content["ratio_spreads"]
    rows = [[called, target, shown_spread(spreads.get(key), 3)] for key, called, target in figures]
    return markdown(["figure", "target", "measured"], rows) + sources(["overheads"], found)


def startup(found: Results) -> str:
    content = found.get("startup")
    figures = (
        ("help", "`psft --help`", "≤ 0.3"),
        ("train_help", "`psft train --help`, the page made before", "≤ 0.3"),
        ("plan", "`psft plan quickstart`, data prepared before", "≤ 5"),
        ("plan_anew", "the same with `--no_data_cache`", ""),
        ("train_ready", "`psft train quickstart`, until the first step begins", ""),
        ("train_first_step", "the same, until the first optimizer step is done", "≤ 20"),
    )
    rows = []
    for name, called, target in figures:
        blocks = [] if content is None else content["samples"].get(name, [])
        processor = asdict(Spread.of([block["details"]["processor_s"] for block in blocks])) if blocks else None
        wall = content["summary"][name]["seconds"] if content is not None and blocks else None
        rows.append([called, target, shown_spread(wall), shown_spread(processor)])
    return markdown(["", "target", "wall, s", "processor, s"], rows) + sources(["startup"], found)


def sweeps(found: Results) -> str:
    content = found.get("sweeps")
    if content is None:
        return NOT_MEASURED
    rows = [
        [str(p["length"]), str(p["vocab"]), f"{p['trained']:.0%}"]
        + [shown_spread(p.get(name)) for name in ("psft_over_sft", "sft_over_trl_sft", "psft_over_trl_sft")]
        for p in content["points"]
    ]
    header = ["tokens a row", "words", "trained", "psft / sft", "sft / TRL sft", "psft / TRL sft"]
    return markdown(header, rows) + sources(["sweeps"], found)


def gpu(found: Results) -> str:
    parts = []
    for shape in ("Qwen2.5-0.5B-Instruct", "Llama-3.2-1B-Instruct"):
        for checkpointing in ("off", "on"):
            name = f"gpu-{shape}-checkpointing-{checkpointing}"
            body = NOT_MEASURED
            if name in found:
                spreads = found[name]["ratio_spreads"]
                ratios = markdown(["ratio", "measured"], [[key, shown_spread(s, 3)] for key, s in spreads.items()])
                body = f"{_steps_table(found[name])}\n\n{ratios}{sources([name], found)}"
            parts.append(f"**{shape}, checkpointing {checkpointing}**\n\n{body}")
    return "\n\n".join(parts)


_MIXES = {
    "math_repeated": "mathematics, 32 samples a problem",
    "math_distinct": "mathematics, every answer wrong and another",
    "math_long": "mathematics, 32 samples, long responses",
    "choice": "multiple choice",
    "ifeval": "IFEval",
}


def grading(found: Results) -> str:
    content = found.get("grading")
    if content is None:
        return NOT_MEASURED
    rows = []
    for name, blocks in content["samples"].items():
        details = blocks[-1]["details"]
        row = [_MIXES.get(name, name), f"{details['answers']:,}", f"{details['characters'] / details['answers']:,.0f}"]
        row += [f"{statistics.median(block['seconds'] for block in blocks):.0f}"]
        row += [f"{statistics.median(block['details']['cpu_s_per_100k'] for block in blocks):.0f}"]
        rows.append([*row, f"{details['largest_process_bytes'] / 2**20:.0f}", f"{details['timed_out']:.0f}"])
    header = ["answers", "graded", "characters each", "s for 100,000", "CPU s for 100,000", "most MiB of a process"]
    busy = " Other programs ran at the same time: the CPU seconds count." if content["prologue"]["is_contended"] else ""
    versions, workers = content["prologue"]["versions"], content["settings"]["workers"]
    graders = f"\n\n{workers} workers; math-verify {versions['math-verify']}, sympy {versions['sympy']}.{busy}"
    return markdown([*header, "timed out"], rows) + graders + sources(["grading"], found)


def generation(found: Results) -> str:
    content = found.get("generation")
    if content is None:
        return NOT_MEASURED
    rows = []
    for name, arm in content["summary"].items():
        seconds = arm["seconds"]
        rate = {"median": 1 / seconds["median"], "min": 1 / seconds["max"], "max": 1 / seconds["min"]}
        spread = content["ratio_spreads"].get(f"{name}_over_one")
        ratio, target = (shown_spread(spread), "≥ 3" if name == "batch_16" else "–") if spread else ("1", "–")
        rows.append([name.removeprefix("batch_"), shown_spread(rate, 1), target, ratio])
    header = ["samples at a time", "tokens/s of answers", "target", "over one at a time"]
    work = "\n\n{answers} answers of at most {max_tokens} tokens, {dtype}.".format(**content["settings"])
    return markdown(header, rows) + work + sources(["generation"], found)


TABLES: dict[str, Callable[[Results], str]] = {
    "headline": headline, "steps": steps, "k_sweep": k_sweep, "head": head, "head_memory": head_memory,
    "memory": memory, "overheads": overheads, "startup": startup, "sweeps": sweeps, "grading": grading,
    "generation": generation, "gpu": gpu,
}  # fmt: skip


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """All results of a folder. Raises ValueError naming a file that is none."""
    return {path.stem: read_results(path) for path in sorted(folder.glob("*.json"))}


def rewritten(page: str, found: Results) -> str:
    """The page with every marked table made anew.

    Raises:
        ValueError: a marker names no table, or a table has no marker.
    """
    marked = [match["name"] for match in _MARKED.finditer(page)]
    unknown, missing = sorted(set(marked) - set(TABLES)), sorted(set(TABLES) - set(marked))
    if unknown or missing:
        raise ValueError(f"markers without a table: {unknown}; tables without a marker: {missing}")
    return _MARKED.sub(lambda match: f"{match[1]}\n{TABLES[match['name']](found)}\n\n{match[3]}", page)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the tables of docs/performance.md from the results.")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the page is out of date")
    args = parser.parse_args(argv)
    page = args.page.read_text(encoding="utf-8")
    new = rewritten(page, load(args.results))
    if args.check:
        if new != page:
            print(f"{args.page.name} is out of date: run python -m benchmarks.tables", file=sys.stderr)
        return int(new != page)
    args.page.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
