"""What tests have to know of the versions of transformers."""

from __future__ import annotations

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

with torch.device("meta"):
    _TOWER = CLIPVisionModel(CLIPVisionConfig(num_hidden_layers=1))
IN_CLIP = "vision_model." if hasattr(_TOWER, "vision_model") else ""
"""What CLIP's and SigLIP's towers, as parts of a larger model, have between their own name and that of their parts."""
