"""What runs on a device: one file, standard library and numpy, beside the runtime's own package.

In: `python3 runner.py JOBS.json RESULT.json`; the paths in JOBS are relative to its folder. Out:
RESULT.json, written beside and renamed: the machine, its state before and after, and per job raw
times or the reason in one line; on standard output a line of JSON per turn, how far it is. It
imports nothing of this project and needs Python 3.9.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    Answer = dict[str, Any]
    Run = Callable[[Any], Any]
    Say = Callable[[int, int], None]

FORMAT = 1
WORKER = "--worker"
INPUT_NAME, OUTPUT_NAME, METADATA_KEY = "image", "logits", "convnext_edge"
CAPABILITIES = "OPTIMIZATION_CAPABILITIES"
DISTRIBUTIONS = {
    "numpy": ("numpy",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "openvino": ("openvino",),
    "ai_edge_litert": ("ai-edge-litert",),
    "tflite_runtime": ("tflite-runtime",),
    "tensorflow": ("tensorflow", "tensorflow-cpu"),
}
"""Module to the distributions that may bring it."""
TFLITE = {
    "ai_edge_litert": "ai_edge_litert.interpreter",
    "tflite_runtime": "tflite_runtime.interpreter",
    "tensorflow": "tensorflow.lite",
}
"""Packages with TFLite's interpreter, and its module: the first that is there is taken."""
COUNT_FROM, COUNT_TO, UNSEEN = -77001, -77002, -77003
"""Closing such a file descriptor fails and does nothing; who watches calls sees the first two."""
MACHINE_ID = Path("/etc/machine-id")
CPUS = Path("/sys/devices/system/cpu")
THERMAL = Path("/sys/class/thermal")
POWERCAP = Path("/sys/class/powercap")
SECONDS_TO_ASK = 10


def main() -> None:
    """Do the task, or serve as a worker of one."""
    # Libraries print to standard output, from C++ too: point it at standard error.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(**message: object) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    if sys.argv[1:] == [WORKER]:
        here = Here()
        for line in sys.stdin:
            say(**here.ask(json.loads(line)))
        return
    jobs, result = (Path(argument) for argument in sys.argv[1:])
    answer = perform(jobs, lambda done, total: say(done=done, total=total))
    with written(result) as partial:
        partial.write_text(json.dumps(answer))


def perform(path: Path, say: Say) -> Answer:
    """Do the task in JOBS.json; the result's `error` is one line where it could not be done."""
    answer: Answer = {"runner": FORMAT, "machine": machine(), "before": state(), "jobs": []}
    try:
        task = json.loads(path.read_text())
        answer["jobs"] = TASKS[task["task"]](task, path.parent, say)
    except Exception as error:  # noqa: BLE001 - the process boundary: the caller says it in a line
        return {**answer, "after": state(), "error": in_a_line(error)}
    if task.get("marks"):
        answer["maps"] = read("/proc/self/maps")
    return {**answer, "after": state(), "error": None}


def measure(task: Answer, folder: Path, say: Say) -> list[Answer]:
    """Time the jobs in turn; one that fails has an `error`, and the others go on."""
    jobs, places = task["jobs"], []
    try:
        rows: list[Answer] = []
        spent: dict[str, list[float | None]] = {}
        total = task["rounds"] * len(jobs)
        for job in jobs:
            place = Elsewhere() if task["processes"] else Here(lambda: say(0, total))
            places.append(place)
            what = {"job": job, "folder": str(folder), "image": task["image"]}
            how = {key: task[key] for key in ("threads", "warm_up", "marks")}
            rows.append({**row(job), **place.ask({"load": {**what, **how}})})
        for turn in range(total):
            taken, place = rows[turn % len(jobs)], places[turn % len(jobs)]
            if taken["error"] is None:
                answer = place.ask({"time": task["per_round"]})
                for key in ("wall_ms", "cpu_ms"):
                    taken[key] += answer.pop(key, [])
                spent.setdefault(taken["label"], []).append(answer.pop("energy_mj", None))
                taken.update(answer)
            say(turn + 1, total)
        for taken in rows:
            turns = spent.get(taken["label"], [None])
            taken["energy_mj"] = None if None in turns else sum(turns)
        return rows
    finally:
        for place in places:
            place.end()


