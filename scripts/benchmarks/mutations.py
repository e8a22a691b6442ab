"""Mutation check: which small errors in the library the tests notice. About half a minute a mutation.

    .venv/bin/python -m pytest --cov --cov-config=FILE --cov-context=test --junitxml=durations.xml
    .venv/bin/python scripts/benchmarks/mutations.py --coverage .coverage --durations durations.xml --out now.json

FILE sets `source = dynamics, checkpoints`, `relative_files = true` and, for tests that start processes,
`parallel = true` and `context = ${PYTEST_CURRENT_TEST-}` with FILE in the variable COVERAGE_PROCESS_START.

A mutation changes one place of the syntax tree (`changes` lists how) in a clone of the last commit; the tests that
cover its lines run there, cheapest files first, until one fails or `--bound` is spent. Later, `--again then.json`
finds the same places by function and text where files have moved, and tells which mutations were caught then and
survive now.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from itertools import pairwise, takewhile
from operator import eq, itemgetter
from pathlib import Path
from queue import SimpleQueue
from xml.etree import ElementTree

from coverage import CoverageData

BOUNDARY = {"<": "<=", "<=": "<", ">": ">=", ">=": ">"}
OPPOSITE = {"<": ">=", "<=": ">", ">": "<=", ">=": "<", "==": "!=", "is": "is not", "in": "not in"}
OPPOSITE |= {"!=": "==", "is not": "is", "not in": "in"}
ARITHMETIC = {ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*")}
NAMES = {
    "min": "max",
    "minimum": "maximum",
    "amin": "amax",
    "argmin": "argmax",
    "any": "all",
    "floor": "ceil",
}
NAMES |= {other: name for name, other in NAMES.items()}
LOGGING = {"debug", "info", "warn", "warning", "error", "exception", "critical", "log"}
UNTOUCHED = {"annotation", "returns", "decorator_list", "bases", "exc", "cause"}
"""Fields of the syntax tree: annotations, decorators, errors and their texts."""

Change = tuple[str, int, int, str]
"""An operator, the first and last byte that it replaces, and by what."""


@dataclass(frozen=True)
class Mutation:
    """One changed place; `nth` of those with the same function and text. Tests are looked up by `lines`."""

    path: str
    line: int
    function: str
    operator: str
    before: str
    after: str
    nth: int
    lines: tuple[int, int]
    replaced: Change

    def apply(self, content: bytes) -> bytes:
        _, start, end, text = self.replaced
        return content[:start] + text.encode() + content[end:]


class Source:
    """A file's bytes, and where a node of its syntax tree stands in them."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.starts = [0]
        for line in content.split(b"\n"):
            self.starts.append(self.starts[-1] + len(line) + 1)

    def span(self, node: ast.AST) -> tuple[int, int]:
        start = self.starts[node.lineno - 1] + node.col_offset
        return start, self.starts[node.end_lineno - 1] + node.end_col_offset

    def text(self, start: int, end: int) -> str:
        return self.content[start:end].decode()

    def around(self, start: int, end: int, instead: str) -> str:
        """The lines that hold these bytes, as one, with `instead` in their place."""
        first, last = self.content.rfind(b"\n", 0, start) + 1, self.content.find(b"\n", end)
        return " ".join((self.text(first, start) + instead + self.text(end, last)).split())


