"""CIFAR: both layouts, the pickles of both Pythons, damaged files, and pickles that try to run something."""

import os
import pickle
import resource
import struct

import numpy as np
import pytest

from experts.data.config import DatasetConfig
from experts.data.dataset import open_dataset
from experts.data.pickles import read_pickled_fields
from experts.data.readers import open_raw

PIXELS = 3072
PER_BATCH = 4


def content(start, num_classes, labels_key):
    """Four images; every byte of an image is its number."""
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


def refused(tmp_path, data, reason=""):
    path = tmp_path / "data_batch_1"
    path.write_bytes(data)
    match = (
        rf"data_batch_1 \({len(data)} bytes\): not a data file of CIFAR \(.*{reason}.*\); needed .*fetch the file again"
    )
    with pytest.raises(ValueError, match=match):
        read_pickled_fields(str(path))


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("value", [object(), np.arange(3.0), np.array([object()]), complex(1, 2), np.dtype("O"), os])
def test_anything_but_data_is_refused(tmp_path, value, protocol):
    if value is os:  # a module cannot be pickled, but it can be asked for
        data = b"\x80\x02}U\x01a" + b"cos\n__dict__\ns."
    else:
        data = pickle.dumps({"data": value}, protocol=protocol)
    refused(tmp_path, data)


@pytest.mark.parametrize("value", [[1], (1,), 7, "text", b"bytes", None, {1}, np.zeros(3, np.uint8)])
def test_anything_but_a_dict_is_refused(tmp_path, value):
    refused(tmp_path, pickle.dumps(value, protocol=4), "it holds a ")


TEXT = b"U\x01a"


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        # names: of functions, behind attributes, of Python 2, by every instruction that looks a name up
        (b"cos\nsystem\n(U\x04truetR.", "asks for os.system"),
        (b"cbuiltins\neval\n(U\x041+1tR.", "asks for builtins.eval"),
        (b"c__builtin__\neval\n.", "asks for __builtin__.eval"),
        (b"cbuiltins\ngetattr\n.", "asks for builtins.getattr"),
        (b"(U\x04trueios\nsystem\n.", "asks for os.system"),
        (b"\x8c\x02os\x8c\x06system\x93.", "asks for os.system"),
        (b"\x8c\x05numpy\x8c\x15ndarray.__reduce_ex__\x93.", "asks for numpy.ndarray.__reduce_ex__"),
        (b"cnumpy\nload\n.", "asks for numpy.load"),
        (b"cnumpy.core.multiarray\nscalar\n.", "asks for numpy.core.multiarray.scalar"),
        (b"cexperts.data.pickles\nos\n.", "asks for experts.data.pickles.os"),
        (b"\x82\x01.", "extension"),
        (b"Pa\n.", "persistent"),
        (TEXT + b"Q.", "persistent"),
        # allowed names out of their place
        (b"cnumpy\nndarray\n.", "it holds a str"),
        (b"cnumpy\ndtype\n.", "it holds a type"),
        (b"cnumpy\nndarray\n)R.", "not callable"),
        (b"cnumpy\nndarray\n)\x81.", "NEWOBJ"),
        (b"cnumpy\ndtype\n(U\x01OtR.", "array of type O"),
        (b"cnumpy\ndtype\n(]tR.", r"array of type \(list\)"),
        (b"c_codecs\nencode\n(U\x01aU\x05rot13tR.", "encoding rot13"),
        (b"c_codecs\nencode\n(U\x01atR.", "encoding"),
        (b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\ndtype\n)" + TEXT + b"tR.", "kind other than"),
        (
            b"}" + TEXT + b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n)" + TEXT + b"tRs.",
            "without content",
        ),
        # state set where there is none
        (b"}q\x00}b.", "__dict__"),
        (TEXT + b"}b.", "__dict__"),
        # damage
        (b"(.", ""),
        (b"", ""),
        (b"R.", ""),
        (b"}" + TEXT + b"]s", "STOP"),
        (b"}]" + TEXT + b"s.", "unhashable"),
        (b"}K\x01K\x01s.", "field called by a int"),
        (b"\xff.", "opcode"),
    ],
)
def test_anything_that_would_be_run_or_is_damaged_is_refused(tmp_path, program, reason):
    refused(tmp_path, b"\x80\x02" + program, reason)


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
@pytest.mark.parametrize("state", [b"}U\x05valueK\x01s", b"N}U\x05valueK\x01s\x86", b"(K\x01)NNNt"])
@pytest.mark.parametrize("name", [b"numpy\ndtype", b"_codecs\nencode", None])
def test_no_file_changes_how_the_next_one_is_read(tmp_path, name, state, module):
    """The instruction BUILD on a stand-in class itself: by `__setstate__`, by attributes and by slots."""
    name = name or module.encode() + b"\n_reconstruct"
    refused(tmp_path, b"\x80\x02c" + name + b"\n" + state + b"b.", "__setstate__")
    (tmp_path / "next").write_bytes(python2_file(content(0, 10, "labels")))
    assert read_pickled_fields(str(tmp_path / "next"))["data"].shape == (PER_BATCH, PIXELS)


