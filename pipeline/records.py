"""Every record that crosses a stage, in the order in which it flows.

In: plain values. Out: frozen, keyword-only, validated records that serialise to JSON; the large
arrays they speak of lie beside them in safetensors files. No logic lives here beyond validation.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal, TypeVar, cast, dataclass_transform, get_args

from pydantic import ConfigDict, Field, TypeAdapter, model_validator
from pydantic.dataclasses import dataclass

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
# report.json allows further keys: an older reader takes what a newer version measured.
_OPEN = ConfigDict(extra="ignore", allow_inf_nan=False)

_Class = TypeVar("_Class")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def _record(cls: type[_Class]) -> type[_Class]:
    """Make a frozen, keyword-only, slotted dataclass whose fields pydantic validates."""
    return cast(
        "type[_Class]", dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)(cls)
    )


@dataclass_transform(frozen_default=True, kw_only_default=True)
def _reported(cls: type[_Class]) -> type[_Class]:
    """Make a record that stands in report.json as it is."""
    return cast("type[_Class]", dataclass(frozen=True, slots=True, kw_only=True, config=_OPEN)(cls))


PositiveInt = Annotated[int, Field(gt=0)]
NaturalInt = Annotated[int, Field(ge=0)]
Points = Annotated[float, Field(ge=-100, le=100)]
"""Of a percentage."""
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
LearningRate = Annotated[float, Field(gt=0, le=10)]
Side = Annotated[int, Field(gt=0, le=4096)]
"""Of a square image, in pixels; larger ones need more memory than machines have."""
CropRatio = Annotated[float, Field(ge=0.05, le=1)]
Batch = Annotated[int, Field(gt=0, le=4096)]

Scheme = Literal["float", "float16", "w8a8", "w4a8", "w8a16", "w8a8-dynamic", "w8", "w4a4"]
Bits = Literal[4, 8, 16]
"""Of an activation's integers."""
Profile = Literal["full", "avx2"]
Isa = Literal["avx2", "vnni", "arm"]
Kind = Literal["device", "host", "emulated", "interpreted"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
CropMode = Literal["center", "squash"]
Weights = Literal["auto", "model", "ema"]
RangeMethod = Literal["min-max", "percentile", "mse", "entropy"]
Rounding = Literal["auto", "nearest", "gptq", "adaround"]
Engine = Literal["own", "nncf"]

IMAGE_CHANNELS = (1, 3)

SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
FLOATING: frozenset[Scheme] = frozenset({"float", "float16"})
"""Without integers: float32, or weights in float16 and arithmetic as the runtime does it."""
ACTIVATION_BITS: dict[Scheme, Bits] = {"w8a8": 8, "w4a8": 8, "w8a16": 16, "w4a4": 4}
"""Of the schemes that fix the activations' grid beforehand; the others quantize no site."""
PROFILES: tuple[Profile, ...] = ("full", "avx2")
STRICTEST: Profile = "avx2"
"""Its integers are right wherever those of the others are."""
OpKind = Literal[
    "pointwise",
    "depthwise",
    "convolution",
    "layernorm",
    "gelu",
    "quantize",
    "layout",
    "add",
    "other",
]
"""`convolution` is the stem's and the downsamples'; `other` is the head, pooling and rescaling."""
PROFILE_OF_ISA: dict[Isa, Profile] = {"avx2": "avx2", "vnni": "full", "arm": "full"}


# --- the checkpoint -------------------------------------------------------------------------------


@_record
class Architecture:
    """The shape of a ConvNeXt or ConvNeXt V2, as its tensors give it.

    Attributes:
        depths: Blocks per stage.
        dims: Channels per stage.
        classes: Length of the logits.
        layer_scale: Whether each block scales its branch per channel.
        in_channels: Of the image.
        patch: Side and stride of the stem's convolution; an overlapping stem's stride is 4.
        kernel: Side of the depthwise convolutions.
        expansion: Hidden channels of a block over its channels.
        norm_eps: Of every LayerNorm; it differs between dialects and cannot be read off tensors.
        head_norm_eps: Of the head's LayerNorm where it is another.
        grn: Whether each block normalises its hidden channels' responses (V2).
        stem: One patchifying convolution; or two overlapping 3x3 ones, with GELU between or not.
        stem_width: Channels between an overlapping stem's two convolutions.
        stem_norm: Whether the stem ends in a LayerNorm; an isotropic network's does not.
        downsample_first: Whether the first stage downsamples too (timm, patch 2).
        head_norm_first: Whether the head normalises before it pools.
        head_width: Hidden channels of a head of two layers.
    """

    depths: tuple[PositiveInt, ...]
    dims: tuple[PositiveInt, ...]
    classes: PositiveInt
    layer_scale: bool = True
    in_channels: PositiveInt = 3
    patch: PositiveInt = 4
    kernel: PositiveInt = 7
    expansion: PositiveInt = 4
    norm_eps: PositiveFloat = 1e-6
    head_norm_eps: PositiveFloat | None = None
    grn: bool = False
    stem: Literal["patch", "overlap", "overlap_act"] = "patch"
    stem_width: PositiveInt | None = None
    stem_norm: bool = True
    downsample_first: bool = False
    head_norm_first: bool = False
    head_width: PositiveInt | None = None

    @model_validator(mode="after")
    def _stages_agree(self) -> Architecture:
        if len(self.depths) != len(self.dims) or not self.depths:
            msg = (
                f"depths {self.depths} and dims {self.dims} must name the same stages, at least one"
            )
            raise ValueError(msg)
        if (self.stem == "patch") != (self.stem_width is None):
            msg = f"stem {self.stem} with stem_width {self.stem_width}"
            raise ValueError(msg)
        return self

    def reduction(self, stage: int) -> int:
        """Pixels of the image per pixel of a stage."""
        stem: int = self.patch if self.stem == "patch" else 4
        halvings: int = stage + self.downsample_first
        return stem << halvings

    @property
    def stride(self) -> int:
        """Pixels of the image per pixel of the last stage: the input size must be a multiple."""
        return self.reduction(len(self.depths) - 1)


@_record
class Preprocessing:
    """How an image file becomes the network's input; the same for calibration and evaluation.

    Attributes:
        input_size: Side of the network's square input, in pixels.
        crop_ratio: The centre crop's side over the resized shorter side.
        resize_size: That shorter side in pixels; None: floor(input_size / crop_ratio).
        crop_mode: `center` keeps the aspect ratio and crops; `squash` resizes both sides to
            input_size and crops nothing.
        interpolation: Of the resize.
        antialias: Whether shrinking filters (Pillow's resize); otherwise torch's interpolate.
        mean: Per channel, of pixels in [0, 1]: three of RGB, or one of grey.
        std: As mean. Both are folded into the stem, so an artifact takes pixels in [0, 255].
    """

    input_size: Side
    crop_ratio: CropRatio = 0.875
    resize_size: Side | None = None
    crop_mode: CropMode = "center"
    interpolation: Interpolation = "bicubic"
    antialias: bool = True
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[PositiveFloat, ...] = (0.229, 0.224, 0.225)

    @model_validator(mode="after")
    def _channels_agree(self) -> Preprocessing:
        if len(self.mean) != len(self.std) or len(self.mean) not in IMAGE_CHANNELS:
            msg = f"mean {self.mean} and std {self.std} must have three numbers each, or one"
            raise ValueError(msg)
        return self

    @property
    def shorter_side(self) -> int:
        """What the image's shorter side is resized to before the centre is cropped, in pixels."""
        # 224 / (224 / 236) is a little less than 236 in binary.
        return self.resize_size or int(self.input_size / self.crop_ratio + 1e-6)

    @property
    def channels(self) -> int:
        """3 for RGB, 1 for grey."""
        return len(self.mean)


@_record
class Checkpoint:
    """What a checkpoint holds; its tensors lie beside it under canonical names.

    `found_in` says where in the file they were, where something wraps them.
    """

    path: str
    sha256: str
    dialect: str
    architecture: Architecture
    variant: str
    labels: tuple[str, ...] | None = None
    found_in: str | None = None


@_record
class Selection:
    """Which images of a source serve a purpose: `n` drawn with `seed`, or all of them.

    Attributes:
        where: The source.
        purpose: What the images are for.
        n: How many; None is all.
        seed: Of the draw.
        label_file: Labels of a flat folder's images; None where the source has its own.
        class_order: The data's class names in the order of the model's logits: a file with one
            per line, or `sorted`; None matches by name.
    """

    where: str
    purpose: Literal["calibration", "evaluation"]
    n: PositiveInt | None
    seed: int
    label_file: str | None = None
    class_order: str | None = None


@_record
class Augmentation:
    """How the images of training vary from one epoch to the next, in the order it happens.

    Attributes:
        crop: The least area of a random part that is resized to the input, as a share of the
            image's (its aspect ratio: 3/4 to 4/3); 1 crops as `Preprocessing` says.
        flip: The share of images that are mirrored.
        colour: Brightness, contrast and saturation change by a factor each, from 1 - colour to
            1 + colour.
        randaugment: How many operations kornia's RandAugment applies to each image.
        magnitude: Of those operations, of 30.
    """

    crop: Annotated[float, Field(gt=0, le=1)] = 0.7
    flip: Fraction = 0.5
    colour: Fraction = 0.0
    randaugment: Annotated[int, Field(ge=0, le=15)] = 0
    magnitude: Annotated[int, Field(ge=1, le=29)] = 9


# --- calibration ----------------------------------------------------------------------------------


class Role(StrEnum):
    """What a site is to the operations around it (the contract's list of sites)."""

    IMAGE = "image"
    STEM_MID = "stem_mid"
    STEM_IN = "stem_in"
    STEM_OUT = "stem_out"
    DW_IN = "dw_in"
    DW_OUT = "dw_out"
    LN_OUT = "ln_out"
    GELU_IN = "gelu_in"
    GELU_OUT = "gelu_out"
    GRN_OUT = "grn_out"
    RES_OUT = "res_out"
    DOWNSAMPLE_IN = "downsample_in"
    DOWNSAMPLE_OUT = "downsample_out"
    HEAD_IN = "head_in"
    HEAD_MID = "head_mid"
    HEAD_HIDDEN = "head_hidden"


class Layer(StrEnum):
    """The kinds of layer that carry weights."""

    STEM = "stem"
    DEPTHWISE = "depthwise"
    PW1 = "pw1"
    PW2 = "pw2"
    DOWNSAMPLE = "downsample"
    HEAD = "head"


@_record
class Calibration:
    """How scales and integers are chosen.

    Attributes:
        method: `search` tries ranges and rescalings at every site and keeps what disturbs the
            output of the site's reader least. The others take one kind of range everywhere, round
            to nearest and change nothing else: what the search is held against.
        rounding: Of weights. `auto` is GPTQ in linear layers and nearest in convolutions.
        rescale: Whether the search may rescale channels.
        correct_bias: Whether the mean error of each layer goes into its bias.
    """

    method: RangeMethod | Literal["search"] = "search"
    rounding: Rounding = "auto"
    rescale: bool = True
    correct_bias: bool = True


@_record
class Wanted:
    """What integers are made for.

    Attributes:
        scheme: One with integers.
        placement: The widest that an artifact will have.
        calibration: How they are chosen.
        float_layers: Layers that stay float in every placement.
    """

    scheme: Scheme = "w8a8"
    placement: str = "all"
    calibration: Calibration = Calibration()
    float_layers: tuple[str, ...] = ()


@_record
class Finetuning:
    """How a quantized model is trained on.

    Attributes:
        engine: Whose quantizers learn: this project's, or NNCF's at the same places.
        epochs: Passes over the training images.
        batch: Images of an update, over all processes.
        images: Trained on at most so many; None is all.
        rate: Learning rate of weights, in steps of their grid per update.
        scale_rate: Of scales, offsets and biases, which are learnt relative to what the
            calibration chose.
        warm_up: Share of all updates over which the rates rise; then they fall on a cosine.
        decay: Weight decay, of weights alone.
        clip: Largest norm of a gradient, over the running mean of norms; a longer one is
            shortened.
        average: Of the weights' exponential mean, which is what is exported: a mean over about
            1 / (1 - average) updates. 0 exports the last ones.
        drop_path: Share of images that skip the last block; less for those before it.
        logit_weight: Of the logits' mean square distance from the float network's, over the mean
            square of these.
        kl_weight: Of the divergence of the class probabilities from the float network's.
        block_weight: Of the blocks' outputs' distance, as `logit_weight`.
        label_weight: Of the cross-entropy with labels; images without one do not count.
        oscillation: What is done about weights that swing between two integers; `auto` freezes
            them where weights have 4 bits, and else only counts them.
        augmentation: Of the images.
        save_minutes: A checkpoint is written so often.
        seed: Of the order and augmentation of images and of dropped paths.
    """

    engine: Engine = "own"
    epochs: PositiveInt = 2
    batch: PositiveInt = 64
    images: PositiveInt | None = None
    rate: LearningRate = 7e-3
    scale_rate: LearningRate = 1e-4
    warm_up: Fraction = 0.05
    decay: NonNegative = 0.0
    clip: PositiveFloat = 3.0
    average: Annotated[float, Field(ge=0, lt=1)] = 0.9
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    logit_weight: NonNegative = 1.0
    kl_weight: NonNegative = 1.0
    block_weight: NonNegative = 1.0
    label_weight: NonNegative = 0.0
    oscillation: Literal["auto", "count", "dampen", "freeze"] = "auto"
    augmentation: Augmentation = Augmentation()
    save_minutes: NonNegative = 5.0
    seed: int = 0

    @model_validator(mode="after")
    def _learns_something(self) -> Finetuning:
        weights = (self.logit_weight, self.kl_weight, self.block_weight, self.label_weight)
        if not any(weights):
            msg = "logit_weight, kl_weight, block_weight and label_weight are all 0"
            raise ValueError(msg)
        return self


@_record
class Range:
    """The least and the greatest value of a tensor."""

    minimum: float
    maximum: float

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if self.minimum > self.maximum:
            msg = f"minimum {self.minimum} lies above maximum {self.maximum}"
            raise ValueError(msg)
        return self


@_record
class Quantization:
    """Affine parameters of one tensor in signed integers: x = scale * (q - zero_point).

    With 16 bits the zero point is 0.
    """

    scale: PositiveFloat
    zero_point: Annotated[int, Field(ge=-128, le=127)]
    bits: Bits = 8


@_record
class SiteCalibration:
    """What the calibration chose at one site, and what that does to the images it looked at.

    Attributes:
        range_method: Which range it took.
        strength: How far the channels' ranges were made equal: 0 not at all, 1 wholly.
        minimum: Of the range, in units of channels rescaled to a geometric mean of 1.
        maximum: As minimum.
        clipped: Share of the values outside the range.
        spread_before: The widest channel's range over the median channel's.
        spread_after: The same after rescaling.
        sqnr_db: Of what reads the site, with this site alone quantized.
        plain_sqnr_db: The same with the plain grid: min-max, not rescaled.
    """

    range_method: RangeMethod
    strength: Fraction
    minimum: float
    maximum: float
    clipped: Fraction
    spread_before: float
    spread_after: float
    sqnr_db: float
    plain_sqnr_db: float


@_record
class QuantizedModel:
    """One set of integers per profile for every weight, one scale per site, for every runtime.

    The arrays are in the tensors.safetensors beside params.json: the folded float tensors under
    `float/NAME`; per profile `PROFILE/LAYER.weight` (int8), `.weight_scale` (float32, per output
    channel) and `.bias` (int32 at scale_x * scale_w); and `rescale/PLACE.scale`, `.shift` (float32,
    per channel) of sites and stages whose channels are rescaled.

    `scheme` and `placement` are what the integers were chosen for. `trained` says how they were
    learnt, where they were: `chosen` is then where that began.
    """

    architecture: Architecture
    preprocessing: Preprocessing
    labels: tuple[str, ...] | None
    scheme: Scheme
    placement: str
    calibration: Calibration
    float_layers: tuple[str, ...] = ()
    sites: dict[str, Quantization]
    chosen: dict[str, SiteCalibration]
    trained: Finetuning | None = None
    parents: dict[str, str]


# --- artifacts ------------------------------------------------------------------------------------


@_record
class Export:
    """One artifact to be made: which integers, in which form, for which runtime.

    The blocks of `float_stages`, counted from 0, stay float whatever the placement says.
    """

    runtime: str
    scheme: Scheme
    placement: str
    graph_form: str
    gelu: Literal["tanh", "erf"]
    profile: Profile | None
    batch: Batch | Literal["dynamic"] = 1
    float_stages: tuple[int, ...] = ()


@_reported
class Proof:
    """What a runtime itself says that it executes, counted on the finished artifact.

    `integer_layers` counts weighted layers that run in integers out of `weighted_layers`,
    `integer_weights` those whose weights lie in the artifact as integers, whatever they compute in;
    `method` names where the runtime was asked. Counts per block are totals over the number of
    blocks. A fallback is an operation that the runtime has no fast kernel for and executes all the
    same, or an integer layer in floats; None where it does not tell.
    """

    method: str
    integer_layers: int
    expected_integer_layers: int
    weighted_layers: int
    transposes_per_block: float
    quantize_ops_per_block: float
    op_counts: dict[str, int]
    integer_weights: int | None = None
    fallback_ops_per_block: float | None = None


@_record
class Artifact:
    """A file (or .mlpackage folder) that a runtime loads.

    `path` is relative to the run folder and `sha256` is that path's. `files` has name and sha256
    of all that the artifact consists of (OpenVINO's weights lie beside its .xml); `size_bytes` is
    all of it.
    """

    export: Export
    path: str
    sha256: str
    size_bytes: PositiveInt
    sites: tuple[str, ...]
    proof: Proof
    files: dict[str, str]
    export_seconds: float
    export_peak_memory_bytes: int

    @property
    def name(self) -> str:
        """Runtime and scheme, in one word."""
        return f"{self.export.runtime}-{self.export.scheme}"


# --- measurements ---------------------------------------------------------------------------------


@_reported
class Accuracy:
    """An artifact's logits against the float model's, on the same images, run by its runtime."""

    outcome: Literal["measured", "not_run", "failed"]
    reason: str | None = None
    kind: Kind | None = None
    n: int | None = None
    top1: Fraction | None = None
    drop_pp: Points | None = None
    drop_ci95_pp: tuple[Points, Points] | None = None
    agreement_with_float: Fraction | None = None
    sqnr_db: float | None = None
    lost: NaturalInt | None = None
    gained: NaturalInt | None = None
    correct_bits: str | None = None
    """One bit per image in order, 1 where the artifact is right: base64 of numpy.packbits."""

    @model_validator(mode="after")
    def _counts_are_of_the_images(self) -> Accuracy:
        if self.lost is None or self.gained is None:
            return self
        if self.n is None or self.lost + self.gained > self.n:
            msg = f"lost {self.lost} and gained {self.gained} of {self.n} images"
            raise ValueError(msg)
        return self


@_reported
class DeviceState:
    """How a device stands at one moment; None and empty where it does not tell.

    Attributes:
        governor: Of the first core that was used: of its clock, as Linux names it.
        frequency_mhz: Of that core.
        temperatures_c: Zone to degrees Celsius.
        throttled: What the device says of being slowed down (`vcgencmd get_throttled` on a Pi).
        load: Of the last minute, in runnable processes.
    """

    governor: str | None = None
    frequency_mhz: float | None = None
    temperatures_c: dict[str, float] = Field(default_factory=dict)
    throttled: str | None = None
    load: float | None = None


@_reported
class Latency:
    """Times of one artifact on one device; milliseconds per inference of the artifact's batch.

    Ratios are of medians, this artifact over the float artifact of its runtime in the same run;
    `harness` is the null session's time, which each of the others contains. `load` includes the
    import of the runtime's packages. `energy_mj` is what all CPU packages took per inference, idle
    included, where counters tell it. Where instructions were counted, `instructions` is the median
    per inference, `instruction_spread` (largest - least) / median, and `instruction_kinds` and
    `instructions_by_symbol` say which: counts are never turned into times. `accelerated` says that
    something else than the CPU may have computed: then CPU time is not the artifact's.
    `operations_on` is how many operations the runtime's plan puts on each unit (`CPU`, `GPU`,
    `Neural Engine`), where one tells.
    """

    device: str
    outcome: Literal["measured", "not_run", "failed"]
    reason: str | None = None
    kind: Kind | None = None
    threads: int | None = None
    n: int | None = None
    wall_p50_ms: NonNegative | None = None
    wall_p90_ms: NonNegative | None = None
    cpu_p50_ms: NonNegative | None = None
    cpu_p90_ms: NonNegative | None = None
    float_wall_p50_ms: NonNegative | None = None
    float_cpu_p50_ms: NonNegative | None = None
    speedup: float | None = None
    samples_file: str | None = None
    load_ms: NonNegative | None = None
    first_ms: NonNegative | None = None
    peak_memory_bytes: int | None = None
    energy_mj: NonNegative | None = None
    harness_wall_p50_ms: NonNegative | None = None
    harness_cpu_p50_ms: NonNegative | None = None
    wall_ratio: float | None = None
    wall_ratio_ci95: tuple[float, float] | None = None
    cpu_ratio: float | None = None
    cpu_ratio_ci95: tuple[float, float] | None = None
    versions: dict[str, str] | None = None
    instructions: int | None = None
    float_instructions: int | None = None
    instruction_ratio: float | None = None
    instruction_spread: float | None = None
    instruction_kinds: dict[str, int] | None = None
    instructions_by_symbol: dict[str, int] | None = None
    operations_on: dict[str, int] | None = None
    before: DeviceState | None = None
    after: DeviceState | None = None
    accelerated: bool = False


@_record
class Place:
    """A device that a run folder's artifacts are measured on, with this many threads."""

    device: str
    threads: PositiveInt = 1


@_reported
class Parity:
    """An artifact's logits on a device, beside others of the same images.

    Attributes:
        device: Where the artifact ran.
        runtime: Its runtime.
        scheme: Its scheme.
        outcome: Whether it did.
        against: What it is held against: the same artifact on this host, or the reference on the
            same integers.
        n: Images.
        top1_agreement: Share with the same class.
        max_abs_logit_diff: Largest difference of a logit.
        rms_logit_diff: Of all logits.
        diff_over_error: That over what quantization does to the reference's logits; None of a float
            artifact.
        largest_flip_margin: Where classes differ, the largest lead that the other's class had.
    """

    device: str
    runtime: str
    scheme: Scheme
    outcome: Literal["measured", "not_run", "failed"]
    reason: str | None = None
    kind: Kind | None = None
    against: Literal["host", "reference"] | None = None
    n: int | None = None
    top1_agreement: Fraction | None = None
    max_abs_logit_diff: float | None = None
    rms_logit_diff: float | None = None
    diff_over_error: float | None = None
    largest_flip_margin: float | None = None


@_reported
class Agreement:
    """Two artifacts of equal scheme on the same images; not transitive, so every pair has a row.

    `diff_over_error` is `rms_logit_diff` over what quantization does to the logits (RMS against the
    float artifact, of the better of the two): 0 where both compute the same, 1 and more where they
    have no more in common than each has with the float model.
    """

    a: str
    b: str
    scheme: Scheme
    kind: Kind
    n: int
    profile_a: Profile | None
    profile_b: Profile | None
    top1_agreement: Fraction
    max_abs_logit_diff: float
    rms_logit_diff: float | None = None
    diff_over_error: float | None = None
    placement_a: str | None = None
    placement_b: str | None = None


# --- training -------------------------------------------------------------------------------------


@_reported
class CurvePoint:
    """How training stood after an update.

    Attributes:
        step: How many updates are behind.
        epoch: The same in passes over the images.
        loss: Of that update's images.
        kl: Mean divergence of the class probabilities from the float network's, in nats.
        sqnr_db: Of the logits; the mean square of the first batch's stands for all.
        top1: None where the images have no labels.
        rate: Of the weights.
        oscillating: Share of weights that swing between two integers; None where none are counted.
        frozen: Share of weights that no longer move for that reason.
        images_per_second: Since this process began.
    """

    step: int
    epoch: float
    loss: float
    kl: float
    sqnr_db: float
    top1: Fraction | None = None
    rate: float
    oscillating: Fraction | None = None
    frozen: Fraction | None = None
    images_per_second: float | None = None


@_reported
class Training:
    """How the integers were learnt.

    Attributes:
        settings: What was set.
        source: Where the images came from.
        n: How many there are.
        sha256: Of their list and contents.
        updates: How many there were.
        seconds: Of the process that finished it, from update `resumed_at` on.
        resumed_at: Updates that an earlier process had made.
        images_per_second: Of the process that finished it.
        device: Where it was trained.
        processes: How many shared every batch.
        skipped: Names of images that could not be decoded; others took their place.
        before: The reference's accuracy with the integers that training began with.
        after: The same with those that it left.
        curve: In the order of updates.
    """

    settings: Finetuning
    source: str
    n: int
    sha256: str
    updates: int
    seconds: float
    resumed_at: int = 0
    images_per_second: float | None = None
    device: str
    processes: int = 1
    skipped: tuple[str, ...] = ()
    before: Accuracy | None = None
    after: Accuracy | None = None
    curve: tuple[CurvePoint, ...] = ()


# --- mixed precision ------------------------------------------------------------------------------


@_reported
class Sensitivity:
    """What a group of layers loses when it alone runs in integers, all else in float.

    Attributes:
        kind: One layer, or all of a block.
        name: Of the layer or block.
        layers: Those of the group.
        sites: Quantized for it.
        macs: Multiply-accumulates of one image.
        weights: How many numbers its layers' weights are.
        sqnr_db: Of the logits; None where nothing changes.
        kl: Mean divergence of the class probabilities from the float network's, in nats.
    """

    kind: Literal["layer", "block"]
    name: str
    layers: tuple[str, ...]
    sites: tuple[str, ...]
    macs: PositiveInt
    weights: PositiveInt
    sqnr_db: float | None
    kl: float


@_reported
class Cost:
    """What it costs to leave a layer in float.

    Attributes:
        unit: `ms`: the time that integers save, measured and divided by MACs. Where nothing was
            measured, `MACs` done in float. Where integers were measured and save no time, `bytes`:
            three more for every weight.
        source: Where that comes from, in words.
        layers: By name.
    """

    unit: Literal["ms", "MACs", "bytes"]
    source: str
    layers: dict[str, PositiveFloat]


@_reported
class Assignment:
    """Which layers stay float, and what follows.

    Attributes:
        float_layers: In network order, of those that could run in integers; the others do.
        cost: The sum of theirs.
        predicted_sqnr_db: From the sensitivities, as though errors of layers were independent; None
            where nothing is lost.
        accuracy: Of the reference on the evaluation images; None where it was not tried.
    """

    float_layers: tuple[str, ...]
    cost: float
    predicted_sqnr_db: float | None
    accuracy: Accuracy | None = None


@_reported
class Tuning:
    """How the layers that stay float were chosen.

    Attributes:
        max_drop_pp: The upper end of the drop's 95 % interval must not exceed it.
        images: How many calibration images the sensitivities were taken on.
        sensitivities: Layers in network order, then blocks.
        cost: Of a layer in float.
        front: The Pareto front: no other assignment is predicted to lose less at no more cost.
            Cheapest first.
        chosen: Index in `front`.
    """

    max_drop_pp: float
    profile: Profile
    images: int
    sensitivities: tuple[Sensitivity, ...]
    cost: Cost
    front: Annotated[tuple[Assignment, ...], Field(min_length=1)]
    chosen: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _parts_agree(self) -> Tuning:
        if self.chosen >= len(self.front):
            msg = f"chosen is {self.chosen}, and the front has {len(self.front)} assignments"
            raise ValueError(msg)
        layers = {row.name for row in self.sensitivities if row.kind == "layer"}
        named = {name for point in self.front for name in point.float_layers}
        if not layers or not layers <= self.cost.layers.keys() or not named <= layers:
            msg = "sensitivities, cost and front must speak of the same layers, at least one"
            raise ValueError(msg)
        return self


# --- where the time goes --------------------------------------------------------------------------


@_reported
class Breakdown:
    """Where an artifact's time goes, by its runtime's own profiler; one thread, one inference.

    Attributes:
        reason: Why there is none, where there is none.
        method: What was asked.
        ms: Milliseconds of each kind of operation: sums of medians.
        ops: How many of each kind are executed.
        fallback_ms: Of those that the runtime has no fast kernel for; they are in `ms` too.
        fallback_ops: How many these are.
        unprofiled_ms: Of the whole without the profiler, which lengthens what is short.
        floor_ms: Of the pointwise layers alone, in an artifact of their own in the same runtime.
        macs_per_second: The rate at which the fastest stage's of them are done.
        bytes_per_second: At which this machine copies memory.
        bound_ms: What the roofline allows: all multiply-accumulates at that rate, or all weights
            read from memory once, whichever takes longer.
    """

    runtime: str
    scheme: Scheme
    device: str
    outcome: Literal["measured", "not_run", "failed"]
    reason: str | None = None
    method: str | None = None
    inferences: int | None = None
    ms: dict[OpKind, float] | None = None
    ops: dict[OpKind, int] | None = None
    fallback_ms: float | None = None
    fallback_ops: int | None = None
    unprofiled_ms: float | None = None
    floor_ms: float | None = None
    macs_per_second: float | None = None
    bytes_per_second: float | None = None
    bound_ms: float | None = None


# --- graph form and placement ---------------------------------------------------------------------


@_reported
class Candidate:
    """One way to lay a model out, and what a device took for it.

    Attributes:
        outcome: `failed` where it could not be exported.
        heat: The last one it took part in, from 0; after each the slower half leaves.
        samples: Inferences timed in that heat.
        cpu_ratio: Of the medians, over the best float candidate's of the same heat; as wall_ratio
            and instruction_ratio, whose ends are those of the least and the largest counts.
        accuracy: On the evaluation images, where that decided.
    """

    scheme: Scheme
    placement: str
    float_stages: tuple[int, ...] = ()
    graph_form: str
    outcome: Literal["measured", "failed"]
    reason: str | None = None
    heat: int = 0
    samples: int = 0
    wall_p50_ms: float | None = None
    cpu_p50_ms: float | None = None
    wall_ratio: float | None = None
    wall_ratio_ci95: tuple[float, float] | None = None
    cpu_ratio: float | None = None
    cpu_ratio_ci95: tuple[float, float] | None = None
    instructions: int | None = None
    instruction_ratio: float | None = None
    instruction_ratio_ends: tuple[float, float] | None = None
    accuracy: Accuracy | None = None


@_reported
class Layout:
    """Which graph form and placement a runtime's artifacts have, and why.

    Attributes:
        source: `measured` on `device`, or a `default` of the ISA, which `reason` explains.
        isa: What the artifacts are made for.
        network: Hash of the architecture, the input's shape and the layers that stay float: a
            choice holds for these,
        versions: and for these versions of the runtime's packages.
        clock: By which time, or count, candidates were ranked.
        candidates: All that were measured, those that stayed longest first.
        asked: The scheme that the recipe asked for.
        scheme: Of the artifact that is shipped: `float` where integers are not shown to be faster.
        placement: Of the quantized artifact; None where there is none.
        float_stages: Stages, counted from 0, whose blocks it leaves in float.
        graph_form: Of the quantized artifact, or else of the float one.
        float_form: Of the float artifact.
    """

    runtime: str
    source: Literal["measured", "default"]
    reason: str
    isa: Isa
    device: str | None = None
    threads: int | None = None
    input_size: int | None = None
    network: str | None = None
    versions: dict[str, str] | None = None
    clock: Literal["cpu", "wall", "instructions"] | None = None
    candidates: tuple[Candidate, ...] = ()
    asked: Scheme | None = None
    scheme: Scheme
    placement: str | None
    float_stages: tuple[int, ...] = ()
    graph_form: str
    float_form: str


def to_json(record: object) -> bytes:
    """Serialise a record (or a container of them) to UTF-8 JSON with a stable key order."""
    return TypeAdapter(type(record)).dump_json(record, indent=2)
