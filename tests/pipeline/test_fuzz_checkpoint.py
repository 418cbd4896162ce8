"""Damaged and hostile checkpoint files: one kind of error comes out, no code runs, memory stays.

Run as a program, it fuzzes in a process of its own: `python test_fuzz_checkpoint.py KIND FOLDER`
prints how many files it read, how many were refused and how far its memory grew.
"""

from __future__ import annotations

import argparse
import io
import json
import pickletools
import resource
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import CheckpointError
from pipeline.locate import locate
from pipeline.tensorfile import read_tensors

EXAMPLES = 1500
ADDRESS_SPACE = 3 * 2**30
"""Beyond what the process has when it starts; torch's threads alone take half of it."""

RESIDENT = 192 * 2**20
KINDS = ("zip", "legacy", "pickle", "opcodes", "safetensors", "index")
ALLOCATION = "allocation"  # what shows that the cap is one

NAMES = (
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch\nFloatStorage\n",
    b"ccollections\nOrderedDict\n",
    b"ccollections\nCounter\n",
    b"cargparse\nNamespace\n",
    b"ctorch.nn.parameter\nParameter\n",
    b"ctorch\nSize\n",
    b"c__builtin__\nbytearray\n",
    b"cos\nmkdir\n",
)
PARTS = (
    *NAMES,
    b"X\x06\x00\x00\x00marker\x85R",
    b"X\x07\x00\x00\x00storage",
    b"X\x01\x00\x00\x000",
    b"X\x03\x00\x00\x00cpu",
    b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"J\xff\xff\xff\xff",
    *(bytes([code]) for code in b"(tR}]sueaQ)\x81b\x85\x86\x87N\x88\x89"),
    *(b"K" + bytes([n]) for n in (0, 1, 2, 255)),
    *(b"q" + bytes([n]) for n in (0, 1)),
    *(b"h" + bytes([n]) for n in (0, 1)),
)


def _content() -> dict[str, object]:
    net = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2).half()}
    return {"model": net, "epoch": 3, "args": argparse.Namespace(lr=0.1)}


def _pickled() -> bytes:
    buffer = io.BytesIO()
    torch.save(_content(), buffer)
    with zipfile.ZipFile(buffer) as archive:
        return archive.read("archive/data.pkl")


