"""Look at the data that training would take, and train nothing.

python -m train audit DATA [--recipe R] [--out DIR] [fit flags]
"""

from pathlib import Path
from typing import Any

from train import audit
from train.data import DataError, ImageData

REPORTS = "artifacts/audit"


def look(settings: dict[str, Any], system: Any, data: ImageData, out: str | None = None) -> None:
    """Write the report to `out` and say where it is. Raises DataError with one line for data that can't be used;
    where files can't be read, the report lists them nevertheless."""
    data.max_unreadable = 1.0  # they are what is looked for
    place = Path(out or f"{REPORTS}/{data.found.name}")
    try:
        data.setup()
    except DataError as error:
        if getattr(
            data, "unreadable", None
        ):  # which may be why, and then they are what one wants to see
            audit.refused(data, str(error), place)
            print(f"audit: {place / 'index.html'} and {place / 'audit.json'}")
        raise
    if not audit.summary(audit.run(data, place)):
        print("audit: nothing found")
    print(f"audit: {place / 'index.html'} and {place / 'audit.json'}")
