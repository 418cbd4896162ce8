"""Every dialect's names and shapes become the canonical ones and come back, bit for bit."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline import dialects
from pipeline.convnext import SIZES, ConvNeXt, empty
from pipeline.dialects import hf, meta, own, timm, torchvision
from pipeline.errors import CheckpointError
from pipeline.records import Architecture

ALL: dict[str, Any] = {m.NAME: m for m in (hf, meta, own, timm, torchvision)}
V1 = Architecture(depths=(2, 1), dims=(4, 6), classes=5)
V2 = Architecture(depths=(2, 1), dims=(4, 6), classes=5, layer_scale=False, grn=True)
ISOTROPIC = Architecture(depths=(2,), dims=(4,), classes=5, patch=16, stem_norm=False)

# Every place of a network of depths (2, 1), as each project's own source names it.
PLACES = """
own                           meta                     timm                                torchvision           hf
stem.conv                     downsample_layers.0.0    stem.0                              features.0.0          convnext.embeddings.patch_embeddings
stem.norm                     downsample_layers.0.1    stem.1                              features.0.1          convnext.embeddings.layernorm
stages.0.blocks.0.depthwise   stages.0.0.dwconv        stages.0.blocks.0.conv_dw           features.1.0.block.0  convnext.encoder.stages.0.layers.0.dwconv
stages.0.blocks.0.norm        stages.0.0.norm          stages.0.blocks.0.norm              features.1.0.block.2  convnext.encoder.stages.0.layers.0.layernorm
stages.0.blocks.0.pw1         stages.0.0.pwconv1       stages.0.blocks.0.mlp.fc1           features.1.0.block.3  convnext.encoder.stages.0.layers.0.pwconv1
stages.0.blocks.0.pw2         stages.0.0.pwconv2       stages.0.blocks.0.mlp.fc2           features.1.0.block.5  convnext.encoder.stages.0.layers.0.pwconv2
stages.0.blocks.1.depthwise   stages.0.1.dwconv        stages.0.blocks.1.conv_dw           features.1.1.block.0  convnext.encoder.stages.0.layers.1.dwconv
stages.0.blocks.1.norm        stages.0.1.norm          stages.0.blocks.1.norm              features.1.1.block.2  convnext.encoder.stages.0.layers.1.layernorm
stages.0.blocks.1.pw1         stages.0.1.pwconv1       stages.0.blocks.1.mlp.fc1           features.1.1.block.3  convnext.encoder.stages.0.layers.1.pwconv1
stages.0.blocks.1.pw2         stages.0.1.pwconv2       stages.0.blocks.1.mlp.fc2           features.1.1.block.5  convnext.encoder.stages.0.layers.1.pwconv2
stages.1.downsample.norm      downsample_layers.1.0    stages.1.downsample.0               features.2.0          convnext.encoder.stages.1.downsampling_layer.0
stages.1.downsample.conv      downsample_layers.1.1    stages.1.downsample.1               features.2.1          convnext.encoder.stages.1.downsampling_layer.1
stages.1.blocks.0.depthwise   stages.1.0.dwconv        stages.1.blocks.0.conv_dw           features.3.0.block.0  convnext.encoder.stages.1.layers.0.dwconv
stages.1.blocks.0.norm        stages.1.0.norm          stages.1.blocks.0.norm              features.3.0.block.2  convnext.encoder.stages.1.layers.0.layernorm
stages.1.blocks.0.pw1         stages.1.0.pwconv1       stages.1.blocks.0.mlp.fc1           features.3.0.block.3  convnext.encoder.stages.1.layers.0.pwconv1
stages.1.blocks.0.pw2         stages.1.0.pwconv2       stages.1.blocks.0.mlp.fc2           features.3.0.block.5  convnext.encoder.stages.1.layers.0.pwconv2
head.norm                     norm                     head.norm                           classifier.0          convnext.layernorm
head.fc                       head                     head.fc                             classifier.2          classifier
"""  # noqa: E501 - one row per place
# LayerScale of one block (V1), and GRN's weight and bias (V2), each with its shape there.
SCALES: dict[str, tuple[str, tuple[int, ...]]] = {
    "own": ("stages.{}.blocks.{}.scale.weight", ()),
    "meta": ("stages.{}.{}.gamma", ()),
    "timm": ("stages.{}.blocks.{}.gamma", ()),
    "torchvision": ("features.{odd}.{1}.layer_scale", (1, 1)),
    "hf": ("convnext.encoder.stages.{}.layers.{}.layer_scale_parameter", ()),
}
GRNS = {
    "own": ("stages.{}.blocks.{}.grn.weight", "stages.{}.blocks.{}.grn.bias", ()),
    "meta": ("stages.{}.{}.grn.gamma", "stages.{}.{}.grn.beta", (1, 1, 1)),
    "timm": ("stages.{}.blocks.{}.mlp.grn.weight", "stages.{}.blocks.{}.mlp.grn.bias", ()),
    "hf": (
        "convnextv2.encoder.stages.{}.layers.{}.grn.weight",
        "convnextv2.encoder.stages.{}.layers.{}.grn.bias",
        (1, 1, 1),
    ),
}


def values(net: Architecture) -> dict[str, Tensor]:
    """Return canonical tensors in which no two numbers are the same."""
    found, start = {}, 0.5
    for name, tensor in empty(net).state_dict().items():
        found[name] = (torch.arange(tensor.numel()) + start).reshape(tensor.shape)
        start += tensor.numel()
    return found


def fixture(dialect: str, net: Architecture) -> dict[str, Tensor]:
    """Return the tensors of V1 or V2 as a dialect has them, from the tables above alone."""
    ours, found = values(net), {}
    header, *rows = (line.split() for line in PLACES.strip().splitlines())
    for row in rows:
        place = row[header.index(dialect)]
        if net.grn:
            place = place.replace("convnext.", "convnextv2.")
        for p in ("weight", "bias"):
            found[f"{place}.{p}"] = ours[f"{row[0]}.{p}"]
    for i, j in ((0, 0), (0, 1), (1, 0)):
        if net.layer_scale:
            name, ones = SCALES[dialect]
            scale = ours[f"stages.{i}.blocks.{j}.scale.weight"]
            found[name.format(i, j, odd=2 * i + 1)] = scale.reshape(*scale.shape, *ones)
        if net.grn:
            *names, before = GRNS[dialect]
            for name, p in zip(names, ("weight", "bias"), strict=True):
                grn = ours[f"stages.{i}.blocks.{j}.grn.{p}"]
                found[str(name).format(i, j)] = grn.reshape(*before, *grn.shape)
    return found


def isotropic() -> dict[str, Tensor]:
    """Return Meta's isotropic names, from models/convnext_isotropic.py."""
    ours = values(ISOTROPIC)
    places = {"stem": "stem.conv", "norm": "head.norm", "head": "head.fc"}
    for j in (0, 1):
        block = f"stages.0.blocks.{j}"
        places |= {f"blocks.{j}.dwconv": f"{block}.depthwise", f"blocks.{j}.norm": f"{block}.norm"}
        places |= {f"blocks.{j}.pwconv{n}": f"{block}.pw{n}" for n in (1, 2)}
    found = {f"{t}.{p}": ours[f"{o}.{p}"] for t, o in places.items() for p in ("weight", "bias")}
    return found | {f"blocks.{j}.gamma": ours[f"stages.0.blocks.{j}.scale.weight"] for j in (0, 1)}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def recognised(names: Mapping[str, Tensor]) -> list[str]:
    return [name for name, dialect in ALL.items() if dialect.matches(names)]


