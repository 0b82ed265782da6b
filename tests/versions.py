"""What tests have to know of the versions of transformers."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

with torch.device("meta"):
    _TOWER = CLIPVisionModel(CLIPVisionConfig(num_hidden_layers=1))
IN_CLIP = "vision_model." if hasattr(_TOWER, "vision_model") else ""
"""What CLIP's and SigLIP's towers, as parts of a larger model, have between their own name and that of their parts."""
RECORDED_INSIDE = find_spec("transformers.utils.output_capturing") is None
"""Whether hidden states, which towers' features are taken from, are recorded before hooks see them (5.0 and 5.1)."""
