"""`HookedMM`: a vision-language model whose inside is read and changed by the same names everywhere.

It only delegates: `structure` finds the parts, `hook_points` names them, `prepare` makes batches, `runner` runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from hooked_mm.batch import Batch, batch_from_inputs
from hooked_mm.cache import ActivationCache
from hooked_mm.conformance import ConformanceReport, check_conformance
from hooked_mm.errors import BadInputError, ConformanceError, UnsupportedModelError
from hooked_mm.found_positions import find_positions
from hooked_mm.generation import GenerationOutput, check_prompts, make_output
from hooked_mm.hook_points import HookPoint, list_hook_points
from hooked_mm.interventions import HookLike, expand
from hooked_mm.layout_source import pictures
from hooked_mm.prepare import SampleImages, one_per_sample, prepare
from hooked_mm.pretrained import load_model
from hooked_mm.probe import made_batch, small_enough
from hooked_mm.prompts import Turn
from hooked_mm.resolve import resolve
from hooked_mm.runner import HookSpec, NamesFilter, Runner
from hooked_mm.small import small_adapter_path, small_model_path
from hooked_mm.structure import Structure, describe, vocabulary
from hooked_mm.unembedding import Unembedding
from hooked_mm.vocabulary import logits_of
from hooked_mm.weights import device_of, dtype_of

BatchLike = Batch | Mapping[str, Any]


class HookedMM:
    """A transformers vision-language model as a uniform hooked interface.

    Args:
        hf_model: A loaded transformers model, PEFT-wrapped or not. It is used as it is, and left as it is.
        processor: Its processor. Without one, `prepare` is not available, but plain mappings of the model's forward
            tensors are taken wherever a batch is.
        check: Prove that every hook point means what its name says: at once, on a picture made for it; without a
            processor on the first batch with an image. `"full"` looks at every block instead of the first and last of
            each kind, False at none.
        strict: Refuse a model with points that fail; otherwise they become unavailable, with the reason.
        structure: Where the model's parts are, if you know better than `resolve`.

    Attributes:
        conformance: The report of that check; None before it was made.

    Raises:
        UnsupportedModelError: If the architecture is not recognised.
        ConformanceError: If points fail and `strict`; it names them.
    """

    def __init__(
        self,
        hf_model: Any,
        processor: Any = None,
        *,
        check: bool | Literal["full"] = True,
        strict: bool = True,
        structure: Structure | None = None,
    ) -> None:
        self.hf_model, self.processor = hf_model, processor
        self.structure = structure = structure or resolve(hf_model)
        self._config = (hf_model.get_base_model() if hasattr(hf_model, "get_base_model") else hf_model).config
        self._points = list_hook_points(hf_model, structure)
        self._runner = Runner(hf_model, structure, self._points)
        self._active: list[HookSpec] = []
        self._active_backward: list[HookSpec] = []
        self.cfg = describe(structure, structure.words or vocabulary(hf_model.get_submodule(structure.unembed)))
        self.conformance: ConformanceReport | None = None
        self._check, self._strict = check, strict
        if check and processor is not None:
            self._check_on(*made_batch(self))

    def _check_on(self, batch: Batch, copies: int = 1) -> None:
        """Check on a batch, once; refuse what fails or make it unavailable."""
        asked, self._check = self._check, False
        self.conformance = report = check_conformance(self, batch, full=asked == "full", copies=copies)
        if report.ok:
            return
        if self._strict:
            self._check = asked
            named = "\n".join(f"  {point}: {why}" for point, why in report.failed_points().items())
            raise ConformanceError(
                f"hook points of {report.model} that do not mean what their names say:\n{named}\n"
                "Load with strict=False to use the others, or with check=False at your own risk",
                report,
            )
        self._runner.withdraw(report.untrusted(self._points, self.structure))

    @classmethod
    def from_pretrained(
        cls, model_id: str | Path, *, check: bool | Literal["full"] = True, strict: bool = True, **options: Any
    ) -> HookedMM:
        """Load a model and its processor from the hub or from a folder.

        Args:
            model_id: Hub id or folder.
            check: As in `HookedMM`.
            strict: As in `HookedMM`.
            options: As in `pretrained.load_model`: `dtype`, `device_map`, `adapter`, `merge_adapter`,
                `trust_remote_code`, and what transformers' `from_pretrained` takes (`revision`, ...).
        """
        model, processor = load_model(model_id, **options)
        return cls(model, processor, check=check, strict=strict)

    @classmethod
    def small(
        cls, name: str = "llava", adapter: str | None = None, *, dtype: str | torch.dtype = "float32", **options: Any
    ) -> HookedMM:
        """A shipped small model, or its sibling by an adapter (needs PEFT); `BadInputError` for unknown names."""
        path, put = small_model_path(name), None if adapter is None else small_adapter_path(name, adapter)
        return cls.from_pretrained(path, dtype=dtype, adapter=put, **options)

    @staticmethod
    def unembedding(model_id: str | Path, **options: Any) -> Unembedding:
        """Final norm, unembedding and tokenizer alone: `to_logits` without the model; see `unembedding.Unembedding`."""
        return Unembedding.from_pretrained(model_id, **options)

    def __repr__(self) -> str:
        return (
            f"HookedMM({type(self.hf_model).__name__}, {self.cfg.n_layers} layers x {self.cfg.d_model}, "
            f"{len(self._points)} hook points)"
        )

    @property
    def hook_names(self) -> list[str]:
        """Every hook point, in execution order."""
        return list(self._runner.points)

    @property
    def hook_points(self) -> dict[str, HookPoint]:
        """Every hook point by name, with what it means and where it lies."""
        return dict(self._runner.points)

    @property
    def device(self) -> torch.device:
        """Where the first weights are when the model runs."""
        return device_of(self.hf_model)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of what the model computes: of its first weights that are not packed."""
        return dtype_of(self.hf_model)

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        if self.processor is None:
            raise BadInputError("this HookedMM was made without a processor; give one: HookedMM(hf_model, processor)")
        return self.processor.tokenizer

    def prepare(
        self,
        images: Sequence[SampleImages] | Image.Image | str | Path | None,
        text: Sequence[str] | str,
        answers: Sequence[str | None] | None = None,
        answer_prefix: str | Sequence[str | None] | None = None,
        *,
        template: bool = True,
        padding_side: str = "left",
        history: Sequence[Sequence[Turn]] | None = None,
    ) -> Batch:
        """Make a padded batch: one prompt per sample in the model's chat template, with roles and modalities.

        Args:
            images: One entry per sample: a PIL image, a path, a list of those, or None. A single image, or None for
                all, may be given as it is.
            text: What the user says, one string per sample (or one string for every sample). An image token in the
                text says where its image goes; without any, images come first.
            answers: The assistant's answer per sample, put behind the prompt with role `answer` (teacher forcing).
            answer_prefix: The beginning of the answer, from which generation goes on; put before `answers`.
            template: False takes each text as the whole prompt, image tokens included.
            padding_side: `"left"` (needed for generation) or `"right"`.
            history: Per sample, the turns before the text; their pictures come first in `images`, their role is
                template.

        Returns:
            The batch, on the model's device; `batch.modality` and `batch.role` are (batch, pos).

        Raises:
            BadInputError: If counts differ, a picture is missing or broken, a prompt is empty, or the number of image
                tokens does not fit; it names the sample.
        """
        _ = self.tokenizer  # refuses a model without a processor
        if padding_side not in ("left", "right"):
            raise BadInputError(f"padding_side={padding_side!r}; it must be 'left' or 'right'")
        made = prepare(
            self.processor,
            self.structure,
            self._config,
            *one_per_sample(images, text, answers, answer_prefix),
            template=template,
            padding_side=padding_side,
            dtype=self.dtype,
            history=history,
        )
        return made.to(self.device)

    def _batch(self, batch: BatchLike) -> Batch:
        if pictures(batch.inputs if isinstance(batch, Batch) else batch):
            self.structure.refuse_pictures()
        if not isinstance(batch, Batch):
            found = find_positions(self.hf_model, self.structure, batch)
            batch = batch_from_inputs(batch, self.structure, self._config, found)
        if self._check and (batch.has_images or self.structure.left_out):
            self._check_on(small_enough(self, batch))
        return batch

    def run_with_cache(
        self,
        batch: BatchLike,
        names_filter: NamesFilter = None,
        stop_at_layer: int | None = None,
        *,
        grad: bool = False,
        **options: Any,
    ) -> tuple[Float[Tensor, "b p vocab"] | None, ActivationCache]:
        """One forward pass, and what happened inside.

        Args:
            batch: From `prepare`, or a mapping of the model's own forward tensors.
            names_filter: Which hook points to keep: a name, a glob, a list of those, a callable. None keeps all but
                attention patterns and per-head results, which make blocks compute what they would not: ask for those
                by name or glob.
            stop_at_layer: Stop before this layer of the language model (negative counts from the end): the rest is
                not computed, and the logits are None.
            grad: Make what is kept part of the gradient's graph: after `loss(logits).backward()`, `cache.grad(name)`
                is the loss's gradient.
            options: Handed to the model's forward (`logits_to_keep=1`, ...).

        Returns:
            The logits, and the cache. Values are those after active hooks.

        Raises:
            UnknownHookError: If a name matches nothing; the nearest are offered.
        """
        made = self._batch(batch)
        logits, saved = self._runner.forward(
            made,
            names_filter,
            self._active,
            save=True,
            stop_at_layer=stop_at_layer,
            backward=self._active_backward,
            track=grad,
            options=options,
        )
        return logits, ActivationCache(saved, made, self._points, model=self)

    def run_with_hooks(
        self,
        batch: BatchLike,
        fwd_hooks: Sequence[HookLike] = (),
        bwd_hooks: Sequence[HookSpec] = (),
        stop_at_layer: int | None = None,
        **options: Any,
    ) -> Float[Tensor, "b p vocab"] | None:
        """One forward pass with functions or interventions at hook points; the logits.

        Args:
            batch: From `prepare`, or a mapping of the model's own forward tensors.
            fwd_hooks: Interventions, or pairs (name or names_filter, function); a function is called as
                `fn(value, hook)` and returns the value that shall go on, or None to leave it.
            bwd_hooks: Pairs of the same kind, called with the gradient of the value when `backward()` is called on
                something made of the logits; what they return goes on backwards.
            stop_at_layer: As in `run_with_cache`.
            options: Handed to the model's forward.
        """
        logits, _ = self._runner.forward(
            self._batch(batch),
            (),
            [*self._active, *expand(fwd_hooks)],
            stop_at_layer=stop_at_layer,
            backward=[*self._active_backward, *bwd_hooks],
            options=options,
        )
        return logits

    @contextmanager
    def hooks(self, fwd_hooks: Sequence[HookLike] = (), bwd_hooks: Sequence[HookSpec] = ()) -> Iterator[HookedMM]:
        """While open, these run in every forward pass and generation; undone at the end, whatever happens.

        Args:
            fwd_hooks: As in `run_with_hooks`.
            bwd_hooks: As in `run_with_hooks`; a generation, which computes no gradients, refuses them.
        """
        before, backward = self._active, self._active_backward
        self._active, self._active_backward = [*before, *expand(fwd_hooks)], [*backward, *bwd_hooks]
        try:
            yield self
        finally:
            self._active, self._active_backward = before, backward

    def generate(
        self, batch: BatchLike, max_new_tokens: int = 20, *, return_logits: bool = False, **options: Any
    ) -> GenerationOutput:
        """Generate answers, batched, with the active hooks at work in every step.

        Args:
            batch: Prompts padded on the left.
            max_new_tokens: At most so many tokens.
            return_logits: Also return the logits of every step.
            options: As in transformers' `generate` (`do_sample`, `num_beams`, ...); greedy unless said otherwise.

        Raises:
            BadInputError: If a prompt is padded on the right, or backward hooks are active.
            UnsupportedModelError: If the model generates in a way of its own.
        """
        if self._active_backward:
            raise BadInputError(
                "generation computes no gradients, but backward hooks are active; run the generated batch in one pass: "
                "model.run_with_hooks(output.batch, bwd_hooks=...)"
            )
        made = self._batch(batch)
        check_prompts(made, self.structure, getattr(self.hf_model.generation_config, "decoder_start_token_id", None))
        options = {
            "do_sample": False,
            **options,
            "max_new_tokens": max_new_tokens,
            "return_dict_in_generate": True,
            "output_logits": return_logits,
        }
        result = self._runner.generate(made, self._active, options)
        # An encoder-decoder's answer begins with its start token, a decoder's with the prompt.
        ids = (made.decoder or made).input_ids
        given = 1 if self.structure.encoder and made.decoder is None else ids.shape[1]
        tokens = result.sequences[:, given:].to(made.input_ids.device)
        logits = torch.stack(result.logits, dim=1) if return_logits else None
        tokenizer = None if self.processor is None else self.tokenizer
        return make_output(made, tokens, logits, tokenizer, self.hf_model.generation_config.eos_token_id)

    def trace(self, batch: BatchLike, **options: Any) -> Any:
        """A plain nnsight trace on the batch: `with model.trace(batch): ...`; modules are reached by our aliases.

        `model.blocks[3].output`, `model.vision_blocks`, `model.projector`, `model.embed`, `model.ln_final` and
        `model.unembed` are nnsight envoys; keep values with `nnsight.save(value)`.
        """
        return self._runner.nnsight.trace(**self._batch(batch).inputs, **options)

    @property
    def nnsight(self) -> Any:
        """The wrapped model as nnsight sees it; the transformers model is its `.model`."""
        return self._runner.nnsight

    @property
    def blocks(self) -> list[Any]:
        """nnsight's envoys of the language model's blocks."""
        return [self._runner.get(block.path) for block in self.structure.text.blocks]

    @property
    def vision_blocks(self) -> list[Any]:
        """nnsight's envoys of the tower's blocks."""
        return [self._runner.get(block.path) for block in self.structure.vision.blocks] if self.structure.vision else []

    def _envoy(self, path: str | None, what: str) -> Any:
        if path is None:
            raise UnsupportedModelError(f"this {self.cfg.family} model has no {what}")
        return self._runner.get(path)

    @property
    def projector(self) -> Any:
        """nnsight's envoy of the module from tower features to image tokens."""
        return self._envoy(self.structure.projector, "projector")

    @property
    def embed(self) -> Any:
        """nnsight's envoy of the token embedding."""
        return self._envoy(self.structure.embed, "token embedding")

    @property
    def ln_final(self) -> Any:
        """nnsight's envoy of the final norm."""
        return self._envoy(self.structure.final_norm, "final norm: its blocks normalise after the sum")

    @property
    def unembed(self) -> Any:
        """nnsight's envoy of the unembedding."""
        return self._envoy(self.structure.unembed, "unembedding")

    def to_logits(self, resid: Float[Tensor, "... d_model"], *, grad: bool = False) -> Float[Tensor, "... vocab"]:
        """The logit lens: the model's logits for residual-stream values of any layer.

        unembed(final norm(resid)), with the model's scale and soft-cap; where blocks normalise after the sum there is
        no final norm. With `grad` they have gradients by the values, and by weights that require them.
        """
        return logits_of(self.hf_model, self.structure.readout, resid, grad=grad)
