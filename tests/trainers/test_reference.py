"""Laws of the frozen reference: whose log-probs it gives, where it keeps them, and that nothing else moves."""

import copy
import json
import threading
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from psft.data.microbatch import ROW_NUMBERS
from psft.errors import RequestError
from psft.trainers import reference_table
from psft.trainers.reference_cache import LogpTable, read_table

TARGET = {"objective": "sft_kl", "kl_estimator": "k3", "learning_rate": 1e-3}
FULL = {"objective": "sft_kl", "learning_rate": 1e-3}
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture
def cache(tmp_path):
    """A folder for the table; as a setting of `make_trainer`: ref_cache_dir=str(cache)."""
    return tmp_path / "ref_logps"


@pytest.fixture
def num_scorings(monkeypatch):
    """A list that grows by one whenever a training set is scored."""
    counted = []
    scored_rows = reference_table._scored_rows

    def spy(*args):
        counted.append(1)
        return scored_rows(*args)

    monkeypatch.setattr(reference_table, "_scored_rows", spy)
    return counted


def rows_of(trainer):
    return [json.loads(line) for line in (Path(trainer.args.output_dir) / "metrics.jsonl").read_text().splitlines()]


def logps_of(model, row):
    """Log-probs of a row's trained tokens, from full logits of that row alone."""
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
    with torch.no_grad():
        logps = model.eval()(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
    return logps.gather(1, labels.clamp(min=0)[:, None])[:, 0][labels != -100]


def prepared(trainer):
    trainer.reference.prepare()
    return trainer


def files_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("padding_free", [False, True])
def test_each_row_has_the_log_probs_of_the_frozen_model_at_its_tokens(
    make_trainer, make_tiny_model, demonstrations, cache, padding_free
):
    """Goes red if sorting by length changes which row a value belongs to, or sequences are cut one token too late."""
    trainer = prepared(make_trainer(**TARGET, padding_free=padding_free, max_length=None, ref_cache_dir=str(cache)))
    frozen = make_tiny_model()
    loader = trainer.get_train_dataloader()
    loader.set_epoch(0)
    seen = set()
    for batch in loader:
        for micro_batch in batch["micro_batches"]:
            numbers, mask = micro_batch[ROW_NUMBERS], micro_batch["labels"][:, 1:] != -100
            placed = trainer.reference.target_logps(numbers, mask)
            assert placed.shape == mask.shape and not placed[~mask].any()
            want = torch.cat([logps_of(frozen, demonstrations[number]) for number in numbers])
            torch.testing.assert_close(placed[mask], want, rtol=0, atol=2e-5)
            seen |= set(numbers)
    assert seen == set(range(len(demonstrations)))


def test_values_for_other_tokens_than_the_micro_batch_has_are_refused(make_trainer, cache):
    """Goes red if the number of values is not compared: masked_scatter itself accepts too many."""
    reference = prepared(make_trainer(**TARGET, ref_cache_dir=str(cache))).reference
    count = len(reference._table.of([3]))
    for wrong in (count - 1, count + 1):
        with pytest.raises(AssertionError, match="trained tokens"):
            reference.target_logps([3], torch.ones(1, wrong, dtype=torch.bool))


def test_a_second_run_reads_the_table_and_has_the_same_losses_to_the_bit(make_trainer, cache, num_scorings, caplog):
    """Goes red if the key holds anything that changes between two runs, or values are stored rounded."""
    caplog.set_level("INFO", "psft")
    runs = []
    for name in ("one", "two"):
        trainer = make_trainer(name, **TARGET, ref_cache_dir=str(cache))
        trainer.train()
        runs.append([(row["loss"], row["grad_norm"]) for row in rows_of(trainer)])
        assert len(num_scorings) == 1
    assert runs[0] == runs[1]
    said = [record.message for record in caplog.records if "reference log-probs" in record.message]
    assert len(said) == 2 and "computed and kept in" in said[0] and "read from" in said[1]
    assert all(f"32 rows, {len(trainer.reference._table.values)} tokens" in line for line in said)


def test_what_changes_the_numbers_changes_the_key_and_nothing_else_does(
    make_trainer, make_tiny_model, demonstrations, cache, num_scorings
):
    """Goes red if weights, labels, autocast or the user's collator are left out of the key, or an adapter is in it."""

    class OddLabels(DataCollatorForLanguageModeling):
        def torch_call(self, examples):
            return super().torch_call([{**row, "labels": [-100, *row["labels"][1:-1], -100]} for row in examples])

    def scorings(name, collator=None, **settings):
        trainer = make_trainer(name, **{**TARGET, "ref_cache_dir": str(cache), **settings})
        trainer.data_collator = collator or trainer.data_collator
        before = len(num_scorings)
        prepared(trainer)
        return len(num_scorings) - before

    model = make_tiny_model()
    assert scorings("first") == 1
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] += 1e-6
    rows = list(demonstrations)
    rows[7] = {**rows[7], "labels": [-100, *rows[7]["labels"][1:-1], -100]}
    other_data = type(demonstrations).from_list(rows)
    assert scorings("weights", model=model) == 1
    assert scorings("data", train_dataset=other_data) == 1
    assert scorings("autocast", bf16=True) == 1
    assert scorings("collator", collator=OddLabels(pad_token_id=0)) == 1
    assert scorings("again", learning_rate=1e-2, seed=9, kl_estimator="k1", max_tokens_per_micro_batch=32) == 0
    for seed in (1, 2):
        assert scorings(f"adapter{seed}", seed=seed, peft_config=LoraConfig(**LORA)) == 0
    assert len(files_in(cache)) == 5


