"""The bridge to lm-evaluation-harness (lm-eval): the alignment tax of the paper's table 11, and single tasks of it.

    registry.py    which tasks, their local data, few-shot counts, and the metric that is called their accuracy
    data.py        local data as rows in the form lm-eval's tasks expect
    task_files.py  the YAML files that point lm-eval's own tasks at those rows
    runner.py      lm-eval itself
    scores.py      its results in the form of ours
    session.py     from request to results; what is done is not run again

Prompts, generation and scoring are lm-eval's, untouched: such numbers depend on their details. lm-eval is imported in
runner.py and task_files.py only, when it is needed.
"""
