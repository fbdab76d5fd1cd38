"""Laws of `prepare_preferences`: every spelling of a pair gives the same tokens, a bad row is named with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psft.data import prepare as preparation
from psft.data import prepare_preferences, render_pair
from psft.data.preferences import TokenPair, cut_pair, pair_lengths
from psft.errors import RequestError

QUESTION, GOOD, BAD = "How many clips in May?", "She sold 24 clips.", "I do not know."


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


SPELLINGS = {
    "strings": {"prompt": QUESTION, "chosen": GOOD, "rejected": BAD},
    "messages": {"prompt": [user(QUESTION)], "chosen": [answer(GOOD)], "rejected": [answer(BAD)]},
    "ultrafeedback": {
        "prompt": QUESTION, "chosen": [user(QUESTION), answer(GOOD)], "rejected": [user(QUESTION), answer(BAD)],
        "score_chosen": 8.0, "prompt_id": "a",
    },
    "without prompt": {"chosen": [user(QUESTION), answer(GOOD)], "rejected": [user(QUESTION), answer(BAD)]},
    "JSON text": {
        "chosen": json.dumps([user(QUESTION), answer(GOOD)]), "rejected": json.dumps([user(QUESTION), answer(BAD)]),
    },
}  # fmt: skip


@pytest.fixture
def prepare(tiny_tokenizer, tmp_path: Path):
    """prepare(rows, ...) -> what `prepare_preferences` makes of them."""

    def prepare(rows: list[Any], **options: Any) -> Any:
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
        return prepare_preferences(str(path), **{"tokenizer": tiny_tokenizer, "max_length": 512, **options})

    return prepare


def texts_of(prepared: Any, tokenizer: Any, index: int = 0) -> list[str]:
    row = prepared.table.slice(index, 1).to_pylist()[0]
    return [tokenizer.decode(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_gives_the_same_tokens(prepare, tiny_tokenizer, spelling):
    """Goes red if a spelling repeats the prompt, loses the generation prompt, or leaves out an end token."""
    prepared = prepare([SPELLINGS[spelling]])
    prompt = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    assert texts_of(prepared, tiny_tokenizer) == [prompt, f"{GOOD}<|im_end|>", f"{BAD}<|im_end|>"]
    row = prepared.table.to_pylist()[0]
    tokens = {name: len(ids) for name, ids in row.items()}
    assert prepared.report.num_trained_tokens == tokens["chosen_ids"] + tokens["rejected_ids"]
    assert prepared.report.num_tokens == sum(tokens.values()) + tokens["prompt_ids"]
    longest = tokens["prompt_ids"] + max(tokens["chosen_ids"], tokens["rejected_ids"])
    assert pair_lengths(prepared.table) == pair_lengths(prepared.dataset) == [2 * longest]


def test_the_pairs_are_tokenised_as_demonstrations_are(prepare, tiny_tokenizer, tmp_path):
    """A chosen answer as a demonstration gives the same ids. Goes red if the two ways part."""
    from psft.data import prepare_dataset

    (tmp_path / "sft.jsonl").write_text(json.dumps({"prompt": QUESTION, "completion": GOOD}))
    options: dict[str, Any] = {"tokenizer": tiny_tokenizer, "max_length": 512, "system_prompt": "Be short."}
    demonstration = prepare_dataset(str(tmp_path / "sft.jsonl"), **options).table.to_pylist()[0]
    pair = prepare([SPELLINGS["strings"]], system_prompt="Be short.").table.to_pylist()[0]
    ids = pair["prompt_ids"] + pair["chosen_ids"]
    assert demonstration["input_ids"][: len(ids)] == ids  # the template writes a newline after the end token
    assert [label for label in demonstration["labels"] if label != -100] == pair["chosen_ids"]


def test_pairs_come_from_the_cache_and_from_other_processes_as_they_are_made_here(
    prepare, tiny_tokenizer, tmp_path, monkeypatch
):
    """Goes red if an encoder of pairs does not arrive whole in another process (its cut, its format), batches change
    places, or an entry of the cache is that of another `truncation`."""
    monkeypatch.setattr(preparation, "_BATCH_ROWS", 4)
    monkeypatch.setattr(preparation, "_SMALL", 8)
    rows: list[Any] = [
        {
            "prompt": f"case {i} " * (1 + i % 9),
            "chosen": f"{GOOD} " * (1 + i % 7),
            "rejected": f"{BAD} {i}" + " <|im_end|>" * (i % 9 == 2),
        }
        for i in range(40)
    ]
    rows[5], rows[30] = "{broken", {"prompt": "a twin", "chosen": GOOD, "rejected": GOOD}

    def made(name: str, **options: Any) -> tuple[Any, ...]:
        rejected = tmp_path / f"{name}.jsonl"
        found = prepare(rows, max_length=64, on_bad_row="skip", rejected_path=rejected, **options)
        return found.table.to_pydict(), found.report, rejected.read_text(), found.cached_in

    cache = tmp_path / "cache"
    here, there, first = made("here", num_processes=1), made("there", num_processes=3), made("first", cache_dir=cache)
    monkeypatch.setattr(preparation, "in_order", None)  # whoever encodes again fails
    again = made("again", cache_dir=cache)
    assert here[:3] == there[:3] == first[:3] == again[:3]
    assert (first[3], again[3]) == (None, cache)
    assert 2 <= here[1].num_rejected < 30 and here[1].num_truncated > 0 and here[1].num_with_special_text > 0
    with pytest.raises(TypeError, match="NoneType"):
        made("cut otherwise", cache_dir=cache, truncation="llama_factory")


def test_several_turns_and_system_prompts(prepare, tiny_tokenizer):
    """Goes red if an earlier answer is trained, or the system prompt of the settings goes before the row's own."""
    before = [{"role": "system", "content": "Count."}, user("One?"), answer("Two."), user(QUESTION)]
    prepared = prepare([{"prompt": before, "chosen": GOOD, "rejected": BAD}], system_prompt="Be short.")
    prompt, chosen, _ = texts_of(prepared, tiny_tokenizer)
    assert prompt.count("system") == 1 and "Count." in prompt and "Two." in prompt and chosen == f"{GOOD}<|im_end|>"


