"""What is wrong with the data, looked for before a model is trained on it.

findings = run_audit(data, "artifacts/audit/photos")     # audit.json and index.html there; `data.leaked_test_rows` is set
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from train.audit import duplicates, labels, page
from train.data import ImageData
from train.data.source import PARTS, notify
from train.failures import AuditOutOfMemory, is_out_of_memory

LAYOUT = 3  # of the findings; kept ones of another layout are found anew
RARE = 0.1  # a class with less than this share of the largest class's images is rare
FEW = 10  # training images that are too few to learn a class from
ODD_AREA = 8.0  # times more or less than the median area is an odd size
ODD_SHAPE = 2.5  # times wider or narrower than the median shape is one too
ODD_MODE = 0.05  # a mode that a smaller share of the images has is odd
SHOWN = 200  # of a kind in audit.json beside the full count; leaked test images are all there

Findings = dict[str, Any]


def run_audit(data: ImageData, out: str | Path | None = None) -> Findings:
    """Look at a data module after `setup`, say what matters, and write audit.json and index.html to `out`.

    What was found is kept with the decoded pixels, so that the next run on the same data and split costs nothing.
    """
    try:
        findings = _kept(data) or _keep(data, collect_findings(data))
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise AuditOutOfMemory(data.device) from error
        raise
    apply_findings(data, findings)
    if out is not None:
        _write(out, findings, page.render(findings, data))
    for line in summarize(findings):
        notify(f"audit: {line}")
    return findings


def apply_findings(data: ImageData, findings: Findings) -> None:
    """Let the data module know what was found in it."""
    data.record_audit(findings["leakage"]["test"]["positions"], summarize(findings))


def write_refusal(data: ImageData, problem: str, out: str | Path) -> None:
    """Write what is known of data that `setup` refused after it looked at all images: why, and what can't be read."""
    findings = {
        "source": data.source,
        "problem": problem,
        "classes": data.classes,
        "unreadable": _unreadable(data),
    }
    _write(out, findings, page.refusal(findings))


def _write(out: str | Path, findings: Findings, text: str) -> None:
    directory = Path(out).expanduser()
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "audit.json").write_text(json.dumps(findings, indent=1) + "\n")
    (directory / "index.html").write_text(text)


def _unreadable(data: ImageData) -> list[dict[str, str]]:
    return [{"file": name, "problem": problem} for name, problem in data.unreadable]


def collect_findings(data: ImageData) -> Findings:
    """All that is looked for, as plain values."""
    facts, truth = data.decoded.metadata, data.dataset.labels
    part = np.full(len(facts), "", "U5")
    for name in PARTS:
        part[data.index[name]] = name
    usable, device = part != "", data.device
    exact = duplicates.exact(facts["sha256"], usable)
    first_of_kind = usable.copy()
    first_of_kind[exact.second] = False  # copies of copies would only repeat what is found
    near = duplicates.near(data.decoded.pixels, first_of_kind, device, _mirrors(data))
    doubtful = labels.suspects(
        data.decoded.pixels,
        truth,
        np.flatnonzero(usable),
        len(data.classes),
        device,
        _groups(len(part), exact, near),
    )

    def image(i: int) -> dict[str, Any]:
        return {
            "position": int(i),
            "file": data.dataset.items.name(int(i)),
            "part": str(part[i]),
            "label": data.classes[truth[i]],
        }

    def pairs(found: duplicates.Pairs) -> dict[str, Any]:
        across = part[found.first] != part[found.second]
        order = np.argsort(~across, kind="stable")[
            :SHOWN
        ]  # across parts first, and the closest first
        return {
            "count": len(found.first),
            "across_parts": int(across.sum()),
            "other_label": int((truth[found.first] != truth[found.second]).sum()),
            "pairs": [
                {
                    "first": image(found.first[p]),
                    "second": image(found.second[p]),
                    "likeness": round(float(found.likeness[p]), 3),
                }
                for p in order.tolist()
            ],
        }

    return {
        "source": data.source,
        "digest": data.digest,
        "classes": data.classes,
        "counts": data.counts,
        "unreadable": _unreadable(data),
        "exact_duplicates": pairs(exact),
        "near_duplicates": pairs(near)
        | {"looked_for": duplicates.told_apart(data.decoded.pixels), "complete": near.complete},
        "leakage": {name: _leaked(name, part, exact, near) for name in ("test", "val")},
        "class_counts": _class_counts(data),
        "odd": _odd(facts, usable, image),
        "labels": {
            "accuracy": round(doubtful.accuracy, 4),
            "count": len(doubtful.index),
            "suspects": [
                {**image(i), "suggested": data.classes[k], "confidence": round(float(p), 3)}
                for i, k, p in zip(
                    doubtful.index[:SHOWN],
                    doubtful.label[:SHOWN],
                    doubtful.confidence[:SHOWN],
                    strict=True,
                )
            ],
        },
    }


