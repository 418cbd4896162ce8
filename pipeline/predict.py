"""Labels and probabilities through an artifact's own runtime.

In: an artifact and image files. Out: the likeliest classes of each image. Preprocessing and labels
come from the artifact's metadata.
"""

from __future__ import annotations

from errno import ENOENT
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table
from scipy.special import softmax

from calib.preprocess import preprocess
from calib.sources.base import read_capped
from pipeline.errors import ArtifactError, DataError, printable
from pipeline.worker import Worker, log_without_a_run
from targets.base import run_padded
from targets.export import read_metadata

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from pipeline.worker import Progress


def classify(
    artifact: Path, images: Sequence[Path], top: int
) -> tuple[list[dict[str, Any]], list[DataError]]:
    """Classify image files; one that is none takes nothing from the others.

    A worker does it: what libraries print on the way stands in its log.

    Args:
        artifact: An exported artifact.
        images: The files.
        top: How many classes per image.

    Returns:
        Per image its `image` and `classes`: label and probability, likeliest first. And what is
        wrong with files that are no image.

    Raises:
        ArtifactError: The artifact is unusable, or its runtime cannot run here.
    """
    with log_without_a_run() as log, Worker(log) as worker:
        found = worker.call(
            "pipeline.predict:classify_stage",
            artifact=str(artifact),
            images=list(map(str, images)),
            top=top,
        ).value
    return found["predictions"], [DataError(**one) for one in found["refused"]]


def classify_stage(
    artifact: str, images: list[str], top: int, progress: Progress
) -> dict[str, list[dict[str, Any]]]:
    """Do what `classify` says.

    Args:
        artifact: An exported artifact.
        images: The files.
        top: How many classes per image.
        progress: Called per image.

    Returns:
        `predictions`, and `refused`: `got`, `allowed` and `do` of every file that is no image.
    """
    stated = read_metadata(Path(artifact))
    labels = stated.labels
    if (cannot := stated.runtime.can_run()) is not None:
        raise ArtifactError(
            f"{artifact} cannot run here: {cannot.reason}",
            allowed="an artifact of a runtime that runs on this machine",
            do="See `convnext-edge doctor`",
        )
    session = stated.runtime.load(Path(artifact), threads=1)
    predictions, refused = list[dict[str, Any]](), list[dict[str, Any]]()
    for index, image in enumerate(images):
        progress(index, len(images))
        try:
            pixels = preprocess(_read(Path(image)), image, stated.preprocessing)
        except DataError as error:
            refused.append({"got": error.got, "allowed": error.allowed, "do": error.do})
            continue
        probabilities = softmax(run_padded(session, pixels[None], stated.batch)[0])
        best = probabilities.argsort()[::-1][:top]
        classes = [
            {"label": labels[i] if labels else str(i), "probability": float(probabilities[i])}
            for i in best
        ]
        predictions.append({"image": image, "classes": classes})
    return {"predictions": predictions, "refused": refused}


def show(predictions: list[dict[str, Any]], console: Console) -> None:
    """Print a row per image and class."""
    table = Table("image", "label", "probability")
    for item in predictions:
        for rank, entry in enumerate(item["classes"]):
            name = escape(printable(item["image"])) if rank == 0 else ""
            table.add_row(name, escape(printable(entry["label"])), f"{entry['probability']:.4f}")
    console.print(table)


def _read(path: Path) -> bytes:
    try:
        if not path.is_file():  # a pipe or a device need not end
            raise FileNotFoundError(ENOENT, "no such file" if not path.exists() else "not a file")
        with path.open("rb") as stream:
            return read_capped(stream, str(path))
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror})",
            allowed="image files",
            do="Correct the path",
        ) from error
