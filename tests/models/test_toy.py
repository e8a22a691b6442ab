"""The toy transformer's logits: against loops, against TransformerLens, and through time."""

import numpy as np
import pytest
import torch
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge.sources.native import boot as boot_native
from transformer_lens.utilities.tl_checkpoint_conversion import convert_tl_checkpoint

from tests.oracles.transformer_by_loops import ByLoops

ACTIVATIONS = ["relu", "gelu", "silu", "solu"]
NORMALIZATIONS = ["LN", "RMS", "none"]
BLOCKS = pytest.mark.parametrize("attn_only", [False, True], ids=["with_mlp", "attn_only"])


@BLOCKS
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_logits_equal_those_of_plain_loops_over_heads(toy, tokens, normalization, activation, attn_only):
    model = toy(normalization=normalization, activation=activation, attn_only=attn_only)
    with torch.no_grad():
        ours = model(tokens).numpy()
    np.testing.assert_allclose(ours, ByLoops(model)(tokens), rtol=0, atol=1e-12)


@BLOCKS
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_logits_equal_those_of_transformer_lens_on_the_same_weights(
    toy, tokens, normalization, activation, attn_only
):
    model = toy(normalization=normalization, activation=activation, attn_only=attn_only, d_head=2)
    shapes = {
        name: getattr(model.config, name)
        for name in ("n_layers", "n_heads", "d_model", "d_head", "d_mlp", "n_ctx")
    }
    config = TransformerBridgeConfig(
        **shapes,
        d_vocab=model.cfg.d_vocab,
        act_fn=activation,
        attn_only=attn_only,
        normalization_type=None if normalization == "none" else normalization,
        seed=0,
    )
    theirs = boot_native(config, dtype=torch.float64).eval()
    theirs.load_state_dict(convert_tl_checkpoint(model.state_dict(), config), strict=True)
    with torch.no_grad():
        tolerance = 1e-5 if normalization == "RMS" else 1e-12  # its RMSNorm divides in fp32
        torch.testing.assert_close(model(tokens), theirs(tokens), rtol=0, atol=tolerance)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("changed", [1, 2, 3])
def test_a_token_changes_its_own_and_later_logits_but_no_earlier_ones(toy, tokens, normalization, changed):
    model = toy(normalization=normalization)
    other = tokens.clone()
    other[:, changed] = (other[:, changed] + 1) % 6
    with torch.no_grad():
        before, after = model(tokens), model(other)
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert (before[:, changed:] != after[:, changed:]).any(-1).all()


def test_a_prefix_has_the_logits_it_has_within_the_whole(toy, tokens):
    model = toy()
    with torch.no_grad():
        torch.testing.assert_close(model(tokens[:, :2]), model(tokens)[:, :2], rtol=0, atol=1e-14)


def test_the_order_of_earlier_tokens_matters(toy):
    model = toy()
    with torch.no_grad():
        logits = model(torch.tensor([[0, 1, 2, 3], [1, 0, 2, 3]]))
    assert (logits[0, -1] - logits[1, -1]).abs().max() > 1e-3


def test_rows_of_a_batch_do_not_see_each_other(toy, tokens):
    model = toy()
    with torch.no_grad():
        alone = torch.cat([model(row[None]) for row in tokens])
        torch.testing.assert_close(model(tokens), alone, rtol=0, atol=1e-14)


def test_a_sequence_longer_than_the_context_is_refused_with_both_lengths(toy):
    with pytest.raises(ValueError, match=r"5 tokens, but the model's context holds 4"):
        toy()(torch.zeros(1, 5, dtype=torch.int64))