def infer(task: Answer, folder: Path, say: Say) -> list[Answer]:
    """Run images through one artifact and write its logits."""
    import numpy as np

    job, batch = task["job"], task["batch"]
    images = np.load(folder / task["images"], mmap_mode="r")
    started = time.perf_counter()
    run, versions = load(job, folder, task["threads"])
    taken = {**row(job), "load_ms": 1000 * (time.perf_counter() - started), "versions": versions}
    say(0, len(images))
    found = []
    for start in range(0, len(images), batch):
        part = images[start : start + batch].astype(np.float32)
        filled = np.concatenate([part, np.repeat(part[-1:], batch - len(part), axis=0)])
        # A runtime may hand out the same buffer every time: copy.
        found.append(np.array(run(filled)[: len(part)], np.float32))
        say(min(start + batch, len(images)), len(images))
    with written(folder / task["logits"]) as partial, partial.open("wb") as file:
        np.save(file, np.concatenate(found))
    return [{**taken, "peak_memory_bytes": peak_memory_bytes()}]


TASKS: dict[str, Callable[[Answer, Path, Say], list[Answer]]] = {
    "probe": lambda *_: [],
    "measure": measure,
    "infer": infer,
}


def row(job: Answer) -> Answer:
    """Return what is known of a job before it runs."""
    empty = dict.fromkeys(("load_ms", "first_ms", "peak_memory_bytes", "energy_mj", "error"))
    return {"label": job["label"], "wall_ms": [], "cpu_ms": [], "versions": {}, **empty}


class Here:
    """One job in this process; it calls `beat` after what may take long."""

    def __init__(self, beat: Callable[[], None] = lambda: None) -> None:
        self.beat = beat

    def ask(self, request: Answer) -> Answer:
        """Load or time; what goes wrong is an `error` in the answer."""
        try:
            if "load" in request:
                return self.load(**request["load"])
            return self.time(request["time"])
        except Exception as error:  # noqa: BLE001 - as in `perform`
            return {"error": in_a_line(error)}

    def load(
        self, job: Answer, folder: str, image: str, threads: int, warm_up: int, *, marks: bool
    ) -> Answer:
        """Load the artifact, run it for the first time, and warm it up."""
        import numpy as np

        self.image = np.load(Path(folder) / image).astype(np.float32)
        # What goes before goes the same way, so that Python's own code settles; nobody sees it.
        self.marks = (UNSEEN, UNSEEN) if marks else None
        started = time.perf_counter()
        self.run, versions = load(job, Path(folder), threads)
        load_ms = 1000 * (time.perf_counter() - started)
        self.beat()
        started = time.perf_counter()
        self.run(self.image)
        first_ms = 1000 * (time.perf_counter() - started)
        for _ in range(warm_up):
            self.beat()
            self.time(1)
        self.beat()
        self.marks = (COUNT_FROM, COUNT_TO) if marks else None
        return {"load_ms": load_ms, "first_ms": first_ms, "versions": versions}

    def time(self, inferences: int) -> Answer:
        """Take wall and CPU time of every inference."""
        wall, cpu, energy = [], [], energy_uj()
        for _ in range(inferences):
            wall_before, cpu_before = time.perf_counter_ns(), time.process_time_ns()
            if self.marks:
                mark(self.marks[0])
                self.run(self.image)
                mark(self.marks[1])
            else:
                self.run(self.image)
            cpu.append((time.process_time_ns() - cpu_before) / 1e6)
            wall.append((time.perf_counter_ns() - wall_before) / 1e6)
        taken = {"wall_ms": wall, "cpu_ms": cpu, "energy_mj": spent_mj(energy, energy_uj())}
        return {**taken, "peak_memory_bytes": peak_memory_bytes()}

    def end(self) -> None:
        """Do nothing: nothing was started."""


