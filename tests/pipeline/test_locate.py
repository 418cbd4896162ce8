"""What a user names becomes files, and nothing that an index or a hub says leads elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub as hub
import pytest
from huggingface_hub.utils._paths import filter_repo_objects

from pipeline import locate as module
from pipeline.errors import CheckpointError
from pipeline.locate import Located, locate, read_json
from pipeline.store import sha256_file, sha256_json


def _folder(place: Path, **files: Any) -> Path:
    """Write files by name, `__` for a dot: bytes as they are, else JSON."""
    place.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (place / name.replace("__", ".")).write_bytes(data)
    return place


def _index(place: Path, *shards: object) -> Path:
    weights = {f"tensor{i}": shard for i, shard in enumerate(shards)}
    _folder(place, model__safetensors__index__json={"metadata": {}, "weight_map": weights})
    return place / "model.safetensors.index.json"


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["a.pth", "a.pt", "a.bin", "a.safetensors", "a.ckpt", "a.pth.tar", "a b.pth"]
)
def test_a_file_is_itself_whatever_lies_beside_it(tmp_path: Path, name: str) -> None:
    _folder(tmp_path, config__json=b"not json at all")
    (tmp_path / name).write_bytes(b"weights")
    located = locate(str(tmp_path / name))
    assert located == Located(name=str(tmp_path / name), files=(tmp_path / name,))
    assert located.sha256() == sha256_file(tmp_path / name)
    assert located.path == located.name


@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model.bin", "model-00001-of-00002.safetensors"]
)
def test_a_file_of_hugging_face_takes_what_lies_beside_it(tmp_path: Path, name: str) -> None:
    _folder(tmp_path, config__json={"a": 1}, preprocessor_config__json={"b": 2})
    (tmp_path / name).write_bytes(b"")
    located = locate(tmp_path / name)
    assert (located.folder, located.files) == (tmp_path, (tmp_path / name,))
    assert (located.config, located.preprocessor) == ({"a": 1}, {"b": 2})


@pytest.mark.parametrize("name", ["absent.pth", "a\0b.pth", "x" * 5000 + ".pth"])
def test_what_is_not_there_is_said_to_be(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        locate(tmp_path / name)


def test_what_is_no_weights_file_is_refused(tmp_path: Path) -> None:
    _folder(tmp_path, net__h5=b"", bare=b"")
    os.mkfifo(tmp_path / "pipe.pth")
    for name, said in (
        ("net.h5", r"ends in \.h5\. .*\.safetensors, \.ckpt, \.pth\.tar"),
        ("bare", "ends in nothing"),
        ("pipe.pth", "is not a regular file"),
    ):
        with pytest.raises(CheckpointError, match=said):
            locate(tmp_path / name)


# --- folders --------------------------------------------------------------------------------------


def test_a_folder_gives_its_best_weights(tmp_path: Path) -> None:
    _folder(tmp_path, config__json={"model_type": "convnext"})
    for name in ("other.safetensors", "pytorch_model.bin", "model.safetensors"):
        (tmp_path / name).write_bytes(b"")
        if name == "pytorch_model.bin":
            assert locate(tmp_path).files == (tmp_path / name,)
    located = locate(tmp_path)
    assert located.files == (tmp_path / "model.safetensors",)
    assert located.folder == tmp_path
    assert located.config == {"model_type": "convnext"}
    assert located.preprocessor == {}


def test_a_single_file_is_found_beside_what_a_trainer_leaves(tmp_path: Path) -> None:
    for name in ("best.pt", "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin"):
        (tmp_path / name).write_bytes(b"")
    assert locate(tmp_path).files == (tmp_path / "best.pt",)


def test_an_ambiguous_folder_names_its_files(tmp_path: Path) -> None:
    _folder(tmp_path, first__pth=b"", second__pth=b"")
    with pytest.raises(CheckpointError, match=r"2 weights files \(first\.pth, second\.pth\)"):
        locate(tmp_path)


def test_an_empty_folder_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(CheckpointError, match=r"folder\.pth is a folder without a checkpoint"):
        locate(tmp_path / "folder.pth")


@pytest.mark.parametrize("text", [b"{", b"[1]", b"\xff", b"", b"[" * 100_000, b"1" * 9999])
def test_a_configuration_that_is_no_object_is_refused(tmp_path: Path, text: bytes) -> None:
    _folder(tmp_path, model__safetensors=b"", config__json=text)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be used"):
        locate(tmp_path)


def test_a_huge_configuration_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b"{}" + b" " * 16 * 2**20)
    with pytest.raises(CheckpointError, match="it has 16777218 bytes"):
        read_json(path)
    path.write_bytes(b"{}" + b" " * (16 * 2**20 - 2))
    assert read_json(path) == {}


# --- shards ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
@pytest.mark.parametrize("by_folder", [False, True])
def test_shards_of_an_index(tmp_path: Path, ending: str, *, by_folder: bool) -> None:
    stem = "model" if ending == "safetensors" else "pytorch_model"
    names = [f"{stem}-0000{i}-of-00002.{ending}" for i in (1, 2)]
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    weights = {"a": names[1], "b": names[0], "c": names[1]}
    index = tmp_path / f"{stem}.{ending}.index.json"
    index.write_text(json.dumps({"weight_map": weights}))
    (tmp_path / "config.json").write_text('{"depths": [3]}')
    located = locate(tmp_path if by_folder else index)
    assert located.files == tuple(tmp_path / name for name in names)
    assert located.config == {"depths": [3]}
    assert located.sha256() == sha256_json({n: sha256_file(tmp_path / n) for n in names})


@pytest.mark.parametrize(
    "shard",
    [
        "../secret.safetensors",
        "/etc/secret.safetensors",
        "sub/a.safetensors",
        "..\\secret.safetensors",
        "C:secret.safetensors",
        "..",
        ".",
        "",
        "a\0.safetensors",
        "a\n.safetensors",
        "pytorch_model.bin",
        "model.safetensors.index.json",
        7,
        None,
    ],
)
def test_a_shard_that_is_no_plain_name_is_refused(tmp_path: Path, shard: object) -> None:
    inner = tmp_path / "inner"
    (tmp_path / "secret.safetensors").write_bytes(b"")
    index = _index(inner, "ok.safetensors", shard)
    (inner / "ok.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"names the shard .*: refused"):
        locate(index)


def test_a_shard_that_links_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret.safetensors").write_bytes(b"")
    index = _index(tmp_path / "inner", "a.safetensors")
    (tmp_path / "inner" / "a.safetensors").symlink_to(tmp_path / "secret.safetensors")
    with pytest.raises(CheckpointError, match="a link that leaves its folder: refused"):
        locate(index)
    (tmp_path / "inner" / "b.safetensors").write_bytes(b"")
    (tmp_path / "inner" / "a.safetensors").unlink()
    (tmp_path / "inner" / "a.safetensors").symlink_to("b.safetensors")
    assert locate(index).files == (tmp_path / "inner" / "a.safetensors",)


def test_links_to_the_blobs_of_the_hubs_own_cache_are_followed(tmp_path: Path) -> None:
    blob = _folder(tmp_path / "models--a--b" / "blobs", abc=b"weights") / "abc"
    snapshot = tmp_path / "models--a--b" / "snapshots" / "1234"
    index = _index(snapshot, "a.safetensors")
    (snapshot / "a.safetensors").symlink_to(Path("../../blobs/abc"))
    assert locate(index).files[0].resolve() == blob
    (tmp_path / "outside.safetensors").write_bytes(b"")
    (snapshot / "a.safetensors").unlink()
    (snapshot / "a.safetensors").symlink_to("../../../outside.safetensors")
    with pytest.raises(CheckpointError, match="leaves its folder"):
        locate(index)


def test_a_link_to_itself_is_a_missing_shard(tmp_path: Path) -> None:
    index = _index(tmp_path, "a.safetensors")
    (tmp_path / "a.safetensors").symlink_to("a.safetensors")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        locate(index)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    index = _index(tmp_path, "a.safetensors", "b.safetensors")
    (tmp_path / "a.safetensors").write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=r"no such checkpoint: .*b\.safetensors, a shard that"
    ):
        locate(index)


@pytest.mark.parametrize("content", [{}, {"weight_map": {}}, {"weight_map": ["a"]}])
def test_an_index_without_shards_is_refused(tmp_path: Path, content: dict[str, Any]) -> None:
    _folder(tmp_path, model__safetensors__index__json=content)
    with pytest.raises(CheckpointError, match="has no weight_map"):
        locate(tmp_path)


# --- the hub --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "hf:convnext",
        "hf:a/b/c",
        "hf:a/../b",
        "hf:/a",
        "hf:a/b@",
        "hf:a/b@../../x",
        "hf:a/b@/etc",
        "hf:a/b c",
        "hf:",
        "hf:http://a/b",
        "hf:ä/b",
    ],
)
def test_what_is_no_name_on_the_hub_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match="is not the name of a model"):
        locate(name)


def _asked(monkeypatch: pytest.MonkeyPatch, folder: Path, **remote: bytes) -> list[dict[str, Any]]:
    """Stand in for the hub: a repository with these files, and the list of what is asked of it."""
    asked: list[dict[str, Any]] = []

    def download(repository: str, **arguments: Any) -> str:
        asked.append({"repository": repository, **arguments})
        wanted = list(
            filter_repo_objects(
                [name.replace("__", ".") for name in remote],
                allow_patterns=arguments["allow_patterns"],
                ignore_patterns=arguments["ignore_patterns"],
            )
        )
        for name in wanted:
            _folder((folder / name).parent)
            (folder / name).write_bytes(remote[name.replace(".", "__")])
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", download)
    return asked


def test_a_model_of_the_hub_is_fetched_as_safetensors(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    remote = {
        "config__json": b'{"a": 1}',
        "model__safetensors": b"",
        "pytorch_model__bin": b"",
        "README__md": b"",
        "run__py": b"",
        "onnx/model__safetensors": b"",
    }
    asked = _asked(monkeypatch, tmp_path / "hub", **remote)
    located = locate("hf:owner/net-tiny@refs/pr/1")
    assert located.files == (tmp_path / "hub" / "model.safetensors",)
    assert located.name == "hf:owner/net-tiny@refs/pr/1"
    assert located.path == str(tmp_path / "hub")
    assert located.config == {"a": 1}
    fetched = {item.name for item in (tmp_path / "hub").iterdir()}
    assert fetched == {"config.json", "model.safetensors"}
    assert [(a["repository"], a["revision"]) for a in asked] == [("owner/net-tiny", "refs/pr/1")]


def test_pickles_are_fetched_only_where_there_is_no_safetensors(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    remote = {"config__json": b"{}", "pytorch_model__bin": b"", "training_args__bin": b""}
    asked = _asked(monkeypatch, tmp_path / "hub", **remote)
    assert locate("hf:owner/net").files == (tmp_path / "hub" / "pytorch_model.bin",)
    assert len(asked) == 2
    assert not (tmp_path / "hub" / "training_args.bin").exists()


def test_a_model_without_weights_is_said_to_be_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _asked(monkeypatch, tmp_path / "hub", config__json=b"{}")
    with pytest.raises(CheckpointError, match="hf:owner/net is a folder without a checkpoint"):
        locate("hf:owner/net")


def _http_error(kind: str) -> Exception:
    request = httpx2.Request("GET", "https://huggingface.co/api/models/owner/net")
    response = httpx2.Response(403, request=request)
    error: Exception = getattr(hub.errors, kind)("403 Client Error.\nMore.", response=response)
    return error


ERRORS: dict[str, tuple[str, str]] = {
    "GatedRepoError": ("asks for its terms to be accepted", "Accept them"),
    "RepositoryNotFoundError": ("does not exist, or is private", "Correct the name"),
    "RevisionNotFoundError": ("has no revision v9", "behind the @"),
    "DisabledRepoError": ("cannot be fetched", "403 Client Error"),
    "HfHubHTTPError": ("cannot be fetched", "403 Client Error"),
    "LocalEntryNotFoundError": ("cannot be reached", "Connect to the network"),
    "OfflineModeIsEnabled": ("cannot be fetched", "offline"),
    "OSError": ("cannot be fetched", "No space left"),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_what_the_hub_refuses_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    if kind == "OSError":
        error: Exception = OSError(28, "No space left on device")
    elif kind in {"LocalEntryNotFoundError", "OfflineModeIsEnabled"}:
        error = getattr(hub.errors, kind)("offline\nand more")
    else:
        error = _http_error(kind)

    def download(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(hub, "snapshot_download", download)
    with pytest.raises(CheckpointError) as caught:
        locate("hf:owner/net@v9")
    line = str(caught.value)
    assert line.startswith("hf:owner/net ")
    assert "\n" not in line
    assert "More" not in line
    for words in ERRORS[kind]:
        assert words in line


def test_without_the_hubs_client_its_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"pip install convnext-edge\[hub\]"):
        locate("hf:owner/net")


def test_an_endpoint_that_refuses_is_said_by_the_real_client(tmp_path: Path) -> None:
    program = (
        "from pipeline.errors import CheckpointError\n"
        "from pipeline.locate import locate\n"
        "try:\n    locate('hf:owner/net')\n"
        "except CheckpointError as error:\n    print(error)\n"
    )
    environment = os.environ | {
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HUB_CACHE": str(tmp_path),
        "HF_HUB_ETAG_TIMEOUT": "2",
        "NO_PROXY": "*",
    }
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=Path(module.__file__).parents[1],
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert "hf:owner/net cannot be reached" in done.stdout
    assert "is not in the cache" in done.stdout
