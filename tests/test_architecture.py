"""The house stands: imports point down, heavy libraries keep to their rooms, importing is light.

Read off the syntax trees, so an import inside a function counts like one at the top.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import checkpoints
import dynamics

FLOORS = [
    {"site_coordinates", "trees", "randomness", "config", "batch"},
    {"models"},
    {"recipe", "measures", "sites", "results"},
    {"tasks", "steps", "statistics"},
    {"engine"},
    {"patching", "attribution", "comparison"},
    {"sweeps"},
    {"training"},
    {"plots"},
    {"studies"},
    {"report"},
    {"cli"},
    {"__main__"},
]
"""Modules and packages of `dynamics`, the ground floor first."""

ROOMS = {
    "transformer_lens": ("dynamics.models",),
    "lightning": ("dynamics.training",),
    "torchmetrics": ("dynamics.training",),
    "matplotlib": ("dynamics.plots",),
    "jsonargparse": ("dynamics.cli",),
    "jinja2": ("dynamics.report",),
    "dask": ("dynamics.sweeps",),
    "distributed": ("dynamics.sweeps",),
}
"""Libraries that only some modules may know."""

COMPUTED = "a computed name"

LIGHT = {"torch", "numpy", "h5py", "checkpoints", *sys.stdlib_module_names}
"""All that `checkpoints` may import."""

GUESTS = {"checkpoints.formats.foreign": {"safetensors", "huggingface_hub"}}
"""What one of its modules may ask for besides, inside the functions that need it."""


@cache
def sources() -> Mapping[str, str]:
    """Dotted module name -> source text, of both packages."""
    found = {}
    for package in (dynamics, checkpoints):
        root = Path(package.__file__).parent
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root.parent).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(
                encoding="utf-8"
            )
    return found


@cache
def parsed(text: str) -> ast.Module:
    """The syntax tree of a module, which nobody changes."""
    return ast.parse(text)


@cache
def nodes(text: str) -> tuple[ast.AST, ...]:
    """Every import of a module and every call, wherever they stand."""
    kinds = (ast.Import, ast.ImportFrom, ast.Call)
    return tuple(node for node in ast.walk(parsed(text)) if isinstance(node, kinds))


def called(node: ast.Call) -> str:
    """The last name of what is called."""
    return str(getattr(node.func, "attr", getattr(node.func, "id", "")))


def imports(module: str, modules: Mapping[str, str]) -> set[str]:
    """Every module that one imports, by dotted name; `from package import module` counts as the module."""
    found: set[str] = set()
    for node in nodes(modules[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            home = node.module or ""
            if node.level:
                is_package = any(name.startswith(f"{module}.") for name in modules)
                above = module.split(".")[: (1 if is_package else 0) - node.level or None]
                home = ".".join([*above, *home.split(".")]).rstrip(".")
            found |= {inner if (inner := f"{home}.{a.name}") in modules else home for a in node.names}
        elif isinstance(node, ast.Call) and called(node).endswith(("import_module", "__import__")):
            found |= {a.value if isinstance(a, ast.Constant) else COMPUTED for a in node.args[:1]}
    return found


def floor(module: str) -> int | None:
    """Floor of a module of `dynamics`; None for the package itself and for modules without one."""
    room = module.split(".")[1] if "." in module else ""
    return next((n for n, rooms in enumerate(FLOORS) if room in rooms), None)


def climbing(modules: Mapping[str, str]) -> list[str]:
    """Imports within `dynamics` that point up, or reach into the package's front door."""
    wrong = []
    for module in modules:
        if module == "dynamics" or not module.startswith("dynamics"):
            continue
        for target in imports(module, modules):
            if target == "dynamics":
                wrong.append(f"{module} imports from the package's front door; import from the name's home")
            elif target.startswith("dynamics."):
                ours, theirs = floor(module), floor(target)
                if ours is None or theirs is None or theirs > ours:
                    wrong.append(f"{module} (floor {ours}) imports {target} (floor {theirs})")
    return wrong


def cycle(modules: Mapping[str, str]) -> list[str]:
    """Modules that import each other in a circle, or nothing. Front doors are left out: they re-export."""
    graph = {m: imports(m, modules) & set(modules) - {m} for m in modules if m != "dynamics"}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return list(error.args[1])
    return []