class Elsewhere:
    """One job in a process of its own, which is a worker of this file."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, request: Answer) -> Answer:
        """Pass the request on; a process that dies is an `error` too."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
            if line.endswith("\n"):
                answer: Answer = json.loads(line)
                return answer
        code = self.process.wait()
        died = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return {"error": f"its process ended with {died}"}

    def end(self) -> None:
        """End the process, whatever it is doing."""
        self.process.kill()
        self.process.wait()


def load(job: Answer, folder: Path, threads: int) -> tuple[Run, dict[str, str]]:
    """Load an artifact as this project's runtimes do; no path is the null job.

    Returns:
        What runs a batch (float32 pixels, NCHW), and the versions of what does.
    """
    if job["path"] is None:
        return (lambda image: image[:, 0, 0, :1]), {}
    run, module = LOADERS[job["runtime"]](str(folder / job["path"]), threads)
    versions = packages([module])
    if job["layout"] != "NHWC":
        return run, versions
    import numpy as np

    return (lambda image: run(np.ascontiguousarray(image.transpose(0, 2, 3, 1)))), versions


def load_onnx(path: str, threads: int) -> tuple[Run, str]:
    """Load into onnxruntime, on the CPU."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # a thread beside what is timed
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return (lambda image: session.run([OUTPUT_NAME], {INPUT_NAME: image})[0]), "onnxruntime"


def load_openvino(path: str, threads: int) -> tuple[Run, str]:
    """Load into OpenVINO's CPU plugin."""
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    half = scheme(model) == "float16" and "FP16" in core.get_property("CPU", CAPABILITIES)
    hints = {"INFERENCE_PRECISION_HINT": "f16" if half else "f32", "NUM_STREAMS": 1}
    hints["INFERENCE_NUM_THREADS"] = threads
    request = core.compile_model(model, "CPU", hints).create_infer_request()
    return (lambda image: request.infer({INPUT_NAME: image})[OUTPUT_NAME]), "openvino"


def scheme(model: Any) -> str:
    """Return the scheme of an OpenVINO model of this project; empty where it does not say."""
    if not model.has_rt_info([METADATA_KEY]):
        return ""
    stated = json.loads(model.get_rt_info([METADATA_KEY]).astype(str))
    return str(stated.get("export", {}).get("scheme", ""))


def load_tflite(path: str, threads: int) -> tuple[Run, str]:
    """Load into TFLite's interpreter with its default delegate, XNNPACK."""
    module = next(filter(importlib.util.find_spec, TFLITE), "ai_edge_litert")
    package = importlib.import_module(TFLITE[module])
    interpreter = package.Interpreter(model_path=path, num_threads=threads)
    run = interpreter.get_signature_runner()
    return (lambda image: run(**{INPUT_NAME: image})[OUTPUT_NAME]), module


LOADERS: dict[str, Callable[[str, int], tuple[Run, str]]] = {
    "onnx": load_onnx,
    "openvino": load_openvino,
    "tflite": load_tflite,
}


def machine() -> Answer:
    """Say what this device is."""
    info = cpu_info()
    model = read("/proc/device-tree/model").strip("\0 \n")
    flags = f"{info.get('flags', '')} {info.get('Features', '')}".split()
    part = f"{platform.machine()}, CPU part {info.get('CPU part', 'unknown')}"
    return {
        "description": model or info.get("model name") or info.get("Hardware") or part,
        "machine": platform.machine(),
        "id": read(MACHINE_ID).strip(),
        "cores": len(cores()),
        "isa": flags,
        "python": platform.python_version(),
        "os": os_name(),
        "packages": packages(DISTRIBUTIONS),
    }


def packages(modules: Iterable[str]) -> dict[str, str]:
    """Return the versions of those modules that can be found, by distribution."""
    found = {}
    for module in modules:
        if importlib.util.find_spec(module) is not None:
            for name in DISTRIBUTIONS[module]:
                with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                    found[name] = importlib.metadata.version(name)
    return found


