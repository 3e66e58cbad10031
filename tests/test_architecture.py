"""The dependency rules of the house, read from the source with `ast`.

Oracle: the tables below. Every rule is also shown to catch a violation written on purpose.

Why more than 400 lines: all rules share one reader of imports, and each stands with its violation.
"""

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import ROOT

# Folder of metro/ -> the parts of metro/ that it may import beside itself.
MAY_IMPORT = {
    "utils": set(),
    "environment": {"utils"},
    "registration": {"models"},
    "modeling": set(),
    "ops": set(),
    "fusion": {"modeling", "ops"},
    "sharding": {"utils"},
    "processes": {"utils", "models"},
    "data": {"utils", "modeling"},
    "pretraining": {"utils", "modeling", "ops", "fusion", "sharding", "data"},
    "models": {"utils", "modeling", "ops", "sharding", "data", "pretraining"},
    "conversion": {"utils", "modeling", "sharding", "data", "pretraining", "models"},
    "training": {
        "utils",
        "modeling",
        "ops",
        "fusion",
        "sharding",
        "processes",
        "data",
        "pretraining",
        "models",
        "conversion",
    },
    "finetuning": {
        "utils",
        "modeling",
        "ops",
        "fusion",
        "sharding",
        "processes",
        "data",
        "models",
        "conversion",
        "evaluation",
        "training",
    },
    "evaluation": {"utils", "modeling", "ops", "fusion", "processes", "data", "models"},
    "generation": {"utils", "models"},
    "planning": {"utils", "models", "pretraining", "finetuning"},
    "ranking": {"utils", "processes", "data", "models", "evaluation"},
    "integrations": {"utils", "data", "models", "generation", "evaluation", "ranking"},
}
ON_TOP = {"cli", "fairseq_plugins", "scripts", "benchmarks", "tests"}
EXPORTED_FILES_MAY_IMPORT = set(sys.stdlib_module_names) | {
    "torch",
    "transformers",
    "sentencepiece",
}
OPTIONAL_PACKAGES = ("fairseq", "fairseq_cli", "hydra", "omegaconf", "triton", "datasets")
# Imported for training only: the base class of transformers takes every package it finds installed.
NEEDS_OPTIONAL_PACKAGES = {
    "metro.finetuning.trainer",
    "metro.integrations.lm_eval",
    "metro.training.trainer",
    "metro.training.pretraining_trainer",
}
# What fairseq_plugins may call of torch and NumPy (torch.NAME..., numpy.NAME), and what for.
PLUGINS_MAY_CALL = {
    "cuda": "which devices there are",
    "distributed": "joining processes",
    "serialization": "checkpoints",
    "load": "checkpoints",
    "save": "checkpoints",
    "tensor": "a flag for other processes",
    "empty": "the buffer of such a message",
    "frombuffer": "its bytes",
    "asarray": "a view of what fairseq holds",
    "isfinite": "the check of losses",
    "stack": "several checks, waited for once",
}
MOST_LINES, MOST_FILES = 400, 13
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|Users|root|work|mnt|scratch)/[\w.-]+")


class Import(NamedTuple):
    """One imported module, as an absolute dotted name."""

    file: str
    line: int
    module: str