@pytest.mark.parametrize("size", [1 << 30, 1 << 40, 1 << 50, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
@pytest.mark.parametrize(
    "instruction", [b"\x8d", b"\x8e", b"\x96", b"\x95"], ids=["text", "bytes", "bytearray", "frame"]
)
def test_a_length_beyond_the_file_takes_no_memory(tmp_path, instruction, size):
    refused(tmp_path, b"\x80\x05" + instruction + size.to_bytes(8, "little") + b"abc.")


@pytest.mark.parametrize("put", [b"r\xff\xff\xff\x7f", b"r\xff\xff\xff\xff", b"p999999999\n"])
def test_a_memo_place_beyond_the_file_takes_no_memory(tmp_path, put):
    """The unpickler keeps places up to twice the largest: 2^31 of them would be 34 GB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(tmp_path, b"\x80\x02}" + put + b".", "keeps something at place")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


@pytest.mark.parametrize("depth", [1000, 100_000])
def test_a_deep_file_is_read_without_recursion(tmp_path, depth):
    (tmp_path / "deep").write_bytes(b"\x80\x02}" + TEXT + b"]" * depth + b"a" * (depth - 1) + b"s.")
    assert len(read_pickled_fields(str(tmp_path / "deep"))["a"]) == 1


BYTES = b"cnumpy\ndtype\n(U\x02u1tR"


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (b"K\x01K\x02K\x03\x86" + BYTES + b"\x89U\x05abcde", "cannot reshape"),
        (b"K\x01J\x00\x00\x00\x40\x85" + BYTES + b"\x89U\x01a", "cannot reshape"),
        (b"K\x01" + TEXT + BYTES + b"\x89U\x01a", "integer"),
        (b"K\x01K\x01\x85" + BYTES + b"\x88U\x01a", "C order"),
        (b"K\x01K\x01\x85U\x02u1\x89U\x01a", "something else than bytes"),
        (b"K\x01K\x01\x85" + BYTES + b"\x89]", "bytes-like"),
        (b"K\x01K\x01\x85" + BYTES + b"\x89X\x02\x00\x00\x00\xc4\x80", "codec"),
        (b"K\x01", "unpack"),
    ],
)
def test_an_array_has_the_bytes_of_its_shape(tmp_path, state, reason):
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n)" + TEXT + b"tR"
    refused(tmp_path, b"\x80\x02}" + TEXT + array + b"(" + state + b"tbs.", reason)


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


def nested(depth):
    """Return lists in lists, each twice in the next: unfolded, they hold 2^depth numbers."""
    value = [1]
    for _ in range(depth):
        value = [value, value]
    return value


@pytest.mark.parametrize(
    ("label", "found"),
    [
        (-1, "-1"),
        (1 << 70, r"\(int\)"),
        ("1", r"\(str\)"),
        (True, r"\(bool\)"),
        (None, r"\(NoneType\)"),
        (nested(40), r"\(list\)"),
    ],
)
def test_a_label_that_is_not_a_class_is_named_without_writing_it_out(tmp_path, label, found):
    values = content(0, 10, "labels") | {"labels": [0, 1, 2, label]}
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps(values, protocol=2))
    with pytest.raises(ValueError, match=rf"data_batch_1: label {found} of image 3 is out of range; needed 0 to 9"):
        open_raw(config(tmp_path))


@pytest.mark.parametrize("names", [None, [], ["a"] * 9, ["a"] * 9 + [nested(40)], {"a": 1}])
def test_class_names_must_be_one_text_per_class(tmp_path, names):
    for name in splits("cifar10")[0]:
        (tmp_path / name).write_bytes(pickle.dumps(content(0, 10, "labels"), protocol=2))
    (tmp_path / "batches.meta").write_bytes(pickle.dumps({"label_names": names}, protocol=2))
    with pytest.raises(ValueError, match=r"batches.meta: found .* with \d class names; needed 'label_names', 10 texts"):
        open_raw(config(tmp_path))


def test_a_missing_file_and_the_wrong_set_are_named(layouts):
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
