"""The rooms of the package: what each may import, and the habits that hold in all of them. Parsed, never imported."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "vllm_specbranch"
PATCHES = REPOSITORY / "patches"
MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 80


@dataclass(frozen=True)
class Room:
    """What one module may import besides the standard library.

    Args:
        ours: modules of this package; "*" for all.
        foreign: top-level names of other distributions; "*" for all.
    """

    ours: frozenset[str]
    foreign: frozenset[str]


def room(ours: str = "", foreign: str = "") -> Room:
    return Room(frozenset(ours.split()), frozenset(foreign.split()))


ANYTHING = room("*", "*")
# Rooms without torch and vllm are pure or thin: they must stay importable in milliseconds and drivable in memory.
ROOMS = {
    "__init__": room(),
    "acceptance": room("token_tree"),
    "addresses": room("errors"),
    "back_off": room(),
    "benefit_gate": room(),
    "branching": room("acceptance config token_tree"),
    "cli": ANYTHING,
    "compare": room("", "torch transformers"),
    "config": room("addresses errors setting_values"),
    "costs": room(),
    "deepen": room("errors made_models", "torch transformers"),
    "demo": ANYTHING,
    "doctor": ANYTHING,
    "draft_ablations": room("acceptance draft_peers draft_server errors load_gate planner"),
    "draft_check": room("config errors", "vllm huggingface_hub"),
    "draft_deterministic": room("draft_peers draft_request draft_server draft_work errors messages"),
    "draft_distributions": room("config messages snapshots", "numpy vllm"),
    "draft_identity": room(),
    "draft_link": room("back_off config errors messages metrics transport"),
    "draft_loop": room("draft_server draft_steps errors message_turns messages token_tree transport", "msgspec"),
    "draft_main": room(
        "addresses config draft_deterministic draft_loop draft_model draft_sampling draft_server draft_sessions draft_steps "
        "draft_work errors keys kv_blocks placement planner transport"
    ),
    "draft_memory": room("draft_model draft_steps kv_blocks token_tree", "numpy"),
    "draft_model": room("draft_runtime errors kv_blocks messages token_tree", "numpy torch vllm"),
    "draft_peers": room("benefit_gate costs draft_request load_gate messages metrics planner"),
    "draft_pressure": room("draft_request draft_work metrics"),
    "draft_request": room("draft_sampling errors kv_blocks messages metrics online_head planner token_tree"),
    "draft_runtime": room("draft_model errors kv_blocks messages", "numpy psutil torch vllm"),
    "draft_sampling": room(),
    "draft_server": room("draft_peers draft_request draft_steps draft_work errors messages planner token_tree"),
    "draft_sessions": room("draft_server draft_steps errors messages planner"),
    "draft_side": room(
        "config draft_check draft_identity draft_link draft_model keys messages metrics placement ray_messages ray_placement "
        "remote_server transport",
        "vllm",
    ),
    "draft_steps": room(
        "draft_model draft_pressure draft_request draft_sampling draft_work errors fair_shares kv_blocks metrics planner "
        "token_tree"
    ),
    "draft_work": room("costs draft_peers draft_request"),
    "emulation": room("measure_messages"),
    "engine_pace": room("config messages"),
    "engine_settings": room(),
    "errors": room(),
    "fair_shares": room(),
    "head_check": room("config draft_check errors length_head", "huggingface_hub vllm"),
    "head_data": room("errors", "safetensors torch"),
    "head_features": room("errors", "torch vllm"),
    "head_pictures": room("head_report picture_style", "torch"),
    "head_recorder": room("head_data messages", "torch"),
    "head_report": room("head_data head_rules head_training length_head report", "torch"),
    "head_rules": room("head_data length_head", "torch"),
    "head_training": room("errors head_data length_head", "torch"),
    "http_status": room("addresses draft_sessions errors metrics transport", "prometheus_client"),
    "keys": room("errors", "zmq"),
    "kv_blocks": room("errors"),
    "length_head": room("errors", "safetensors torch"),
    "load_gate": room("benefit_gate"),
    "lineup": room("config errors measure_messages"),
    "made_models": room("config errors", "safetensors torch"),
    "measure": room("config errors measure_messages", "msgspec"),
    "measure_child": room("measure_messages observed_engine", "msgspec torch vllm"),
    "measure_messages": room("", "msgspec"),
    "message_turns": room("messages"),
    "messages": room("errors", "msgspec"),
    "metrics": room(),
    "observed_draft_main": room("draft_ablations draft_main draft_model emulation kv_blocks token_tree"),
    "observed_engine": room("emulation errors measure_messages placement"),
    "online_head": room("token_tree"),
    "patching": room("errors"),
    "placement": room("back_off config draft_model errors", "msgspec psutil"),
    "picture_style": room("", "matplotlib"),
    "planner": room("acceptance branching config errors online_head setting_values token_tree"),
    "plugin": room("errors patches patching", "vllm"),
    "prompts": room("errors"),
    "proposer": room(
        "config draft_distributions draft_link draft_sampling draft_side engine_pace errors messages metrics scheduler "
        "ray_cluster scorer snapshots speculative_config target_head transport",
        "numpy torch vllm",
    ),
    "provenance": room("", "psutil"),
    "rates": room(),
    "ray_actor": room("keys placement ray_messages", "msgspec ray"),
    "ray_cluster": room("errors ray_messages"),
    "ray_driver": room("ray_actor ray_messages", "msgspec ray"),
    "ray_executor": room("config", "ray vllm"),
    "ray_messages": room("config draft_model", "msgspec"),
    "ray_placement": room("back_off config draft_model keys messages placement ray_messages transport", "msgspec zmq"),
    "remote_server": room("back_off"),
    "recording_worker": room("head_recorder proposer", "torch"),
    "replay": room(
        "config draft_main draft_model draft_server draft_steps draft_work engine_pace errors kv_blocks messages token_tree"
    ),
    "replay_bounds": room("draft_model draft_steps kv_blocks replay"),
    "replay_study": room(
        "config draft_memory draft_model draft_steps draft_work kv_blocks measure_messages metrics replay replay_bounds",
        "torch",
    ),
    "report": room("measure_messages metrics"),
    "reclaim": room("metrics", "vllm"),
    "scheduler": room(
        "config draft_distributions errors metrics reclaim snapshots speculative_config stat_logger", "vllm"
    ),
    "scorer": room("draft_distributions errors metrics", "numpy torch vllm"),
    "setting_values": room("addresses errors"),
    "shipped_pair": room(),
    "snapshots": room("messages metrics"),
    "speculative_config": room("config draft_check errors head_check keys plugin ray_cluster", "pydantic vllm"),
    "standalone": room(
        "addresses config draft_identity draft_loop draft_main draft_model draft_sessions draft_work errors http_status keys "
        "kv_blocks transport",
        "torch",
    ),
    "stat_logger": room("metrics", "vllm"),
    "target_head": room("errors head_features length_head metrics", "numpy torch"),
    "token_tree": room("errors"),
    "transport": room("addresses errors keys messages rates zmq_port", "zmq"),
    "weaken": room("errors made_models", "torch"),
    "train_head": ANYTHING,
    "tune": ANYTHING,
    "tune_check": room("config lineup measure measure_messages"),
    "tune_measure": room("measure_messages replay"),
    "tune_report": room("replay report tune_check tune_search"),
    "tune_search": room(),
    "worker": room("errors plugin proposer scheduler", "vllm"),
    "zmq_port": room("addresses errors keys rates", "zmq"),
}
PATCH_ROOM = room("config errors patching plugin proposer speculative_config stat_logger", "torch vllm")

# Where a habit may be broken, and why.
MAY_READ_ENVIRONMENT = {"config.py": "the only reader; it also makes the environment of the draft server"}
MAY_PRINT = {"cli.py": "talks to a person", "demo.py": "talks to a person"}
MAY_CATCH_EVERYTHING = {
    "proposer.py": "the boundary to vLLM: a request survives any failure of the draft side",
    "ray_driver.py": "the end of a thread: of a start that fails by whatever the parent would wait for many minutes",
}
UNSAFE_SERIALISERS = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}

MODULES = sorted(PACKAGE.glob("*.py"))
SOURCES = [*MODULES, *sorted(PATCHES.glob("*.py"))]


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def imported_names(tree: ast.Module, package: str = "vllm_specbranch") -> Iterator[tuple[str, int]]:
    """Yield each imported dotted name and its line, top-level or nested, absolute or relative to `package`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = parents[: len(parents) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from package import name`: the name may be a module, and only then is it one of ours.
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)


def forbidden_imports(tree: ast.Module, allowed: Room, package: str = "vllm_specbranch") -> list[str]:
    found = []
    for name, line in imported_names(tree, package):
        top, *rest = name.split(".")
        if top in sys.stdlib_module_names:
            continue
        if top in ("vllm_specbranch", "patches"):
            ours = "patches" if top == "patches" else rest[0] if rest else "*"
            wrong = "*" not in allowed.ours and ours not in allowed.ours and ours != "__version__"
        else:
            wrong = "*" not in allowed.foreign and top not in allowed.foreign
        if wrong:
            found.append(f"line {line}: {name}")
    return found


def dotted(node: ast.expr) -> str:
    """Return `a.b.c` for an attribute chain, and an empty string for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (owner := dotted(node.value)):
        return f"{owner}.{node.attr}"
    return ""


def environment_reads(tree: ast.Module) -> list[int]:
    lines = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Attribute) and dotted(node) in ENVIRONMENT]
    return lines + [line for name, line in imported_names(tree) if name in ENVIRONMENT]


ENVIRONMENT = {"os.environ", "os.environb", "os.getenv", "os.getenvb", "os.putenv"}


def catch_alls(tree: ast.Module) -> list[int]:
    """Return the lines of `except:`, `except Exception` and `except BaseException`, also inside a tuple.

    One that ends in a bare `raise` swallows nothing and is fine.
    """
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            clean_up = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
            if not clean_up and any(kind is None or dotted(kind) in ("Exception", "BaseException") for kind in kinds):
                lines.append(node.lineno)
    return lines


def unsafe_serialisers(tree: ast.Module) -> list[str]:
    found = [f"line {line}: {name}" for name, line in imported_names(tree) if name.split(".")[0] in UNSAFE_SERIALISERS]
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    # torch.load and torch.save are pickle by another name; weights travel as safetensors.
    found += [
        f"line {call.lineno}: {name}" for call in calls if (name := dotted(call.func)) in ("torch.load", "torch.save")
    ]
    words = [keyword for call in calls for keyword in call.keywords if keyword.arg == "allow_pickle"]
    return found + [f"line {word.value.lineno}: allow_pickle" for word in words]


def ids(paths: list[Path]) -> list[str]:
    return [path.relative_to(REPOSITORY).as_posix() for path in paths]


@pytest.fixture(params=SOURCES, ids=ids(SOURCES))
def source(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def test_imports_stay_in_their_room(source: Path) -> None:
    if source.parent == PATCHES:
        allowed, package = PATCH_ROOM, "vllm_specbranch.patches"
    else:
        assert source.stem in ROOMS, f"{source.name} has no row in ROOMS: say what it may import"
        allowed, package = ROOMS[source.stem], "vllm_specbranch"
    assert forbidden_imports(parse(source), allowed, package) == []


def test_every_module_says_what_it_is(source: Path) -> None:
    assert ast.get_docstring(parse(source))


def test_no_unsafe_serialiser(source: Path) -> None:
    assert unsafe_serialisers(parse(source)) == []


def test_no_print(source: Path) -> None:
    calls = [node for node in ast.walk(parse(source)) if isinstance(node, ast.Call)]
    assert source.name in MAY_PRINT or [call.lineno for call in calls if dotted(call.func) == "print"] == []


def test_environment_is_read_in_one_place(source: Path) -> None:
    assert source.name in MAY_READ_ENVIRONMENT or environment_reads(parse(source)) == []


def test_no_catch_all(source: Path) -> None:
    assert source.name in MAY_CATCH_EVERYTHING or catch_alls(parse(source)) == []


def test_files_and_functions_stay_short(source: Path) -> None:
    assert len(source.read_text().splitlines()) <= MAX_FILE_LINES
    functions = [node for node in ast.walk(parse(source)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    sizes = {node.name: (node.end_lineno or node.lineno) - node.lineno + 1 for node in functions}
    assert {name: size for name, size in sizes.items() if size > MAX_FUNCTION_LINES} == {}


def test_there_is_no_room_for_everything() -> None:
    assert not [path.name for path in SOURCES if path.stem in ("utils", "util", "helpers", "common", "misc")]


def test_pure_rooms_load_neither_torch_nor_vllm() -> None:
    """The package itself, and every room whose row has no torch and no vLLM, with all that they import."""
    heavy = {"torch", "vllm", "*"}
    pure = [path.stem for path in MODULES if not ROOMS.get(path.stem, ANYTHING).foreign & heavy]
    names = ["vllm_specbranch", *(f"vllm_specbranch.{name}" for name in pure if name != "__init__")]
    script = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    heavy = {'torch', 'vllm'} & set(sys.modules)\n"
        "    assert not heavy, f'{name} loads {heavy}'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *names], capture_output=True, text=True, timeout=60, cwd=REPOSITORY
    )
    assert done.returncode == 0, done.stderr


# The checks themselves: each must see the offence that it is there for.


@pytest.mark.parametrize(
    "code",
    [
        "import torch",
        "import torch.nn as nn",
        "from vllm.config import VllmConfig",
        "def f():\n    from vllm_specbranch.transport import bind",
        "from vllm_specbranch import transport",
        "from . import transport",
        "from .transport import bind",
        "if TYPE_CHECKING:\n    import vllm",
        "import vllm_specbranch.transport",
    ],
)
def test_forbidden_imports_are_seen(code: str) -> None:
    assert forbidden_imports(ast.parse(code), room("errors"))


def test_allowed_imports_pass() -> None:
    code = (
        "import os.path\nfrom .errors import KVError\nfrom vllm_specbranch import errors\nimport vllm_specbranch.errors"
    )
    assert forbidden_imports(ast.parse(code), room("errors")) == []
    assert forbidden_imports(ast.parse("from ..proposer import Proposer"), PATCH_ROOM, "vllm_specbranch.patches") == []
    assert forbidden_imports(ast.parse("from ..transport import bind"), PATCH_ROOM, "vllm_specbranch.patches")


@pytest.mark.parametrize(
    "code", ["os.environ['A']", "os.getenv('A')", "from os import environ", "x = dict(os.environ)"]
)
def test_environment_reads_are_seen(code: str) -> None:
    assert environment_reads(ast.parse(code))


@pytest.mark.parametrize("kind", ["", " Exception", " BaseException as e", " (ValueError, Exception)"])
def test_catch_alls_are_seen(kind: str) -> None:
    assert catch_alls(ast.parse(f"try:\n    f()\nexcept{kind}:\n    g()"))
    assert catch_alls(ast.parse("try:\n    f()\nexcept ValueError:\n    g()")) == []
    assert catch_alls(ast.parse(f"try:\n    f()\nexcept{kind}:\n    g()\n    raise")) == []


@pytest.mark.parametrize(
    "code", ["import pickle", "from marshal import loads", "torch.load(p)", "np.load(p, allow_pickle=True)"]
)
def test_unsafe_serialisers_are_seen(code: str) -> None:
    assert unsafe_serialisers(ast.parse(code))
