"""The engines of a run: started one after the other, and built again when one has died."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from specreason_batch.clock import Clock, WallClock
from specreason_batch.config import EngineConfig, GenerateConfig
from specreason_batch.devices import DeviceWatch
from specreason_batch.engine import Engine, EngineDead, Speculating
from specreason_batch.meter import JoulesCounter, find_hardware
from specreason_batch.progress import Progress
from specreason_batch.types import Hardware, Role


class Engines(Mapping[Role, Engine]):
    """One engine a role. `build` makes one; without it they cannot be rebuilt.

    `together`: engines that share this process cannot outlive each other, so all are built again if one dies.
    `inspect`: looks at the machine before engines of these roles are built again; raises BadNode.
    `hardware`: what they run on; None: this machine without its GPUs. `read_joules`: what that has used.
    """

    def __init__(
        self,
        roles: Iterable[Role],
        build: Callable[[Role], Engine] | None = None,
        together: bool = False,
        inspect: Callable[[Collection[Role]], None] = lambda roles: None,
        hardware: Hardware | None = None,
        read_joules: JoulesCounter = lambda: None,
    ) -> None:
        self.hardware = hardware or find_hardware()
        self.read_joules = read_joules
        self._engines: dict[Role, Engine] = {}
        self._build = build
        self._together = together
        self._inspect = inspect
        self._roles = tuple(roles)

    @classmethod
    def given(cls, engines: Mapping[Role, Engine]) -> "Engines":
        """Somebody else's."""
        made = cls(engines)
        made._engines = dict(engines)
        return made

    def start(self) -> None:
        """Build what is not there: one after the other, for together they mis-measure each other's memory.

        Raises InvalidInput, EngineDead, BadNode.
        """
        for role in self._roles:
            if role not in self._engines:
                assert self._build is not None
                self._engines[role] = self._build(role)

    def rebuild(self, death: EngineDead) -> None:
        """Put another in place of the engine that died. Raises `death` where nobody knows how; what `start` raises."""
        if self._build is None or death.role is None:
            raise death
        for role in list(self._engines) if self._together else [death.role]:
            if role in self._engines:
                self._engines.pop(role).close()
        self._inspect([role for role in self._roles if role not in self._engines])
        self.start()

    def close(self) -> None:
        for engine in self._engines.values():
            engine.close()

    def __getitem__(self, role: Role) -> Engine:
        return self._engines[role]

    def __iter__(self) -> Iterator[Role]:
        return iter(self._engines)

    def __len__(self) -> int:
        return len(self._engines)


@contextmanager
def started_engines(
    config: GenerateConfig, roles: frozenset[Role], progress: Progress, clock: Clock | None = None
) -> Iterator[Engines]:
    """The engines of these roles on vLLM.

    Both ring this clock (by default one of their own). Where two CPU engines have processes of their own, those
    whose `cpu_cores` is null share out the cores that this process may use and the other does not, the base getting the
    bigger half. Elsewhere null leaves it to vLLM.
    """
    from specreason_batch.vllm_engine import VllmEngine, check_platform, gpu_library

    clock = clock or WallClock()
    settings = {role: config.engine(role) for role in (Role.base, Role.draft) if role in roles}
    for engine_config in settings.values():
        check_platform(engine_config, config.log.vllm_level)
    settings = _with_cores(settings)

    def build(role: Role) -> Engine:
        with progress.stage(f"loading {role}: {settings[role].model}"):
            return VllmEngine(settings[role], log_level=config.log.vllm_level, clock=clock)

    def inspect(roles: Collection[Role]) -> None:
        watch.check_after_death()
        watch.check_before(roles)

    watch = DeviceWatch(config, roles, gpu_library())
    engines = Engines(
        settings,
        build,
        together=any(engine.in_process for engine in settings.values()),
        inspect=inspect,
        hardware=find_hardware(watch.device_names),
        read_joules=watch.read_joules,
    )
    try:
        watch.check_before()
        engines.start()
        yield engines
        _tell_speculation(engines, progress)
    finally:
        engines.close()
        watch.close()


def _tell_speculation(engines: Engines, progress: Progress) -> None:
    for role, engine in engines.items():
        if isinstance(engine, Speculating) and engine.speculation is not None:
            progress.say(f"{role}: speculative decoding: {engine.speculation}")


def _with_cores(settings: dict[Role, EngineConfig]) -> dict[Role, EngineConfig]:
    """The same, with cores for engines that leave them open while another engine works beside them."""
    from specreason_batch.vllm_engine import shared_out_cores

    open_roles = [role for role, engine in settings.items() if engine.cpu_cores is None]
    if len(settings) < 2 or not open_roles or any(engine.in_process for engine in settings.values()):
        return settings
    taken = {core for engine in settings.values() for core in engine.cpu_cores or ()}
    shares = shared_out_cores(len(open_roles), taken)
    if shares is None:
        return settings
    given = {role: replace(settings[role], cpu_cores=cores) for role, cores in zip(open_roles, shares, strict=True)}
    too_few = any(len(engine.cpu_cores or ()) < engine.tensor_parallel_size for engine in given.values())
    return settings if too_few else settings | given