def _groups(count: int, *found: duplicates.Pairs) -> np.ndarray:
    """int64 [count]: images that are copies of one another, or of one another's copies, have the same number."""
    first, second = (
        np.concatenate([getattr(pairs, side) for pairs in found]) for side in ("first", "second")
    )
    graph = coo_array((np.ones(len(first), bool), (first, second)), (count, count))
    return connected_components(graph, directed=False)[1]


def _mirrors(data: ImageData) -> bool:
    """Whether training shows mirror images, so that one in another part is a duplicate."""
    return data.augment.flip != "none"


def _leaked(
    name: str, part: np.ndarray, exact: duplicates.Pairs, near: duplicates.Pairs
) -> dict[str, Any]:
    """Images of a part that have a duplicate in what is trained on (for test: or chosen with).

    Exact copies stand for one another: a near duplicate of one is a near duplicate of all.
    """
    twins = np.arange(len(part))
    twins[exact.second] = exact.first
    first = np.concatenate([exact.first, twins[near.first]])
    second = np.concatenate([exact.second, twins[near.second]])
    seen = {"test": ("train", "val"), "val": ("train",)}[name]
    touched = np.zeros(
        len(part), bool
    )  # by its representative: a duplicate of it is in a seen part
    inside = np.isin(part, seen)
    np.logical_or.at(touched, twins, inside)  # a copy itself
    neighbours = touched.copy()
    np.logical_or.at(neighbours, first, touched[second])
    np.logical_or.at(neighbours, second, touched[first])
    positions = np.flatnonzero(neighbours[twins] & (part == name))
    return {
        "count": len(positions),
        "share": round(len(positions) / max(1, int((part == name).sum())), 4),
        "positions": positions.tolist(),
    }


def _class_counts(data: ImageData) -> list[dict[str, Any]]:
    """Images of each class by part, and what is wrong with that, if anything."""
    count = {
        part: np.bincount(data.dataset.labels[data.index[part]], minlength=len(data.classes))
        for part in PARTS
    }
    most = count["train"].max()
    rows = []
    for k, name in enumerate(data.classes):
        train = int(count["train"][k])
        note = (
            f"fewer than {FEW} to train on"
            if train < FEW
            else "rare"
            if train < RARE * most
            else ""
        )
        rows.append({"label": name, **{part: int(count[part][k]) for part in PARTS}, "note": note})
    return rows