def changes(node: ast.AST, source: Source) -> Iterator[Change]:
    """Every small change of one node."""

    def between(left: ast.AST, right: ast.AST, kind: str, old: str, new: str) -> Change:
        start, end = source.span(left)[1], source.span(right)[0]
        return f"{kind}: {old} to {new}", start, end, source.text(start, end).replace(old, new, 1)

    match node:
        case ast.Compare(left=left, comparators=right):
            for a, b in pairwise([left, *right]):
                old = " ".join(source.text(source.span(a)[1], source.span(b)[0]).strip("() \n").split())
                others = [table[old] for table in (BOUNDARY, OPPOSITE) if old in table]
                yield from (between(a, b, "comparison", old, new) for new in others)
        case ast.BinOp(left=left, right=right, op=op) if type(op) in ARITHMETIC:
            if not any(isinstance(n, ast.JoinedStr | ast.List) or is_text(n) for n in (left, right)):
                yield between(left, right, "arithmetic", *ARITHMETIC[type(op)])
        case ast.AugAssign(target=left, value=right, op=op):
            if type(op) in ARITHMETIC:
                yield between(left, right, "arithmetic", *ARITHMETIC[type(op)])
            yield "statement dropped", *source.span(node), "pass"
        case ast.BoolOp(op=op, values=values):
            old, new = ("and", "or") if isinstance(op, ast.And) else ("or", "and")
            (place, end), text = source.span(node), "("
            for a, b in pairwise(values):
                _, gap, after, joint = between(a, b, "", old, new)
                text, place = text + source.text(place, gap) + joint, after
            yield f"boolean: {old} to {new}", source.span(node)[0], end, text + source.text(place, end) + ")"
        case ast.UnaryOp(op=ast.USub()):
            yield "arithmetic: minus dropped", source.span(node)[0], source.span(node)[0] + 1, " "
        case ast.Constant(value=bool(value)):
            yield f"constant: {value} to {not value}", *source.span(node), repr(not value)
        case ast.Constant(value=int(value) | float(value)):
            for by in (1, -1) if value >= 1 else (1,):
                yield f"constant: {by:+}", *source.span(node), repr(value + by)
        case ast.Return(value=ast.expr() as value) if ast.unparse(value) != "None":
            yield "return None", *source.span(value), "None"
        case ast.Slice(lower=lower, upper=upper):
            for bound in (lower, upper):
                if bound and not isinstance(bound, ast.Constant):
                    yield "slice bound: +1", *source.span(bound), f"({source.text(*source.span(bound))}) + 1"
        case ast.Call(func=called, args=args, keywords=keywords):
            name, end = ast.unparse(called).rpartition(".")[2], source.span(called)[1]
            if name in NAMES:
                yield f"name: {name} to {NAMES[name]}", end - len(name), end, NAMES[name]
            fewer = [(args, [other for other in keywords if other is not keyword]) for keyword in keywords]
            fewer += [(args[:-1], keywords)] if len(args) > 1 else []
            for given in fewer:
                yield "argument dropped", *source.span(node), ast.unparse(ast.Call(called, *given))
        case ast.Raise() | ast.Continue() | ast.Break() | ast.Delete() | ast.Expr(value=ast.Call()):
            yield "statement dropped", *source.span(node), "pass"
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield "statement dropped", *source.span(node), "pass"
        case ast.If(test=condition) | ast.While(test=condition) | ast.IfExp(test=condition):
            yield negated(condition, source)
        case ast.comprehension(ifs=conditions):
            yield from (negated(condition, source) for condition in conditions)


def negated(condition: ast.expr, source: Source) -> Change:
    """With a `not` before it, or without the one that it has."""
    match condition:
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return "condition: not dropped", *source.span(condition), f"({ast.unparse(operand)})"
    return "condition: not added", *source.span(condition), f"(not ({source.text(*source.span(condition))}))"


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def left_alone(node: ast.AST) -> bool:
    """Texts of logs, assertions of what cannot be, `__repr__`, `__all__`, what only type checkers run."""
    match node:
        case ast.Expr(value=ast.Call(func=ast.Attribute(attr=name))):
            return name in LOGGING
        case ast.If(test=test):
            return re.search("TYPE_CHECKING|__name__", ast.unparse(test)) is not None
        case ast.FunctionDef(name="__repr__") | ast.Assign(targets=[ast.Name(id="__all__")]):
            return True
    return isinstance(node, ast.Assert | ast.JoinedStr)


