"""What is to be trained, on what, resolved and checked. Nothing here loads a model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specreason_batch.chat import ChatFormat, load_chat_format
from specreason_batch.finetune.config import FinetuneConfig, Stage
from specreason_batch.finetune.dataset import Export, open_export
from specreason_batch.finetune.encoding import Encode, Encoder
from specreason_batch.store.manifest import model_identity
from specreason_batch.types import InvalidInput, Role

VERSION = 1  # of what is made of the same data, model and settings
_RENDERING = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")  # files that decide what a text is


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One training."""

    config: FinetuneConfig
    export: Export
    parent: Path  # folder of the model that is trained
    chat: ChatFormat
    encode: Encode

    @property
    def stage(self) -> Stage:
        return self.export.stage

    def made_from(self) -> dict[str, Any]:
        """Two equal ones make the same model, but for rounding."""
        return {
            "version": VERSION,
            "data": self.export.identity(),
            "model": model_identity(str(self.parent)),
            "settings": self.config.settings(self.stage),
        }


def make_plan(config: FinetuneConfig) -> Plan:
    """Raises InvalidInput that names what cannot be used."""
    export = open_export(config.data, config.stage)
    parent = _model_folder(config.model)
    try:
        chat = load_chat_format(Role.draft, config.model, config.chat.options(), config.trust_remote_code)
    except InvalidInput as error:
        raise InvalidInput(f"model: {config.model!r} cannot serve: {error}") from error
    if not export.is_conversational:
        _check_tokenizer(config, export, parent)
    encode = Encoder(chat).for_format(export.format, export.is_conversational)
    encode(export.first_row)  # what is wrong with all rows is told before anything heavy loads
    return Plan(config=config, export=export, parent=parent, chat=chat, encode=encode)


def _check_tokenizer(config: FinetuneConfig, export: Export, parent: Path) -> None:
    """Raises InvalidInput if the text was rendered by another tokenizer or chat template than the model's."""
    rendered_by, own = export.made_from["tokenizer"], model_identity(str(parent))
    if "name" in rendered_by:  # in the hub's cache: its files are not known
        return
    differing = sorted(name for name in _RENDERING if rendered_by.get(name) != own.get(name))
    if differing:
        raise InvalidInput(
            f"data: {config.data} was rendered by another tokenizer than that of {config.model!r} ({differing[0]} "
            f"differs); allowed: an export with tokenizer={config.model}, or the format sft_messages"
        )


def _model_folder(model: str) -> Path:
    """Of a folder itself; of a name, where the hub's cache has it. Nothing is downloaded."""
    if (Path(model) / "config.json").is_file():
        return Path(model).resolve()
    from transformers.utils import cached_file

    try:
        return Path(cached_file(model, "config.json", local_files_only=True)).parent
    except (OSError, ValueError) as error:
        raise InvalidInput(
            f"model: {model!r} is neither a folder with config.json nor in the hub's cache; allowed: one of the two"
        ) from error
