"""The training loop: a student learns to give a float network's logits.

In: something to train (`Trainee`), the float network, batches of images, and a `Finetuning`. Out:
the trainee, trained; a line of metrics every few updates; a checkpoint every few minutes, from
which the rest goes on, on one process bit for bit. Nothing here knows what is learnt.
"""

from __future__ import annotations

import json
import math
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from calib.oscillation import Oscillation, dampening, frozen_from
from pipeline.arithmetic import BITS, FEW_BITS
from pipeline.convnext import Block
from pipeline.errors import EdgeError, TrainingError
from pipeline.recorder import CHECKPOINT, Recorder
from pipeline.store import writing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from calib.learned import LearnedLayer
    from pipeline.distributed import Group
    from pipeline.records import Finetuning
    from pipeline.worker import Progress

    Batch = tuple[NDArray[np.float32], NDArray[np.int64]]
    Batches = Iterator[Batch]

POINTS = 200
"""Lines of metrics that a training writes, about."""
DAMPENING = 1e-7
"""Weight of the dampening penalty at the end; it rises from 0 on a cosine, as in the paper. A
weight far from its cell's middle then feels it as much as it feels the loss."""
EPSILON = 1e-16
"""Adam's: gradients of a relative error, per step of a weight, are 1e-6 to 1e-10."""
NORM_MEMORY = 0.02
"""Share of an update's gradient in the running mean of norms."""
SMALLEST = 1e-20
"""Of a relative square error: what is less is float noise."""
LEAST_SHARE = 0.01
"""Of a learning rate, at the end of the cosine."""


