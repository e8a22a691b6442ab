"""Trajectories from files that others wrote: every bit, the model's own names, and nothing half done."""

import json
import os
import sys
import weakref
from collections import OrderedDict
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import nn

from checkpoints import Checkpoint, Trajectory, TrajectoryError, TrajectoryWriter, conversion
from checkpoints.values import differences, same_bits


def mixed(seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors of many types; NaN with a payload, a signed zero, one of no axes, one without elements."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "half.weight": torch.randn(3, 2, generator=generator).bfloat16(),
        "odd": torch.tensor([0x7FC00001, -(2**31)], dtype=torch.int32).view(torch.float32),
        "scale": torch.tensor(2.5 + seed, dtype=torch.float64),
        "none": torch.empty(0, 4),
        "n_batches": torch.tensor(seed),
        "mask": torch.tensor([True, False]),
        "bytes": torch.arange(5, dtype=torch.uint8),
    }


@pytest.fixture
def steps(tmp_path) -> Path:
    """A folder with `name_step_499_.pt`, `name_step_550_.pt` and `name_step_1000_.pt`."""
    folder = tmp_path / "steps"
    folder.mkdir()
    for step in (499, 550, 1000):
        torch.save(mixed(step), folder / f"120_6layer_MLP_fixed_6val_step_{step}_.pt")
    return folder


def stored(run: Trajectory, step: int) -> dict[str, torch.Tensor]:
    checkpoint = run.at(step)
    return {**checkpoint.parameters, **checkpoint.buffers}


# --- state dicts ------------------------------------------------------------------------------------------


def test_every_bit_of_a_state_dict_is_kept_and_the_step_is_in_its_name(steps, tmp_path):
    run = Trajectory.from_state_dicts(steps, tmp_path / "run", config={"seed": 3})
    assert run.steps == (499, 550, 1000)
    assert run.verify() == []
    assert run.config == {"seed": 3}
    for step in run.steps:
        assert differences(stored(run, step), mixed(step)) == []
    first = run.at(499)
    assert list(first.buffers) == ["n_batches", "mask", "bytes"]
    assert (first.optimizer, first.scheduler, first.rng, first.fingerprint) == (None, None, None, {})
    declared = first.with_fresh_optimizer()
    assert (declared.optimizer.groups, declared.optimizer.state) == ((), {})


