"""How a run is started: processes, machines, and what each holds of weights, gradients, moments.

A launch is asked for with `--num-processes` and an Accelerate config, or found in the environment
that a launcher has set. Both say the same of the same launch; nothing here imports Accelerate.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dllm_convert.common.foreign_files import read_text
from dllm_convert.common.json_files import load_json_object
from dllm_convert.common.ranks import Rank
from dllm_convert.errors import DataError, IncompatibleError, RequestError
from dllm_convert.planning.sharing import Sharing
from dllm_convert.recipe.yaml_text import parse_mapping

_DDP = (
    "MULTI_GPU", "MULTI_XPU", "MULTI_NPU", "MULTI_MLU", "MULTI_SDAA", "MULTI_MUSA", "MULTI_HPU",
    "MULTI_NEURON",
)  # fmt: skip
_V1 = {
    1: "FULL_SHARD",
    2: "SHARD_GRAD_OP",
    3: "NO_SHARD",
    4: "HYBRID_SHARD",
    5: "HYBRID_SHARD_ZERO2",
}
"""FSDP1's strategies, which Accelerate takes by number, too."""


@dataclass(frozen=True)
class Launch:
    """How a run is started.

    Attributes:
        processes: Processes that train together, over all machines; one per GPU.
        machines: Machines that they are on, as many on each.
        strategy: What they share: `none` (one process), `ddp`, `fsdp1`, `fsdp2` or `zero`.
        stage: Of ZeRO (arXiv 1910.02054): 1 shares moments, 2 gradients as well, 3 weights as well;
            of FSDP 3, or 2 where gathered weights are kept from forward to backward.
        hybrid: Whether each machine shares a copy of its own, instead of all of them one.
        offload: What lies in host memory: `moments`, `weights`.
        global_batch: Sequences per optimizer step that were asked for; None: what the recipe's
            batches come to.
        config: Accelerate config that says so; None if there is none.
    """

    processes: int = 1
    machines: int = 1
    strategy: str = "none"
    stage: int = 0
    hybrid: bool = False
    offload: tuple[str, ...] = ()
    global_batch: int | None = None
    config: str | None = None

    @property
    def per_machine(self) -> int:
        """Processes on each machine."""
        return self.processes // self.machines

    @property
    def name(self) -> str:
        """The strategy in words."""
        if self.strategy == "zero":
            return f"ZeRO-{self.stage}"
        name = {"none": "one process", "ddp": "DDP", "fsdp1": "FSDP", "fsdp2": "FSDP2"}
        return name[self.strategy]

    @property
    def sharing(self) -> Sharing:
        """What one device holds of a training."""
        by, stage = self.per_machine if self.hybrid else self.processes, self.stage
        if self.strategy == "zero":
            return Sharing(
                weights=by if stage >= 3 else 1,
                gradients=by if stage >= 2 else 1,
                moments=by if stage >= 1 else 1,
                gathered="layers" if stage == 3 else None,
                zero=True,
                offload=self.offload,
            )
        if self.strategy in ("fsdp1", "fsdp2"):
            return Sharing(by, by, by, "weights" if stage == 2 else "layers", offload=self.offload)
        return Sharing(buckets=self.strategy == "ddp")

    def as_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return {**asdict(self), "offload": list(self.offload), "name": self.name}

    @classmethod
    def asked(
        cls,
        processes: int | None = None,
        config: Path | None = None,
        machines: int | None = None,
        *,
        environment: Mapping[str, str] = os.environ,
    ) -> Launch:
        """Return the launch that was asked for; nothing asked for, the one that this process is in.

        Args:
            processes: Processes over all machines; None: what the config says.
            config: An Accelerate config; None: data parallel.
            machines: Machines; None: what the config says, else one.
            environment: Of this process.

        Raises:
            DataError: There is no such config, or it cannot be read.
            IncompatibleError: It says something that this does not train with.
            RequestError: The processes cannot be shared out over the machines.
        """
        if "RANK" in environment or (processes, config, machines) == (None, None, None):
            return cls.current(environment)
        if config is None:
            strategy = "none" if processes in (None, 1) else "ddp"
            found = cls(strategy=strategy)
        else:
            found = _configured(config)
        count = processes or found.processes
        if config is None and processes is None:
            raise RequestError("`num_machines` needs the number of processes on all of them",
                               hint="Add `num_processes`")  # fmt: skip
        several = machines or found.machines
        if count % several:
            raise RequestError(
                f"{count} processes cannot be shared out over {several} machines alike",
                argument="num_processes",
            )
        if found.strategy == "none" and count > 1:
            raise IncompatibleError(
                f"{config}: distributed_type is NO, which starts one process, not {count}",
                hint="Leave --launch-config out, or use recipes/launch/ddp.yaml",
            )
        return found._on(count, several)

    def _on(self, processes: int, machines: int) -> Launch:
        """Return this launch on another number of processes."""
        if processes == 1 and self.strategy == "ddp":
            return replace(self, processes=1, machines=1, strategy="none")
        return replace(self, processes=processes, machines=machines)

    @classmethod
    def current(cls, environment: Mapping[str, str] = os.environ) -> Launch:
        """Return the launch that this process is a part of, from what its launcher has set."""
        world = Rank.from_environment(environment).world
        local = int(environment.get("LOCAL_WORLD_SIZE", world))
        machines = max(world // local, 1)
        if _is_set(environment, "ACCELERATE_USE_FSDP"):
            settings = {
                name.lower(): value
                for name, value in environment.items()
                if name.startswith("FSDP_")
            }
            return _fsdp(settings)._on(world, machines)
        if _is_set(environment, "ACCELERATE_USE_DEEPSPEED"):
            prefix = "ACCELERATE_DEEPSPEED_"
            settings = {
                name.removeprefix(prefix).lower(): value
                for name, value in environment.items()
                if name.startswith(prefix)
            }
            return _zero(settings, None)._on(world, machines)
        return cls(strategy="none" if world == 1 else "ddp")._on(world, machines)


ALONE = Launch()
"""One process."""


def _is_set(environment: Mapping[str, str], variable: str) -> bool:
    return str(environment.get(variable, "false")).lower() in ("1", "true", "yes")


def read_config(config: Path) -> dict[str, Any]:
    """Read a file that Accelerate is to read, where whatever is no section is a traceback.

    Raises:
        DataError: There is no such file, or it cannot be read.
        IncompatibleError: It is no YAML mapping.
    """
    if not config.exists():
        raise DataError(f"{config}: no such file", hint="Give an Accelerate config, in YAML")
    found = parse_mapping(read_text(config), str(config))
    if not found:
        raise DataError(f"{config} is empty", hint="Give an Accelerate config, in YAML")
    return found


def _configured(config: Path) -> Launch:
    """Return what an Accelerate config says."""
    settings = read_config(config)
    kind = str(settings.get("distributed_type", "NO")).upper()
    processes, machines = (
        _count(settings, f"num_{what}", config) for what in ("processes", "machines")
    )
    if settings.get("parallelism_config"):
        raise IncompatibleError(
            f"{config} has a parallelism_config, expected DDP, FSDP or ZeRO alone",
            hint="Leave the section out; recipes/launch/fsdp2.yaml shares weights over all GPUs",
        )
    if kind == "FSDP":
        found = _fsdp(_section(settings, "fsdp_config", config))
    elif kind == "DEEPSPEED":
        found = _zero(_section(settings, "deepspeed_config", config), config)
    elif kind in _DDP:
        found = Launch(strategy="ddp")
    elif kind == "NO":
        return Launch(processes=processes, machines=machines, config=str(config))
    else:
        raise IncompatibleError(
            f"{config}: distributed_type is {kind}, expected MULTI_GPU, FSDP or DEEPSPEED",
            hint="--num-processes N without a config trains on CPUs too",
        )
    return replace(found, processes=processes, machines=machines, config=str(config))


def _section(settings: Mapping[str, Any], name: str, config: Path) -> dict[str, Any]:
    found = settings.get(name) or {}
    if not isinstance(found, dict):
        raise IncompatibleError(f"{config}: {name} is {found!r}, expected a section")
    return found


def _count(settings: Mapping[str, Any], name: str, config: Path) -> int:
    value = settings.get(name, 1)
    if type(value) is not int or value < 1:
        raise IncompatibleError(f"{config}: {name} is {value!r}, expected a whole number from 1 on")
    return value


def _fsdp(settings: Mapping[str, Any]) -> Launch:
    """Return what FSDP's settings share, by the names of Accelerate's config, prefixes or not."""
    named = {name.removeprefix("fsdp_"): str(value).lower() for name, value in settings.items()}
    offload = ("weights", "moments") if named.get("offload_params") == "true" else ()
    keeps = named.get("reshard_after_forward") == "false"
    if named.get("version", "1") == "2":
        return Launch(strategy="fsdp2", stage=2 if keeps else 3, offload=offload)
    how = named.get("sharding_strategy") or named.get("reshard_after_forward") or "full_shard"
    if how.isdigit():
        how = _V1.get(int(how), how)
    how = how.upper()
    if how == "NO_SHARD":
        return Launch(strategy="ddp")
    stage = 2 if how in ("SHARD_GRAD_OP", "HYBRID_SHARD_ZERO2") else 3
    hybrid = how.startswith("HYBRID")
    return Launch(strategy="fsdp1", stage=stage, hybrid=hybrid, offload=offload)


def _zero(settings: Mapping[str, Any], config: Path | None) -> Launch:
    """Return what DeepSpeed's settings share, by the names of Accelerate's config."""
    found: Any = settings.get("zero_stage", 2)
    devices = {part: settings.get(f"offload_{name}_device") for part, name in
               (("moments", "optimizer"), ("weights", "param"))}  # fmt: skip
    own = settings.get("deepspeed_config_file") or settings.get("config_file")
    if own and str(own).lower() != "none":
        file = Path(str(own))
        if not file.exists():
            raise DataError(f"{file}: no such file", hint=f"{config or 'The launch'} names it")
        inner = load_json_object(file).get("zero_optimization", {})
        inner = inner if isinstance(inner, dict) else {}
        found = inner.get("stage", 0)
        for part, name in (("moments", "offload_optimizer"), ("weights", "offload_param")):
            place = inner.get(name)
            devices[part] = place.get("device") if isinstance(place, dict) else None
    if str(found) not in ("0", "1", "2", "3"):
        raise IncompatibleError(
            f"{config or 'DeepSpeed'}: zero_stage is {found!r}, expected 0 to 3"
        )
    offload = tuple(
        part for part, device in devices.items() if str(device).lower() in ("cpu", "nvme")
    )
    return Launch(strategy="zero", stage=int(found), offload=offload)
