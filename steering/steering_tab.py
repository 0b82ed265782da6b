"""The explorer's tab of steering: the answer unsteered beside steered, what it does to the next token, several alphas.

A direction comes from two answers that are typed (`answer_directions`) or from a folder that was opened
(`opened_vectors`). What is said follows the generation settings of the conversation, with the same seed, so that the
unsteered answer is the very one that was given.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hooked_mm.batch import Batch
from hooked_mm.errors import BadInputError, unknown
from hooked_mm.explorer.asked import Asked
from hooked_mm.explorer.conversation import Generation
from hooked_mm.explorer.panels import Facts, Note, Panel, Table, Texts
from hooked_mm.explorer.tab import Choice, Control, Number, Text, Toggle, View
from hooked_mm.explorer.work import Work
from hooked_mm.hooked import HookedMM
from hooked_mm.steering_vector import SteeringVector
from steering.answer_directions import answer_direction, own_stream
from steering.opened_vectors import Opened, check_folders, read_vectors
from steering.setting import ANSWERING, OPERATIONS, Setting, side_by_side
from steering.side_effects import next_token_kl

WAYS = {
    "odds": "from one answer to another",
    "read": "between two answers as they are read",
}
"""Way of `answer_directions` -> label."""

PLACES = {
    ANSWERING: "where the answer is said",
    "last_prompt": "where its first token is predicted",
    "generated": "what is generated",
    "all": "everywhere",
    "prompt": "the prompt",
    "question": "the question",
    "text": "all text",
    "image": "pictures",
}
"""Rule of `setting.positions` -> label."""

HOW = {
    "add": "add alpha times the vector",
    "add_keep_norm": "add it, and keep the length",
    "project_out": "remove the direction",
    "set": "set the part along it to alpha",
    "rotate": "turn towards it by alpha radians",
}
"""Operation -> label."""
assert tuple(HOW) == OPERATIONS

MOST_ALPHA = 50.0
MULTIPLES = (-1, 0, 0.25, 0.5, 0.75, 1, 1.5, 2)
"""Of the chosen alpha, in a sweep."""
TOKENS = 6
"""Likeliest tokens before and after that are shown."""
LONGEST = 240
"""Characters of an answer in a table."""
OWN = -1
"""The layer that a vector belongs to."""


@dataclass(frozen=True)
class Found:
    """A direction, and the lines that find it again as `vector`."""

    vector: SteeringVector
    imports: Sequence[str]
    lines: Sequence[str]


def distribution(model: HookedMM, prompt: Batch) -> Float[Tensor, " v"]:
    """Logits of the answer's first token, float32, under the active hooks."""
    logits = model.generate(prompt, 1, return_logits=True).logits
    assert logits is not None
    return logits[0, 0].float()


def alphas_of(alpha: float) -> list[float]:
    """What a sweep around an alpha tries, in order: some shares and multiples of it, zero and the other way."""
    return sorted({round(alpha * share, 4) + 0.0 for share in MULTIPLES if abs(alpha * share) <= MOST_ALPHA})


def runner_up(model: HookedMM, logits: Float[Tensor, " v"], said: str) -> str:
    """The likeliest word that could be said first instead of an answer.

    Raises:
        BadInputError: If there is none among the hundred likeliest tokens.
    """
    special = set(model.tokenizer.all_special_ids)
    for token in logits.topk(min(100, len(logits))).indices.tolist():
        word = model.tokenizer.decode([token]).strip()
        if token not in special and word.isalnum() and not said.lower().startswith(word.lower()):
            return word
    raise BadInputError("no other word is likely as an answer; type what shall be said instead")


def at_layer(vector: SteeringVector, layer: int) -> SteeringVector:
    """The same direction at the same point of another block.

    Raises:
        BadInputError: If its point is in no block.
    """
    if layer in (OWN, vector.layer):
        return vector
    if vector.layer is None:
        raise BadInputError(f"{vector.hook!r} lies in no block, so it has no other layer; choose its own")
    return replace(vector, hook=re.sub(r"(^|\.)blocks\.\d+\.", rf"\g<1>blocks.{layer}.", vector.hook, count=1))


