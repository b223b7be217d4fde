"""The findings in words: lines for the terminal and for the model card."""

from train.audit.duplicates import MIN_SIDE
from train.audit.findings import DuplicateFindings, Findings
from train.audit.leakage import Leak

LISTED_CLASSES = 10  # classes with few images that a line names


def summarize(findings: Findings) -> list[str]:
    """Return one line for each thing to know before training; empty where nothing is wrong."""
    lines = []
    if findings["leakage"]["test"]["count"]:
        lines.append(
            _summarize_leak(findings["leakage"]["test"], "test")
            + "in another part; test metrics are reported with and without them"
        )
    if findings["leakage"]["val"]["count"]:
        lines.append(
            _summarize_leak(findings["leakage"]["val"], "validation")
            + "in the training part; the best epoch, calibration and thresholds depend on them"
        )

    near = findings["near_duplicates"]
    if findings["exact_duplicates"]["count"]:
        lines.append(_summarize_duplicates(findings["exact_duplicates"], "exact"))
    if near["count"]:
        lines.append(_summarize_duplicates(near, "near"))
    if not near["looked_for"]:
        lines.append(
            f"near duplicates are not searched: that needs images of {MIN_SIDE} pixels a side or "
            "more"
        )
    if not near["complete"]:
        lines.append(
            "too many images are alike to compare all of them: only the closest pairs were "
            "compared, so there may be more near duplicates"
        )

    small_classes = [row for row in findings["class_counts"] if row["note"]]
    if small_classes:
        listed = [f"{row['label']} ({row['train']})" for row in small_classes[:LISTED_CLASSES]]
        lines.append("few images: " + ", ".join(listed))
    if findings["odd"]["count"]:
        lines.append(f"{findings['odd']['count']} images of unusual size or mode")
    labels = findings["labels"]
    if labels["count"]:
        lines.append(
            f"{labels['count']} suspicious labels to check, by a simple model of "
            f"{labels['accuracy']:.0%} accuracy"
        )
    return lines


def _summarize_leak(leak: Leak, part: str) -> str:
    """Return the first half of a line; the caller names the part with the duplicates."""
    images = f"{leak['count']} {part} images ({leak['share']:.1%})"
    return f"WARNING: {images} have an exact or near duplicate "


def _summarize_duplicates(duplicates: DuplicateFindings, kind: str) -> str:
    line = f"{duplicates['count']} {kind} duplicates, {duplicates['across_parts']} across parts"
    if duplicates["other_label"]:
        line += f", {duplicates['other_label']} with different labels"
    return line
