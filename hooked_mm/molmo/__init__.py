"""Molmo (Molmo-7B-D-0924; Deitke et al. 2024, arXiv:2409.17146), which transformers lacks, as transformers classes.

Importing this package tells transformers' `Auto` classes of `model_type: molmo`, so that the published checkpoint loads
as it is: its keys are these modules' names, and its remote code, which was written for transformers 4, is not run.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from hooked_mm.molmo.configuration_molmo import MolmoConfig, MolmoVisionConfig
from hooked_mm.molmo.image_processing_molmo import MolmoImageProcessor
from hooked_mm.molmo.modeling_molmo import MolmoForCausalLM
from hooked_mm.molmo.processing_molmo import MolmoProcessor

__all__ = ["MolmoConfig", "MolmoForCausalLM", "MolmoImageProcessor", "MolmoProcessor", "MolmoVisionConfig"]

AutoConfig.register("molmo", MolmoConfig, exist_ok=True)
AutoModelForCausalLM.register(MolmoConfig, MolmoForCausalLM, exist_ok=True)
AutoModelForImageTextToText.register(MolmoConfig, MolmoForCausalLM, exist_ok=True)
AutoProcessor.register(MolmoConfig, MolmoProcessor, exist_ok=True)
