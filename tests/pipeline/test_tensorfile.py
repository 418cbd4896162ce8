"""Tensors come out of every wrapper and prefix, and nothing else comes out of a hostile file."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from pipeline import pickled
from pipeline.errors import CheckpointError
from pipeline.records import Weights
from pipeline.tensorfile import EMA_WRAPPERS, WRAPPERS, TensorFile, read_tensors


def _net(value: float = 1.0) -> dict[str, Tensor]:
    return {
        "stem.weight": torch.full((2, 3), value),
        "stem.bias": torch.full((2,), value),
        "head.weight": torch.full((4, 2), value),
    }


def _saved(folder: Path, content: Any, name: str = "net.pth", *, legacy: bool = False) -> Path:
    torch.save(content, folder / name, _use_new_zipfile_serialization=not legacy)
    return folder / name


def _read(folder: Path, content: Any, weights: Weights = "auto") -> TensorFile:
    return read_tensors([_saved(folder, content)], weights)


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


# --- wrappers, averages, prefixes -----------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrapper", [None, *WRAPPERS])
def test_weights_come_out_of_a_wrapper(
    tmp_path: Path, wrapper: str | None, *, legacy: bool
) -> None:
    content: Any = {wrapper: _net(), "epoch": 3, "args": argparse.Namespace(lr=0.1)}
    path = _saved(tmp_path, content if wrapper else _net(), legacy=legacy)
    file = read_tensors([path])
    assert _same(file.tensors, _net())
    assert file.wrapper == (wrapper or "")
    assert not file.ema


@pytest.mark.parametrize("average", EMA_WRAPPERS)
def test_the_average_is_chosen_as_asked(tmp_path: Path, average: str) -> None:
    content = {"model": _net(1), average: _net(2), "optimizer": {"state": {0: _net(3)}}}
    auto, plain, ema = (_read(tmp_path, content, weights) for weights in ("auto", "model", "ema"))
    assert (auto.wrapper, auto.ema) == (average, True)
    assert (plain.wrapper, plain.ema) == ("model", False)
    assert _same(auto.tensors, _net(2))
    assert _same(ema.tensors, _net(2))
    assert _same(plain.tensors, _net(1))


def test_an_average_of_nothing_is_passed_over(tmp_path: Path) -> None:
    file = _read(tmp_path, {"ema": {"decay": 0.999}, "model": _net()})
    assert (file.wrapper, file.ema) == ("model", False)


def test_an_absent_average_is_said_with_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no moving average.*model, epoch"):
        _read(tmp_path, {"model": _net(), "epoch": 3}, "ema")
    with pytest.raises(CheckpointError, match="no plain weights: it has model_ema"):
        _read(tmp_path, {"model_ema": _net()}, "model")


def test_torch_averages_lose_their_count_and_their_prefix(tmp_path: Path) -> None:
    averaged = {"n_averaged": torch.tensor(9), **{f"module.{n}": t for n, t in _net().items()}}
    file = _read(tmp_path, {"model": {}, "ema": {"state_dict": averaged}})
    assert _same(file.tensors, _net())
    assert file.wrapper == "ema > state_dict, without module."


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "net.", "model._orig_mod."])
def test_prefixes_of_wrappers_in_code_are_stripped(tmp_path: Path, prefix: str) -> None:
    file = _read(tmp_path, {"state_dict": {prefix + n: t for n, t in _net().items()}})
    assert _same(file.tensors, _net())
    assert file.wrapper == f"state_dict, without {prefix}"


def test_a_prefix_that_only_some_carry_stays(tmp_path: Path) -> None:
    mixed = {"model.a": torch.ones(1), "b": torch.ones(1)}
    assert _read(tmp_path, mixed).tensors.keys() == mixed.keys()
    hugging_face = {"convnext.a": torch.ones(1), "convnext.b": torch.ones(1)}
    assert _read(tmp_path, hugging_face).tensors.keys() == hugging_face.keys()


def _lightning() -> dict[str, Tensor]:
    return {f"model.layer{i}.weight": torch.ones(2, 2) for i in range(30)}


def test_metrics_beside_a_network_are_left_out(tmp_path: Path) -> None:
    beside = {"criterion.weight": torch.ones(5), "train_acc.tp": torch.ones(2, 2, dtype=torch.long)}
    file = _read(tmp_path, {"state_dict": {**_lightning(), **beside}, "epoch": 1})
    assert len(file.tensors) == 30
    assert file.wrapper == "state_dict, without model. and 2 others"


def test_a_layer_beside_a_network_is_not_left_out(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"classifier\.weight \(3, 2\) beside the 30"):
        _read(tmp_path, {"state_dict": {**_lightning(), "classifier.weight": torch.ones(3, 2)}})


def test_plain_tensors_come_out_of_parameters_and_odd_types(tmp_path: Path) -> None:
    content = {
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "half": torch.ones(2).half(),
        "small": torch.ones(4).to(torch.float8_e4m3fn),
        "turned": torch.arange(6.0).reshape(2, 3).t(),
        "part": torch.arange(6.0)[2:4],
        "count": torch.tensor(3),
    }
    tensors = _read(tmp_path, content).tensors
    assert {type(tensor) for tensor in tensors.values()} == {Tensor}
    assert not any(tensor.requires_grad for tensor in tensors.values())
    assert torch.equal(tensors["turned"], content["turned"])
    assert torch.equal(tensors["part"], content["part"])
    assert torch.equal(tensors["small"].float(), torch.ones(4))


@pytest.mark.parametrize("kind", ["sparse_coo", "meta"])
def test_tensors_without_elements_are_refused(tmp_path: Path, kind: str) -> None:
    tensor = torch.eye(3).to_sparse() if kind == "sparse_coo" else torch.ones(3, device="meta")
    with pytest.raises(CheckpointError, match=rf"net\.pth: a is a .*{kind} tensor"):
        _read(tmp_path, {"a": tensor})


def test_a_quantized_tensor_is_left_to_its_type(tmp_path: Path) -> None:
    tensor = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    assert not _read(tmp_path, {"a": tensor}).tensors["a"].is_floating_point()


def test_metadata_of_safetensors_is_kept(tmp_path: Path) -> None:
    safetensors.torch.save_file(_net(), tmp_path / "net.safetensors", {"made": "here"})
    file = read_tensors([tmp_path / "net.safetensors"])
    assert file.metadata == {"made": "here"}
    assert _same(file.tensors, _net())


# --- shards ---------------------------------------------------------------------------------------


def test_shards_are_joined_before_prefixes_are_stripped(tmp_path: Path) -> None:
    one = _saved(tmp_path, {"model.a": torch.ones(1)}, "1.bin")
    two = _saved(tmp_path, {"model.b": torch.ones(2)}, "2.bin")
    assert read_tensors([one, two]).tensors.keys() == {"a", "b"}


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "1.safetensors", {"n": "1"})
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "2.safetensors")
    with pytest.raises(CheckpointError, match=r"2\.safetensors holds a, and so does .*1\.safe"):
        read_tensors([tmp_path / "1.safetensors", tmp_path / "2.safetensors"])


# --- code -----------------------------------------------------------------------------------------


class _System:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.system, (f"touch {self.marker}",)


class _Eval(_System):
    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return eval, (f"open({str(self.marker)!r}, 'w')",)


class _Touch(_System):
    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("form", ["zip", "legacy", "plain0", "plain2", "plain4"])
@pytest.mark.parametrize(
    ("kind", "named"),
    [(_System, r"(posix|nt)\.system"), (_Eval, r"builtins\.eval"), (_Touch, "")],
)
def test_code_in_a_pickle_is_named_and_not_run(
    tmp_path: Path, kind: type[_System], named: str, form: str
) -> None:
    marker = tmp_path / "marker"
    content = {"model": {**_net(), "code": kind(marker)}}
    path = tmp_path / "evil.pth"
    if form.startswith("plain"):
        path.write_bytes(pickle.dumps(kind(marker), protocol=int(form[-1])))
    else:
        _saved(tmp_path, content, "evil.pth", legacy=form == "legacy")
    with pytest.raises(
        CheckpointError, match=f"asks to run code while it is read .{named}.*refused"
    ):
        read_tensors([path])
    assert not marker.exists()
    # The same file does run code where nothing guards: the marker can appear.
    if form == "plain2":
        pickle.loads(path.read_bytes())  # noqa: S301
        assert marker.exists()


def test_code_in_the_first_pickle_of_a_legacy_file_is_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    whole = _saved(tmp_path, _net(), legacy=True).read_bytes()
    (tmp_path / "net.pth").write_bytes(pickle.dumps(_System(marker), protocol=2) + whole)
    with pytest.raises(CheckpointError, match="asks to run code"):
        read_tensors([tmp_path / "net.pth"])
    assert not marker.exists()


def test_torchscript_is_refused_as_code(tmp_path: Path) -> None:
    path = _zip(tmp_path, pickle.dumps({}, protocol=2), {"net/constants.pkl": b""})
    with pytest.raises(CheckpointError, match="TorchScript"):
        read_tensors([path])


def test_nothing_is_allowed_that_torch_does_not_allow() -> None:
    theirs = set(torch._weights_only_unpickler._get_allowed_globals())
    assert pickled.ALLOWED - theirs == {"argparse.Namespace"}


# --- memory ---------------------------------------------------------------------------------------


def _zip(
    folder: Path,
    data: bytes,
    records: dict[str, bytes] | None = None,
    method: int = zipfile.ZIP_STORED,
) -> Path:
    """Write a file as torch.save lays it out, around any pickle."""
    path = folder / "made.pth"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("net/data.pkl", data)
        for name, content in {"net/version": b"3\n", **(records or {})}.items():
            archive.writestr(name, content)
    return path


def _pickle_of(tensor: Tensor, **replaced: bytes) -> bytes:
    """Return the pickle that torch.save writes of a dict with this tensor, with bytes replaced."""
    buffer = io.BytesIO()
    torch.save({"a": tensor}, buffer)
    with zipfile.ZipFile(buffer) as archive:
        data = archive.read("archive/data.pkl")
    for old, new in replaced.items():
        assert data.count(bytes.fromhex(old[1:])) == 1
        data = data.replace(bytes.fromhex(old[1:]), new)
    return data


SIZE, COUNT = "x4b5b85", "x4b5b74"  # BININT1 91 and TUPLE1; BININT1 91 and TUPLE
HUGE = b"\x8a\x05" + (10**11).to_bytes(5, "little")


def test_the_made_zip_is_one_that_is_read(tmp_path: Path) -> None:
    path = _zip(tmp_path, _pickle_of(torch.ones(91)), {"net/data/0": bytes(4 * 91)})
    assert torch.equal(read_tensors([path]).tensors["a"], torch.zeros(91))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_giant_tensor_over_few_bytes_is_refused(tmp_path: Path, *, legacy: bool) -> None:
    giant = torch.zeros(1).expand(10**11)
    path = _saved(tmp_path, {"a": giant}, legacy=legacy)
    assert path.stat().st_size < 10_000
    with pytest.raises(CheckpointError, match=r"claims more .*shape \(100000000000,\) and strides"):
        read_tensors([path])


def test_a_tensor_larger_than_its_storage_is_refused(tmp_path: Path) -> None:
    data = _pickle_of(torch.ones(91), **{SIZE: HUGE + b"\x85"})
    path = _zip(tmp_path, data, {"net/data/0": bytes(4 * 91)})
    with pytest.raises(CheckpointError, match=r"claims more .*over 364 bytes"):
        read_tensors([path])


def test_a_storage_larger_than_its_file_is_refused(tmp_path: Path) -> None:
    data = _pickle_of(torch.ones(91), **{COUNT: HUGE + b"t"})
    path = _zip(tmp_path, data, {"net/data/0": bytes(4 * 91)})
    with pytest.raises(CheckpointError, match=r"claims more .*a storage of 400000000000 bytes"):
        read_tensors([path])


def test_a_storage_beyond_its_record_reads_nothing_beyond_the_file(tmp_path: Path) -> None:
    path = _zip(tmp_path, _pickle_of(torch.ones(91)), {"net/data/0": b""})
    with path.open("ab") as file:  # room for the claim, but no longer torch's own layout
        file.write(bytes(400))
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        read_tensors([path])


def test_many_tensors_over_the_same_bytes_are_refused(tmp_path: Path) -> None:
    shared = torch.zeros(1000)
    path = _saved(tmp_path, {str(i): shared for i in range(1000)})
    with pytest.raises(CheckpointError, match="claims more than it holds"):
        read_tensors([path])


@pytest.mark.parametrize("record", ["net/data.pkl", "net/data/0", "net/version"])
def test_a_zip_bomb_is_refused(tmp_path: Path, record: str) -> None:
    path = tmp_path / "bomb.pth"
    records = {"net/data.pkl": _pickle_of(torch.ones(91)), "net/data/0": b"", "net/version": b"3"}
    records[record] += bytes(100 * 2**20)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            method = zipfile.ZIP_DEFLATED if name == record else zipfile.ZIP_STORED
            archive.writestr(name, content, method)
    assert path.stat().st_size < 2**20
    with pytest.raises(CheckpointError, match=r"claims more .*compressed records"):
        read_tensors([path])


def test_a_second_directory_is_refused(tmp_path: Path) -> None:
    path = _saved(tmp_path, _net())
    whole = path.read_bytes()
    path.write_bytes(whole + whole)
    with pytest.raises(CheckpointError, match="directory is not at its end"):
        read_tensors([path])
    path.write_bytes(whole[:-2] + struct.pack("<H", 5) + b"notes")
    with pytest.raises(CheckpointError, match="directory is not at its end"):
        read_tensors([path])


def test_a_pickle_cannot_ask_for_memory_by_a_number(tmp_path: Path) -> None:
    call = b"c__builtin__\nbytearray\n" + HUGE + b"\x85R"
    path = _zip(tmp_path, b"\x80\x02}X\x01\x00\x00\x00a" + call + b"s.")
    with pytest.raises(CheckpointError, match=r"builtins\.bytearray"):
        read_tensors([path])


def test_a_key_that_takes_for_ever_to_hash_is_refused(tmp_path: Path) -> None:
    doubled = b"q\x00h\x00\x86" * 64  # each tuple holds the one before twice: 2**64 to hash
    path = _zip(tmp_path, b"\x80\x02})" + doubled + b"Ns.")
    with pytest.raises(CheckpointError, match="keys that are no names"):
        read_tensors([path])


def test_more_instructions_than_any_checkpoint_has_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pickled, "MAX_OPCODES", 1000)
    path = _zip(tmp_path, b"\x80\x02" + b"]" * 2000 + b".")
    with pytest.raises(CheckpointError, match="more than 1000 pickle instructions"):
        read_tensors([path])


# --- damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.3, 0.7, 0.999])
def test_a_truncated_file_is_said_to_be(tmp_path: Path, form: str, share: float) -> None:
    path = tmp_path / ("net.safetensors" if form == "safetensors" else "net.pth")
    if form == "safetensors":
        safetensors.torch.save_file(_net(), path)
    else:
        _saved(tmp_path, _net(), legacy=form == "legacy")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        read_tensors([path])


HEADERS: dict[str, bytes] = {
    "longer than the file": struct.pack("<Q", 2**40) + b"{}",
    "longer than any": struct.pack("<Q", 2**63) + b"{}",
    "beyond the data": b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}',
    "another size": b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}',
    "huge shape": b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}',
    "overlap": b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
    b'"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    "unknown type": b'{"a":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}',
    "no object": b"[1, 2, 3]",
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS.keys())
def test_a_lying_header_is_refused(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "lie.safetensors"
    whole = header if header[:1] not in b"{[" else struct.pack("<Q", len(header)) + header
    path.write_bytes(whole + bytes(4))
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        read_tensors([path])


def test_a_pickle_called_safetensors_is_not_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    path.write_bytes(pickle.dumps(_System(tmp_path / "marker")))
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        read_tensors([path])
    assert not (tmp_path / "marker").exists()


def test_an_absent_file_is_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        read_tensors([tmp_path / "absent.pth"])


def test_a_file_beyond_any_checkpoint_is_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "sparse.pth"
    with path.open("wb") as file:
        file.truncate(64 * 2**30 + 1)  # a hole: no disk is used
    with pytest.raises(CheckpointError, match="at most 68719476736"):
        read_tensors([path])


def test_an_ordered_dict_with_its_metadata_is_plain(tmp_path: Path) -> None:
    state = torch.nn.Sequential(torch.nn.Linear(2, 3)).state_dict()
    assert isinstance(state, OrderedDict)
    assert read_tensors([_saved(tmp_path, state)]).tensors.keys() == {"0.weight", "0.bias"}


def test_a_network_may_share_its_storage_with_its_average(tmp_path: Path) -> None:
    net = _net()
    shared = {
        **{f"model.{n}": t for n, t in net.items()},
        **{f"ema.{n}": t for n, t in net.items()},
    }
    torch.save(shared, tmp_path / "shared.pth")
    assert len(read_tensors([tmp_path / "shared.pth"]).tensors) == 2 * len(net)
