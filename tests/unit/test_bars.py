"""House rules as tests (CONTRIBUTING.md lists them). Each test names every offender with its place."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "longlive"
CODE_FOLDERS = ("longlive", "tests", "scripts", "compat", "benchmarks")
TEXT_ENDINGS = {".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".json", ".cfg", ".lock", ".sh", ""}
MEBIBYTE = 2**20

MIDDLE = {"models", "precision", "parallel", "cache", "diffusion"}
BELOW_ENGINE = {"core", "config", "ops", "data"} | MIDDLE
# package -> packages (or single modules) that it may import. `cli` and the package root may import everything.
MAY_IMPORT = {
    "core": set(),
    "config": {"core"},
    "ops": {"core"},
    **{name: {"core", "config", "ops"} for name in MIDDLE},
    "data": {"core", "models.codec"},
    "world": {"core", "data"},
    "engine": BELOW_ENGINE,
    "train": BELOW_ENGINE | {"engine", "world"},
    "evaluation": BELOW_ENGINE | {"engine", "world", "train"},
    "serve": BELOW_ENGINE | {"engine"},
    "bench": BELOW_ENGINE | {"engine", "train"},
}
FORBIDDEN_IN_DIT = re.compile(r"\b(dist|sp|sp_\w+|fp8|nvfp4|i2v|cache)\b", re.IGNORECASE)
MACHINE_PATHS = re.compile("|".join("/" + name + "/" for name in ("work", "farm", "root", "home/[a-z]+")))


@cache
def sources() -> dict[Path, tuple[str, ast.Module]]:
    """Every Python file of the repository: path -> (text, syntax tree)."""
    paths = [path for folder in CODE_FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))] + sorted(ROOT.glob("*.py"))
    return {path: (path.read_text(encoding="utf-8"), ast.parse(path.read_text(encoding="utf-8"))) for path in paths}


def library() -> dict[Path, tuple[str, ast.Module]]:
    return {path: parsed for path, parsed in sources().items() if PACKAGE in path.parents}


def place(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{node.lineno}"


def calls(tree: ast.Module, name: str) -> list[ast.Call]:
    return [n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == name]


def imported_modules(path: Path, tree: ast.Module):
    """(node, dotted module inside longlive) for every import of our own, relative ones resolved; `from . import x` gives x."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    annotations_only = {id(node) for block in ast.walk(tree) if is_type_checking(block) for node in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in annotations_only:
            continue
        if isinstance(node, ast.Import):
            yield from ((node, alias.name.removeprefix("longlive.")) for alias in node.names if alias.name.split(".")[0] == "longlive")
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            full = base + (node.module.split(".") if node.module else [])
            if full and full[0] == "longlive":
                yield from ((node, ".".join([*full[1:], alias.name])) for alias in node.names)


