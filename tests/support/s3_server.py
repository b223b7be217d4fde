"""An S3 server in the process of the test, by moto."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest


@contextlib.contextmanager
def s3_server(bucket: str) -> Iterator[Any]:
    """Run an S3 server with one empty bucket; yield a boto3 client of it.

    Within the block the AWS variables of the environment point to the server.
    """
    boto3 = pytest.importorskip("boto3")
    moto = pytest.importorskip("moto.server")

    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        client = boto3.client("s3")
        client.create_bucket(Bucket=bucket)
        yield client
    server.stop()
