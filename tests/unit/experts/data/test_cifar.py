"""CIFAR without unpickling: both layouts, both Pythons' files, damage, and a file that would like to run something."""

import os
import pickle
import struct

import numpy as np
import pytest

from experts.data.config import DatasetConfig
from experts.data.dataset import open_dataset
from experts.data.pickles import read_pickled_data
from experts.data.readers import open_raw

PIXELS = 3072
PER_BATCH = 4


def content(start, num_classes, labels_key):
    """Four images whose every byte tells which image it is."""
    rows = np.arange(start, start + PER_BATCH)
    data = np.repeat(rows[:, None], PIXELS, axis=1).astype(np.uint8)
    return {
        "batch_label": "made for a test",
        labels_key: [int(r % num_classes) for r in rows],
        "data": data,
        "filenames": [f"{r}.png" for r in rows],
    }


def splits(source):
    if source == "cifar10":
        return [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"], 10, "labels", "batches.meta", "label_names"
    return ["train", "test"], 100, "fine_labels", "meta", "fine_label_names"


def config(root, source="cifar10"):
    return DatasetConfig(name=source, source=source, root=str(root))


def python2_file(values):
    """The bytes that Python 2 would write: BINSTRING for text and array bytes, as in the published archive."""

    def text(s):
        raw = s if isinstance(s, bytes) else s.encode()
        return b"U" + bytes([len(raw)]) + raw if len(raw) < 256 else b"T" + struct.pack("<i", len(raw)) + raw

    def number(n):
        return b"K" + bytes([n]) if n < 256 else b"J" + struct.pack("<i", n)

    def array(a):
        shape = b"".join(number(n) for n in a.shape) + b"\x86"
        dtype = (
            b"cnumpy\ndtype\n"
            + text("u1")
            + b"K\x00K\x01\x87R"
            + b"(K\x03"
            + text("|")
            + b"NNN"
            + b"J\xff\xff\xff\xff" * 2
            + b"K\x00tb"
        )
        return (
            b"cnumpy.core.multiarray\n_reconstruct\n"
            + b"cnumpy\nndarray\n"
            + b"K\x00\x85"
            + text("b")
            + b"\x87R"
            + b"(K\x01"
            + shape
            + dtype
            + b"\x89"
            + text(a.tobytes())
            + b"tb"
        )

    out = b"\x80\x02}q\x01("
    for name, value in values.items():
        out += text(name)
        if isinstance(value, np.ndarray):
            out += array(value)
        elif isinstance(value, list):
            out += b"]q\x02(" + b"".join(number(v) if isinstance(v, int) else text(v) for v in value) + b"e"
        else:
            out += text(value)
    return out + b"u."


@pytest.fixture(params=["cifar10", "cifar100"])
def layouts(request, tmp_path):
    """One set in four forms: by Python 2, by Python 3 in two protocols, binary."""
    source = request.param
    files, num_classes, labels_key, meta, names_key = splits(source)
    folder = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[source]
    binary = {"cifar10": "cifar-10-batches-bin", "cifar100": "cifar-100-binary"}[source]
    names = {names_key: [f"name{c}" for c in range(num_classes)]}
    writers = {
        "python 2": python2_file,
        "protocol 2": lambda v: pickle.dumps(v, protocol=2),
        "protocol 4": lambda v: pickle.dumps(v, protocol=4),
    }
    for form, write in writers.items():
        target = tmp_path / form / folder
        target.mkdir(parents=True)
        (target / meta).write_bytes(write(names))
        for i, name in enumerate(files):
            (target / name).write_bytes(write(content(i * PER_BATCH, num_classes, labels_key)))
    target = tmp_path / "binary" / binary
    target.mkdir(parents=True)
    (target / ("batches.meta.txt" if num_classes == 10 else "fine_label_names.txt")).write_text(
        "\n".join(names[names_key]) + "\n"
    )
    for i, name in enumerate(files):
        values = content(i * PER_BATCH, num_classes, labels_key)
        head = [values[labels_key]] if num_classes == 10 else [[7] * PER_BATCH, values[labels_key]]
        rows = np.concatenate([np.array(head, dtype=np.uint8).T, values["data"]], axis=1)
        (target / f"{name}.bin").write_bytes(rows.tobytes())
    return source, tmp_path


@pytest.mark.parametrize("form", ["python 2", "protocol 2", "protocol 4", "binary"])
def test_every_layout_gives_the_same_images_in_the_same_order(layouts, form):
    source, root = layouts
    num_classes = int(source.removeprefix("cifar"))
    opened = open_raw(config(root / form, source))
    train = PER_BATCH * (len(splits(source)[0]) - 1)
    assert opened.train.images.shape == (train, 3, 32, 32)
    assert opened.train.images[:, 0, 0, 0].tolist() == list(range(train))
    assert opened.train.labels.tolist() == [r % num_classes for r in range(train)]
    assert opened.test.images[:, 2, 31, 31].tolist() == list(range(train, train + PER_BATCH))
    assert opened.class_names == tuple(f"name{c}" for c in range(num_classes))
    inside = next((root / form).iterdir())
    assert open_raw(config(inside, source)).train.labels.tolist() == opened.train.labels.tolist()


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_hostile_file_is_refused_and_not_run(tmp_path, protocol):
    proof = tmp_path / "it ran".replace(" ", "_")
    hostile = tmp_path / "data_batch_1"
    hostile.write_bytes(pickle.dumps({"data": Hostile(proof)}, protocol=protocol))
    with pytest.raises(ValueError, match=rf"data_batch_1 .*it asks for {os.system.__module__}.system, which is"):
        open_raw(config(tmp_path))
    assert not proof.exists()


@pytest.mark.parametrize("value", [{1, 2}, object(), np.arange(3.0), np.array([object()]), complex(1, 2)])
def test_anything_but_data_is_refused(tmp_path, value):
    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps(value, protocol=2))
    with pytest.raises(ValueError, match="not a data file of CIFAR"):
        read_pickled_data(str(path))