def is_type_checking(node: ast.AST) -> bool:
    """Whether this is `if TYPE_CHECKING:`, whose imports never run."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def allowed(home: str, module: str) -> bool:
    if home == module.split(".")[0] or home == "cli" or module == "__version__":
        return True
    return any(module == grant or module.startswith(grant + ".") for grant in MAY_IMPORT[home])


def test_imports_point_one_way():
    wrong = []
    for path, (_, tree) in library().items():
        parts = path.relative_to(PACKAGE).parts
        if len(parts) == 1:
            continue
        wrong += [f"{place(path, node)} imports {module}" for node, module in imported_modules(path, tree) if not allowed(parts[0], module)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("home", "line", "right"),
    [
        ("cache", "from ..models.wan_dit import WanDiT", False),
        ("core", "from ..ops import rope", False),
        ("engine", "import longlive.train.trainer", False),
        ("engine", "from ..models import codec", True),
        ("data", "from ..models.codec import VideoCodec", True),
        ("data", "from ..models.wan_vae import WanVAE", False),
        ("world", "from ..train import optim", False),
        ("train", "from ..engine.rollout import Rollout", True),
        ("ops", "def f():\n    from ..models import wan_dit", False),
        ("world", "if TYPE_CHECKING:\n    from ..config import Config\nfrom ..core import log", True),
    ],
)
def test_the_import_rule_sees_relative_and_absolute_imports(home, line, right):
    modules = [module for _, module in imported_modules(PACKAGE / home / "some.py", ast.parse(line))]
    assert modules and all(allowed(home, module) for module in modules) is right


def test_every_package_has_an_import_rule():
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert packages - {"cli"} <= set(MAY_IMPORT)


def test_compat_is_for_users_only():
    wrong = [
        f"{place(path, node)}"
        for path, (_, tree) in library().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] in ("compat", "pipeline", "utils")
    ]
    assert not wrong, "\n".join(wrong)


def test_no_file_over_500_lines():
    wrong = [f"{path.relative_to(ROOT)} ({text.count(chr(10))} lines)" for path, (text, _) in sources().items() if text.count("\n") > 500]
    assert not wrong, "\n".join(wrong)


def test_no_function_over_80_lines():
    wrong = [
        f"{place(path, node)} {node.name} ({node.end_lineno - node.lineno + 1} lines)"
        for path, (_, tree) in sources().items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno - node.lineno + 1 > 80
    ]
    assert not wrong, "\n".join(wrong)


def test_no_getattr_with_a_default():
    wrong = [place(path, call) for path, (_, tree) in library().items() for call in calls(tree, "getattr") if len(call.args) == 3]
    assert not wrong, "\n".join(wrong)


def test_print_only_in_the_command_line():
    wrong = [place(path, call) for path, (_, tree) in library().items() if PACKAGE / "cli" not in path.parents for call in calls(tree, "print")]
    assert not wrong, "\n".join(wrong)


def test_environment_is_read_in_one_file():
    wrong = [
        place(path, node)
        for path, (_, tree) in library().items()
        if path != PACKAGE / "core" / "log.py"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
    ]
    assert not wrong, "\n".join(wrong)


def test_no_error_is_swallowed():
    wrong = []
    for path, (_, tree) in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler):
                broad = isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")
                silent = len(node.body) == 1 and isinstance(node.body[0], ast.Pass)
                if node.type is None or (broad and silent):
                    wrong.append(place(path, node))
    assert not wrong, "\n".join(wrong)


def test_the_dit_knows_no_deployment_words():
    text = (PACKAGE / "models" / "wan_dit.py").read_text(encoding="utf-8")
    wrong = [f"line {number}: {line.strip()}" for number, line in enumerate(text.split("\n"), 1) if FORBIDDEN_IN_DIT.search(line)]
    assert not wrong, "\n".join(wrong)


def test_video_library_is_imported_where_it_is_used():
    """`av` is needed for video files only; importing LongLive must not need it."""
    wrong = []
    for path, (_, tree) in library().items():
        for node in tree.body:
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            wrong += [place(path, node) for name in names if name.split(".")[0] in ("av", "torchvision", "omegaconf")]
    assert not wrong, "\n".join(wrong)


def test_entry_scripts_stay_thin():
    for name in ("train.py", "inference.py", "inference_sp.py"):
        assert (ROOT / name).read_text(encoding="utf-8").count("\n") < 20, name


def test_no_path_of_a_single_machine():
    wrong = []
    for path in repository_texts():
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
            if MACHINE_PATHS.search(line):
                wrong.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not wrong, "\n".join(wrong)


def repository_texts() -> list[Path]:
    folders = [*CODE_FOLDERS, "configs", "docs", "examples", ".ci"]
    found = [path for folder in folders for path in (ROOT / folder).rglob("*")] + list(ROOT.glob("*"))
    return sorted(p for p in found if p.is_file() and p.suffix in TEXT_ENDINGS and "__pycache__" not in p.parts and p.stat().st_size < 2 * MEBIBYTE)


def test_shipped_weights_stay_small():
    files = [path for path in (PACKAGE / "assets").rglob("*") if path.is_file()]
    sizes = {str(path.relative_to(PACKAGE)): path.stat().st_size / MEBIBYTE for path in files}
    assert all(size < 16 for size in sizes.values()), sizes
    assert sum(sizes.values()) < 36, sizes


CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_every_config_checks(path):
    from longlive.config import load_config

    load_config(path)


def test_configs_exist():
    assert len(CONFIGS) >= 10
