"""Laws of the other backends: no broken server loses a sample; vLLM and replay do as they are asked."""

from __future__ import annotations

import json
import sys
import threading
import types

import pytest
from openai_server import FAULTS, FakeServer, completion

from psft.errors import RequestError, RunFailed
from psft.evaluation.backends import Answer, Failure, Request
from psft.evaluation.backends.http import retry_after_s
from psft.evaluation.backends.openai import HOPELESS, OpenAIBackend, Server
from psft.evaluation.backends.replay import ReplayBackend
from psft.evaluation.backends.vllm import VLLMBackend
from psft.evaluation.benchmarks import Sampling

SAMPLING = Sampling(max_tokens=50)


def requests(count: int, k: int = 1) -> list[Request]:
    return [
        Request(f"{i}-{j}", "b", f"item{i}", j, 10 * i + j, ({"role": "user", "content": f"question {i}"},), SAMPLING)
        for i in range(count)
        for j in range(k)
    ]


@pytest.fixture
def serve():
    servers = []

    def make(script):
        servers.append(FakeServer(script))
        return servers[-1]

    yield make
    for server in servers:
        server.shutdown()
        server.server_close()


def backend_for(server, pauses=None, **settings):
    record = (pauses if pauses is not None else []).append
    defaults = {"concurrency": 4, "timeout_s": 0.6, "max_retries": 8, "pause": record}
    return OpenAIBackend(Server(server.url, "m", "secret", **{**defaults, **settings}))


def collect(backend, asked, done=()):
    return {request.key: outcome for batch in backend.generate(asked, done) for request, outcome in batch}


def test_a_server_that_breaks_in_every_way_loses_no_sample(serve):
    """Each request meets all faults, in an order of its own, before it is answered.

    Goes red without any of: retry on 429 and 5xx, on broken JSON, on a short body, a closed connection, null text.
    """

    def script(attempt, body):
        if attempt <= len(FAULTS):
            return FAULTS[(attempt + body["seed"]) % len(FAULTS)]
        return 200, {}, completion(f"answer to {body['messages'][0]['content']} by {body['seed']}")

    server, pauses = serve(script), []
    found = collect(backend_for(server, pauses, timeout_s=20), requests(6, k=2))
    expected = {r.key: Answer(f"answer to {r.messages[0]['content']} by {r.seed}", "stop", 3) for r in requests(6, k=2)}
    assert found == expected
    assert max(pauses) >= 30 and sum(pause >= 7 for pause in pauses) >= 12  # growing, and as Retry-After asks


@pytest.mark.parametrize("status", [200, 400])
def test_one_connection_serves_one_request_after_the_other(serve, status):
    """Goes red if an answer that was read is left open: then every second request fails and is sent again."""
    server, pauses = serve(lambda attempt, body: (status, {}, completion("fine"))), []
    assert len(collect(backend_for(server, pauses, concurrency=1, timeout_s=20), requests(6))) == 6
    assert pauses == [] and set(server.tries.values()) == {1} and len(server.clients) == 1


@pytest.mark.parametrize("fault", ["silence", "drip"])
def test_a_request_has_a_time_limit(serve, fault):
    """Goes red if only single reads are timed (drip), or nothing is."""
    server = serve(lambda attempt, body: fault if attempt == 1 else (200, {}, completion("late")))
    assert collect(backend_for(server), requests(2)) == {r.key: Answer("late", "stop", 3) for r in requests(2)}


def test_a_sample_that_never_succeeds_is_a_failure_and_no_answer(serve):
    """Goes red if retries end in an empty answer, or one bad sample ends the others."""

    def script(attempt, body):
        return (500, {}, b"no") if body["seed"] == 10 else (200, {}, completion("fine"))

    found = collect(backend_for(serve(script), max_retries=2, timeout_s=20), requests(4))
    assert isinstance(found["1-0"], Failure) and "500" in found["1-0"].reason and "3 tries" in found["1-0"].reason
    assert sum(isinstance(outcome, Answer) for outcome in found.values()) == 3


def test_what_is_refused_for_good_is_not_asked_again(serve):
    """A prompt too long. Goes red if 400 is retried."""
    server = serve(lambda attempt, body: (400, {}, b'{"error": {"message": "too long"}}'))
    found = collect(backend_for(server, timeout_s=20), requests(3))
    assert all("400: too long" in outcome.reason for outcome in found.values())
    assert set(server.tries.values()) == {1}


@pytest.mark.parametrize("status", [401, 404])
def test_a_wrong_key_or_model_ends_the_evaluation(serve, status):
    """Goes red if each sample fails by itself."""
    server = serve(lambda attempt, body: (status, {}, b'{"error": {"message": "no such model m"}}'))
    with pytest.raises(RequestError, match=f"{status}: no such model m. Check --base_url"):
        collect(backend_for(server, timeout_s=20), requests(30))


def test_a_dead_server_is_given_up(serve):
    """Goes red if every sample of a suite is tried on a server that is not there."""
    server = serve(lambda attempt, body: "nothing")
    with pytest.raises(RunFailed, match=f"answered none of {HOPELESS} requests"):
        collect(backend_for(server, max_retries=1, timeout_s=20), requests(60))