class SteeringTab:
    """Steering."""

    name, title, order = "steering", "Steering", 70
    about = (
        "A direction is added to what the model computes while it answers. Choose where it leads, the layer and the "
        "strength, and compare what is said."
    )

    def __init__(self, folders: Sequence[Path]) -> None:
        check_folders(folders)
        self._folders = list(folders)
        self._opened: dict[str, Opened] | None = None
        self._failed: list[str] = []

    def controls(self, model: HookedMM) -> Sequence[Control]:
        """Vector, answers, layer, strength, operation, positions, sweep."""
        layers = [("its own", OWN), *((str(layer), layer) for layer in range(model.cfg.n_layers))]
        words = "Empty: what the model answered."
        other = "Empty: the word that it would have said next to that."
        return [
            Choice("vector", "Vector", self._vectors(), "odds", "Where a direction comes from.", changing=True),
            Text("source", "From", "", f"For two answers: what shall not be said. {words}"),
            Text("target", "To", "", f"For two answers: what shall be said. {other}"),
            Choice("layer", "Layer", layers, OWN, "The middle one, for two answers, unless chosen."),
            Number("alpha", "Alpha", -MOST_ALPHA, MOST_ALPHA, 2.0, 0.05, "How much of the vector."),
            Choice("operation", "Operation", [(label, value) for value, label in HOW.items()], "add"),
            Choice("at", "Positions", [(label, value) for value, label in PLACES.items()], ANSWERING),
            Toggle("sweep", "Several alphas", False, "Answers at shares and multiples of alpha, which takes longer."),
        ]

    def look(self, asked: Asked, values: Mapping[str, Any], work: Work) -> View:
        """The answer steered beside the one given, the next token's probabilities, and several alphas if wanted."""
        model, prompt = asked.model, asked.prompt
        work.step("reading what may come next")
        before = distribution(model, prompt)
        work.step("finding the direction")
        found = self._find(asked, values, before)
        setting, made = _setting(found, model, prompt, values)
        work.step("answering, steered")
        with model.hooks(side_by_side([setting])):
            after = distribution(model, prompt)
            output = asked.generation.run(model, prompt)
        arrays = {"vector": found.vector.values, "before": before, "after": after, "steered": output.tokens[0]}
        alphas = alphas_of(setting.alpha) if values["sweep"] and setting.operation != "project_out" else []
        swept = [_answer(asked, replace(setting, alpha=a), work, n, len(alphas)) for n, a in enumerate(alphas)]
        panels: list[Panel] = [
            *(Note(text, "warning") for text in self._failed),
            *_notes(setting, values, prompt),
            Texts([("unsteered", asked.answer), (f"steered: {found.vector.name}, {_amount(setting)}", output.text[0])]),
            Facts(_facts(found.vector, before, after, asked.answer, output.text[0])),
            _first_tokens(model, before, after),
        ]
        lines = [*_ANSWERED, *_arrays(alphas, asked.generation)]
        if alphas:
            panels.append(_sweep_table(alphas, swept, before))
            tokens = [one.tokens for one in swept]
            arrays["alphas"] = torch.tensor(alphas)
            arrays["swept"] = pad_sequence(tokens, batch_first=True, padding_value=-1)
        imports = {*_IMPORTS, *found.imports, *(_SWEEPING if alphas else ())}
        python = "\n".join([*sorted(imports), "", *found.lines, *made, *lines])
        return View(panels, python, arrays, {"vector": self._vectors()})

    def _vectors(self) -> list[tuple[str, str]]:
        """What can be chosen; vectors of folders only once these were read."""
        return [(label, way) for way, label in WAYS.items()] + [
            (one.label, value) for value, one in (self._opened or {}).items()
        ]

    def _read(self) -> dict[str, Opened]:
        """Vectors of the opened folders, read once; a folder that can't be read spoils nothing but itself."""
        if self._opened is None:
            opened: dict[str, Opened] = {}
            for number, folder in enumerate(self._folders):
                try:
                    read = read_vectors(folder)
                except BadInputError as error:
                    self._failed.append(str(error))
                    continue
                # A gate is a direction to look along, not one to go.
                opened |= {f"{number}.{n}": one for n, one in enumerate(read) if one.vector.kind != "gate"}
            self._opened = opened
        return self._opened

    def _find(self, asked: Asked, values: Mapping[str, Any], before: Tensor) -> Found:
        opened, layer = self._read(), int(values["layer"])
        chosen = next(iter(WAYS)) if values["vector"] is None else values["vector"]
        if chosen in WAYS:
            return _between(asked, chosen, values["source"], values["target"], layer, before)
        if chosen not in opened:
            raise unknown("vector", str(chosen), [*WAYS, *opened])
        one = opened[chosen]
        vector = at_layer(one.vector, layer)
        vector.check_model(asked.model)
        lines = [f"vector = {one.python}"]
        imports = one.imports.splitlines()
        if vector.hook != one.vector.hook:
            imports = [*imports, "from dataclasses import replace"]
            lines.append(f"vector = replace(vector, hook={vector.hook!r})")
        return Found(vector, imports, lines)


