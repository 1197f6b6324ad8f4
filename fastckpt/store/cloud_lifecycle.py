"""Finds lifecycle rules of a bucket that would delete a repository's objects, or make them unreadable. Sends no requests."""

from __future__ import annotations

import xml.etree.ElementTree as Xml
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

Rule = Mapping[str, Any]
"""A rule in boto3's form: ID, Status, Prefix or Filter, Expiration, Transitions."""

_ARCHIVES = ("GLACIER", "DEEP_ARCHIVE")  # reading back takes hours and needs a special request


class NotRulesError(ValueError):
    """The answer is something else: a login page, or the listing of a server that does not know this question."""


def read_rules(data: bytes) -> list[Rule]:
    """Parse the answer to GetBucketLifecycleConfiguration: for each rule the members that `harms` needs. NotRulesError."""
    try:
        root = Xml.fromstring(data)
    except Xml.ParseError as error:
        raise NotRulesError(f"it is no XML ({error})") from None
    for element in root.iter():  # servers differ in the namespace
        element.tag = element.tag.rpartition("}")[2]
    if root.tag != "LifecycleConfiguration":
        raise NotRulesError(f"it is <{root.tag}>")
    return [_rule(entry) for entry in root.iterfind("Rule")]


def _rule(entry: Xml.Element) -> Rule:
    rule: dict[str, Any] = {name: entry.findtext(name) for name in ("ID", "Status", "Prefix")}
    selection = entry.find("Filter")
    if selection is not None:
        rule["Filter"] = {"Prefix": selection.findtext("Prefix"), **_tag(selection, "Tag")}
        both = selection.find("And")
        if both is not None:
            rule["Filter"]["And"] = {"Prefix": both.findtext("Prefix"), **_tag(both, "Tags")}
    end = entry.find("Expiration")
    if end is not None:
        rule["Expiration"] = {name: text for name in ("Days", "Date") if (text := end.findtext(name))}
    rule["Transitions"] = [{"StorageClass": move.findtext("StorageClass")} for move in entry.iterfind("Transition")]
    return rule


def _tag(selection: Xml.Element, name: str) -> dict[str, Any]:
    tag = selection.find("Tag")
    return {} if tag is None else {name: [tag.findtext("Key")]}


def concerns(rule: Rule, prefix: str) -> bool:
    """Whether the rule can apply to an object under `prefix`. Our objects have no tags."""
    if rule.get("Status") != "Enabled":
        return False
    selection = rule.get("Filter") or {}
    both = selection.get("And") or {}
    if "Tag" in selection or both.get("Tags"):
        return False
    start = rule.get("Prefix") or selection.get("Prefix") or both.get("Prefix") or ""
    ours = f"{prefix}/" if prefix else ""
    return bool(start.startswith(ours) or ours.startswith(start))


def harms(rules: Iterable[Rule], prefix: str) -> Iterator[str]:
    """Sentences about the rules' effects on a repository under `prefix`, with advice."""
    for rule in rules:
        if not concerns(rule, prefix):
            continue
        name = f"lifecycle rule {rule.get('ID') or '(without a name)'!r}"
        end = rule.get("Expiration") or {}
        if "Days" in end or "Date" in end:
            when = f"after {end['Days']} days" if "Days" in end else f"on {end['Date']}"
            yield f"{name} deletes objects {when}, whether a checkpoint still needs them or not: take the prefix out of it"
        for move in rule.get("Transitions", ()):
            if move.get("StorageClass") in _ARCHIVES:
                yield f"{name} moves objects to {move['StorageClass']}, from where they cannot be restored at once"
