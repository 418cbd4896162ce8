"""Linux boards that are reached over SSH: `ssh:user@host`, `ssh:host-alias`, `ssh:host:port`.

In: OpenSSH's own client with the user's configuration, agent and known hosts. Out: the family of
devices `ssh`. A file is pushed through a shell there, so that the board needs no SFTP. Keys of
hosts are always checked: where a configuration says not to, one that is new is learnt and must then
be known, and one that has changed is refused.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from shlex import quote
from tempfile import TemporaryDirectory
from typing import IO, TYPE_CHECKING

from pipeline.errors import DeviceError, UsageError
from targets.devices._meaning import Meaning, explained
from targets.devices._remote import Remote
from targets.devices._workspace import Answer, LostLinkError, Patience

if TYPE_CHECKING:
    from collections.abc import Mapping

    from targets.base import Device

CONFIG, PYTHON = "CONVNEXT_EDGE_SSH_CONFIG", "CONVNEXT_EDGE_SSH_PYTHON"
"""Environment variables: a configuration file instead of the user's, and Python's command there."""
ENVIRONMENT = "~/convnext-edge"
"""A virtual environment there whose Python is taken before the system's."""
ROOT = ".cache/convnext-edge"
ADDRESS = re.compile(
    r"(?:(?P<user>\w[\w.-]*)@)?(?P<host>\w[\w.-]*|\[[0-9a-fA-F:.%\w]+\])(?::(?P<port>\d+))?"
)
OPTIONS = {
    "BatchMode": "yes",
    "ClearAllForwardings": "yes",
    "ConnectTimeout": "10",
    "ControlMaster": "auto",
    "ControlPersist": "60",
    "ForwardAgent": "no",
    "LogLevel": "ERROR",
    "NoHostAuthenticationForLocalhost": "no",
    "RemoteCommand": "none",
    "RequestTTY": "no",
    "ServerAliveInterval": "5",
    "ServerAliveCountMax": "3",
}
SECONDS_HERE = 10
"""For what asks nobody."""
FAILED = 255
"""The client's own exit code; no command of ours ends with it."""
ACCEPTING = ("no", "off", "false", "accept-new")
"""What a configuration says of hosts' keys where it takes one that is new."""
NOT_KNOWN = ("Host key verification failed",)

CHANGED = Meaning(
    words=("REMOTE HOST IDENTIFICATION HAS CHANGED",),
    got="{name}: the host's key has changed, or another machine answers",
    allowed="the key in known_hosts",
    do="If the board was set up anew, log in by hand: ssh says which known key to remove",
)
FORGOTTEN = Meaning(
    words=NOT_KNOWN,
    got="{name}: the configuration takes any host key and keeps none, so that none is checked",
    allowed="a UserKnownHostsFile that can be written and is not /dev/null",
    do="Name one for this host in ~/.ssh/config",
)
"""Of a key that was taken and is not known after that."""
MEANINGS = (
    CHANGED,
    Meaning(
        words=NOT_KNOWN,
        got="{name}: the host's key is not known here",
        allowed="a host in known_hosts",
        do="Log in once by hand and compare the fingerprint that ssh shows",
    ),
    Meaning(
        words=("Permission denied", "Too many authentication failures"),
        got="{name} refuses the login: {said}",
        allowed="a key of the agent or of ~/.ssh/config that this user may log in with",
        do="Put your key there (ssh-copy-id), or name another IdentityFile",
    ),
    Meaning(
        words=("Could not resolve hostname",),
        got="{name} is not known: {said}",
        allowed="a name that resolves, an address, or an alias of ~/.ssh/config",
        do="Correct --device",
    ),
    Meaning(
        words=("onfiguration option", "Can't open user config file"),
        got="{name}: ssh cannot read its configuration: {said}",
        allowed=f"a file that `ssh -G HOST` reads: ~/.ssh/config, or what {CONFIG} names",
        do="Correct it",
    ),
    Meaning(
        words=("Protocol major versions differ", "invalid characters", "No SSH version"),
        got="{name}: what answers there is no SSH server: {said}",
        allowed="an SSH server at this address and port",
        do="Correct the port in --device",
    ),
)
UNREACHABLE = Meaning(
    words=("Connection refused", "timed out", "No route to host", "Network is unreachable"),
    got="{name} cannot be reached: {said}",
    allowed="a device that is on, in this network, with an SSH server",
    do="Try `ssh` by hand",
)
"""Of a host that was never reached; of another it is a lost link."""
CUT = Meaning(
    words=(),
    got="{name}: the connection was cut: {said}",
    allowed="a connection that comes back within two minutes",
    do="Look whether the device is on, and try again",
    lost=True,
)