def _odd(facts: np.ndarray, usable: np.ndarray, image) -> dict[str, Any]:
    """Sizes and modes that stand out, with the usual ones."""
    index = np.flatnonzero(usable & (facts["width"] > 0))
    width, height = facts["width"][index].astype(float), facts["height"][index].astype(float)
    area, shape = width * height, width / height
    modes, which, count = np.unique(facts["mode"][index], return_inverse=True, return_counts=True)
    sizes = np.unique(np.stack([width, height], 1).astype(int), axis=0, return_counts=True)
    ratio = np.maximum(area / np.median(area), np.median(area) / area)
    bent = np.maximum(shape / np.median(shape), np.median(shape) / shape)
    rare = (count / len(index) < ODD_MODE)[which]
    listed = []
    for j in np.flatnonzero((ratio > ODD_AREA) | (bent > ODD_SHAPE) | rare).tolist():
        size = f"{int(width[j])}x{int(height[j])}"
        why = [f"size {size}"] if ratio[j] > ODD_AREA or bent[j] > ODD_SHAPE else []
        why += [f"mode {modes[which[j]]}"] if rare[j] else []
        listed.append({**image(index[j]), "why": ", ".join(why)})
    usual = sizes[0][sizes[1].argsort()[::-1][:5]], np.sort(sizes[1])[::-1][:5]
    return {
        "modes": {str(m): int(c) for m, c in zip(modes, count, strict=True)},
        "sizes": {f"{w}x{h}": int(c) for (w, h), c in zip(*usual, strict=True)},
        "different_sizes": len(sizes[0]),
        "count": len(listed),
        "images": listed[:SHOWN],
    }


def summarize(findings: Findings) -> list[str]:
    """What a person should know before training, one line each; what is fine is not mentioned."""
    lines = []
    for part, images, text in (
        (
            "test",
            "test",
            "in the data that is trained on; test figures are given with and without them",
        ),
        (
            "val",
            "validation",
            "in the training part; the best epoch, calibration and thresholds rest on them",
        ),
    ):
        leak = findings["leakage"][part]
        if leak["count"]:
            lines.append(
                f"WARNING: {leak['count']} {images} images ({leak['share']:.1%}) have an exact or near "
                f"duplicate {text}"
            )
    for kind, name in (("exact_duplicates", "exact"), ("near_duplicates", "near")):
        found = findings[kind]
        if found["count"]:
            other = (
                f", {found['other_label']} with different labels" if found["other_label"] else ""
            )
            lines.append(
                f"{found['count']} {name} duplicates, {found['across_parts']} across parts{other}"
            )
    if not findings["near_duplicates"]["looked_for"]:
        lines.append(
            f"near duplicates are not looked for: that takes images of {duplicates.LEAST} pixels or more"
        )
    if not findings["near_duplicates"]["complete"]:
        lines.append(
            "more images look alike than were compared; only the closest were, so there may be more near "
            "duplicates than these"
        )
    notes = [row for row in findings["class_counts"] if row["note"]]
    if notes:
        lines.append(
            "few images: " + ", ".join(f"{row['label']} ({row['train']})" for row in notes[:10])
        )
    if findings["odd"]["count"]:
        lines.append(f"{findings['odd']['count']} images of odd size or mode")
    if findings["labels"]["count"]:
        lines.append(
            f"{findings['labels']['count']} labels to look at, by a first model of "
            f"{findings['labels']['accuracy']:.0%} accuracy"
        )
    return lines


def _place(data: ImageData) -> Path | None:
    if data.cache is None:
        return None
    split = {part: data.index[part].tolist() for part in PARTS}
    names = hashlib.sha256(
        "\0".join(map(data.dataset.items.name, range(len(data.dataset.items)))).encode()
    ).hexdigest()
    key = json.dumps(
        [LAYOUT, data.digest, names, data.source, split, data.input.model_dump(), _mirrors(data)]
    )
    return data.cache / "audit" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def _kept(data: ImageData) -> Findings | None:
    place = _place(data)
    try:
        return json.loads(place.read_text()) if place else None
    except (OSError, ValueError):
        return None


def _keep(data: ImageData, findings: Findings) -> Findings:
    place = _place(data)
    if place:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            staged = place.with_name(f".{place.name}-{os.getpid()}")
            staged.write_text(json.dumps(findings))
            staged.replace(place)
        except OSError:
            pass  # it only saves time
    return findings
