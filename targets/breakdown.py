"""Where an artifact's time goes, against what its pointwise layers alone take and the roofline.

In: an artifact and the folder with its integers. Out: milliseconds of each kind of operation, by
the runtime's own profiler; the same of the pointwise layers alone, in artifacts of their own, one
per stage of the network, which take turns with the whole, so that both see the same noise; and what
this machine can do at most.

Source: Williams, Waterman and Patterson, "Roofline: an insightful visual performance model", 2009.
"""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import TypeAdapter

from pipeline import quantize
from pipeline.records import Export
from targets.base import NotRun, OpTime, runtime
from targets.graph import Graph, Input, Linear, Mean, Op, QuantizePair
from targets.translate import build_graph

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from pipeline.worker import Progress
    from targets.base import Image, Runtime, Session
    from targets.graph import Weighted

TURNS, PER_TURN = 3, 5
INFERENCES = TURNS * PER_TURN
WARM_UP = 2
COPIED_BYTES, COPIES = 1 << 26, 5
"""More than caches hold."""


def breakdown_stage(
    name: str,
    path: str,
    model: str | None,
    image_shape: Sequence[int],
    folder: str,
    progress: Progress,
) -> dict[str, Any]:
    """Take an artifact's time apart.

    Args:
        name: The runtime.
        path: The artifact.
        model: Folder with params.json and tensors.safetensors, for the floor; None goes without.
        image_shape: NCHW of one input.
        folder: For what is written in between.
        progress: Called per part.

    Returns:
        The fields of a `Breakdown` from `outcome` on, as JSON.
    """
    target = runtime(name)
    with TemporaryDirectory(dir=folder) as place:

        @cache
        def parts() -> _Parts | None:
            """Return them; made only where the whole has been told."""
            return None if model is None else _Parts(target, Path(path), Path(model), Path(place))

        def artifacts() -> Iterator[tuple[Path, Image]]:
            yield Path(path), np.zeros(tuple(image_shape), np.float32)
            made = parts()
            yield from made.artifacts if made else ()

        whole, *alone = in_turns(target, artifacts, progress)
        if isinstance(whole, NotRun):
            return {"outcome": "not_run", "reason": whole.reason}
        made = parts()
    return {
        "outcome": "measured",
        "method": f"{target.name}'s own profiler, medians of {TURNS} turns of {PER_TURN} "
        "inferences, 1 thread",
        "unprofiled_ms": unprofiled_ms(target.load(Path(path), threads=1), image_shape),
        **by_kind(whole),
        **(made.floor(alone) if made else {}),
    }


def in_turns(
    target: Runtime, artifacts: Callable[[], Iterable[tuple[Path, Image]]], progress: Progress
) -> list[list[OpTime] | NotRun]:
    """Let artifacts take turns at the runtime's profiler; of each operation the median turn.

    Args:
        target: The runtime.
        artifacts: Gives them and an image for each, in every turn the same. Where the first is not
            told, no other is asked for.
        progress: Called per artifact.
    """
    turns = list[list[list[OpTime] | NotRun]]()
    for turn in range(TURNS):
        turns.append([])
        for index, (path, image) in enumerate(artifacts()):
            found = target.op_times(path, image, threads=1, inferences=PER_TURN)
            if isinstance(found, NotRun) and index == 0:
                return [found]
            turns[-1].append(found)
            progress(turn, TURNS)
    progress(TURNS, TURNS)
    return [_median_turn(one) for one in zip(*turns, strict=True)]


def _median_turn(turns: Sequence[list[OpTime] | NotRun]) -> list[OpTime] | NotRun:
    told = list[list[OpTime]]()
    for one in turns:
        if isinstance(one, NotRun):
            return one
        told.append(one)
    # Not by name: OpenVINO names what it makes itself anew in every load.
    if len({tuple((op.kind, op.op) for op in ops) for ops in told}) > 1:
        return NotRun(reason="the profiler tells other operations in one turn than in another")
    return [
        replace(ops[0], ms=float(np.median([op.ms for op in ops])))
        for ops in zip(*told, strict=True)
    ]


def unprofiled_ms(session: Session, image_shape: Sequence[int]) -> float:
    """Return the median wall time of an inference that nothing looks at.

    Args:
        session: A loaded artifact.
        image_shape: NCHW of one input.
    """
    image, ms = np.zeros(tuple(image_shape), np.float32), []
    for _ in range(WARM_UP + INFERENCES):
        started = time.perf_counter()
        session(image)
        ms.append(1000 * (time.perf_counter() - started))
    return float(np.median(ms[WARM_UP:]))