def trespassing(modules: Mapping[str, str]) -> list[str]:
    """Imports of a library outside the rooms it is kept to."""
    return [
        f"{module} imports {target}"
        for module in modules
        for target in imports(module, modules)
        for rooms in [ROOMS.get(target.split(".")[0])]
        if rooms is not None and not any(module == room or module.startswith(f"{room}.") for room in rooms)
    ]


class OutsideFunctions(ast.NodeTransformer):
    """What of a module runs when it is imported (class bodies included, their methods not)."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.Pass:
        """In place of a function, nothing."""
        return ast.Pass()


def heavy(modules: Mapping[str, str]) -> list[str]:
    """Imports of `checkpoints` beyond the standard library, torch, numpy, h5py and itself; its door is lazy.

    Guests may be asked for inside functions alone.
    """
    found = []
    for module in (name for name in modules if name.split(".")[0] == "checkpoints"):
        outside = ast.unparse(OutsideFunctions().visit(ast.parse(modules[module])))
        on_import = imports(module, {**modules, module: outside})
        for target in imports(module, modules) - ({COMPUTED} if module == "checkpoints" else set()):
            library = target.split(".")[0]
            invited = library in GUESTS.get(module, ()) and target not in on_import
            if library not in LIGHT and not invited:
                found.append(f"{module} imports {target}")
    return found


def printing(modules: Mapping[str, str]) -> list[str]:
    """Modules that call print, the command line aside."""
    return [
        f"{module}:{node.lineno}"
        for module, text in modules.items()
        if not f"{module}.".startswith("dynamics.cli.")
        for node in nodes(text)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]


# --- the packages as they are -----------------------------------------------------------------------------


def test_every_module_has_a_floor_and_every_floor_its_modules():
    found = {name.split(".")[1] for name in sources() if name.startswith("dynamics.")}
    named = set().union(*FLOORS)
    assert found == named, "give a new module its floor, and take away a removed one"
    assert sum(map(len, FLOORS)) == len(named)


def test_imports_point_down_or_stay_on_their_floor():
    assert climbing(sources()) == []


def test_no_modules_import_each_other_in_a_circle():
    assert cycle(sources()) == []


def test_heavy_libraries_are_imported_in_their_rooms_alone():
    assert trespassing(sources()) == []
    used = {target.split(".")[0] for module in sources() for target in imports(module, sources())}
    assert set(ROOMS) <= used


def test_checkpoints_knows_the_standard_library_torch_numpy_and_h5py_alone():
    assert heavy(sources()) == []


@pytest.mark.slow
def test_one_module_of_checkpoints_has_guests_and_they_come_when_asked():
    seen = {
        (module, target.split(".")[0])
        for module in sources()
        if module.split(".")[0] == "checkpoints"
        for target in imports(module, sources())
    }
    foreign = {(module, library) for module, library in seen if library not in LIGHT | {COMPUTED}}
    assert foreign == {(module, library) for module, guests in GUESTS.items() for library in guests}
    script = (
        "import sys, checkpoints.formats.foreign, checkpoints.trajectory;"
        "print(sorted({'safetensors', 'huggingface_hub', 'transformers'} & set(sys.modules)))"
    )
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert printed.stdout == "[]\n"


def test_only_the_package_door_imports_names_that_are_computed():
    computed = {m for m in sources() for target in imports(m, sources()) if target == COMPUTED}
    assert computed <= {"dynamics", "checkpoints"}


def test_the_library_never_prints():
    assert printing(sources()) == []


def test_no_module_is_called_utils_and_every_one_says_what_it_is():
    for name, text in sources().items():
        assert "util" not in name.split(".")[-1], name
        assert ast.get_docstring(parsed(text)), f"{name} has no docstring"


def shadowed(modules: Mapping[str, str]) -> list[str]:
    """Names a package re-exports that hide its own submodules."""
    return [
        f"{package}.{alias.name}"
        for package, text in modules.items()
        for node in parsed(text).body
        if isinstance(node, ast.ImportFrom) and node.module in modules and node.module != package
        for alias in node.names
        if f"{package}.{alias.asname or alias.name}" in modules
        and f"{node.module}.{alias.name}" not in modules
    ]


def test_no_package_exports_a_function_under_the_name_of_its_module():
    assert shadowed(sources()) == []


@pytest.mark.parametrize("package", ["dynamics", "dynamics.config", "checkpoints", "dynamics.cli"])
def test_importing_takes_no_heavy_library(package):
    script = (
        f"import sys, {package};"
        "print(sorted({'torch', 'transformer_lens', 'lightning', 'matplotlib', 'xarray'} & set(sys.modules)))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    assert printed == "[]\n"


def test_every_public_name_resolves_and_is_known_to_type_checkers():
    block = next(n for n in parsed(sources()["dynamics"]).body if isinstance(n, ast.If))
    typed = {alias.asname for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert set(dynamics.__all__) == typed
    assert len(dynamics.__all__) == len(typed)
    assert all(getattr(dynamics, name) is not None for name in dynamics.__all__)
    assert set(dynamics.__all__) <= set(dir(dynamics))


def test_an_unknown_public_name_is_refused_with_those_there_are():
    with pytest.raises(AttributeError, match=r"no attribute 'patch_gradient'; it has .*patch_gradients"):
        dynamics.patch_gradient  # noqa: B018


# --- verbs, engine, tests ---------------------------------------------------------------------------------

ROOT = Path(__file__).parents[1]
VERBS = ("patching", "attribution")
"""Packages of public verbs alone."""

APART = {"end_to_end", "scripts", "zoo", "oracles", "__init__", "conftest"}
"""What of `tests/` mirrors no room of the packages."""

SAYS_MORE = {"nouns", "package", "architecture"}
"""Tests at the root that are about all of the packages."""


def exported(package: str, modules: Mapping[str, str]) -> dict[str, set[str]]:
    """The public names of a package by the module they come from."""
    found: dict[str, set[str]] = {}
    for node in parsed(modules[package]).body:
        if isinstance(node, ast.ImportFrom):
            found.setdefault(node.module or "", set()).update(alias.name for alias in node.names)
    return found


def borrowed(package: str, modules: Mapping[str, str]) -> list[str]:
    """Imports of what a package of verbs does not export, from anywhere in the library."""
    public = exported(package, modules)
    return [
        f"{module} imports {alias.name} from {node.module}"
        for module, text in modules.items()
        for node in nodes(text)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{package}.")
        for alias in node.names
        if alias.name not in public.get(node.module or "", set())
    ]


def misplaced(test_files: Iterable[Path], modules: Iterable[str]) -> list[str]:
    """Test files that are not named after a module of their folder's room: test_MODULE.py, test_MODULE_THEME.py."""
    known = set(modules)
    wrong = []
    for path in test_files:
        room, said = path.parent.as_posix().strip("."), path.stem.removeprefix("test_")
        package = "dynamics" if not room else "checkpoints" if room.startswith("checkpoints") else "dynamics"
        inside = [part for part in room.split("/") if part and part != "checkpoints"]
        home = ".".join([package, *inside])
        words = said.split("_")
        names = {"_".join(words[:n]) for n in range(1, len(words) + 1)}
        if not room and said in SAYS_MORE:
            continue
        if said != "package" and not any(f"{home}.{name}" in known for name in names):
            wrong.append(path.as_posix())
    return wrong