@pytest.mark.parametrize(
    "symbol",
    [
        b"cnumpy\nndarray\n)R.",
        b"c_codecs\nencode\n(U\x01aU\x05rot13tR.",
        b"}q\x00}b.",
        b"(.",
        b"cnumpy\nndarray\n.",
    ],
)
def test_allowed_names_are_only_allowed_in_their_place(tmp_path, symbol):
    path = tmp_path / "data_batch_1"
    path.write_bytes(b"\x80\x02" + symbol)
    with pytest.raises(ValueError, match="not a data file of CIFAR"):
        read_pickled_data(str(path))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_named(layouts, share):
    source, root = layouts
    victim = next((root / "protocol 2").iterdir()) / splits(source)[0][0]
    whole = victim.read_bytes()
    victim.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=rf"{victim.name} \(\d+ bytes\): not a data file of CIFAR .*fetch the file"):
        open_raw(config(root / "protocol 2", source))


def test_a_truncated_binary_file_is_named(layouts):
    source, root = layouts
    victim = next((root / "binary").iterdir()) / f"{splits(source)[0][0]}.bin"
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{victim.name}: \d+ bytes, needed a multiple of 307"):
        open_raw(config(root / "binary", source))


def test_a_label_out_of_range_is_named(tmp_path):
    values = content(0, 10, "labels") | {"labels": [0, 1, 10, 2]}
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps(values, protocol=2))
    with pytest.raises(ValueError, match="data_batch_1: label 10 of image 2 is out of range; needed 0 to 9"):
        open_raw(config(tmp_path))


def test_a_missing_companion_and_the_wrong_set_are_named(layouts):
    source, root = layouts
    files = splits(source)[0]
    other = "cifar100" if source == "cifar10" else "cifar10"
    folder = next((root / "protocol 2").iterdir())
    (folder / files[-1]).unlink()
    with pytest.raises(ValueError, match=rf"{files[-1]}: missing, though its companions are there"):
        open_raw(config(root / "protocol 2", source))
    with pytest.raises(ValueError, match=r"needed cifar-10.*dataset.download=true"):
        open_raw(config(root / "protocol 2", other))


@pytest.mark.parametrize(
    ("root", "message"),
    [
        (None, "dataset.root is not set .dataset cifar10.; set it to the folder that holds cifar-10-batches-py"),
        ("/nowhere/at/all", "dataset.root = /nowhere/at/all: found nothing at /nowhere/at/all; needed .*download=true"),
    ],
)
def test_a_missing_root_says_which_key(root, message):
    with pytest.raises(ValueError, match=message):
        open_dataset(DatasetConfig(name="cifar10", source="cifar10", root=root))


def test_a_packed_archive_is_recognised(tmp_path):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"found only cifar-10-python.tar.gz, still packed"):
        open_raw(config(tmp_path))


def test_a_failed_download_says_what_to_do(tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", unreachable)
    with pytest.raises(ValueError, match=r"dataset.download = true: could not fetch into .*no route to host.*set data"):
        open_raw(config(tmp_path / "new").model_copy(update={"download": True}))


def test_a_local_file_that_is_not_the_published_one_is_refused_under_download(layouts, monkeypatch):
    source, root = layouts
    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", lambda *a, **k: None)
    with pytest.raises(ValueError, match="does not have the published md5"):
        open_raw(config(root / "protocol 2", source).model_copy(update={"download": True}))
