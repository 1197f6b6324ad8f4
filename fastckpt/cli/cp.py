"""cp: copies one checkpoint of a repository into a repository elsewhere; or one file or object, verified on the way."""

from __future__ import annotations

import argparse

from fastckpt.cli.mirror import add_places, add_switches, carry_out
from fastckpt.cli.output import OK, WrongUsageError, bar, human, note, print_json, say
from fastckpt.cli.target import (
    add_checkpoint,
    local_path,
    maybe_repository,
    open_source,
    open_target_object,
    options,
    refuse_existing,
)
from fastckpt.upkeep.mirror.files import copy_to_object, copy_to_path
from fastckpt.upkeep.mirror.plan import MirrorAsked

HELP = "copy one checkpoint, or one file or object, between disks and stores"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fastckpt cp`."""
    add_places(parser)
    add_checkpoint(parser)
    add_switches(parser)
    parser.add_argument("--force", action="store_true", help="replace the file or object DST")


def run(arguments: argparse.Namespace) -> int:
    """Copy. RepositoryError, CorruptCheckpointError, StoreError, WrongUsageError, OSError."""
    with maybe_repository(arguments.source, arguments.endpoint_url) as source:
        if source is not None:
            named = arguments.step is not None or arguments.epoch is not None
            asked = MirrorAsked(
                step=arguments.step,
                epoch=arguments.epoch,
                last=None if named else 1,
                contents=arguments.contents,
            )
            return carry_out(source, asked, arguments, "cp")
    if arguments.step is not None or arguments.epoch is not None:
        raise WrongUsageError(f"{arguments.source} is no repository: --step and --epoch choose a checkpoint of one")
    return _copy_file(arguments)


def _copy_file(arguments: argparse.Namespace) -> int:
    source = open_source(arguments.source, arguments.endpoint_url)
    draw = bar(arguments.target, always=arguments.progress)
    try:
        path = local_path(arguments.target)
        if path is not None:
            if path.is_dir():
                path = path / source.name.rstrip("/").rpartition("/")[2]
            refuse_existing([path], arguments.force)
            target = str(path)
            copied = copy_to_path(source, target, options(), draw)
        else:
            endpoint = arguments.to_endpoint_url or arguments.endpoint_url
            with open_target_object(arguments.target, endpoint, force=arguments.force) as (store, key):
                target = f"{store.url}/{key}"
                copied = copy_to_object(source, store, key, options(), draw)
        name = source.name
    finally:
        source.close()
    if arguments.json:
        print_json("cp", {"source": name, "target": target, "n_bytes": copied.n_bytes, "verified": copied.verified})
        return OK
    say(f"{target}: {human(copied.n_bytes)}{', every byte verified' if copied.verified else ''}")
    if not copied.verified:
        note(f"{name} is no fastckpt container: it was copied as it is, and nothing was there to verify it by")
    return OK
