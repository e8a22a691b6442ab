"""A checkpoint file holds the very bits, reads like the model, and is not believed blindly."""

import json
import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints import Checkpoint, TrajectoryError, encoding, values
from checkpoints.encoding import decode, encode
from checkpoints.values import same_bits

DTYPES = sorted(encoding._DTYPES.values(), key=str)
EMPTY = Checkpoint(
    step=0, parameters={}, buffers={}, optimizer=None, scheduler=None, rng=None, fingerprint={}
)

shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
part = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="."), max_size=3)
names = st.lists(part, min_size=1, max_size=4).map(".".join)
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5))
plain = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=3) | st.just("$tuple"), inner, max_size=3),
        st.dictionaries(st.integers() | st.tuples(st.integers()), inner, max_size=3),
        st.dictionaries(st.integers(), st.integers(), max_size=3).map(Counter),
    ),
    max_leaves=12,
)


def random_bits(shape, dtype, seed):
    """A tensor of arbitrary bits: NaN payloads, infinities, subnormals; bool stays 0 or 1."""
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    n_bytes = math.prod(shape) * dtype.itemsize
    data = np.random.default_rng(seed).integers(0, 2 if dtype is torch.bool else 256, n_bytes, dtype=np.uint8)
    return torch.from_numpy(data).view(dtype).reshape(shape)


def image_with(edit, checkpoint=None):
    """A checkpoint's image after an edit of its file by another hand."""
    parameters = {"w": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(3)}
    image = encode(checkpoint or replace(EMPTY, parameters=parameters))
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_fapl_core(backing_store=False)
    access.set_file_image(image)
    with h5py.File(h5py.h5f.open(b"x", h5py.h5f.ACC_RDWR, fapl=access)) as file:
        edit(file)
        file.flush()
        return file.id.get_file_image()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(deadline=None, max_examples=15)
@given(shape=shapes, seed=st.integers(0, 99))
def test_every_bit_of_every_dtype_survives(dtype, shape, seed):
    tensor = random_bits(shape, dtype, seed)
    read = decode(encode(replace(EMPTY, parameters={"w": tensor}))).parameters["w"]
    assert same_bits(read, tensor)
    assert read.is_contiguous()


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(names, st.floats(), max_size=8))
def test_any_names_survive_in_their_order(numbers):
    parameters = {name: torch.tensor(number, dtype=torch.float64) for name, number in numbers.items()}
    read = decode(encode(replace(EMPTY, parameters=parameters))).parameters
    assert list(read) == list(parameters)
    assert values.differences(read, parameters) == []


@settings(deadline=None, max_examples=150)
@given(plain)
def test_plain_values_survive_json_with_tuples_counters_integer_keys_and_nan(value):
    text = json.dumps(values.to_json(value), allow_nan=False)
    assert values.differences(values.from_json(json.loads(text)), value) == []


def test_not_a_number_infinities_and_minus_zero_survive_json_and_are_told_apart():
    numbers = [math.nan, math.inf, -math.inf, -0.0, 5e-324]
    read = values.from_json(json.loads(json.dumps(values.to_json(numbers), allow_nan=False)))
    assert values.differences(read, numbers) == []
    assert values.differences([math.nan, 0.0, 1, True], [math.nan, -0.0, 1.0, 1]) == ["1", "2", "3"]