def _around(pickle: bytes) -> bytes:
    """Return a whole zip around a pickle: its sums are right, whatever the pickle says."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("net/data.pkl", pickle)
        archive.writestr("net/data/0", bytes(24))
        archive.writestr("net/data/1", bytes(4))
        archive.writestr("net/version", b"3\n")
    return buffer.getvalue()


def _seed(kind: str) -> bytes:
    if kind in {"zip", "legacy"}:
        buffer = io.BytesIO()
        torch.save(_content(), buffer, _use_new_zipfile_serialization=kind == "zip")
        return buffer.getvalue()
    if kind == "safetensors":
        return safetensors.torch.save({"a.weight": torch.ones(2, 3), "a.bias": torch.ones(2)})
    if kind == "index":
        weights = {"a": "b.safetensors", "c": "d.safetensors"}
        return json.dumps({"weight_map": weights, "metadata": {"text": "x" * 300}}).encode()
    return _pickled()


def _instructions(pickle: bytes) -> list[bytes]:
    """Cut a pickle into its opcodes, each with its argument."""
    starts = [place for _, _, place in pickletools.genops(pickle) if place is not None]
    return [pickle[i:j] for i, j in pairwise([*starts, len(pickle)])]


def _edited(
    whole: Sequence[Any], parts: st.SearchStrategy[Sequence[Any]]
) -> st.SearchStrategy[Any]:
    """Overwrite, insert and remove at up to four places."""
    place = st.integers(0, len(whole) - 1)
    edits = st.lists(st.tuples(place, st.sampled_from([1, 1, 1, 0, 3]), parts), max_size=4)

    def edit(where: list[tuple[int, int, Sequence[Any]]]) -> Sequence[Any]:
        data = whole
        for start, removed, added in where:
            data = [*data[:start], *added, *data[start + removed :]]
        return data

    return edits.map(edit)


def _mutations(kind: str) -> st.SearchStrategy[bytes]:
    if kind == "opcodes":
        whole = _instructions(_pickled())
        parts = st.lists(st.sampled_from([*whole, *PARTS]), max_size=2)
        return _edited(whole, parts).map(lambda ops: _around(b"".join(ops)))
    data = _seed(kind)
    # Most keep their end: a file without one is refused before anything in it is looked at.
    cut = st.sampled_from([len(data) + 40] * 6 + [len(data) * n // 7 for n in range(7)])
    single = st.integers(0, 255).map(lambda byte: bytes([byte]))
    parts = st.one_of(single, single, st.binary(max_size=9))
    finish = _around if kind == "pickle" else bytes
    return st.builds(lambda edited, end: finish(bytes(edited)[:end]), _edited(data, parts), cut)


def _fuzz(kind: str, folder: Path) -> Counter[str]:
    """Read many mutated files; anything but a CheckpointError escapes."""
    suffix = {"safetensors": ".safetensors", "index": ".safetensors.index.json"}.get(kind, ".pth")
    path = folder / f"net{suffix}"
    for name in ("b", "d"):
        safetensors.torch.save_file({name: torch.ones(1)}, folder / f"{name}.safetensors")
    outcomes: Counter[str] = Counter()

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(_mutations(kind))
    def read(data: bytes) -> None:
        path.write_bytes(data)
        try:
            file = read_tensors(locate(path).files)
        except CheckpointError as error:
            outcomes["refused"] += 1
            outcomes["long"] += "\n" in str(error)
        else:
            for tensor in file.tensors.values():
                if tensor.layout == torch.strided and not tensor.is_meta:
                    tensor.to(torch.float32, copy=True)
            outcomes["read"] += 1

    read()
    return outcomes


def _resident() -> int:
    """Return the most memory held so far, bytes; getrusage would count what the parent held."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def _main(kind: str, folder: Path) -> None:
    torch.ones(2).half().to(torch.float32)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + ADDRESS_SPACE, taken + ADDRESS_SPACE))
    before = _resident()
    outcomes: Counter[str] = Counter()
    if kind == ALLOCATION:
        outcomes["read"] = len(bytearray(RESIDENT + 2**26))
    else:
        outcomes = _fuzz(kind, folder)
    print(json.dumps({**outcomes, "grown": _resident() - before}))  # noqa: T201 - the parent reads it


def _run(kind: str, folder: Path) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, __file__, kind, "."],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=folder,
        env={"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    counts: dict[str, int] = json.loads(done.stdout)
    return counts


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_files_are_read_or_refused_and_nothing_else(kind: str, tmp_path: Path) -> None:
    counts = _run(kind, tmp_path)
    assert counts["refused"] > EXAMPLES / 10
    # Both happen, else the mutations would be too strong to reach far into a file.
    assert counts["read"] > EXAMPLES / 100
    assert counts["long"] == 0
    assert counts["grown"] < RESIDENT
    assert not (tmp_path / "marker").exists()
    left = {item.name for item in tmp_path.iterdir()} - {".hypothesis"}
    assert left == {"b.safetensors", "d.safetensors", *(n for n in left if n.startswith("net."))}


def test_the_fuzz_sees_memory_that_grows(tmp_path: Path) -> None:
    assert _run(ALLOCATION, tmp_path)["grown"] > RESIDENT


def test_the_fuzz_sees_code_that_runs(tmp_path: Path) -> None:
    call = b"\x80\x02cos\nmkdir\nX\x06\x00\x00\x00marker\x85R."
    program = f"import pickle; pickle.loads({call!r})"
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    assert (tmp_path / "marker").exists()


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]))
