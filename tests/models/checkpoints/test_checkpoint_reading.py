"""Files are read as tensors alone: whatever else is in them does nothing."""

import argparse
import builtins
import collections
import datetime
import io
import os
import pathlib
import pickle
import struct
import sys
import zipfile
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from xq.models.checkpoints.reading import read_sets

LEGACY = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])


def save(content, path, legacy=False) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)


class Calls:
    """Pickled as a call of a function."""

    def __init__(self, function, *args) -> None:
        self.call = function, args

    def __reduce__(self):
        return self.call


def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(3)
    return {"half": torch.randn(3).half(), "view": torch.randn(4, 6).T[1:4]} | norm.state_dict()


def assert_equal(found, expected) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor)


@LEGACY
def test_sets_of_weights(tmp_path, legacy):
    weights, averages = state(), {key: value + 1 for key, value in state().items()}
    content = {"model": weights, "ema": averages, "discriminator": {"d": torch.zeros(2)}, "x": 1}
    save(content | {"optimizer": {"state": {0: {"m": torch.zeros(3)}}}}, tmp_path / "f.pt", legacy)
    sets = read_sets(tmp_path / "f.pt")
    assert set(sets) == {"model", "ema", "discriminator"}
    assert_equal(sets["model"], weights)
    assert_equal(sets["ema"], averages)


@LEGACY
def test_what_trainers_save_beside_the_weights(tmp_path, legacy):
    weights = collections.OrderedDict(state())
    content = {
        "model": weights,
        "args": argparse.Namespace(lr=1e-4, path=pathlib.PurePosixPath("a/b")),
        "float": np.float64(3.5),
        "array": np.arange(3),
        "set": {1, 2},
        "when": datetime.datetime(2024, 1, 2),
        "many": collections.defaultdict(list, a=[1]),
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "size": torch.Size([1, 2]),
        "parameter": nn.Parameter(torch.ones(2)),
        "generator": torch.Generator().get_state(),
    }
    save(content, tmp_path / "f.pt", legacy)
    assert_equal(read_sets(tmp_path / "f.pt")["model"], weights)


@LEGACY
def test_classes_that_do_not_exist_here(tmp_path, legacy, monkeypatch):
    path = tmp_path / "f.pt"
    # a number and a list of ruamel, as XQ-GAN's files have them
    places = {"ruamel": object, "ruamel.number": float, "ruamel.items": list}
    classes = []
    for name, base in places.items():
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        classes.append(type("Scalar", (base,), {"__module__": name}))
        monkeypatch.setattr(sys.modules[name], "Scalar", classes[-1], raising=False)
    number, items = classes[1](1.5), classes[2]([1, 2])
    number.extra = items
    save({"args": [number, items], "state_dict": state()}, path, legacy)
    monkeypatch.undo()
    assert "ruamel" not in sys.modules
    assert_equal(read_sets(path)["model"], state())


HOSTILE = {
    "a shell": lambda path: Calls(os.system, f"touch {path}"),
    "eval": lambda path: Calls(eval, f"open({str(path)!r}, 'w')"),
    "exec": lambda path: Calls(exec, f"open({str(path)!r}, 'w')"),
    "open": lambda path: Calls(open, str(path), "w"),
    "getattr": lambda path: Calls(getattr, Calls(__import__, "os"), "system"),
    "a file of torch": lambda path: Calls(torch.save, 1, str(path)),
    "another load": lambda path: Calls(torch.load, str(path)),
    "hub": lambda path: Calls(torch.hub.load, "x/y", "z"),
    "numpy": lambda path: Calls(np.save, str(path), 1),
    "a list": lambda path: [Calls(os.mkdir, str(path))] * 3,
}


@LEGACY
@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_is_executed(tmp_path, legacy, name, monkeypatch):
    made = tmp_path / "made"
    content = {"model": {"w": torch.ones(2), "x": HOSTILE[name](made)}, "y": HOSTILE[name](made)}
    save(content, tmp_path / "f.pt", legacy)
    for function in ("system", "mkdir"):
        monkeypatch.setattr(os, function, lambda *args: pytest.fail("called"))
    assert_equal(read_sets(tmp_path / "f.pt")["model"], {"w": torch.ones(2)})
    assert not made.exists()


