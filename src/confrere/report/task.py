"""What a page says of a task: which scores there are, how they are called and read, and which one stands for all."""

from __future__ import annotations

from collections.abc import Mapping

from confrere.errors import RunError
from confrere.metrics.paired import spoken
from confrere.report.reading import Json, as_dict, need
from confrere.tasks import CLASSIFICATION
from confrere.tasks.multilabel import MultiLabel

METRICS = tuple(CLASSIFICATION.measures)
LEFT_OUT = ("accuracy",)
"""Measures that a comparison does not show: another one says more."""
_WORDS = {
    "balanced_accuracy": (
        "Balanced accuracy",
        "%",
        "The share of images named rightly, averaged over the classes, so that rare classes count as much as common "
        "ones. Classes without a test image are left out, and said.",
    ),
    "auroc": (
        "AUROC",
        "",
        "How well the model ranks images of a class above others; 0.5 is guessing, 1 is perfect. Mean over classes.",
    ),
    "f1": ("F1", "%", "Joins how many of a class are found with how many of the alarms are right. Mean over classes."),
    "accuracy": ("Accuracy", "%", ""),
    "ece": (
        "ECE",
        "",
        "Expected calibration error: the mean gap between how sure the model is and how often it is right; 0 is best.",
    ),
    "dice": (
        "Dice",
        "%",
        "Twice the area that the drawn and the true mask share, as a share of both areas together; 100 is perfect. "
        "Mean over the classes, without the background, that the true mask holds, then over images. Images whose "
        "mask is background only are left out, and said.",
    ),
    "iou": ("IoU", "%", "Intersection over union: the area that both masks share, as a share of what either covers."),
    "hd95": (
        "HD95",
        "% of diagonal, less is better",
        "How far the outlines of the two masks lie apart, in per cent of the diagonal of the image: 95 of 100 points "
        "of an outline are nearer to the other one. 0 is best, 100 stands where nothing was drawn.",
    ),
    "box_iou": ("Box IoU", "%", "The same as IoU, of the boxes around the two masks."),
    "average_precision": (
        "Average precision",
        "",
        "The area under precision against recall of a finding, mean over findings; guessing gives the share of images "
        "that have it.",
    ),
    "brier": (
        "Brier score",
        "%, less is better",
        "The mean squared gap between a finding's probability and its truth.",
    ),
    "box_f1": (
        "F1 of boxes",
        "%",
        "Twice the lesions found, as a share of true and found boxes together, image by image; 100 where there is "
        "neither. Found is a lesion whose box overlaps the true one by half or more of what both cover; boxes count "
        "from the score that was best on validation images.",
    ),
    "ap50": (
        "AP50",
        "%",
        "The area under precision against recall over all scores, found being as above; mean over classes (COCO).",
    ),
    "ap": ("AP", "%", "The same, mean over ten overlaps that count as found, from 0.50 to 0.95 (COCO)."),
    "best_iou": ("IoU of boxes", "%", "How far a true box is overlapped by the best found one, in per cent of both."),
    "harrell": (
        "Concordance",
        "%",
        "Of all pairs of patients of whom it is known who had the event first, the share that the model puts into this "
        "order (Harrell); 50 is guessing, 100 is perfect.",
    ),
    "antolini": ("Concordance in time", "%", "The same by the predicted curves at the time of each event (Antolini)."),
    "uno": ("Concordance, weighted", "%", "The same, weighted against censoring (Uno)."),
    "auc": ("AUC", "", "How well the model parts who had the event by a time from who had not; mean over time."),
    "explained": (
        "Explained",
        "%",
        "How much of what a hidden patch shows the network draws: 1 less its squared error, as a share of the error of "
        "drawing each patch evenly grey, in its own mean; 0 where it draws no better than that.",
    ),
    "error": ("Error", "", "The mean squared error over hidden patches. Compare it within one setting only."),
    "matched": ("Matched", "%", "How often an image's other view is the most similar one of up to 64 images."),
    "told": (
        "Slabs told",
        "%",
        "Of the shuffled slabs of a volume, the share of which the network tells where they came from; mean over the "
        "stages of its encoder. Guessing gives one over the number of slabs.",
    ),
    "rebuilt": (
        "Rebuilt",
        "%",
        "How much of a volume with masked cubes the network rebuilds: 1 less its squared error over all voxels, as a "
        "share of the error of drawing all of them in their mean; 0 where it draws no better than that.",
    ),
    "loss": ("Loss", "", "The mean cross-entropy of that choice, in nats."),
    "ibs": ("Brier score", "%, less is better", "The mean squared gap between predicted survival and what happened."),
}
"""Short name, unit (none: a number with two decimals) and meaning of the measures that need no guess."""
_OF_FINDINGS = {
    "auroc": "How well the model ranks images with a finding above those without it; 50 is guessing, 100 is perfect. "
    "Mean over the findings that test images both have and have not.",
    "f1": "Joins how many images with a finding are found at a probability of 0.5 with how many of the alarms are "
    "right. Mean over the findings that occur.",
}
"""Meaning of measures that are of findings, not classes, where an image may have several."""


def of_whole(words: str, whole: bool) -> str:
    """Return words about a method as they hold where it trains a ``whole`` network and there is no adapter."""
    return words.replace("adapter", "network") if whole else words


def task_of(given: Json, where: str) -> Json:
    """Return the task of results.json or comparison.json as a page shows it; classification where none is named.

    Returns:
        ``name`` and ``title``; ``headline`` (key), ``headline_title`` and ``spoken``, its name in a sentence;
        ``called``, what an answer is, ``class`` or ``finding``; ``measures``, the headline first: ``key``, ``title``,
        ``name``, ``column`` (its head, with the unit), ``percent`` (whether it is shown as a share) and ``meaning``.

    Raises:
        RunError: the task is named and a part of it is missing or no measure.
    """
    task = as_dict(given.get("task")) if "task" in given else CLASSIFICATION.describe()
    where = f"{where}, task"
    name, headline, titles = need(task, "name", where), need(task, "headline", where), need(task, "measures", where)
    if not isinstance(titles, dict) or headline not in titles:
        raise RunError("the headline is none of the measures", where=where, fix="run again", code="run-file")
    order = [headline, *(key for key in titles if key != headline)]
    of_findings = name == MultiLabel.name
    return {
        "name": str(name),
        "title": str(task.get("title") or name),
        "headline": headline,
        "headline_title": str(titles[headline]),
        "spoken": spoken(headline),
        "called": "finding" if of_findings else "class",
        "measures": [_measure(key, str(titles[key]), _OF_FINDINGS if of_findings else {}) for key in order],
    }


def _measure(key: str, title: str, meanings: Mapping[str, str]) -> Json:
    name, unit, meaning = _WORDS.get(key, (title, "%", ""))
    meaning = meanings.get(key, meaning)
    column = f"{name}, {unit}" if unit else name
    return {"key": key, "title": title, "name": name, "column": column, "percent": bool(unit), "meaning": meaning}
