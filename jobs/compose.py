"""The configuration that `jobs.generate` would get from these words, for jobs that start it elsewhere."""

import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import open_dict

from jobs.launch import register_schema, to_config
from specreason_batch.config import GenerateConfig
from specreason_batch.types import InvalidInput

CONF = Path(__file__).parent.parent / "conf"


def compose_generate(overrides: Sequence[str]) -> GenerateConfig:
    """Validated. Raises InvalidInput, for what Hydra refuses too."""
    register_schema()
    with _initialized():
        try:
            composed = compose("generate", list(overrides), return_hydra_config=True)
        except HydraException as error:
            cause = f": {str(error.__cause__).splitlines()[0]}" if error.__cause__ else ""
            raise InvalidInput(f"{error}{cause}") from error
        HydraConfig.instance().set_config(composed)  # what ${hydra:...} in values refers to
        with open_dict(composed):
            del composed["hydra"]
        return to_config(composed)


def split_words(words: Sequence[str], own_names: Collection[str]) -> tuple[list[str], list[str]]:
    """A command line's words: those that set a job's own choices, options of Hydra among them, and jobs.generate's."""
    own = [word for word in words if word.startswith("-") or re.split("[.=]", word.lstrip("+~"))[0] in own_names]
    return own, [word for word in words if word not in own]


def quoted(text: str) -> str:
    """A text as Hydra's command line takes it, whatever is in it: backslashes count before a quote only."""
    escaped = re.sub(r'(\\*)("|$)', lambda found: 2 * found[1] + ('\\"' if found[2] else ""), text)
    return f'"{escaped}"'


@contextmanager
def _initialized() -> Iterator[None]:
    if GlobalHydra.instance().is_initialized():
        yield
    else:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            yield