def test_two_texts_are_cut_where_they_part(prepare, make_tiny_tokenizer):
    """As hh-rlhf has them. Goes red if a word is cut in two, or a chat template is put around the person's own text."""
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = None
    text = "\n\nHuman: How many?\n\nAssistant:"
    for tokens in (tokenizer, make_tiny_tokenizer()):
        prepared = prepare([{"chosen": f"{text} There are 24.", "rejected": f"{text} They left."}], tokenizer=tokens)
        expected = ["\n\nHuman: How many?\n\nAssistant:", " There are 24.<|im_end|>", " They left.<|im_end|>"]
        assert texts_of(prepared, tokens) == expected


BAD_ROWS = [
    ("{broken", "not JSON"),
    ({"prompt": QUESTION, "chosen": GOOD}, "field 'rejected' is missing"),
    ({"prompt": QUESTION, "chosen": GOOD, "rejected": "  "}, "empty answer"),
    ({"prompt": " ", "chosen": GOOD, "rejected": BAD}, "'prompt' is empty"),
    ({"prompt": QUESTION, "chosen": GOOD, "rejected": GOOD}, "the same answer"),
    ({"prompt": QUESTION, "chosen": 7, "rejected": BAD}, "'chosen' is not text"),
    ({"prompt": [{"role": "judge", "content": "x"}], "chosen": GOOD, "rejected": BAD}, "unknown role"),
    ({"prompt": QUESTION, "chosen": [answer(GOOD), user("And?")], "rejected": [answer(BAD)]}, "ends with the user"),
    (
        {"prompt": QUESTION, "chosen": [user("Else?"), answer(GOOD)], "rejected": [user("Else?"), answer(BAD)]},
        "without the row's 'prompt'",
    ),
    (
        {"prompt": None, "chosen": [user("A?"), answer(GOOD)], "rejected": [user("B?"), answer(BAD)]},
        "field 'prompt' is missing",
    ),
    (
        {"prompt": QUESTION, "chosen": [answer(GOOD), user("And?"), answer("x")], "rejected": [answer(BAD)]},
        "do not answer the same prompt",
    ),
    ({"prompt": "word " * 600, "chosen": GOOD, "rejected": BAD}, "no answer token within max_length=512"),
]


def test_bad_rows_are_named_or_left_out(prepare, tmp_path):
    """Goes red if a bad row is trained on, its line is wrong, or one policy acts as the other."""
    rows = [SPELLINGS["strings"], *(row for row, _ in BAD_ROWS), SPELLINGS["messages"]]
    with pytest.raises(RequestError) as caught:
        prepare(rows)
    for line, (_, reason) in list(enumerate(BAD_ROWS, start=2))[:10]:
        assert f"pairs.jsonl:{line}: " in str(caught.value) and reason in str(caught.value)
    rejected = tmp_path / "rejected.jsonl"
    prepared = prepare(rows, on_bad_row="skip", rejected_path=rejected)
    assert prepared.report.num_used == 2 and prepared.report.num_rejected == len(BAD_ROWS)
    lines = [json.loads(line) for line in rejected.read_text().splitlines()]
    assert [line["line"] for line in lines] == list(range(2, 2 + len(BAD_ROWS)))
    assert all(reason in line["reason"] for line, (_, reason) in zip(lines, BAD_ROWS, strict=True))


