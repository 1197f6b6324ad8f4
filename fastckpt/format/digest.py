"""The two checksums, under their names in the format (docs/format.md, section 1)."""

from fastckpt.kernels.checksums import crc64nvme, crc64nvme_combine, crc64nvme_of, digest, digest_of

ALGORITHM_XXH3_128 = 1
DIGEST_BYTES = 16

__all__ = [
    "ALGORITHM_XXH3_128",
    "DIGEST_BYTES",
    "crc64nvme",
    "crc64nvme_combine",
    "crc64nvme_of",
    "digest",
    "digest_of",
]