def test_the_request_says_all_that_decides_the_answer(serve):
    """Goes red if a sampling setting, the seed or the key is not sent, or done requests are sent."""
    server = serve(lambda attempt, body: (200, {}, completion("", tokens=1)))
    asked = requests(2)
    found = collect(backend_for(server, extra={"top_k": -1}, timeout_s=20), asked, done={"1-0"})
    (body,) = server.bodies
    assert body == {
        "model": "m", "messages": [{"role": "user", "content": "question 0"}], "max_tokens": 50, "temperature": 0.7,
        "top_p": 0.95, "seed": 0, "n": 1, "stream": False, "top_k": -1,
    }  # fmt: skip
    assert server.headers_seen[0]["Authorization"] == "Bearer secret"
    assert found == {"0-0": Answer("", "stop", 1)}  # empty, but the server says that a token was made


def test_an_empty_answer_nobody_vouches_for_is_asked_again(serve):
    """Goes red if text "" without a token count is kept."""
    server = serve(lambda attempt, body: (200, {}, completion("" if attempt == 1 else "said", tokens=None)))
    assert collect(backend_for(server, timeout_s=20), requests(1))["0-0"].text == "said"


def test_answers_are_asked_for_at_once(serve):
    """Goes red if requests are sent one by one: they wait for each other here."""
    barrier = threading.Barrier(4)

    def script(attempt, body):
        barrier.wait(timeout=20)
        return 200, {}, completion("together")

    assert len(collect(backend_for(serve(script), timeout_s=30), requests(8))) == 8


def test_retry_after_may_be_a_date():
    """Goes red if the header is taken for a number always."""
    assert retry_after_s("3") == 3 and retry_after_s("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert retry_after_s("soon") is None and retry_after_s(None) is None


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host/v1", "http://", "http://host:port/v1"])
def test_what_is_no_address_is_refused(url):
    """Goes red if it is found out by the first request."""
    with pytest.raises(RequestError, match="--base_url .* is no URL"):
        Server(url, "m")


def fake_vllm(seen):
    """A module with the two classes the backend uses, as vLLM 0.8 and later have them."""

    class SamplingParams:
        def __init__(self, **settings):
            self.settings = settings

    class LLM:
        def __init__(self, **settings):
            seen["engine"] = settings

        def chat(self, messages, parameters, use_tqdm):
            seen.setdefault("calls", []).append([p.settings for p in parameters])
            return [
                types.SimpleNamespace(
                    outputs=[
                        types.SimpleNamespace(text=f"{m[0]['content']} {i}", finish_reason="length", token_ids=[1, 2])
                        for i in range(p.settings["n"])
                    ]
                )
                for m, p in zip(messages, parameters, strict=True)
            ]

    return types.SimpleNamespace(SamplingParams=SamplingParams, LLM=LLM)


def test_vllm_is_asked_once_for_the_samples_of_a_prompt(monkeypatch):
    """Goes red if n is 1, if the model's own sampling defaults act, or samples are put to other items."""
    seen = {}
    monkeypatch.setitem(sys.modules, "vllm", fake_vllm(seen))
    backend = VLLMBackend("folder", batch_size=6, options={"tensor_parallel_size": 2})
    found = collect(backend, requests(3, k=3), done={"2-1"})
    assert found["1-2"] == Answer("question 1 2", "length", 2) and len(found) == 8 and "2-1" not in found
    assert [[p["n"] for p in call] for call in seen["calls"]] == [[3, 3], [2]]
    assert seen["engine"]["generation_config"] == "vllm" and seen["engine"]["tensor_parallel_size"] == 2
    assert seen["calls"][0][1] == {"n": 3, "temperature": 0.7, "top_p": 0.95, "top_k": -1, "max_tokens": 50, "seed": 10}


def test_vllm_options_that_change_answers_are_part_of_the_key():
    """Goes red if samples of a quantised model are taken for the model's; or if more cards make all samples anew."""
    plain = VLLMBackend("folder").numerics
    assert VLLMBackend("folder", options={"tensor_parallel_size": 4}).numerics == plain
    assert VLLMBackend("folder", options={"quantization": "fp8"}).numerics != plain


def test_a_prompt_that_vllm_refuses_is_a_wrong_request(monkeypatch):
    """Goes red if its ValueError ends in a traceback."""

    def refuse(self, messages, parameters, use_tqdm):
        raise ValueError("The decoder prompt (length 9000) is longer than the maximum model length of 4096.")

    vllm = fake_vllm({})
    vllm.LLM.chat = refuse
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    with pytest.raises(RequestError, match="refuses a prompt of b: The decoder prompt"):
        collect(VLLMBackend("folder"), requests(1))


def test_vllm_that_is_not_installed_is_said(monkeypatch):
    """Goes red if the import stands at the top, or fails in its own words."""
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(RequestError, match="needs vLLM, which is not installed. Install the build"):
        collect(VLLMBackend("folder"), requests(1))


def test_replay_answers_from_a_file(tmp_path):
    """Goes red if an answer that is not there becomes an empty one."""
    path = tmp_path / "answers.jsonl"
    row = {"benchmark": "b", "item": "item0", "response": "7", "num_tokens": 4, "finish_reason": "length"}
    path.write_text(json.dumps(row) + "\n")
    found = collect(ReplayBackend(path), requests(2))
    assert found["0-0"] == Answer("7", "length", 4) and isinstance(found["1-0"], Failure)
