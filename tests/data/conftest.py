"""Small tokenizers and rows for the tests of the data ring."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from saferlhf.config.schema import DataConfig
from saferlhf.data.columns import pair_id
from saferlhf.data.rows import PreferencePair, as_prompt

WORDS = [
    "how",
    "to",
    "bake",
    "bread",
    "plant",
    "a",
    "tree",
    "first",
    "then",
    "water",
    "flour",
    "please",
    "system",
    "kind",
]
CHAT = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def word_tokenizer() -> Any:
    """One token per known word; pad is a token of its own."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<unk>", "<|start|>", "<|end|>", "user", "assistant", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<|start|>",
        eos_token="<|end|>",
        chat_template=CHAT,
    )


@pytest.fixture(scope="session")
def byte_tokenizer() -> Any:
    """Byte-level BPE with merges, pad = eos, a start token set in front of plain text: the habits that trip code up."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "BEGINNING OF CONVERSATION: USER: how to bake bread ASSISTANT:first water then flour"
    tokenizer.train_from_iterator([text] * 20, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", tokenizer.token_to_id("<|start|>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|end|>", bos_token="<|start|>", eos_token="<|end|>", chat_template=CHAT
    )


@pytest.fixture
def make_pair() -> Callable[..., PreferencePair]:
    """A preference pair with sound labels, any field replaced."""

    def make(
        prompt: str = "how to bake bread", first: str = "first water", second: str = "then flour", **labels: Any
    ) -> PreferencePair:
        sound: dict[str, Any] = {
            "is_response_0_safe": True,
            "is_response_1_safe": False,
            "response_0_harm_category": frozenset(),
            "response_1_harm_category": frozenset({"Drugs"}),
            "response_0_severity_level": 0,
            "response_1_severity_level": 2,
            "better_response_id": 1,
            "safer_response_id": 0,
        }
        turns = as_prompt(prompt)
        return PreferencePair(pair_id(turns, first, second), turns, first, second, **(sound | labels))

    return make


@pytest.fixture
def file_config() -> Callable[..., DataConfig]:
    """The config of a file, any key replaced."""

    def make(path: Any, **changes: Any) -> DataConfig:
        return DataConfig(**({"name": "mine", "source": "file", "path": str(path)} | changes))

    return make
