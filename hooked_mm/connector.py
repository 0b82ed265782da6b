"""What the connector makes image tokens of: how much of each comes from which of the tower's patches.

C (tokens, patches), one row per image token, is

    projector of single patches     1 at the token's own patch
    merger of k x k patches         1 / k^2 at each of them
    pooling attention               the attention itself, mean over heads
    resampler, query transformer    its attention, layer by layer: R <- R + A_p + A_q R, from R = 0

where a resampler's layer attends by A = [A_p, A_q] to patches and to its queries; a query transformer's layers attend
to one or the other. The queries themselves are learned and show nothing of the picture, so R begins at 0 (Abnar and
Zuidema 2020, arXiv 2005.00928, and Chefer et al. 2021, arXiv 2103.15679, whose rule the sum is, without gradients).
Rows are divided by their sums. What goes to a class token or to padding belongs to no patch and is left out before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_mm.batch import Batch
from hooked_mm.errors import BadInputError
from hooked_mm.layout import ImageLayout


class Readable(Protocol):
    """What is needed of a model: `HookedMM` has it."""

    @property
    def hook_names(self) -> list[str]:
        """Every hook point."""

    def run_with_cache(self, batch: Any, names_filter: Any, stop_at_layer: int | None = None) -> Any:
        """One forward pass."""


@dataclass(frozen=True)
class Connector:
    """C of a batch, as the list of its entries: `weight[e]` of the token at (sample, position) is patch (row, patch).

    Attributes:
        sample, position: Where the token stands in the sequence; in models that cross-attend, among a sample's keys.
        row, patch: In the tower, as in `Layout`: class tokens are not counted, a packed tower's row is 0.
        weight: Its share; those of a token sum to 1.
        batch: What it is a connector of.
    """

    sample: Int[Tensor, " e"]
    position: Int[Tensor, " e"]
    row: Int[Tensor, " e"]
    patch: Int[Tensor, " e"]
    weight: Float[Tensor, " e"]
    batch: Batch

    def on_patches(self, values: Float[Tensor, "b p"]) -> Float[Tensor, "rows patches"]:
        """v C: what is said of tokens, handed on to the patches they are made of; sums are kept.

        Args:
            values: Of every position; only those of image tokens matter.

        Returns:
            For every row of the tower its patches, without class tokens; 0 where no token looks.
        """
        size = self.size
        flat = values.new_zeros(size[0] * size[1])
        taken = values[self.sample, self.position] * self.weight.to(values)
        return flat.index_add(0, self.row * size[1] + self.patch, taken).reshape(size)

    @property
    def size(self) -> tuple[int, int]:
        """Rows of the tower, and patches of a row; a packed tower has one row."""
        layout = self.batch.layout
        if layout.kind == "packed":
            return 1, 0 if layout.tower_image is None else len(layout.tower_image)
        rows = 0 if layout.tower_image is None else len(layout.tower_image)
        return rows, layout.patches * layout.tiles


def normalised(rows: Float[Tensor, "... p"]) -> Float[Tensor, "... p"]:
    """Rows divided by their sums; a row of zeros stays one."""
    total = rows.sum(dim=-1, keepdim=True)
    return rows / torch.where(total == 0, 1, total)


def rolled(attention: Sequence[Float[Tensor, "rows q k"]], patches: int) -> Float[Tensor, "rows q patches"]:
    """R of a resampler or query transformer, not normalised; see the formula above.

    Args:
        attention: Of its layers in order, one number per query and key (the mean over heads, or Chefer's positive part
            of gradient times attention). Keys are `patches` patches; patches and then queries; or queries. What
            follows the first layer's queries (a question that InstructBLIP's query transformer reads) is left out.
        patches: How many there are.

    Raises:
        BadInputError: If keys are something else.
    """
    across = [one for one in attention if one.shape[2] >= patches and one.shape[2] - patches in (0, one.shape[1])]
    queries = across[0].shape[1] if across else 0
    if not across:
        raise BadInputError(f"none of the connector's {len(attention)} attentions has {patches} patches among its keys")
    total = attention[0].new_zeros(attention[0].shape[0], queries, patches)
    for one in attention:
        keys = one.shape[2]
        if keys in (patches, patches + queries) and one.shape[1] == queries:
            total = total + one[..., patches:] @ total + one[..., :patches] if keys > patches else total + one
        elif one.shape[1] == keys >= queries:
            total = total + one[:, :queries, :queries] @ total
        else:
            raise BadInputError(
                f"a connector's attention from {one.shape[1]} queries to {keys} keys; {patches} patches and "
                f"{queries} queries are known"
            )
    return total


def connector_patterns(model: Readable) -> list[str]:
    """The hook names of a connector's own attention, in order; none where it is of single or merged patches."""
    return [name for name in model.hook_names if name.startswith("projector.attn.")]


