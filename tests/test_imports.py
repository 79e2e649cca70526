"""Who may import whom (docs/design.md, section 4), read from the source so that nothing needs to be installed."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "specreason_batch"

# What each module of the package may import of it; a package stands for its modules. The layers, from the nouns up.
ALLOWED: dict[str, set[str]] = {
    "__init__": set(),
    "types": set(),
    "chain": {"types"},
    "rounds": {"types", "chain"},
    "seeds": set(),
    "answers": set(),
    "clock": set(),
    "meter": {"types"},
    "engine": {"types", "clock"},
    "engine_child": set(),
    "engine_processes": {"types", "engine", "engine_child"},
    "chat": {"types"},
    "judge": {"types", "chat"},
    "config": {"types", "chain", "chat", "judge"},
    "policies": {"types", "chain", "seeds", "policies"},
    "translator": {"types", "chain", "chat", "judge", "seeds"},
    "schedules": {"types", "chain", "rounds", "clock", "engine", "schedules"},
    "probe": {"types", "engine", "judge"},
    "scripted_engine": {"types", "clock", "engine"},
    "simulated_engine": {"types", "engine"},
    "simulation": {"types", "chain", "rounds", "seeds", "policies", "schedules", "simulated_engine"},
    "profiles": {"simulated_engine", "simulation"},
    "replay": {"types", "chain", "rounds", "schedules", "simulation"},
    "vllm_speculation": {"types", "engine", "config"},
    "vllm_engine": {"types", "engine", "engine_processes", "clock", "config", "vllm_speculation"},
    "devices": {"types", "config", "engine"},
    "calibrate": {"types", "engine"},
    "compare": {"types", "accounting"},
    "store": {"__init__", "types", "chain", "rounds", "config", "translator", "store"},
    "plan": {"types", "chain", "chat", "judge", "config", "policies", "translator", "store"},
    "ledger": {"types", "chain", "rounds", "meter", "plan", "store"},
    "signals": {"schedules"},
    "slurm": set(),
    "pairs": set(),
    "submission": {"types", "config"},
    "prepare": {"types", "seeds", "store", "prepare"},
    "status": {"types", "store"},
    "accounting": {"types", "status", "store", "accounting"},
    "export": {"types", "chat", "seeds", "status", "store", "prepare", "export"},
    "finetune": {"__init__", "types", "chat", "config", "schedules", "signals", "store", "finetune"},
    "progress": {"types", "chain", "rounds", "chat", "engine", "plan", "probe"},
    "engines": {"types", "clock", "config", "devices", "engine", "meter", "progress", "vllm_engine"},
    "shard": {
        "types",
        "chain",
        "rounds",
        "config",
        "engine",
        "engines",
        "ledger",
        "plan",
        "progress",
        "schedules",
        "signals",
        "store",
    },
    "run": {
        "types",
        "config",
        "devices",
        "engine",
        "engines",
        "ledger",
        "meter",
        "plan",
        "probe",
        "progress",
        "schedules",
        "shard",
        "signals",
        "store",
    },
}

# Readers of what was written: whatever they are called, they must work without engines.
READER = {"types", "answers", "seeds", "store", "status", "summary", "show", "accounting"}

# Who may import what is heavy or belongs to one place only.
OUTSIDE: dict[str, set[str]] = {
    "vllm": {"vllm_engine", "vllm_speculation"},
    "torch": {"vllm_speculation", "finetune"},
    "transformers": {"chat", "finetune"},
    "trl": {"finetune"},
    "tokenizers": {"chat"},
    "hydra": set(),
    "omegaconf": {"config"},
}
STANDARD_ONLY = {
    "types",
    "chain",
    "rounds",
    "seeds",
    "answers",
    "policies",
    "judge",
    "translator",
    "schedules",
    "clock",
    "engine",
    "engine_child",
    "engine_processes",
    "probe",
    "simulated_engine",
    "simulation",
    "profiles",
    "replay",
}


def modules() -> dict[str, list[Path]]:
    """Source files by the name that the tables use: a module, or a package of modules."""
    found: dict[str, list[Path]] = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        inside = path.relative_to(ROOT / PACKAGE)
        found.setdefault(inside.parts[0].removesuffix(".py"), []).append(path)
    return found


def imports(path: Path) -> Iterator[str]:
    """Dotted names of everything that a file imports, at its top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            assert node.module is not None
            yield node.module
            if node.module == PACKAGE:
                yield from (f"{PACKAGE}.{alias.name}" for alias in node.names)