CASES = [(name, net) for name in ALL for net in (V1, V2) if not (net.grn and name == "torchvision")]
IDS = [f"{name}-{'v2' if net.grn else 'v1'}" for name, net in CASES]


def test_every_dialect_is_tried_here() -> None:
    found = {info.name for info in pkgutil.iter_modules(dialects.__path__)}
    assert {name for name in found if not name.startswith("_")} == ALL.keys()
    for name in ALL:
        module = importlib.import_module(f"pipeline.dialects.{name}")
        assert name == module.NAME
        assert all(part.strip() for part in module.EXPECTED.split(","))


@pytest.mark.parametrize(("dialect", "net"), CASES, ids=IDS)
def test_names_and_values_come_to_their_places_and_back(dialect: str, net: Architecture) -> None:
    theirs, module = fixture(dialect, net), ALL[dialect]
    assert recognised(theirs) == [dialect]
    assert module.refusal(theirs) is None
    assert module.traits(theirs) == frozenset()
    assert same(module.canonical(theirs), values(net))
    assert same(module.original(values(net), net), theirs)


@pytest.mark.parametrize("there", ALL)
@pytest.mark.parametrize(("here", "net"), CASES, ids=IDS)
def test_every_dialect_becomes_every_other(here: str, net: Architecture, there: str) -> None:
    theirs = fixture(here, net)
    tensors = ALL[here].canonical(theirs)
    if net.grn and there == "torchvision":
        with pytest.raises(CheckpointError, match="cannot express GRN, blocks without LayerScale"):
            ALL[there].original(tensors, net)
        return
    other = ALL[there].original(tensors, net)
    assert recognised(other) == [there]
    assert same(ALL[here].original(ALL[there].canonical(other), net), theirs)


