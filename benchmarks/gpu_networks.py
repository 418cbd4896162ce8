"""Networks as torch runs them on a GPU: which, how precisely, and in which mode.

In: words of the command line. Out: a network of this project's or a peer's with seeded weights, and
a call that runs it on images which lie on the device already. Neither torchvision nor timm is
needed: the peers are transformers', without a download.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from pipeline.checkpoint import load_model
from pipeline.convnext import SIZES, seeded
from pipeline.errors import MissingRuntimeError, UsageError
from pipeline.records import Architecture
from pipeline.store import library_versions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Call = Callable[[], torch.Tensor]

CONVNEXT, CLASSES, SEED = "convnext-", 1000, 0
WARM_UP = 3
"""Inferences before CUDA records one: libraries allocate what they keep in their first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """In what a network computes.

    Attributes:
        dtype: Of its weights and images.
        tf32: Whether float32 products may be rounded to TF32.
        autocast: What autocast lowers to, where weights stay float32; None does without it.
    """

    dtype: torch.dtype = torch.float32
    tf32: bool = False
    autocast: torch.dtype | None = None

    @property
    def needs_bf16(self) -> bool:
        """Whether a device must have bfloat16."""
        return torch.bfloat16 in {self.dtype, self.autocast}


PRECISIONS = {
    "float32": Precision(),
    "tf32": Precision(tf32=True),
    "bf16": Precision(dtype=torch.bfloat16),
    "float16": Precision(dtype=torch.float16),
    "amp-bf16": Precision(autocast=torch.bfloat16),
    "amp-float16": Precision(autocast=torch.float16),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """How a network is run: compiled or not, replayed as one CUDA graph or not."""

    compiled: bool = False
    graph: bool = False


MODES = {
    "eager": Mode(),
    "compile": Mode(compiled=True),
    "graph": Mode(graph=True),
    "compile+graph": Mode(compiled=True, graph=True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A network that is ready to be timed, and what making it ready took.

    Attributes:
        call: Runs it once, on its images.
        logits: Of those, float32.
        first_s: The first inference, with the compilation where there is one.
        capture_s: Warming up and recording a CUDA graph; None without one.
    """

    call: Call
    logits: torch.Tensor
    first_s: float
    capture_s: float | None


class _Peer(torch.nn.Module):
    """A classifier of transformers', whose logits alone come out."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network(pixels).logits
        return logits


def _swin(input_size: int) -> torch.nn.Module:
    from transformers import SwinConfig, SwinForImageClassification

    # Its defaults are Swin-T's, and ResNetConfig's ResNet-50's.
    stated = {"num_labels": CLASSES, "image_size": input_size}
    return SwinForImageClassification(SwinConfig.from_dict(stated))


def _resnet(_input_size: int) -> torch.nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(ResNetConfig.from_dict({"num_labels": CLASSES}))


PEERS = {"swin-tiny": _swin, "resnet50": _resnet}


def check_models(names: Sequence[str]) -> None:
    """Check that these are names of networks, and that what the peers come from is installed.

    Raises:
        UsageError: One is not.
        MissingRuntimeError: A peer is asked for, and transformers is not here.
    """
    known = [CONVNEXT + size for size in SIZES if not size.startswith("isotropic")] + list(PEERS)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(
            f"unknown model: {', '.join(unknown)}",
            allowed=", ".join(known),
            do="Correct --models, or give a checkpoint of your own with --checkpoint",
        )
    peers = [name for name in names if name in PEERS]
    if peers and library_versions(("transformers",))["transformers"] is None:
        raise MissingRuntimeError(
            f"transformers is not installed, which {' and '.join(peers)} come from",
            allowed="an environment with the extra [dev]",
            do="Run: pip install 'convnext-edge[dev]'; or leave them out of --models",
        )


def build(name: str, input_size: int) -> torch.nn.Module:
    """Return a network with seeded weights, in eval mode.

    Args:
        name: One that `check_models` lets through.
        input_size: Side of its images.
    """
    if name.startswith(CONVNEXT):
        depths, dims = SIZES[name.removeprefix(CONVNEXT)]
        return seeded(Architecture(depths=depths, dims=dims, classes=CLASSES), SEED)
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        return _Peer(PEERS[name](input_size)).eval()


def from_checkpoint(where: str) -> torch.nn.Module:
    """Return the network of a checkpoint, in eval mode."""
    return load_model(where).eval()


def prepare(
    network: torch.nn.Module,
    images: torch.Tensor,
    precision: Precision,
    mode: Mode,
    synchronise: Callable[[], None],
) -> Prepared:
    """Bring a copy of a network to the images' device and run it for the first time.

    Whether TF32 is allowed is torch's for all networks: it holds until the next call.

    Args:
        network: In float32 on the CPU; it stays as it is.
        images: float32, already where and how they shall lie in memory.
        precision: What it computes in.
        mode: How it is run.
        synchronise: Waits for the device.

    Raises:
        RuntimeError: As torch says that it cannot: no memory, no compiler.
    """
    allow_tf32(precision.tf32)
    layout = (
        torch.channels_last
        if images.is_contiguous(memory_format=torch.channels_last)
        else (torch.contiguous_format)
    )
    model = copy.deepcopy(network).requires_grad_(False)
    model = model.to(images.device, precision.dtype).to(memory_format=layout)  # type: ignore[call-overload]
    pixels = images.to(precision.dtype)
    run = torch.compile(model, dynamic=False) if mode.compiled else model
    call: Call = partial(_infer, run, pixels, precision.autocast)
    started = time.perf_counter()
    logits = call()
    synchronise()
    first_s, capture_s = time.perf_counter() - started, None
    if mode.graph:
        started = time.perf_counter()
        call = captured(call)
        logits = call()
        synchronise()
        capture_s = time.perf_counter() - started
    return Prepared(call=call, logits=logits.float().clone(), first_s=first_s, capture_s=capture_s)


def _infer(
    run: Callable[[torch.Tensor], torch.Tensor], pixels: torch.Tensor, lower: torch.dtype | None
) -> torch.Tensor:
    # A cache of lowered weights must not outlive the CUDA graph that it was recorded in.
    lowering = torch.autocast(
        pixels.device.type, dtype=lower, enabled=lower is not None, cache_enabled=False
    )
    with torch.inference_mode(), lowering:
        return run(pixels)


def captured(call: Call) -> Call:
    """Record what a call launches as a CUDA graph; return its replay."""
    beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = call()

    def replay() -> torch.Tensor:
        graph.replay()
        return logits

    return replay


def allow_tf32(allowed: bool) -> None:  # noqa: FBT001 - there is one flag
    """Say whether float32 products of matrices and convolutions may be rounded to TF32.

    By torch's older switches, which its compiler understands in every version.
    """
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed
