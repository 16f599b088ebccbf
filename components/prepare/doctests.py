"""Coding problems from installed packages: functions whose docstrings hold examples, which become their tests."""

import ast
import doctest
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from components.prepare.execution import impurity
from components.prepare.problems import Problem
from components.prepare.source import SourceModule

# Headings of examples, and directives of Sphinx with the indented lines below them.
_LEFTOVERS = re.compile(
    r"^([ ]*)(?:Examples?:{0,2}[ ]*$|\.\. .*(?:\n(?:\1[ ]+.*|[ ]*))*$)\n?", re.MULTILINE | re.IGNORECASE
)


def read_doctests(package: str, root: Path, *, dropped: Counter[str]) -> Iterator[Problem]:
    """Functions of a package's modules that have examples in their docstrings and stand alone, in order of their names.

    Args:
        package: its name.
        root: its folder.
        dropped: counts the functions left out, by reason.
    """
    for path in sorted(root.rglob("*.py")):
        name = ".".join([package, *path.relative_to(root).with_suffix("").parts]).removesuffix(".__init__")
        if "tests" not in path.parts:
            module = SourceModule(path.read_text(encoding="utf-8"))
            for function in module.functions():
                problem = _read_function(package, name, module, function, dropped)
                if problem is not None:
                    yield problem


def _read_function(
    package: str, module_name: str, module: SourceModule, function: ast.FunctionDef, dropped: Counter[str]
) -> Problem | None:
    documentation = ast.get_docstring(function) or ""
    if ">>>" not in documentation:
        return None
    description, examples = read_examples(documentation, function.name)
    code = module.stand_alone(function)
    if code is None:
        dropped["needs another package or module"] += 1
    elif impurity(code):
        dropped["needs files, the clock, chance or a terminal"] += 1
    elif not examples:
        dropped["no example is an expression with the function"] += 1
    else:
        return Problem(
            id=f"{module_name}.{function.name}",
            group=module_name,
            origin=package,
            signature=module.signature(function),
            description=description,
            code=code,
            examples=examples,
        )
    return None


def read_examples(documentation: str, name: str) -> tuple[str, dict[str, str | None]]:
    """A docstring parted into its text and its examples.

    Args:
        documentation: a docstring.
        name: of the function it documents.

    Returns:
        The text without examples, and the expressions in which ``name`` is used with what they show. What an example
        assigned to a variable stands in place of it in those after it.
    """
    text = []
    examples: dict[str, str | None] = {}
    assigned: dict[str, ast.expr] = {}
    try:
        pieces = doctest.DocTestParser().parse(documentation)
    except ValueError:  # examples that doctest cannot read
        return documentation, {}
    for piece in pieces:
        if isinstance(piece, str):
            text.append(piece)
            continue
        try:
            statements = ast.parse(piece.source).body
        except SyntaxError:
            continue
        match [_Inline(assigned).visit(statement) for statement in statements]:
            case [ast.Expr(value=expression)]:
                if any(isinstance(node, ast.Name) and node.id == name for node in ast.walk(expression)):
                    examples[ast.unparse(expression)] = piece.want
            case [ast.Assign(targets=[ast.Name(id=target)], value=value)]:
                assigned[target] = value
    description = _LEFTOVERS.sub("", "".join(text))
    return re.sub(r"\n\s*\n\s*\n", "\n\n", description).strip(), examples


class _Inline(ast.NodeTransformer):
    """Puts values in place of the variables they were assigned to."""

    def __init__(self, values: Mapping[str, ast.expr]) -> None:
        self._values = values

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self._values.get(node.id, node) if isinstance(node.ctx, ast.Load) else node
