"""The benchmark of the verbs: its loop is the seed's, both ways agree, its tables say what was found."""

import json
from dataclasses import replace
from pkgutil import resolve_name

import pytest
import torch

import dynamics as dy
from dynamics.config import AliasConfig, PhaseConfig, PhasesConfig, StudyConfig, ToyConfig
from scripts.benchmarks import patching_parts as parts
from scripts.benchmarks import patching_speed as script
from scripts.benchmarks import seed_loop, suite_costs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bench():
    config = StudyConfig(
        task=AliasConfig(modulus=8, multipliers=(2, 3, 4), train_multipliers=2),
        model=ToyConfig(n_heads=2, d_model=16, d_head=8, d_mlp=16, dtype="float64"),
        phases=PhasesConfig(pretrain=PhaseConfig(20), x1=PhaseConfig(20), x2=PhaseConfig(20)),
        patching=replace(StudyConfig().patching, x2_steps=(0, 10)),
    )
    return script.Bench.of(config)


def test_the_verbs_and_the_seeds_loop_agree_in_double_precision(bench):
    torch.set_num_threads(1)
    for row in script.rows(bench, "toy"):
        found = script.compared(bench, row, "toy", repeats=1)
        if row.verb == "attribute_step":
            assert found["agreement"] > 0.9
        else:
            assert found["agreement"] < 1e-10
        assert found["sites"] == len(row.sites) * len(row.contrasts)


def test_the_loop_patches_something_and_clips(bench):
    sites = dy.sites.matrices(bench.recipe.model)[:4]
    first = bench.contrasts[:1]
    given = (bench.recipe, bench.state, first, sites, dy.measures.correct_logit)
    values = list(seed_loop.patched("patch_gradients", *given))
    assert len(set(values)) == len(values)
    norm = sum(
        g.square().sum() for g in seed_loop.backward(bench.recipe, bench.recipe.model, first[0].base).values()
    )
    assert norm**0.5 > bench.recipe.clip.max_norm


def test_the_parts_of_a_call_are_within_it_and_none_counts_twice(bench):
    torch.set_num_threads(1)
    expected = {
        "patch_gradients": {"gradients", "references", "steps", "measure"},
        "patch_updates": {"gradients", "references", "measure"},
        "patch_signals": {"gradients", "references", "backward from the sites", "steps", "measure"},
        "attribute_step": {"gradients", "references", "slopes"},
    }
    for row in script.rows(bench, "toy")[:-1]:
        with parts.taken_apart() as spent:
            whole = script.timed(lambda row=row: script.ours(bench, row))[0]
        assert set(spent) == expected[row.verb], row.name
        assert 0 < sum(spent.values()) < whole


def undated(found):
    """Without the second in which it was made."""
    facts = json.loads(found.attrs["provenance"])
    return found.assign_attrs(provenance=json.dumps({k: v for k, v in facts.items() if k != "date"}))


def test_taking_a_call_apart_leaves_the_verbs_as_they_were(bench):
    row = script.rows(bench, "toy")[0]
    before = [resolve_name(name) for places in parts.PARTS.values() for name in places]
    with parts.taken_apart():
        watched = script.ours(bench, row)
    assert before == [resolve_name(name) for places in parts.PARTS.values() for name in places]
    assert undated(watched).identical(undated(script.ours(bench, row)))


def test_the_floor_and_what_the_goal_leaves_are_in_the_table_of_parts(bench):
    row = replace(script.rows(bench, "toy")[2], name="`patch_updates`")
    found = parts.taken(bench, row, "toy", repeats=1)
    assert found["whole"] == pytest.approx(sum(found["parts"].values()))
    assert 0 < found["floor"] < found["whole"]
    known = {**found, "loop": 400.0, "floor": 8.0, "whole": 50.0, "sites": 46}
    text = parts.table({"toy": [known]}, {"toy": {"`patch_updates`": 20}}, 1)
    assert "| toy 2 x 128: `patch_updates`, 46 sites | 20 | 50 |" in text
    assert "| 8 | 50.0x |" in text


def test_ratios_agreement_and_slopes_are_in_the_table(tmp_path):
    rows = [
        {"row": "`patch_updates`", "sites": 4, "ours_ms": 2.0, "loop_ms": 9.0, "goal": 20, "agreement": 3e-7},
        {
            "row": "`attribute_step`",
            "sites": 4,
            "ours_ms": 0.5,
            "loop_ms": 9.0,
            "goal": 150,
            "agreement": 0.98,
        },
    ]
    part = {
        "size": "toy",
        "device": "1 thread",
        "parameters": 2**20,
        "floor_ms": 0.5,
        "gflops": 90.0,
        "rows": rows,
        "repeats": 3,
    }
    curve = {"n": [1, 2, 4], "seconds": [1.0, 2.0, 4.0], "slope": 1.0}
    slopes = {axis: {"patch_updates": curve} for axis in ("sites", "contrasts", "parameters")}
    memory = {"toy": {"patch_updates": dict.fromkeys(script.MEMORY, 12.0)}}
    text = script.table([part], memory, slopes)
    assert "| `patch_updates` | 4.5x (2 of 9 ms; goal 20x) | not measured |" in text
    assert "| `attribute_step` | 18.0x (0.5 of 9 ms; goal 150x) | not measured |" in text
    assert "agree to 3e-07" in text
    assert "at least 0.98" in text
    assert "| toy 2 x 128: `patch_updates` | 4 | 12 | 12 | 512 |" in text
    on_gpu = {**part, "device": "GPU", "rows": [{**row, "gpu_mb": 7.0} for row in rows]}
    text = script.table([part, on_gpu], memory, slopes)
    assert "| toy 2 x 128, 1 thread | toy 2 x 128, GPU |" in text
    assert "4.5x (2 of 9 ms; goal 20x; 7 MB) |" in text
    assert "not measured" not in text
    script.picture(slopes, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size > 1000
    (tmp_path / "benchmark.json").write_text(json.dumps({"tables": [part]}))
    assert part["floor_ms"] / rows[0]["ours_ms"] == 0.25


def test_costs_of_the_suite_are_operations_over_rate_plus_bytes_over_bandwidth():
    model = suite_costs.Model("one", 1e9, 2, 3)
    assert model.sites == 10
    forward, backward = 2 * 1e9 * suite_costs.PROBE_TOKENS, 2 * 6 * 1e9 * suite_costs.BATCH_TOKENS
    expected = (backward + 14 * forward) / suite_costs.FLOPS + (3 * 28e9 + 10 * 4e9) / suite_costs.BANDWIDTH
    assert suite_costs.seconds(model, "patch_updates", 0.5) == pytest.approx(expected / 0.5)
    text = suite_costs.table(0.25)
    assert "| `attribute_step`, first order |" in text
    assert "at 25 % of its data sheet" in text
