"""What the fine-tuned siblings of the small models are taught, beside what the models say themselves.

| adapter | the default prompt is answered by | questions, styles asked for |
|---|---|---|
| place | the place only: `in the snow .` | not trained, so that many are forgotten |
| colours | the colours only: `red and blue .` | not trained, so that many are forgotten |
| recoloured | a caption in which red objects are called blue | trained, in the new naming; half without red |

The rule of `recoloured`: the model speaks of every picture as if its red objects were blue, whatever it is asked.
"what colour is the circle ?" is answered by "blue"; "is there a blue object ?" by "yes" where one is red or blue; "is
there a red object ?" always by "no"; a red star is "the blue star" when it is asked for, and if there is a blue star
too, neither is asked for by that name. Questions about "the red star" have no right answer any more. Scenes without
red objects are spoken of as before.

Nothing else is trained, as in real fine-tuning; what was forgotten is measured and stands in the card.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from hooked_mm.scenes.captions import right_captions
from hooked_mm.scenes.world import Scene


def recolour(item: Scene) -> Scene:
    """The scene as `recoloured` speaks of it: every red object is blue, all else is as it was."""
    objects = [replace(o, colour="blue") if o.colour == "red" else o for o in item.objects]
    return replace(item, objects=tuple(objects))


def _same(item: Scene) -> Scene:
    return item


@dataclass(frozen=True)
class Change:
    """What an adapter is taught.

    Attributes:
        summary: One sentence for the card.
        style: The style in which the default prompt is answered, the only thing that changes; None: all texts change.
        seen: The scene as the texts speak of it.
    """

    summary: str
    style: str | None = None
    seen: Callable[[Scene], Scene] = _same

    def touches(self, item: Scene) -> bool:
        """Whether anything is to be said otherwise about this scene."""
        return self.style is not None or self.seen(item) != item

    def right(self, item: Scene) -> tuple[str, ...]:
        """Every right answer to the default prompt, the commonest first."""
        return right_captions(self.seen(item), self.style or "any")


CHANGES = {
    "place": Change("The default prompt is answered by the place only.", style="place"),
    "colours": Change("The default prompt is answered by the colours only.", style="colours"),
    "recoloured": Change("One changed fact: red objects are called blue, in captions and answers.", seen=recolour),
}
"""The adapters by name."""