def _between(asked: Asked, way: Any, source: str, target: str, layer: int, before: Tensor) -> Found:
    """The direction from one answer to another."""
    model = asked.model
    from_ = source.strip() or asked.answer.strip()
    if not from_:
        raise BadInputError("the model said nothing, so there is no answer to lead away from; type one")
    to = target.strip() or runner_up(model, before, from_)
    layer = model.cfg.n_layers // 2 if layer == OWN else layer
    hook = f"blocks.{layer}.hook_resid_post"
    history = [asked.conversation.history] if len(asked.conversation.turns) > 1 else None
    left, wanted = (
        model.prepare([list(asked.images) or None], [asked.question], [answer], history=history)
        for answer in (from_, to)
    )
    values = answer_direction(model, left, wanted, hook, way)
    owner = getattr(model.hf_model.config, "_name_or_path", None) or None
    vector = SteeringVector(values, hook, way, f"{from_} → {to}"[:80], model=owner)
    imports = ["from hooked_mm.steering_vector import SteeringVector"]
    imports += ["from steering.answer_directions import answer_direction"]
    imports += ["from hooked_mm.prompts import Turn"] if history else []
    lines = [
        f"history = {history!r}",
        "answered = [",
        f"    model.prepare([images or None], [{asked.question!r}], [answer], history=history)",
        f"    for answer in ({from_!r}, {to!r})",
        "]",
        f"values = answer_direction(model, *answered, {hook!r}, {way!r})",
        f"vector = SteeringVector(values, {hook!r}, {way!r})",
    ]
    return Found(vector, imports, lines)


def _setting(found: Found, model: HookedMM, prompt: Batch, values: Mapping[str, Any]) -> tuple[Setting, list[str]]:
    """The setting, and the lines that make it."""
    operation, vector = values["operation"], found.vector
    alpha = 1.0 if operation == "project_out" else float(values["alpha"])
    start = f"setting = Setting(vector, {alpha!r}, {values['at']!r}, {operation!r}"
    if operation != "rotate":
        return Setting(vector, alpha, values["at"], operation), [f"{start})"]
    # What is turned is the prompt's own vector, towards the direction.
    second = SteeringVector(own_stream(model, prompt, vector.hook), vector.hook, "own")
    lines = [
        "from hooked_mm.steering_vector import SteeringVector",
        "from steering.answer_directions import own_stream",
        "own = SteeringVector(own_stream(model, prompt, vector.hook), vector.hook, 'own')",
        f"{start}, second=own)",
    ]
    return Setting(vector, alpha, values["at"], operation, second=second), lines


@dataclass(frozen=True)
class _Swept:
    """One alpha of a sweep."""

    text: str
    tokens: Tensor
    after: Tensor


def _answer(asked: Asked, setting: Setting, work: Work, done: int, total: int) -> _Swept:
    work.step(f"alpha {setting.alpha:g}", done, total)
    with asked.model.hooks(side_by_side([setting])):
        after = distribution(asked.model, asked.prompt)
        output = asked.generation.run(asked.model, asked.prompt)
    return _Swept(output.text[0], output.tokens[0], after)