def python_files(root: Path, *folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((root / folder).rglob("*.py"))


def read_imports(root: Path, path: Path) -> list[Import]:
    """Every import of a file, those inside functions too, relative ones resolved."""
    package = path.relative_to(root).with_suffix("").parts[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            stem = ".".join([*base, node.module] if node.module else base)
            # `from metro import cli` imports metro.cli: the names may be modules.
            names = [f"{stem}.{alias.name}" for alias in node.names]
        else:
            continue
        found += [Import(str(path.relative_to(root)), node.lineno, name) for name in names]
    return found


def wrong_directions(root: Path) -> list[Import]:
    """Imports that go against MAY_IMPORT, and imports of what is on top from below."""
    wrong = []
    for path in python_files(root, "metro"):
        part = path.relative_to(root / "metro").with_suffix("").parts[0]
        if part in ("__init__", "cli"):  # the lazy table; the command line, which is on top
            continue
        for imported in read_imports(root, path):
            names = imported.module.split(".")
            if names[0] in ON_TOP or names[:2] == ["metro", "cli"]:
                wrong.append(imported)
            elif names[0] == "metro" and len(names) > 1 and names[1] != "__version__":
                if names[1] != part and names[1] not in MAY_IMPORT.get(part, set()):
                    wrong.append(imported)
    return wrong


def import_circles(root: Path) -> list[list[str]]:
    """The first circle of metro's modules that import each other, lazily or not; else nothing."""
    paths = {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for path in python_files(root, "metro")
    }
    paths.pop("metro", None)  # the lazy table
    imported = {
        name: {
            other if other in paths else other.rpartition(".")[0]
            for _, _, other in read_imports(root, path)
        }
        & set(paths)
        for name, path in paths.items()
    }
    try:
        TopologicalSorter(imported).prepare()
    except CycleError as error:
        return [error.args[1]]
    return []


def crowded_folders(root: Path) -> list[str]:
    """Folders that show more than MOST_FILES modules at once."""
    files = Counter(
        path.parent
        for path in python_files(root, "metro", "fairseq_plugins")
        if path.name != "__init__.py"
    )
    return [str(folder.relative_to(root)) for folder in files if files[folder] > MOST_FILES]


def fairseq_outside_its_folder(root: Path) -> list[Import]:
    return [
        imported
        for path in python_files(root, "metro", "scripts", "benchmarks")
        for imported in read_imports(root, path)
        if imported.module.split(".")[0] in ("fairseq", "fairseq_cli", "fairseq_plugins")
    ]


def tensor_arithmetic_in_plugins(root: Path) -> list[str]:
    """Calls of torch's and NumPy's functions, however imported, that PLUGINS_MAY_CALL lacks."""
    wrong = []
    for path in python_files(root, "fairseq_plugins"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {}  # as used in the file -> absolute
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    top = alias.name.split(".")[0]
                    names[alias.asname or top] = alias.name if alias.asname else top
            elif isinstance(node, ast.ImportFrom) and node.module:
                names |= {
                    alias.asname or alias.name: f"{node.module}.{alias.name}"
                    for alias in node.names
                }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and re.fullmatch(r"[\w.]+", ast.unparse(node.func)):
                first, *rest = ast.unparse(node.func).split(".")
                called = ".".join([names.get(first, ""), *rest]).split(".")
                if called[0] in ("torch", "numpy") and called[1] not in PLUGINS_MAY_CALL:
                    wrong.append(f"{path.relative_to(root)}:{node.lineno}: {'.'.join(called)}")
    return wrong


def foreign_imports_of_exported_files(root: Path) -> list[Import]:
    """An exported folder holds these files flat: they know each other as `.name` only."""
    wrong = []
    for path in python_files(root, "metro/modeling"):
        for imported in read_imports(root, path):
            names = imported.module.split(".")
            sibling = names[:2] == ["metro", "modeling"] and len(names) > 2
            if not sibling and names[0] not in EXPORTED_FILES_MAY_IMPORT:
                wrong.append(imported)
    return wrong


def absolute_sibling_imports(root: Path) -> list[str]:
    return [
        str(path.relative_to(root))
        for path in python_files(root, "metro/modeling")
        if re.search(r"^\s*(from|import) metro\b", path.read_text(encoding="utf-8"), re.M)
    ]


def long_files_without_reason(root: Path) -> list[str]:
    """Files whose module docstring does not say why they have "more than 400 lines"."""
    wrong = []
    for path in python_files(root, "metro", "fairseq_plugins", "scripts", "benchmarks"):
        source = path.read_text(encoding="utf-8")
        if len(source.splitlines()) > MOST_LINES:
            if f"more than {MOST_LINES} lines" not in (ast.get_docstring(ast.parse(source)) or ""):
                wrong.append(str(path.relative_to(root)))
    return wrong


def machine_paths(root: Path) -> list[str]:
    """Absolute paths of somebody's machine in anything we ship."""
    found = []
    for folder in ("metro", "fairseq_plugins", "scripts", "benchmarks", "tests"):
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in {".py", ".sh", ".yaml", ".md", ".json"} and path.is_file():
                for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                    if MACHINE_PATH.search(line) and "example path" not in line:
                        found.append(f"{path.relative_to(root)}:{number}: {line.strip()}")
    return found


def folders_without_init(root: Path) -> list[str]:
    """Such folders work in a checkout and are missing from an installed METRO."""
    return sorted(
        {
            str(path.parent.relative_to(root))
            for path in python_files(root, "metro", "fairseq_plugins")
            if not (path.parent / "__init__.py").exists()
        }
    )


def test_every_part_of_metro_has_a_place_in_the_order():
    parts = {
        path.relative_to(ROOT / "metro").with_suffix("").parts[0]
        for path in python_files(ROOT, "metro")
    }
    assert parts - {"__init__", "cli"} <= set(MAY_IMPORT), "add the new part to MAY_IMPORT"


BLOCK_AND_IMPORT = """
import importlib, importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"blocked by the test: {{name}}", name=name)

sys.meta_path.insert(0, Blocked())
for module in {modules!r}:
    try:
        importlib.import_module(module)
    except Exception as error:
        print(f"{{module}}: {{type(error).__name__}}: {{error}}")
"""


def failing_imports(root: Path) -> list[str]:
    """Modules of metro that do not import where the optional packages are missing.

    The kernels are written in Triton; the operations import them where one is used.
    """
    modules = [
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        for path in python_files(root, "metro")
        if path.parent != root / "metro/ops/kernels"
    ]
    modules = [module for module in modules if module not in NEEDS_OPTIONAL_PACKAGES]
    code = BLOCK_AND_IMPORT.format(blocked=set(OPTIONAL_PACKAGES), modules=modules)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


RULES = [
    wrong_directions,
    import_circles,
    crowded_folders,
    fairseq_outside_its_folder,
    tensor_arithmetic_in_plugins,
    foreign_imports_of_exported_files,
    absolute_sibling_imports,
    long_files_without_reason,
    machine_paths,
    folders_without_init,
    failing_imports,
]


@pytest.mark.parametrize("violations_of", RULES, ids=lambda rule: rule.__name__)
def test_the_rule_is_kept(violations_of):
    assert violations_of(ROOT) == []


@pytest.mark.parametrize("module", ["metro", "metro.cli.main"])
def test_import_is_light(module):
    code = f"import {module}, sys; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# The rules themselves: each is given a tree that breaks it once.


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_direction_rule_catches_every_way_of_writing_the_import(tmp_path):
    root = write(
        tmp_path,
        {
            "metro/modeling/a.py": "from metro.pretraining import masking\n",
            "metro/modeling/b.py": "def f():\n    from ..data import corpus\n",
            "metro/ops/c.py": "import metro.modeling.a\n",
            "metro/data/d.py": "from metro import cli\n",
            "metro/evaluation/e.py": "import fairseq_plugins.tasks\n",
            "metro/pretraining/fine.py": "from ..modeling import a\nfrom . import losses\n",
            "metro/cli/fine.py": "from metro.data import corpus\n",
        },
    )
    assert [(wrong.file, wrong.line, wrong.module) for wrong in wrong_directions(root)] == [
        ("metro/data/d.py", 1, "metro.cli"),
        ("metro/evaluation/e.py", 1, "fairseq_plugins.tasks"),
        ("metro/modeling/a.py", 1, "metro.pretraining.masking"),
        ("metro/modeling/b.py", 2, "metro.data.corpus"),
        ("metro/ops/c.py", 1, "metro.modeling.a"),
    ]


@pytest.mark.parametrize("lazy", ["", "def f():\n    "])
def test_circle_rule_catches_lazy_imports_too(tmp_path, lazy):
    files = {
        "metro/__init__.py": "from metro.cli import main\n",
        "metro/cli/main.py": "import metro\n",
        "metro/ops/a.py": "from metro.ops import b\nfrom metro.ops.c import f\n",
        "metro/ops/b.py": "from .c import f\n",
        "metro/ops/c.py": f"{lazy}from metro.ops.a import g\n",
    }
    (circle,) = import_circles(write(tmp_path, files))
    assert {"metro.ops.a", "metro.ops.c"} <= set(circle)
    (tmp_path / "metro/ops/c.py").write_text("")
    assert import_circles(tmp_path) == []


def test_fairseq_rule_catches_a_local_import(tmp_path):
    root = write(
        tmp_path,
        {
            "metro/data/a.py": "def f():\n    from fairseq.data import Dictionary\n",
            "fairseq_plugins/fine.py": "import fairseq\n",
        },
    )
    assert [wrong.file for wrong in fairseq_outside_its_folder(root)] == ["metro/data/a.py"]


def test_arithmetic_rule_catches_every_way_of_writing_the_call(tmp_path):
    root = write(
        tmp_path,
        {
            "fairseq_plugins/a.py": "import torch\nx = torch.where(a, b, c)\n",
            "fairseq_plugins/b.py": "import torch.nn.functional as F\nx = F.softmax(x)\n",
            "fairseq_plugins/c.py": "from torch.nn import functional\nfunctional.relu(x)\n",
            "fairseq_plugins/d.py": "def f():\n    from numpy import cumsum\n    cumsum(x)\n",
            "fairseq_plugins/fine.py": "import torch\nx = torch.load(p).to(y)\nx.sum()\n",
        },
    )
    assert tensor_arithmetic_in_plugins(root) == [
        "fairseq_plugins/a.py:2: torch.where",
        "fairseq_plugins/b.py:2: torch.nn.functional.softmax",
        "fairseq_plugins/c.py:2: torch.nn.functional.relu",
        "fairseq_plugins/d.py:3: numpy.cumsum",
    ]


def test_exported_files_rule_catches_other_packages_and_absolute_siblings(tmp_path):
    root = write(
        tmp_path,
        {
            "metro/modeling/a.py": "import numpy\nimport torch\nfrom .b import B\n",
            "metro/modeling/b.py": "from metro.modeling.a import A\n",
            "metro/modeling/c.py": "from ..ops import rms\n",
        },
    )
    wrong = [imported.module for imported in foreign_imports_of_exported_files(root)]
    assert wrong == ["numpy", "metro.ops.rms"]
    assert absolute_sibling_imports(root) == ["metro/modeling/b.py"]


def test_file_rules_catch_violations(tmp_path):
    lines = "x = 1\n" * (MOST_LINES + 1)
    somewhere = "/ho" + "me/someone/data"  # in two pieces: this file is checked as well
    root = write(
        tmp_path,
        {
            "metro/data/long.py": lines,
            "metro/data/excused.py": '"""A table.\n\nWhy more than 400 lines: so.\n"""\n' + lines,
            "scripts/run.sh": f"cd {somewhere}\n",
            **{f"metro/data/text/{i}.py": "" for i in range(MOST_FILES)},
            **{f"metro/data/prompts/{i}.py": "" for i in range(MOST_FILES + 1)},
        },
    )
    assert crowded_folders(root) == ["metro/data/prompts"]
    assert long_files_without_reason(root) == ["metro/data/long.py"]
    assert machine_paths(root) == [f"scripts/run.sh:1: cd {somewhere}"]
    assert "metro/data" in folders_without_init(root)


def test_import_rule_catches_a_module_that_needs_an_optional_package(tmp_path):
    files = {"metro/__init__.py": "", "metro/a.py": "import datasets\n", "metro/b.py": ""}
    files["metro/ops/kernels/c.py"] = "import triton\n"
    failing = failing_imports(write(tmp_path, files))
    assert failing == ["metro.a: ModuleNotFoundError: blocked by the test: datasets"]
