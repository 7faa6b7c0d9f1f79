"""What an attacker may know of a record, and how it is hidden: a small TOML file, the same at every site.

Everything in it is public: cut points and trees must not be made from patients' values.

    k = 5                                # patients a record must not be told apart from, itself included
    m = 2                                # items an attacker may know
    target = "readmitted"
    patient = "patient_nbr"              # k counts its values, and it is not written; without it k counts rows
    keep = ["lab_procedures"]            # written as it is, protected by nothing

    [numeric.age]
    cuts = [0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100]

    [categorical.race]
    values = ["AfricanAmerican", "Asian", "Caucasian", "Hispanic", "Other", "unknown"]

    [categorical.admission]
    hierarchy = "admission.csv"          # a line a value: value,group,wider group

    [items]
    column = "diagnoses"
    separator = ";"
    hierarchy = "icd9.csv"
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from confrere import intake
from confrere.anonymise.hierarchy import Hierarchy, grow
from confrere.data.paths import Root
from confrere.errors import ConfigError, nearest

MOST_CUTS, MOST_M, MOST_COLUMNS = 1_000, 3, 100
Name = Annotated[str, Field(min_length=1, max_length=100)]
_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class _Numeric(BaseModel):
    model_config = _STRICT
    cuts: list[Annotated[float, Field(ge=-1e15, le=1e15)]] = Field(min_length=2, max_length=MOST_CUTS)


class _Tree(BaseModel):
    model_config = _STRICT
    values: list[Name] = []
    hierarchy: Name = ""


class _Items(_Tree):
    column: Name
    separator: str = Field(default=";", min_length=1, max_length=1)


class _Form(BaseModel):
    model_config = _STRICT
    k: int = Field(ge=2, le=1_000_000)
    m: int = Field(default=2, ge=1, le=MOST_M)
    target: Name
    patient: str = Field(default="", max_length=100)
    keep: list[Name] = Field(default=[], max_length=MOST_COLUMNS)
    numeric: dict[Name, _Numeric] = {}
    categorical: dict[Name, _Tree] = {}
    items: _Items | None = None
    items_weight: float = Field(default=0.5, ge=0, le=1)
    merge_until: float = Field(default=0.3, ge=0, le=1)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is asked, with its trees.

    Attributes:
        k: units (patients, or rows) that share a record's class, at least.
        m: items of a record that an attacker may know.
        target: column of what is learnt; it is written, and not hidden.
        patient: column of a unit, or empty: every row is one.
        keep: columns that are written as they are, but for what a spreadsheet would run.
        numeric: column -> ascending public cut points; values beyond the outer two count as those.
        categorical: column -> public tree.
        items: column of sets, or empty.
        separator: what stands between items of a cell.
        tree: public tree of items; None without them.
        items_weight: weight of items' loss beside that of quasi-identifiers when classes are merged, 0 to 1.
        merge_until: classes are merged for the items' sake while the loss of quasi-identifiers is below this, 0 to 1.
    """

    k: int
    m: int
    target: str
    patient: str
    keep: tuple[str, ...]
    numeric: dict[str, tuple[float, ...]]
    categorical: dict[str, Hierarchy]
    items: str = ""
    separator: str = ";"
    tree: Hierarchy | None = None
    items_weight: float = 0.5
    merge_until: float = 0.3

    @property
    def identifiers(self) -> tuple[str, ...]:
        """Return the quasi-identifiers: numeric ones, then categorical ones."""
        return (*self.numeric, *self.categorical)

    @property
    def unit(self) -> str:
        """Return what k counts."""
        return "patients" if self.patient else "rows"

    @property
    def written(self) -> tuple[str, ...]:
        """Return the columns of an anonymised table."""
        return (*self.identifiers, *([self.items] if self.items else []), *self.keep, self.target)

    def vocabulary(self) -> str:
        """Return the SHA-256 of cut points and trees: classes of two sites fit together only where it is the same."""
        trees = {name: [tree.nodes, tree.parent] for name, tree in self.categorical.items()}
        told = [self.numeric, trees, self.items, self.tree and [self.tree.nodes, self.tree.parent]]
        return hashlib.sha256(repr(told).encode()).hexdigest()


def read_plan(path: Path) -> Plan:
    """Read a plan and the trees it names, which lie beside it.

    Raises:
        ConfigError: no such file, not TOML, an unknown or missing key, a value out of range, a column named twice, or a
            tree that is none.
    """
    try:
        values = intake.parse_toml(intake.read_bytes(path, intake.MOST_TOML))
    except FileNotFoundError:
        fix = "give the plan's TOML file"
        raise ConfigError("no such file or folder", where=str(path), fix=fix, code="no-such-path") from None
    except OSError as error:
        what, fix = f"the plan cannot be read: {error.strerror}", "look at its permissions"
        raise ConfigError(what, where=str(path), fix=fix, code="unreadable-file") from error
    except ValueError as error:
        why = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)  # which would quote bytes
        what, fix = f"the plan is not TOML: {why}", "mend that line"
        raise ConfigError(what, where=path.name, fix=fix, code="not-toml") from error
    return make_plan(values, path.parent, where=path.name)


