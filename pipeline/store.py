"""Content hashes, atomic writes, and the cache that lets a run resume.

In: a stage's name, its inputs and settings. Out: a folder of finished files, named by the hash of
everything that could change them: inputs, settings, the source of the stage's code and of all it
imports from this project, and the versions of the libraries it uses. A folder appears whole or not
at all: it is written beside its place and renamed.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

PACKAGES = ("pipeline", "calib", "targets", "reports")
LONGEST_STEM = 80
CACHE_VARIABLE = "CONVNEXT_EDGE_CACHE"
_PARTIAL, RECORD = ".partial-", "stage.json"


def cache_folder() -> Path:
    """Return this user's cache folder of this project: $CONVNEXT_EDGE_CACHE, else the system's."""
    if own := os.environ.get(CACHE_VARIABLE):
        return Path(own).absolute()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).absolute() / "convnext-edge"


def sha256_bytes(data: bytes) -> str:
    """Return the hex SHA-256 of some bytes."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the hex SHA-256 of a file, or of a folder's relative names and contents in order."""
    if path.is_dir():
        parts = [
            f"{file.relative_to(path).as_posix()}:{sha256_file(file)}"
            for file in sorted(path.rglob("*"))
            if file.is_file()
        ]
        return sha256_bytes("\n".join(parts).encode())
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def size_bytes(path: Path) -> int:
    """Return the bytes in a file, or in all files of a folder."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size


def sha256_json(value: object) -> str:
    """Return the hex SHA-256 of a JSON-like value; key order does not matter."""
    return sha256_bytes(json.dumps(value, sort_keys=True, default=str).encode())


@functools.cache
def sha256_code(module: str) -> str:
    """Return a hash of a module's source and of every module of this project it imports."""
    sources: dict[str, str] = {}
    pending = [module]
    while pending:
        name = pending.pop()
        path = module_path(name)
        if name in sources or path is None:
            continue
        source = path.read_bytes()
        sources[name] = sha256_bytes(source)
        pending.extend(imported_modules(source.decode()))
        if path.name == "__init__.py" and "." in name:
            # A package that is imported as such is discovered from: all of it counts.
            pending.extend(f"{name}.{child.stem}" for child in sorted(path.parent.glob("*.py")))
    return sha256_json(sources)


def file_stem(name: str) -> str:
    """Return a name as a file can be called everywhere."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-")[:LONGEST_STEM]


def imported_modules(source: str) -> set[str]:
    """Return the modules of this project that some Python source imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return {name for name in names if module_path(name) is not None}


@functools.cache
def module_path(name: str) -> Path | None:
    """Return the file of one of this project's modules, found without importing anything."""
    package, *rest = name.split(".")
    if package not in PACKAGES:
        return None
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    place = Path(spec.origin).parent.joinpath(*rest)
    candidates = (place.with_suffix(".py"), place / "__init__.py") if rest else (Path(spec.origin),)
    return next((path for path in candidates if path.is_file()), None)


def library_versions(distributions: Sequence[str]) -> dict[str, str | None]:
    """Return the installed version of each distribution, None where it is not installed."""
    return {name: _version(name) for name in distributions}


def installed_versions(distributions: Sequence[str]) -> dict[str, str]:
    """Return the version of each distribution that is installed."""
    found = library_versions(distributions).items()
    return {name: version for name, version in found if version is not None}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


@contextmanager
def writing(target: Path) -> Iterator[Path]:
    """Give a path beside `target` to write to; rename it into place when the block succeeds.

    Works for a file and for a folder (the block creates either). Whatever goes wrong, Ctrl-C
    included, the target is as it was before and nothing is left beside it.

    Raises:
        OutputError: The place cannot be written, or the disk is full.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(target.parent, error) from error
    partial = target.with_name(f"{_PARTIAL}{os.getpid()}-{target.name}")
    try:
        yield partial
        _replace(partial, target)
    except OSError as error:
        # A copy names its source first and what it could not write second.
        named = [str(name) for name in (error.filename, error.filename2) if name is not None]
        if named and not any(str(partial) in name for name in named):
            raise
        raise cannot_write(target, error) from error
    finally:
        _remove(partial)


def write_atomic(target: Path, data: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        OutputError: The place cannot be written, or the disk is full.
    """
    with writing(target) as partial:
        partial.write_bytes(data)


def publish(source: Path, target: Path, names: Iterable[str]) -> bool:
    """Copy finished files or folders into a folder that a person looks in, all at once.

    Nothing is written where the same contents are there already.

    Args:
        source: Folder that holds them.
        target: Folder to appear.
        names: What to copy.

    Returns:
        Whether anything was written.

    Raises:
        OutputError: The place cannot be written, or the disk is full.
    """
    wanted = {name: sha256_file(source / name) for name in names}
    if target.is_dir():
        there = {item.name: sha256_file(item) for item in target.iterdir()}
        if there == wanted:
            return False
    with writing(target) as partial:
        partial.mkdir()
        for name in wanted:
            copy = shutil.copytree if (source / name).is_dir() else shutil.copyfile
            copy(source / name, partial / name)
    return True


