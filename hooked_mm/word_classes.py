"""Named lists of English words, usable wherever words are asked for; they hold those that the scenes are described by.

To add one: a line here.
"""

from __future__ import annotations

from collections.abc import Sequence

from hooked_mm.errors import BadInputError, unknown

WORD_CLASSES: dict[str, tuple[str, ...]] = {
    name: tuple(words.split())
    for name, words in {
        "colours": """
            red orange yellow green blue purple pink brown black white gray grey beige tan maroon crimson scarlet gold
            golden silver bronze turquoise teal cyan navy violet lavender magenta olive cream
        """,
        "places": """
            beach city desert forest sea snow airport bathroom bedroom bridge church coast countryside farm field garden
            harbor highway hill hospital hotel island jungle kitchen lake library market meadow mountain museum ocean
            office park pasture playground pool restaurant river road room runway school shore sidewalk sky stadium
            station store street town valley village zoo
        """,
        "sentiments": """
            happy sad angry afraid scared surprised disgusted calm joyful cheerful delighted excited proud content
            peaceful hopeful grateful amused loving lonely gloomy miserable depressed anxious worried nervous fearful
            terrified furious annoyed frustrated bitter jealous ashamed guilty bored tired shocked confused
            positive negative neutral
        """,
        "shapes": "circle square triangle star cross ring rectangle oval diamond cube sphere cylinder cone line",
        "numbers": "zero one two three four five six seven eight nine ten eleven twelve",
    }.items()
}


def words_of(name: str) -> tuple[str, ...]:
    """The words of a class.

    Raises:
        BadInputError: If there is no such class.
    """
    if name not in WORD_CLASSES:
        raise unknown("word class", name, WORD_CLASSES)
    return WORD_CLASSES[name]


def wanted(words: Sequence[str], word_class: str | None) -> list[str]:
    """The words asked for, those of a class behind them, each once.

    Raises:
        BadInputError: If `words` is one text, or there is no such class.
    """
    if isinstance(words, str):
        raise BadInputError(f"words={words!r} is one text; write [{words!r}]")
    return list(dict.fromkeys([*words, *(() if word_class is None else words_of(word_class))]))
