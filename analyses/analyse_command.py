"""Analyse representations: geometry, lenses, probes, neurons; over a store or a data set, for image and text apart.

    hooked-mm analyse linearity --store runs/scenes --output runs/linearity
    hooked-mm analyse compare --results '[runs/base, runs/tuned]' --output runs/both

Nothing heavy is imported before one of these is chosen.
"""

from __future__ import annotations

from importlib import import_module

from hooked_mm.command_table import CommandTable

COMMANDS: dict[str, tuple[str, str, str]] = {
    "linearity": ("linearity_command", "main", "how linear each layer is, in sample, adjusted and held out"),
    "anisotropy": ("anisotropy_command", "main", "how unevenly representations fill their space"),
    "intrinsic-dimension": ("intrinsic_dimension_command", "main", "how many dimensions they locally have"),
    "neurons": ("neurons_command", "main", "which neurons turn what a picture shows into a word; silenced as a check"),
    "segment": ("segment_command", "main", "where the model would say a word, against known masks"),
    "logit-lens": ("logit_lens_command", "main", "what each layer would say at each token, as pages to look at"),
    "top-tokens": ("top_tokens_command", "main", "which words each layer would say, counted over a data set"),
    "tuned-lens": ("tuned_lens_command", "main", "a logit lens whose layers are first translated, trained on a store"),
    "patchscope": ("patchscope_command", "main", "what the model says of a patch that is put into a question"),
    "contextualization": ("contextualization_command", "main", "what of its context a token's representation holds"),
    "prefix-probe": ("prefix_probe_command", "main", "how much of the text before it each token remembers"),
    "probe": ("probe_command", "main", "what a linear probe reads off rows, beside a control task"),
    "ablation": ("ablation_command", "main", "what an answer loses without some of the image's tokens"),
    "mmvp": ("mmvp_command", "main", "the MMVP benchmark: pairs of pictures, a pair right only if both answers are"),
    "attention": ("attention_command", "main", "what each answer token attends to: heads x layers, maps of heads"),
    "gradcam": ("gradcam_command", "main", "where attention looks that speaks for each token of an answer"),
    "relevancy": ("relevancy_command", "main", "what each token of an answer rests on, through all layers"),
    "faithfulness": ("faithfulness_command", "main", "attribution methods against known masks and the model's answer"),
    "sinks": ("sinks_command", "main", "which keys take far more than their share; what goes to which kind of token"),
    "causal-graph": ("causal_graph_command", "main", "which tokens cause a prediction, verified by masking them"),
    "patching": ("patching_command", "main", "where clean values, patched into a corrupt run, bring the answer back"),
    "knockout": ("knockout_command", "main", "which positions must read which others for the answer to be right"),
    "logit-attribution": (
        "logit_attribution_command",
        "main",
        "what heads, MLPs and visual tokens put into a logit; the parts sum to it",
    ),
    "compare": ("compare_command", "main", "results of several models in one plot per score"),
}
"""Command -> module of this package, function in it, and what it does."""

TABLE = CommandTable(
    "analyse", (__doc__ or "").splitlines()[0], COMMANDS, lambda module: import_module(f"analyses.{module}")
)
main = TABLE.run