@pytest.mark.parametrize("package", VERBS)
def test_every_file_of_verbs_holds_one_and_nothing_that_others_use(package):
    modules, home = sources(), f"dynamics.{package}"
    files = {name for name in modules if name.startswith(f"{home}.")}
    assert {module: len(names) for module, names in exported(home, modules).items()} == dict.fromkeys(
        files, 1
    )
    assert borrowed(home, modules) == []


def test_no_script_and_no_page_imports_the_engine():
    pages = [*ROOT.glob("scripts/**/*.py"), *ROOT.glob("*.md"), *ROOT.glob("docs/**/*.*")]
    assert len(pages) > 20
    assert [
        path.name
        for path in pages
        if re.search(r"^\s*(from|import) dynamics\.engine\b", path.read_text(encoding="utf-8"), re.MULTILINE)
    ] == []
    assert "engine" not in dynamics.__all__


def test_tests_stand_where_the_code_they_test_stands():
    below = [path.relative_to(ROOT / "tests") for path in ROOT.glob("tests/**/test_*.py")]
    assert misplaced([path for path in below if path.parts[0] not in APART], sources()) == []


# --- the checks themselves --------------------------------------------------------------------------------

HOUSE = {
    "dynamics": "",
    "dynamics.steps": "",
    "dynamics.steps.update": "",
    "dynamics.trees": "",
    "checkpoints": "",
}


