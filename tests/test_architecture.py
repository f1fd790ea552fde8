"""The rules of ARCHITECTURE.md that a program can check: imports, sizes, and what is never written.

They are read from the syntax trees, without importing anything, so that they hold for code that only some machines run.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("ldt_schedules", "patches")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

LAYERS = ("planning", "comm", "runtime", "megatron", "training", "cli")
"""From the bottom up; a layer imports itself and those before it."""
LAUNCHERS = {"megatron_lm": set(), "mindspeed": {"megatron_lm"}}
"""Beside `training`, in the user's own launcher: each imports what `megatron` may, the patches, and these."""
COMMON = {
    "errors": set(),
    "topology": {"errors"},
    "device": set(),
    "cpu_adaptor": set(),
}
"""What stands beside the layers, and what of the project each may import."""
ALLOWED = {
    **{layer: {*LAYERS[: LAYERS.index(layer) + 1], *COMMON} for layer in LAYERS[1:]},
    **COMMON,
    "planning": {"planning"},
    "rendering": {"rendering", "planning"},
}
ALLOWED |= {name: {name, "patches", *ALLOWED["megatron"], *more} for name, more in LAUNCHERS.items()}
ALLOWED["megatron_adaptor"] = {"cli"}
ALLOWED["training"] |= {"patches", "rendering"}
ALLOWED["cli"] |= {"patches", "rendering", *LAUNCHERS}

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 70
BLOCKED_FOR_PLANNING = ("torch", "numpy", "yaml", "megatron", "pydantic", "rich", "typer")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def unit_of(module: str) -> str:
    """`ldt_schedules.comm.link` -> `comm`; `ldt_schedules` itself -> `` (it holds a version, nothing else)."""
    package, _, rest = module.partition(".")
    return "patches" if package == "patches" else rest.partition(".")[0]


def module_of(path: Path) -> str:
    return name_of(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    """`(line, module)` of every import of the project's own packages, those inside functions included."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: write imports from the top, not relative ones"
            # `from ldt_schedules import device` imports a module, `from ldt_schedules.device import x` a name of one.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name.partition(".")[0] in PACKAGES)


def dotted(node: ast.expr) -> str:
    """`torch.distributed.send` of an attribute chain; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return ""


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """`(name, lines)`; a docstring is not counted."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            has_docstring = (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            )
            docstring = (first.end_lineno or 0) - first.lineno + 1 if has_docstring else 0
            yield node.name, (node.end_lineno or 0) - node.lineno + 1 - docstring


def test_there_is_something_to_check() -> None:
    assert len(FILES) >= 20, [name_of(path) for path in FILES]
    units = {unit_of(module_of(path)) for path in FILES}
    assert units >= {*LAYERS, "rendering", "patches"}, units


def test_every_unit_has_a_place_in_the_rule() -> None:
    units = {unit_of(module_of(path)) for path in FILES} - {"", "__main__", "patches"}
    assert units <= set(ALLOWED), f"say in ARCHITECTURE.md and here what {units - set(ALLOWED)} may import"


def test_imports_point_one_way() -> None:
    wrong = []
    for path in FILES:
        own = unit_of(module_of(path))
        if own not in ALLOWED:
            continue  # patches may import all of ldt_schedules; __main__ and the package itself are checked below
        for line, module in imported_modules(path):
            imported = unit_of(module)
            if imported not in ALLOWED[own] and imported != "__version__":
                wrong.append(f"{name_of(path)}:{line} imports {module}; {own} may import {sorted(ALLOWED[own])}")
    assert not wrong, "\n".join(wrong)


def test_importing_the_package_imports_nothing() -> None:
    """`ldt_schedules.planning` cannot be imported without `ldt_schedules/__init__.py`."""
    assert not any(
        isinstance(n, ast.Import | ast.ImportFrom) for n in ast.walk(tree(ROOT / "ldt_schedules/__init__.py"))
    )


def test_planning_needs_only_the_standard_library() -> None:
    """It plans, lowers, validates, simulates and draws where none of the heavy packages can be imported."""
    program = f"""
    import importlib, pkgutil, sys
    sys.modules.update(dict.fromkeys({BLOCKED_FOR_PLANNING!r}))
    import ldt_schedules.planning as planning
    import ldt_schedules.rendering as rendering
    count = 0
    for package in (planning, rendering):
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if module.name != "ldt_schedules.rendering.picture":  # matplotlib's
                importlib.import_module(module.name)
                count += 1
    table = planning.plan("ldt_1f1b", planning.Layout.u(3), 4)
    assert planning.validate(table) == []
    assert planning.simulate(table.layout, table.ranks).makespan > 0
    assert count >= 10, count
    loaded = [name for name in {BLOCKED_FOR_PLANNING!r} if sys.modules[name] is not None]
    assert not loaded, loaded
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr


def test_budgets() -> None:
    too_long = []
    for path in FILES:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MAX_FILE_LINES:
            too_long.append(f"{name_of(path)}: {lines} lines, at most {MAX_FILE_LINES}")
        too_long += [
            f"{name_of(path)}, {function}: {length} lines, at most {MAX_FUNCTION_LINES}"
            for function, length in functions(path)
            if length > MAX_FUNCTION_LINES
        ]
    assert not too_long, "split these:\n" + "\n".join(too_long)


@cache
def names_of_torch_distributed(path: Path) -> frozenset[str]:
    """`torch.distributed` and what the file calls it or its parts."""
    names = {"torch.distributed"}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.asname for alias in node.names if alias.asname and _is_distributed(alias.name)}
        elif isinstance(node, ast.ImportFrom) and node.module == "torch":
            names |= {alias.asname or alias.name for alias in node.names if alias.name == "distributed"}
        elif isinstance(node, ast.ImportFrom) and node.module and _is_distributed(node.module):
            names |= {alias.asname or alias.name for alias in node.names}
    return frozenset(names)


