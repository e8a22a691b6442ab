"""top_answers: what a model takes to come next, likeliest first."""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
from torch import nn

from checkpoints.rng import replayed
from dynamics.models.functional import eval_mode


def top_answers(
    model: nn.Module, prompt: str, tokenizer: Any = None, answer: str | None = None, n: int = 10
) -> pd.DataFrame:
    """The likeliest next tokens after a prompt with their probabilities, and the rank of the answer.

    Args:
        model: tokens [batch, pos] -> logits, or a Hugging Face output with `.logits`. It stays as it is.
        prompt: as text; no special token is put before it.
        tokenizer: of Hugging Face, or a task's `vocabulary`; None takes the model's own, which a bridge has.
        answer: one token as text, such as " Madrid".
        n: how many; the answer has a further row where it is not among them.

    Returns:
        Columns `rank` (0 is likeliest), `token`, `probability` and `answer` (whether it is the answer).

    Raises:
        ValueError: the answer is not one token, or there is no tokenizer.
    """
    words = tokenizer or getattr(model, "tokenizer", None)
    if words is None:
        raise ValueError(
            f"{type(model).__name__} has no tokenizer; give tokenizer=, such as task.vocabulary."
        )
    device = next(model.parameters()).device
    with torch.no_grad(), eval_mode(model), replayed(None):
        output = model(torch.tensor([_encoded(words, prompt)], device=device))
    probabilities = getattr(output, "logits", output)[0, -1].double().softmax(-1).cpu()
    order = probabilities.argsort(descending=True, stable=True).tolist()
    shown = list(range(min(n, len(order))))
    wanted = None
    if answer is not None:
        if len(tokens := _encoded(words, answer)) != 1:
            raise ValueError(f"the answer {answer!r} is {len(tokens)} tokens {tokens}; it must be one.")
        wanted = order.index(tokens[0])
        shown += [wanted] if wanted >= n else []
    return pd.DataFrame(
        {
            "rank": shown,
            "token": [words.decode([order[rank]]) for rank in shown],
            "probability": [float(probabilities[order[rank]]) for rank in shown],
            "answer": [rank == wanted for rank in shown],
        }
    )


def _encoded(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text, without special ones of the tokenizer's own."""
    if callable(tokenizer):
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return list(tokenizer.encode(text))