class Trainee(Protocol):
    """What can be trained: a module with a little more."""

    @property
    def layers(self) -> Mapping[str, LearnedLayer]:
        """Those whose weights are watched for oscillation."""

    @property
    def bits(self) -> int:
        """Of the weights that have least."""

    def groups(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Return the weights, which decay, and all else that is learnt."""

    def network_of(self) -> nn.Module:
        """Return the module that maps pixels to logits and holds all of `groups`."""

    def drop_paths(self, rate: float, generator: torch.Generator, part: tuple[int, int]) -> None:
        """Let images skip blocks from now on; `part` is (rank, ranks) of every batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Feed:
    """Where images come from.

    Attributes:
        per_epoch: Updates in one epoch.
        batches: Gives this process's part of an epoch's batches, from the given one on: float32
            (N, C, H, W) in [0, 255], and labels int64 (N,), -1 for none.
    """

    per_epoch: int
    batches: Callable[[int, int], Batches]


class Loop:
    """One training.

    Args:
        trainee: What is trained.
        teacher: The float network.
        how: All that can be set.
        feed: Images.
        keep: Folder of the checkpoint; made where it is missing.
        ranks: The processes that share every batch.
        device: Where to compute.
    """

    def __init__(
        self,
        trainee: Trainee,
        teacher: nn.Module,
        how: Finetuning,
        feed: Feed,
        *,
        keep: Path,
        ranks: Group,
        device: torch.device,
    ) -> None:
        self.how, self.feed, self.ranks, self.keep, self.device = how, feed, ranks, keep, device
        self.trainee = trainee
        self.network = trainee.network_of().to(device)
        self.teacher = teacher.to(device)
        weights, others = trainee.groups()
        self.optimiser = torch.optim.AdamW(
            [
                {"params": weights, "lr": how.rate, "weight_decay": how.decay},
                {"params": others, "lr": how.scale_rate, "weight_decay": 0.0},
            ],
            eps=EPSILON,
        )
        self.rates = (how.rate, how.scale_rate)
        self.learnt: list[Tensor] = [*weights, *others]
        self.mean = [p.detach().clone() for p in self.learnt]
        self.watch = Oscillation(trainee.layers).to(device)
        self.paths = torch.Generator()
        if how.drop_path:
            trainee.drop_paths(how.drop_path, self.paths, (ranks.rank, ranks.size))
        self.blocks = _Outputs(self.network, self.teacher) if how.block_weight else None
        self.total = how.epochs * feed.per_epoch
        self.step = self.resumed_at = 0
        """Updates that are behind, and those that were when this process began."""
        self.power = 0.0
        self.norm = 0.0
        """Running mean of gradients' norms."""
        self.block_powers: list[float] = []
        self.lines: list[dict[str, Any]] = []
        self.stopping = False

    @cached_property
    def shared(self) -> nn.Module:
        """The network; with several processes, what exchanges its gradients.

        To make that, processes wait for each other: not before all of them have all they need.
        """
        if self.ranks.size == 1:
            return self.network
        return nn.parallel.DistributedDataParallel(self.network)

    # --- the whole ---------------------------------------------------------------------------

    def train(self, progress: Progress) -> None:
        """Train to the end, from the checkpoint where there is one.

        Raises:
            EdgeError: An image is one that no other may take the place of.
            TrainingError: The loss is not finite; or `stop` was called, and what was learnt is
                kept.
        """
        self._restore()
        recorder = Recorder(self.keep, self.lines) if self.ranks.leads else None
        try:
            self._updates(recorder, progress)
        finally:
            if recorder is not None:
                recorder.close()
        self._take_mean()

    def _updates(self, recorder: Recorder | None, progress: Progress) -> None:
        began = saved = time.monotonic()
        progress(self.step, self.total)
        while self.step < self.total:
            epoch, start = divmod(self.step, self.feed.per_epoch)
            batches = self.feed.batches(epoch, start)
            while (batch := self._next(batches)) is not None:
                pixels, labels = batch
                line = self.update(torch.from_numpy(pixels), torch.from_numpy(labels))
                rate = (self.step - self.resumed_at) * self.how.batch / (time.monotonic() - began)
                agreed = line.pop("stopping")
                self._note(line | {"images_per_second": round(rate, 1)}, recorder, progress)
                # Several processes agree on it; one need not wait for its next update.
                if agreed or (self.stopping and self.ranks.size == 1):
                    raise self._stopped()
                if time.monotonic() - saved >= 60 * self.how.save_minutes:
                    self.save()
                    saved = time.monotonic()

    def _next(self, batches: Batches) -> Batch | None:
        """Return the next batch; what one process cannot read is an error on all of them.

        Raises:
            EdgeError: As the first process that could not read raised it.
        """
        found, failure = None, None
        try:
            found = next(batches, None)
        except EdgeError as error:
            failure = error

        def own() -> None:
            if failure is not None:
                raise failure

        if float(self._mean_over_ranks(torch.tensor(float(failure is not None)))):
            self.ranks.gather(own)
        return found

    def stop(self) -> None:
        """Ask `train` to save and to end after the update that it is at."""
        self.stopping = True

    def _note(self, line: dict[str, Any], recorder: Recorder | None, progress: Progress) -> None:
        every = max(1, self.total // POINTS)
        if self.step % every == 0 or self.step == self.total:
            if self.trainee.layers:
                line |= {"oscillating": self.watch.share(), "frozen": self.watch.frozen_share()}
            self.lines.append({"step": self.step, **line})
            if recorder is not None:
                recorder.add(self.lines[-1])
        words = [f"loss {line['loss']:.4f}", f"{line['sqnr_db']:.1f} dB"]
        words += [] if line["top1"] is None else [f"top-1 {line['top1']:.3f}"]
        words += [f"rate {line['rate']:.1e}"]
        progress(self.step, self.total, ", ".join(words))

    # --- one update --------------------------------------------------------------------------

    def update(self, image: Tensor, labels: Tensor) -> dict[str, Any]:
        """Learn from one batch.

        Args:
            image: This process's part, float32 (N, C, H, W).
            labels: int64 (N,), -1 where there is none.

        Returns:
            `loss` and its parts, over all processes.

        Raises:
            TrainingError: The loss is not finite.
        """
        factor = self._factor()
        for group, rate in zip(self.optimiser.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        # A seed of its own for every update: what is drawn does not depend on what came before.
        self.paths.manual_seed((self.how.seed * 1_000_003 + self.step) % 2**63)
        image = image.to(self.device, memory_format=torch.channels_last)
        found = self.losses(image, labels.to(self.device))
        line = self._agreed(found)
        if not math.isfinite(line["loss"]):
            raise self._diverged("loss", line["loss"])
        self.optimiser.zero_grad(set_to_none=True)
        found["loss"].backward()  # type: ignore[no-untyped-call]
        self._clip()
        self.optimiser.step()
        self.step += 1
        self._watch()
        self._average()
        return line | {"rate": self.rates[0] * factor, "epoch": self.step / self.feed.per_epoch}

    def _clip(self) -> None:
        """Shorten a gradient that is much longer than those before it.

        Raises:
            TrainingError: It is not finite.
        """
        longest = self.how.clip * self.norm if self.norm else math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.learnt, longest))
        if not math.isfinite(norm):
            raise self._diverged("gradient", norm)
        share = NORM_MEMORY if self.norm else 1.0
        self.norm += share * (min(norm, longest) - self.norm)

    def _watch(self) -> None:
        freezes = {"auto": FEW_BITS, "freeze": BITS}.get(self.how.oscillation)
        threshold = None if freezes is None else frozen_from(self.step / self.total)
        self.watch.observe(threshold, freezes or BITS)

    def losses(self, image: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the loss of a batch, and its parts.

        All are means over the batch, so that of equal parts of a batch the mean is the whole's.
        """
        how = self.how
        # Its eight bits are too few beside 8-bit integers.
        coarse = self.device.type == "cuda" and self.trainee.bits == FEW_BITS
        half = torch.autocast("cuda", dtype=torch.bfloat16) if coarse else nullcontext()
        with torch.no_grad():
            wanted = self.teacher(image)
            taught = self.blocks.taken(of_teacher=True) if self.blocks else []
        with half:
            given = self.shared(image).float()
        if not self.power:
            self.power = float(self._mean_over_ranks(wanted.square().mean()))
            self.block_powers = [float(self._mean_over_ranks(y.square().mean())) for y in taught]
        logit = (given - wanted).square().mean() / self.power
        logs = functional.log_softmax(given, dim=1), functional.log_softmax(wanted, dim=1)
        kl = functional.kl_div(*logs, reduction="batchmean", log_target=True)
        loss = how.logit_weight * logit + how.kl_weight * kl
        if self.blocks:
            pairs = zip(self.blocks.taken(), taught, self.block_powers, strict=True)
            apart = [(y.float() - t).square().mean() / power for y, t, power in pairs]
            loss = loss + how.block_weight * torch.stack(apart).mean()
        if how.label_weight:
            errors = functional.cross_entropy(given, labels, ignore_index=-1, reduction="none")
            loss = loss + how.label_weight * errors.mean()
        if how.oscillation == "dampen":
            rising = (1 - math.cos(math.pi * self.step / self.total)) / 2
            loss = loss + DAMPENING * rising * dampening(self.trainee.layers)
        right = (given.argmax(dim=1) == labels).float().mean()
        labelled = (labels >= 0).float().mean()
        parts = {"logit": logit, "kl": kl, "right": right, "labelled": labelled}
        return {"loss": loss} | {name: value.detach() for name, value in parts.items()}

    def _agreed(self, found: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return a batch's figures over all processes, and whether any of them is to stop."""
        figures = [value.detach().double() for value in found.values()]
        figures.append(torch.tensor(float(self.stopping)).to(figures[0]))
        *means, stopping = self._mean_over_ranks(torch.stack(figures)).tolist()
        loss, logit, kl, right, labelled = means
        return {
            "stopping": stopping > 0,
            "loss": loss,
            "kl": kl,
            "sqnr_db": -10 * math.log10(max(logit, SMALLEST)),
            "top1": right / labelled if labelled else None,
        }

    def _mean_over_ranks(self, value: Tensor) -> Tensor:
        if self.ranks.size > 1:
            value = value.clone()
            torch.distributed.all_reduce(value)
            value /= self.ranks.size
        return value

    def _factor(self) -> float:
        """Return what learning rates are multiplied by: warm-up, then a cosine."""
        warm = max(1, round(self.how.warm_up * self.total))
        if self.step < warm:
            return (self.step + 1) / warm
        done = (self.step - warm) / max(1, self.total - warm)
        return LEAST_SHARE + (1 - LEAST_SHARE) * (1 + math.cos(math.pi * done)) / 2

    # --- the mean ----------------------------------------------------------------------------

    def _average(self) -> None:
        # As long as few values are in it, it is their plain mean.
        share = max(1 - self.how.average, 1 / (self.step + 1))
        torch._foreach_lerp_(self.mean, [p.detach() for p in self.learnt], share)

    @torch.no_grad()
    def _take_mean(self) -> None:
        if self.how.average:
            torch._foreach_copy_(self.learnt, self.mean)

    # --- checkpoints -------------------------------------------------------------------------

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        if not self.ranks.leads:
            return
        state = {
            "step": self.step,
            "power": self.power,
            "block_powers": self.block_powers,
            "norm": self.norm,
            "network": self.network.state_dict(),
            "mean": self.mean,
            "optimiser": self.optimiser.state_dict(),
            "watch": self.watch.state_dict(),
            "lines": json.dumps(self.lines),
        }
        with writing(self.keep / CHECKPOINT) as partial:
            torch.save(state, partial)

    def _restore(self) -> None:
        """Go on from the checkpoint, where there is one: rank 0's, on every process."""
        path = self.keep / CHECKPOINT

        def read() -> dict[str, Any] | None:
            if not path.exists():
                return None
            with self._of_this_training():
                found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            return found

        state = self.ranks.of_leader(read)
        if state is not None:
            self.ranks.gather(lambda: self._go_on_from(state))

    def _go_on_from(self, state: dict[str, Any]) -> None:
        with self._of_this_training():
            self.network.load_state_dict(state["network"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.watch.load_state_dict(state["watch"])
            torch._foreach_copy_(self.mean, [mean.to(self.device) for mean in state["mean"]])
            self.step = self.resumed_at = state["step"]
            self.power, self.norm = state["power"], state["norm"]
            self.block_powers, self.lines = state["block_powers"], json.loads(state["lines"])

    @contextmanager
    def _of_this_training(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise TrainingError(
                f"{self.keep / CHECKPOINT} is not a checkpoint of this training"
                f" ({type(error).__name__})",
                allowed="what this command wrote",
                do="Give --restart to begin again",
            ) from error

    def _stopped(self) -> TrainingError:
        self.save()
        return TrainingError(
            f"training was stopped after update {self.step} of {self.total}; it is kept in"
            f" {self.keep / CHECKPOINT}",
            allowed="a training to its end",
            do="Run the same command again to go on",
        )

    def _diverged(self, what: str, value: float) -> TrainingError:
        path = self.keep / CHECKPOINT
        kept = f"the last good checkpoint is {path}" if path.exists() else "no checkpoint yet"
        return TrainingError(
            f"the {what} of update {self.step + 1} of {self.total} is {value}; {kept}",
            allowed=f"a finite {what}",
            do="Give a smaller --rate, or look at the data",
        )


class _Outputs:
    """What the blocks of two networks gave last."""

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        self.held: dict[bool, dict[str, Tensor]] = {True: {}, False: {}}
        for network, of_teacher in ((student, False), (teacher, True)):
            for name, module in network.named_modules():
                if isinstance(module, Block):
                    module.register_forward_hook(self._hook(name, of_teacher=of_teacher))

    def _hook(self, name: str, *, of_teacher: bool) -> Callable[[nn.Module, object, Tensor], None]:
        def keep(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            self.held[of_teacher][name] = output

        return keep

    def taken(self, *, of_teacher: bool = False) -> list[Tensor]:
        """Return the outputs of the last forward pass, in order, and forget them."""
        held, self.held[of_teacher] = self.held[of_teacher], {}
        return list(held.values())
