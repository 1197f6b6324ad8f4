"""Inspects a bucket's settings: which of them would delete our data, hide it, or publish it. Advice for a person, never a condition.

    report = check_bucket(open_s3("s3://bucket/prefix"))
    report.warnings        # sentences; () is good
    report.unknown         # what the credentials may not ask, or the server does not know

Each question is one request by boto3. A question that fails lands in `unknown`; nothing is raised but StoreError for a closed store.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastckpt.store.cloud import S3Store
from fastckpt.store.cloud_credentials import no_debug_logs
from fastckpt.store.cloud_errors import cut_secrets
from fastckpt.store.cloud_lifecycle import concerns, harms

_EVERYBODY = (
    "http://acs.amazonaws.com/groups/global/AllUsers",
    "http://acs.amazonaws.com/groups/global/AuthenticatedUsers",
)
_NOT_SET = frozenset(
    {
        "NoSuchLifecycleConfiguration",
        "NoSuchBucketPolicy",
        "NoSuchPublicAccessBlockConfiguration",
        "NoSuchPublicAccessBlock",
    }
)


@dataclass(frozen=True)
class BucketReport:
    """The result of `check_bucket`."""

    versioning: str | None
    """"Enabled", "Suspended", "Off"; None: not known."""
    warnings: tuple[str, ...]
    unknown: tuple[str, ...]


def check_bucket(store: S3Store) -> BucketReport:
    """Check versioning, lifecycle rules, policy and access list. Four requests, one try each."""
    connection, bucket = store.connection, store.connection.bucket
    unknown: list[str] = []
    warnings: list[str] = []

    def ask(what: str, question: Callable[[], Any]) -> Any:
        """The answer; {} if nothing is set; None if it could not be found out."""
        try:
            return question()
        except Exception as error:  # no error here may keep anybody from saving
            code = getattr(error, "response", {}).get("Error", {}).get("Code", "")
            if code in _NOT_SET:
                return {}
            text = cut_secrets(code or type(error).__name__, connection.credentials.secrets)
            unknown.append(f"{what}: {text}")
            return None

    with no_debug_logs():
        client = ask("boto3", connection.boto3_client)
        if client is None:
            return BucketReport(None, (), tuple(unknown))
        owner = {"ExpectedBucketOwner": connection.expected_bucket_owner} if connection.expected_bucket_owner else {}
        versioning = ask("versioning", lambda: client.get_bucket_versioning(Bucket=bucket, **owner))
        lifecycle = ask("lifecycle rules", lambda: client.get_bucket_lifecycle_configuration(Bucket=bucket, **owner))
        status = ask("bucket policy", lambda: client.get_bucket_policy_status(Bucket=bucket, **owner))
        acl = ask("access list", lambda: client.get_bucket_acl(Bucket=bucket, **owner))
        client.close()
    warnings.extend(harms((lifecycle or {}).get("Rules", ()), connection.prefix))
    if (status or {}).get("PolicyStatus", {}).get("IsPublic"):
        warnings.append("the bucket policy lets everybody in; a checkpoint holds the model")
    if any(grant.get("Grantee", {}).get("URI") in _EVERYBODY for grant in (acl or {}).get("Grants", ())):
        warnings.append("the bucket's access list lets everybody in; a checkpoint holds the model")
    state = None if versioning is None else versioning.get("Status", "Off")
    if state == "Enabled" and not connection.is_aws:
        warnings.append(
            "the bucket keeps versions; some servers (Ceph 16) then ignore create-if-absent, on which commits depend: "
            "switch versioning off, or suspend it"
        )
    if state == "Enabled" and lifecycle is not None and not _cleans_versions(lifecycle, connection.prefix):
        warnings.append(
            "the bucket keeps versions and no lifecycle rule ends them: retired checkpoints stay stored and paid for "
            "(docs/stores.md has a rule that is safe)"
        )
    return BucketReport(state, tuple(warnings), tuple(unknown))


def _cleans_versions(lifecycle: Any, prefix: str) -> bool:
    return any("NoncurrentVersionExpiration" in r and concerns(r, prefix) for r in lifecycle.get("Rules", ()))
