"""UCI Adult and Diabetes-130 as tables of quasi-identifiers and item sets, with public trees, dealt to three sites.

Neither has a column of sites, so units (records, or patients) are dealt at random, half of them to one site, three and
two tenths to the others. Adult has no set-valued column: its items are occupation, employer and three facts.
"""

from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from confrere.errors import DataError
from confrere.seeds import numpy_generator

SITES = {"large": 0.5, "middle": 0.3, "small": 0.2}
PARTS = {"train": 0.65, "val": 0.15, "test": 0.2}


def tree(groups: Mapping[str, str]) -> list[list[str]]:
    """Return value and groups of ``{"group>wider": "a b c"}``; an empty key holds values without a group."""
    return [
        [value, *(part for part in path.split(">") if part)]
        for path, values in groups.items()
        for value in values.split()
    ]


COUNTRIES = {
    "americas": "United-States Canada Outlying-US(Guam-USVI-etc)",
    "latin>americas": "Mexico Puerto-Rico El-Salvador Cuba Jamaica Dominican-Republic Guatemala Columbia Haiti "
    "Nicaragua Peru Ecuador Trinadad&Tobago Honduras",
    "asia": "Philippines India China Vietnam Japan Taiwan Iran Hong Cambodia Thailand Laos South",
    "europe": "Germany England Italy Poland Portugal France Greece Ireland Yugoslavia Hungary Scotland "
    "Holand-Netherlands",
    "": "unknown",
}
EDUCATION = {
    "no-degree>school": "Preschool 1st-4th 5th-6th 7th-8th",
    "some-high>school": "9th 10th 11th 12th",
    "finished>school": "HS-grad Some-college",
    "associate>higher": "Assoc-voc Assoc-acdm",
    "graduate>higher": "Bachelors Masters",
    "terminal>higher": "Doctorate Prof-school",
}
MARITAL = {
    "married": "Married-civ-spouse Married-AF-spouse Married-spouse-absent",
    "parted": "Divorced Separated Widowed",
    "": "Never-married",
}
WORK = {
    "office": "occ:Prof-specialty occ:Exec-managerial occ:Adm-clerical occ:Sales occ:Tech-support",
    "manual": "occ:Craft-repair occ:Machine-op-inspct occ:Transport-moving occ:Handlers-cleaners occ:Farming-fishing",
    "service": "occ:Other-service occ:Protective-serv occ:Priv-house-serv occ:Armed-Forces",
    "government": "work:Local-gov work:State-gov work:Federal-gov",
    "own": "work:Self-emp-not-inc work:Self-emp-inc",
    "unpaid": "work:Without-pay work:Never-worked",
    "": "work:Private long-hours short-hours capital-gain capital-loss",
}
CHAPTERS = {
    "infections": (0, 13), "neoplasms": (14, 23), "endocrine": (24, 27), "blood": (28, 28), "mental": (29, 31),
    "nervous": (32, 38), "circulatory": (39, 45), "respiratory": (46, 51), "digestive": (52, 57),
    "genitourinary": (58, 62), "pregnancy": (63, 67), "skin": (68, 70), "musculoskeletal": (71, 73),
    "congenital": (74, 75), "perinatal": (76, 77), "symptoms": (78, 79), "injury": (80, 99),
}  # fmt: skip
DRUGS = {
    "sulfonylurea": "chlorpropamide glimepiride acetohexamide glipizide glyburide tolbutamide tolazamide",
    "glinide": "repaglinide nateglinide",
    "glitazone": "pioglitazone rosiglitazone troglitazone",
    "glucosidase": "acarbose miglitol",
    "combination": "glyburide-metformin glipizide-metformin glimepiride-pioglitazone metformin-rosiglitazone "
    "metformin-pioglitazone",
    "insulin": "insulin:Steady insulin:Up insulin:Down",
    "a1c": "a1c:Norm a1c:>7 a1c:>8",
    "glucose": "glucose:Norm glucose:>200 glucose:>300",
    "": "metformin examide citoglipton changed icd:other",
}
PAYERS = {"public": "MC MD CH CM DM OG", "private": "HM SP BC CP UN PO MP SI FR", "": "WC OT unknown"}


@dataclass(frozen=True)
class Set:
    """A data set: its plan without k and m, its list of targets, how rows are read, how many units are taken."""

    name: str
    plan: dict[str, Any]
    trees: dict[str, list[list[str]]]
    targets: tuple[str, str]
    rows: Callable[[Path], list[dict[str, str]]]
    units: int


def adult_rows(data: Path) -> list[dict[str, str]]:
    """Return the cells of Adult."""
    text = content(data / "uci_adult" / "adult.csv")
    made = []
    for number, row in enumerate(csv.DictReader(io.StringIO(text), skipinitialspace=True)):
        items = [f"occ:{row['occupation']}", f"work:{row['workclass']}"]
        items = [item for item in items if not item.endswith("?")]
        hours = int(row["hours-per-week"])
        items += ["long-hours"] * (hours > 45) + ["short-hours"] * (hours < 35)
        items += [name for name in ("capital-gain", "capital-loss") if int(row[name]) > 0]
        country = row["native-country"]
        made.append(
            {
                "unit": str(number),
                **{key: row[key] for key in ("age", "sex", "race", "education", "marital-status")},
                "native-country": "unknown" if country == "?" else country,
                "facts": ";".join(items),
                "target": "high" if row["salary-class"] == ">50K" else "low",
            }
        )
    return made


