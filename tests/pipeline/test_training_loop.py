"""The loop learns, saves, goes on bit for bit, and shares a batch among processes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from calib.oscillation import dampening
from pipeline.distributed import Group
from pipeline.errors import TrainingError
from pipeline.recorder import CHECKPOINT, EVENTS, METRICS
from pipeline.records import Finetuning, QuantizedModel
from pipeline.student import Student, float_network
from pipeline.training_loop import Feed, Loop
from pipeline.worker import silent

Model = tuple[QuantizedModel, dict[str, Any]]
HOW = Finetuning(
    epochs=2,
    batch=4,
    rate=0.02,
    save_minutes=1e9,
    block_weight=0.5,
    label_weight=0.1,
    drop_path=0.2,
)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def feed(pixels: NDArray[np.float32], batch: int) -> Feed:
    labels = np.arange(len(pixels)) % 6

    def batches(epoch: int, start: int) -> Any:
        order = np.random.default_rng(epoch).permutation(len(pixels))
        for index in range(start, len(pixels) // batch):
            mine = order[index * batch : (index + 1) * batch]
            yield pixels[mine], labels[mine]

    return Feed(per_epoch=len(pixels) // batch, batches=batches)


def loop(
    model: Model, pixels: NDArray[np.float32], keep: Path, how: Finetuning = HOW
) -> tuple[Student, Loop]:
    student = Student(*model)
    teacher = float_network(*model)
    made = Loop(
        student, teacher, how, feed(pixels, how.batch), keep=keep, ranks=Group(), device=CPU
    )
    return student, made


def same(a: Model, b: Model) -> bool:
    return a[0] == b[0] and all(np.array_equal(a[1][name], b[1][name]) for name in a[1])


def test_it_learns_what_the_float_network_says(
    small_model: Model, pixels: NDArray[np.float32], tmp_path: Path
) -> None:
    how = Finetuning(epochs=60, batch=8, rate=0.03, scale_rate=3e-4, warm_up=0.1)
    student, made = loop(small_model, pixels, tmp_path, how)
    teacher = float_network(*small_model)
    image = torch.from_numpy(pixels)

    def error() -> float:
        with torch.no_grad():
            return float((student.network(image) - teacher(image)).square().mean())

    before = error()
    made.train(silent)
    assert error() < before / 2
    assert made.step == 120
    assert made.lines[-1]["step"] == 120
    assert made.lines[-1]["sqnr_db"] > made.lines[0]["sqnr_db"]
    rates = [line["rate"] for line in made.lines]
    assert max(rates) == pytest.approx(how.rate)
    assert rates[0] == pytest.approx(how.rate / 12)
    assert rates[-1] < how.rate / 50
    assert not same(student.quantized(), small_model)


def test_a_resumed_training_is_the_one_that_was_not_interrupted(
    small_model: Model, pixels: NDArray[np.float32], tmp_path: Path
) -> None:
    whole, uninterrupted = loop(small_model, pixels, tmp_path / "a")
    uninterrupted.train(silent)
    _, first = loop(small_model, pixels, tmp_path / "b")

    def stops_in_the_second_epoch(done: int, total: int, note: str = "") -> None:
        del total, note
        if done == 5:
            first.stop()

    with pytest.raises(TrainingError, match=r"stopped after update 5 of 8; it is kept in .*"):
        first.train(stops_in_the_second_epoch)
    assert (tmp_path / "b" / CHECKPOINT).exists()
    rest, second = loop(small_model, pixels, tmp_path / "b")
    second.train(silent)
    assert second.resumed_at == 5
    assert same(rest.quantized(), whole.quantized())
    for a, b in zip(second.learnt, uninterrupted.learnt, strict=True):
        assert torch.equal(a, b)
    strip = [{k: v for k, v in line.items() if k != "images_per_second"} for line in second.lines]
    wanted = [
        {k: v for k, v in line.items() if k != "images_per_second"} for line in uninterrupted.lines
    ]
    assert strip == wanted


def test_a_checkpoint_is_written_every_so_often(
    small_model: Model, pixels: NDArray[np.float32], tmp_path: Path
) -> None:
    _, made = loop(small_model, pixels, tmp_path, replace(HOW, save_minutes=0.0))
    made.train(silent)
    assert torch.load(tmp_path / CHECKPOINT, weights_only=True)["step"] == 8
    lines = (tmp_path / METRICS).read_text().splitlines()
    assert [json.loads(line) for line in lines] == made.lines
    assert {path.name for path in tmp_path.iterdir()} <= {CHECKPOINT, METRICS, EVENTS}


def test_a_checkpoint_of_something_else_is_refused(
    small_model: Model, pixels: NDArray[np.float32], tmp_path: Path
) -> None:
    (tmp_path / CHECKPOINT).write_bytes(b"no checkpoint")
    _, made = loop(small_model, pixels, tmp_path)
    with pytest.raises(TrainingError, match=r"is not a checkpoint of this training.*--restart"):
        made.train(silent)


def test_a_loss_that_is_not_finite_stops_with_the_step_and_the_last_checkpoint(
    small_model: Model, pixels: NDArray[np.float32], tmp_path: Path
) -> None:
    broken = pixels.copy()
    _, made = loop(small_model, broken, tmp_path, replace(HOW, save_minutes=0.0))

    def breaks(done: int, total: int, note: str = "") -> None:
        del total, note
        if done == 3:
            broken[:] = math.nan

    with pytest.raises(TrainingError) as error:
        made.train(breaks)
    assert "the loss of update 4 of 8 is nan" in str(error.value)
    assert str(tmp_path / CHECKPOINT) in str(error.value)
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    assert state["step"] == 3
    assert all(torch.isfinite(mean).all() for mean in state["mean"])


def test_the_exported_weights_are_the_mean(
    small_model: Model, pixels: NDArray[np.float32], tmp_path: Path
) -> None:
    how = replace(HOW, average=0.9, drop_path=0.0)
    _, made = loop(small_model, pixels, tmp_path / "a", how)
    values: list[torch.Tensor] = []

    def keep(done: int, total: int, note: str = "") -> None:
        del total, note
        if done:
            values.append(made.learnt[0].detach().clone())

    made.train(keep)
    assert len(values) == 8
    wanted = Student(*small_model).groups()[0][0].detach().clone()
    for index, value in enumerate(values):
        # As long as few are in it, it is their plain mean, the start's among them.
        wanted = torch.lerp(wanted, value, max(0.1, 1 / (index + 2)))
    torch.testing.assert_close(made.learnt[0].detach(), wanted)
    _, last = loop(small_model, pixels, tmp_path / "b", replace(how, average=0.0))
    last.train(silent)
    torch.testing.assert_close(last.learnt[0].detach(), values[-1])


def test_oscillation_is_frozen_where_weights_have_four_bits(
    few_bits_model: Model, pixels: NDArray[np.float32], tmp_path: Path
) -> None:
    def frozen(oscillation: Any) -> set[int]:
        how = replace(HOW, oscillation=oscillation)
        _, made = loop(few_bits_model, pixels, tmp_path / oscillation, how)
        for history in made.watch.histories:
            history.frequency.fill_(1.0)
        made.train(silent)
        pairs = zip(made.watch.histories, made.trainee.layers.values(), strict=True)
        return {layer.grid.bits for history, layer in pairs if history.frozen.any()}

    assert frozen("auto") == {4}
    assert frozen("freeze") == {4, 8}
    assert frozen("count") == set()


def test_weights_are_drawn_to_their_cells_middle_where_asked(
    few_bits_model: Model, pixels: NDArray[np.float32], tmp_path: Path
) -> None:
    def away(oscillation: Any) -> float:
        how = replace(HOW, oscillation=oscillation, epochs=20, rate=0.05, drop_path=0.0)
        student, made = loop(few_bits_model, pixels, tmp_path / oscillation, how)
        made.train(silent)
        return float(dampening(student.layers).detach())

    assert away("dampen") < 0.9 * away("count")


def test_a_weight_with_a_small_steady_gradient_moves_by_the_rate(
    small_model: Model, pixels: NDArray[np.float32], tmp_path: Path
) -> None:
    """Gradients of a relative error are tiny; Adam must not take them for nothing."""
    # As small as those of an 8-bit network with millions of weights.
    small = Finetuning(logit_weight=1e-4, kl_weight=0.0, block_weight=0.0)
    how = replace(small, epochs=1, batch=8, rate=0.01, warm_up=0.0, average=0.0)
    student, made = loop(small_model, pixels, tmp_path, how)
    weight = next(iter(student.layers.values())).weight
    before = weight.detach().clone()
    made.update(torch.from_numpy(pixels[:8]), torch.zeros(8, dtype=torch.int64))
    assert weight.grad is not None
    felt = weight.grad != 0
    assert felt.float().mean() > 0.5
    assert weight.grad[felt].abs().median() < 1e-8
    moved = (weight.detach() - before)[felt].abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.01), rtol=0.02, atol=0)


def test_a_gradient_much_longer_than_those_before_it_is_shortened(
    small_model: Model, pixels: NDArray[np.float32], tmp_path: Path
) -> None:
    _, made = loop(small_model, pixels, tmp_path, replace(HOW, drop_path=0.0))
    image, labels = torch.from_numpy(pixels[:4]), torch.zeros(4, dtype=torch.int64)
    made.update(image, labels)
    usual = made.norm
    made.norm = usual / 100
    made.update(image, labels)
    norm = torch.stack([p.grad.norm() for p in made.learnt if p.grad is not None]).norm()
    assert float(norm) <= 3 * usual / 100 * 1.01
    assert made.norm < usual / 20


def test_a_gradient_that_is_not_finite_is_never_saved(
    small_model: Model, pixels: NDArray[np.float32], tmp_path: Path
) -> None:
    _, made = loop(small_model, pixels, tmp_path, replace(HOW, save_minutes=0.0))

    def breaks(done: int, total: int, note: str = "") -> None:
        del total, note
        if done == 3:
            made.learnt[0].register_hook(lambda grad: grad * math.inf)  # type: ignore[no-untyped-call]

    with pytest.raises(TrainingError, match="the gradient of update 4 of 8 is"):
        made.train(breaks)
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    assert state["step"] == 3
    assert all(torch.isfinite(mean).all() for mean in state["mean"])


TWO = """
import sys, numpy as np, torch
from pathlib import Path
from torch import distributed as dist
from pipeline.quantize import read
from pipeline.records import Finetuning
from pipeline.distributed import Group
from pipeline.student import Student, float_network
from pipeline.training_loop import Feed, Loop