def places(path: str, content: bytes) -> list[Mutation]:
    """Every mutation of one file, in the order of its syntax tree."""
    source, alike, found = Source(content), Counter[tuple[str, str]](), list[Mutation]()

    def visit(node: ast.AST, function: str, header: tuple[int, int]) -> None:
        if left_alone(node):
            return
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None)
            header = node.lineno, max(node.lineno, body[0].lineno - 1) if body else node.end_lineno
        for change in changes(node, source):
            operator, start, end, text = change
            before, after = (source.around(start, end, this) for this in (source.text(start, end), text))
            line, nth = content.count(b"\n", 0, start) + 1, alike[function, after]
            found.append(Mutation(path, line, function, operator, before, after, nth, header, change))
            alike[function, after] += 1
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            function = f"{function}.{node.name}".lstrip(".")
        for name, value in ast.iter_fields(node):
            if name not in UNTOUCHED and not (name == "keywords" and isinstance(node, ast.ClassDef)):
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST):
                        visit(child, function, header)

    visit(ast.parse(content), "", (1, 1))
    return found


def sources(tree: Path) -> dict[str, bytes]:
    """The packages' files, room by room."""
    files = (file for package in ("checkpoints", "dynamics") for file in (tree / package).rglob("*.py"))
    ordered = sorted(files, key=lambda file: (file.parent, file.name))
    return {file.relative_to(tree).as_posix(): file.read_bytes() for file in ordered}


def draw(files: dict[str, bytes], n: int, seed: int) -> list[Mutation]:
    """Of every room as many as its share of the lines; every kind of change is as likely as another."""
    chance = random.Random(seed)
    pools, drawn = defaultdict[str, list[Mutation]](list), list[Mutation]()
    for path, content in files.items():
        pools[str(Path(path).parent)] += places(path, content)
    rooms = [str(Path(path).parent) for path, content in files.items() for _ in content.splitlines()]
    for room, share in Counter(rooms[int((i + chance.random()) * len(rooms) / n)] for i in range(n)).items():
        pool = pools[room]
        for _ in range(min(share, len(pool))):
            kind = chance.choice(sorted({m.operator.split(":")[0] for m in pool}))
            drawn.append(chance.choice([m for m in pool if m.operator.split(":")[0] == kind]))
            pool = [m for m in pool if (m.path, m.line) != (drawn[-1].path, drawn[-1].line)]
    return drawn


def find(earlier: dict, present: list[Mutation]) -> Mutation | None:
    """An earlier mutation in the present tree: the same change of the same text, nearest in function and file."""
    function, path = earlier["function"], Path(earlier["path"])

    def likeness(m: Mutation) -> tuple[bool, ...]:
        named = m.function.rpartition(".")[2] == function.rpartition(".")[2]
        file = Path(m.path)
        return named, m.function == function, file == path, file.name == path.name, m.nth == earlier["nth"]

    text = itemgetter("operator", "before", "after")(earlier)
    same = [m for m in present if (m.operator, m.before, m.after) == text]
    nearest = [m for m in same if likeness(m) == max(map(likeness, same))]
    certain = len(nearest) == 1 and (len(same) == 1 or likeness(nearest[0])[0])
    return nearest[0] if certain else None


