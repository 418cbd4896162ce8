"""NNCF's fake quantizers in a network: put in, held against what they must be, and read.

In: a torch network, and for each of NNCF's hooks what is to be there (`Held`). Out: the network,
with quantizers that are at work; and a word where NNCF holds something else.

Only NNCF's documented `load_from_config` and `get_config` are used, torch's state dict, and methods
of its quantizers.

At the first forward NNCF compiles them, for a CPU in C++ and for a GPU with nvcc, and keeps them in
torch's cache of extensions. Where a CPU has no compiler it says so and computes with torch; it
cannot be asked to do so otherwise. Without nvcc a GPU cannot be used.
"""

from __future__ import annotations

import os
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pipeline.arithmetic import ACTIVATION_MAX, ACTIVATION_MIN, BITS, WEIGHT_LIMITS
from pipeline.errors import MissingRuntimeError, TrainingError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import ModuleType

    from numpy.typing import NDArray
    from torch import Tensor, nn

    from pipeline.records import Quantization

    Exact = NDArray[np.float64]

HOOKS = "__nncf_hooks"
"""What NNCF's modules are under, in a state dict too."""
STEPS = ACTIVATION_MAX - ACTIVATION_MIN
SAME = 1e-5
"""How far a scale read back may be from what it was, relatively: NNCF keeps ranges in float32."""
NEXT_TO_NOTHING = 1e-15
"""NNCF adds 1e-16 to every range."""
PATIENCE_SECONDS = 600
"""For compiling. NNCF's own are 60; without any, a lock that was left behind hangs for ever."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What a quantizer of NNCF's must be.

    Attributes:
        module: Its class.
        settings: What that is made with.
        state: Its tensors by their names in a state dict.
        ends: Its least and greatest integer, as it gives them to torch's fake quantization.
        zero_point: As it counts them.
        scale: One, or one per row.
    """

    module: str
    settings: dict[str, Any]
    state: dict[str, Exact]
    ends: tuple[int, int]
    zero_point: int
    scale: Exact


def of_weight(scales: Exact, ndim: int, bits: int) -> Held:
    """Describe the quantizer of a weight: symmetric, one scale per row, in [-limit, limit].

    Args:
        scales: Per row, (out,).
        ndim: Of the weight.
        bits: 8 or 4.
    """
    limit = WEIGHT_LIMITS[bits]
    own = {"num_bits": bits, "mode": "symmetric", "signedness_to_force": True, "narrow_range": True}
    return Held(
        module="SymmetricQuantizer",
        settings=_settings(scale_shape=(len(scales), *[1] * (ndim - 1)), **own),
        state={"scale": scales * limit},
        ends=(-limit - 1, limit),  # it counts the end that a narrow range leaves out
        zero_point=0,
        scale=scales,
    )


def of_site(parameters: Quantization) -> Held:
    """Describe the quantizer of a site of 8 bits: asymmetric, per tensor; NNCF counts from 0."""
    scale = np.array([parameters.scale], np.float64)
    own = {"num_bits": BITS, "mode": "asymmetric", "signedness_to_force": None}
    return Held(
        module="AsymmetricQuantizer",
        settings=_settings(scale_shape=(1,), narrow_range=False, **own),
        state={
            "input_low": scale * (ACTIVATION_MIN - parameters.zero_point),
            "input_range": scale * STEPS,
        },
        ends=(0, STEPS),
        zero_point=parameters.zero_point - ACTIVATION_MIN,
        scale=scale,
    )


def _settings(**own: object) -> dict[str, Any]:
    return own | {"half_range": False, "logarithm_scale": False, "is_quantized_on_export": False}


def nncf_torch() -> ModuleType:
    """Import NNCF's part for torch, without its telemetry.

    Raises:
        MissingRuntimeError: It is not installed.
    """
    os.environ.setdefault("NNCF_EXTENSION_LOAD_TIMEOUT", str(PATIENCE_SECONDS))
    os.environ.setdefault("NNCF_CI", "1")
    before = os.environ.get("CI")
    os.environ["CI"] = "true"  # or it asks for consent, and counts, as it is imported
    try:
        return import_module("nncf.torch")
    except ImportError as error:
        raise MissingRuntimeError(
            "engine nncf trains with NNCF, and nncf is not installed",
            allowed="an environment with the extra [nncf]",
            do="Run: pip install 'convnext-edge[nncf]'",
        ) from error
    finally:
        if before is None:
            del os.environ["CI"]
        else:
            os.environ["CI"] = before


