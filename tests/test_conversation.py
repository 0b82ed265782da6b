"""Conversations of several turns, and how answers are generated."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image

from hooked_mm.errors import BadInputError
from hooked_mm.explorer.conversation import MOST_TOKENS, Conversation, Generation, ModelName, Said
from hooked_mm.hooked import HookedMM
from hooked_mm.prompts import Turn

FULL = "describe the scene in full ."
DRAWN = {"max_new_tokens": 6, "temperature": 4.0}


def drawn_by_hand(model: HookedMM, prompt: Any, generation: Generation) -> list[int]:
    """The tokens that transformers draws with this seed, each step written out: plain passes over the whole prompt."""
    ids, mask = prompt.inputs["input_ids"], prompt.inputs["attention_mask"]
    found: list[int] = []
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(generation.seed)
        for _ in range(generation.max_new_tokens):
            inputs = {"pixel_values": prompt.inputs["pixel_values"], "input_ids": ids, "attention_mask": mask}
            logits = model.hf_model(**inputs).logits[0, -1] / generation.temperature
            shares = logits.softmax(-1)
            ordered, order = shares.sort(descending=True)
            # Those that come before the share is reached, and the one that reaches it.
            kept = ordered.cumsum(0) - ordered < generation.top_p
            shares = torch.zeros_like(shares).index_copy(0, order, ordered * kept)
            token = torch.multinomial((shares / shares.sum())[None], 1)
            found.append(int(token))
            if found[-1] == model.tokenizer.eos_token_id:
                break
            ids, mask = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1)
    return found


@pytest.mark.parametrize("top_p", [1.0, 0.7])
@pytest.mark.parametrize("seed", [0, 5])
def test_tokens_are_drawn_as_by_hand(llava: HookedMM, images: list[Image.Image], seed: int, top_p: float) -> None:
    """Among all tokens, or the likeliest that make up the share: nothing else narrows them."""
    generation = Generation(**DRAWN, seed=seed, top_p=top_p)
    _, prompt, output = Conversation().say(FULL, (images[0],)).ask(llava, generation)
    assert output.tokens[0].tolist() == drawn_by_hand(llava, prompt, generation)


def test_settings_that_a_model_came_with_do_not_narrow_the_choice(
    llava: HookedMM, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen2-VL comes with `top_k` 1: whatever the temperature, it would give the likeliest token."""
    asked, generation = Conversation().say(FULL, (images[0],)), Generation(**DRAWN, seed=5)
    before = asked.ask(llava, generation)[0]
    monkeypatch.setattr(llava.hf_model.generation_config, "top_k", 1)
    assert asked.ask(llava, generation)[0].turns[-1].answer == before.turns[-1].answer
    likeliest = asked.ask(llava, Generation(6))[0]
    assert likeliest.turns[-1].answer != before.turns[-1].answer


def test_the_seed_decides_and_nobody_elses_numbers_change(llava: HookedMM, images: list[Image.Image]) -> None:
    """The same answer whatever was drawn before; other seeds give others; the global state is left as it was."""
    asked, answers = Conversation().say(FULL, (images[0],)), {}
    for seed in (0, 1, 2, 0, 1, 2):
        torch.rand(seed + 1)
        state = torch.get_rng_state()
        answer = asked.ask(llava, Generation(**DRAWN, seed=seed))[0].turns[-1].answer
        assert torch.equal(torch.get_rng_state(), state)
        assert answers.setdefault(seed, answer) == answer
    assert len(set(answers.values())) > 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", MOST_TOKENS + 1),
        ("max_new_tokens", 1.5),
        ("max_new_tokens", True),
        ("max_new_tokens", "8"),
        ("max_new_tokens", None),
        ("temperature", -0.1),
        ("temperature", 5.1),
        ("temperature", 1e-40),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_p", [0.5]),
        ("seed", -1),
        ("seed", 2**31 + 1),
        ("seed", 0.5),
        ("seed", 10**400),
    ],
)
def test_settings_out_of_their_range_are_refused(name: str, value: Any) -> None:
    """By name, with the value; none is rounded, cut or guessed."""
    with pytest.raises(BadInputError, match=f"{name}="):
        Generation(**{name: value})


def test_the_ends_of_the_ranges_can_be_generated_with(llava: HookedMM, images: list[Image.Image]) -> None:
    """Sliders send whole numbers as they like; the lowest temperature draws the likeliest token."""
    assert Generation(3.0, seed=2.0).options == {"max_new_tokens": 3, "do_sample": False}  # type: ignore[arg-type]
    asked = Conversation().say(FULL, (images[0],))
    for generation in (Generation(4, 0.01, 0.01, 2**31), Generation(400, 5, 1, 0)):
        assert asked.ask(llava, generation)[2].tokens.shape[1] <= generation.max_new_tokens
    cold, likeliest = (asked.ask(llava, one)[2].tokens for one in (Generation(4, 0.01), Generation(4)))
    assert torch.equal(cold, likeliest)