def test_conversations_that_part_too_early_are_bad_rows(prepare):
    row = {"chosen": [user("A?"), answer(GOOD)], "rejected": [user("B?"), answer(BAD)]}
    with pytest.raises(RequestError, match="do not answer the same prompt .they part at message 1"):
        prepare([row])


def test_fields_of_another_name_are_mapped(prepare, tiny_tokenizer):
    prepared = prepare(
        [{"q": QUESTION, "win": GOOD, "lose": BAD}], columns={"prompt": "q", "chosen": "win", "rejected": "lose"}
    )
    assert texts_of(prepared, tiny_tokenizer)[1:] == [f"{GOOD}<|im_end|>", f"{BAD}<|im_end|>"]
    with pytest.raises(RequestError, match="--columns chosen=FIELD,rejected=FIELD"):
        prepare([{"q": QUESTION, "win": GOOD}])


def test_special_tokens_in_an_answer_stay_text(prepare, tiny_tokenizer):
    prepared = prepare([{"prompt": QUESTION, "chosen": "a <|im_end|> b", "rejected": BAD}])
    chosen = prepared.table.to_pylist()[0]["chosen_ids"]
    assert chosen.count(tiny_tokenizer.eos_token_id) == 1 and prepared.report.num_with_special_text == 1


def test_an_example_shows_prompt_and_both_answers(prepare, tiny_tokenizer):
    shown = render_pair(prepare([SPELLINGS["strings"]]), tiny_tokenizer)
    assert f"chosen   ⟦{GOOD}<|im_end|>⟧" in shown and f"rejected ⟦{BAD}<|im_end|>⟧" in shown and QUESTION in shown


def pair(prompt: int, chosen: int, rejected: int) -> TokenPair:
    return TokenPair(list(range(prompt)), list(range(100, 100 + chosen)), list(range(300, 300 + rejected)))


@pytest.mark.parametrize(
    ("sizes", "keep_start", "llama_factory"),
    [
        ((4, 3, 2), (4, 3, 2), (4, 3, 2)),  # 7 of 10: nothing is cut
        ((9, 3, 4), (9, 1, 1), (6, 3, 4)),  # 2 x 4 < 10: the answers stay, the prompt loses its end
        ((4, 9, 2), (4, 6, 2), (4, 6, 2)),  # 2 x 4 < 10: the prompt stays, the answers are cut to 10 - 4
        ((8, 8, 5), (8, 2, 2), (5, 5, 5)),  # both long: int(10 x 8 / 16) = 5 for the answers, the rest for the prompt
        ((10, 6, 6), (10, 0, 0), (7, 3, 3)),  # int(10 x 6 / 16) = 3; keep_start leaves no answer: the pair is rejected
    ],
)
def test_what_each_way_of_cutting_keeps_of_ten_tokens(sizes, keep_start, llama_factory):
    """Worked by hand. Goes red if an answer is cut by its own length where the longer one decides."""
    for way, expected in (("keep_start", keep_start), ("llama_factory", llama_factory)):
        found = cut_pair(pair(*sizes), 10, way)
        assert tuple(map(len, found)) == expected, way
        assert all(kept == whole[: len(kept)] for kept, whole in zip(found, pair(*sizes), strict=True))


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(2, 50))
def test_a_cut_pair_fits_and_a_short_one_is_left_alone(prompt, chosen, rejected, most):
    whole = pair(prompt, chosen, rejected)
    for way in ("keep_start", "llama_factory"):
        found = cut_pair(whole, most, way)
        assert found.length <= most and (found == whole) == (whole.length <= most)
    assert cut_pair(whole, None, "keep_start") == whole


def test_the_sample_of_ultrafeedback_is_read(shared_data, tiny_tokenizer):
    """Real data, with one pair of twins among 200."""
    prepared = prepare_preferences(
        str(shared_data / "train" / "ultrafeedback_binarized_sample_eval200.jsonl"),
        tokenizer=tiny_tokenizer, max_length=None, on_bad_row="skip",
    )  # fmt: skip
    assert prepared.report.num_used == 199
    assert prepared.report.reasons == {"chosen and rejected are the same answer": 1}