def by_kind(found: Sequence[OpTime]) -> dict[str, Any]:
    """Return the fields of a `Breakdown` that follow from the operations of an inference."""
    ms, ops = defaultdict[str, float](float), Counter[str]()
    for one in found:
        ms[one.kind] += one.ms
        ops[one.kind] += 1
    fallbacks = [one.ms for one in found if one.is_fallback]
    return {
        "inferences": INFERENCES,
        "ms": dict(ms),
        "ops": dict(ops),
        "fallback_ms": sum(fallbacks),
        "fallback_ops": len(fallbacks),
    }


class _Parts:
    """The pointwise layers of an artifact in artifacts of their own, one per stage."""

    def __init__(self, target: Runtime, path: Path, model: Path, folder: Path) -> None:
        metadata = target.read_metadata(path)
        self.export = TypeAdapter(Export).validate_python(json.loads(metadata)["export"])
        record, arrays = quantize.read(model)
        self.whole = build_graph(record, arrays, target.capabilities, self.export)
        self.batch = 1 if self.export.batch == "dynamic" else self.export.batch
        self.graphs = pointwise_alone(self.whole)
        self.artifacts: list[tuple[Path, Image]] = []
        for index, graph in enumerate(self.graphs):
            artifact = folder / f"{index}{target.capabilities.suffix}"
            target.export(graph, artifact, metadata)
            image = np.zeros((self.batch, *graph.ops[0].shape), np.float32)
            self.artifacts.append((artifact, image))

    def floor(self, found: Sequence[list[OpTime] | NotRun]) -> dict[str, float]:
        """Return the fields of a `Breakdown` that follow from what the parts take."""
        told = [[] if isinstance(one, NotRun) else one for one in found]
        ms = [sum(op.ms for op in ops if op.kind == "pointwise") for ops in told]
        if not all(ms):
            return {}  # too short for the profiler's clock
        rate = max(
            1000 * self._macs(graph) / one for graph, one in zip(self.graphs, ms, strict=True)
        )
        of_floats = 2 if self.export.scheme == "float16" else 4
        stored = sum(
            op.weight.size * (of_floats if op.integers is None else 1) for op in self.whole.weighted
        )
        copied = bandwidth()
        return {
            "floor_ms": sum(ms),
            "macs_per_second": rate,
            "bytes_per_second": copied,
            "bound_ms": 1000 * max(self._macs(self.whole) / rate, stored / copied),
        }

    def _macs(self, graph: Graph) -> int:
        return self.batch * sum(map(macs_of, graph.weighted))


def pointwise_alone(graph: Graph) -> list[Graph]:
    """Return, for each stage of the network, its pointwise layers one after another.

    The sites that they read and write are between them, so they run with the integers that they
    have in the whole; what is left out is everything else.
    """
    stages = defaultdict[str, list[Op]](list)
    for op in graph.ops:
        if _belongs(graph, op):
            stages[op.name.split(".blocks.")[0]].append(op)
    return [replace(graph, ops=tuple(_chained(ops))) for ops in stages.values()]


def _belongs(graph: Graph, op: Op) -> bool:
    if isinstance(op, QuantizePair):
        beside = [graph[name] for name in op.inputs] + list(graph.users(op.name))
        return any(isinstance(one, Linear) and ".blocks." in one.name for one in beside)
    return isinstance(op, Linear) and ".blocks." in op.name


def _chained(ops: Sequence[Op]) -> list[Op]:
    first = next(op for op in ops if isinstance(op, Linear))
    _, height, width = first.shape
    chain: list[Op] = [Input(name="input", inputs=(), shape=(first.weight.shape[1], height, width))]
    for op in ops:
        chain.append(replace(op, inputs=(chain[-1].name,), shape=_shape(op, chain[-1])))
    last = chain[-1]
    return [*chain, Mean(name="mean", inputs=(last.name,), shape=last.shape[:1])]


def _shape(op: Op, before: Op) -> tuple[int, ...]:
    return op.shape if isinstance(op, Linear) else before.shape


def macs_of(op: Weighted) -> int:
    """Return the multiply-accumulates of a layer for one image."""
    return int(op.weight.size * np.prod(op.shape[1:]))


def bandwidth() -> float:
    """Return the bytes per second, read and written, at which one thread copies memory."""
    source = np.ones(COPIED_BYTES // 4, np.float32)
    target = np.empty_like(source)
    seconds = []
    for _ in range(COPIES):
        started = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - started)
    return 2 * source.nbytes / float(np.median(seconds[1:]))