@pytest.mark.parametrize(
    "line",
    [
        "import dynamics.steps.update",
        "from dynamics import steps",
        "from dynamics.steps import update",
        "from .steps.update import step",
        "def f():\n    from dynamics.steps.update import step",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from dynamics.steps import update",
        "from importlib import import_module\nimport_module('dynamics.steps')",
        "from dynamics import Batch",
        "import dynamics.unknown",
    ],
)
def test_an_import_that_climbs_is_seen_however_it_is_written(line):
    assert len(climbing({**HOUSE, "dynamics.trees": line})) == 1
    assert climbing(HOUSE) == []


def test_a_circle_is_seen_on_one_floor():
    circle = {
        **HOUSE,
        "dynamics.trees": "def f():\n    import dynamics.batch",
        "dynamics.batch": "from . import trees",
    }
    assert {"dynamics.trees", "dynamics.batch"} <= set(cycle(circle))
    assert cycle(HOUSE) == []


@pytest.mark.parametrize(
    "line", ["import matplotlib.pyplot as plt", "def f():\n    from lightning import Trainer"]
)
def test_a_library_out_of_its_room_is_seen(line):
    assert len(trespassing({**HOUSE, "dynamics.steps.update": line})) == 1
    assert trespassing({**HOUSE, "dynamics.models.other": "import transformer_lens"}) == []
    assert len(trespassing({**HOUSE, "dynamics.models_of_others": "import transformer_lens"})) == 1


@pytest.mark.parametrize(
    "line", ["from dynamics.batch import Batch", "import xarray", "def f():\n    import pandas"]
)
def test_a_heavy_import_of_checkpoints_is_seen(line):
    assert len(heavy({**HOUSE, "checkpoints": f"import json, torch, h5py\n{line}"})) == 1


@pytest.mark.parametrize(
    ("module", "line", "seen"),
    [
        ("checkpoints.formats.foreign", "def f():\n    from safetensors.torch import save", 0),
        ("checkpoints.formats.foreign", "import safetensors", 1),
        ("checkpoints.formats.foreign", "if True:\n    import safetensors", 1),
        ("checkpoints.formats.foreign", "def f():\n    import transformers", 1),
        ("checkpoints.store", "def f():\n    import safetensors", 1),
        ("checkpoints.formats.foreign.more", "def f():\n    import safetensors", 1),
    ],
)
def test_a_guest_at_the_top_or_of_another_module_is_seen(module, line, seen):
    assert len(heavy({**HOUSE, module: line})) == seen


def test_a_print_is_seen_and_the_word_in_a_text_is_not():
    assert printing({**HOUSE, "dynamics.trees": "'print(1)'\n\ndef f():\n    print(1)"}) == [
        "dynamics.trees:4"
    ]


def test_a_function_that_hides_its_module_is_seen():
    door = "from dynamics.steps.update import update"
    assert shadowed({**HOUSE, "dynamics.steps": door}) == ["dynamics.steps.update"]
    assert shadowed({**HOUSE, "dynamics.steps": "from dynamics.steps.update import step"}) == []


def test_what_is_borrowed_from_a_verb_is_seen():
    verbs = {
        "dynamics.patching": "from dynamics.patching.gradients import patch_gradients as patch_gradients",
        "dynamics.patching.gradients": "",
        "dynamics.sweeps.units": "from dynamics.patching.gradients import patch_gradients, patched",
    }
    assert borrowed("dynamics.patching", verbs) == [
        "dynamics.sweeps.units imports patched from dynamics.patching.gradients"
    ]


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        ("steps/test_update.py", False),
        ("steps/test_update_memory.py", False),
        ("steps/test_engine_update.py", True),
        ("test_trees.py", False),
        ("test_update.py", True),
        ("checkpoints/test_writer.py", True),
    ],
)
def test_a_test_file_named_after_no_module_of_its_room_is_seen(path, wrong):
    assert misplaced([Path(path)], HOUSE) == ([path] if wrong else [])
