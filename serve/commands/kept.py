"""`imago serve kept`: show what a service kept, or delete the images of a request."""

import argparse
from collections import Counter

from models.kept import KeptFolder, LabelledImage, open_kept

DESCRIPTION = "Show the images that a service kept, or delete those of a request."


def main(arguments: list[str]) -> int:
    """Run the command. Raises ValueError for a place that can't be read, or an unknown id."""
    parser = argparse.ArgumentParser("imago serve kept", description=DESCRIPTION)
    parser.add_argument("kept", metavar="DIR", help="directory, or s3:// URL, of serve --keep")
    parser.add_argument(
        "--delete", metavar="REQUEST_ID", help="delete the images of this request, and their labels"
    )
    options = parser.parse_args(arguments)
    folder = open_kept(options.kept)
    try:
        if options.delete is None:
            print(describe(folder))
        else:
            delete(folder, options.delete)
    except OSError as error:
        raise ValueError(f"{folder.location}: {error.strerror or error}") from error
    return 0


def delete(folder: KeptFolder, request_id: str) -> None:
    """Delete the images of a request. Raises ValueError if there are none."""
    count = folder.delete_request(request_id)
    if not count:
        raise ValueError(f"{folder.location}: no image of request {request_id} is kept")
    print(f"{_pluralize(count, 'image')} deleted")


def describe(folder: KeptFolder) -> str:
    """Return how many images are kept, why, and how many have labels."""
    entries = folder.read()
    reasons = Counter(reason.value for entry in entries for reason in entry.image.reasons)
    labelled = [entry for entry in entries if entry.label is not None]
    conflicts = [entry for entry in entries if entry.has_conflict]

    lines = [
        f"{folder.location}: {_pluralize(len(entries), 'image')}, {folder.count_bytes()} bytes"
        f"{_describe_days(entries)}"
    ]
    lines += [f"  {reason}: {count}" for reason, count in sorted(reasons.items())]
    lines.append(f"  labelled: {len(labelled)}, with a conflict: {len(conflicts)}")
    return "\n".join(lines)


def _describe_days(entries: list[LabelledImage]) -> str:
    if not entries:
        return ""
    first = entries[0].image.time.date()
    last = entries[-1].image.time.date()
    return f", from {first} to {last}"


def _pluralize(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