def make_plan(values: dict[str, Any], folder: Path, *, where: str = "plan") -> Plan:
    """Return the plan that the values of a TOML file say; trees are read from ``folder``; ConfigError as above."""
    try:
        form = _Form.model_validate(values)
    except ValidationError as error:
        raise _refused(error, where) from None
    numeric = {name.strip().lower(): tuple(one.cuts) for name, one in form.numeric.items()}
    for name, cuts in numeric.items():
        if any(low >= high for low, high in itertools.pairwise(cuts)):
            raise ConfigError("cut points must ascend", where=f"{where}: numeric.{name}.cuts", fix="sort them")
    trees = {
        name.strip().lower(): _tree(one, folder, f"{where}: categorical.{name}")
        for name, one in form.categorical.items()
    }
    plan = Plan(
        **form.model_dump(include={"k", "m", "items_weight", "merge_until"}),
        target=form.target.strip().lower(),
        patient=form.patient.strip().lower(),
        keep=tuple(name.strip().lower() for name in form.keep),
        numeric=numeric,
        categorical=trees,
        items=form.items.column.strip().lower() if form.items else "",
        separator=form.items.separator if form.items else ";",
        tree=_tree(form.items, folder, f"{where}: items") if form.items else None,
    )
    _check(plan, where, len(form.numeric) + len(form.categorical))
    return plan


def _check(plan: Plan, where: str, given: int) -> None:
    columns = [*plan.written, *([plan.patient] if plan.patient else [])]
    if not 0 < len(plan.identifiers) <= MOST_COLUMNS:
        fix = "name what an attacker may know, e.g. [numeric.age] and [categorical.sex]"
        raise ConfigError("there is no quasi-identifier, or more than 100", where=where, fix=fix, code="missing-key")
    if plan.tree is not None and any(plan.separator in name for name in plan.tree.nodes):
        what, fix = "the separator stands in the name of an item or group", "rename it, or choose another separator"
        raise ConfigError(what, where=f"{where}: items", fix=fix, code="hierarchy")
    if len(set(columns)) < len(columns) or given > len(plan.identifiers) or not all(columns):
        what, fix = (
            "a column has two roles, or no name",
            "let each be one of target, patient, keep, an identifier, items",
        )
        raise ConfigError(what, where=where, fix=fix, code="named-twice")


def _tree(given: _Tree, folder: Path, where: str) -> Hierarchy:
    if bool(given.values) == bool(given.hierarchy):
        fix = "values = [...] for a list, hierarchy = 'FILE.csv' for a tree"
        raise ConfigError("give values or a hierarchy, one of them", where=where, fix=fix)
    try:
        paths = [[value.strip()] for value in given.values] or _paths(Root(folder).join(given.hierarchy))
        return grow(paths)
    except OSError as error:
        what = f"the hierarchy cannot be read: {error.strerror}"
        fix = "put the file beside the plan"
        raise ConfigError(what, where=where, fix=fix, code="unreadable-file") from None
    except ValueError as error:
        fix = "one line a value: the value, its group, a wider group; every name in one place"
        raise ConfigError(f"this is no tree: {error}", where=where, fix=fix, code="hierarchy") from None


def _paths(path: Path) -> list[list[str]]:
    try:
        text = intake.read_bytes(path, intake.MOST_JSON // 10).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    delimiter = max(",;\t", key=text[:100_000].split("\n", 1)[0].count)
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except csv.Error:
        raise ValueError("it is no CSV") from None
    return [[cell.strip() for cell in row] for row in rows if any(cell.strip() for cell in row)]


def _refused(error: ValidationError, where: str) -> ConfigError:
    """Return the first fault as our own error; pydantic's text would quote the value."""
    first = error.errors(include_url=False, include_input=False)[0]
    parts = [str(part) for part in first["loc"]]
    at = f"{where}: {'.'.join(parts)}"
    if first["type"] == "missing":
        return ConfigError("a required key is missing", where=at, fix="set it", code="missing-key")
    if first["type"] == "extra_forbidden":
        inner: dict[str, type[BaseModel]] = {"items": _Items, "numeric": _Numeric, "categorical": _Tree}
        known = _Form if len(parts) == 1 else inner.get(parts[0], _Form)
        fix = nearest(parts[-1], list(known.model_fields))
        return ConfigError("there is no such key", where=at, fix=fix, code="unknown-key")
    return ConfigError(first["msg"], where=at, fix="see docs/anonymised-tables.md for what is possible")
