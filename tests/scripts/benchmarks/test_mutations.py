"""The mutation check: what it changes, what it leaves alone, where it finds a place again, which tests it picks."""

import ast
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from coverage import CoverageData

from scripts.benchmarks import mutations as script

pytestmark = pytest.mark.slow

SAMPLE = '''
"""A module: 1 < 2 and 3 - 4."""
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    UNSEEN = 1 + 1

__all__ = ["first", "last"][0:2]
LIMIT: "Literal[5]" = 7


@cache(maxsize=9)
class Noun(Base, frozen=True):
    """Has 2 + 2."""

    size: tuple[int, 3] = (1, 0)

    def __repr__(self):
        return f"{self.size + 1}" + str(1 - 1)

    def method(self, x: "int > 3" = -2) -> "x or y":
        """Adds 1 to x: θ + 1."""
        if x > 0 and (x < LIMIT or x != 3):
            raise ValueError("more than " + str(LIMIT + 1))
        log.warning("%d", x - 1)
        assert x * 2, "x + x"
        θ = "θ" + name(x); x = x + 3  # two statements after a letter of two bytes
        self.x = x if not x else min(x, k=f)
        x += 1
        del x
        return f"{x:>{x + 1}}"


def free(rows, n):
    while rows is not None:
        if n in rows:
            continue
        rows = rows[n : n + 1][-1] if n >= 1 else rows * 2 / n
        stop(rows, True, end=1.5)
        break
    return [row for row in rows if row == n]
'''.encode()


def sample(path: str = "dynamics/room/file.py") -> list[script.Mutation]:
    return script.places(path, SAMPLE)


def texts(content: bytes) -> list[str | None]:
    nodes = ast.Module | ast.ClassDef | ast.FunctionDef
    return [ast.get_docstring(node) for node in ast.walk(ast.parse(content)) if isinstance(node, nodes)]


def test_every_mutation_compiles_and_is_another_program():
    program = ast.dump(ast.parse(SAMPLE))
    for mutation in sample():
        assert ast.dump(ast.parse(mutation.apply(SAMPLE))) != program, mutation


def test_every_kind_of_change_is_made():
    kinds = {mutation.operator.split(":")[0] for mutation in sample()}
    assert kinds == {
        "argument dropped",
        "arithmetic",
        "boolean",
        "comparison",
        "condition",
        "constant",
        "name",
        "return None",
        "slice bound",
        "statement dropped",
    }


@pytest.mark.parametrize(
    ("before", "operator", "after"),
    [
        ("if x > 0 and (x < LIMIT or x != 3):", "comparison: > to >=", "if x >= 0 and (x < LIMIT or x != 3):"),
        ("if x > 0 and (x < LIMIT or x != 3):", "boolean: or to and", "if x > 0 and ((x < LIMIT and x != 3)):"),
        ("if x > 0 and (x < LIMIT or x != 3):", "boolean: and to or", "if (x > 0 or (x < LIMIT or x != 3)):"),
        ("while rows is not None:", "comparison: is not to is", "while rows is None:"),
        ("while rows is not None:", "condition: not added", "while (not (rows is not None)):"),
        ("x += 1", "arithmetic: + to -", "x -= 1"),
        ("x += 1", "statement dropped", "pass"),
        ("stop(rows, True, end=1.5)", "constant: True to False", "stop(rows, False, end=1.5)"),
        ("stop(rows, True, end=1.5)", "constant: +1", "stop(rows, True, end=2.5)"),
        ("self.x = x if not x else min(x, k=f)", "condition: not dropped", "self.x = x if (x) else min(x, k=f)"),
        ("self.x = x if not x else min(x, k=f)", "name: min to max", "self.x = x if not x else max(x, k=f)"),
        ("self.x = x if not x else min(x, k=f)", "argument dropped", "self.x = x if not x else min(x)"),
        ("return [row for row in rows if row == n]", "return None", "return None"),
        ("LIMIT: \"Literal[5]\" = 7", "constant: -1", "LIMIT: \"Literal[5]\" = 6"),
    ],
)  # fmt: skip
def test_a_change_is_of_one_place(before, operator, after):
    assert after in [m.after for m in sample() if (m.before, m.operator) == (before, operator)]