def test_meta_isotropic() -> None:
    theirs = isotropic()
    assert recognised(theirs) == ["meta"]
    assert meta.refusal(theirs) is None
    assert same(meta.canonical(theirs), values(ISOTROPIC))
    assert same(meta.original(values(ISOTROPIC), ISOTROPIC), theirs)
    for dialect in (timm, torchvision, hf):
        with pytest.raises(CheckpointError, match="a stem without LayerNorm"):
            dialect.original(values(ISOTROPIC), ISOTROPIC)


@st.composite
def architectures(draw: st.DrawFn) -> Architecture:
    stages, flag = draw(st.integers(1, 3)), st.booleans()
    more = draw(flag)  # what only timm has
    stem: Literal["patch", "overlap", "overlap_act"] = "patch"
    if more:
        stem = draw(st.sampled_from(["patch", "overlap", "overlap_act"]))
    return Architecture(
        depths=tuple(draw(st.integers(1, 11)) for _ in range(stages)),
        dims=tuple(draw(st.integers(1, 3)) for _ in range(stages)),
        classes=draw(st.integers(1, 3)),
        layer_scale=draw(flag),
        in_channels=draw(st.sampled_from([1, 3])),
        patch=draw(st.integers(1, 4)),
        kernel=draw(st.sampled_from([1, 3])),
        expansion=draw(st.integers(1, 2)),
        grn=draw(flag),
        stem=stem,
        stem_width=None if stem == "patch" else draw(st.integers(1, 3)),
        stem_norm=draw(flag),
        downsample_first=more and draw(flag),
        head_norm_first=more and draw(flag),
        head_width=draw(st.none() | st.integers(1, 3)) if more else None,
    )


def expressible(dialect: str, net: Architecture) -> bool:
    """Tell whether a project's own code can build such a network, kernel and patch aside."""
    timm_only = net.stem != "patch" or net.downsample_first or net.head_norm_first
    timm_only = timm_only or net.head_width is not None
    both = net.grn and net.layer_scale
    match dialect:
        case "timm":
            return net.stem_norm and not (net.head_norm_first and net.head_width)
        case "meta":
            isotropic = len(net.depths) == 1 and not net.grn
            return not timm_only and not both and (net.stem_norm or isotropic)
        case "hf":
            return not timm_only and not both and net.stem_norm
        case "torchvision":
            return not timm_only and net.layer_scale and not net.grn and net.stem_norm
    return True


@settings(max_examples=60, deadline=None)
@given(net=architectures())
def test_what_a_dialect_can_express_it_reads_again(net: Architecture) -> None:
    tensors = values(net)
    for name, dialect in ALL.items():
        if not expressible(name, net):
            with pytest.raises(CheckpointError, match=f"{name} dialect cannot express"):
                dialect.original(tensors, net)
            continue
        theirs = dialect.original(tensors, net)
        assert recognised(theirs) == [name]
        assert dialect.refusal(theirs) is None
        assert same(dialect.canonical(theirs), tensors)
        if name == "timm":
            assert ("overlap_act" in dialect.traits(theirs)) == (net.stem == "overlap_act")
            assert ("head_norm_first" in dialect.traits(theirs)) == net.head_norm_first


def test_timm_as_it_was_saved_in_earlier_years() -> None:
    theirs = fixture("timm", V1)
    older = {
        name.replace("head.norm", "norm").replace("head.fc", "head"): tensor
        for name, tensor in theirs.items()
    }
    assert recognised(older) == ["timm"]
    assert timm.refusal(older) is None
    assert same(timm.canonical(older), values(V1))
    both = timm.refusal({**theirs, "norm.weight": torch.ones(6)})
    assert both == "1 tensors too many: two names stand for one place in the network"


# --- heads and refusals ---------------------------------------------------------------------------

WRAPPED = {
    "own": ("head.fc", "head.fc.1"),
    "meta": ("head", "head.1"),
    "timm": ("head.fc", "head.fc.1"),
    "torchvision": ("classifier.2", "classifier.2.1"),
    "hf": ("classifier", "classifier.1"),
}


@pytest.mark.parametrize("dialect", ALL)
def test_a_wrapped_classifier_is_found(dialect: str) -> None:
    plain, wrapped = WRAPPED[dialect]
    module, theirs = ALL[dialect], fixture(dialect, V1)
    linear = {p: theirs.pop(f"{plain}.{p}") for p in ("weight", "bias")}
    theirs |= {f"{wrapped}.{p}": tensor for p, tensor in linear.items()}
    assert module.refusal(theirs) is None
    assert same(module.canonical(theirs), values(V1))
    theirs[f"{plain}.4.weight"] = torch.ones(3, 5)
    refusal = module.refusal(theirs)
    assert refusal is not None
    assert refusal.startswith(f"a head of 2 linear layers ({wrapped}, {plain}.4)")


