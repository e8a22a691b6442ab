"""Sites of low-rank adapters (LoRA), as peft puts them beside the layers of a model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from dynamics.sites.families import layer_of, unadapted
from dynamics.sites.site import Site, SiteError, coords_of, listed

_BY = ("layer", "projection")


@listed
def adapters(model: nn.Module, by: Sequence[str] = _BY) -> list[Site]:
    """Sites of a PeftModel's adapters: both factors of one projection's, of one block's, or of all.

    Args:
        model: with peft's LoRA around some of its layers.
        by: "layer", "projection" or both: one site for each; ("projection",) joins those of all blocks, () joins
            all.

    Raises:
        SiteError: the model has no adapters, or `by` names something else.
    """
    if unknown := [word for word in by if word not in _BY]:
        raise SiteError(f"adapters(by={list(by)}): {unknown[0]!r} is neither 'layer' nor 'projection'.")
    found: dict[tuple[int, str], list[str]] = {}
    for name, _ in model.named_parameters():
        projection, is_adapter, _ = unadapted(name).partition(".lora_")
        if is_adapter:
            key = layer_of(name) if "layer" in by else -1, projection if "projection" in by else ""
            if "projection" in by and layer_of(name) >= 0:
                key = key[0], projection.rpartition(f".{layer_of(name)}.")[2]
            found.setdefault(key, []).append(name)
    if not found:
        raise SiteError(
            f"{type(model).__name__} has no adapters: none of its parameters is called .lora_A or .lora_B, as in "
            "peft's get_peft_model(model, LoraConfig(...))."
        )
    return [
        Site(
            " ".join([projection or "adapters", *([str(layer)] if layer >= 0 else [])]),
            dict.fromkeys(names, ...),
            coords_of("adapters", projection or "adapters", *([layer] if layer >= 0 else [])),
        )
        for (layer, projection), names in found.items()
    ]