torch.set_num_threads(1)
rank, ranks, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
if ranks > 1:
    store = dist.FileStore(str(folder / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
model = read(folder)
student = Student(*model)
how = Finetuning(epochs=1, batch=8, block_weight=0.3, label_weight=0.1, drop_path=0.2)
part = slice(rank * 8 // ranks, (rank + 1) * 8 // ranks)
pixels = np.load(folder / "pixels.npy")[:8][part]
labels = (np.arange(8) % 6)[part]
keep = folder / f"{ranks}-{rank}"
keep.mkdir()

def made(student):
    return Loop(
        student, float_network(*model), how, Feed(per_epoch=2, batches=lambda *_: iter(())),
        keep=keep, ranks=Group(rank=rank, size=ranks), device=torch.device("cpu"),
    )

def learnt(loop, name):
    return {f"{name}{i}": p.detach().numpy().copy() for i, p in enumerate(loop.learnt)}

loop = made(student)
image, named = torch.from_numpy(pixels), torch.from_numpy(labels)
line = loop.update(image, named)
grads = {f"grad{i}": p.grad.numpy().copy() for i, p in enumerate(loop.learnt)}
values = learnt(loop, "value")
loop.save()
loop.update(image, named)
# Another process, on another machine: its folder holds no checkpoint.
again = made(Student(*model))
again._restore()
assert again.step == 1
again.update(image, named)
after = learnt(loop, "on") | learnt(again, "again")
np.savez(folder / f"{ranks}-{rank}.npz", loss=line["loss"], **grads, **values, **after)
"""


def test_a_batch_split_over_two_processes_gives_the_gradients_of_one(
    small_model: Model, pixels: NDArray[np.float32], tmp_path: Path
) -> None:
    """Two real processes, on gloo."""
    from pipeline.quantize import write

    write(tmp_path, *small_model)
    np.save(tmp_path / "pixels.npy", pixels)
    words = [sys.executable, "-c", TWO]
    alone = subprocess.Popen([*words, "0", "1", str(tmp_path)])
    both = [subprocess.Popen([*words, str(rank), "2", str(tmp_path)]) for rank in (0, 1)]
    assert [process.wait(timeout=300) for process in (alone, *both)] == [0, 0, 0]
    one, first, second = (dict(np.load(tmp_path / f"{name}.npz")) for name in ("1-0", "2-0", "2-1"))
    assert any(np.abs(one[name]).max() > 1e-4 for name in one if name.startswith("grad"))
    for name, value in one.items():
        assert np.array_equal(first[name], second[name]), f"{name} is not in step"
        if name.startswith("again"):
            for every in (one, first):
                assert np.array_equal(every[name], every[name.replace("again", "on")]), name
        if name.startswith("grad") or name == "loss":
            most = max(1e-6, float(np.abs(value).max()))
            assert np.abs(first[name] - value).max() <= 1e-4 * most, name