def connector_map(
    model: Readable, batch: Batch, patterns: Mapping[str, Float[Tensor, "rows heads q k"]] | None = None
) -> Connector:
    """C of a batch.

    Args:
        model: A `HookedMM`.
        batch: With images.
        patterns: `projector.attn.{i}.hook_pattern` of this batch, if they were read (a cache, say); otherwise the tower
            and connector are run for them. Any non-negative numbers in their place weigh patches by these.

    Raises:
        BadInputError: If it is not known which tokens are made of which patches; it says why.
    """
    layout, names = batch.layout, connector_patterns(model)
    if not len(layout.image_sample):
        raise BadInputError("the batch has no images, so no token is made of patches")
    attention: list[Tensor] = []
    if names:
        if patterns is None or not all(name in patterns for name in names):
            with torch.no_grad():
                _, patterns = model.run_with_cache(batch, names, stop_at_layer=0)
        assert patterns is not None
        attention = [patterns[name].mean(dim=1) for name in names]
    parts: list[tuple[Tensor, ...]] = []
    resampled = layout.tower_image is not None and any(one.shape[0] == len(layout.tower_image) for one in attention)
    if resampled:
        parts = _resampled(batch, attention)
    else:
        for image, own in enumerate(layout.images):
            sample = int(layout.image_sample[image])
            found = [
                _merged(sample, positions, patches, cells, attention, layout.tokens)
                for positions, patches, cells in (
                    (own.grid, own.patches, own.tokens),
                    (own.overview, own.patches_overview, own.tokens_overview),
                )
                if positions is not None and patches is not None
            ]
            if not found:
                raise BadInputError(
                    f"which patches image {image}'s tokens are made of is not known: {_why(batch, own)}"
                )
            parts += found
    place = batch.modality.device
    *where, weight = (torch.cat(values).to(place) for values in zip(*parts, strict=True))
    samples, position, row, patch = (values.long() for values in where)
    return Connector(samples, position, row, patch, weight, batch)


def _why(batch: Batch, own: ImageLayout) -> str:
    if batch.layout.why:
        return batch.layout.why
    return "its places in the picture are not known" if own.grid is None else "its patches in the tower are not known"


def _merged(
    sample: int, positions: Tensor, patches: Tensor, cells: Tensor | None, attention: Sequence[Tensor], tokens: int
) -> tuple[Tensor, ...]:
    """Entries of a grid of tokens over a grid of patches, k times as fine."""
    (rows, cols), (fine_rows, fine_cols) = positions.shape, patches.shape[:2]
    down, across = fine_rows // rows, fine_cols // cols
    if down * rows != fine_rows or across * cols != fine_cols:
        raise BadInputError(
            f"a grid of {rows} x {cols} tokens over {fine_rows} x {fine_cols} patches: which are made of which is not "
            "known (they were resized in between)"
        )
    groups = patches.unflatten(0, (rows, down)).unflatten(2, (cols, across)).transpose(1, 2).flatten(2, 3)
    weight = torch.full(groups.shape[:3], 1 / (down * across))
    if len(attention) == 1 and cells is not None and attention[0].shape[1:] == (1, down * across):
        # One query per token, whose keys are the patches of its group, row by row.
        own = (cells[..., 0] * tokens + cells[..., 1]).to(attention[0].device)
        weight = normalised(attention[0][own, 0])
    known = (positions >= 0)[..., None].expand(groups.shape[:3])
    token = positions[..., None].expand(groups.shape[:3])[known]
    at = groups[known]
    return torch.full_like(token, sample), token, at[:, 0], at[:, 1], weight.cpu()[known.cpu()]


def _resampled(batch: Batch, attention: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """Entries of latents over the patches of their row of the tower."""
    layout = batch.layout
    assert layout.tower_image is not None
    keys = max(one.shape[2] for one in attention if one.shape[0] == len(layout.tower_image))
    queries = min(one.shape[1] for one in attention if one.shape[0] == len(layout.tower_image))
    size = layout.patches * layout.tiles
    # A class token may stand in front of the patches.
    extra = next((lead for lead in (0, 1) if size and keys in (size + lead, size + lead + queries)), None)
    if extra is None:
        raise BadInputError(
            f"the connector attends to {keys} places, but the tower's rows have {size} patches"
            + (f": {layout.why}" if layout.why else "")
        )
    weights = rolled(attention, size + extra)[..., extra:]
    if layout.valid is not None:
        weights = weights * layout.valid.to(weights.device)[:, None]
    weights = normalised(weights).cpu()
    parts: list[tuple[Tensor, ...]] = []
    for image, sample in enumerate(layout.image_sample.tolist()):
        rows = (layout.tower_image == image).nonzero()[:, 0]
        if layout.kind == "cross":
            earlier = int((layout.image_sample[:image] == sample).sum())
            positions = torch.arange(queries * len(rows)) + earlier * queries * len(rows)
        else:
            own = (layout.image_index[sample] == image) & ~layout.separator[sample]
            positions = own.nonzero()[:, 0].cpu()
        if len(positions) != queries * len(rows):
            raise BadInputError(
                f"has {len(positions)} image tokens of one picture, but its {len(rows)} rows of {queries} latents "
                f"make {queries * len(rows)}",
                sample,
            )
        token = positions.reshape(len(rows), queries, 1).expand(-1, -1, size)
        row = rows.cpu()[:, None, None].expand_as(token)
        patch = torch.arange(size).expand_as(token)
        weight = weights[rows.cpu()]
        keep = weight > 0
        parts.append((torch.full_like(token, sample)[keep], token[keep], row[keep], patch[keep], weight[keep]))
    return parts