def test_provenance_says_where_each_checkpoint_came_from(steps, tmp_path):
    import hashlib

    provenance = Trajectory.from_state_dicts(steps, tmp_path / "run").provenance["imported"]
    assert provenance["kind"] == "state_dicts"
    assert provenance["tensors"]["parameters/half.weight"] == "bfloat16 [3, 2]"
    (file,) = provenance["sources"][1]["files"]
    path = Path(file["path"])
    assert path.name == "120_6layer_MLP_fixed_6val_step_550_.pt"
    assert file["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert file["bytes"] == path.stat().st_size


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_an_export_is_what_was_imported_bit_for_bit(steps, tmp_path, suffix):
    run = Trajectory.from_state_dicts(steps, tmp_path / "run")
    file = tmp_path / "new" / f"model{suffix}"
    run.export(550, file)
    again = torch.load(file, weights_only=True) if suffix == ".pt" else load_file(file)
    assert differences({name: again[name] for name in mixed()}, mixed(550)) == []
    assert len(again) == len(mixed())


@pytest.mark.parametrize(
    ("name", "step", "expected"),
    [
        ("name_step_499_.pt", None, 499),
        ("2layer-000120.v2.pt", None, 2),
        ("2layer-000120.v2.pt", r"-(\d+)", 120),
        ("2layer-000120.v2.pt", r"\d{6}", 120),
        ("model_7.pt", lambda path: 1 + int(Path(path).stem.split("_")[1]), 8),
        ("checkpoint-30/model.pt", r"checkpoint-(\d+)/", 30),
    ],
)
def test_the_step_is_the_last_integer_of_the_name_or_what_a_pattern_or_function_says(
    tmp_path, name, step, expected
):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    torch.save({"w": torch.ones(2)}, path)
    assert Trajectory.from_state_dicts(path, tmp_path / "run", step=step).steps == (expected,)


@pytest.mark.parametrize("step", [None, "step_([0-9]+)", "model_(x)", "("])
def test_a_name_without_a_step_asks_for_a_rule(tmp_path, step):
    torch.save({"w": torch.ones(2)}, tmp_path / "model_x.pt")
    with pytest.raises(TrajectoryError, match=r"model_x\.pt' does not say its step: .* Give step="):
        Trajectory.from_state_dicts(tmp_path / "model_x.pt", tmp_path / "run", step=step)


def test_files_folders_and_globs_may_be_given_together(steps, tmp_path):
    torch.save(mixed(7), tmp_path / "other-7.pt")
    run = Trajectory.from_state_dicts(
        [
            str(steps / "*_step_5*.pt"),
            tmp_path / "other-7.pt",
            steps / "120_6layer_MLP_fixed_6val_step_499_.pt",
        ],
        tmp_path / "run",
    )
    assert run.steps == (7, 499, 550)


def test_names_for_the_same_memory_are_tied_under_the_first(tmp_path):
    weight = torch.randn(4, 2)
    state = {
        "embed": weight,
        "head": weight,
        "row": weight[1],
        "transposed": weight.t(),
        "count": torch.tensor(1),
    }
    torch.save(state, tmp_path / "m-1.pt")
    run = Trajectory.from_state_dicts(tmp_path / "m-1.pt", tmp_path / "run")
    assert list(run.at(1).parameters) == ["embed", "row", "transposed"]
    assert run.provenance["imported"]["tied"] == {"head": "embed"}
    run.export(1, tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert differences(back, {name: state[name] for name in back}) == []
    assert back.keys() == state.keys()
    assert back["head"].data_ptr() == back["embed"].data_ptr()


def test_a_prefix_is_stripped_and_what_is_ignored_left_out(tmp_path):
    state = {"model.w": torch.ones(2), "model.b": torch.zeros(2), "metric.total": torch.ones(())}
    torch.save({"model": state, "epoch": 3}, tmp_path / "m-1.pt")
    settings = {"key": "model", "prefix": "model."}
    with pytest.raises(
        TrajectoryError, match=r"'metric.total' do not begin with prefix='model\.'; .*'metric', 'model'"
    ):
        Trajectory.from_state_dicts(tmp_path / "m-1.pt", tmp_path / "run", **settings)
    run = Trajectory.from_state_dicts(tmp_path / "m-1.pt", tmp_path / "run", ignore="metric.*", **settings)
    assert list(run.at(1).parameters) == ["w", "b"]
    assert run.provenance["imported"]["left_out"] == ["metric.total"]


# --- with a model -----------------------------------------------------------------------------------------


def test_a_model_tells_buffers_from_parameters_and_lends_those_that_are_not_stored(tmp_path, tiny):
    trained = tiny(seed=4)
    torch.save(trained.state_dict(), tmp_path / "m-4.pt")
    model = tiny(seed=4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run = Trajectory.from_state_dicts(tmp_path / "m-4.pt", tmp_path / "run", model=model)
    expected = Checkpoint.capture(trained, step=4)
    assert run.at(4).differences(expected) == []
    assert list(run.at(4).parameters) == list(expected.parameters)
    assert run.provenance["imported"]["lent"] == ["scale"]
    assert run.provenance["imported"]["tied"] == {"unembed.weight": "embed.weight"}
    assert differences(dict(model.state_dict()), before) == []
    run.at(4).restore(tiny(seed=5))


def test_without_a_model_floating_buffers_are_parameters_and_restoring_says_so(tmp_path, tiny):
    torch.save(tiny().state_dict(), tmp_path / "m-4.pt")
    checkpoint = Trajectory.from_state_dicts(tmp_path / "m-4.pt", tmp_path / "run").at(4)
    assert "norm.running_mean" in checkpoint.parameters
    assert list(checkpoint.buffers) == ["norm.num_batches_tracked"]
    assert "unembed.weight" not in checkpoint.parameters
    with pytest.raises(ValueError, match=r"has \['norm.running_mean', .* the model does not"):
        checkpoint.restore(tiny())


def test_an_export_loads_strictly_into_the_model(tmp_path, tiny):
    torch.save(tiny(seed=4).state_dict(), tmp_path / "m-4.pt")
    run = Trajectory.from_state_dicts(tmp_path / "m-4.pt", tmp_path / "run", model=tiny())
    run.export(4, tmp_path / "back.pt")
    other = tiny(seed=9)
    other.load_state_dict(torch.load(tmp_path / "back.pt", weights_only=True), strict=True)
    assert differences(dict(other.state_dict()), dict(tiny(seed=4).state_dict())) == []


@pytest.mark.parametrize("kept", ["embed.weight", "unembed.weight"])
def test_a_tied_tensor_may_be_stored_under_any_of_its_names(tmp_path, tiny, kept):
    model = tiny(seed=4)
    state = {name: t for name, t in model.state_dict().items() if name == kept or "embed.weight" not in name}
    save_file(state, tmp_path / "m-4.safetensors")
    run = Trajectory.from_safetensors(tmp_path / "m-4.safetensors", tmp_path / "run", model=tiny())
    assert same_bits(run.at(4).parameters["embed.weight"], model.embed.weight)
    assert "unembed.weight" not in run.at(4).parameters


def test_tied_names_that_differ_are_refused(tmp_path, tiny):
    state = dict(tiny().state_dict())
    state["unembed.weight"] = state["unembed.weight"] + 1
    torch.save(state, tmp_path / "m-4.pt")
    with pytest.raises(
        TrajectoryError, match=r"embed\.weight and unembed\.weight are one tensor in the model and"
    ):
        Trajectory.from_state_dicts(tmp_path / "m-4.pt", tmp_path / "run", model=tiny())


def test_a_wider_models_dtype_is_taken_and_a_narrower_ones_only_where_it_is_exact(tmp_path):
    torch.save({"weight": torch.randn(2, 2).bfloat16(), "bias": torch.ones(2)}, tmp_path / "m-1.pt")
    run = Trajectory.from_state_dicts(tmp_path / "m-1.pt", tmp_path / "wide", model=nn.Linear(2, 2).double())
    saved = torch.load(tmp_path / "m-1.pt", weights_only=True)
    assert same_bits(run.at(1).parameters["weight"], saved["weight"].double())
    exact = Trajectory.from_state_dicts(
        tmp_path / "m-1.pt", tmp_path / "exact", model=nn.Linear(2, 2).bfloat16()
    )
    assert same_bits(exact.at(1).parameters["bias"], torch.ones(2).bfloat16())
    torch.save({"weight": saved["weight"], "bias": torch.full((2,), 0.1)}, tmp_path / "m-2.pt")
    with pytest.raises(
        TrajectoryError, match=r"bias is torch.float32, which the model's torch.bfloat16 does not"
    ):
        Trajectory.from_state_dicts(tmp_path / "m-2.pt", tmp_path / "run", model=nn.Linear(2, 2).bfloat16())


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"weight": torch.ones(3, 2)}, r"m-1\.pt: it does not fit the model: bias is missing\."),
        ({"weight": torch.ones(2, 3), "bias": torch.ones(3)}, r"weight is \(2, 3\), in the model \(3, 2\)"),
        (
            {"weight": torch.ones(3, 2), "bias": torch.ones(3), "gain": torch.ones(3)},
            r"the model has no 'gain' \(prefix= strips, ignore= leaves out\)",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_named(tmp_path, state, message):
    torch.save(state, tmp_path / "m-1.pt")
    with pytest.raises(TrajectoryError, match=message):
        Trajectory.from_state_dicts(tmp_path / "m-1.pt", tmp_path / "run", model=nn.Linear(2, 3))
    assert not (tmp_path / "run").exists()


# --- what is refused --------------------------------------------------------------------------------------


class Runs:
    """Its pickle calls a function when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def save_each(folder, **contents):
    for name, content in contents.items():
        torch.save(content, folder / f"{name}.pt")


W = {"w": torch.ones(2)}
REFUSED = {
    "no files": ({}, "holds no .pt or .pth files"),
    "two of one step": ({"a_1": W, "b_1": W}, r"a_1\.pt and .*b_1\.pt are both of step 1; leave one"),
    "a missing name": (
        {"m_1": {**W, "b": torch.ones(1)}, "m_2": W},
        r"m_2.pt is not of .*m_1.pt: parameters/b is missing",
    ),
    "a name too many": (
        {"m_1": W, "m_2": {**W, "b": torch.ones(1)}},
        r"parameters/b is float32 \[1\], there missing",
    ),
    "another shape": (
        {"m_1": W, "m_2": {"w": torch.ones(3)}},
        r"parameters/w is float32 \[3\], there float32 \[2\]",
    ),
    "another dtype": (
        {"m_1": W, "m_2": {"w": torch.ones(2).half()}},
        r"w is float16 \[2\], there float32 \[2\]",
    ),
    "code": (
        {"m_1": {**W, "x": Runs()}},
        r"m_1.pt holds more than tensors .*mkdir, which could run code.*safe_globals",
    ),
    "a whole model": (
        {"m_1": nn.Linear(1, 1)},
        "holds more than tensors and plain values: torch.nn.modules.linear.Linear",
    ),
    "a number": ({"m_1": 3}, "holds a int, expected a dict of names -> tensors"),
    "a list of tensors": ({"m_1": [torch.ones(1)]}, "holds a list, expected"),
    "numbers as names": ({"m_1": {0: torch.ones(1)}}, "holds a dict, expected a dict of names"),
    "nested": (
        {"m_1": {"model": W, "epoch": 3}},
        r"'model', 'epoch': expected names -> tensors, .* name it: key='model'",
    ),
    "nothing in it": ({"m_1": OrderedDict()}, "holds no tensors"),
    "not to be stored": ({"m_1": {"w": torch.ones(2).to(torch.float8_e4m3fn)}}, "cannot be stored"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_become_a_trajectory_is_refused_before_anything_is_written(tmp_path, monkeypatch, why):
    monkeypatch.chdir(tmp_path)
    contents, message = REFUSED[why]
    (tmp_path / "in").mkdir()
    save_each(tmp_path / "in", **contents)
    with pytest.raises(TrajectoryError, match=message) as raised:
        Trajectory.from_state_dicts(tmp_path / "in", tmp_path / "run")
    assert "\n" not in str(raised.value)
    assert os.listdir(tmp_path) == ["in"]


def test_old_pickles_are_read_as_safely(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(W, "m_1.pt", _use_new_zipfile_serialization=False)
    torch.save({**W, "x": Runs()}, "m_2.pt", _use_new_zipfile_serialization=False)
    assert same_bits(Trajectory.from_state_dicts("m_1.pt", "run").at(1).parameters["w"], W["w"])
    with pytest.raises(TrajectoryError, match="could run code"):
        Trajectory.from_state_dicts("m_2.pt", "other")
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"hello world", lambda b: b[9:]]
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_damaged_file_is_named(tmp_path, damage, suffix):
    path = tmp_path / f"m_1{suffix}"
    torch.save(W, path) if suffix == ".pt" else save_file(W, path)
    path.write_bytes(damage(path.read_bytes()))
    read = Trajectory.from_state_dicts if suffix == ".pt" else Trajectory.from_safetensors
    with pytest.raises(TrajectoryError, match=r"m_1\.(pt|safetensors) is no"):
        read(path, tmp_path / "run")


def test_paths_that_lead_nowhere_and_empty_lists_are_refused(tmp_path):
    for paths, message in ((tmp_path / "absent.pt", "leads to no file"), ([], "nothing to import")):
        with pytest.raises(TrajectoryError, match=message):
            Trajectory.from_state_dicts(paths, tmp_path / "run")
    torch.save(W, tmp_path / "m_1.pt")
    with pytest.raises(TrajectoryError, match=r"no entry 'model'; it has 'w'"):
        Trajectory.from_state_dicts(tmp_path / "m_1.pt", tmp_path / "run", key="model")


# --- one at a time, and going on --------------------------------------------------------------------------


class Stopped(Exception):
    """The process ended here."""


def stopping(after):
    """A progress that stops the conversion after some checkpoints; looking at them is let through."""
    calls = []

    def progress(sources):
        calls.append(sources)
        for i, source in enumerate(sources):
            if len(calls) == 2 and i == after:
                raise Stopped
            yield source

    return progress


def test_an_interrupted_import_goes_on_even_from_files_that_were_moved(steps, tmp_path):
    with pytest.raises(Stopped):
        Trajectory.from_state_dicts(steps, tmp_path / "run", progress=stopping(2))
    partly = Trajectory.open(tmp_path / "run")
    assert partly.steps == (499, 550)
    assert partly.verify() == []
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run/trajectory").iterdir()}
    steps.rename(tmp_path / "moved")
    seen = []

    def progress(sources):
        seen.append(list(sources))
        return sources

    run = Trajectory.from_state_dicts(tmp_path / "moved", tmp_path / "run", progress=progress)
    assert run.steps == (499, 550, 1000)
    assert run.verify() == []
    assert seen[1] == [1000]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert differences(stored(run, 1000), mixed(1000)) == []


def test_a_finished_import_is_left_as_it_is(steps, tmp_path):
    Trajectory.from_state_dicts(steps, tmp_path / "run")
    manifest = (tmp_path / "run/manifest.json").read_bytes()
    assert len(Trajectory.from_state_dicts(steps, tmp_path / "run")) == 3
    assert (tmp_path / "run/manifest.json").read_bytes() == manifest


def test_another_source_another_setting_or_another_run_is_refused(steps, tmp_path, files):
    Trajectory.from_state_dicts(steps, tmp_path / "run", config={"seed": 1})
    before = {name: (tmp_path / "run" / name).read_bytes() for name in files(tmp_path / "run")}
    other = tmp_path / "other"
    other.mkdir()
    for path in steps.iterdir():
        state = torch.load(path, weights_only=True)
        torch.save({**state, "scale": state["scale"] + 1}, other / path.name)
    for paths, settings in (
        (other, {"config": {"seed": 1}}),
        (steps, {"config": {"seed": 2}}),
        (steps, {"config": {"seed": 1}, "ignore": ["mask"]}),
        (steps / "*499*", {"config": {"seed": 1}}),
    ):
        with pytest.raises(
            TrajectoryError, match=r"other files or with other settings\. Nothing was changed"
        ):
            Trajectory.from_state_dicts(str(paths), tmp_path / "run", **settings)
    assert before == {name: (tmp_path / "run" / name).read_bytes() for name in files(tmp_path / "run")}
    TrajectoryWriter.create(tmp_path / "own", {}).close()
    with pytest.raises(TrajectoryError, match="holds another run"):
        Trajectory.from_state_dicts(steps, tmp_path / "own")


def test_one_checkpoint_is_in_memory_at_a_time(tmp_path, monkeypatch):
    for step in range(5):
        torch.save(mixed(step), tmp_path / f"m_{step}.pt", _use_new_zipfile_serialization=False)
    alive, most = weakref.WeakSet(), []

    class Watched(Checkpoint):
        def __post_init__(self):
            alive.add(self)
            most.append(len(alive))

    monkeypatch.setattr(conversion, "Checkpoint", Watched)
    Trajectory.from_state_dicts(tmp_path, tmp_path / "run")
    assert len(most) >= 10
    assert max(most) == 1


# --- Lightning --------------------------------------------------------------------------------------------


def trainers_file(model, optimizers=(), schedulers=(), step=3, **more):
    """What a Lightning Trainer saves, without one; tests/end_to_end has real ones."""
    return {
        "epoch": 0,
        "global_step": step,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": {f"model.{name}": tensor for name, tensor in model.state_dict().items()},
        "optimizer_states": [optimizer.state_dict() for optimizer in optimizers],
        "lr_schedulers": [scheduler.state_dict() for scheduler in schedulers],
        **more,
    }


def two_groups(model):
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    return torch.optim.AdamW([{"params": vectors[::-1], "lr": 0.05}, {"params": matrices}])


GROUPINGS = {
    "one group": (lambda model: torch.optim.AdamW(model.parameters()), lambda model: None),
    "momentum": (lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), lambda model: None),
    "those that train": (
        lambda model: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]),
        lambda model: None,
    ),
    "two groups": (two_groups, two_groups),
    "named groups": (
        lambda model: torch.optim.AdamW(
            [
                {
                    "params": [
                        (f"model.{n}", p) for n, p in reversed(list(model.named_parameters())) if p.ndim == 1
                    ]
                },
                {
                    "params": [(f"model.{n}", p) for n, p in model.named_parameters() if p.ndim == 2],
                    "lr": 0.1,
                },
            ]
        ),
        lambda model: None,
    ),
}


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_optimizer_and_scheduler_come_under_the_models_names(tmp_path, tiny, train, grouping):
    build, hint = GROUPINGS[grouping]
    model, other = tiny(), tiny(seed=7)
    optimizer = build(model)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4, 4])
    train(model, optimizer, range(3), scheduler)
    torch.save(trainers_file(model, [optimizer], [scheduler]), tmp_path / "last.ckpt")
    run = Trajectory.from_lightning(
        tmp_path, tmp_path / "run", prefix="model.", model=other, optimizer=hint(other)
    )
    expected = Checkpoint.capture(model, optimizer, scheduler, step=3)
    different = run.at(3).differences(expected)
    assert different == ["buffers/scale"]  # which the other seed's model lent
    restored = build(other)
    run.at(3).restore(other, restored, torch.optim.lr_scheduler.MultiStepLR(restored, [9]))
    assert restored.state_dict()["state"].keys() == optimizer.state_dict()["state"].keys()


def test_a_file_of_weights_alone_has_no_optimizer(tmp_path, tiny):
    saved = trainers_file(tiny(), step=9)
    del saved["optimizer_states"], saved["lr_schedulers"]
    torch.save(saved, tmp_path / "weights.ckpt")
    checkpoint = Trajectory.from_lightning(tmp_path, tmp_path / "run", prefix="model.").at(9)
    assert (checkpoint.optimizer, checkpoint.scheduler) == (None, None)


def test_an_optimizer_begins_at_step_zero(tmp_path, tiny):
    model = tiny()
    torch.save(trainers_file(model, [two_groups(model)], step=0), tmp_path / "a.ckpt")
    run = Trajectory.from_lightning(
        tmp_path, tmp_path / "run", prefix="model.", model=model, optimizer=two_groups(model)
    )
    assert run.optimizer_starts == (0,)
    assert run.at(0).optimizer.state == {}


def optimizer_of(parameters):
    return torch.optim.AdamW(list(parameters))


UNCLEAR = {
    "two groups": (two_groups, None, r"numbers \[4, 2\] parameters by group, .* Give model= and optimizer="),
    "too few": (lambda m: optimizer_of([m.embed.weight]), None, "which of the 6 is which cannot be told"),
    "another optimizer": (
        two_groups,
        lambda m: optimizer_of(m.parameters()),
        r"hold \[4, 2\] parameters, .*\[6\]",
    ),
    "another order": (
        lambda m: optimizer_of(reversed(list(m.parameters()))),
        None,
        r"exp_avg for \S+ is \(\S+\), the parameter \(.*\): the order is another. Give optimizer=",
    ),
}


@pytest.mark.parametrize("why", UNCLEAR)
def test_optimizers_whose_parameters_cannot_be_told_are_refused(tmp_path, tiny, train, why):
    build, hint, message = UNCLEAR[why]
    model = tiny()
    optimizer = build(model)
    train(model, optimizer, range(2))
    torch.save(trainers_file(model, [optimizer]), tmp_path / "a.ckpt")
    settings = {"prefix": "model.", "model": model, "optimizer": hint and hint(model)}
    with pytest.raises(TrajectoryError, match=message):
        Trajectory.from_lightning(tmp_path, tmp_path / "run", **settings)


def test_names_that_torch_kept_must_be_the_models(tmp_path, tiny):
    model = tiny()
    optimizer = torch.optim.AdamW([(f"net.{name}", p) for name, p in model.named_parameters()])
    torch.save(trainers_file(model, [optimizer]), tmp_path / "a.ckpt")
    with pytest.raises(
        TrajectoryError, match=r"its optimizer holds 'net.embed.weight', .* it has 'embed.weight'"
    ):
        Trajectory.from_lightning(tmp_path, tmp_path / "run", prefix="model.", model=model)


def test_an_optimizer_without_its_model_is_refused(tmp_path, tiny):
    with pytest.raises(ValueError, match="give model= as well"):
        Trajectory.from_lightning(tmp_path, tmp_path / "run", optimizer=two_groups(tiny()))


def test_several_optimizers_are_refused_and_the_weights_can_be_had(tmp_path, tiny):
    model = tiny()
    torch.save(trainers_file(model, [two_groups(model)] * 2), tmp_path / "step=3.ckpt")
    with pytest.raises(TrajectoryError, match=r"it has 2 optimizers and 0 schedulers, .* key='state_dict'"):
        Trajectory.from_lightning(tmp_path, tmp_path / "run", prefix="model.")
    run = Trajectory.from_state_dicts(
        tmp_path / "step=3.ckpt", tmp_path / "run", key="state_dict", prefix="model.", model=model
    )
    assert run.steps == (3,)


def test_a_trainers_file_that_needs_more_than_weights_says_what_to_do(tmp_path, tiny):
    torch.save(
        trainers_file(tiny(), hyper_parameters={"where": Path("data"), "n": Fraction(1)}), tmp_path / "a.ckpt"
    )
    with pytest.raises(TrajectoryError, match=r"fractions.Fraction.* could run code.*\.safe_globals\(\["):
        Trajectory.from_lightning(tmp_path, tmp_path / "run", prefix="model.")
    with torch.serialization.safe_globals([type(Path("data")), Fraction]):
        run = Trajectory.from_lightning(tmp_path, tmp_path / "run", prefix="model.", model=tiny())
    assert run.steps == (3,)


def test_a_file_that_no_trainer_wrote_is_refused(tmp_path):
    torch.save(W, tmp_path / "a.ckpt")
    with pytest.raises(
        TrajectoryError, match=r"has no 'state_dict', 'global_step', but 'w'\. .*from_state_dicts"
    ):
        Trajectory.from_lightning(tmp_path, tmp_path / "run")


# --- safetensors and Hugging Face -------------------------------------------------------------------------


def test_safetensors_are_kept_bit_for_bit(tmp_path):
    for step in (1, 20):
        save_file(mixed(step), tmp_path / f"model-{step}.safetensors")
    run = Trajectory.from_safetensors(tmp_path, tmp_path / "run")
    assert run.steps == (1, 20)
    assert run.verify() == []
    for step in run.steps:
        found = stored(run, step)
        assert differences({name: found[name] for name in mixed()}, mixed(step)) == []
    run.export(20, tmp_path / "again-20.safetensors")
    assert (
        differences(
            load_file(tmp_path / "again-20.safetensors"), load_file(tmp_path / "model-20.safetensors")
        )
        == []
    )


def test_what_save_model_wrote_of_tied_tensors_is_read(tmp_path, tiny):
    model = tiny(seed=4)
    save_model(model, str(tmp_path / "m_4.safetensors"))
    run = Trajectory.from_safetensors(tmp_path, tmp_path / "run", model=tiny(seed=4))
    assert run.at(4).differences(Checkpoint.capture(model, step=4)) == []


def revision(folder, state, form):
    """A revision in one of the forms that `save_pretrained` has had."""
    folder.mkdir(parents=True)
    names = list(state)
    halves = [{n: state[n] for n in names[::2]}, {n: state[n] for n in names[1::2]}]
    stem, suffix, save = (
        ("model", "safetensors", save_file) if "safe" in form else ("pytorch_model", "bin", torch.save)
    )
    if "shards" in form:
        shards = {f"{stem}-0000{i + 1}-of-00002.{suffix}": half for i, half in enumerate(halves)}
        weight_map = {name: shard for shard, half in shards.items() for name in half}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        shards = {f"{stem}.{suffix}": state}
    for shard, held in shards.items():
        save(held, folder / shard)


@pytest.mark.parametrize("form", ["safetensors", "safetensors shards", "bin", "bin shards"])
def test_revisions_of_every_form_are_read(tmp_path, form):
    for step in (0, 1000):
        revision(tmp_path / "suite" / f"step{step}", mixed(step), form)
    run = Trajectory.from_huggingface(tmp_path / "suite", ["step1000", "step0"], tmp_path / "run")
    assert run.steps == (0, 1000)
    found = stored(run, 1000)
    assert differences({name: found[name] for name in mixed()}, mixed(1000)) == []
    sources = run.provenance["imported"]["sources"]
    assert [source["name"].split("@")[1] for source in sources] == ["step0", "step1000"]
    assert len(sources[0]["files"]) == (2 if "shards" in form else 1)


def test_a_revision_may_be_loaded_by_a_function_of_its_folder(tmp_path, tiny):
    for step in (1, 2):
        revision(tmp_path / "suite" / f"step{step}", tiny(seed=step).state_dict(), "bin")
    asked = []

    def load(folder):
        asked.append(folder.name)
        return tiny(seed=int(folder.name[4:]))

    run = Trajectory.from_huggingface(tmp_path / "suite", ["step1", "step2"], tmp_path / "run", load=load)
    assert set(asked) == {"step1", "step2"}
    for step in (1, 2):
        assert run.at(step).differences(Checkpoint.capture(tiny(seed=step), step=step)) == []
    assert run.provenance["imported"]["lent"] == ["scale"]


def test_names_that_a_hugging_face_model_declares_harmless_are_left_out(tmp_path):
    model = nn.Linear(2, 2)
    model._keys_to_ignore_on_load_unexpected = [r"attention\.bias"]
    state = {**model.state_dict(), "layers.0.attention.bias": torch.ones(2)}
    torch.save(state, tmp_path / "m_1.pt")
    run = Trajectory.from_state_dicts(tmp_path / "m_1.pt", tmp_path / "run", model=model)
    assert run.provenance["imported"]["left_out"] == ["layers.0.attention.bias"]
    assert list(run.at(1).parameters) == ["weight", "bias"]


def test_a_repository_is_fetched_one_revision_after_another_safetensors_first(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def snapshot_download(repo, revision, allow_patterns):
        asked.append((repo, revision, allow_patterns[0]))
        folder = tmp_path / revision
        if allow_patterns[0] == "pytorch_model.bin":
            torch.save(mixed(int(revision[4:])), folder / "pytorch_model.bin")
        folder.mkdir(exist_ok=True)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    run = Trajectory.from_huggingface("EleutherAI/pythia-70m", ["step1", "step512"], tmp_path / "run")
    assert run.steps == (1, 512)
    assert asked == [
        ("EleutherAI/pythia-70m", name, file)
        for name in ("step1", "step512")
        for file in ("model.safetensors", "pytorch_model.bin")
    ]
    assert run.provenance["imported"]["sources"][1]["name"] == "EleutherAI/pythia-70m@step512"


def test_a_revision_that_cannot_be_had_is_named(tmp_path, monkeypatch):
    import huggingface_hub

    def unreachable(*args, **kwargs):
        raise OSError("no network\nand a page of advice")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(
        TrajectoryError, match=r"'a/b' is no folder here, .*'step1' could not be .*: no network$"
    ):
        Trajectory.from_huggingface("a/b", "step1", tmp_path / "run")
    revision(tmp_path / "suite/step1", W, "bin")
    (tmp_path / "suite/step2").mkdir()
    for wanted, message in (
        ("step3", r"has no folder 'step3'; it has 'step1', 'step2'"),
        ("step2", r"holds no weights: expected model.safetensors or pytorch_model.bin"),
        ("main", r"'main' does not say its step"),
    ):
        with pytest.raises(TrajectoryError, match=message):
            Trajectory.from_huggingface(tmp_path / "suite", [wanted], tmp_path / "run")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{}", "not a readable index"),
        ('{"weight_map": {"w": "../other.bin"}}', "not files beside it"),
        ('{"weight_map": {"w": "absent.bin"}}', r"absent\.bin is not readable"),
    ],
)
def test_an_index_of_shards_is_not_believed_blindly(tmp_path, index, message):
    (tmp_path / "suite/step1").mkdir(parents=True)
    (tmp_path / "suite/step1/pytorch_model.bin.index.json").write_text(index)
    with pytest.raises(TrajectoryError, match=message):
        Trajectory.from_huggingface(tmp_path / "suite", ["step1"], tmp_path / "run")


def test_what_is_not_installed_is_said_by_the_call_that_needs_it(tmp_path, monkeypatch):
    save_file(W, tmp_path / "m_1.safetensors")
    torch.save(W, tmp_path / "m_1.pt")
    for package in ("safetensors", "safetensors.torch", "huggingface_hub"):
        monkeypatch.setitem(sys.modules, package, None)
    run = Trajectory.from_state_dicts(tmp_path / "m_1.pt", tmp_path / "run")
    for call in (
        lambda: Trajectory.from_safetensors(tmp_path / "m_1.safetensors", tmp_path / "other"),
        lambda: run.export(1, tmp_path / "new.safetensors"),
        lambda: Trajectory.from_huggingface("a/b", ["step1"], tmp_path / "other"),
    ):
        with pytest.raises(TrajectoryError, match=r"is needed: pip install (safetensors|huggingface_hub)"):
            call()


# --- export -----------------------------------------------------------------------------------------------


def test_any_run_can_be_exported(run, tmp_path):
    Trajectory.open(run).export(10, tmp_path / "model.pt")
    checkpoint = Trajectory.open(run).at(10)
    back = torch.load(tmp_path / "model.pt", weights_only=True)
    assert differences(back, {**checkpoint.parameters, **checkpoint.buffers}) == []


def test_an_export_overwrites_nothing_and_leaves_nothing_half_written(run, tmp_path):
    trajectory = Trajectory.open(run)
    (tmp_path / "model.pt").write_bytes(b"mine")
    for step, name, message in (
        (10, "model.pt", "is there already, and nothing is overwritten"),
        (11, "new.pt", "Step 11 is not stored"),
        (10, "new.bin", r"ends in neither \.pt nor \.safetensors"),
    ):
        with pytest.raises(TrajectoryError, match=message):
            trajectory.export(step, tmp_path / name)
    assert (tmp_path / "model.pt").read_bytes() == b"mine"
    assert sorted(os.listdir(tmp_path)) == ["model.pt", "run"]


def test_what_safetensors_cannot_hold_is_said(tmp_path):
    torch.save({"w": torch.ones(2, dtype=torch.complex128)}, tmp_path / "m_1.pt")
    run = Trajectory.from_state_dicts(tmp_path / "m_1.pt", tmp_path / "run")
    with pytest.raises(TrajectoryError, match=r"safetensors cannot hold it: .*complex128; a \.pt file can"):
        run.export(1, tmp_path / "model.safetensors")
    run.export(1, tmp_path / "model.pt")
