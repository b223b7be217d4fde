"""`imago serve label`: the labelling page of a directory of kept images, without a service."""

import argparse

from models.kept import open_kept
from models.labelling import KeptSource, LabelApp, LocalServer
from models.labelling.local_server import DEFAULT_HOST, DEFAULT_PORT

DESCRIPTION = "Label the images that a service kept, on a page in the browser."


def main(arguments: list[str]) -> int:
    """Serve the page until Ctrl-C. Raises ValueError for a directory or address of no use."""
    parser = argparse.ArgumentParser("imago serve label", description=DESCRIPTION)
    parser.add_argument("kept", metavar="DIR", help="directory, or s3:// URL, of serve --keep")
    parser.add_argument(
        "--classes",
        default="",
        help="classes, separated by commas, beside those that the images name",
    )
    parser.add_argument(
        "--host", default=DEFAULT_HOST, help="address to listen on (default: %(default)s)"
    )
    parser.add_argument(
        "--port",
        type=int,
        default=DEFAULT_PORT,
        help="port; 0: any free one (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    folder = open_kept(options.kept)
    classes = [name.strip() for name in options.classes.split(",") if name.strip()]

    app = LabelApp(KeptSource(folder, lambda: classes))
    try:
        count = len(folder.read_images())
    except OSError as error:
        raise ValueError(f"{folder.location}: {error.strerror or error}") from error
    if not count:
        raise ValueError(
            f"{folder.location}: no kept images; start the service with --keep {folder.location}"
        )
    with LocalServer(options.host, options.port, app) as server:
        print(f"label: {server.url}label shows {count} images; stop it with Ctrl-C", flush=True)
        server.serve_forever()
    return 0