def _is_distributed(module: str) -> bool:
    return module == "torch.distributed" or module.startswith("torch.distributed.")


def writes_to_torch_distributed(path: Path) -> Iterator[str]:
    """Assignments to, deletions of and setattr on an attribute of torch.distributed."""
    names = names_of_torch_distributed(path)
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            owner = dotted(node.value)
        elif isinstance(node, ast.Call) and dotted(node.func) in ("setattr", "delattr") and node.args:
            owner = dotted(node.args[0])
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # A patch's target: "torch.distributed:barrier".
            owner = node.value.partition(":")[0] if re.fullmatch(r"[\w.]+:[\w.]+", node.value) else ""
        else:
            continue
        if any(owner == name or owner.startswith(name + ".") for name in names):
            yield f"{name_of(path)}:{node.lineno}: replaces something of {owner}"


def test_torch_distributed_is_never_replaced() -> None:
    wrong = [line for path in FILES for line in writes_to_torch_distributed(path)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "line",
    [
        "import torch\ntorch.distributed.barrier = print",
        "import torch.distributed as dist\ndist.barrier = print",
        "from torch import distributed as d\nsetattr(d, 'send', print)",
        "from torch.distributed import distributed_c10d as c\nc.send = print",
        "import torch\ndel torch.distributed.barrier",
        "Patch(target='torch.distributed:barrier')",
    ],
)
def test_a_replacement_would_be_seen(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "bad.py"
    path.write_text(line)
    assert list(writes_to_torch_distributed(path))


def test_only_the_command_line_and_pictures_print() -> None:
    """Everything else raises, returns text, or logs."""
    wrong = [
        f"{name_of(path)}:{node.lineno}"
        for path in FILES
        if unit_of(module_of(path)) not in ("cli", "rendering")
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and dotted(node.func) == "print"
    ]
    assert not wrong, wrong


def test_a_todo_says_why() -> None:
    """`TODO(#12): ...` or `TODO: because ...`, in words enough to act on."""
    wrong = []
    for path in [*FILES, *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "scripts").iterdir())]:
        if path == Path(__file__) or not path.is_file():
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            found = re.search(r"\b(TODO|FIXME|XXX)\b(.*)", line)
            if found and not re.match(r"(\(#\d+\))?: (\S+ ){3,}\S+", found[2]):
                wrong.append(f"{name_of(path)}:{number}: {line.strip()}")
    assert not wrong, "\n".join(wrong)


def test_the_readme_gives_exactly_two_commands_to_start() -> None:
    """Between "Start" and the next heading there are two code blocks of one line each, and both scripts exist."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    start = re.search(r"^## Start\n(.*?)^## ", readme, re.DOTALL | re.MULTILINE)
    assert start is not None
    commands = re.findall(r"```bash\n(.*?)\n```", start[1], re.DOTALL)
    assert commands == ["bash scripts/quickstart.sh", "bash scripts/test.sh"]
    for command in commands:
        assert (ROOT / command.removeprefix("bash ")).is_file()
