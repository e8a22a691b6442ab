"""Checkpoints from state dicts: with a model, what is refused, one at a time."""

import os
import weakref
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from checkpoints import Checkpoint, Trajectory, TrajectoryError, TrajectoryWriter
from checkpoints.formats import conversion
from checkpoints.values import differences, same_bits
from tests.zoo.foreign_files import W, mixed, stored


@pytest.fixture
def steps(tmp_path) -> Path:
    """A folder with `name_step_499_.pt`, `name_step_550_.pt` and `name_step_1000_.pt`."""
    folder = tmp_path / "steps"
    folder.mkdir()
    for step in (499, 550, 1000):
        torch.save(mixed(step), folder / f"120_6layer_MLP_fixed_6val_step_{step}_.pt")
    return folder


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


class Runs:
    """Its pickle calls a function when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def save_each(folder, **contents):
    for name, content in contents.items():
        torch.save(content, folder / f"{name}.pt")


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
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run/trajectory").glob("*.h5")}
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