def test_views_are_stored_as_what_they_show():
    base = torch.arange(12.0, dtype=torch.float64).reshape(3, 4)
    shown = {
        "transposed": base.t(),
        "strided": base[::2, 1::2],
        "expanded": base[:1].expand(5, 4),
        "conjugate": torch.tensor([1 + 2j, 3 - 4j]).conj(),
        "channels_last": torch.rand(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    }
    read = decode(encode(replace(EMPTY, buffers=shown))).buffers
    assert all(torch.equal(read[name], tensor) for name, tensor in shown.items())
    assert torch.equal(read["conjugate"], torch.tensor([1 - 2j, 3 + 4j]))


def test_a_tensor_larger_than_a_chunk_survives():
    tensor = torch.arange(3 * 700_001, dtype=torch.float64).reshape(3, 700_001)
    assert same_bits(decode(encode(replace(EMPTY, parameters={"w": tensor}))).parameters["w"], tensor)


def test_a_whole_checkpoint_survives_storage(trained):
    model, optimizer = trained
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    checkpoint = Checkpoint.capture(model, optimizer, scheduler, step=7, begins_optimizer=True)
    read = decode(encode(checkpoint))
    assert read.differences(checkpoint) == []
    assert read.rng_differences(checkpoint) == []
    assert read.fingerprint == checkpoint.fingerprint
    assert (read.step, read.begins_optimizer) == (7, True)


def test_threads_may_encode_and_decode_at_once(trained):
    checkpoint = Checkpoint.capture(*trained)
    with ThreadPoolExecutor(4) as pool:
        images = list(pool.map(encode, [checkpoint] * 12))
        assert all(read.equals(checkpoint) for read in pool.map(decode, images))


def test_the_file_reads_like_the_model(trained):
    found = {}

    def note(path, node):
        if isinstance(node, h5py.Dataset):
            found[path] = node.fletcher32

    image_with(lambda file: file.visititems(note), Checkpoint.capture(*trained))
    assert {
        "parameters/embed/weight",
        "buffers/norm/running_mean",
        "optimizer/state/embed/weight/exp_avg",
    } <= set(found)
    assert all(found.values())


def test_a_name_that_is_also_a_prefix_keeps_its_own_place():
    parameters = {name: torch.rand(2) for name in ("a", "a.b", "a.b.c", "ab.c", "a%2Fb", "a/b")}
    assert (
        values.differences(decode(encode(replace(EMPTY, parameters=parameters))).parameters, parameters) == []
    )


@pytest.mark.parametrize(
    "tensor",
    [torch.eye(2).to_sparse(), torch.empty(2, device="meta"), torch.zeros(2).to(torch.float8_e5m2)],
    ids=["sparse", "meta", "float8"],
)
def test_a_tensor_that_cannot_be_stored_is_named(tensor):
    with pytest.raises(TrajectoryError, match=r"parameters/inner\.w is a .* cannot be stored"):
        encode(replace(EMPTY, parameters={"inner.w": tensor}))


def test_an_object_that_cannot_be_stored_is_named():
    with pytest.raises(TrajectoryError, match="scheduler/rate is a object"):
        encode(replace(EMPTY, scheduler={"rate": object()}))


def test_a_newer_schema_is_refused():
    image = image_with(lambda file: file.attrs.modify("schema_version", 99))
    with pytest.raises(TrajectoryError, match=r"run\.h5 has schema version 99; .* Update the package"):
        decode(image, "run.h5")


def test_other_hdf5_files_and_other_bytes_are_refused():
    with pytest.raises(TrajectoryError, match="no schema_version"):
        decode(image_with(lambda file: file.attrs.pop("schema_version")))
    with pytest.raises(TrajectoryError, match="not a readable checkpoint"):
        decode(b"no HDF5 at all")


def replaced(**settings):
    def edit(file):
        del file["parameters/w"]
        file.create_dataset("parameters/w", **settings)

    return edit


def linked(link):
    def edit(file):
        del file["parameters/w"]
        file["parameters/w"] = link

    return edit


def virtual(file):
    del file["parameters/w"]
    layout = h5py.VirtualLayout((2, 3), dtype="f4")
    layout[...] = h5py.VirtualSource("other.h5", "w", (2, 3), dtype="f4")
    file.create_virtual_dataset("parameters/w", layout)


def reindexed(old, new):
    def edit(file):
        text = file["index"][0]
        assert old in text
        del file["index"]
        file.create_dataset("index", data=np.array([text.replace(old, new)]), chunks=(1,), fletcher32=True)

    return edit


checked = {"chunks": (2, 3), "fletcher32": True}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (linked(h5py.ExternalLink("other.h5", "/w")), "leads through a link to elsewhere"),
        (linked(h5py.SoftLink("/parameters/n")), "leads through a link to elsewhere"),
        (virtual, "external or virtual storage"),
        (replaced(shape=(2, 3), dtype="f4", external="/dev/zero"), "external or virtual storage"),
        (replaced(data=np.zeros((3, 2), "f4"), chunks=(3, 2), fletcher32=True), r"\(3, 2\), but .* \(2, 3\)"),
        (replaced(data=np.zeros((2, 3), "f8"), **checked), "float64 .* but the index says float32"),
        (replaced(shape=(2, 3), dtype="f4", **checked), "holds fewer bytes than its shape"),
        (replaced(data=np.zeros((2, 3), "f4")), "expected its checksum alone"),
        (replaced(data=np.zeros((2, 3), "f4"), compression="gzip", **checked), "expected its checksum alone"),
        (lambda file: file.pop("parameters/w"), "'parameters/w' is missing"),
        (lambda file: file.pop("index"), "'index' is missing"),
        (reindexed(b"parameters/w", b"parameters"), "is a Group, expected a dataset"),
        (reindexed(b"parameters/w", b"parameters/n/w"), "is not a path to a dataset"),
        (reindexed(b"parameters/w", b"../other"), "is not a path to a dataset"),
        (reindexed(b'"float32"', b'"object"'), "not a readable checkpoint"),
        (reindexed(b"$tensor", b"$pickle"), "has no meaning here"),
        (reindexed(b'"step"', b'"stop"'), "not a readable checkpoint"),
    ],
)
def test_a_file_that_points_outside_itself_or_contradicts_its_index_is_refused(edit, message):
    with pytest.raises(TrajectoryError, match=message):
        decode(image_with(edit))


def test_flipped_bits_are_noticed_even_without_the_manifest():
    """What the checksums inside the file protect: the datasets' own bytes."""
    marker = np.arange(1000, dtype=np.float64) * 1.37
    image = encode(replace(EMPTY, parameters={"w": torch.from_numpy(marker)}))
    start = image.index(marker.tobytes())
    for position in np.random.default_rng(0).integers(0, marker.nbytes * 8, 40):
        damaged = bytearray(image)
        damaged[start + position // 8] ^= 1 << (position % 8)
        with pytest.raises(TrajectoryError, match="not a readable checkpoint"):
            decode(bytes(damaged))


def test_modes_and_a_scalers_state_come_back_and_files_from_before_they_were_kept_are_read():
    scaler = {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 3}
    kept = replace(EMPTY, evaluating=("", "norm"), scaler=scaler)
    assert decode(encode(kept)).evaluating == ("", "norm")
    assert decode(encode(kept)).scaler == scaler

    def as_before(file):
        index = json.loads(file["index"][0])
        del index["evaluating"], index["scaler"], file["index"]
        file.attrs["schema_version"] = 1
        file.create_dataset("index", data=np.array([json.dumps(index)], "S"), chunks=(1,), fletcher32=True)

    older = decode(image_with(as_before, kept))
    assert older.evaluating is None
    assert older.scaler is None
