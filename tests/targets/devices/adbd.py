"""A small adbd for tests: what adb's client needs of a phone that it reaches over TCP.

In: a folder that takes the place of the phone's home, and commands for its shell. Out: a port on
loopback. Commands run in that folder with this machine's own shell.

Source: Android's packages/modules/adb: protocol.txt, SERVICES.TXT, SYNC.TXT and shell_protocol.h.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct
import subprocess
import threading
from collections.abc import Mapping
from pathlib import Path
from queue import SimpleQueue
from typing import Literal

Mood = Literal["device", "unauthorized", "offline", "garbage", "old"]
VERSION, MOST_BYTES = 0x01000001, 1 << 18
CHUNK = 1 << 15
STDOUT, STDERR, EXIT = 1, 2, 3


class ClosedError(Exception):
    """The other side of a stream has closed it."""


class Adbd:
    """A phone on loopback.

    Args:
        home: Where its commands run.
        environment: Of its commands.
        shell: That runs them.
    """

    def __init__(self, home: Path, environment: Mapping[str, str], shell: str) -> None:
        self.home, self.environment, self.shell = home, environment, shell
        self.mood: Mood = "device"
        self.connections: list[socket.socket] = []
        self.ran: list[str] = []
        self.pushed: list[str] = []
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> int:
        """Close what is connected; tell how much that was."""
        cut = len(self.connections)
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.connections.clear()
        return cut

    def stop(self) -> None:
        """Listen no more."""
        with contextlib.suppress(OSError):
            self.listening.shutdown(socket.SHUT_RDWR)
        self.listening.close()
        self.cut()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listening.accept()
                self.connections.append(connection)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        link = Link(connection)
        with contextlib.suppress(OSError, EOFError, struct.error):
            while True:
                word, theirs, _, data = link.receive()
                if self.mood == "offline":
                    continue
                if self.mood == "garbage":
                    connection.sendall(os.urandom(64))
                elif self.mood == "unauthorized":
                    link.send(b"AUTH", 1, 0, os.urandom(20))
                elif word == b"CNXN":
                    features = "" if self.mood == "old" else "features=shell_v2,cmd"
                    banner = f"device::ro.product.model=Toaster;{features}"
                    link.send(b"CNXN", VERSION, MOST_BYTES, banner.encode())
                elif word == b"OPEN":
                    stream = link.opened(theirs)
                    service = data.rstrip(b"\0").decode()
                    threading.Thread(target=self._do, args=(stream, service), daemon=True).start()
                elif theirs in link.streams:
                    link.streams[theirs].arrived.put((word, data))

    def _do(self, stream: Stream, service: str) -> None:
        name, _, rest = service.partition(":")
        with contextlib.suppress(ClosedError, OSError):
            if name == "sync":
                self._sync(stream)
            elif name.startswith("shell"):
                self.ran.append(rest)
                self._shell(stream, rest, packets="v2" in name.split(","))
            stream.close()

    def _shell(self, stream: Stream, command: str, *, packets: bool) -> None:
        process = subprocess.Popen(
            [self.shell, "-c", command],
            cwd=self.home,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        out, err = process.communicate()
        if not packets:
            stream.write(out + err)
            return
        for kind, data in ((STDOUT, out), (STDERR, err), (EXIT, bytes([process.returncode & 255]))):
            for start in range(0, len(data), CHUNK):
                part = data[start : start + CHUNK]
                stream.write(struct.pack("<BI", kind, len(part)) + part)

    def _sync(self, stream: Stream) -> None:
        while True:
            word, length = stream.read(4), struct.unpack("<I", stream.read(4))[0]
            name = stream.read(length).decode()
            if word == b"QUIT":
                return
            try:
                if word == b"STAT":
                    stream.write(self._stat(self.home / name))
                elif word == b"SEND":
                    self._take(stream, name.rpartition(",")[0])
                elif word == b"RECV":
                    data = (self.home / name).read_bytes()
                    for start in range(0, len(data), CHUNK):
                        part = data[start : start + CHUNK]
                        stream.write(b"DATA" + struct.pack("<I", len(part)) + part)
                    stream.write(b"DONE" + bytes(4))
            except OSError as error:
                said = str(error.strerror).encode()
                stream.write(b"FAIL" + struct.pack("<I", len(said)) + said)

    @staticmethod
    def _stat(path: Path) -> bytes:
        try:
            found = path.stat()
        except OSError:
            return b"STAT" + bytes(12)
        mode = stat.S_IFMT(found.st_mode) | 0o644
        return b"STAT" + struct.pack("<III", mode, found.st_size, int(found.st_mtime))

    def _take(self, stream: Stream, name: str) -> None:
        """Take the whole file before writing any of it: what fails then is said once."""
        data = b""
        while stream.read(4) == b"DATA":
            data += stream.read(struct.unpack("<I", stream.read(4))[0])
        stream.read(4)  # of DONE: the time
        self.pushed.append(name)
        (self.home / name).write_bytes(data)
        stream.write(b"OKAY" + bytes(4))


class Link:
    """Messages of one connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self.sending = connection, threading.Lock()
        self.streams: dict[int, Stream] = {}

    def receive(self) -> tuple[bytes, int, int, bytes]:
        """Return the word of a message, its sender's stream, ours, and the data."""
        word, theirs, ours, length, _, _ = struct.unpack("<4sIIIII", self._exactly(24))
        return word, theirs, ours, self._exactly(length)

    def send(self, word: bytes, ours: int, theirs: int, data: bytes = b"") -> None:
        """Send a message."""
        magic = struct.unpack("<I", word)[0] ^ 0xFFFFFFFF
        head = struct.pack("<4sIIIII", word, ours, theirs, len(data), sum(data), magic)
        with self.sending:
            self.connection.sendall(head + data)

    def opened(self, theirs: int) -> Stream:
        """Take up a stream."""
        self.streams[theirs] = Stream(self, theirs)
        self.send(b"OKAY", theirs, theirs)
        return self.streams[theirs]

    def _exactly(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            part = self.connection.recv(length - len(data))
            if not part:
                raise EOFError
            data += part
        return data


class Stream:
    """One service in use; both sides call it by the same number."""

    def __init__(self, link: Link, number: int) -> None:
        self.link, self.number = link, number
        self.arrived: SimpleQueue[tuple[bytes, bytes]] = SimpleQueue()
        self.unread = b""

    def read(self, length: int) -> bytes:
        """Return so many bytes."""
        while len(self.unread) < length:
            self._next()
        data, self.unread = self.unread[:length], self.unread[length:]
        return data

    def write(self, data: bytes) -> None:
        """Send some and wait until it is taken."""
        self.link.send(b"WRTE", self.number, self.number, data)
        while self._next() != b"OKAY":
            pass

    def close(self) -> None:
        """End it."""
        self.link.send(b"CLSE", self.number, self.number)

    def _next(self) -> bytes:
        word, data = self.arrived.get()
        if word == b"CLSE":
            raise ClosedError
        if word == b"WRTE":
            self.unread += data
            self.link.send(b"OKAY", self.number, self.number)
        return word