class Link:
    """OpenSSH's client and one host; see `targets.devices._workspace.Transport`.

    Args:
        address: As in `ssh:ADDRESS`.
        config: Configuration file instead of the user's own.

    Raises:
        UsageError: The address is none.
    """

    def __init__(self, address: str, config: Path | None = None) -> None:
        match = ADDRESS.fullmatch(address)
        if match is None:
            raise UsageError(
                f"ssh:{address} names no host",
                allowed="ssh:HOST, ssh:USER@HOST or ssh:USER@HOST:PORT, with a host or an alias of"
                " ~/.ssh/config",
                do="Correct --device",
            )
        self.name = f"ssh:{address}"
        self.host = match["host"].strip("[]")
        self._where = [
            *(("-F", str(config)) if config else ()),
            *(("-p", match["port"]) if match["port"] else ()),
            *(("-l", match["user"]) if match["user"] else ()),
        ]
        self._met = self._accepts = False
        self._sockets: TemporaryDirectory[str] | None = None
        self._words: list[str] = []

    def run(self, command: str, *, timeout: float) -> Answer:
        """Run a line of POSIX shell there, in the login's home."""
        return self._ssh(command, timeout)

    def push(self, source: Path, target: str, *, timeout: float) -> Answer:
        """Write a file there."""
        with source.open("rb") as file:
            # Behind `||` a shell stays to say what its `cat` died of.
            return self._ssh(
                f"export LC_ALL=C; cat >{quote(target)} || exit 1", timeout, given=file
            )

    def pull(self, source: str, target: Path, *, timeout: float) -> Answer:
        """Write a file of the device here."""
        with target.open("wb") as file:
            return self._ssh(f"export LC_ALL=C; cat {quote(source)} || exit 1", timeout, taken=file)

    def close(self) -> None:
        """End the connection that the commands share."""
        if self._sockets is not None:
            self._client([*self._words, "-O", "exit", "--", self.host], SECONDS_HERE)
            self._sockets.cleanup()
            self._sockets = None

    def _ssh(
        self,
        command: str,
        timeout: float,
        *,
        given: IO[bytes] | None = None,
        taken: IO[bytes] | None = None,
    ) -> Answer:
        words = [*self._connected(timeout), "--", self.host, f"sh -c {quote(command)}"]
        answer = self._client(words, timeout, given=given, taken=taken)
        if answer.code == FAILED:
            raise self._explained(answer.err)
        self._met = True
        return answer

    def _connected(self, timeout: float) -> list[str]:
        """Return the client's options, with the place where commands share a connection."""
        if self._sockets is None:
            checked = {}
            if self._checking() in ACCEPTING:
                checked = {"StrictHostKeyChecking": "yes"}
                if not self._met:
                    self._learn(timeout)
            self._sockets = TemporaryDirectory(prefix="ssh-")
            link = {"ControlPath": f"{self._sockets.name}/link"}
            self._words = [*self._where, *_said({**OPTIONS, **link, **checked})]
        return self._words

    def _learn(self, timeout: float) -> None:
        """Have the client keep the host's key where it is new, as the configuration wants it."""
        self._accepts = True
        alone = {"ControlMaster": "no", "ControlPath": "none"}
        options = _said({**OPTIONS, **alone, "StrictHostKeyChecking": "accept-new"})
        answer = self._client([*self._where, *options, "--", self.host, "true"], timeout)
        if answer.code == FAILED:
            raise self._explained(answer.err)

    def _checking(self) -> str:
        """Return what the configuration says of hosts' keys."""
        answer = self._client([*self._where, "-G", "--", self.host], SECONDS_HERE)
        if answer.code:
            raise self._explained(answer.err)
        pairs = (line.partition(" ") for line in answer.out.splitlines())
        return next((value for key, _, value in pairs if key == "stricthostkeychecking"), "ask")

    def _client(
        self,
        words: list[str],
        timeout: float,
        *,
        given: IO[bytes] | None = None,
        taken: IO[bytes] | None = None,
    ) -> Answer:
        try:
            done = subprocess.run(
                ["ssh", *words],
                stdin=given or subprocess.DEVNULL,
                stdout=taken or subprocess.PIPE,
                stderr=subprocess.PIPE,
                timeout=timeout,
                env={**os.environ, "LC_ALL": "C"},
                # Ctrl-C is this process's to handle: it still has to clear up there.
                start_new_session=True,
                check=False,
            )
        except FileNotFoundError as error:
            raise DeviceError(
                f"{self.name}: there is no ssh here",
                allowed="OpenSSH's client on PATH",
                do="Install it (Debian: apt-get install openssh-client)",
            ) from error
        except subprocess.TimeoutExpired as error:
            raise LostLinkError(
                f"{self.name} has not answered for {timeout:.0f} s",
                allowed="a device that answers",
                do="Look whether it is on, and try again",
            ) from error
        out, err = ((text or b"").decode(errors="replace") for text in (done.stdout, done.stderr))
        return Answer(code=done.returncode, out=out, err=err)

    def _explained(self, err: str) -> DeviceError:
        """Return the error that the client's own words mean."""
        known = MEANINGS if self._met else (*MEANINGS, UNREACHABLE)
        if self._accepts:
            known = (CHANGED, FORGOTTEN, *known)
        return explained(err, known, CUT, name=self.name)


def _said(options: Mapping[str, str]) -> list[str]:
    """Return options as words of the client's command line."""
    return [word for key, value in options.items() for word in ("-o", f"{key}={value}")]


def board(
    address: str,
    *,
    config: Path | None = None,
    python: str | None = None,
    patience: Patience | None = None,
) -> Remote:
    """Return a device over SSH.

    Args:
        address: As in `ssh:ADDRESS`.
        config: Configuration file of ssh instead of the user's own.
        python: Python's command there; None takes that of `ENVIRONMENT`, else the system's.
        patience: How long the device is waited for.

    Raises:
        UsageError: The address is none.
    """
    found = f"$(command -v {ENVIRONMENT}/bin/python3 || echo python3)"
    return Remote(Link(address, config), root=ROOT, python=python or found, patience=patience)


class Boards:
    """The family `ssh`."""

    name = "ssh"

    def found(self) -> tuple[str, ...]:
        """Return none: which hosts of a configuration are boards it does not say."""
        return ()

    def at(self, address: str) -> Device:
        """Return the board with this address; see `targets.base.DeviceFamily`."""
        config = os.environ.get(CONFIG)
        return board(
            address, config=Path(config) if config else None, python=os.environ.get(PYTHON)
        )


DEVICES = Boards()
