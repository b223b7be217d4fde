"""Names and limits that directories and buckets have in common."""

LATEST = "latest"
STAGING_PREFIX = ".staging-"
MAX_LATEST_BYTES = 32
ABANDONED_SECONDS = 24 * 3600
"""Age from which what is staged counts as left by a job that died."""
