"""Chat templates are programs from anywhere: sandboxed, and stopped before they take the machine with them."""

from __future__ import annotations

import json
import re
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from psft.data import prepare_dataset, templates
from psft.data.render import make_renderer
from psft.data.templates import render_chat, render_marked
from psft.errors import RequestError

CHAT = ({"role": "user", "content": "How many clips?"}, {"role": "assistant", "content": "72."})


@pytest.fixture
def short_limit(monkeypatch):
    """Stops templates after 0.3 s: only for those that would run on for ever; a slow machine needs that for others."""
    monkeypatch.setattr(templates, "CPU_LIMIT_S", 0.3)


@pytest.fixture
def tokenizer_with(make_tiny_tokenizer):
    """tokenizer_with(template) -> tiny tokenizer."""

    def make(text: str, then: str | None = None) -> Any:
        tokenizer = make_tiny_tokenizer()
        tokenizer.chat_template = text + (tokenizer.chat_template if then is None else then)
        return tokenizer

    return make


def refusal(tokenizer: Any) -> str:
    with pytest.raises(RequestError) as caught:
        make_renderer(tokenizer, "messages")
    message = str(caught.value)
    assert message.isprintable() and "chat_template_path" in message
    return message


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ cycler.__init__.__globals__.os.system('id') }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'content': ''}) }}",
        "{% set ns = namespace(__class__=1) %}",
        "{% import 'os' as os %}",
        "{% include '/etc/passwd' %}",
        "{% extends 'other' %}",
    ],
)
def test_a_template_reaches_neither_python_nor_files(attack, tokenizer_with):
    """Goes red if any of our ways to render leaves transformers' sandbox (seen with a plain jinja2 Environment)."""
    assert "cannot be used" in refusal(tokenizer_with(attack))
    with pytest.raises(Exception, match="unsafe|no loader|underscore"):
        render_marked(tokenizer_with(""), attack, CHAT)


def test_both_ways_to_render_use_the_immutable_sandbox(tiny_tokenizer):
    """Goes red if transformers ever compiles templates in another environment: then we must bring our own."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from transformers.utils import chat_template_utils

    compiled = chat_template_utils._compile_jinja_template(tiny_tokenizer.chat_template)
    assert isinstance(compiled.environment, ImmutableSandboxedEnvironment)


@pytest.mark.parametrize(
    "attack",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{{ 9 ** (9 ** 9) }}",
        "{{ lipsum(10**9) }}",
    ],
)
def test_a_template_that_never_ends_is_stopped(attack, tokenizer_with, short_limit):
    """Goes red if a template can hang the process (seen without `_time_limit`)."""
    assert "it ran for 0.3 s" in refusal(tokenizer_with(attack))


@pytest.mark.parametrize(
    ("attack", "expected"),
    [
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "RecursionError"),
        ("{% for i in range(90000) %}{{ 'sixteen letters.' }}{% endfor %}", "it wrote 144"),
        ("{{ '\\ud800' }}", "lone surrogate"),
        ("{% for", "TemplateSyntaxError"),
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "RecursionError"),
        ("{{ messages" + ".a" * 20_000 + " }}", "RecursionError"),
        ("{{ raise_exception('\x1b[2J') }}", r"TemplateError: \\x1b\[2J"),
    ],
)
def test_a_template_that_runs_away_is_one_clear_error(attack, expected, tokenizer_with):
    """Goes red if a template can flood or break the process (seen without `_checked`)."""
    assert re.search(expected, refusal(tokenizer_with(attack)))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the memory limit needs Linux")
@pytest.mark.parametrize(
    "attack",
    [
        "{{ 'a' * 10**10 }}",
        "{{ 'a'|center(10**10) }}",
        "{{ '%10000000000d' % 1 }}",
        "{{ '{:>9999999999}'.format(1) }}",
        "{{ messages|tojson(indent=10**10) }}",
        "{% set ns = namespace(s='a') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    ],
)
def test_a_template_takes_no_more_memory_than_the_limit(attack, tokenizer_with):
    """Goes red without `_memory_limit`: the last one doubles until the machine has no memory left."""
    assert "MiB of memory" in refusal(tokenizer_with(attack))


def test_limits_leave_no_trace(tokenizer_with, short_limit):
    """Goes red if a handler, a timer or a limit of the process is not put back."""
    import resource

    before = signal.getsignal(signal.SIGVTALRM), resource.getrlimit(resource.RLIMIT_AS)
    render_chat(tokenizer_with(""), CHAT)
    refusal(tokenizer_with("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"))
    refusal(tokenizer_with("{{ 'a' * 10**10 }}"))
    assert before == (signal.getsignal(signal.SIGVTALRM), resource.getrlimit(resource.RLIMIT_AS))
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_a_template_renders_outside_the_main_thread_too(tokenizer_with):
    """Goes red if signals are asked for in a thread that may not have them."""
    texts: list[str] = []
    thread = threading.Thread(target=lambda: texts.append(render_chat(tokenizer_with(""), CHAT)))
    thread.start()
    thread.join()
    assert texts == [render_chat(tokenizer_with(""), CHAT)]


def test_a_template_that_runs_away_on_one_row_names_the_row(tokenizer_with, short_limit, tmp_path):
    """Goes red if the row is rejected: the next one would take as long, and so on for the whole file."""
    loop = "{% if 'hang' in messages[0]['content'] %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
    rows = [{"question": question, "answer": "a"} for question in ("one", "two", "hang")]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = tokenizer_with(f"{loop}{{% endfor %}}{{% endif %}}")
    with pytest.raises(RequestError, match=r"a\.jsonl:3: the chat template was stopped: it ran for 0.3 s"):
        prepare_dataset(str(file), tokenizer=tokenizer, max_length=None, on_bad_row="skip")


def test_several_templates_by_name_without_a_default_are_a_request_error(make_tiny_tokenizer):
    """Goes red if transformers' ValueError comes through."""
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = {"rag": tokenizer.chat_template, "tools": tokenizer.chat_template}
    assert "cannot be used" in refusal(tokenizer)


def test_marks_that_lie_in_each_other_are_refused(make_tiny_tokenizer, monkeypatch):
    """Goes red if overlapping spans cut the text into pieces that hold a part twice."""
    monkeypatch.setattr("psft.data.render._trl_training_template", lambda tokenizer: None)  # no time for TRL's trials
    tokenizer = make_tiny_tokenizer()
    every = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    tokenizer.chat_template = f"{{% generation %}}x{{% generation %}}{every}{{% endgeneration %}}{{% endgeneration %}}"
    assert "lie in each other" in refusal(tokenizer)