@pytest.mark.parametrize("damage", ["torn", "flipped", "other rows"])
def test_a_damaged_file_is_computed_again_with_a_warning(make_trainer, cache, num_scorings, caplog, damage):
    """Goes red if the checksum or the number of rows is not compared, or a read error ends the run."""
    table = prepared(make_trainer("one", **TARGET, ref_cache_dir=str(cache))).reference._table
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    if damage == "torn":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "flipped":
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    else:
        reference_table.write_table(path, LogpTable(table.values[: table.offsets[-2]], table.offsets[:-1]))
    again = prepared(make_trainer("two", **TARGET, ref_cache_dir=str(cache))).reference._table
    assert "are ignored" in caplog.text and len(num_scorings) == 2
    assert torch.equal(again.values, table.values) and torch.equal(again.offsets, table.offsets)
    assert torch.equal(read_table(path, num_rows=32).values, table.values)
    assert files_in(cache) == [path.name]


def test_a_folder_that_cannot_be_written_is_a_warning(make_trainer, tmp_path, caplog):
    """Goes red if the error of a full or read-only disk ends the run."""
    (tmp_path / "file").write_text("in the way")
    trainer = make_trainer(**TARGET, ref_cache_dir=str(tmp_path / "file" / "cache"), max_steps=1)
    trainer.train()
    assert "cannot be kept" in caplog.text and len(rows_of(trainer)) == 1


def test_the_default_folder_is_in_the_cache_of_psft(make_trainer, tmp_path, monkeypatch):
    monkeypatch.setenv("PSFT_CACHE", str(tmp_path / "psft"))
    prepared(make_trainer(**TARGET))
    (path,) = (tmp_path / "psft" / "ref_logps").iterdir()
    assert path.name.startswith("ref_logps-") and path.suffix == ".safetensors"


