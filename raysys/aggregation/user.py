"""A rule written by the user: any function (n, d) tensor -> (d,) tensor, named "module:function" or "file.py:function"."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from raysys.aggregation.gram import F64, Survey, survey
from raysys.aggregation.rule import Aggregation, Plan, Rule, Stack, as_stack

_loaded: dict[Path, tuple[tuple[int, int], ModuleType]] = {}
"""File -> its state when it was executed, and what came of it."""


def load(spec: str) -> Callable[..., Any]:
    """The function behind "module:function" or "path/to/file.py:function".

    A file is executed once, and again only after it has changed. Raises ValueError if there is no such file or function, and
    with what went wrong if the code cannot be executed.
    """
    place, _, name = spec.rpartition(":")
    if not place or not name.isidentifier():
        raise ValueError(f"'{spec}' is not of the form module:function")
    if place.endswith(".py") and not Path(place).is_file():
        raise ValueError(f"'{spec}': there is no file {place}")
    try:
        module = _from_file(Path(place).resolve()) if place.endswith(".py") else importlib.import_module(place)
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        raise ValueError(f"'{spec}': cannot load {place} ({type(error).__name__}: {error})") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"'{spec}': {place} has no function {name}")
    return function


def _from_file(path: Path) -> ModuleType:
    """The module of a file, under a name of its own: two files with one stem are two modules."""
    stat = path.stat()
    version = (stat.st_mtime_ns, stat.st_size)
    if path in _loaded and _loaded[path][0] == version:
        return _loaded[path][1]
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(found)
    before = sys.modules.get(name)
    sys.modules[name] = module
    try:
        found.loader.exec_module(module)
    except BaseException:
        if before is None:
            del sys.modules[name]
        else:
            sys.modules[name] = before
        raise
    _loaded[path] = (version, module)
    return module


class UserRule(Rule):
    """Wraps the user's function; it gets the finite rows, and f if it has a parameter of that name.

    It sees whole vectors, so it cannot be planned on a survey nor cut over coordinates.
    """

    name = "user"

    def __init__(self, n: int, f: int, spec: str) -> None:
        super().__init__(n, f)
        self.spec = spec
        self.function = load(spec)
        self.name = spec  # type: ignore[misc]
        try:
            self._takes_f = "f" in inspect.signature(self.function).parameters
        except ValueError:  # a builtin without a signature
            self._takes_f = False

    def __reduce__(self) -> Any:
        return UserRule, (self.n, self.f, self.spec)

    @property
    def plannable(self) -> bool:
        return False

    def requires(self, n: int, f: int) -> None:
        """What the function needs is its own to say."""

    def breakdown(self, n: int) -> int:
        """Unknown: measure it with the audit. The largest minority is returned."""
        return (n - 1) // 2

    def plan(self, survey: Survey, *, weights: F64 | None = None, rng: np.random.Generator | None = None) -> Plan:
        raise ValueError(f"{self.spec} is a user's own rule: it sees whole vectors and cannot be cut over coordinates")

    def call(self, rows: torch.Tensor, f: int) -> torch.Tensor:
        """The function's output for rows (n, d), checked: (d,)."""
        out = self.function(rows, f=f) if self._takes_f else self.function(rows)
        if not isinstance(out, torch.Tensor) or out.shape != rows.shape[1:]:
            got = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
            raise ValueError(f"{self.spec} returned {got}, a rule returns a tensor of shape {tuple(rows.shape[1:])}")
        return out.to(rows.dtype)

    def aggregate(
        self, stack: Stack, *, weights: F64 | None = None, reference: Any = None, rng: np.random.Generator | None = None
    ) -> Aggregation:
        """The function's output on the finite rows. reference and rng are those of every rule; the function gets neither."""
        tensor, back = as_stack(stack)
        if weights is not None:
            self._shares(weights, len(tensor))
        finite = survey(tensor, products=False).finite
        if not finite.any():
            raise ValueError(f"{self.spec} got no finite row out of {len(finite)}")
        rejected = tuple(int(i) for i in np.flatnonzero(~finite))
        rows = tensor[torch.from_numpy(finite).to(tensor.device)] if rejected else tensor.clone()
        return Aggregation(back(self.call(rows, max(0, self.f - len(rejected)))), None, rejected)
