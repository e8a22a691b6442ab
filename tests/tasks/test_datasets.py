"""Prompts of one's own as contrasts, what a model takes to come next, and a measure of each letter."""

import numpy as np
import pytest
import torch

import dynamics as dy
from dynamics import measures
from dynamics.config import AcronymsRun, ToyConfig
from dynamics.models.toy import ToyTransformer
from dynamics.tasks import PromptError, Vocabulary, acronyms, prompt_contrasts, top_answers

WORDS = Vocabulary.of("hot is to cold as big tall small short up down")


class Opposites:
    """A task of one's own."""

    measure = dy.measures.logit_difference

    def pairs(self):
        return [
            ("hot is to cold as big is to", "hot is to cold as tall is to"),
            ("hot is to cold as up is to", "hot is to cold as down is to"),
        ]

    def target_tokens(self, pair):
        return [(" small", " short"), (" down", " up")][pair]


def toy(d_vocab=None, n_ctx=8):
    shape = {"n_layers": 2, "n_heads": 2, "d_model": 16, "d_head": 8, "d_mlp": 16, "n_ctx": n_ctx}
    return ToyTransformer(ToyConfig(**shape, dtype="float64", seed=0), d_vocab or len(WORDS))


# --- a dataset of one's own -------------------------------------------------------------------------------


def test_a_dataset_of_ones_own_is_contrasts_whose_base_is_corrupted():
    found = prompt_contrasts(Opposites(), WORDS)
    for i, (contrast, (clean, corrupted)) in enumerate(zip(found, Opposites().pairs(), strict=True)):
        right, wrong = Opposites().target_tokens(i)
        for batch, text in ((contrast.base, corrupted), (contrast.source, clean)):
            assert WORDS.decode(batch.tokens[0].tolist()) == text
            assert batch.target_pos.tolist() == [7]
            assert WORDS.decode(batch.targets.tolist()) == right.strip()
            assert WORDS.decode(batch.distractors[0].tolist()) == wrong.strip()
        assert contrast.coords == {
            "example": f"pair {i}", "clean": clean, "corrupted": corrupted, "answer": right,
        }  # fmt: skip


def test_it_is_patched_and_its_effects_are_normalised_by_pair_and_by_population():
    model = toy()
    contrasts = prompt_contrasts(Opposites(), WORDS)
    chosen = dy.sites.activations(model, "blocks.*.hook_resid_pre", ("layer", "pos"), contrasts[0].base)
    found = dy.patch_activations(dy.Recipe(model), None, contrasts, chosen, Opposites.measure)
    with torch.no_grad():
        for i, contrast in enumerate(contrasts):
            logits = model(contrast.source.tokens)[0, -1]
            by_hand = logits[contrast.source.targets[0]] - logits[contrast.source.distractors[0, 0]]
            assert found["source"].values[i] == pytest.approx(float(by_hand), abs=1e-12)
    gap = (found["source"] - found["base"]).values
    pairwise = dy.statistics.pairwise_recovery(found).sel(site="resid_pre 0 @5")
    np.testing.assert_allclose(pairwise, 1.0, atol=1e-9)  # the only token that differs
    population = dy.statistics.recovery(found["effect"].sel(site="resid_pre 1 @7").values, gap).estimate
    if np.isfinite(population):
        expected = found["effect"].sel(site="resid_pre 1 @7").values.mean() / gap.mean()
        assert population == pytest.approx(expected)


@pytest.mark.parametrize(
    ("pair", "answers", "says"),
    [
        (("hot is to", "hot is"), (" small", " short"), "'hot is to' has 3 tokens"),
        (("hot is to", "big is to"), (" small short", " up"), "is 2 tokens"),
    ],
)
def test_prompts_that_do_not_fit_are_named(pair, answers, says):
    class Broken(Opposites):
        def pairs(self):
            return [pair]

        def target_tokens(self, pair):
            return answers

    with pytest.raises(PromptError, match=says):
        prompt_contrasts(Broken(), WORDS)


# --- the likeliest answers --------------------------------------------------------------------------------


def test_top_answers_are_the_models_distribution_with_the_answer_marked():
    model, prompt = toy().train(), "hot is to cold as"
    with torch.no_grad():
        p = model.eval()(torch.tensor([WORDS.encode(prompt)]))[0, -1].softmax(-1)
    model.train()
    order = p.argsort(descending=True).tolist()
    answer = WORDS.words[order[5]]
    found = top_answers(model, prompt, WORDS, f" {answer}", n=3)
    assert found["rank"].tolist() == [0, 1, 2, 5]
    assert found["token"].tolist() == [WORDS.words[t] for t in (*order[:3], order[5])]
    np.testing.assert_allclose(found["probability"], p[[*order[:3], order[5]]], rtol=1e-12)
    assert found["answer"].tolist() == [False, False, False, True]
    assert model.training
    inside = top_answers(model, prompt, WORDS, WORDS.words[order[1]], n=3)
    assert inside["rank"].tolist() == [0, 1, 2]
    assert inside["answer"].tolist() == [False, True, False]
    assert len(top_answers(model, prompt, WORDS, n=1000)) == len(WORDS)


def test_an_answer_of_two_tokens_and_a_model_without_words_are_refused():
    with pytest.raises(ValueError, match=r"' big up' is 2 tokens .*; it must be one"):
        top_answers(toy(), "hot is", WORDS, " big up")
    with pytest.raises(ValueError, match="ToyTransformer has no tokenizer; give tokenizer="):
        top_answers(toy(), "hot is")


# --- letter by letter -------------------------------------------------------------------------------------


def test_each_letter_is_measured_on_its_own_rows_whether_prompts_run_together_or_alone():
    task = acronyms.AcronymsTask(AcronymsRun())
    model = toy(task.d_vocab, 7)
    contrasts = task.contrasts("words", 5)
    chosen = dy.sites.activations(model, "blocks.*.attn.hook_z", ("layer", "head"), contrasts[0].base)
    by_letter = acronyms.by_letter()
    together = dy.patch_activations(dy.Recipe(model), None, contrasts, chosen, by_letter)
    assert together["measure"].values.tolist() == ["letter 1", "letter 2", "letter 3"]
    assert set(together["units"].values) == {"logit"}
    for i, contrast in enumerate(contrasts):
        alone = dy.patch_activations(dy.Recipe(model), None, [contrast], chosen, by_letter)
        np.testing.assert_allclose(
            together["patched"].isel(example=i), alone["patched"].isel(example=0), rtol=0, atol=1e-12
        )
        with torch.no_grad():
            margins = measures.logit_margin(model, contrast.base)
        np.testing.assert_allclose(together["base"].isel(example=i), margins, rtol=0, atol=1e-12)
        logits = model(contrast.base.tokens).detach()
        for place, letter in enumerate(contrast.base.targets.tolist()):
            capitals = [
                t for t, word in enumerate(task.vocabulary.words) if len(word) == 1 and word.isupper()
            ]
            others = [t for t in capitals if t != letter]
            assert len(others) == 25
            by_hand = logits[place, 4 + place, letter] - logits[place, 4 + place, others].max()
            assert margins[place].item() == pytest.approx(by_hand.item(), abs=1e-12)
