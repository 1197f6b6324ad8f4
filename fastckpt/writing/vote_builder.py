"""Builds a rank's vote from its index, and checks it without reading it back (docs/format.md, section 11.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fastckpt.errors import CorruptCheckpointError, Damage, SaveError, UnsupportedFormatError
from fastckpt.format import container, directory, directory_columns, directory_reader, records
from fastckpt.format.container import FOOTER_BYTES, HEADER_BYTES, READ_SHARED
from fastckpt.format.directory import Directory, FileEntry, StorageEntry, TensorEntry
from fastckpt.format.keys import SaveId
from fastckpt.format.records import Records
from fastckpt.format.shares import first_entries, shared_numbers
from fastckpt.format.tensor_names import canonical
from fastckpt.format.vote import Vote, part_ranges, save_info, vote_name
from fastckpt.writing.container import index_and_footer

_SAMPLE = 8
_OF_WRONG_VALUES = (AttributeError, TypeError, ValueError)
"""Exceptions that building the texts raises if a value has a wrong type."""


def build_vote(
    save: SaveId, listed: Directory, files: Sequence[FileEntry], chunks: Records, skeleton: bytes
) -> tuple[Vote, bytes]:
    """The vote, equal to the one that a reader will get, and its bytes.

    listed: the directory, including its member `save`. SaveError if a reader would refuse the vote. That would be a fault of fastckpt, and
    it must be found while the state still exists. Large parts are checked by their values before they are written; small parts are read
    back with the reader's own code.
    """
    where = f"the index of step {save.step} that was built"
    try:
        head = _check(listed, files, chunks, where)
        header = container.build_header(READ_SHARED if shared_numbers(listed.storages) else 0)
        parts = [directory.build(listed), directory.build_file_table(files), chunks.tobytes(), skeleton]
        data = b"".join([header, *index_and_footer(header, 0, parts)])
        if not directory_columns.sound(listed, chunks["raw_bytes"]):  # unusual or wrong: the reader can say which
            directory_reader.parse(parts[0], chunks["raw_bytes"], where)
        footer = container.parse_footer(data[-FOOTER_BYTES:], len(data), where)
        name = vote_name(save, listed.rank, listed.world, data)
        found = replace(listed, writer=head.writer, meta=head.meta, save=head.save)
        return Vote(name, save_info(head, name, where), found, part_ranges(footer), tuple(files)), data
    except (CorruptCheckpointError, UnsupportedFormatError, *_OF_WRONG_VALUES) as error:
        raise SaveError(
            f"step {save.step} was not saved, because nobody could read its index: {error}\nIf it is not the save's `meta` that it names, "
            "this is a fault of fastckpt: please report it"
        ) from error


def _check(listed: Directory, files: Sequence[FileEntry], chunks: Records, where: str) -> Directory:
    """Check everything except the rows of the directory. Returns the directory's other members as a reader gets them.
    CorruptCheckpointError.
    """
    damage = records.check(chunks, HEADER_BYTES, [file.n_bytes for file in files])
    if damage:
        raise CorruptCheckpointError(where, damage)
    directory.parse_file_table(directory.build_file_table(files), False, where)
    # With some rows, so that a fault in how rows are written is found too.
    storages, tensors = _sample(listed)
    sample = replace(listed, storages=storages, tensors=tensors)
    found = directory_reader.parse(directory.build(sample), chunks["raw_bytes"], where)
    if found.storages != storages or found.tensors != tuple(sorted(tensors, key=lambda entry: canonical(entry.name))):
        expected = f"{storages!r:.200} and {tensors!r:.200}"
        damage = [Damage("directory", "first rows", expected, f"{found.storages!r:.200} and {found.tensors!r:.200}")]
        raise CorruptCheckpointError(where, damage)
    return found


def _sample(listed: Directory) -> tuple[tuple[StorageEntry, ...], tuple[TensorEntry, ...]]:
    """Some rows of a directory that are one themselves: of storages with shares, which must have names, at least one."""
    shared = shared_numbers(listed.storages)
    numbers = list(range(min(_SAMPLE, len(listed.storages))))
    numbers += sorted(shared.difference(numbers))[:1]
    place = {number: i for i, number in enumerate(numbers)}
    plain = place.keys() - shared
    tensors = [entry for entry in listed.tensors[: 8 * _SAMPLE] if entry.storage in plain][:_SAMPLE]
    if shared:
        tensors += first_entries(listed.tensors, shared & place.keys()).values()
    return (
        tuple(listed.storages[number] for number in numbers),
        tuple(entry._replace(storage=place[entry.storage]) for entry in tensors),
    )
