"""The findings in words: lines for the terminal and for the model card."""

from models.image.input_spec import SIXTEEN_BITS
from train.audit.duplicates import MIN_SIDE
from train.audit.findings import DuplicateFindings, Findings, LabelFindings, SampleBitsFindings
from train.audit.leakage import Leak

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
        lines.append(f"{format_count(findings['odd']['count'], 'image')} of unusual size or mode")
    lines += _summarize_sample_bits(findings["sample_bits"])
    lines += _summarize_labels(findings["labels"])
    return lines


def format_count(count: int, noun: str) -> str:
    """Return a number with its noun, such as `1 image` or `2 images`."""
    return f"{count} {pluralize(noun, count)}"


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
    return f"WARNING: {images} ({leak['share']:.1%}) {verb} an exact or near duplicate "


def _summarize_duplicates(duplicates: DuplicateFindings, kind: str) -> str:
    """Return a line on the pairs of duplicates of one kind."""
    pairs = format_count(duplicates["count"], f"{kind} duplicate")
    line = f"{pairs}, {duplicates['across_parts']} across parts"
    if duplicates["other_label"]:
        line += f", {duplicates['other_label']} with different labels"
    return line


def _summarize_labels(labels: LabelFindings) -> list[str]:
    """Return a line on the suspicious labels, or on why they are not checked."""
    if not labels["checked"]:
        return [
            f"labels are not checked: the simple model for it has {labels['accuracy']:.1%} "
            f"accuracy, not more than always predicting the largest class "
            f"({labels['largest_share']:.1%})"
        ]
    if not labels["count"]:
        return []
    suspects = format_count(labels["count"], "suspicious label")
    return [f"{suspects} to check, by a simple model of {labels['accuracy']:.0%} accuracy"]
