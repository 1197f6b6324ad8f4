"""Bytes by key: memory, a directory, S3. Knows nothing of checkpoints (docs/stores.md)."""