def test_the_shares_of_two_ranks_become_one_table_on_both(demonstrations):
    """Goes red if shares are joined in the order of ranks or of scoring instead of the order of rows."""
    rows = [(number, torch.randn(number % 4)) for number in (5, 2, 7, 0, 3, 6, 1, 4)]
    shares, barrier, sums, tables = (rows[0::2], rows[1::2]), threading.Barrier(2), {}, {}

    def rank(number):
        step = iter(range(9))

        def total(tensor):
            key = next(step)
            sums[key, number] = tensor
            barrier.wait(timeout=20)
            return sums[key, 0] + sums[key, 1]

        tables[number] = LogpTable.gathered(shares[number], 8, total)
        tables[f"{number} from 1"] = LogpTable.broadcast(tables[number] if number else None, 8, total)

    threads = [threading.Thread(target=rank, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    want = dict(rows)
    for table in tables.values():
        assert torch.equal(table.values, torch.cat([want[number] for number in range(8)]))
        assert torch.equal(table.of([6, 1, 3]), torch.cat([want[6], want[1], want[3]]))
    assert len(tables) == 4


def test_an_updated_policy_is_not_its_own_reference(make_trainer, cache):
    """Goes red if the table could be computed from weights that have been trained."""
    trainer = make_trainer(**TARGET, ref_cache_dir=str(cache))
    trainer.state.global_step = 2
    with pytest.raises(RequestError, match="2 updates.*ref_model_name_or_path"):
        trainer.reference.prepare()
    adapted = make_trainer("lora", **TARGET, ref_cache_dir=str(cache), peft_config=LoraConfig(**LORA))
    adapted.state.global_step = 2
    assert prepared(adapted).reference._table is not None


def kl_by_hand(policy, frozen, micro_batches, direction):
    """Mean over the trained tokens of sum_v p log(p / q), one model's whole distribution against the other's."""
    total, count = 0.0, 0
    for micro_batch in micro_batches:
        mask = micro_batch["labels"][:, 1:] != -100
        inputs = {name: micro_batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            log_p, log_ref = (m.double()(**inputs).logits[:, :-1].log_softmax(-1)[mask] for m in (policy, frozen))
        one, other = (log_ref, log_p) if direction == "forward" else (log_p, log_ref)
        total += (one.exp() * (one - other)).sum().item()
        count += int(mask.sum())
    return total / count


@pytest.mark.parametrize(("objective", "direction"), [("sft_kl", "forward"), ("asft", "reverse")])
def test_the_streamed_kl_is_that_to_the_initial_model(make_trainer, make_tiny_model, objective, direction):
    """Zero before the first update, then that of full logits of the two models at the weights of each step.

    Goes red if the copy shares weights with the policy, or if its rows are not those of the policy's tokens.
    """
    trainer = make_trainer(objective=objective, kl_direction=direction, learning_rate=1e-3, max_steps=5)
    by_hand = []
    training_step = trainer.training_step

    def spy(model, inputs, *args):
        policy = make_tiny_model()
        policy.load_state_dict(copy.deepcopy(model.state_dict()))
        by_hand.append(kl_by_hand(policy, make_tiny_model(), inputs["micro_batches"], direction))
        return training_step(model, inputs, *args)

    trainer.training_step = spy
    trainer.train()
    got = [row[f"kl_ref_{direction}_full"] for row in rows_of(trainer)]
    assert abs(got[0]) < 1e-6 and got[4] > got[1] > 1e-5
    assert got == pytest.approx(by_hand, rel=1e-4, abs=1e-6)


def test_a_base_with_its_adapter_off_is_a_separate_copy_of_it(make_trainer, make_tiny_model, cache):
    """Goes red if the adapter stays on (KL 0 throughout), or if what it switched off stays off."""
    for settings in (FULL, {**TARGET, "ref_cache_dir": str(cache)}):
        runs = []
        for name, ref_model in (("off", None), ("copy", make_tiny_model())):
            trainer = make_trainer(
                f"{name}-{len(settings)}", **{**settings, "learning_rate": 1e-2}, ref_model=ref_model, max_steps=5,
                peft_config=LoraConfig(**LORA, modules_to_save=["norm"]),
            )  # fmt: skip
            trainer.train()
            runs.append(rows_of(trainer))
        (name,) = [field for field in runs[0][0] if field.startswith("kl_ref")]
        assert abs(runs[0][0][name]) < 1e-6 < 1e-4 < runs[0][4][name]
        for off, separate in zip(*runs, strict=True):
            for field in ("loss", "grad_norm", name):
                assert off[field] == pytest.approx(separate[field], rel=1e-5, abs=1e-6)


def test_the_reference_computes_in_the_precision_of_the_policy(make_trainer, make_tiny_model, cache):
    """Goes red if only one of the two runs under autocast: the KL then starts at its rounding, not at zero."""
    forms = {
        "copy": FULL,
        "adapter": {**FULL, "peft_config": LoraConfig(**LORA)},
        "table": {**TARGET, "ref_cache_dir": str(cache)},
        "given": {**TARGET, "ref_cache_dir": str(cache.with_name("other")), "ref_model": make_tiny_model()},
    }
    for name, settings in forms.items():
        losses = {}
        for bf16 in (False, True):
            trainer = make_trainer(f"{name}{bf16}", **settings, bf16=bf16, max_steps=1)
            trainer.train()
            (row,) = rows_of(trainer)
            (kl,) = (value for field, value in row.items() if field.startswith("kl_ref"))
            # streamed: the same batch, so the same rounding; a table was computed in batches of other widths
            assert abs(kl) < (1e-5 if bf16 and settings.get("kl_estimator") else 1e-6)
            losses[bf16] = row["loss"]
        assert abs(losses[True] - losses[False]) > 1e-4


def test_the_policy_is_left_as_it_was(make_trainer, make_tiny_model):
    """Goes red if a frozen adapter weight is trained after a call, a module changes mode, the adapter stays off, or
    the reference runs with dropout."""
    policy = make_tiny_model(attention_dropout=0.5)
    trainer = make_trainer(**FULL, model=policy, peft_config=LoraConfig(**LORA))
    model = trainer.model.train()
    policy.model.layers[0].self_attn.eval()
    frozen = next(p for name, p in model.named_parameters() if "lora_A" in name).requires_grad_(False)
    modes = {name: module.training for name, module in model.named_modules()}
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    (micro_batch, *_) = next(iter(trainer.get_train_dataloader()))["micro_batches"]
    reference, again = trainer.reference.logits(micro_batch), trainer.reference.logits(micro_batch)
    assert torch.equal(reference.hidden, again.hidden) and not reference.hidden.requires_grad
    trainer._score = lambda *args, **kwargs: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.reference.logits(micro_batch)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trained
    assert any(trained.values()) and not frozen.requires_grad
    assert model.get_model_status().enabled is True and model.active_adapter == "default"


def test_gradient_checkpointing_keeps_the_numbers(make_trainer, tmp_path):
    """Goes red (a warning about inputs without gradients) if the policy scores in training mode."""
    forms = {"k3": TARGET, "lora": {**FULL, "peft_config": LoraConfig(**LORA)}}
    for name, settings in forms.items():
        runs = []
        for reentrant in (None, False, True):
            how = copy.deepcopy(settings) | ({"ref_cache_dir": str(tmp_path / str(reentrant))} if name == "k3" else {})
            if reentrant is not None:
                how |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
            trainer = make_trainer(f"{name}-{reentrant}", **how, max_steps=3)
            with warnings.catch_warnings(record=True) as seen:
                trainer.train()
            assert not [w for w in seen if "requires_grad=True" in str(w.message)]
            runs.append([row["grad_norm"] for row in rows_of(trainer)])
        assert runs[0] == pytest.approx(runs[1], rel=1e-5) and runs[0] == pytest.approx(runs[2], rel=1e-5)


@pytest.mark.parametrize("settings", [FULL, TARGET], ids=["full", "k3"])
def test_a_reference_by_name_is_the_one_given(make_trainer, make_tiny_model, tmp_path, settings):
    """Another model than the policy. Goes red if the one given is ignored, or if a table outlives its reference."""
    make_tiny_model(seed=5).save_pretrained(tmp_path / "other")
    cache = {"ref_cache_dir": str(tmp_path / "cache")} if settings is TARGET else {}
    given = {
        "object": {"ref_model": make_tiny_model(seed=5)},
        "path": {"ref_model_name_or_path": str(tmp_path / "other")},
        "none": {},
    }
    losses = {}
    for name, how in given.items():
        trainer = make_trainer(name, **settings, **cache, **how, max_steps=3)
        trainer.train()
        losses[name] = [row["loss"] for row in rows_of(trainer)]
        if settings is TARGET:
            assert trainer.reference._model is None  # its numbers are in the table
    assert losses["object"] == losses["path"]
    assert all(abs(one - other) > 0.1 for one, other in zip(losses["object"], losses["none"], strict=True))


def test_a_column_of_the_data_is_taken_as_it_is(make_trainer, make_tiny_model, demonstrations, num_scorings):
    """Goes red if the model is scored in spite of the column, or a length is not compared."""
    frozen = make_tiny_model(seed=5)
    own = [logps_of(frozen, row).tolist() for row in demonstrations]
    trainer = make_trainer(**TARGET, train_dataset=demonstrations.add_column("ref_logps", own), max_steps=2)
    trainer.train()
    assert not num_scorings
    torch.testing.assert_close(trainer.reference._table.of([4]), torch.tensor(own[4]), rtol=0, atol=0)
    own[6] = own[6][:-1]
    wrong = make_trainer("wrong", **TARGET, train_dataset=demonstrations.add_column("ref_logps", own))
    with pytest.raises(RequestError, match=f"row 6 .* {len(own[6]) + 1} trained tokens"):
        wrong.train()
    with pytest.raises(RequestError, match="ref_model and the column 'ref_logps'.* two references"):
        make_trainer(
            "two", **TARGET, train_dataset=demonstrations.add_column("ref_logps", own), ref_model=make_tiny_model()
        )


def test_a_reference_that_cannot_be_is_refused_by_name(make_trainer, make_tiny_model, tiny_model_path):
    """Each of these would train against another model than the user thinks."""
    model = make_tiny_model()
    cases = [
        ({"objective": "psft", "ref_model": make_tiny_model()}, "ref_model has no effect for objective 'psft'"),
        ({**FULL, "ref_model": make_tiny_model(vocab_size=512)}, "vocabulary of 512 tokens"),
        ({**FULL, "ref_model": make_tiny_model(), "ref_model_name_or_path": str(tiny_model_path)}, "two references"),
        ({**FULL, "model": model, "ref_model": model}, "is the model that is trained"),
        ({**FULL, "ref_model": str(tiny_model_path)}, "ref_model is a str"),
        (
            {
                **FULL,
                "model": make_tiny_model(attention_bias=True),
                "peft_config": LoraConfig(**LORA, bias="lora_only"),
            },
            r"q_proj\.base_layer\.bias' is trained but belongs to no adapter",
        ),
    ]
    for settings, message in cases:
        with pytest.raises(RequestError, match=message):
            make_trainer(**settings)
    quantized = make_tiny_model()
    quantized.is_quantized = True
    with pytest.raises(RequestError, match="quantised.*ref_model_name_or_path"):
        reference_of(make_trainer, quantized)


def reference_of(make_trainer, policy):
    """The reference of a policy that TRL would refuse before it comes to that."""
    from psft.trainers.reference import FrozenReference

    trainer = make_trainer("any", **FULL)
    trainer.model = policy
    return FrozenReference.of(trainer, None)


def test_an_adapter_that_is_already_trained_is_announced(make_trainer, make_tiny_model, caplog):
    """Goes red if a user who goes on with an adapter is not told that the reference has none."""
    from peft import get_peft_model

    for is_trained in (False, True):
        policy = get_peft_model(make_tiny_model(), LoraConfig(**LORA))
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                if is_trained and "lora_B" in name:
                    parameter += 0.1
        make_trainer(f"run{is_trained}", **FULL, model=policy)
        assert ("adapter is not zero" in caplog.text) == is_trained


def test_evaluation_needs_no_reference(make_trainer, demonstrations, cache):
    """Goes red if held-out data is scored by the reference, which has no table for it."""
    for settings in (FULL, {**TARGET, "ref_cache_dir": str(cache)}):
        trainer = make_trainer(f"run{len(settings)}", **settings, eval_dataset=demonstrations)
        trainer.reference = None
        assert trainer.evaluate()["eval_nll"] > 0