def own_imports(paths: list[Path]) -> set[str]:
    """Modules of the package that these files import, by the tables' names."""
    names = {name for path in paths for name in imports(path) if name.split(".")[0] == PACKAGE}
    inside = {name.split(".")[1] if "." in name else "__init__" for name in names}
    return {name if name in MODULES else "__init__" for name in inside}


def outside_imports(paths: list[Path]) -> set[str]:
    return {name.split(".")[0] for path in paths for name in imports(path)} - {PACKAGE, "jobs"}


MODULES = modules()


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_what_lies_below_it(module: str) -> None:
    """One that is not in the table is a reader of output, or must be entered."""
    allowed = ALLOWED.get(module, READER | {module})
    assert own_imports(MODULES[module]) <= allowed, "see ALLOWED in this file, and docs/design.md section 4"


def test_the_table_holds_no_module_that_is_gone() -> None:
    assert set(ALLOWED) | {"summary"} <= set(MODULES)


def test_the_layers_have_no_cycle() -> None:
    done: set[str] = set()
    while len(done) < len(ALLOWED):
        ready = {name for name, below in ALLOWED.items() if below - {name} <= done} - done
        assert ready, f"a cycle among {sorted(set(ALLOWED) - done)}"
        done |= ready | ({"vllm_engine"} & ready)


@pytest.mark.parametrize("library", sorted(OUTSIDE))
def test_a_library_is_imported_in_its_own_place_only(library: str) -> None:
    users = {name for name, paths in MODULES.items() if library in outside_imports(paths)}
    assert users <= OUTSIDE[library]


@pytest.mark.parametrize("module", sorted(STANDARD_ONLY))
def test_the_method_knows_no_library(module: str) -> None:
    """No hydra, no pyarrow, no vllm: what the method is can be read and tested with Python alone."""
    libraries = {
        "hydra",
        "omegaconf",
        "pyarrow",
        "polars",
        "vllm",
        "torch",
        "transformers",
        "tokenizers",
        "rich",
        "numpy",
    }
    assert not outside_imports(MODULES[module]) & libraries


@pytest.mark.parametrize("module", ["policies", "schedules", "translator", "judge", "types", "seeds"])
def test_the_method_does_no_input_or_output(module: str) -> None:
    forbidden = {"os", "io", "pathlib", "json", "logging", "subprocess", "socket", "shutil", "glob", "tempfile"}
    assert not outside_imports(MODULES[module]) & forbidden
    calls = {
        node.func.id
        for path in MODULES[module]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not calls & {"open", "print", "input"}


def test_no_global_randomness_decides_anything() -> None:
    """Rows are functions of seeds; only the scripted engine shuffles, from a seed of its own."""
    users = {name for name, paths in MODULES.items() if {"random", "secrets", "numpy"} & outside_imports(paths)}
    assert users <= {"scripted_engine", "show", "summary", "accounting", "report", "export"}


def test_vllm_is_imported_only_when_an_engine_is_built() -> None:
    """So that a wrong configuration is refused before anything heavy loads."""
    top = ast.parse((ROOT / PACKAGE / "vllm_engine.py").read_text()).body
    names = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in top if isinstance(node, ast.ImportFrom)}
    assert not {name for name in names if name.split(".")[0] in ("vllm", "torch")}


def test_entry_points_are_imported_by_nobody() -> None:
    importers = [
        path for paths in MODULES.values() for path in paths if any(n.startswith("jobs") for n in imports(path))
    ]
    assert importers == []
