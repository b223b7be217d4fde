"""Every setting of the service: a flag, an IMAGO_ variable and a default, in one class."""

import os
from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

PREFIX = "IMAGO_"


class Settings(BaseSettings):
    """What a flag says wins over an IMAGO_ variable, which wins over the default."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, extra="ignore")

    # What is served
    store: Path = Field(Path("artifacts/store"), description="directory that holds the bundles")
    model: str = Field(
        "", description="name of the model; the only one of the store when not given"
    )
    version: str = Field(
        "latest", pattern="^(latest|[1-9][0-9]*)$", description="latest or a number"
    )
    variant: str = Field("auto", description="auto, or one that the bundle has: fp32, int8")
    engine: Literal["auto", "onnxruntime", "cuda", "openvino"] = Field(
        "auto", description="what runs the graph"
    )

    # Where
    host: Literal["0.0.0.0", "127.0.0.1", "::"] = Field(
        "0.0.0.0", description="address to listen on"
    )
    port: int = Field(8000, ge=1024, le=65535, description="port of the service")
    metrics_port: int = Field(9090, ge=0, le=65535, description="port of /metrics; 0 turns it off")

    # How much of the machine
    threads: int = Field(
        0,
        ge=0,
        le=1024,
        description="cores of each worker; 0: the CPU quota divided by the workers",
    )
    workers: int = Field(1, ge=1, le=64, description="worker processes")
    api_processes: int = Field(1, ge=1, le=64, description="HTTP processes")
    max_batch_size: int = Field(8, ge=1, le=1024, description="most images in one run of the graph")
    batch_wait_ms: float = Field(0, ge=0, le=1000, description="how long a batch waits for company")

    # Bounds
    max_pending: int = Field(
        256, ge=1, description="images accepted and not yet answered; more get 429"
    )
    max_pending_bytes: int = Field(
        256 << 20, ge=1, description="bytes of bodies accepted and not yet answered"
    )
    max_images: int = Field(64, ge=1, description="images in one request")
    max_body_bytes: int = Field(32 << 20, ge=1, description="bytes of one request's body")
    max_pixels: int = Field(
        50_000_000, ge=1, description="pixels of one image by its header; of 16 bits, half as many"
    )
    max_connections: int = Field(1024, ge=1, description="open connections of one HTTP process")
    deadline_ms: int = Field(10_000, ge=1, description="a request not answered by then gets 504")
    read_timeout_seconds: float = Field(10, gt=0, description="time for a request to arrive whole")
    keep_alive_seconds: int = Field(75, ge=1, description="time an idle connection stays open")
    drain_seconds: float = Field(20, ge=2, description="time between SIGTERM and the end, at most")
    worker_timeout_seconds: float = Field(
        7,
        gt=0,
        description="a worker stuck for so long, and for five times what a "
        "batch takes it, is replaced; less than deadline_ms, so that its requests "
        "get 503, not 504",
    )

    # Trust
    reload_seconds: float = Field(
        5, ge=0, description="between two looks at where latest points; 0: never"
    )
    drift_window: int = Field(
        2000,
        ge=0,
        description="last images of a worker that drift is measured on, 10 or "
        "more a bin: with many classes, neighbours share one; 0: none",
    )
    cache_entries: int = Field(
        0, ge=0, description="answers each HTTP process keeps by the image's digest; 0: none"
    )
    shadow_version: int | None = Field(
        None, ge=1, description="second version that runs in idle time, to compare"
    )
    shadow_share: float = Field(
        0.1, gt=0, le=1, description="share of images that the second version gets too"
    )

    # Access and logs
    api_key: SecretStr | None = Field(
        None, description="sent as X-API-Key or bearer token; an empty one is refused"
    )
    api_key_file: Path | None = Field(None, description="file with the key, instead of it")
    public_key: Path | None = Field(
        None, description="PEM file; only bundles signed with its other half are served"
    )
    log_format: Literal["json", "text"] = Field("json", description="of the log on stderr")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least level that is logged"
    )
    access_log: bool = Field(False, description="log every request, not only those that failed")
    tracing: bool = Field(
        False, description="OpenTelemetry spans, sent where the OTEL_ variables say"
    )

    @field_validator("api_key")
    @classmethod
    def _not_empty(cls, key: SecretStr | None) -> SecretStr | None:
        if key is None:
            return None
        stripped = (
            key.get_secret_value().strip()
        )  # a Secret made with echo ends in a newline, which no header can
        if not stripped:
            raise ValueError("the key is empty; leave the setting away where none is wanted")
        return SecretStr(stripped)

    @field_validator("api_key_file")
    @classmethod
    def _readable(cls, path: Path | None) -> Path | None:
        if path is not None and not os.path.isfile(
            path
        ):  # Path.is_file raises where a directory is closed to us
            raise ValueError(f"no such file: {path}")
        return path

    @model_validator(mode="after")
    def _one_key(self) -> "Settings":
        if self.api_key and self.api_key_file:
            raise ValueError("give api_key or api_key_file, not both")
        if not (self.api_key or self.api_key_file):
            for name in (f"{PREFIX}API_KEY", f"{PREFIX}API_KEY_FILE"):
                if (
                    os.environ.get(name) == ""
                ):  # as other empty variables it is not read, but it must not open the door
                    raise ValueError(f"{name} is empty; unset it where no key is wanted")
        if self.metrics_port == self.port:
            raise ValueError("port and metrics_port must differ")
        return self

    def key(self) -> bytes | None:
        """The API key, from wherever it was given; None where none is asked for."""
        if self.api_key_file:
            try:
                key = self.api_key_file.read_text().strip()
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(
                    f"{self.api_key_file}: the file with the API key can't be read: {error}"
                ) from error
            if not key:
                raise ValueError(f"{self.api_key_file}: the file with the API key is empty")
            return key.encode()
        return self.api_key.get_secret_value().encode() if self.api_key else None
