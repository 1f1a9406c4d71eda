"""Programs in processes of their own, without paying for their imports every time.

Importing torch, transformers and PEFT takes most of a short program's time, and a run of the tests
starts hundreds. `run` and `start` stand in for `subprocess.run` and `subprocess.Popen` where a
Python program is started: they fork it out of a warm process (`forking.py`) that has imported the
same modules in the same environment. Tests that look at what is imported, and those marked
`stranger` or `real`, start real interpreters.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from forking import ADDRESS, WHERE

TESTS = Path(__file__).parent
SERVER = TESTS / "forking.py"
Hook = tuple[str, dict[str, Any]]
"""`module:function` that a program's process calls first, with its arguments: to plant faults."""

PACKAGE = (
    "accelerate", "datasets", "peft", "torch", "transformers", "matplotlib.figure",
    "matplotlib.backends.backend_agg", "dllm_convert.cli.app", "dllm_convert.pipeline.run",
    "dllm_convert.training.run", "dllm_convert.verification", "dllm_convert.card.readme",
    "dllm_convert.weights.run",
    "dllm_convert.sampling.run", "dllm_convert.card.report", "dllm_convert.card.licences",
    "transformers.models.llama.modeling_llama", "torch.utils.data", "jinja2",
    # What the first flex attention, card and GIF load.
    "torch._inductor.compile_fx", "PIL.ImageDraw", "PIL.JpegImagePlugin",
)  # fmt: skip
"""Everything that a command may need."""
STRANGER = (
    "safetensors.torch", "torch", "transformers:AutoModelForCausalLM", "transformers:AutoTokenizer",
    "transformers:LlamaForCausalLM", "transformers:PreTrainedTokenizerFast",
    "transformers:BertForMaskedLM", "transformers.dynamic_module_utils",
)  # fmt: skip
"""What somebody has who has never heard of this package."""
STRANGER_WITH_PEFT = (*STRANGER, "peft")
CLIENT = (
    "huggingface_hub:HfApi", "huggingface_hub:CommitOperationAdd", "huggingface_hub.file_download",
    "huggingface_hub:snapshot_download", "huggingface_hub.lfs",
    "tqdm.auto", "encodings.idna", "dllm_convert.adapters.llama", "dllm_convert.card.readme",
    "dllm_convert.publishing.run",
)  # fmt: skip
"""What publishing needs, without torch."""

READ_AT_IMPORT = ("ACCELERATE_", "HF_", "HUGGING", "OMP_", "TOKENIZERS_", "TRANSFORMERS_")
OF_EACH_PROGRAM = ("HF_DEBUG", "HF_HOME", "HF_MODULES_CACHE", "HF_TOKEN")


