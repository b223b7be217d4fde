"""Measure how readable the code of train, serve and models is, e.g. before and after a change.

    python tests/code_style.py [DIRECTORY ...] [--json]

Each DIRECTORY is a checkout (default: this one); with several, the table has a column for each. All
figures come from the syntax tree and the tokens of the files; nothing is imported.
"""

import argparse
import ast
import io
import json
import sys
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

PACKAGES = ("train", "serve", "models")
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
LAYOUT_TOKENS = (
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
)


@dataclass
class Figures:
    """The figures of one checkout."""

    files: int
    lines: int
    characters_per_line: float = field(
        metadata={"label": "mean characters per non-blank line in functions, without indentation"}
    )
    blank_line_percent: float = field(metadata={"label": "blank lines in functions, percent"})
    tuple_assignments: float = field(
        metadata={"label": "tuple and chained assignments per 1,000 lines"}
    )
    untyped_parameters: int
    import_cycles: int = field(metadata={"label": "import cycles, also behind TYPE_CHECKING"})
    largest_function: int = field(metadata={"label": "largest function, lines"})
    nested_comprehensions: int = field(
        metadata={"label": "comprehensions that are nested or have several clauses"}
    )


@dataclass
class Module:
    """One parsed source file."""

    name: str
    """Dotted, e.g. serve.http.app; a package has the name of its directory."""
    is_package: bool
    lines: list[str]
    tree: ast.Module
    code_lines: set[int]
    """Numbers of the lines that hold a token, strings over several lines included."""


def load_modules(root: Path) -> list[Module]:
    """Parse every Python file of the packages below `root`."""
    modules: list[Module] = []
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            modules.append(load_module(path, root))
    return modules


def load_module(path: Path, root: Path) -> Module:
    source = path.read_text()
    parts = list(path.relative_to(root).with_suffix("").parts)
    is_package = parts[-1] == "__init__"
    if is_package:
        parts.pop()
    return Module(
        name=".".join(parts),
        is_package=is_package,
        lines=source.splitlines(),
        tree=ast.parse(source, str(path)),
        code_lines=find_code_lines(source),
    )


def find_code_lines(source: str) -> set[int]:
    numbers: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in LAYOUT_TOKENS:
            numbers.update(range(token.start[0], token.end[0] + 1))
    return numbers


def iter_functions(module: Module) -> Iterator[FunctionNode]:
    for node in ast.walk(module.tree):
        if isinstance(node, FunctionNode):
            yield node


def count_lines(node: FunctionNode) -> int:
    return node.end_lineno - node.lineno + 1


def function_lines(module: Module) -> Iterator[tuple[int, str]]:
    """Number and text of every line that lies in a function, each once."""
    numbers: set[int] = set()
    for function in iter_functions(module):
        numbers.update(range(function.lineno, function.end_lineno + 1))
    for number in sorted(numbers):
        yield number, module.lines[number - 1]


def measure_characters(modules: list[Module]) -> float:
    lengths: list[int] = []
    for module in modules:
        for number, line in function_lines(module):
            if number in module.code_lines and line.strip():
                lengths.append(len(line.strip()))
    return sum(lengths) / max(len(lengths), 1)


def measure_blank_lines(modules: list[Module]) -> float:
    total = 0
    blank = 0
    for module in modules:
        for _, line in function_lines(module):
            total += 1
            blank += not line.strip()
    return 100 * blank / max(total, 1)


def is_tuple_assignment(node: ast.AST) -> bool:
    """Whether the node assigns several values at once: `a, b = c, d` or `a = b = c`."""
    if not isinstance(node, ast.Assign):
        return False
    if len(node.targets) > 1:
        return True
    return isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)


def count_untyped_parameters(function: FunctionNode) -> int:
    """Parameters without an annotation, `self` and `cls` left out."""
    arguments = function.args
    parameters = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    parameters += [extra for extra in (arguments.vararg, arguments.kwarg) if extra]
    untyped = [parameter for parameter in parameters if parameter.annotation is None]
    return sum(parameter.arg not in ("self", "cls") for parameter in untyped)


