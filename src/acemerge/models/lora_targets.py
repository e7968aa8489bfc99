"""What PEFT can put a LoRA on, and by which of its two ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

Target = Literal["module", "parameter"]

# PEFT refuses these modules of these models, whose kernels read the weights beside the module.
_STATE_SPACE = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
_STATE_SPACE_OUTPUT = "out_proj"
# PEFT takes modules of these names in a mixture of experts for the matrices of its experts.
_EXPERT_NAMES = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
_TASKS = (("ForCausalLM", "CAUSAL_LM"), ("LMHeadModel", "CAUSAL_LM"))


def lora_targets(model: nn.Module) -> dict[str, Target]:
    """Weights (out, in), or (in, out) in a Conv1D, by their names: as `target_modules`, or as `target_parameters`."""
    fused = any(p.ndim == 3 and "expert" in name for name, p in model.named_parameters())
    state_space = getattr(getattr(model, "config", None), "model_type", None) in _STATE_SPACE
    found: dict[str, Target] = {}
    for prefix, module in model.named_modules():
        leaf, weight = prefix.rpartition(".")[2], getattr(module, "weight", None)
        if not prefix or not isinstance(weight, nn.Parameter) or weight.ndim != 2 or isinstance(module, nn.Embedding):
            continue
        if state_space and leaf == _STATE_SPACE_OUTPUT:
            continue
        # A router that is a linear layer and returns more than its product takes no adapter on what it returns.
        plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
        is_layer = plain or type(module).__name__ == "Conv1D"
        by_module = is_layer and not (fused and leaf in _EXPERT_NAMES)
        found[f"{prefix}.weight"] = "module" if by_module else "parameter"
    return found


def task_type(config: Mapping[str, Any]) -> str | None:
    """PEFT's word for what the architecture is for; None where that would ask for weights of a head, too."""
    architectures = config.get("architectures")
    name = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    if name.endswith("ForConditionalGeneration") and config.get("is_encoder_decoder") is True:
        return "SEQ_2_SEQ_LM"
    return next((task for end, task in _TASKS if name.endswith(end)), None)
