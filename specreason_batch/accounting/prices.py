"""What machines cost: typed, with ranges. Values are the user's (conf/cost/), never a fact of this program."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from specreason_batch.types import InvalidInput


@dataclass(kw_only=True)
class Prices:
    """A price table. Raises InvalidInput that lists every field out of range."""

    currency: str = "USD"
    device_hour: dict[str, float] = field(default_factory=dict)  # of one GPU, its host included, by a part of its name
    core_hour: float | None = None  # of one CPU core, where engines run on CPUs; None: unknown
    kwh: float | None = None  # of the GPUs' own energy, on top of device_hour; None: not counted

    def __post_init__(self) -> None:
        if problems := list(self.problems("cost")):
            raise InvalidInput("\n".join(problems))

    def problems(self, path: str) -> Iterator[str]:
        if not self.currency:
            yield f"{path}.currency: {self.currency!r} is empty; allowed: text"
        rates = {f"device_hour.{name}": price for name, price in self.device_hour.items()}
        for name, price in {**rates, "core_hour": self.core_hour, "kwh": self.kwh}.items():
            if price is not None and not 0 <= price < float("inf"):
                yield f"{path}.{name}: {price} is out of range; allowed: at least 0"
        if "" in self.device_hour:
            yield f"{path}.device_hour: '' is in every name; allowed: a part of a GPU's name"

    def of_device(self, name: str) -> float | None:
        """Of an hour of the GPU of this name; the longest part that is in it counts. None: no price is given."""
        known = [part for part in self.device_hour if part.lower() in name.lower()]
        return self.device_hour[max(known, key=len)] if known else None