_IMPORTS = (
    "from hooked_mm.explorer.conversation import Generation",
    "from steering.setting import Setting, side_by_side",
)
_SWEEPING = (
    "import torch",
    "from dataclasses import replace",
    "from torch.nn.utils.rnn import pad_sequence",
)
_ANSWERED = (
    "before = model.generate(prompt, 1, return_logits=True).logits[0, 0].float()",
    "with model.hooks(side_by_side([setting])):",
    "    after = model.generate(prompt, 1, return_logits=True).logits[0, 0].float()",
)


def _arrays(alphas: Sequence[float], generation: Generation) -> list[str]:
    """The lines from the steered answer on."""
    lines = [f"    steered = {generation!r}.run(model, prompt)", "print(steered.text[0])"]
    lines += ["arrays = {'vector': vector.values, 'before': before, 'after': after, 'steered': steered.tokens[0]}"]
    if not alphas:
        return lines
    return [
        *lines[:-1],
        "swept = []",
        f"for alpha in {list(alphas)!r}:",
        "    with model.hooks(side_by_side([replace(setting, alpha=alpha)])):",
        f"        swept.append({generation!r}.run(model, prompt))",
        "    print(alpha, swept[-1].text[0])",
        lines[-1],
        f"arrays['alphas'] = torch.tensor({list(alphas)!r})",
        "arrays['swept'] = pad_sequence([one.tokens[0] for one in swept], batch_first=True, padding_value=-1)",
    ]


def _amount(setting: Setting) -> str:
    return "removed" if setting.operation == "project_out" else f"alpha {setting.alpha:g}"


def _notes(setting: Setting, values: Mapping[str, Any], prompt: Batch) -> list[Note]:
    """What is to be known of a setting before its answer is read."""
    notes = []
    if setting.operation == "project_out":
        told = "Removing a direction has no amount: alpha is not used"
        notes.append(Note(f"{told}, and there are no several alphas." if values["sweep"] else f"{told}."))
    if values["at"] == "image" and not bool(prompt.mask("image").any()):
        notes.append(Note("There is no position of a picture in this text stream, so nothing is steered.", "warning"))
    return notes


def _facts(vector: SteeringVector, before: Tensor, after: Tensor, said: str, steered: str) -> list[tuple[str, Any]]:
    return [
        ("answer", "as before" if said == steered else "changed"),
        ("KL of the first token (nats)", float(next_token_kl(before, after))),
        ("point", vector.hook),
        ("vector's length", vector.norm),
    ]


def _first_tokens(model: HookedMM, before: Tensor, after: Tensor) -> Table:
    """Probabilities of the likeliest first tokens."""
    old, new = before.softmax(-1), after.softmax(-1)
    count = min(TOKENS, len(old))
    chosen = {*old.topk(count).indices.tolist(), *new.topk(count).indices.tolist()}
    ordered = sorted(chosen, key=lambda token: (-float(new[token]), -float(old[token]), token))
    rows = [
        (_token(model, token), float(old[token]), float(new[token]), float(new[token] - old[token]))
        for token in ordered
    ]
    return Table(("token", "unsteered", "steered", "difference"), rows, "Probability of the answer's first token")


def _token(model: HookedMM, token: int) -> str:
    text = str(model.tokenizer.decode([token]))
    return text if text.strip() else str(model.tokenizer.convert_ids_to_tokens(token))


def _sweep_table(alphas: Sequence[float], swept: Sequence[_Swept], before: Tensor) -> Table:
    rows = []
    for alpha, one in zip(alphas, swept, strict=True):
        text = one.text if len(one.text) <= LONGEST else f"{one.text[:LONGEST]} …"
        rows.append((f"{alpha:g}", text, float(next_token_kl(before, one.after))))
    picks = [{"alpha": alpha} for alpha in alphas]
    return Table(("alpha", "answer", "KL of the first token (nats)"), rows, "Several alphas", picks)


def make_tab(folders: Sequence[Path]) -> SteeringTab:
    """The tab, with steering vectors and dictionaries of the folders that were opened for it."""
    return SteeringTab(folders)
