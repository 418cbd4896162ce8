"""LiteRT's profiler, through the C interface of the library that the Python package brings.

In: a .tflite file. Out: the time of every operation of every inference, in the file's order. The
Python classes do not offer the profiler. It belongs to LiteRT's compiled model, which runs the same
kernels as the interpreter.

Source: litert/c of LiteRT 2.3: litert_compiled_model.h, litert_profiler.h, litert_profiler_event.h,
and for the options' text, litert_runtime_options.cc and litert_cpu_options.cc.
"""

from __future__ import annotations

import ctypes
from contextlib import ExitStack
from pathlib import Path

from pipeline.errors import ArtifactError

Handle = ctypes.c_void_p
Index = ctypes.c_size_t
CPU = 1
DELEGATE_OP, BUILTIN_OP = 1 << 3, 1 << 1
"""Types of event: an operation that XNNPACK executes, and one that LiteRT does itself."""
TENSOR_TYPE_BYTES = 256
"""More than a tensor's type and shape take, which only pass through here."""


class _Event(ctypes.Structure):
    _fields_ = (
        ("tag", ctypes.c_char_p),
        ("type", ctypes.c_int),
        ("start_us", ctypes.c_uint64),
        ("elapsed_us", ctypes.c_uint64),
        ("memory_before", ctypes.c_int64 * 3),
        ("memory_after", ctypes.c_int64 * 3),
        ("metadata", ctypes.c_uint64 * 2),
        ("source", ctypes.c_int),
    )


def profile(path: Path, threads: int, *, warm_up: int, inferences: int) -> list[tuple[str, float]]:
    """Run a file on whatever lies in memory and take the time of every operation.

    Args:
        path: The .tflite file.
        threads: Of an inference.
        warm_up: Inferences before the profiler starts.
        inferences: That are profiled.

    Returns:
        The name of the kernel and milliseconds, of every operation of one inference after another.

    Raises:
        ArtifactError: The library refuses a call.
    """
    with ExitStack() as stack:
        api = _Api(stack)
        environment = api.made("Environment", 0, None)
        model = api.made("ModelFromFile", environment, str(path).encode(), destroy="Model")
        options = api.made("Options")
        api.call("LiteRtSetOptionsHardwareAccelerators", options, CPU)
        for name, text in (
            (b"runtime_options_string", b"enable_profiling = true"),
            (b"xnnpack", b"num_threads = %d" % threads),
        ):
            api.call("LiteRtAddOpaqueOptions", options, api.options(name, text))
        compiled = api.made("CompiledModel", environment, model, options)
        sides = [api.buffer(environment, model, compiled, side) for side in ("Input", "Output")]
        lists = [(Handle * 1)(side) for side in sides]
        profiler = api.got("LiteRtCompiledModelGetProfiler", compiled)

        def run() -> None:
            given, taken = lists
            one = Index(1)
            api.call("LiteRtRunCompiledModel", compiled, Index(0), one, given, one, taken)

        for _ in range(warm_up):
            run()
        api.call("LiteRtStartProfiler", profiler)
        for _ in range(inferences):
            run()
        api.call("LiteRtStopProfiler", profiler)
        count = ctypes.c_int()
        api.call("LiteRtGetNumProfilerEvents", profiler, ctypes.byref(count))
        events = (_Event * count.value)()
        api.call("LiteRtGetProfilerEvents", profiler, count, events)
        return [
            (one.tag.decode(), one.elapsed_us / 1000)
            for one in events
            if one.type in {DELEGATE_OP, BUILTIN_OP}
        ]


class _Api:
    """Calls by name; what was made is destroyed in the opposite order."""

    def __init__(self, stack: ExitStack) -> None:
        import ai_edge_litert

        self.stack = stack
        self.library = ctypes.CDLL(str(Path(ai_edge_litert.__file__).parent / "libLiteRt.so"))
        self.texts: list[object] = []

    def call(self, name: str, *arguments: object) -> None:
        """Call a function that answers with a status."""
        function = getattr(self.library, name, None)
        if function is None:
            status = "nothing, for there is none"
        else:
            function.restype = ctypes.c_int
            status = function(*arguments)
        if status:
            raise ArtifactError(
                f"LiteRT's profiler: {name} answers {status}",
                allowed="an artifact that `convnext-edge export` wrote, and LiteRT as in"
                " constraints.txt",
                do="Export it again, or install that version",
            )

    def got(self, name: str, *arguments: object) -> Handle:
        """Call a function that hands out what another one owns."""
        handle = Handle()
        self.call(name, *arguments, ctypes.byref(handle))
        return handle

    def made(self, what: str, *arguments: object, destroy: str | None = None) -> Handle:
        """Call a function that makes something, which is destroyed at the end."""
        handle = self.got(f"LiteRtCreate{what}", *arguments)
        ending = getattr(self.library, f"LiteRtDestroy{destroy or what}")
        ending.restype = None
        self.stack.callback(ending, handle)
        return handle

    def options(self, name: bytes, text: bytes) -> Handle:
        """Return options that a compiled model will own; their text is ours."""
        held = ctypes.create_string_buffer(text)
        left = ctypes.CFUNCTYPE(None, Handle)(lambda _: None)
        self.texts += [held, left]
        return self.got(
            "LiteRtCreateOpaqueOptions", ctypes.c_char_p(name), ctypes.cast(held, Handle), left
        )

    def buffer(self, environment: Handle, model: Handle, compiled: Handle, side: str) -> Handle:
        """Make the memory of the one input or output."""
        signature = self.got("LiteRtGetModelSignature", model, Index(0))
        tensor = self.got(f"LiteRtGetSignature{side}TensorByIndex", signature, Index(0))
        kind = ctypes.create_string_buffer(TENSOR_TYPE_BYTES)
        self.call("LiteRtGetRankedTensorType", tensor, kind)
        wanted = self.got(
            f"LiteRtGetCompiledModel{side}BufferRequirements", compiled, Index(0), Index(0)
        )
        return self.made(
            "ManagedTensorBufferFromRequirements", environment, kind, wanted, destroy="TensorBuffer"
        )
