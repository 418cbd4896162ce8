"""What LiteRT's benchmark_model is told and what it prints, as text.

In: artifacts and how often they are run; the tool's output. Out: a shell script; single times, and
the time of every operation. The tool prints statistics of a process's inferences and no list of
them. Of two inferences these are the list: `first` and `curr`, the last. So the script starts it
anew for every two, and no percentile has to be guessed from a mean.

Source: tensorflow/lite/tools/benchmark/README.md; profiling/profile_summary_formatter.cc.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from pipeline.records import DeviceState

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

OUT, END = "out", "end"
IMAGES, LOGITS = "images", "logits"
AT_ONCE = 2
"""Inferences of a process: as many as the tool tells one by one."""
XNNPACK, NONE = "xnnpack", "none"
DELEGATES = {
    XNNPACK: "--use_xnnpack=true",
    "gpu": "--use_gpu=true",
    "nnapi": "--use_nnapi=true",
    NONE: "--use_xnnpack=false",
}
STATISTICS = re.compile(r"^(?:\S.*: )?count=(\d+)(.*)$", re.MULTILINE)
SUMMARY = re.compile(r"(?:Average i|I)nference timings in us: (.*)")
NUMBER = re.compile(r"(\w[\w ()]*?)[=:] ?([\d.]+(?:e[+-]?\d+)?)")
MEMORY = "Memory (bytes)"
ALL_SAME = "(all same)"
NOT_DELEGATED = re.compile(r"Though (?:GPU|NNAPI) delegate .*will not be executed by the delegate")
"""All then runs on the CPU, and the tool goes on as if nothing had happened."""
FAILED = re.compile(r"^exit code (\d+)$", re.MULTILINE)
SECTION = re.compile(r"^== (.*)\n", re.MULTILINE)
REGULAR_RUNS = "Operator-wise Profiling Info"
RUN_ORDER = re.compile(r"=+ Run Order =+\n(?P<columns>.*)\n(?P<rows>(?:.+\n)*)")
DELEGATE = re.compile(r"\w*Delegate\w*")
DELEGATED = "Delegate/"
"""Before the name of a row that is a part of that."""
FLOAT_BYTES = 4
BATTERY_STEPS = 10
"""Android's battery tells tenths of a degree."""

STATE = """state() {
echo "== $1"
for f in governor cur_freq; do echo "$f $(cat /sys/devices/system/cpu/cpu$cpu/cpufreq/scaling_$f)"
done
for z in /sys/class/thermal/thermal_zone*; do echo "zone $(cat $z/temp) $(cat $z/type)"; done
echo "battery $(dumpsys battery | grep temperature)"
echo "throttled $(dumpsys thermalservice | grep 'Thermal Status' | head -n 1)"
echo "load $(cat /proc/loadavg)"
} 2>/dev/null
"""
RUN = """run() {
case "$failed" in *" $1 "*) return 0 ;; esac
echo "== job $1"
job=$1
shift
"$@" 2>&1 || { echo "exit code $?"; failed="$failed $job "; return 0; }
echo
}
"""
"""What failed once is not run again, and the others go on."""


class NoAnswerError(ValueError):
    """The tool has printed something else than times; the message is one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """One line `count=… first=… curr=… min=… max=… avg=… std=…`, in microseconds.

    Attributes:
        count: Inferences.
        values: What else the line says, by its word.
        same: Whether all took the same time.
    """

    count: int
    values: dict[str, float]
    same: bool

    @property
    def singles(self) -> tuple[float, ...]:
        """The milliseconds of single inferences, as far as the line tells them."""
        last = self.values["curr"]
        if self.same or self.count == 1:
            return (last / 1000,) * self.count
        return (self.values["first"] / 1000, last / 1000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One process of the tool; milliseconds.

    Attributes:
        load_ms: Of the artifact, with what a delegate prepares.
        first_ms: The first inference, of those to warm up.
        singles: Inferences one by one.
    """

    load_ms: float | None
    first_ms: float | None
    singles: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One operation of a profile: its type, its name there, mean milliseconds per inference."""

    op: str
    name: str
    ms: float

    @property
    def is_delegate(self) -> bool:
        """Whether it stands for all that a delegate does."""
        return DELEGATE.fullmatch(self.op) is not None


def flags(graph: str, *, threads: int, delegate: str) -> str:
    """Return what is on the tool's command line whatever it measures."""
    return f"--graph={graph} --num_threads={threads} {DELEGATES[delegate]} --warmup_min_secs=0"


