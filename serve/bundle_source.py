"""`BundleSource`: where the service gets its bundle from.

That is a store in a directory, a store in a bucket, or one bundle by itself (`--bundle`). What is
served from a bucket is copied to a cache on disk. While the bucket is out of reach, the service
starts from the version that it served last.
"""

from pathlib import Path

from models.bundle import Bundle, BundleError, read_manifest
from models.store import LATEST, BundleCache, Store, StoreError
from serve import logs
from serve.settings import Settings


class BundleSource:
    """The bundles of the settings' model. `is_reachable` is false after a request that failed.

    The methods that make requests are `names`, `latest`, `path` and `open`.
    """

    def __init__(self, settings: Settings):
        self.is_reachable = True
        self._settings = settings
        self._bundle = settings.bundle
        self._cache = BundleCache(settings.store, settings.store_cache, settings.store_cache_bytes)
        self._store = Store(settings.store, self._cache)

    @property
    def location(self) -> str:
        """The path or URL, for messages."""
        return str(self._bundle or self._store.location)

    @property
    def is_bucket(self) -> bool:
        """Whether bundles are copied from a bucket."""
        return self._bundle is None and self._store.is_bucket

    def names(self) -> list[str]:
        """Return the models of the store; those that were served, if it is out of reach."""
        try:
            return self._store.names()
        except StoreError:
            names = self._cache.list_served_names()
            if not names:
                raise
            return names

    def versions(self) -> list[int]:
        """Return the versions of the model; none while the store is out of reach."""
        if self._bundle is not None:
            return [read_manifest(self._bundle).version]
        try:
            return self._store.versions(self._settings.model)
        except StoreError:
            return []

    def latest(self) -> int | None:
        """Return the version that `latest` names. Raises StoreError where it can't be read."""
        try:
            latest = self._store.latest(self._settings.model)
        except StoreError:
            self.is_reachable = False
            raise
        self.is_reachable = True
        return latest

    def path(self, version: str | int) -> Path:
        """Return the directory of a version, which is copied from the bucket where needed.

        Raises BundleError as `Store.path` does; StoreError where the bucket is out of reach and
        there is no copy.
        """
        if self._bundle is not None:
            return self._bundle
        try:
            path = self._store.path(self._settings.model, version)
        except StoreError as error:
            self.is_reachable = False
            copy = self._find_copy(version)
            if copy is None:
                raise
            logs.logger.warning("using the copy in %s: %s", copy, error)
            return copy
        self.is_reachable = True
        return path

    def _find_copy(self, version: str | int) -> Path | None:
        """Return the copy of a version, for "latest" of the one that was served last."""
        name = self._settings.model
        number = self._cache.read_served(name) if version == LATEST else int(version)
        return None if number is None else self._cache.find(name, number)

    def open(self, version: str | int) -> Bundle:
        """Open a version; check its signature if the settings have a key. Raises BundleError."""
        return Bundle(self.path(version), public_key=self._settings.public_key)

    def local_path(self, version: int) -> Path:
        """Return the directory of a version that is served, without a request to a bucket."""
        if self._bundle is not None:
            return self._bundle
        return self._store.local_path(self._settings.model, version)

    def describe_files(self, version: int) -> object:
        """Return what changes when files of a version are replaced, to compare with `==`.

        Of a bucket, the checksums; else sizes and times of the files. Raises BundleError, OSError.
        """
        if self.is_bucket:
            return self._store.read_checksums(self._settings.model, version)
        files: list[tuple[str, int, int]] = []
        for path in sorted(self.path(version).rglob("*")):
            status = path.lstat()
            files.append((str(path), status.st_size, status.st_mtime_ns))
        return files

    def record_served(self, version: int) -> None:
        """Record the version that is served as latest, to start from it without the bucket."""
        if self.is_bucket and self._settings.version == LATEST:
            self._cache.record_served(self._settings.model, version)

    def resolve_model(self) -> None:
        """Set the name of the model, if it is not given and there is only one.

        Raises BundleError if there are none or several, or not the version of the settings.
        """
        if self._bundle is not None:
            self._resolve_bundle(self._bundle)
            return

        if not self._settings.model:
            names = self.names()
            if not names:
                raise BundleError(
                    f"{self.location}: no model in this store; train one first: make train"
                )
            if len(names) > 1:
                raise BundleError(
                    f"{self.location} has several models, choose with --model: {', '.join(names)}"
                )
            self._settings.model = names[0]
        self.path(self._settings.version)

    def _resolve_bundle(self, bundle: Path) -> None:
        manifest = read_manifest(bundle)
        is_named = self._settings.model in ("", manifest.name)
        if not is_named or self._settings.version not in (LATEST, str(manifest.version)):
            raise BundleError(
                f"{bundle}: is {manifest.name}/{manifest.version}, but --model and --version say "
                f"{self._settings.model}/{self._settings.version}; leave them out"
            )
        self._settings.model = manifest.name
        self._settings.version = str(manifest.version)  # which nothing follows
