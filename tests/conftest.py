"""Shared fixtures: a tiny tokenizer and model made in the process, and the folder of real data.

Nothing downloads. Heavy imports stay inside the fixtures, so tests of rooms without torch stay fast.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from psft.machine import cache_folder

hypothesis.settings.register_profile("psft", deadline=None)  # machines that run tests are shared: time says nothing
hypothesis.settings.load_profile("psft")

for _name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ.setdefault(_name, "1")  # a test that reaches for the network fails at once instead of waiting for it
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny products: a second thread only waits, on a busy machine for long
_cache = tempfile.TemporaryDirectory(prefix="psft-test-cache-")
(cache_folder() / "models").mkdir(parents=True, exist_ok=True)
(Path(_cache.name) / "models").symlink_to(cache_folder() / "models")  # the quick-start model, if it is there
os.environ["PSFT_CACHE"] = _cache.name  # what else tests keep is neither found by a later run nor left behind

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_SENTENCES = [
    "Natalia sold 48 clips to her friends in April, and then she sold half as many clips in May.",
    "How many clips did Natalia sell altogether in April and May?",
    "Natalia sold 48/2 = 24 clips in May. Natalia sold 48 + 24 = 72 clips altogether.",
    "A robe takes 2 bolts of blue fiber and half that much white fiber. How many bolts in total?",
    "It takes 2 / 2 = 1 bolt of white fiber, so the total is 2 + 1 = 3 bolts. The answer is 3.",
    "You are a helpful assistant. Answer the question and show the steps: user asks, assistant answers.",
    "system user assistant question answer instruction input output prompt completion",
]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data beside the repository; tests that need it are skipped where it is absent."""
    path = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip("real data is not there: this test reads ../shared/data relative to the repository root")
    return path


@pytest.fixture(scope="session")
def make_tiny_tokenizer() -> Callable[[], Any]:
    """Factory of a fresh byte-level BPE tokenizer of 400 tokens: `<|im_end|>` ends a turn, `<|pad|>` pads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_SENTENCES, trainer)
    serialized = backend.to_str()

    def make() -> Any:
        from transformers import PreTrainedTokenizerFast

        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(serialized),
            eos_token="<|im_end|>",
            pad_token="<|pad|>",
            additional_special_tokens=["<|im_start|>"],
            model_max_length=4096,
        )
        tokenizer.chat_template = CHATML_TEMPLATE
        return tokenizer

    return make


@pytest.fixture(scope="session")
def tiny_tokenizer(make_tiny_tokenizer: Callable[[], Any]) -> Any:
    """One tokenizer for the session; a test that changes its template or tokens takes `make_tiny_tokenizer()`."""
    return make_tiny_tokenizer()


@pytest.fixture(scope="session")
def make_tiny_model(tiny_tokenizer: Any) -> Callable[..., Any]:
    """Factory `make_tiny_model(seed=0, **config)`: a fresh float32 Llama, 2 layers, hidden 32, tied embeddings.

    Weights are drawn wide (standard deviation 0.3), so logits are peaked and unequal: a shift by one token shows.
    The random state outside is left as it was.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(seed: int = 0, **overrides: Any) -> Any:
        settings: dict[str, Any] = {
            "vocab_size": len(tiny_tokenizer),
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 64,
            "max_position_embeddings": 4096,
            "initializer_range": 0.3,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": tiny_tokenizer.eos_token_id,
            "pad_token_id": tiny_tokenizer.pad_token_id,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = LlamaForCausalLM(LlamaConfig(**{**settings, **overrides}))
        return model.to(torch.float32).eval()

    return make


@pytest.fixture
def tiny_model(make_tiny_model: Callable[..., Any]) -> Any:
    """A fresh tiny model for each test, always the same weights (`make_tiny_model` makes more, or other seeds)."""
    return make_tiny_model()


@pytest.fixture(scope="session")
def tiny_model_path(
    tmp_path_factory: pytest.TempPathFactory, make_tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> Path:
    """Folder with the tiny model and tokenizer as `save_pretrained` writes them; read it, do not write into it."""
    path = tmp_path_factory.mktemp("tiny-model")
    make_tiny_model().save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def demonstrations() -> Any:
    """32 rows of unequal length, prompt (untrained) and completion (trained), already tokenised."""
    import torch
    from datasets import Dataset

    generator = torch.Generator().manual_seed(1)
    rows = []
    for _ in range(32):
        prompt = int(torch.randint(2, 9, (), generator=generator))
        length = prompt + int(torch.randint(1, 24, (), generator=generator))
        ids = torch.randint(3, 400, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return Dataset.from_list(rows)


@pytest.fixture
def make_trainer(
    tmp_path: Path, make_tiny_model: Callable[..., Any], tiny_tokenizer: Any, demonstrations: Any
) -> Callable[..., Any]:
    """make_trainer(name="run", model=None, eval_dataset=None, **settings) -> PSFTTrainer, tiny, float32, CPU."""

    def make(name: str = "run", model: Any = None, train_dataset: Any = None, **settings: Any) -> Any:
        from psft import PSFTConfig, PSFTTrainer

        trainer_arguments = {
            key: settings.pop(key)
            for key in ("eval_dataset", "peft_config", "callbacks", "compute_loss_func", "ref_model")
            if key in settings
        }
        defaults = {
            "output_dir": str(tmp_path / name), "train_batch_size": 16, "mini_batch_size": 4, "learning_rate": 1e-2,
            "lr_scheduler_type": "constant", "max_steps": 8, "bf16": False, "gradient_checkpointing": False,
            "report_to": "none", "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "seed": 3,
            "max_tokens_per_micro_batch": 64, "probe_every": 0,
        }  # fmt: skip
        return PSFTTrainer(
            model=make_tiny_model() if model is None else model,
            args=PSFTConfig(**{**defaults, **settings}),
            train_dataset=demonstrations if train_dataset is None else train_dataset,
            processing_class=tiny_tokenizer,
            **trainer_arguments,
        )

    return make