def turns(commands: Sequence[str], *, rounds: int, per_round: int, warm_up: int) -> list[str]:
    """Return the steps of a script that runs commands in turn.

    Args:
        commands: The tool's command line of each artifact.
        rounds: Turns of each.
        per_round: Inferences of a turn.
        warm_up: Inferences of a process that go before.
    """
    batches = [AT_ONCE] * (per_round // AT_ONCE) + [1] * (per_round % AT_ONCE)
    return [
        f"run {index} {command} --warmup_runs={warm_up} --num_runs={runs} --min_secs=0"
        for _ in range(rounds)
        for index, command in enumerate(commands)
        for runs in batches
    ]


def profiling(command: str, profile: str, *, inferences: int, warm_up: int) -> str:
    """Return the step of a script that has the tool write its profile to a file."""
    return (
        f"run 0 {command} --warmup_runs={warm_up} --num_runs={inferences} --min_secs=0"
        " --enable_op_profiling=true --max_profiling_buffer_entries=16384"
        f" --op_profiling_output_mode=csv --op_profiling_output_file={profile}"
    )


def inferring(command: str, shape: Sequence[int], *, index: int) -> str:
    """Return the step of a script that adds the logits of one batch to the file `LOGITS`.

    Args:
        command: The tool's command line.
        shape: Of a batch, NHWC; the file `IMAGES` holds its float32, batch by batch.
        index: Of the batch.
    """
    sizes = ",".join(str(size) for size in shape)
    return (
        f"rm -f given taken; dd if={IMAGES} of=given bs={FLOAT_BYTES * prod(shape)} skip={index}"
        f" count=1 2>/dev/null\nrun 0 {command} --warmup_runs=0 --num_runs=1 --min_secs=0"
        f" --input_layer=image --input_layer_shape={sizes} --input_layer_value_files=image:given"
        f" --output_filepath=taken\n[ -e taken ] || {{ echo it wrote no outputs; exit 0; }}\n"
        f"cat taken >>{LOGITS}"
    )


def script(steps: Sequence[str], *, before: str, cpu: int) -> str:
    """Return a POSIX shell script that does steps and prints all to the file `OUT`.

    Args:
        steps: Lines of shell.
        before: A line that goes before all.
        cpu: The core whose clock is looked at.
    """
    lines = [
        f'{step}\necho \'{{"done": {done}, "total": {len(steps)}}}\' >&3'
        for done, step in enumerate(steps, start=1)
    ]
    head = f"set -e\nexec 3>&1 >{OUT}\ncpu={cpu} failed=\n{before}\n{STATE}{RUN}"
    return "\n".join([head, "state before", *lines, "state after", f"echo '== {END}'", ""])


def sections(out: str) -> list[tuple[str, str]]:
    """Return what a script printed: the title of every part, and the part.

    Raises:
        NoAnswerError: It did not come to its end, and no part says why.
    """
    _, *found = SECTION.split(out)
    parts = list(zip(found[::2], found[1::2], strict=True))
    if not parts or not (parts[-1][0] == END or FAILED.search(parts[-1][1])):
        raise NoAnswerError(f"the last that it said is {out.strip()[-80:]!r}")
    return parts


def read_statistics(text: str) -> list[Statistics]:
    """Return every line of statistics of times, in order."""
    found = []
    for match in STATISTICS.finditer(text):
        values = {name: float(value) for name, value in NUMBER.findall(match[2])}
        if not match[0].startswith(MEMORY) and "curr" in values:
            same = match[2].endswith(ALL_SAME)
            found.append(Statistics(count=int(match[1]), values=values, same=same))
    return found


def read_run(text: str) -> Run:
    """Read what one process printed: a line on warming up, one on what counts, and a summary.

    Raises:
        NoAnswerError: It failed, gave no times, or ran elsewhere than it was told to.
    """
    if failed := FAILED.search(text):
        lines = [line for line in text[: failed.start()].splitlines() if line.strip()]
        errors = [line for line in lines if "ERROR" in line] or lines[-1:]
        raise NoAnswerError(f"exit code {failed[1]}: {' '.join(errors[:3])[:300]}")
    if NOT_DELEGATED.search(text):
        raise NoAnswerError("the delegate takes no operation of it: all would run on the CPU")
    warm_up, regular = ([None, None, *read_statistics(text)])[-2:]
    summary = SUMMARY.search(text)
    if regular is None or summary is None:
        raise NoAnswerError(f"no times in {text.strip()[-80:]!r}")
    told = dict(NUMBER.findall(summary[1]))
    return Run(
        load_ms=float(told["Init"]) / 1000 if "Init" in told else None,
        first_ms=warm_up.singles[0] if warm_up else None,
        singles=regular.singles,
    )


def read_state(text: str) -> DeviceState:
    """Read how the device stood; what Android does not tell this login is None or absent."""
    said: dict[str, str] = {}
    zones = {}
    for key, _, value in (line.partition(" ") for line in text.splitlines()):
        temperature, _, zone = value.partition(" ")
        if key == "zone" and re.fullmatch(r"-?\d+", temperature):
            zones[zone] = int(temperature) / 1000
        said[key] = value.strip()
    battery = re.search(r"-?\d+", said.get("battery", ""))
    if battery:
        zones["battery"] = int(battery[0]) / BATTERY_STEPS
    khz, load = said.get("cur_freq", ""), said.get("load", "").split()
    return DeviceState(
        governor=said.get("governor") or None,
        frequency_mhz=int(khz) / 1000 if khz.isdigit() else None,
        temperatures_c=zones,
        throttled=said.get("throttled") or None,
        load=float(load[0]) if load else None,
    )


def read_profile(text: str) -> list[Row]:
    """Read the tool's CSV: the operations of an inference in the order in which they run.

    What a delegate executes is told as one row and, where it keeps a profile, again one by one;
    then the one row is left out. Types have commas in them, names do not.

    Raises:
        NoAnswerError: It is no such CSV.
    """
    tables = RUN_ORDER.finditer(text.partition(REGULAR_RUNS)[2])
    rows = [row for table in tables for row in _rows(table)]
    if not rows:
        raise NoAnswerError("no table of operations in its profile")
    if any(row.name.startswith(DELEGATED) for row in rows):
        return [row for row in rows if not row.is_delegate]
    return rows


def _rows(table: re.Match[str]) -> Iterator[Row]:
    columns = table["columns"].split(", ")
    for line in table["rows"].splitlines():
        cells = dict(zip(columns, line.rsplit(", ", len(columns) - 1), strict=False))
        try:
            _, ms = float(cells["first"]), float(cells["avg_ms"])
        except (KeyError, ValueError) as error:
            raise NoAnswerError(f"no row of a profile: {line[:80]!r}") from error
        yield Row(op=cells["node type"], name=cells["name"], ms=ms)