def test_turns_and_pictures_are_kept_in_their_order(images: list[Image.Image]) -> None:
    """Saying and answering make new conversations; the pictures are those of all turns."""
    begun = Conversation().say("what is it ?", tuple(images[:2]))
    answered = begun.answered("a star")
    again = answered.say("and here ?").answered("nothing").say("here ?", (images[2],))
    assert begun.turns == (Said("what is it ?", tuple(images[:2])),)
    assert Conversation().turns == ()
    assert again.images == (images[0], images[1], images[2])
    assert again.history == [Turn("what is it ?", "a star", 2), Turn("and here ?", "nothing", 0)]
    assert again.turns[-1] == Said("here ?", (images[2],), None)


@pytest.mark.parametrize("name", ["llava", "idefics2", "qwen2_vl", "molmo"])
def test_an_answer_goes_on_from_all_turns(
    small: Callable[[str], HookedMM], images: list[Image.Image], name: str
) -> None:
    """The second answer is what plain transformers says to the whole conversation, with all its pictures."""
    model = small(name)
    first, _, _ = Conversation().say("what place is this ?", (images[0],)).ask(model, Generation(4))
    heard: list[str] = []
    second, prompt, output = first.say(FULL, (images[1],)).ask(model, Generation(6), heard.append)
    messages: list[dict[str, Any]] = [
        {
            "role": "user",
            "content": [{"type": "image", "image": images[0]}, {"type": "text", "text": "what place is this ?"}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": first.turns[0].answer}]},
        {"role": "user", "content": [{"type": "image", "image": images[1]}, {"type": "text", "text": FULL}]},
    ]
    inputs = model.processor.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    tokens = model.hf_model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(prompt.input_ids, inputs["input_ids"])
    assert torch.equal(output.tokens, tokens)
    assert second.turns[-1].answer == model.tokenizer.decode(tokens[0], skip_special_tokens=True).strip()
    assert heard[-1] == second.turns[-1].answer
    assert second.turns[0] == first.turns[0]


def test_what_was_answered_with_no_word_can_not_be_gone_on_from(llava: HookedMM) -> None:
    """A model may end at once; the visitor is told what to do, not that their own text is empty."""
    silent = Conversation().say("what ?").answered("").say("and now ?")
    with pytest.raises(BadInputError, match=r"answered with no word.*begin a new conversation"):
        silent.prepare(llava)
    assert len(Conversation().say("what ?").prepare(llava)) == 1


def test_what_is_longer_than_the_model_reads_is_refused(llava: HookedMM) -> None:
    """Before anything is generated: a GPU would take no more work after positions that are not there."""
    most = llava.hf_model.config.text_config.max_position_embeddings
    short = Conversation().say("what colour is the star ?")
    long = short.prepare(llava).input_ids.shape[1]
    with pytest.raises(BadInputError, match=rf"{long} tokens.*at most {most}.*tokens to {most - long} at most"):
        short.ask(llava, Generation(most - long + 1))
    short.ask(llava, Generation(most - long))
    with pytest.raises(BadInputError, match=rf"reads at most {most}; begin a new one"):
        Conversation().say("star " * 600).ask(llava, Generation(1))


def test_a_model_is_named_as_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the page, in the Python that loads it, and when it is loaded."""
    small = ModelName("small", "llava")
    hub = ModelName("id", "llava-hf/llava-1.5-7b-hf", (("dtype", "bfloat16"), ("device_map", "auto")))
    assert (str(small), small.python) == ("small:llava", "HookedMM.small('llava')")
    assert str(hub) == "llava-hf/llava-1.5-7b-hf"
    assert hub.python == ("HookedMM.from_pretrained('llava-hf/llava-1.5-7b-hf', dtype='bfloat16', device_map='auto')")
    calls: list[tuple[str, str, dict[str, Any]]] = []
    for maker in ("small", "from_pretrained"):
        monkeypatch.setattr(HookedMM, maker, lambda name, maker=maker, **options: calls.append((maker, name, options)))
    small.load()
    hub.load()
    assert calls == [("small", "llava", {}), ("from_pretrained", hub.name, dict(hub.options))]


def test_a_folder_is_called_by_its_own_name() -> None:
    """On the page and in downloads; what is loaded is the folder itself."""
    name = ModelName("id", "/srv/secret/model", (("dtype", "float32"),))
    assert str(name) == "model"
    assert name.portable.python == "HookedMM.from_pretrained('model', dtype='float32')"
    assert name.name == "/srv/secret/model"
    for known in (ModelName("id", "llava-hf/llava-1.5-7b-hf"), ModelName("small", "llava")):
        assert known.portable == known
