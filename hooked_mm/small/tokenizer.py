"""The small models' tokenizer: one token per word of the scenes' vocabulary; and the chat template they share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hooked_mm.scenes.language import vocabulary

BASIC = ("<pad>", "<unk>", "<s>", "</s>")


def build_tokenizer(specials: Sequence[str], *, behind: bool = False, **named: Any) -> PreTrainedTokenizerFast:
    """Lower-cased, split at white space and punctuation; `specials`: the family's own special tokens.

    Args:
        specials: Special tokens besides padding, unknown word, beginning and end.
        behind: Whether those have the last ids, and not the first.
        named: Special tokens that the family's processor asks the tokenizer for by name (`image_token`, ...).
    """
    words = (*BASIC, *vocabulary(), *specials) if behind else (*BASIC, *specials, *vocabulary())
    vocab = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (*BASIC, *specials)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=[token for token in specials if token not in named.values()],
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
        **({"extra_special_tokens": named} if named else {}),
    )


def chat_template(image: str) -> str:
    """Turns as `user : ... assistant : ...`; `image`: what stands for a picture in the text."""
    return (
        "{{ bos_token }}"
        "{% for message in messages %}"
        "{{ message['role'] }} : "
        "{% if message['content'] is string %}{{ message['content'] }} {% else %}"
        "{% for part in message['content'] %}"
        f"{{% if part['type'] == 'image' %}}{image} {{% elif part['type'] == 'text' %}}"
        "{{ part['text'] }} {% endif %}"
        "{% endfor %}{% endif %}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}assistant :{% endif %}"
    )