def test_bytes_are_counted_not_letters():
    line = 'θ = "θ" + name(x); x = x + 3 # two statements after a letter of two bytes'
    changed = [m.after for m in sample() if m.before == line and m.operator == "arithmetic: + to -"]
    assert changed == [line.replace("x + 3", "x - 3")]


def test_texts_annotations_and_what_only_type_checkers_read_are_left_alone():
    kept = [
        "UNSEEN = 1 + 1",
        "__all__",
        "@cache",
        "class Noun",
        "tuple[int, 3] = (",
        "__repr__",
        'f"{self.size + 1}"',
    ]
    kept += [
        "int > 3",
        "x or y",
        '"more than " + str(LIMIT + 1)',
        "log.warning",
        "assert x * 2",
        'f"{x:>{x + 1}}"',
    ]
    for mutation in sample():
        changed = mutation.apply(SAMPLE).decode()
        assert texts(changed.encode()) == texts(SAMPLE)
        dropped = mutation.operator in ("statement dropped", "return None")
        missing = [text for text in kept if text not in changed]
        assert not missing or (dropped and mutation.before.startswith(("raise", "return f"))), mutation


@pytest.fixture(scope="module")
def library():
    """A part of it, for speed."""
    files = script.sources(Path(__file__).parents[3])
    return {path: content for path, content in files.items() if len(content) % 4 == 0}


def test_no_mutation_of_the_library_touches_a_docstring(library):
    for mutation in script.draw(library, 60, seed=1):
        content = library[mutation.path]
        assert texts(mutation.apply(content)) == texts(content), mutation


