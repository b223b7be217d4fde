"""The settings of the service: each is a flag, an IMAGO_ variable and a default.

`serve.options` makes the flags. The supervisor reads the settings once and passes them to all
processes.
"""

import os
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from models.kept import open_kept
from models.store import DEFAULT_MAX_BYTES

PREFIX = "IMAGO_"  # of the environment variables
ANY_ORIGIN = "*"  # of cors_origins
ORIGIN = re.compile(r"https?://[^/\s?#@]+")


class Settings(BaseSettings):
    """A flag takes precedence over an IMAGO_ variable, and that over the default."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, extra="ignore")

    # Model
    store: str = Field(
        "artifacts/store",
        description="what holds the bundles: a directory, or s3://bucket/prefix, gs://… or az://…",
    )
    bundle: Path | None = Field(
        None, description="directory of one bundle, which is served instead of one of the store"
    )
    model: str = Field("", description="name of the model; needed if the store has several")
    version: str = Field(
        "latest", pattern="^(latest|[1-9][0-9]*)$", description="latest or a number"
    )
    variant: str = Field(
        "auto", description="variant of the bundle, such as fp32 or int8; auto: the fastest"
    )
    engine: Literal["auto", "onnxruntime", "cuda", "openvino"] = Field(
        "auto", description="runtime for the graph; auto: the fastest that is installed"
    )

    store_cache: Path | None = Field(
        None,
        description="directory for copies of what is served from a bucket; default "
        "~/.cache/imago/store",
    )
    store_cache_bytes: int = Field(
        DEFAULT_MAX_BYTES,
        ge=1,
        description="bytes of these copies; the one that is served and a new one always fit",
    )

    # Addresses
    host: Literal["0.0.0.0", "127.0.0.1", "::"] = Field(
        "0.0.0.0", description="address to listen on"
    )
    port: int = Field(8000, ge=1024, le=65535, description="port of the service")
    metrics_port: int = Field(9090, ge=0, le=65535, description="port of /metrics; 0: none")

    # Processes and batches
    threads: int = Field(
        0,
        ge=0,
        le=1024,
        description="cores of each worker; 0: the CPU quota divided by the workers",
    )
    workers: int = Field(1, ge=1, le=64, description="worker processes")
    api_processes: int = Field(1, ge=1, le=64, description="HTTP processes")
    max_batch_size: int = Field(
        8, ge=1, le=1024, description="maximum images in one run of the graph"
    )
    batch_wait_ms: float = Field(
        0, ge=0, le=1000, description="milliseconds that a batch waits for more images"
    )

    # Limits
    max_pending: int = Field(
        256, ge=1, description="images accepted and not yet answered; more get status 429"
    )
    max_pending_bytes: int = Field(
        256 << 20,
        ge=1,
        description="bytes of bodies accepted and not yet answered, and of answers that clients do "
        "not take; more get status 429",
    )
    max_images: int = Field(64, ge=1, description="images in one request")
    max_body_bytes: int = Field(32 << 20, ge=1, description="bytes in the body of one request")
    max_pixels: int = Field(
        50_000_000,
        ge=1,
        description="pixels of one image according to its header; fewer where decoding takes more "
        "than 10 bytes a pixel, as at 16 bits a colour",
    )
    max_connections: int = Field(1024, ge=1, description="open connections of each HTTP process")
    deadline_ms: int = Field(
        10_000, ge=1, description="milliseconds after which a request gets status 504"
    )
    read_timeout_seconds: float = Field(10, gt=0, description="time for a request to arrive")
    keep_alive_seconds: int = Field(
        75, ge=1, description="time after which an idle connection is closed"
    )
    drain_seconds: float = Field(
        20, ge=2, description="maximum time between SIGTERM and the end of the service"
    )
    worker_timeout_seconds: float = Field(
        7,
        gt=0,
        description="a worker without progress for this time, and for five times the duration of "
        "a batch, is replaced; less than deadline_ms, so that its requests do not get status 504; "
        "time in which it waits for a core does not count",
    )

    # Model operation
    reload_seconds: float = Field(
        5, ge=0, description="interval of checks for a new latest version; 0: none"
    )
    drift_window: int = Field(
        2000,
        ge=0,
        description="last images of each worker that drift is measured on; values and classes are "
        "merged to bins of at least 10 images; 0: none",
    )
    cache_entries: int = Field(
        0, ge=0, description="answers that each HTTP process caches by image; 0: none"
    )
    shadow_version: int | None = Field(
        None, ge=1, description="second version, run in idle time for comparison"
    )
    shadow_share: float = Field(
        0.1, gt=0, le=1, description="share of the images that the second version gets"
    )

    # Kept images
    keep: str = Field(
        "",
        description="directory, or s3:// URL, that a sample of the images is kept in, to be "
        "labelled and trained on: those that abstain, are out of distribution, disagree with the "
        "shadow version, or were corrected by /feedback, and a random share",
    )
    keep_share: float = Field(
        0.01, ge=0, le=1, description="share of all images that is kept at random"
    )
    keep_files: int = Field(
        1000, ge=1, description="most images that are kept a day for each reason"
    )
    keep_bytes: int = Field(
        10 << 30, ge=1, description="most bytes of all kept images; then no more are kept"
    )
    keep_free_bytes: int = Field(
        1 << 30, ge=0, description="bytes of the disk that kept images leave free"
    )
    keep_days: int = Field(
        90, ge=0, description="days after which kept images are deleted; 0: never"
    )
    keep_strip_exif: bool = Field(
        True,
        description="take EXIF and other metadata, such as the place, out of kept images",
    )

    # Access and logs
    api_key: SecretStr | None = Field(
        None,
        description="key that clients send as X-API-Key or bearer token, for all paths but the "
        "page's own files, /docs and the health checks; must not be empty",
    )
    api_key_file: Path | None = Field(None, description="file that holds the key")
    cors_origins: str = Field(
        "",
        description="origins of other web pages that may send requests, separated by commas, such "
        "as https://app.example.com; *: all",
    )
    public_key: Path | None = Field(
        None, description="PEM file; only bundles signed with its private key are served"
    )
    log_format: Literal["json", "text"] = Field("json", description="format of the log on stderr")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="lowest level that is logged"
    )
    access_log: bool = Field(False, description="log every request, not only failed ones")
    tracing: bool = Field(False, description="send OpenTelemetry spans, as the OTEL_ variables say")

    @field_validator("store", mode="before")
    @classmethod
    def _write_path(cls, store: Any) -> Any:
        return str(store) if isinstance(store, Path) else store

    @field_validator("port", "metrics_port", mode="before")
    @classmethod
    def _check_service_link(cls, port: Any) -> Any:
        if isinstance(port, str) and port.startswith("tcp://"):
            raise ValueError(
                f"{port} is not a port; Kubernetes sets this variable for a Service of that name: "
                "rename the Service, or set enableServiceLinks to false in the pod"
            )
        return port

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, origins: str) -> str:
        for origin in split_list(origins):
            if origin != ANY_ORIGIN and not ORIGIN.fullmatch(origin):
                raise ValueError(f"{origin} is not an origin such as https://app.example.com")
        return origins

    @field_validator("keep")
    @classmethod
    def _check_kept_location(cls, location: str) -> str:
        if location:
            open_kept(location)  # raises for a URL that can't be used
        return location

    @field_validator("api_key")
    @classmethod
    def _strip_key(cls, key: SecretStr | None) -> SecretStr | None:
        if key is None:
            return None
        # A Kubernetes Secret made with `echo` ends with a newline, which no header can contain.
        stripped = key.get_secret_value().strip()
        if not stripped:
            raise ValueError("the key is empty; leave out this setting to serve without a key")
        return SecretStr(stripped)

    @field_validator("api_key_file")
    @classmethod
    def _check_key_file(cls, path: Path | None) -> Path | None:
        # os.path, since Path.is_file raises for a directory that may not be entered.
        if path is not None and not os.path.isfile(path):
            raise ValueError(f"no such file: {path}")
        return path

    @model_validator(mode="after")
    def _check_key_settings(self) -> "Settings":
        if self.api_key and self.api_key_file:
            raise ValueError("give api_key or api_key_file, not both")
        if self.api_key or self.api_key_file:
            return self

        # Empty variables count as unset. Here that would open a service that should have a key.
        for name in (f"{PREFIX}API_KEY", f"{PREFIX}API_KEY_FILE"):
            if os.environ.get(name) == "":
                raise ValueError(f"{name} is empty; set a key, or unset it to serve without one")
        return self

    @model_validator(mode="after")
    def _check_shadow(self) -> "Settings":
        if self.bundle is not None and self.shadow_version is not None:
            raise ValueError("shadow_version needs a store; give no bundle")
        return self

    @model_validator(mode="after")
    def _check_ports(self) -> "Settings":
        if self.metrics_port == self.port:
            raise ValueError("port and metrics_port must differ")
        return self

    def allowed_origins(self) -> list[str]:
        """Return the origins of `cors_origins`, as browsers write them."""
        return [origin.lower() for origin in split_list(self.cors_origins)]

    def load_api_key(self) -> bytes | None:
        """Return the API key from its setting or file, or None to serve without a key.

        Raises ValueError if the file can't be read or is empty.
        """
        if self.api_key:
            return self.api_key.get_secret_value().encode()
        if not self.api_key_file:
            return None

        try:
            key = self.api_key_file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{self.api_key_file}: the file with the API key can't be read: {error}"
            ) from error
        if not key:
            raise ValueError(f"{self.api_key_file}: the file with the API key is empty")
        return key.encode()


def split_list(text: str) -> list[str]:
    """Return the items of a list that is separated by commas."""
    items = [item.strip() for item in text.split(",")]
    return [item for item in items if item]
