"""What a model is asked: templates that wrap a question, or ask for a caption, by name or as they stand.

Named ones are what a family's own papers ask for; a test of a model with other words tests something else.
"""

from __future__ import annotations

from hooked_mm.errors import BadInputError, unknown

SLOT = "{text}"
TEMPLATES: dict[str, str] = {
    # LLaVA-1.5 (arXiv 2310.03744), response formatting prompts; InternVL was tuned on the same.
    "llava-short": "{text}\nAnswer the question using a single word or phrase.",
    "llava-choice": "{text}\nAnswer with the option's letter from the given choices directly.",
    "llava-caption": "Provide a one-sentence caption for the provided image.",
    # The Cauldron, on which Idefics2 (2405.02246), Idefics3 and SmolVLM were tuned.
    "idefics2-short": "{text}\nGive a very brief answer.",
    # BLIP-2 (2301.12597): zero-shot questions with Flan-T5 and with OPT; captions.
    "blip-2-short": "Question: {text} Short answer:",
    "blip-2-opt": "Question: {text} Answer:",
    "blip-2-caption": "a photo of",
    # Florence-2 (2311.06242): task tokens.
    "florence-2-caption": "<CAPTION>",
    "florence-2-detailed": "<DETAILED_CAPTION>",
}
"""Templates by name."""
CAPTION = "Describe the image in one sentence."
"""What captions are asked for with unless a template says otherwise."""


def resolve(template: str, *, asks: bool) -> str:
    """A template's words, by name or as it stands.

    Args:
        template: A name of `TEMPLATES`, or words; `{text}` stands for the data set's question.
        asks: Whether the data set has questions.

    Raises:
        BadInputError: If it is a single word but no name, or holds `{text}` where there is no question, or lacks it
            where there is one.
    """
    words = TEMPLATES.get(template, template)
    single = len(words.split()) < 2 and SLOT not in words and not words.startswith("<")
    if single:
        raise unknown("template", template, TEMPLATES)
    if asks and words.count(SLOT) != 1:
        raise BadInputError(
            f"the template {words!r} must hold {SLOT} once, where the data set's question goes; else all samples would "
            "be asked the same"
        )
    if not asks and SLOT in words:
        raise BadInputError(
            f"the template {words!r} holds {SLOT}, but this data set has no questions to put there; write the whole "
            "prompt"
        )
    return words


def fill(template: str | None, question: str | None) -> str:
    """The prompt: the template with the question in its place. No other braces mean anything."""
    if template is None:
        return question or ""
    return template if question is None else template.replace(SLOT, question)
