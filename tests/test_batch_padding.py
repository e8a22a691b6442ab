"""Prompts of different length in one padded batch give what each gives alone."""

from dataclasses import replace

import pytest
import torch

import dynamics as dy
from dynamics import measures
from dynamics.batch import Batch, concatenate, output_of
from dynamics.sites import Site
from tests.zoo.hugging_face import gpt2, llama, neox, of_config

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
LENGTHS = (3, 6, 4)
MODELS = {
    "gpt2": (gpt2, "transformer.h.0"),
    "neox": (neox, "gpt_neox.layers.0"),
    "llama": (llama, "model.layers.0"),
    "opt": (
        lambda: of_config(
            "OPT",
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=16,
            ffn_dim=24,
            max_position_embeddings=16,
        ),
        "model.decoder.layers.0",
    ),
}


def prompts(seed):
    """One batch for each prompt, without padding; the last token is scored."""
    draws = torch.Generator().manual_seed(seed)
    return [
        Batch(
            torch.randint(1, 11, (1, n), generator=draws),
            torch.tensor([n - 1]),
            torch.randint(11, (1,), generator=draws),
            torch.randint(11, (1, 2), generator=draws),
        )
        for n in LENGTHS
    ]


def padded(each, side):
    """All in one batch, with zeros on a side."""
    longest, rows = max(LENGTHS), []
    for batch in each:
        missing = longest - batch.tokens.shape[1]
        amounts = (missing, 0) if side == "left" else (0, missing)
        mask = torch.ones_like(batch.tokens)
        rows.append(
            replace(
                batch,
                tokens=torch.nn.functional.pad(batch.tokens, amounts),
                attention_mask=torch.nn.functional.pad(mask, amounts),
                target_pos=batch.target_pos + amounts[0],
            )
        )
    return concatenate(rows)


@pytest.fixture(params=MODELS)
def known(request):
    build, block = MODELS[request.param]
    model = build().eval().float()  # eager attention gives NaN for padding in double precision
    return dy.Recipe(model, measures.cross_entropy), block


@pytest.mark.parametrize("side", ["left", "right"])
def test_measures_and_caches_of_a_padded_batch_are_those_of_each_row_alone(known, side):
    recipe, block = known
    alone = prompts(0)
    together = padded(alone, side)
    for measure in (measures.correct_log_prob, measures.logit_difference):
        expected = torch.cat([measure(recipe.model, one) for one in alone])
        torch.testing.assert_close(measure(recipe.model, together), expected, **CLOSE)
    kept = dy.cache(recipe, None, together, block).activations[block]
    for row, one in enumerate(alone):
        own = kept[row][together.attention_mask[row].bool()]
        torch.testing.assert_close(own, dy.cache(recipe, None, one, block).activations[block][0], **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_without_the_mask_padding_is_read(known, side):
    recipe, _ = known
    together = padded(prompts(0), side)
    blind = replace(together, attention_mask=None)
    seeing, blinded = (measures.correct_log_prob(recipe.model, b).detach() for b in (together, blind))
    assert (float((seeing - blinded).abs().max()) > 1e-3) == (side == "left")


def test_an_activation_counted_from_the_end_is_exchanged_as_in_each_row_alone(known):
    recipe, block = known
    place = Site("second to last", {block: (slice(None), -2)})
    base, source = prompts(0), prompts(1)

    def patched(one, other):
        contrast = dy.Contrast(one, other, one)
        found = dy.patch_activations(recipe, None, [contrast], [place], measures.correct_log_prob)
        return float(found["patched"].item())

    alone = [patched(one, other) for one, other in zip(base, source, strict=True)]
    together = patched(padded(base, "left"), padded(source, "left"))
    assert together == pytest.approx(sum(alone) / len(alone), rel=1e-5)


def test_the_mask_is_a_column_like_the_others():
    together = padded(prompts(0), "left")
    assert together[1:].attention_mask.tolist() == together.attention_mask[1:].tolist()
    assert "attention_mask=int64[3, 6]" in repr(together)
    with pytest.raises(ValueError, match="only some of the batches have attention_mask"):
        concatenate([together, replace(together, attention_mask=None)])


def test_a_model_without_padding_gets_its_tokens_alone():
    seen = []
    output_of(lambda *given, **named: seen.append((given, named)), replace(prompts(0)[0]))
    assert [(len(given), named) for given, named in seen] == [(1, {})]
