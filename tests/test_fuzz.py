"""Mutated rows, files and configurations: never a traceback, never a row lost or doubled."""

import io
import json
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from jobs.launch import register_schema, to_config
from specreason_batch.plan import make_plan
from specreason_batch.progress import Progress
from specreason_batch.run import run_plan
from specreason_batch.signals import StopSignal
from specreason_batch.store.manifest import flatten
from specreason_batch.store.reading import scan
from specreason_batch.types import InvalidInput
from tests.support.configs import make_config, write_models
from tests.test_run import engines, rejects

CONF = Path(__file__).parent.parent / "conf"
NUM_SHARDS = 150  # of seven mutated rows each
NUM_FILE_CASES = 200
NUM_CONFIG_CASES = 300

TEXTS: list[Any] = [
    *(
        "so we add 2",
        "",
        " ",
        "\n\n",
        "\x00",
        "é€😀",
        "</think>",
        "<|im_end|>",
        "{prompt}",
        "[/bold]",
        "\ufffd",
        "\u202e",
    ),
    *("so " * 400, "x" * 5000, None, "'; --", "a/b", "..", "${oc.env:HOME}", "\\boxed{4}", "<<sentinel-user0-4f1c>>"),
]
TURNS: list[Any] = [
    None,
    [],
    [{"role": "user", "content": "so"}],
    [{"role": "system", "content": "s"}, {"role": "user", "content": "x"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
    [{"role": "assistant", "content": "b"}],
    [{"role": "user", "content": None}],
    [{"role": None, "content": "x"}],
    [{"role": "robot", "content": "x"}],
    [{"role": "user", "content": "a"}, None],
    [{"role": "user", "content": "so " * 300}],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("fuzz")
    write_models(made / "models")
    return made


def mutated_shard(path: Path, chance: random.Random) -> int:
    """A shard of odd rows; how many."""
    num_rows = chance.randrange(1, 14)
    ids: list[Any] = [chance.choice([f"p{chance.randrange(8)}", *TEXTS]) for _ in range(num_rows)]
    columns: dict[str, Any] = {
        "prompt_id": pa.array(ids, pa.string()),
        "prompt": pa.array([chance.choice(TEXTS) for _ in range(num_rows)], pa.string()),
    }
    if chance.random() < 0.5:
        turn = pa.struct({"role": pa.string(), "content": pa.string()})
        columns["messages"] = pa.array([chance.choice(TURNS) for _ in range(num_rows)], pa.list_(turn))
    if chance.random() < 0.5:
        columns["system_prompt"] = pa.array([chance.choice(TEXTS) for _ in range(num_rows)], pa.string())
    if chance.random() < 0.5:
        columns["gold_answer"] = pa.array([chance.choice([None, 4, -1]) for _ in range(num_rows)], pa.int64())
    if chance.random() < 0.5:
        columns["level"] = pa.array([chance.choice([None, 1.5, float("nan")]) for _ in range(num_rows)])
    pq.write_table(pa.table(columns), path)
    return num_rows


@pytest.mark.parametrize("batch", range(10))
def test_every_odd_row_is_a_chain_or_a_reject_and_never_both(folder: Path, batch: int) -> None:
    for case in range(batch, NUM_SHARDS, 10):
        place = folder / f"rows{case}"
        place.mkdir()
        (place / "models").symlink_to(folder / "models")
        num_rows = mutated_shard(place / "prompts.parquet", random.Random(case))
        config = make_config(place)
        plan = make_plan(config)
        run_plan(plan, engines(plan), Progress(Console(file=io.StringIO()), 1e9), StopSignal())
        chains = scan(Path(config.output_dir), "chains")
        made = chains.select("prompt_id").collect()["prompt_id"].to_list() if chains is not None else []
        refused = [row["row"] for row in rejects(config) if row["sample_index"] is None]
        assert len(made) == len(set(made)) and len(refused) == len(set(refused))
        assert len(made) + len(refused) == num_rows
        reasons = [row["reason"] for row in rejects(config)]
        assert all(reasons) and not any("Traceback" in reason for reason in reasons)
        assert make_plan(config).pending == [], "nothing is tried for ever"
        shutil.rmtree(place)


def damaged(content: bytes, chance: random.Random) -> bytes:
    """Cut, flipped, doubled, shifted or overwritten somewhere."""
    at = chance.randrange(len(content))
    match chance.randrange(6):
        case 0:
            return content[:at]
        case 1:
            return content[at:]
        case 2:
            return content[:at] + bytes([content[at] ^ (1 << chance.randrange(8))]) + content[at + 1 :]
        case 3:
            return content[:at] + chance.randbytes(chance.randrange(1, 40)) + content[at:]
        case 4:
            return chance.randbytes(chance.randrange(0, 200))
        case _:
            return content + content[:at]


@pytest.mark.parametrize("what", ["prompts", "tokenizer.json", "config.json", "generation_config.json", "run.json"])
def test_a_damaged_file_is_refused_by_name_or_does_no_harm(folder: Path, what: str, tmp_path: Path) -> None:
    shutil.copytree(folder / "models", tmp_path / "models")
    mutated_shard(tmp_path / "prompts.parquet", random.Random(3))
    config = make_config(tmp_path)
    make_plan(config)
    path = {"prompts": tmp_path / "prompts.parquet", "run.json": Path(config.output_dir) / "run.json"}.get(
        what, tmp_path / "models" / "base" / what
    )
    whole = path.read_bytes()
    refused = 0
    for case in range(NUM_FILE_CASES // 5):
        path.write_bytes(damaged(whole, random.Random(case)))
        try:
            plan = make_plan(make_config(tmp_path, output_dir=str(tmp_path / "output")))
            for shard in plan.pending:
                list(shard.shard.prompts())
        except InvalidInput as error:
            refused += bool(str(error))
    assert refused > NUM_FILE_CASES / 5 / 4
    path.write_bytes(whole)
    make_plan(config)


VALUES = (
    *("null", "-1", "0", "1", "2.5", "1e9", "nan", "inf", "true", "''", "x", "[]", "[1,2]", "{}", "{a:1}", "[null]"),
    *(
        "'${nowhere}'",
        "???",
        "'so 0-9?'",
        "examples/toy/base",
        "draft",
        "lockstep",
        "[0,0]",
        "-0.0",
        "99999999999999999999",
    ),
)


@pytest.fixture
def _composing() -> Iterator[None]:
    register_schema()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


@pytest.mark.usefixtures("_composing")
def test_an_odd_configuration_is_taken_or_refused_by_name(tmp_path: Path) -> None:
    plain = OmegaConf.to_container(compose("generate", ["output_dir=x"]))
    names = sorted(name for name in flatten(plain) if name != "output_dir")  # type: ignore[arg-type]
    chance = random.Random(9)
    ends: Counter[str] = Counter()
    for case in range(NUM_CONFIG_CASES):
        overrides = [f"{chance.choice(names)}={chance.choice(VALUES)}" for _ in range(chance.randrange(1, 3))]
        try:
            config = to_config(compose("generate", [f"output_dir={tmp_path}/{case}", "limit=2", *overrides]))
            make_plan(config)
            ends["taken"] += 1
        except InvalidInput as error:
            ends["refused" if str(error).strip() else "refused without a word"] += 1
        except (HydraException, OmegaConfBaseException):
            ends["refused by Hydra"] += 1
        shutil.rmtree(tmp_path / str(case), ignore_errors=True)
    print(json.dumps(ends))
    assert not ends["refused without a word"]
    assert min(ends["taken"], ends["refused"], ends["refused by Hydra"]) > 20
