"""Which runs are meant, what they are called, and where their report goes."""

from collections.abc import Sequence
from glob import glob, has_magic
from pathlib import Path

from specreason_batch.types import InvalidInput


def find_runs(given: Sequence[str]) -> list[Path]:
    """Their folders; a glob stands for the runs among what it finds. Raises InvalidInput."""
    found = [Path(path) for name in given for path in _expand(name)]
    resolved = [path.resolve() for path in found]
    for path, place in zip(found, resolved, strict=True):
        if resolved.count(place) > 1:
            raise InvalidInput(f"runs: {path} is given twice; allowed: a run once")
    return found


def _expand(name: str) -> list[str]:
    if Path(name).exists() or not has_magic(name):
        return [name]
    found = sorted(path for path in glob(name, recursive=True) if (Path(path) / "run.json").is_file())
    if not found:
        raise InvalidInput(f"runs: {name!r} finds no folder with a run.json; allowed: output folders of jobs.generate")
    return found


def labels(paths: Sequence[Path]) -> list[str]:
    """The shortest end of each path that no other path has."""
    places = [path.resolve().parts for path in paths]
    return [_label(place, [other for other in places if other != place]) for place in places]


def _label(place: tuple[str, ...], others: Sequence[tuple[str, ...]]) -> str:
    for length in range(1, len(place)):
        end = place[-length:]
        if not any(other[-length:] == end for other in others):
            return "/".join(end)
    return str(Path(*place))


def default_output(paths: Sequence[Path]) -> Path:
    """`report` in the only run, or beside runs of one folder. Raises InvalidInput if they are of several."""
    if len(paths) == 1:
        return paths[0] / "report"
    parents = {path.resolve().parent for path in paths}
    if len(parents) > 1:
        raise InvalidInput(
            "output: not set; runs of several folders need one for their report, as output=outputs/compared"
        )
    return paths[0].parent / "report" if paths[0].name else parents.pop() / "report"
