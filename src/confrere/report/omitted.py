"""Which sections a run's report has no data for, and why."""

from __future__ import annotations

from confrere.report.reading import Json


def omitted(summary: Json) -> list[Json]:
    """Return ``section`` and ``why`` of every section of a summary that has no data."""
    classes = summary["task"]["name"] == "classification"
    bins = any(site["reliability"] for site in summary["sites"])
    checks = [
        (summary["verdicts"], "Verdicts", "the run trained no controls to compare with"),
        (summary["curves"], "Learning curves", "the run recorded no validation scores"),
        (bins or not classes, "Calibration", "the run recorded no reliability bins"),
        (summary["confusions"] or not classes, "Confusion matrices", "the run recorded none"),
        (
            any(site["survival"] for site in summary["sites"]) or summary["task"]["name"] != "survival",
            "Survival curves",
            "no hospital has ten test patients or more",
        ),
        (summary["similarity"], "Similarity of the sites", "the run recorded no similarity of updates"),
        (
            summary["separation"],
            "Separation of the adapters",
            "the method has no two adapters to compare, or recorded nothing about them",
        ),
        (summary["traffic"], "Traffic and time", "the run recorded no rounds"),
        (summary["sheet"], "Data sheet", "the run carries none"),
        (summary["experiment"], "Experiment", "experiment.toml is not in the run directory"),
        (summary["audits"], "What attacks learn of patients", "the run was not audited; see `confrere audit`"),
    ]
    return [{"section": section, "why": why} for data, section, why in checks if not data]