def diabetes_rows(data: Path) -> list[dict[str, str]]:
    """Return the cells of Diabetes-130, one row an encounter."""
    archive = data / "uci_diabetes130" / "dataset_diabetes.zip"
    if not archive.exists():
        raise missing(archive)
    with zipfile.ZipFile(archive) as file:
        text = file.read("dataset_diabetes/diabetic_data.csv").decode()
    drugs = [
        name for group, names in DRUGS.items() for name in names.split() if group not in ("insulin", "a1c", "glucose")
    ]
    made = []
    for row in csv.DictReader(io.StringIO(text)):
        items = {code(row[f"diag_{n}"]) for n in (1, 2, 3) if row[f"diag_{n}"] != "?"}
        items |= {name for name in drugs if row.get(name, "No") != "No"}
        for name, column, none in (
            ("insulin", "insulin", "No"),
            ("a1c", "A1Cresult", "None"),
            ("glucose", "max_glu_serum", "None"),
        ):
            items |= {f"{name}:{row[column]}"} if row[column] != none else set()
        items |= {"changed"} if row["change"] == "Ch" else set()
        made.append(
            {
                "unit": row["patient_nbr"],
                "age": str(int(row["age"][1:].split("-")[0]) + 5),
                "race": "unknown" if row["race"] == "?" else row["race"],
                "gender": row["gender"],
                "admission": row["admission_type_id"],
                "payer": "unknown" if row["payer_code"] == "?" else row["payer_code"],
                "days": row["time_in_hospital"],
                "earlier": row["number_inpatient"],
                "codes": ";".join(sorted(items)),
                "target": "no" if row["readmitted"] == "NO" else "yes",
            }
        )
    return made


def code(diagnosis: str) -> str:
    """Return an ICD-9 code's ten: 250.83 is icd:25, 8 is icd:00; V and E codes are together."""
    return f"icd:{int(float(diagnosis)) // 10:02d}" if diagnosis[0].isdigit() else "icd:other"


ADULT = Set(
    name="adult",
    plan={
        "numeric": {"age": {"cuts": list(range(15, 96, 5))}},
        "categorical": {
            "sex": {"values": ["Female", "Male"]},
            "race": {"values": ["White", "Black", "Asian-Pac-Islander", "Amer-Indian-Eskimo", "Other"]},
            "education": {"hierarchy": "education.csv"},
            "marital-status": {"hierarchy": "marital.csv"},
            "native-country": {"hierarchy": "country.csv"},
        },
        "items": {"column": "facts", "hierarchy": "items.csv"},
    },
    trees={"education": tree(EDUCATION), "marital": tree(MARITAL), "country": tree(COUNTRIES), "items": tree(WORK)},
    targets=("low", "high"),
    rows=adult_rows,
    units=3_000,
)
DIABETES = Set(
    name="diabetes",
    plan={
        "numeric": {
            "age": {"cuts": list(range(0, 101, 10))},
            "days": {"cuts": [1, 2, 3, 4, 5, 6, 8, 10, 15]},
            "earlier": {"cuts": [0, 1, 2, 3, 5, 10]},
        },
        "categorical": {
            "race": {"values": ["Caucasian", "AfricanAmerican", "Hispanic", "Asian", "Other", "unknown"]},
            "gender": {"values": ["Female", "Male", "Unknown/Invalid"]},
            "admission": {"hierarchy": "admission.csv"},
            "payer": {"hierarchy": "payer.csv"},
        },
        "items": {"column": "codes", "hierarchy": "items.csv"},
    },
    trees={
        "admission": tree({"acute": "1 2 7", "not-told": "5 6 8", "": "3 4"}),
        "payer": tree(PAYERS),
        "items": [[f"icd:{ten:02d}", name] for name, (low, high) in CHAPTERS.items() for ten in range(low, high + 1)]
        + tree(DRUGS),
    },
    targets=("no", "yes"),
    rows=diabetes_rows,
    units=2_000,
)
SETS = {one.name: one for one in (ADULT, DIABETES)}


def content(path: Path) -> str:
    """Return a file's text; DataError where it is missing."""
    if not path.exists():
        raise missing(path)
    return path.read_text(encoding="utf-8")


def missing(path: Path) -> DataError:
    """Return what is said of a file that is not there."""
    fix = "give the folder that holds uci_adult and uci_diabetes130"
    return DataError(f"{path.name} is missing", where=str(path.parent), fix=fix, code="unreadable-file")


def dealt(rows: list[dict[str, str]], units: int, seed: int) -> dict[str, dict[str, list[dict[str, str]]]]:
    """Return ``{site: {part: rows}}`` of units drawn, dealt and split by the seed, all rows of a unit together."""
    names = sorted({row["unit"] for row in rows})
    rng = numpy_generator(seed, "anonymised", "deal")
    chosen = [names[at] for at in rng.permutation(len(names))[:units]]
    site_of = rng.choice(list(SITES), len(chosen), p=list(SITES.values()))
    part_of = rng.choice(list(PARTS), len(chosen), p=list(PARTS.values()))
    place = {name: (str(site), str(part)) for name, site, part in zip(chosen, site_of, part_of, strict=True)}
    made: dict[str, dict[str, list[dict[str, str]]]] = {site: {part: [] for part in PARTS} for site in SITES}
    for row in rows:
        if row["unit"] in place:
            site, part = place[row["unit"]]
            made[site][part].append(row)
    return made