def attach(network: nn.Module, places: Mapping[str, Held]) -> None:
    """Put NNCF's quantizers in, with their scales, which are not learnt.

    Args:
        network: Of one dtype, which the quantizers take too.
        places: What is to be at every hook.
    """
    commands = [
        {
            "hook_names_in_model": [hook],
            "module_path": "nncf.torch.quantization.layers",
            "module_cls_name": held.module,
            "module_config": held.settings,
        }
        for hook, held in places.items()
    ]
    dtype = next(network.parameters()).dtype
    nncf_torch().load_from_config(network, {"compression_state": commands})
    network.to(dtype)
    state = network.state_dict()
    for hook, held in places.items():
        for name, value in held.state.items():
            key = f"{HOOKS}.{hook}.{name}"
            state[key] = torch.tensor(value, dtype=dtype).reshape(state[key].shape)
        quantizer_at(network, hook).disable_gradients()
    network.load_state_dict(state)


@torch.no_grad()
def check_called(network: nn.Module, places: Mapping[str, Held], image: Tensor) -> None:
    """Check that every quantizer is at work: NNCF never calls a hook at a wrong name.

    Args:
        network: With NNCF's quantizers in it.
        places: All of them.
        image: What the network takes.

    Raises:
        TrainingError: With the names of the hooks that are wrong.
    """
    calls: Counter[str] = Counter()
    for hook in places:
        quantizer_at(network, hook).disable_quantization()  # nothing is compiled for this
    handles = [
        quantizer_at(network, hook).register_forward_pre_hook(
            lambda *_, hook=hook: calls.update([hook])
        )
        for hook in places
    ]
    network(image)
    for handle in handles:
        handle.remove()
    for hook in places:
        quantizer_at(network, hook).enable_quantization()
        quantizer_at(network, hook).disable_gradients()  # which the line above enables
    if wrong := {hook: f"called {calls[hook]} times" for hook in places if calls[hook] != 1}:
        raise _unmappable(wrong)


@contextmanager
def compiling() -> Iterator[None]:
    """Surround a forward with this: what NNCF cannot compile for a GPU becomes an error of ours.

    Raises:
        MissingRuntimeError: There is no nvcc.
    """
    try:
        yield
    except import_module("nncf").InstallationError as error:
        raise MissingRuntimeError(
            "engine nncf compiles its quantizers for the GPU, and that failed",
            allowed="a machine with nvcc, of CUDA's development tools",
            do="Install them, give --engine own, or hide the GPU with CUDA_VISIBLE_DEVICES=",
        ) from error


def check_mappable(network: nn.Module, places: Mapping[str, Held]) -> None:
    """Check that a record has a place for all that NNCF holds, and that it holds the record's.

    Args:
        network: With NNCF's modules in it.
        places: What must be at every hook.

    Raises:
        TrainingError: With the names of the hooks that are wrong.
    """
    commands = nncf_torch().get_config(network)["compression_state"]
    found = {hook: command for command in commands for hook in command["hook_names_in_model"]}
    wrong = {}
    for hook in sorted(found.keys() | places.keys()):
        if hook not in places:
            wrong[hook] = f"{found[hook]['module_cls_name']}, where no site is"
        elif hook not in found:
            wrong[hook] = "gone"
        elif why := _mismatch(found[hook], quantizer_at(network, hook), places[hook]):
            wrong[hook] = why
    if wrong:
        raise _unmappable(wrong)


def _mismatch(command: Mapping[str, Any], quantizer: Any, held: Held) -> str | None:
    """Say in what NNCF's module at a hook is not the one that was put there."""
    module, settings = command["module_cls_name"], command["module_config"]
    if (module, settings) != (held.module, held.settings):
        return f"{module} with other settings"
    if not quantizer.is_enabled_quantization():
        return "off"
    low, high, scale, zero_point = quantizer.get_parameters_for_torch_fq()
    if (low, high) != held.ends:
        return f"integers from {low} to {high}, not from {held.ends[0]} to {held.ends[1]}"
    if (zero_point != held.zero_point).any():
        return f"zero point {int(zero_point.flatten()[0])}, not {held.zero_point}"
    if not np.allclose(exact(scale), held.scale, rtol=SAME, atol=NEXT_TO_NOTHING):
        return "another scale than the calibration's"
    return None


def _unmappable(wrong: Mapping[str, str]) -> TrainingError:
    listed = "; ".join(f"{hook} ({why})" for hook, why in wrong.items())
    return TrainingError(
        f"the record has no place for what NNCF holds at {listed}",
        allowed="one quantizer per site and per integer layer, with the calibration's scale",
        do="Give --engine own, or install the nncf of constraints.txt",
    )


def quantizer_at(network: nn.Module, hook: str) -> Any:
    """Return NNCF's module at a hook."""
    return network.get_submodule(f"{HOOKS}.{hook}")


def exact(tensor: Tensor) -> Exact:
    """Return a tensor's values in float64."""
    values: Exact = tensor.detach().double().cpu().numpy()
    return values