def is_nested_comprehension(node: ast.AST) -> bool:
    """Whether a comprehension has several `for` clauses or contains another comprehension."""
    if not isinstance(node, COMPREHENSIONS):
        return False
    if len(node.generators) > 1:
        return True
    inner = ast.walk(node)
    next(inner)
    return any(isinstance(child, COMPREHENSIONS) for child in inner)


def count_nodes(modules: list[Module], condition: Callable[[ast.AST], bool]) -> int:
    count = 0
    for module in modules:
        count += sum(condition(node) for node in ast.walk(module.tree))
    return count


def find_imports(module: Module, names: set[str]) -> set[str]:
    """Modules among `names` that this one imports, at any depth and behind TYPE_CHECKING too."""
    imported: set[str] = set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            imported.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_base(module, node)
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                imported.add(submodule if submodule in names else base)
    return (imported & names) - {module.name}


def resolve_base(module: Module, node: ast.ImportFrom) -> str:
    """The absolute name of what follows `from`."""
    if not node.level:
        return node.module or ""
    parts = module.name.split(".")
    package = parts if module.is_package else parts[:-1]
    package = package[: len(package) - node.level + 1]
    return ".".join([*package, node.module] if node.module else package)


def find_import_cycles(modules: list[Module]) -> list[list[str]]:
    """Groups of modules that import one another: strongly connected components of two or more."""
    names = {module.name for module in modules}
    graph = {module.name: find_imports(module, names) for module in modules}
    reachable = {name: find_reachable(graph, name) for name in graph}

    cycles: list[list[str]] = []
    seen: set[str] = set()
    for name in sorted(graph):
        if name in seen or name not in reachable[name]:
            continue
        cycle = sorted(other for other in reachable[name] if name in reachable[other])
        seen.update(cycle)
        cycles.append(cycle)
    return cycles


def find_reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    """Modules that `start` imports, directly or through others; itself only in a cycle."""
    reached: set[str] = set()
    pending = list(graph[start])
    while pending:
        name = pending.pop()
        if name not in reached:
            reached.add(name)
            pending.extend(graph[name])
    return reached


def measure(root: Path) -> Figures:
    modules = load_modules(root)
    functions: list[FunctionNode] = []
    for module in modules:
        functions.extend(iter_functions(module))
    lines = sum(len(module.lines) for module in modules)
    assignments = count_nodes(modules, is_tuple_assignment)
    return Figures(
        files=len(modules),
        lines=lines,
        characters_per_line=round(measure_characters(modules), 1),
        blank_line_percent=round(measure_blank_lines(modules), 1),
        tuple_assignments=round(1000 * assignments / max(lines, 1), 1),
        untyped_parameters=sum(count_untyped_parameters(function) for function in functions),
        import_cycles=len(find_import_cycles(modules)),
        largest_function=max((count_lines(function) for function in functions), default=0),
        nested_comprehensions=count_nodes(modules, is_nested_comprehension),
    )


def format_table(columns: dict[str, Figures]) -> str:
    """A row for each figure, a column for each checkout."""
    labels = [item.metadata.get("label", item.name.replace("_", " ")) for item in fields(Figures)]
    width = max(len(label) for label in labels)
    rows = [" " * width + "".join(f"  {name:>10}" for name in columns)]
    for item, label in zip(fields(Figures), labels, strict=True):
        values = "".join(f"  {getattr(figures, item.name):>10}" for figures in columns.values())
        rows.append(f"{label:<{width}}{values}")
    return "\n".join(rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "directories",
        nargs="*",
        type=Path,
        default=[Path(__file__).parents[1]],
        metavar="DIRECTORY",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per directory")
    options = parser.parse_args(arguments)

    figures = {directory: measure(directory) for directory in options.directories}
    if options.json:
        for directory, values in figures.items():
            print(json.dumps({"directory": str(directory), **asdict(values)}))
        return

    names = ["before", "after"] if len(figures) == 2 else [path.name or "." for path in figures]
    print(format_table(dict(zip(names, figures.values(), strict=True))))


if __name__ == "__main__":
    sys.exit(main())
