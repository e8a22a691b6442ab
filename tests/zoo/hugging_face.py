"""Small random models of Hugging Face, made of configs alone: no weights are fetched."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from dynamics.batch import Batch
from dynamics.sites import Site
from tests.zoo.small_models import D_VOCAB, perturbed

QUIET = {"vocab_size": D_VOCAB, "bos_token_id": 0, "eos_token_id": 0, "attn_implementation": "eager"}
"""What every config is told; eager attention has derivatives of every order."""

SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "max_position_embeddings": 16}

GROUPED = {**SHAPE, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24}


def gpt2(dtype: torch.dtype = torch.float64, **changes: Any) -> nn.Module:
    """GPT-2: tied embeddings, q, k and v fused in one Conv1D [d_model, 3 · d_model]."""
    shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = transformers.GPT2Config(**{**QUIET, **shape, **no_dropout, **changes})
    return built(transformers.GPT2LMHeadModel, config, dtype)


def neox(dtype: torch.dtype = torch.float64, **changes: Any) -> nn.Module:
    """GPT-NeoX, as Pythia is: q, k and v of each head side by side, attention and MLP in parallel."""
    shape = {**SHAPE, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.GPTNeoXConfig(**{**QUIET, **shape, **changes})
    return built(transformers.GPTNeoXForCausalLM, config, dtype)


def llama(dtype: torch.dtype = torch.float64, **changes: Any) -> nn.Module:
    """Llama: four query heads share two key and value heads. Its norms compute in single precision."""
    config = transformers.LlamaConfig(**{**QUIET, **GROUPED, **changes})
    return built(transformers.LlamaForCausalLM, config, dtype)


def built(kind: type, config: Any, dtype: torch.dtype = torch.float64) -> Any:
    """A model of a config, no parameter zero or one; the caller's generator stays where it is."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return perturbed(kind(config).to(dtype), scale=0.3)


def hf_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean −log p(target) at each row's scored position, in nats."""
    logits = model(batch.tokens).logits
    return F.cross_entropy(logits[torch.arange(len(batch.tokens)), batch.target_pos], batch.targets)


# --- models by name ---------------------------------------------------------------------------------------


def other(name: str, **changes: Any) -> nn.Module:
    """A model of another class whose parameters are named as in a known family."""
    config = getattr(transformers, f"{name}Config")(**{**QUIET, **GROUPED, **changes})
    return built(getattr(transformers, f"{name}ForCausalLM"), config)


WITH_HEAD: dict[str, Callable[..., nn.Module]] = {
    "gpt2": gpt2,
    "gpt2 of four heads": partial(gpt2, n_head=4),
    "gpt2 untied": partial(gpt2, tie_word_embeddings=False),
    "neox": neox,
    "neox of four heads": partial(neox, num_attention_heads=4),
    "neox without biases": partial(neox, attention_bias=False),
    "llama": llama,
    "llama with one key head": partial(llama, num_key_value_heads=1),
    "llama with a key head for each query": partial(llama, num_key_value_heads=4),
    "llama with heads of another size": partial(llama, head_dim=6),
    "llama with biases": partial(llama, attention_bias=True, mlp_bias=True),
    "llama tied": partial(llama, tie_word_embeddings=True),
    "mistral": partial(other, "Mistral"),
    "qwen2": partial(other, "Qwen2"),
    "qwen3": partial(other, "Qwen3", head_dim=4),
}
SMALL = {"num_attention_heads": 4, "hidden_size": 16, "num_hidden_layers": 2}
OPENAI = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 16}


def of_config(name: str, head: str = "ForCausalLM", **shape: Any) -> nn.Module:
    """A model of a class by name, in eval mode: some families have dropout."""
    config = getattr(transformers, f"{name}Config")(**{**QUIET, **shape})
    return built(getattr(transformers, f"{name}{head}"), config).eval()


OF_MORE_FAMILIES: dict[str, Callable[..., nn.Module]] = {
    "gpt-neo": partial(
        of_config,
        "GPTNeo",
        hidden_size=16,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global"], 2]],
        max_position_embeddings=16,
    ),
    "gpt-j": partial(of_config, "GPTJ", **OPENAI, rotary_dim=4),
    "gpt-bigcode": partial(of_config, "GPTBigCode", **OPENAI),
    "opt": partial(of_config, "OPT", **SMALL, ffn_dim=24, max_position_embeddings=16, word_embed_proj_dim=16),
    "phi": partial(of_config, "Phi", **SMALL, intermediate_size=24, max_position_embeddings=16),
    "phi-3": partial(of_config, "Phi3", **GROUPED, pad_token_id=0),
    "falcon": partial(of_config, "Falcon", **SMALL),
    "falcon with a key head for each query": partial(of_config, "Falcon", **SMALL, multi_query=False),
    "bloom": partial(of_config, "Bloom", hidden_size=16, n_layer=2, n_head=4),
    "bert": partial(
        of_config, "Bert", "ForMaskedLM", **SMALL, intermediate_size=24, max_position_embeddings=16
    ),
    "gemma": partial(other, "Gemma", head_dim=4),
    "gemma 2": partial(other, "Gemma2", head_dim=4, sliding_window=8),
    "olmo 2": partial(other, "Olmo2", pad_token_id=0),
    "stablelm": partial(other, "StableLm"),
    "granite": partial(other, "Granite"),
}
WITHOUT_HEAD: dict[str, Callable[..., nn.Module]] = {
    "gpt2 without its head": lambda: gpt2().transformer,
    "neox without its head": lambda: neox().gpt_neox,
    "llama without its head": lambda: llama().model,
}
BUILDERS = {**WITH_HEAD, **WITHOUT_HEAD}
EVERY_FAMILY = {**WITH_HEAD, **OF_MORE_FAMILIES}


@cache
def model_of(name: str) -> nn.Module:
    """Built once; a test that changes a model builds its own."""
    return {**BUILDERS, **OF_MORE_FAMILIES}[name]()


def times_covered(model: nn.Module, parts: Sequence[Site]) -> dict[str, Tensor]:
    """How often each element of each parameter is covered, counted by boolean masks."""
    counts = {name: torch.zeros(p.shape, dtype=torch.int64) for name, p in model.named_parameters()}
    for site in parts:
        for name, index in site.covers.items():
            mask = torch.zeros(counts[name].shape, dtype=torch.bool)
            mask[index] = True
            counts[name] += mask
    return counts


def found(parts: Sequence[Site], **coords: str | int) -> list[Site]:
    """The sites with the given coordinates."""
    return [s for s in parts if all(s.coords[name] == value for name, value in coords.items())]