def state() -> Answer:
    """Say how this device stands now; what it does not tell is None or absent."""
    clock = CPUS / f"cpu{min(cores())}" / "cpufreq"
    khz = read(clock / "scaling_cur_freq").strip()
    temperatures = {}
    for zone in sorted(THERMAL.glob("thermal_zone*")):
        kind = read(zone / "type").strip()
        with contextlib.suppress(ValueError):
            name = zone.name if not kind or kind in temperatures else kind
            temperatures[name] = int(read(zone / "temp")) / 1000
    with contextlib.suppress(ValueError):
        temperatures["vcgencmd"] = float(vcgencmd("measure_temp").partition("'")[0])
    return {
        "governor": read(clock / "scaling_governor").strip() or None,
        "frequency_mhz": int(khz) / 1000 if khz.isdigit() else None,
        "temperatures_c": temperatures,
        "throttled": vcgencmd("get_throttled") or None,
        "load": load_average(),
    }


def cores() -> set[int]:
    """Return the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def load_average() -> float | None:
    """Return how many processes could run in the last minute; not every Android tells."""
    try:
        return os.getloadavg()[0]
    except OSError:
        return None


def vcgencmd(word: str) -> str:
    """Return the value that a Raspberry Pi's firmware gives; empty on another device."""
    tool = shutil.which("vcgencmd")
    if tool is None:
        return ""
    try:
        answer = subprocess.check_output([tool, word], text=True, timeout=SECONDS_TO_ASK)
    except (OSError, subprocess.SubprocessError):
        return ""
    return answer.strip().partition("=")[2]


def cpu_info() -> dict[str, str]:
    """Return the first core's lines of /proc/cpuinfo, and the board's."""
    first: dict[str, str] = {}
    for line in read("/proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        first.setdefault(key.strip(), value.strip())
    return first


def os_name() -> str:
    """Return the system's name as it writes it for people."""
    lines = (line.partition("=") for line in read("/etc/os-release").splitlines())
    names = (value.strip('"') for key, _, value in lines if key == "PRETTY_NAME")
    return next(names, platform.platform())


def peak_memory_bytes() -> int | None:
    """Return the largest resident size of this process; None where the system does not tell."""
    words = read("/proc/self/status").partition("VmHWM:")[2].split()
    return int(words[0]) * 1024 if words else None


def energy_uj() -> dict[str, tuple[int, int]]:
    """Return what the counter of each CPU package stands at, and where it begins anew.

    Only some devices have them, and mostly root alone may read them.

    Source: Linux, Documentation/power/powercap/powercap.rst.
    """
    found: dict[str, tuple[int, int]] = {}
    for zone in sorted(POWERCAP.glob("*:*")):
        name = read(zone / "name").strip()
        words = [read(zone / word).strip() for word in ("energy_uj", "max_energy_range_uj")]
        # Two drivers may tell of one package; its parts are in it already.
        if name.startswith("package") and all(word.isdigit() for word in words):
            found.setdefault(name, (int(words[0]), int(words[1])))
    return found


def spent_mj(before: dict[str, tuple[int, int]], after: dict[str, tuple[int, int]]) -> float | None:
    """Return the millijoules between two looks at the same counters; None where there are none."""
    if not before or before.keys() != after.keys():
        return None
    # A counter starts again at 0 behind its largest value.
    return sum((after[name][0] - was) % (most + 1) for name, (was, most) in before.items()) / 1000


def mark(descriptor: int) -> None:
    """Make a call that does nothing but can be seen from outside."""
    with contextlib.suppress(OSError):
        os.close(descriptor)


def read(path: Path | str) -> str:
    """Return a file's text; empty where it cannot be read."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


@contextlib.contextmanager
def written(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write to, and rename it at the end."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def in_a_line(error: Exception) -> str:
    """Return what went wrong in one short line."""
    # Libraries in C++ say where it was thrown first, and what is wrong last.
    last = (str(error).strip().splitlines() or [""])[-1].strip()
    return f"{type(error).__name__}: {last[:300]}"


if __name__ == "__main__":
    main()