def cannot_write(path: Path | str, error: OSError) -> OutputError:
    """Return the error that says that a path cannot be written, and why."""
    return OutputError(
        f"cannot write {path} ({error.strerror or error})",
        allowed="a folder this user may write, on a disk with room",
        do="Choose another --out or free some space; what was finished is kept",
    )


def _replace(partial: Path, target: Path) -> None:
    if target.is_dir():
        old = target.with_name(f"{_PARTIAL}{os.getpid()}-old-{target.name}")
        target.rename(old)
        partial.rename(target)
        shutil.rmtree(old)
    else:
        partial.replace(target)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        # Where nothing could be written nothing can be removed, and that was said already.
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One cached step: what would change its result.

    Attributes:
        name: The stage's word, and the first part of its folder's name.
        modules: Modules whose source, with all of this project they import, belongs to the key.
        inputs: Name to content hash.
        settings: Anything JSON can hold.
        libraries: Distributions whose versions belong to the key.
    """

    name: str
    modules: Sequence[str]
    inputs: Mapping[str, str]
    settings: Mapping[str, object]
    libraries: Sequence[str] = ()

    def key(self) -> str:
        """Return the hash of everything that could change the stage's result."""
        return sha256_json(
            {
                "name": self.name,
                "code": [sha256_code(module) for module in self.modules],
                "inputs": dict(self.inputs),
                "settings": dict(self.settings),
                "libraries": library_versions(self.libraries),
            }
        )


class Store:
    """The finished stages of one run folder.

    Args:
        root: Their folder.
        beside: That of another run, from which what is finished there is copied; None for none.
    """

    def __init__(self, root: Path, beside: Path | None = None) -> None:
        self.root = root
        self.beside = beside
        self.reused: list[str] = []
        self.made: list[str] = []
        self._whole: set[Path] = set()

    def find(self, stage: Stage) -> Path | None:
        """Return the finished folder of a stage, or None.

        One whose files are not those that were written is not finished.
        """
        folder = self._folder(stage)
        if folder not in self._whole and (_is_whole(folder) or self._borrowed(folder)):
            self._whole.add(folder)
        return folder if folder in self._whole else None

    def _borrowed(self, folder: Path) -> bool:
        """Copy a stage that another run has finished; tell whether there is one."""
        if self.beside is None or not _is_whole(self.beside / folder.name):
            return False
        with writing(folder) as partial:
            shutil.copytree(self.beside / folder.name, partial)
        return True

    def get(self, stage: Stage, make: Callable[[Path], None], *, anew: bool = False) -> Path:
        """Return the stage's folder, made now only where it is not there yet.

        Args:
            stage: What to look up.
            make: Fills an empty folder; its path is the argument.
            anew: Whether it is made now in any case, and then takes the place of what was there.

        Raises:
            OutputError: The run folder cannot be written.
        """
        found = self.find(stage)
        if found is not None and not anew:
            self.reused.append(stage.name)
            return found
        with _lock_of(self._folder(stage)):
            if anew:
                return self._made(stage, make)
            # Another thread may have made it meanwhile.
            return self.find(stage) or self._made(stage, make)

    def _made(self, stage: Stage, make: Callable[[Path], None]) -> Path:
        folder = self._folder(stage)
        started = time.monotonic()
        with writing(folder) as partial:
            partial.mkdir()
            make(partial)
            record = {
                "stage": stage.name,
                "seconds": round(time.monotonic() - started, 3),
                "inputs": dict(stage.inputs),
                "settings": dict(stage.settings),
                "libraries": library_versions(stage.libraries),
                "files": _hashes(partial),
            }
            (partial / RECORD).write_text(json.dumps(record, indent=2, default=str))
        self.made.append(stage.name)
        return folder

    def _folder(self, stage: Stage) -> Path:
        return self.root / f"{stage.name}-{stage.key()[:16]}"


_locks: dict[Path, threading.Lock] = {}


def _lock_of(folder: Path) -> threading.Lock:
    """Return what keeps two threads of this process from making one stage at the same time."""
    return _locks.setdefault(folder.absolute(), threading.Lock())


def _hashes(folder: Path) -> dict[str, str]:
    """Return the hash of every file in a stage's folder, by its path there."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {
        file.relative_to(folder).as_posix(): sha256_file(file)
        for file in files
        if file != folder / RECORD
    }


def _is_whole(folder: Path) -> bool:
    try:
        written = json.loads((folder / RECORD).read_bytes())["files"]
    except (OSError, ValueError, LookupError, TypeError):
        return False
    return bool(written == _hashes(folder))