class Suite:
    """The tests of a tree: what each takes, and which run a line."""

    def __init__(self, tests: list[str], durations: Path, coverage: Path) -> None:
        cases = ElementTree.parse(durations).iter("testcase")
        taken = {f"{case.get('classname')}.{case.get('name')}": float(case.get("time", 0)) for case in cases}
        self.seconds = {test: taken.get(junit_name(test), 0.0) for test in tests}
        self.data = CoverageData(str(coverage))
        self.data.read()
        if not self.tests(self.data.measured_contexts()):
            raise SystemExit(f"None of the {len(tests)} tests stands in {coverage}: it is of another tree.")
        self.set_up = defaultdict[str, float](float)
        for test in self.tests(self.data.measured_contexts(), "setup"):
            self.set_up[file_of(test)] = max(self.set_up[file_of(test)], self.seconds[test])

    def tests(self, contexts: Iterable[str], phase: str = r"\w+") -> set[str]:
        """Of coverage's contexts: `tests/test_x.py::test_y|setup`, or `... (setup)` of a process that it starts."""
        found = (re.fullmatch(rf"(.+)(?:\|{phase}| \({phase}\))", context) for context in contexts)
        return {match[1] for match in found if match and match[1] in self.seconds}

    def covering(self, mutation: Mutation) -> list[set[str]]:
        """Those that run the mutated lines; then those that may see them: by a shared fixture, or run at import."""
        of_file, (first, last) = self.data.contexts_by_lineno(mutation.path), mutation.lines
        contexts = {context for line in range(first, last + 1) for context in of_file.get(line, ())}
        if "" in contexts and not any(context.endswith(("|setup", "|run")) for context in contexts):
            return [self.tests(context for those in of_file.values() for context in those), set(self.seconds)]
        shared = {file_of(test) for test in self.tests(contexts, "setup")}
        return [self.tests(contexts), {test for test in self.seconds if file_of(test) in shared}]

    def affordable(self, groups: list[set[str]], bound: float) -> tuple[list[str], float]:
        """Tests in the order they are run in, cheapest files first, and their seconds; at least one."""
        chosen, spent = dict[str, None](), 0.0
        for group in groups:
            files = defaultdict[str, list[str]](list)
            for test in sorted(group - chosen.keys(), key=lambda test: (self.seconds[test], test)):
                files[file_of(test)].append(test)
            totals = {file: self.set_up[file] + sum(map(self.seconds.get, files[file])) for file in files}
            for file in sorted(files, key=totals.get):
                opening = self.set_up[file]
                for test in files[file]:
                    if not chosen or spent + opening + self.seconds[test] <= bound:
                        spent, opening = spent + opening + self.seconds[test], 0.0
                        chosen[test] = None
        return list(chosen), spent


def file_of(test: str) -> str:
    return test.partition("::")[0]


def junit_name(test: str) -> str:
    """`tests/test_x.py::test_y[1]` as `tests.test_x.test_y[1]`."""
    address, bracket, values = test.partition("[")
    return address.replace(".py::", ".", 1).replace("/", ".").replace("::", ".") + bracket + values


def pytest(tree: Path, *options: str, timeout: float | None = None) -> tuple[int | None, str]:
    """Its exit code, none where the time was up, and what it printed."""
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["--hypothesis-seed=0", *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=tree, env=environment, start_new_session=True, **pipes) as process:
        try:
            printed = process.communicate(timeout=timeout)[0]
            return process.returncode, printed
        except subprocess.TimeoutExpired:
            return None, ""
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with what the tests started


def judged(mutation: Mutation, suite: Suite, tree: Path, bound: float) -> dict:
    """Whether a test fails where the mutation is made in `tree`, which is then put back."""
    groups, file, began = suite.covering(mutation), tree / mutation.path, time.monotonic()
    chosen, seconds = suite.affordable(groups, bound)
    if not chosen:
        return {"verdict": "survived", "by": "not covered", "tests": 0, "seconds": 0.0}
    shutil.rmtree(tree / ".hypothesis", ignore_errors=True)  # examples that failed under other mutations
    selected, content = tree.with_suffix(".tests"), file.read_bytes()
    selected.write_text("\n".join(chosen))
    file.write_bytes(mutation.apply(content))
    try:
        code, printed = pytest(tree, "-x", "--tb=no", f"@{selected}", timeout=120 + 4 * seconds)
    finally:
        file.write_bytes(content)
    if code == 0:
        by = "" if len(chosen) == len(set().union(*groups)) else "bound"
    else:
        failed = re.search(r"^(?:FAILED|ERROR) (.*?)(?: - |$)", printed, re.MULTILINE)
        by = failed[1] if failed else "timeout" if code is None else f"no test starts, exit code {code}"
    counts = re.findall(r"(\d+) (?:passed|failed|error)", printed[-200:])
    ran = {"tests": sum(map(int, counts)), "seconds": round(time.monotonic() - began, 1)}
    return {"verdict": "survived" if code == 0 else "caught", "by": by} | ran


