"""A bucket's lifecycle rules: which of them would delete a repository's objects, or put them out of reach. Nothing is asked here."""

from __future__ import annotations

import xml.etree.ElementTree as Xml
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

Rule = Mapping[str, Any]
"""As boto3 has it: ID, Status, Prefix or Filter, Expiration, Transitions."""

_ARCHIVES = ("GLACIER", "DEEP_ARCHIVE")  # reading back takes hours and a request of its own


class NotRulesError(ValueError):
    """The answer is something else: a login page, a listing of a server that knows no such question."""


def read_rules(data: bytes) -> list[Rule]:
    """The answer to GetBucketLifecycleConfiguration: of each rule what `harms` looks at. NotRulesError."""
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
    """Can the rule hit an object under `prefix`? Our objects have no tags."""
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
    """Sentences: what the rules would do to a repository under `prefix`, and what to do about it."""
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