def zip_with_pickle(path, program: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")


# names in places where the unpickler is trusted with some: of torch, and such as torch has
NAMES = [
    "cbuiltins\neval\n(V1\ntR.",
    "ctorch._utils\n_import_dotted_name\n(Vos.system\ntR.",
    "ctorch.storage\n_load_from_bytes\n(Vx\ntR.",
    "ctorch\nload\n(Vx\ntR.",
    "ctorch.FloatStorage\nfrom_file\n(Vx\ntR.",
    "ctorch._tensor\n_rebuild_from_type_v2\n(cbuiltins\neval\ncbuiltins\nint\n(V1\nt}tR.",
    "ctorch.serialization\nos.system\n(Vtouch made\ntR.",
    "cStorage.os\nsystem\n(Vtouch made\ntR.",
    "ios\nsystem\n(Vtouch made\n.",
    "(cos\nsystem\nVtouch made\no.",
    "cos\nsystem\n)\x81}(Va\nVb\nub.",
]


@pytest.mark.parametrize("program", NAMES)
def test_names_within_torch_are_no_way_out(tmp_path, program, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place, name in ((os, "system"), (builtins, "eval")):
        monkeypatch.setattr(place, name, lambda *args: pytest.fail("called"))
    zip_with_pickle(tmp_path / "f.pt", program.encode("latin1"))
    with pytest.raises(ValueError, match=r"holds no weights|is damaged or no file of weights"):
        read_sets(tmp_path / "f.pt")
    assert not (tmp_path / "made").exists()


def test_tensors_stay_within_their_storage(tmp_path):
    class Larger:
        def __reduce__(self):
            storage = torch.ones(4).storage()
            return torch._utils._rebuild_tensor_v2, (storage, *self.shape, False, {})

    for shape in ((0, (1 << 40,), (1,)), (3, (2,), (1,)), (0, (2, 2), (3, 1)), (0, (2,), (-1,))):
        Larger.shape = shape
        save({"model": {"w": Larger()}}, tmp_path / "f.pt")
        with pytest.raises(ValueError, match="is damaged or no file of weights: a tensor of shape"):
            read_sets(tmp_path / "f.pt")


@LEGACY
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_files_that_were_cut_off(tmp_path, legacy, share):
    path = tmp_path / "f.pt"
    save({"model": {f"w{i}": torch.randn(50) for i in range(9)}}, path, legacy)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"f\.pt is damaged"):
        read_sets(path)


def test_archives_that_unpack_to_more(tmp_path):
    path = tmp_path / "f.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10**7)
    with pytest.raises(ValueError, match=r"is a compressed archive, which torch.save never"):
        read_sets(path)


def test_programs_of_torchscript(tmp_path):
    zip_with_pickle(tmp_path / "f.pt", b".")
    with zipfile.ZipFile(tmp_path / "f.pt", "a") as archive:
        archive.writestr("archive/constants.pkl", b".")
    with pytest.raises(ValueError, match=r"is a TorchScript program; save its weights"):
        read_sets(tmp_path / "f.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "neither a safetensors file nor one that torch.save wrote"),
        (b"hello, this is text", "neither a safetensors file"),
        (pickle.dumps({"model": 1}), "neither a safetensors file"),
        (struct.pack("<Q", 1 << 60) + b'{"a":', "damaged safetensors file"),
        (struct.pack("<Q", 10) + b'{"a": 1}  ', "damaged safetensors file"),
    ],
)
def test_files_of_another_kind(tmp_path, content, message):
    (tmp_path / "f.bin").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_sets(tmp_path / "f.bin")


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*missing\.pt"):
        read_sets(tmp_path / "missing.pt")
    with pytest.raises(ValueError, match=r"is a folder: give a file in it"):
        read_sets(tmp_path)


@pytest.mark.parametrize("content", [{}, [torch.ones(2)], {"model": {}}, 3, {"a": "b"}])
def test_no_weights(tmp_path, content):
    save(content, tmp_path / "f.pt")
    with pytest.raises(ValueError, match="holds no weights"):
        read_sets(tmp_path / "f.pt")


def test_safetensors(tmp_path):
    tensors = {key: value.contiguous() for key, value in state().items()}
    save_file(tensors, tmp_path / "f.safetensors", metadata={"format": "pt"})
    assert_equal(read_sets(tmp_path / "f.safetensors")["model"], tensors)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module.module.", "module._orig_mod."])
def test_prefixes_of_wrappers(tmp_path, prefix):
    wrapped = {prefix + key: value for key, value in state().items()}
    save({"state_dict": {"x": torch.ones(1)}, "ema_state_dict": wrapped}, tmp_path / "f.pt")
    assert_equal(read_sets(tmp_path / "f.pt")["ema"], state())


def test_compiled_parts_and_modules_by_that_name(tmp_path):
    save({"a._orig_mod.b": torch.ones(1), "module.c": torch.ones(2)}, tmp_path / "f.pt")
    found = read_sets(tmp_path / "f.pt")["model"]
    assert_equal(found, {"a.b": torch.ones(1), "module.c": torch.ones(2)})


def test_averages_of_lightning(tmp_path):
    plain = {"a.b.weight": torch.zeros(2), "a.b.mean": torch.ones(2), "c_d.bias": torch.zeros(3)}
    averages = {"model_ema.abweight": torch.full((2,), 5.0), "model_ema.c_dbias": torch.ones(3)}
    counts = {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(7)}
    save({"state_dict": plain | averages | counts}, tmp_path / "f.ckpt")
    sets = read_sets(tmp_path / "f.ckpt")
    assert_equal(sets["model"], plain)
    # buffers have no averages
    expected = {"a.b.weight": torch.full((2,), 5.0), "a.b.mean": torch.ones(2)}
    assert_equal(sets["ema"], expected | {"c_d.bias": torch.ones(3)})


def test_tokenizer_and_generator_within_a_trainer(tmp_path):
    trainer = {"vae_local": state(), "var_wo_ddp": {"w": torch.ones(1)}, "config": None}
    save({"epoch": 3, "trainer": trainer}, tmp_path / "f.pth")
    sets = read_sets(tmp_path / "f.pth")
    assert set(sets) == {"model", "generator"}
    assert_equal(sets["model"], state())
    assert_equal(sets["generator"], trainer["var_wo_ddp"])


def test_a_state_dict_by_itself(tmp_path):
    buffer = io.BytesIO()
    torch.save(collections.OrderedDict(state()), buffer)
    (tmp_path / "f.pth").write_bytes(buffer.getvalue())
    assert_equal(read_sets(tmp_path / "f.pth")["model"], state())
