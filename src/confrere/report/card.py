"""A model card for a run, in the form the Hugging Face Hub reads."""

from __future__ import annotations

from typing import Any

from confrere.report.reading import Json, as_dict
from confrere.report.render import environment
from confrere.report.task import LEFT_OUT

_LICENCES = {"apache-2.0", "mit", "cc-by-4.0", "cc-by-nc-4.0", "bsd-3-clause"}


def card(summary: Json) -> str:
    """Return the model card of a run: YAML front matter, then Markdown.

    It holds sums over hospitals and scores, no counts by class and no number of a single patient.

    Args:
        summary: what :func:`summarize` returned.
    """
    template = environment(html=False).get_template("card.md.j2")
    text = template.render(
        s=summary, front=_front_matter(summary), measures=_measures(summary), licence=_licence(summary)
    )
    return text.strip() + "\n"


def _measures(summary: Json) -> list[Json]:
    return [measure for measure in summary["task"]["measures"] if measure["key"] not in LEFT_OUT]


def _front_matter(summary: Json) -> str:
    # The hub client takes a second to import and only a card needs it.
    from huggingface_hub import ModelCardData

    federation = summary["federation"]
    tags = ["confrere", "federated-learning", *["lora"] * (not summary["whole"]), "medical-imaging"]
    tags += ["synthetic-data"] * bool(federation["synthetic"])
    data = ModelCardData(
        language="en",
        license=_licence(summary),
        library_name=None if summary["whole"] else "peft",
        pipeline_tag=f"image-{summary['task']['name']}",
        base_model=_base_model(summary),
        tags=tags,
        model_name=f"{federation['name'] or 'federation'}-{summary['method']}",
        eval_results=_results(summary) or None,
    )
    return str(data.to_yaml())


def _results(summary: Json) -> list[Any]:
    from huggingface_hub import EvalResult

    name = str(summary["federation"]["name"] or "federation")
    main = summary["models"][0]["key"] if summary["models"] else None
    found = []
    for site in summary["sites"]:
        scores = site["models"].get(main)
        for measure in _measures(summary):
            value = scores["metrics"][measure["key"]]["value"] if scores else None
            if value is not None:
                result = EvalResult(
                    task_type=f"image-{summary['task']['name']}",
                    task_name=f"Image {summary['task']['title'].lower()}",
                    dataset_type="private",
                    dataset_name=f"{name}, {site['name']}",
                    # The hub merges results that differ in nothing else.
                    dataset_config=site["name"],
                    dataset_split="test",
                    metric_type=measure["key"],
                    metric_name=measure["title"],
                    metric_value=round(value, 4),
                )
                found.append(result)
    return found


def _licence(summary: Json) -> str:
    """Return the backbone's licence as the hub spells it, or "other"."""
    licence = str(as_dict(summary["backbone"]).get("licence", "")).lower()
    return licence if licence in _LICENCES else "other"


def _base_model(summary: Json) -> str | None:
    """Return the hub's name of the backbone, or None when it is not on the hub."""
    backbone = as_dict(summary["backbone"])
    for given in (backbone.get("source"), backbone.get("name")):
        name = str(given or "").removeprefix("hf:").removeprefix("hf-hub:")
        owner, slash, model = name.partition("/")
        if slash and owner and model and "/" not in model and " " not in name and ":" not in name:
            return name
    return None