def test_a_draw_is_a_function_of_its_seed(library):
    first, again, other = (script.draw(library, 30, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert len(set(first)) == 30


def test_rooms_are_drawn_from_by_their_lines():
    files = {
        "dynamics/a/x.py": SAMPLE,
        "dynamics/b/x.py": SAMPLE,
        "dynamics/b/y.py": SAMPLE,
        "checkpoints/z.py": SAMPLE,
    }
    drawn = Counter(str(Path(mutation.path).parent) for mutation in script.draw(files, 16, seed=0))
    assert drawn == {"dynamics/a": 4, "dynamics/b": 8, "checkpoints": 4}


def test_a_place_is_found_again_after_its_file_moved_and_its_lines_shifted():
    moved = script.places("dynamics/hall/other.py", b"import os\n\n" + SAMPLE)
    for then, now in zip(sample(), moved, strict=True):
        assert script.find(asdict(then), moved) == now
        assert now.line == then.line + 2


def test_of_two_places_alike_the_one_in_the_same_function_is_meant():
    source = b"def near(x):\n    return x + 1\n\n\ndef far(x):\n    return x + 1\n"
    then = next(m for m in script.places("dynamics/a.py", source) if m.function == "far")
    found = script.find(asdict(then), script.places("dynamics/b.py", source))
    assert (found.function, found.after) == ("far", then.after)


def test_a_place_that_is_gone_or_might_be_two_is_not_found():
    mutation = sample()[0]
    assert script.find(asdict(replace(mutation, before="x = 1", after="x = 2")), sample()) is None
    twice = [
        replace(mutation, function="g", path="dynamics/b.py"),
        replace(mutation, function="h", path="dynamics/c.py"),
    ]
    assert script.find(asdict(replace(mutation, function="f", path="dynamics/a.py")), twice) is None


@pytest.fixture
def suite(tmp_path):
    """Line 2 is run at import, 3 by two tests, 4 by a set-up of a file of three, 5 by none, 6 in a process."""
    data = CoverageData(str(tmp_path / "coverage"))
    for context, lines in {
        "": [2],
        "tests/b.py::test_quick (call)": [2, 6],
        "tests/a.py::test_slow[x::y]|run": [3],
        "tests/b.py::test_quick|run": [3],
        "tests/c.py::test_first|setup": [4],
        "tests/gone.py::test_gone|run": [3],
    }.items():
        data.set_context(context)
        data.add_lines({"dynamics/a.py": lines})
    data.write()
    seconds = {"tests.a.test_slow[x::y]": 5, "tests.b.test_quick": 1, "tests.c.test_first": 60}
    seconds |= {"tests.c.Class.test_second": 2, "tests.c.test_third": 1}
    cases = (
        f'<testcase classname="{n.rpartition(".")[0]}" name="{n.rpartition(".")[2]}" time="{t}"/>'
        for n, t in seconds.items()
    )
    (tmp_path / "junit.xml").write_text(f"<testsuite>{''.join(cases)}</testsuite>")
    tests = ["tests/a.py::test_slow[x::y]", "tests/b.py::test_quick"]
    tests += ["tests/c.py::test_first", "tests/c.py::Class::test_second", "tests/c.py::test_third"]
    return script.Suite(tests, tmp_path / "junit.xml", tmp_path / "coverage")


def at(line: int) -> script.Mutation:
    return replace(sample()[0], path="dynamics/a.py", lines=(line, line))


def test_the_quickest_tests_of_a_line_come_first(suite):
    assert suite.affordable(suite.covering(at(3)), bound=120) == (
        ["tests/b.py::test_quick", "tests/a.py::test_slow[x::y]"],
        6,
    )


def test_tests_past_the_bound_are_not_run_but_one_is(suite):
    assert suite.affordable(suite.covering(at(3)), bound=2) == (["tests/b.py::test_quick"], 1)
    assert suite.affordable(suite.covering(at(3)), bound=0) == (["tests/b.py::test_quick"], 1)


def test_what_a_shared_fixture_runs_is_seen_by_every_test_of_its_file(suite):
    chosen, _ = suite.affordable(suite.covering(at(4)), bound=1000)
    assert chosen == ["tests/c.py::test_first", "tests/c.py::test_third", "tests/c.py::Class::test_second"]


def test_what_a_process_runs_that_a_test_starts_is_covered_by_the_test(suite):
    assert suite.affordable(suite.covering(at(6)), bound=1000) == (["tests/b.py::test_quick"], 1)


def test_what_is_run_at_import_may_be_seen_by_every_test_and_what_is_not_run_by_none(suite):
    assert set(suite.affordable(suite.covering(at(2)), bound=1000)[0]) == set(suite.seconds)
    assert suite.affordable(suite.covering(at(5)), bound=1000) == ([], 0.0)


def test_a_mutation_is_caught_where_a_test_fails_and_its_tree_is_put_back(tmp_path, suite):
    source = b"def double(n):\n    return n * 2\n\n\ndef half(n):\n    return n / 2\n"
    files = {"dynamics/__init__.py": b"", "dynamics/numbers.py": source}
    files["tests/a.py"] = (
        b"from dynamics.numbers import double, half\n\ndef test_it():\n    assert double(3) == 6 and half(0) == 0\n"
    )
    for name, content in files.items():
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_bytes(content)
    for line in (2, 6):
        suite.data.set_context("tests/a.py::test_it|run")
        suite.data.add_lines({"dynamics/numbers.py": [line]})
    suite.seconds = {"tests/a.py::test_it": 0.1}

    def verdict(operator):
        mutation = next(m for m in script.places("dynamics/numbers.py", source) if m.operator == operator)
        found = script.judged(mutation, suite, tmp_path / "tree", bound=10)
        assert (tmp_path / "tree/dynamics/numbers.py").read_bytes() == source
        return found["verdict"], found["by"], found["tests"]

    assert verdict("arithmetic: * to /") == ("caught", "tests/a.py::test_it", 1)
    assert verdict("arithmetic: / to *") == ("survived", "", 1)