def row(record: dict) -> str:
    """Of the table; the line from a little ahead of where it changes."""
    texts = record["before"], record["after"]
    start = max(0, sum(takewhile(bool, map(eq, *texts))) - 30)
    cells = [f"{record['path']}:{record['line']}", record["operator"]]
    cells += [f"`{text[start : start + 80]}`" for text in texts]
    cells += [record["earlier"], f"{record['verdict']} {record['by']}".strip(), str(record["tests"])]
    return f"| {' | '.join(cells)} |"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tree", type=Path, default=Path(__file__).parents[2], help="a git checkout")
    parser.add_argument("--coverage", type=Path, required=True, help="data with a context for each test")
    parser.add_argument("--durations", type=Path, required=True, help="junit XML of the same run")
    parser.add_argument("--out", type=Path, required=True, help="JSON; what it holds is not tried again")
    parser.add_argument("--draw", type=int, default=60, help="how many mutations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", type=Path, help="JSON of an earlier tree, to try its mutations instead")
    parser.add_argument("--bound", type=float, default=120, help="seconds of tests for one mutation")
    parser.add_argument("--workers", type=int, default=1)
    given = parser.parse_args(argv)
    records = json.loads(given.out.read_text()) if given.out.exists() else []

    def keep(record: dict) -> None:
        records.append(record)
        given.out.write_text(json.dumps(records, indent=1))
        print(row(record), flush=True)

    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(given.workers) as threads:
        trees = SimpleQueue[Path]()
        for tree in (Path(scratch) / str(i) for i in range(given.workers)):
            subprocess.run(["git", "clone", "--quiet", given.tree, tree], check=True)
            trees.put(tree)
        files = sources(tree)
        if given.again:
            present = [mutation for path, content in files.items() for mutation in places(path, content)]
            wanted = [(find(earlier, present), earlier) for earlier in json.loads(given.again.read_text())]
        else:
            wanted = [(mutation, {}) for mutation in draw(files, given.draw, given.seed)]
        listed = pytest(tree, "--collect-only")[1].splitlines()
        suite = Suite([line for line in listed if "::" in line], given.durations, given.coverage)

        def tried(mutation: Mutation | None, earlier: dict) -> dict:
            then = {"earlier": earlier.get("verdict", ""), "was": earlier.get("path", "")}
            if mutation is None:
                return earlier | then | {"verdict": "not found", "by": "", "tests": 0, "seconds": 0.0}
            tree = trees.get()
            try:
                return asdict(mutation) | then | judged(mutation, suite, tree, given.bound)
            finally:
                trees.put(tree)

        print("| place | change | before | after | earlier | verdict | tests |", "|---" * 7 + "|", sep="\n")
        for record in records:
            print(row(record))
        identity = itemgetter("path", "function", "after", "nth")
        done = set(map(identity, records))
        new = [(m, earlier) for m, earlier in wanted if identity(asdict(m) if m else earlier) not in done]
        try:
            for trial in as_completed([threads.submit(tried, *each) for each in new]):
                keep(trial.result())
        finally:
            threads.shutdown(cancel_futures=True)
    print(f"\n{dict(Counter(record['verdict'] for record in records))}")
    lost = [record for record in records if (record["earlier"], record["verdict"]) == ("caught", "survived")]
    print(f"Caught earlier, surviving now: {len(lost)}", *map(row, lost), sep="\n")


if __name__ == "__main__":
    main()
