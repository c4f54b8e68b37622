"""Pickles, and the zip files around them, that would run code, hang or take all memory elsewhere."""

import os
import pickle
import zipfile

import numpy as np
import pytest

from jattn.models.pretrained.readers import torch_pickle
from tests.models.pretrained import files
from tests.models.pretrained.files import Call, Name, Outside

DESCRIBED, STORED = files.torch_parts({"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, np.float32)})


class Reduced:
    """Pickles to a call of a function, which is how a pickle runs code."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    ("value", "named"),
    [
        (Reduced(os.system, "touch ran"), "system"),
        (Reduced(eval, "open('ran', 'w')"), "eval"),
        (Reduced(pickle.loads, b"."), "loads"),
        ({"w": [Reduced(getattr, Reduced(os.system, "touch ran"), "x")]}, "getattr"),
        (Reduced(print), "print"),
    ],
)
@pytest.mark.parametrize("container", ["zip", "stream"])
def test_pickles_that_call_something_are_refused_by_its_name(
    container, value, named, protocol, refusal, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    program = pickle.dumps(value, protocol=protocol)
    if container == "zip":
        data = files.zipped({"x/data.pkl": program})
    else:
        head = files.pickled(files.MAGIC) + files.pickled(1001) + files.pickled({"little_endian": True})
        data = head + program + files.pickled([])
    message = refusal(torch_pickle.read, data)
    # A pickle with bytes in it already fails there, before their call is reached.
    assert f".{named}', which is refused" in message or (named == "loads" and "refused" in message)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch", "load"),
        ("torch.storage", "_load_from_bytes"),
        ("torch.serialization", "load"),
        ("torch._utils", "_rebuild_tensor"),
        ("torch.hub", "load"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("collections", "OrderedDict.fromkeys"),
        ("builtins", "getattr"),
        ("__builtin__", "eval"),
        ("posix", "system"),
        ("torch", "FloatStorage.__class__"),
        ("x" * 150, "y\x1b[31m"),
    ],
)
def test_only_a_handful_of_names_is_known(module, name, refusal):
    message = refusal(torch_pickle.read, files.torch_zip({"w": Call(Name(module, name), ())}, {}))
    assert "it names" in message
    assert "which is refused" in message


def nested(opening, closing, depth=100_000):
    return opening * depth + closing * depth


HOSTILE_PROGRAMS = {
    "an entry of the memo that is not there": b"\x80\x02h\x05.",
    "a text of four gigabytes": b"\x80\x02X\xff\xff\xff\xffabc",
    "a frame of exabytes": b"\x80\x04\x95" + b"\xff" * 7 + b"\x7f.",
    "an opcode with eight bytes of length": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f",
    "a number with four bytes of length": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "no end": b"\x80\x02}",
    "nothing on the stack": b"\x80\x02.",
    "taking from an empty stack": b"\x80\x02\x86.",
    "taking what lies below a mark": b"\x80\x02K\x01(\x85t.",
    "no mark": b"\x80\x02t.",
    "a mark left": b"\x80\x02}(.",
    "two values": b"\x80\x02}}.",
    "a key without value": b"\x80\x02}(K\x01u.",
    "items of no dictionary": b"\x80\x02K\x01(K\x01K\x01u.",
    "items of no list": b"\x80\x02K\x01(K\x01e.",
    "a call of a number": b"\x80\x02K\x01)R.",
    "a call without tuple": b"\x80\x02ccollections\nOrderedDict\nK\x01R.",
    "a storage called": b"\x80\x02ctorch\nFloatStorage\n)R.",
    "a state of no dictionary": b"\x80\x02]}b.",
    "a state that is none": b"\x80\x02}Nb.",
    "a name from numbers": b"\x80\x04K\x01K\x02\x93.",
    "a name without end": b"\x80\x02c" + b"x" * 1000,
    "lists in lists": b"\x80\x02" + nested(b"]", b"a")[:-1] + b".",
    "tuples in tuples": b"\x80\x02" + nested(b")", b"\x86")[:-1] + b".",
    "a key that nests": b"\x80\x02})" + b"\x85" * 100_000 + b"Ns.",
    "a key that doubles": b"\x80\x02})" + b"q\x00h\x00\x86" * 200 + b"Ns.",
    "a call of what doubles": b"\x80\x02)" + b"q\x00h\x00\x86" * 200 + b")R.",
    "a size that doubles": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n("
    + files.opcodes(files.storage("0", "float32", 6))
    + b"K\x00)"
    + b"q\x00h\x00\x86" * 200
    + b")NNtR.",
    "many marks": b"\x80\x02" + b"(" * 600_000,
    "many dictionaries": b"\x80\x02" + b"}" * 600_000,
    "a very long number as size": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n("
    + files.opcodes(files.storage("0", "float32", 6))
    + b"K\x00("
    + (b"\x8a\xff" + b"\x7f" * 255) * 2000
    + b"t("
    + b"K\x01" * 2000
    + b"tNNtR.",
    "itself": b"\x80\x02]q\x00h\x00a.",
}


@pytest.mark.parametrize("name", HOSTILE_PROGRAMS)
def test_hostile_programs_are_refused(name, refusal):
    refusal(torch_pickle.read, files.zipped({"x/data.pkl": HOSTILE_PROGRAMS[name]}))


def test_an_entry_of_the_memo_far_away_takes_no_memory(reading_untrusted):
    assert reading_untrusted(torch_pickle.read, files.zipped({"x/data.pkl": b"\x80\x02}r\xff\xff\xff\xff."})) == {}


SIX = files.storage("0", "float32", 6)
HOSTILE_TENSORS = {
    "beyond its storage": files.tensor(SIX, 1, (2, 3), (3, 1)),
    "beyond by its stride": files.tensor(SIX, 0, (2,), (2**62,)),
    "before its storage": files.tensor(SIX, -1, (2,), (1,)),
    "backwards": files.tensor(SIX, 5, (3,), (-1,)),
    "of negative size": files.tensor(SIX, 0, (-2, -3), (3, 1)),
    "repeating one number": files.tensor(SIX, 0, (2**40,), (0,)),
    "of one number at the end": files.tensor(SIX, 6, (), ()),
    "with another number of strides": files.tensor(SIX, 0, (2, 3), (1,)),
    "with a size that is no tuple": files.tensor(SIX, 0, 6, (1,)),
    "with a size in half numbers": files.tensor(SIX, 0, (1.5,), (1,)),
    "with true as size": files.tensor(SIX, 0, (True,), (1,)),
    "with many axes": files.tensor(SIX, 0, (1,) * 100, (1,) * 100),
    "empty, of impossible size": files.tensor(SIX, 0, (0, 2**62, 2**62), (1, 1, 1)),
    "of no storage": files.tensor(6, 0, (6,), (1,)),
    "without arguments": Call(Name("torch._utils", "_rebuild_tensor_v2"), ()),
    "a parameter of nothing": Call(Name("torch._utils", "_rebuild_parameter"), (None, True, None)),
    "a dictionary with arguments": Call(files.ORDERED, ([("a", 1)],)),
    "a number": 3,
    "a list": [files.tensor(SIX, 0, (6,), (1,))],
    "a storage": SIX,
    "outside, of no tuple": Outside("storage"),
    "outside, a module": Outside(("module", 1, 2, 3, 4)),
    "of an unknown storage": Outside(("storage", Name("torch", "FloatStorage"), 7, "cpu", 6)),
    "of a negative length": Outside(("storage", Name("torch", "FloatStorage"), "0", "cpu", -6)),
    "of part of a storage": Outside(("storage", Name("torch", "FloatStorage"), "0", "cpu", 6, ("1", 0, 6))),
    "of a storage that is longer": files.tensor(files.storage("0", "float32", 7), 0, (6,), (1,)),
    "of a huge storage": files.tensor(files.storage("0", "float32", 2**60), 0, (6,), (1,)),
    "of a storage with two dtypes": [SIX, files.storage("0", "int32", 6)],
    "of a storage that is not there": files.tensor(files.storage("../0", "float32", 6), 0, (6,), (1,)),
    "of truths other than 0 and 1": files.tensor(files.storage("0", "bool", 24), 0, (6,), (1,)),
}


@pytest.mark.parametrize("container", [files.torch_zip, files.torch_stream], ids=["zip", "stream"])
@pytest.mark.parametrize("name", HOSTILE_TENSORS)
def test_hostile_tensors_are_refused(name, container, refusal):
    numbers = np.arange(6, dtype=np.float32).tobytes()
    refusal(torch_pickle.read, container({"w": HOSTILE_TENSORS[name]}, {"0": numbers}))


@pytest.mark.parametrize(
    "change",
    [
        {"x/data/0": b"\x00" * 20},
        {"x/byteorder": b"big"},
        {"../x/data/1": b""},
        {"/etc/passwd": b""},
        {"y/data.pkl": files.pickled({})},
        {"x/..\\y": b""},
    ],
    ids=["short storage", "big-endian", "traversal", "absolute", "two pickles", "backslash"],
)
def test_hostile_zip_members_are_refused(change, refusal):
    members = {"x/data.pkl": files.pickled(DESCRIBED), "x/data/0": STORED["0"], "x/data/1": STORED["1"]}
    refusal(torch_pickle.read, files.zipped({**members, **change}))


def test_zip_bombs_are_refused(refusal):
    zeros = {"w": files.tensor(files.storage("0", "uint8", 1 << 26), 0, (1 << 26,), (1,))}
    data = files.torch_zip(zeros, {"0": bytes(1 << 26)}, zipfile.ZIP_DEFLATED)
    assert len(data) < 1 << 17
    assert "is compressed" in refusal(torch_pickle.read, data)


def test_zip_members_on_top_of_each_other_are_refused(refusal):
    data = files.torch_zip(DESCRIBED, STORED)
    first = data.index(b"PK\x01\x02")
    second = data.index(b"PK\x01\x02", first + 4)
    third = data.index(b"PK\x01\x02", second + 4)
    # The directory's entry of the last member points where that of the second does.
    data = data[: third + 42] + data[second + 42 : second + 46] + data[third + 46 :]
    assert "lies on another member" in refusal(torch_pickle.read, data)


def test_a_big_endian_stream_is_refused(refusal):
    parts = [files.MAGIC, 1001, {"little_endian": False}, {}, []]
    assert "little-endian" in refusal(torch_pickle.read, b"".join(map(files.pickled, parts)))
