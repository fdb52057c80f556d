"""How parts are named on the command line: `name` or `name(key=value, ...)`."""

from __future__ import annotations

import ast
from typing import Any


def parse_spec(spec: str, what: str) -> tuple[str, dict[str, Any]]:
    """(name, options) of `name` or `name(key=literal, ...)`; a bare word as a value is a string.

    Read as a Python call with literal keyword arguments, never evaluated. ValueError, saying that a `what` is written
    this way, for anything else.
    """
    try:
        node = ast.parse(spec.strip(), mode="eval").body
        if isinstance(node, ast.Name):
            return node.id, {}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
            return node.func.id, {_word(k.arg): _literal(k.value) for k in node.keywords}
    except (SyntaxError, ValueError):
        pass
    raise ValueError(f"the spec of {what} is name or name(key=value, ...), got {spec!r}")


def _literal(node: ast.expr) -> Any:
    return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)


def _word(name: str | None) -> str:
    if name is None:
        raise ValueError("** has no place in a spec")
    return name
