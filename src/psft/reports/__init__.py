"""Reports from run folders: verdict, figures, tables and a one-file page. Reads through `psft.runs`; imports no torch.

load, replay        a run folder -> Run, whatever state it is in
groups, benchmarks  which runs are repetitions or a sweep; which scores belong together
evaluations, score_ results files of psft eval -> the paper's tables of scores, with differences and their tests
sampling, charts    series -> lines of few points that keep their extremes; a figure as data
figures/            one module a family of figures
verdict, advice     the numbers in words; the next run
axes, svg, plot     the same figures drawn into the page and as PNG and PDF
provenance, page    settings, data, versions; the HTML
tables, write       CSV; all of it into a folder
"""

from psft.reports.load import find_runs
from psft.reports.write import Written, write_report

__all__ = ["Written", "find_runs", "write_report"]
