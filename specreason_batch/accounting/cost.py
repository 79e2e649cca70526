"""Section `cost`: device-hours, energy, and money by the user's own price table."""

from dataclasses import dataclass

import polars as pl

from specreason_batch.accounting.figures import Basis, Figure, Section, Table
from specreason_batch.accounting.load import RunFiles
from specreason_batch.accounting.outcomes import Outcomes
from specreason_batch.accounting.prices import Prices
from specreason_batch.accounting.ratios import ratio
from specreason_batch.accounting.tokens import CommittedTokens
from specreason_batch.store.attempts import Attempt

TEXT = (
    "Every attempt's wall-clock counts, from the start of its process on: loading models, what was stopped or killed "
    "and done again, and what is still in flight. A GPU counts while an attempt holds it, busy or not. An attempt that "
    "ended before its engines had started noted no hardware and is left out. Money is the price table's, which is "
    "yours to edit (conf/cost/)."
)
_UNKNOWN = "unknown hardware"
_NOTHING_NOTED = "no attempt has noted what it ran on"
_NOT_NOTED = "attempts of an older version did not note their hardware"
_CORES = "CPU cores"
_JOULES_A_KWH = 3.6e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """Of one kind of device, by all attempts."""

    device: str
    hours: float | None  # of one device (CPU: of one core); None: nobody noted how many there were
    price: float | None  # of an hour

    @property
    def money(self) -> float | None:
        return None if self.hours is None or self.price is None else self.hours * self.price


def section(run: RunFiles, prices: Prices, tokens: CommittedTokens, outcomes: Outcomes) -> Section:
    uses = device_uses(run.attempts, prices)
    joules, silent = _energy(run.attempts)
    money, note = _money(uses, prices, joules, silent)
    per = [
        ("chain", "a chain", run.num_chains, "committed chains, given-up ones included"),
        ("1000_kept_tokens", "1,000 kept tokens", tokens.kept / 1000, "draft steps kept, base steps and answers"),
        ("correct_answer", "a correct answer", outcomes.num_correct, outcomes.note_on_correct),
    ]
    return Section(
        name="cost",
        title="Cost",
        text=TEXT,
        figures=(
            *_hours(uses),
            *_energy_figures(joules, silent),
            _priced("money", "cost", money, prices, note),
            *(
                _priced(f"money_per_{name}", f"cost of {label}", ratio(money, count), prices, note or about)
                for name, label, count, about in per
            ),
            *(_time_per(uses, name, label, count, about) for name, label, count, about in per),
        ),
        tables=(_devices(uses, prices),) if uses else (),
    )


def device_uses(attempts: list[Attempt], prices: Prices) -> list[Use]:
    """By device, in name order."""
    hours: dict[str, float | None] = {}
    for attempt in attempts:
        for device, devices in _devices_of(attempt).items():
            spent = (attempt.progress.startup_seconds + attempt.progress.seconds) / 3600
            before = hours.get(device, 0.0)
            hours[device] = None if devices is None or before is None else before + devices * spent
    return [Use(device=device, hours=hours[device], price=_price(device, prices)) for device in sorted(hours)]


def _devices_of(attempt: Attempt) -> dict[str, int | None]:
    """How many of each an attempt held. One that never had an engine held none."""
    if attempt.hardware is None:
        return {_UNKNOWN: None} if attempt.progress.num_generated_tokens else {}
    names = attempt.hardware.devices
    return {name: names.count(name) for name in names} or {_CORES: attempt.hardware.num_cores}


def _price(device: str, prices: Prices) -> float | None:
    return prices.core_hour if device == _CORES else prices.of_device(device)


def _energy(attempts: list[Attempt]) -> tuple[float, int]:
    """Joules of the GPUs, as far as drivers tell, and the number of GPU attempts of which none does."""
    on_gpus = [attempt.progress.energy_joules for attempt in attempts if attempt.hardware and attempt.hardware.devices]
    return sum(joules or 0.0 for joules in on_gpus), sum(joules is None for joules in on_gpus)


def _money(uses: list[Use], prices: Prices, joules: float, silent: int) -> tuple[float | None, str]:
    """In all; None, and why, where something has no price."""
    if why := _why_unknown(uses):
        return None, why
    if nameless := [use.device for use in uses if use.price is None]:
        return None, f"no price is given for {', '.join(nameless)}"
    if prices.kwh is not None and silent:
        return None, f"{silent} attempts' drivers do not tell the energy that cost.kwh prices"
    energy = joules / _JOULES_A_KWH * prices.kwh if prices.kwh is not None else 0.0
    return sum(use.money or 0.0 for use in uses) + energy, ""


def _priced(name: str, label: str, value: float | None, prices: Prices, note: str) -> Figure:
    return Figure(name=name, label=label, value=value, unit=prices.currency, basis=Basis.modelled, note=note)


def _hours(uses: list[Use]) -> list[Figure]:
    gpus, cores = _sums(uses)
    note = _why_unknown(uses)
    return [
        Figure(name="device_hours", label="GPU-hours", value=gpus, unit="GPU-hours", note=note),
        Figure(
            name="core_hours", label="CPU core-hours", value=cores, unit="core-hours", note=note or "of CPU engines"
        ),
    ]


def _why_unknown(uses: list[Use]) -> str:
    """Why nobody knows the hours; empty if somebody does."""
    if not uses:
        return _NOTHING_NOTED
    return _NOT_NOTED if any(use.hours is None for use in uses) else ""


def _sums(uses: list[Use]) -> tuple[float | None, float | None]:
    """Hours of GPUs and of cores; None where some are unknown."""
    if _why_unknown(uses):
        return None, None
    cores = sum(use.hours or 0.0 for use in uses if use.device == _CORES)
    return sum(use.hours or 0.0 for use in uses) - cores, cores


def _time_per(uses: list[Use], name: str, label: str, count: float | None, about: str) -> Figure:
    gpus, cores = _sums(uses)
    seconds, unit = (gpus, "GPU-s") if gpus or gpus is None else (cores, "core-s")
    value = ratio(3600 * seconds if seconds is not None else None, count)
    return Figure(
        name=f"device_seconds_per_{name}",
        label=f"device time of {label}",
        value=value,
        unit=unit,
        note=_why_unknown(uses) or about,
    )


def _energy_figures(joules: float, silent: int) -> list[Figure]:
    known = bool(joules) and not silent
    note = "of the GPUs alone" if known else "no GPU's driver tells it, or not every one's"
    return [
        Figure(
            name="energy_kwh", label="energy", value=joules / _JOULES_A_KWH if known else None, unit="kWh", note=note
        )
    ]


def _devices(uses: list[Use], prices: Prices) -> Table:
    rows = [{"device": use.device, "hours": use.hours, "price": use.price, "money": use.money} for use in uses]
    types = {"device": pl.String, "hours": pl.Float64, "price": pl.Float64, "money": pl.Float64}
    return Table(
        name="devices",
        title="By device",
        frame=pl.DataFrame(rows, schema=types),
        labels={"price": "price of an hour", "money": "cost"},
        units={"hours": "h", "price": prices.currency, "money": prices.currency},
        basis=Basis.modelled,
        note="hours are measured: of one GPU, or of one core; energy is not in it",
    )
