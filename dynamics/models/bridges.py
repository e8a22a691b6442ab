"""Hugging Face models with TransformerLens's hooks."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module


def bridge(model: nn.Module, tokenizer: Any = None) -> TransformerBridge:
    """A `TransformerBridge` to a copy of a Hugging Face model: its own weights under TransformerLens's hooks.

    It is in eval mode. TransformerLens puts its components in place of the modules of the model that it is given,
    and switches its attention to the eager one; the caller's model stays as it is.

    Args:
        model: of an architecture that TransformerLens knows: `AutoModelForCausalLM.from_pretrained("gpt2")`.
        tokenizer: its tokenizer, loaded by `from_pretrained` as TransformerLens loads it again. Without one the
            bridge takes token ids alone, and nothing is asked of a hub.
    """
    known: Any = copy.deepcopy(model)
    config = known.config
    if tokenizer is None:
        known.set_attn_implementation("eager")
        return build_bridge_from_module(known, type(model).__name__, hf_config=config).eval()
    name = config._name_or_path or config.model_type
    dtype = next(known.parameters()).dtype
    booted = TransformerBridge.boot_transformers(name, hf_model=known, dtype=dtype, tokenizer=tokenizer)
    return booted.eval()


def processed_bridge(model: nn.Module, tokenizer: Any = None) -> TransformerBridge:
    """The bridge with weights as HookedTransformer processed them: another basis, the same probabilities.

    Norms are folded into the layers that read them, what writes to the residual stream is centred and so is the
    unembedding, value biases are folded, and the factors of QK and OV are refactored.

    Args:
        model, tokenizer: as `bridge`.
    """
    booted = bridge(model, tokenizer)
    booted.enable_compatibility_mode(disable_warnings=True, refactor_factored_attn_matrices=True)
    return booted.eval()