@pytest.mark.parametrize("dialect", ALL)
def test_a_backbone_is_refused_and_a_damaged_head_is_not(dialect: str) -> None:
    plain, _ = WRAPPED[dialect]
    module, theirs = ALL[dialect], fixture(dialect, V1)
    theirs.pop(f"{plain}.weight")  # the check against the network names what is missing
    assert module.refusal(theirs) is None
    theirs.pop(f"{plain}.bias")
    refusal = module.refusal(theirs)
    assert refusal is not None
    assert refusal.startswith("backbone only: ")


def test_networks_that_are_no_convnext_classifiers_are_refused_by_name() -> None:
    v2 = fixture("meta", V2)
    fcmae = {f"encoder.{name}": tensor for name, tensor in v2.items()} | {
        "mask_token": torch.ones(1, 4, 1, 1)
    }
    sparse = {name.replace("dwconv.weight", "dwconv.kernel"): t for name, t in v2.items()}
    lone = {
        name.removeprefix("convnext."): tensor
        for name, tensor in fixture("hf", V1).items()
        if not name.startswith("classifier.")
    }
    backbone = {**lone, "hidden_states_norms.stage1.weight": torch.ones(4)}
    for dialect, tensors, said in (
        ("meta", fcmae, "FCMAE pretraining (mask_token): "),
        ("meta", sparse, "FCMAE pretraining (stages.0.0.dwconv.kernel): "),
        ("hf", lone, "ConvNextModel, saved alone: "),
        ("hf", backbone, "ConvNextBackbone (hidden_states_norms): "),
    ):
        assert recognised(tensors) == [dialect]
        refusal = ALL[dialect].refusal(tensors)
        assert refusal is not None
        assert refusal.startswith(said)


def test_what_no_rule_knows_keeps_its_name_and_shape() -> None:
    odd = {
        "stages.0.0.grn.gamma": torch.ones(2, 1, 1, 16),
        "stages.1e5.0.gamma": torch.ones(3),
        "stages.٣.0.gamma": torch.ones(3),
        "head.{p}.weight": torch.ones(3),
        f"stages.{'9' * 5000}.0.gamma": torch.ones(()),
    }
    found = meta.canonical(odd)
    assert shapes(found) == {"stages.0.blocks.0.grn.weight": (2, 1, 1, 16)} | {
        name: tuple(tensor.shape) for name, tensor in list(odd.items())[1:]
    }


# --- transformers' own networks -------------------------------------------------------------------


@pytest.mark.parametrize("version", ["", "V2"])
@pytest.mark.parametrize("size", ["atto", "tiny"])
def test_logits_are_those_of_transformers(version: str, size: str) -> None:
    library = importlib.import_module("transformers")
    dims = SIZES[size][1]
    depths = {"atto": (2, 2, 6, 2), "tiny": (1, 1, 2, 1)}[size]
    config = getattr(library, f"ConvNext{version}Config")(
        hidden_sizes=list(dims), depths=list(depths), num_labels=10
    )
    theirs = getattr(library, f"ConvNext{version}ForImageClassification")(config).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, tensor in theirs.named_parameters():
            wide = tensor.ndim in {2, 4} and ".grn." not in name
            spread = 1.5 * tensor[0].numel() ** -0.5 if wide else 0.3
            centre = 0.0 if wide or name.endswith("bias") or ".grn." in name else 1.0
            torch.nn.init.normal_(tensor, centre, spread, generator=generator)
    state = theirs.state_dict()
    assert recognised(state) == ["hf"]
    assert hf.refusal(state) is None
    tensors = hf.canonical(state)
    eps, head_eps = hf.norm_eps(tensors)
    assert head_eps == config.layer_norm_eps
    net = Architecture(
        depths=depths,
        dims=dims,
        classes=10,
        layer_scale=not version,
        grn=bool(version),
        norm_eps=eps,
        head_norm_eps=head_eps,
    )
    assert same(hf.original(tensors, net), state)
    ours: ConvNeXt = empty(net).to_empty(device="cpu")
    ours.load_state_dict(tensors)
    for side in (64, 96):
        image = torch.randn(2, 3, side, side, generator=generator)
        with torch.no_grad():
            expected, got = theirs(image).logits, ours.eval()(image)
        assert expected.std() > 0.1
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
