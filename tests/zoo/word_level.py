"""A small random GPT-2 on disk with a tokenizer of whole words, which knows all that the tasks say."""

import string
from pathlib import Path

import tokenizers
import torch
import transformers

from dynamics.tasks import facts, ioi, words


def save_gpt2(folder: Path) -> str:
    """Two layers with two heads each; returns the folder's name."""
    slots = dict.fromkeys(("first", "second", "subject", "place", "thing", "relation"), "")
    frames = [template.format(**slots) for template in (*ioi.TEMPLATES, *facts.TEMPLATES)]
    known = ["<bos>", "<unk>", *words.NAMES, *words.PLACES, *words.THINGS, *words.FILLERS, "The", "("]
    known += [*string.ascii_uppercase, *(w for ws in words.CAPITALIZED.values() for w in ws)]
    known += [*words.COUNTRIES, *(a for answers in words.COUNTRIES.values() for a in answers)]
    known += [*facts.RELATIONS, *words.Vocabulary.of(*frames).words]
    ids = {word: i for i, word in enumerate(dict.fromkeys(known))}
    split = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
    split.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=split, bos_token="<bos>", eos_token="<bos>", unk_token="<unk>"
    ).save_pretrained(folder)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32, "vocab_size": len(ids)}
    torch.manual_seed(0)
    config = transformers.GPT2Config(**shape, bos_token_id=0, eos_token_id=0, initializer_range=0.3)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return str(folder)
