"""What a user names as a checkpoint becomes files.

In: a path of a weights file, of an index of shards or of a folder, or `hf:owner/name`. Out: the
weights files, and what the configuration files beside them say, as they say it. Names that an index
gives are held to its own folder; nothing but JSON is read here.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import CheckpointError
from pipeline.store import sha256_file, sha256_json

SUFFIXES = (".pth", ".pt", ".bin", ".safetensors", ".ckpt", ".pth.tar")
INDEX_SUFFIXES = (".safetensors.index.json", ".bin.index.json")
FOLDER_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""What a folder's weights are called, the best first."""

MAX_JSON_BYTES = 16 * 2**20
CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
HUB_PREFIX = "hf:"

_HF_FILE = re.compile(r"(model|pytorch_model)(-\d{5}(-of-\d{5})?)?\.(safetensors|bin)")
# What a trainer keeps beside the weights.
_NO_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state.*)\.\w+")
_HUB_ID = re.compile(r"hf:([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(\w[\w./+-]*))?", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Located:
    """The files of one checkpoint.

    Attributes:
        name: What the user gave.
        files: The weights: one file, or the shards of an index by name.
        folder: The folder where it is one as Hugging Face writes them, else None.
        config: Of config.json there, or empty.
        preprocessor: Of preprocessor_config.json there, or empty.
    """

    name: str
    files: tuple[Path, ...]
    folder: Path | None = None
    config: dict[str, Any] = field(default_factory=dict)
    preprocessor: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """What locates the same files again without asking the hub."""
        return str(self.folder) if self.name.startswith(HUB_PREFIX) else self.name

    def sha256(self) -> str:
        """Return the hex SHA-256 of the file, or of the shards' names and hashes."""
        if len(self.files) == 1:
            return sha256_file(self.files[0])
        return sha256_json({path.name: sha256_file(path) for path in self.files})


def locate(where: str | Path) -> Located:
    """Find the files of a checkpoint.

    Args:
        where: A weights file, an index of shards, a folder with either, or `hf:owner/name` with an
            optional `@revision`, which is fetched into Hugging Face's own cache.

    Returns:
        Its weights files, each of which exists, and its configuration.

    Raises:
        CheckpointError: There is no such thing, it is ambiguous, an index names what it must not,
            a configuration is no JSON object, or the hub does not give it.
    """
    name = str(where)
    if name.startswith(HUB_PREFIX):
        return _in_folder(_fetch(name), name)
    path = Path(where)
    try:
        there, folder, file = path.exists(), path.is_dir(), path.is_file()
    except (OSError, ValueError) as error:  # a name that is too long, or has a zero byte
        raise _nothing(f"no such checkpoint: {name[:200]!r}") from error
    if not there:
        raise _nothing(f"no such checkpoint: {path}")
    if folder:
        return _in_folder(path, name)
    if not file:
        raise _nothing(f"{path} is not a regular file")
    if path.name.endswith(INDEX_SUFFIXES):
        return _configured(name, _shards(path), path.parent)
    if not path.name.endswith(SUFFIXES):
        raise _nothing(f"{path} ends in {path.suffix or 'nothing'}")
    if _HF_FILE.fullmatch(path.name):
        return _configured(name, (path,), path.parent)
    return Located(name=name, files=(path,))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        CheckpointError: It is missing, too large, damaged, or not an object.
    """
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise _unusable(path, f"it has {size} bytes")
        content = json.loads(path.read_bytes())
    except (ValueError, OSError, RecursionError) as error:
        raise _unusable(path, str(error)) from error
    if not isinstance(content, dict):
        raise _unusable(path, f"it holds a {type(content).__name__}")
    return content


# --- folders and indexes --------------------------------------------------------------------------


def _in_folder(folder: Path, name: str) -> Located:
    path = next((folder / n for n in FOLDER_NAMES if (folder / n).is_file()), None)
    if path is None:
        found = _loose_weights(folder)
        if not found:
            raise _nothing(f"{name} is a folder without a checkpoint in it")
        if len(found) > 1:
            some = ", ".join(item.name for item in found[:6])
            raise CheckpointError(
                f"{name} is a folder of {len(found)} weights files ({some})",
                allowed=f"one, or one called {', '.join(FOLDER_NAMES)}",
                do="Name the file itself",
            )
        path = found[0]
    files = _shards(path) if path.name.endswith(INDEX_SUFFIXES) else (path,)
    return _configured(name, files, folder)


def _loose_weights(folder: Path) -> list[Path]:
    try:
        return sorted(
            item
            for item in folder.iterdir()
            if item.name.endswith(SUFFIXES) and item.is_file() and not _NO_WEIGHTS.match(item.name)
        )
    except OSError as error:
        raise _nothing(f"{folder} is a folder that cannot be read ({error.strerror})") from error


def _configured(name: str, files: tuple[Path, ...], folder: Path) -> Located:
    config, preprocessor = folder / CONFIG, folder / PREPROCESSOR
    return Located(
        name=name,
        files=files,
        folder=folder,
        config=read_json(config) if config.is_file() else {},
        preprocessor=read_json(preprocessor) if preprocessor.is_file() else {},
    )


def _shards(index: Path) -> tuple[Path, ...]:
    weights = read_json(index).get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise _unusable(index, "it has no weight_map")
    suffix = next(s for s in INDEX_SUFFIXES if index.name.endswith(s)).removesuffix(".index.json")
    names = set()
    for shard in weights.values():
        if not isinstance(shard, str) or not _is_plain(shard) or not shard.endswith(suffix):
            raise CheckpointError(
                f"{index} names the shard {str(shard)[:120]!r}: refused",
                allowed=f"names of {suffix} files in the same folder",
                do="Download the checkpoint again, from where you trust it",
            )
        names.add(shard)
    return tuple(_shard(index.parent, name, index) for name in sorted(names))


def _is_plain(name: str) -> bool:
    return name.isprintable() and not re.search(r"[/\\:]", name) and name not in {"", ".", ".."}


def _shard(folder: Path, name: str, index: Path) -> Path:
    path = folder / name
    try:
        there = path.is_file()
    except OSError:
        there = False
    if not there:
        raise CheckpointError(
            f"no such checkpoint: {path}, a shard that {index.name} names",
            allowed="an index with all of its shards beside it",
            do="Download the missing shard",
        )
    home = folder.resolve()
    # The hub's cache keeps the files of a snapshot as links to blobs, two folders up.
    home = home.parents[1] if home.parent.name == "snapshots" else home
    if not path.resolve().is_relative_to(home):
        raise CheckpointError(
            f"{path} is a link that leaves its folder: refused",
            allowed="shards in the folder of their index",
            do="Copy the shard there, where you trust it",
        )
    return path


def _nothing(got: str) -> CheckpointError:
    return CheckpointError(
        got,
        allowed=f"a file ending in {', '.join(SUFFIXES)}, an index of shards ending in "
        f"{' or '.join(INDEX_SUFFIXES)}, a folder with one of them, or {HUB_PREFIX}owner/name",
        do="Give the path of a checkpoint",
    )


def _unusable(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be used ({why})",
        allowed=f"a JSON object of at most {MAX_JSON_BYTES} bytes",
        do="Correct or move the file",
    )


# --- the hub --------------------------------------------------------------------------------------


def _fetch(name: str) -> Path:
    """Fetch a repository's weights and configuration; return the folder of the snapshot."""
    match = _HUB_ID.fullmatch(name)
    if match is None or ".." in name:
        raise CheckpointError(
            f"{name} is not the name of a model on the Hugging Face hub",
            allowed=f"{HUB_PREFIX}owner/name or {HUB_PREFIX}owner/name@revision",
            do="Copy the name from the model's page",
        )
    repository, revision = match[1], match[2]
    folder = _snapshot(repository, revision, ("*.safetensors", "*.safetensors.index.json"))
    if not any(folder.glob("*.safetensors")):
        folder = _snapshot(repository, revision, ("pytorch_model*.bin", "*.bin.index.json"))
    return folder


def _snapshot(repository: str, revision: str | None, weights: tuple[str, ...]) -> Path:
    try:
        import huggingface_hub
    except ImportError as error:
        raise CheckpointError(
            f"{HUB_PREFIX}{repository} needs huggingface_hub, which is not installed",
            allowed="models from the hub with the [hub] packages; local files without",
            do="pip install convnext-edge[hub]",
        ) from error
    try:
        # Pickles are fetched only where there is no safetensors; folders within are other models.
        return Path(
            huggingface_hub.snapshot_download(
                repository,
                revision=revision,
                allow_patterns=[CONFIG, PREPROCESSOR, *weights],
                ignore_patterns=["*/*"],
            )
        )
    except Exception as error:  # the hub's client and its transport raise many more
        raise _not_fetched(repository, revision, error) from error


def _not_fetched(repository: str, revision: str | None, error: Exception) -> CheckpointError:
    from huggingface_hub import errors

    match error:
        case errors.GatedRepoError():
            got, do = "asks for its terms to be accepted", "Accept them on its page, then log in"
        case errors.RepositoryNotFoundError():
            got, do = "does not exist, or is private", "Correct the name, or log in"
        case errors.RevisionNotFoundError():
            got, do = f"has no revision {revision}", "Correct what stands behind the @"
        case errors.LocalEntryNotFoundError():
            got = f"cannot be reached ({_first_line(error)}) and is not in the cache"
            do = "Connect to the network, or download the folder elsewhere and name it"
        case _:
            got = f"cannot be fetched ({_first_line(error)})"
            do = "Try again, or download the folder elsewhere and name it"
    return CheckpointError(
        f"{HUB_PREFIX}{repository} {got}",
        allowed="a public model on the Hugging Face hub, or one you have access to",
        do=do,
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}" if lines[0] else type(error).__name__