class Forked:
    """A forked program, as `subprocess.Popen` shows one."""

    def __init__(self, connection: socket.socket, streams: Sequence[IO[str]] = ()) -> None:
        self._answers = connection.makefile("r")
        connection.close()
        self._streams = streams
        self.pid = int(self._answers.readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._answers], [], [], 0)[0]:
            self.returncode = int(self._answers.readline())
            self._answers.close()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.poll() is None:
            if not select.select([self._answers], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
            self.poll()
        assert self.returncode is not None
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait and return what it wrote; end it and raise if it takes longer."""
        try:
            self.wait(timeout)
        except subprocess.TimeoutExpired as error:
            _ask_where()
            self.kill()
            self.wait()
            for stream in self._streams:
                error.add_note(_read(stream)[-8000:])
            raise
        out, err = (_read(stream) for stream in self._streams)
        return out, err

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


def _ask_where() -> None:
    """Have every forked program that runs below this process say where all its threads are."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            told = (line.split(":", 1) for line in (folder / "status").read_text().splitlines())
            facts = {name: value.strip() for name, value in told}
            heeds = int(facts["SigCgt"], 16) >> (WHERE - 1) & 1
            parents[int(folder.name)] = int(facts["PPid"]), bool(heeds)
    for pid, (above, heeds) in parents.items():
        while above > 1 and above != os.getpid():
            above = parents.get(above, (0, False))[0]
        if heeds and above == os.getpid():
            with contextlib.suppress(OSError):
                os.kill(pid, WHERE)
    time.sleep(1)


def _read(stream: IO[str]) -> str:
    with stream:
        stream.seek(0)
        return stream.read()


def ask(address: str, order: Mapping[str, Any], out: int, err: int) -> socket.socket:
    """Send an order to a warm process and return the connection that answers."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    text = json.dumps(order).encode() + b"\n"
    socket.send_fds(connection, [text[:1]], [out, err])
    connection.sendall(text[1:])
    return connection


LINKS = ("HF_HOME", "HF_MODULES_CACHE")
"""Read once, at import: in a warm process links that lead to the place of the program that runs."""


def lead_to(address: str, environment: Mapping[str, str]) -> None:
    """Have a warm process's caches be those that a program's environment names."""
    home = Path(environment.get("HF_HOME") or Path.home() / ".cache/huggingface")
    places = (home, Path(environment.get("HF_MODULES_CACHE") or home / "modules"))
    for name, place in zip(LINKS, places, strict=True):
        place.mkdir(parents=True, exist_ok=True)
        link = Path(address).with_name(name)
        link.unlink(missing_ok=True)
        link.symlink_to(place.absolute())


def fork(
    address: str,
    command: Sequence[str],
    *,
    env: Mapping[str, str],
    cwd: str | Path | None = None,
    before: Sequence[Hook] = (),
    log: Path | None = None,
) -> Forked:
    """Fork a program out of the warm process at an address; see `Forks.start`."""
    assert command[0] == sys.executable
    lead_to(address, env)
    order = {
        "argv": [str(part) for part in command[1:]],
        "cwd": str(Path(cwd or Path.cwd()).absolute()),
        "env": {**env, ADDRESS: address},
        "before": list(before),
        "session": False,
    }
    if log is not None:
        with log.open("w") as stream:
            return Forked(ask(address, order, stream.fileno(), stream.fileno()))
    streams = [tempfile.TemporaryFile("w+", errors="replace") for _ in range(2)]  # noqa: SIM115
    return Forked(ask(address, order, *(stream.fileno() for stream in streams)), streams)


def finished(
    process: Forked, command: Sequence[str], timeout: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Wait for a program."""
    texts = process.communicate(timeout)
    assert process.returncode is not None
    return subprocess.CompletedProcess(list(command), process.returncode, *texts)


class Warm:
    """A warm process for one set of modules and one environment."""

    def __init__(self, modules: Sequence[str], environment: Mapping[str, str]) -> None:
        self._root = Path(tempfile.mkdtemp(prefix="forks-"))
        self.address = str(self._root / "socket")
        isolated = ["-I"] if modules in (STRANGER, STRANGER_WITH_PEFT) else []
        self._process = subprocess.Popen(
            [sys.executable, *isolated, str(SERVER), self.address, *modules],
            cwd=self._root,
            env={**environment, **{name: str(self._root / name) for name in LINKS}},
            stdin=subprocess.PIPE,
        )
        while not Path(self.address).exists():
            assert self._process.poll() is None
            time.sleep(0.01)

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(60)
        shutil.rmtree(self._root)


class Forks:
    """Keeps warm processes and ends the one used least recently."""

    MOST = 4

    def __init__(self) -> None:
        self._warm: dict[tuple[object, ...], Warm] = {}
        # A test may change its own; strangers of all tests come from one process.
        self._environment = dict(os.environ)

    def address(self, modules: Sequence[str], environment: Mapping[str, str]) -> str:
        """Return where programs are forked that have these modules and this environment."""
        names = sorted(name for name in environment if name.startswith(READ_AT_IMPORT))
        given = ((name, environment[name]) for name in names if name not in OF_EACH_PROGRAM)
        key = (tuple(modules), *given)
        found = self._warm.pop(key, None) or Warm(modules, environment)
        self._warm[key] = found
        if len(self._warm) > self.MOST:
            self._warm.pop(next(iter(self._warm))).close()
        return found.address

    def strangers(self) -> str:
        """Return where scripts of `verify.portability` are forked: offline, whoever verifies."""
        offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        quiet = {"TRANSFORMERS_VERBOSITY": "error"}
        return self.address(STRANGER, {**self._environment, **offline, **quiet})

    def start(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        modules: Sequence[str] = PACKAGE,
        before: Sequence[Hook] = (),
        **options: Any,
    ) -> Forked:
        """Fork a program.

        Args:
            command: `sys.executable` and its arguments.
            env: Its environment, by default this one.
            modules: What the warm process has imported.
            before: What its process calls first.
            **options: cwd, and log: a file for both streams; `communicate` returns them without.
        """
        environment = dict(os.environ if env is None else env)
        if modules == PACKAGE:
            before = [("forks:fork_strangers", {"address": self.strangers()}), *before]
        address = self.address(modules, environment)
        return fork(address, command, env=environment, before=before, **options)

    def run(
        self, command: Sequence[str], *, timeout: float | None = None, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Fork a program and wait for it; what it wrote is in the result."""
        return finished(self.start(command, **options), command, timeout)

    def close(self) -> None:
        """End all warm processes."""
        while self._warm:
            self._warm.popitem()[1].close()


FORKS = Forks()
atexit.register(FORKS.close)
run, start = FORKS.run, FORKS.start


class Strangers:
    """Stands in for `subprocess` in `verify.portability`: scripts that know no dllm_convert."""

    DEVNULL = subprocess.DEVNULL
    TimeoutExpired = subprocess.TimeoutExpired

    def __init__(self, address: str | None = None) -> None:
        self.address = address

    def run(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        if command[:2] != [sys.executable, "-I"]:
            return subprocess.run(command, **options)
        process = fork(
            self.address or FORKS.strangers(), command, env=options["env"], cwd=options["cwd"]
        )
        return finished(process, command, options["timeout"])


def fork_strangers(address: str) -> None:
    """Have the checks of this process fork their fresh processes out of a warm one."""
    from dllm_convert.verification.probes import portability

    portability.subprocess = Strangers(address)  # type: ignore[assignment]


def fork_ranks(pids: str) -> None:
    """Have torch's launcher fork its processes too, and write their process ids into a file."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    from dllm_convert.verification.probes import portability

    strangers: Any = portability.subprocess
    before = [("forks:fork_strangers", {"address": strangers.address})]

    def start_rank(args: Sequence[str], env: Mapping[str, str], **options: Any) -> Forked:
        out, err = (
            number if options[name] is None else options[name].fileno()
            for number, name in ((1, "stdout"), (2, "stderr"))
        )
        order = {"argv": args[1:], "cwd": str(Path.cwd()), "env": dict(env)}
        order |= {"before": before, "session": options["start_new_session"]}
        process = Forked(ask(os.environ[ADDRESS], order, out, err))
        with Path(pids).open("a") as file:
            file.write(f"{process.pid}\n")
        return process

    subprocess_handler.Popen = start_rank  # type: ignore[misc, assignment]
