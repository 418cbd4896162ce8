"""Which kind of source a place is.

In: a path, or a pattern of shards. Out: the source that reads it.
"""

from __future__ import annotations

import re
import tarfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from calib.sources.folder import Folder
from calib.sources.listing import Listing
from calib.sources.parquet import Parquet
from calib.sources.tars import Tars
from calib.sources.zipped import Zip
from pipeline.errors import DataError

if TYPE_CHECKING:
    from calib.sources.base import Source

KINDS = (
    "a folder of images, a .zip or .tar of one, WebDataset shards (a folder of .tar files or"
    " shards-{000..009}.tar), Hugging Face parquet (a file or a folder), a .csv with path and"
    " label, or the words digits (scikit-learn's) or none (synthetic images)"
)
TAR_ENDINGS = (".tar", ".tgz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
MAX_SHARDS = 100_000
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


def open_source(where: str) -> Source:
    """Open a place.

    Args:
        where: A path, or a path with {000..009} in it for as many .tar files.

    Raises:
        DataError: There is no such place, or it is none that holds images.
    """
    path = Path(where)
    if path.is_dir():
        return _of_folder(path)
    if not path.exists() and _BRACES.search(where):
        return Tars([(shard, shard.name) for shard in _shards(where)], where)
    if not path.is_file():
        raise _refused(where, "no such folder or file" if not path.exists() else "not a file")
    kind = path.name.lower()
    if kind.endswith(".csv"):
        return Listing(path)
    if kind.endswith(".parquet"):
        return Parquet([(path, path.name)], where)
    if kind.endswith(TAR_ENDINGS):
        return Tars([(path, path.name)], where)
    if zipfile.is_zipfile(path):
        return Zip(path)
    if tarfile.is_tarfile(path):
        return Tars([(path, path.name)], where)
    raise _refused(where, "not a folder and none of the files that hold images")


def _of_folder(path: Path) -> Source:
    folder = Folder(path)
    if folder.names():
        return folder
    for ending, kind in ((".parquet", Parquet), (".tar", Tars)):
        files = [(path / name, name) for name in folder.files if name.lower().endswith(ending)]
        if files:
            source: Source = kind(files, str(path))
            source.skipped = (*folder.skipped, *source.skipped)
            return source
    return folder


def _shards(pattern: str) -> list[Path]:
    names = [pattern]
    while match := _BRACES.search(names[0]):
        first, last = match[1], match[2]
        count = int(last) - int(first) + 1
        if not 0 < count * len(names) <= MAX_SHARDS:
            raise _refused(pattern, f"{match[0]} stands for {max(count, 0) * len(names)} files")
        numbers = [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
        # Every name has the same braces at the same place but for the numbers already set.
        names = [_BRACES.sub(number, name, count=1) for name in names for number in numbers]
    paths = [Path(name) for name in names]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise _refused(pattern, f"{len(missing)} of {len(paths)} files are absent, as {missing[0]}")
    return paths


def _refused(where: str, why: str) -> DataError:
    return DataError(f"{where}: {why}", allowed=KINDS, do="Correct --data or --eval")
