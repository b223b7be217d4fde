"""The findings in words: lines for the terminal and for the model card."""

from models.image.input_spec import SIXTEEN_BITS
from train.audit.duplicates import MIN_SIDE
from train.audit.findings import (
    DuplicateFindings,
    Findings,
    LabelFindings,
    SampleBitsFindings,
    UnusualFindings,
)
from train.audit.leakage import Leak

# Findings that the user can review one by one.
Reviewable = Leak | DuplicateFindings | LabelFindings | UnusualFindings

FEW_SAMPLE_BITS = 12  # of 16; images that use no more are nearly black
LISTED_CLASSES = 10  # classes with few images that a line names


def summarize(findings: Findings) -> list[str]:
    """Return one line for each thing to know before training; empty where nothing is wrong."""
    lines = []
    test_leak = findings["leakage"]["test"]
    if test_leak["count"]:
        lines.append(
            _summarize_leak(test_leak, "test")
            + "in another part; the test metrics leave out such images and are also given with them"
        )
    val_leak = findings["leakage"]["val"]
    if val_leak["count"]:
        lines.append(
            _summarize_leak(val_leak, "validation")
            + "in the training part; the best epoch, calibration and thresholds depend on such "
            "images"
        )

    near = findings["near_duplicates"]
    lines += _summarize_duplicates(findings["exact_duplicates"], "exact")
    lines += _summarize_duplicates(near, "near")
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
    unusual = findings["odd"]
    if count_new(unusual):
        images = format_count(unusual["count"], "image")
        lines.append(f"{images} of unusual size or mode{describe_reviewed(unusual)}")
    lines += _summarize_sample_bits(findings["sample_bits"])
    lines += _summarize_labels(findings["labels"])
    return lines


def format_count(count: int, noun: str) -> str:
    """Return a number with its noun, such as `1 image` or `2 images`."""
    return f"{count} {pluralize(noun, count)}"


def count_new(findings: Reviewable) -> int:
    """Return the number of findings that the user has not reviewed."""
    return findings["count"] - findings["reviewed"]


def describe_reviewed(findings: Reviewable) -> str:
    """Return how many of the findings are reviewed, to follow their number; empty for none."""
    return f", {findings['reviewed']} reviewed" if findings["reviewed"] else ""


def pluralize(noun: str, count: int) -> str:
    """Return a regular noun in the form that follows the number."""
    return noun if count == 1 else f"{noun}s"


def _summarize_sample_bits(found: SampleBitsFindings) -> list[str]:
    """Say which bits of 16-bit images are read, where that is not all of them."""
    if found["count"] == 0:
        return []
    count = format_count(found["count"], "image")
    read = found["significant_bits"]
    if found["clipped"]:
        return [
            f"WARNING: {found['clipped']} of {count} with 16 bits a sample have samples "
            f"above {2**read - 1}, which become white; set data.significant_bits: "
            f"{found['largest']} to keep them apart"
        ]
    if read < SIXTEEN_BITS:
        return [
            f"{count} with 16 bits a sample, of which {read} are read: {2**read - 1} is white, in "
            "training as in serving; data.significant_bits changes it"
        ]
    if found["largest"] <= FEW_SAMPLE_BITS:
        needed = max(found["largest"], 8)
        return [
            f"WARNING: {count} with 16 bits a sample use only {needed} of them and are dark; set "
            f"data.significant_bits: {needed} to brighten them"
        ]
    return []


def _summarize_leak(leak: Leak, part: str) -> str:
    """Return the first half of a line; the caller names the part with the duplicates."""
    images = format_count(leak["count"], f"{part} image")
    verb = "has" if leak["count"] == 1 else "have"
    warning = "WARNING: " if count_new(leak) else ""
    share = f"{leak['share']:.1%}{describe_reviewed(leak)}"
    return f"{warning}{images} ({share}) {verb} an exact or near duplicate "


def _summarize_duplicates(duplicates: DuplicateFindings, kind: str) -> list[str]:
    """Return a line on the pairs of duplicates of one kind, where some are new."""
    if not count_new(duplicates):
        return []
    pairs = format_count(duplicates["count"], f"{kind} duplicate")
    line = f"{pairs}, {duplicates['across_parts']} across parts"
    if duplicates["other_label"]:
        line += f", {duplicates['other_label']} with different labels"
    return [line + describe_reviewed(duplicates)]


def _summarize_labels(labels: LabelFindings) -> list[str]:
    """Return a line on the suspicious labels, or on why they are not checked."""
    if not labels["checked"]:
        return [
            f"labels are not checked: the simple model for it has {labels['accuracy']:.1%} "
            f"accuracy, not more than always predicting the largest class "
            f"({labels['largest_share']:.1%})"
        ]
    if not count_new(labels):
        return []
    suspects = format_count(labels["count"], "suspicious label")
    line = f"{suspects} to check, by a simple model of {labels['accuracy']:.0%} accuracy"
    return [line + describe_reviewed(labels)]
