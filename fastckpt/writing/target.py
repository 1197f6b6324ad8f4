"""Opens the target of `save` and `save_async`: a path, a URL or a file object; and takes the save's turn among those to the same target."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

from fastckpt.host.files import make_directories
from fastckpt.host.sink import Sink
from fastckpt.options import Options
from fastckpt.store.location import describe, is_url, location
from fastckpt.store.open import open_object
from fastckpt.writing import turns
from fastckpt.writing.object_sink import ObjectSink
from fastckpt.writing.ordered_sink import OrderedSink, keys_of_object, keys_of_path
from fastckpt.writing.sinks import FileObject, open_sink


def open_target(f: Any, verb: str, options: Options) -> OrderedSink:
    """The sink for a path, a URL or a file object, last in the order of the saves to it. verb: "save" or "save_async", for messages.

    OSError, SaveError, StoreError: problems of the target that can be seen before the first byte.
    """
    name = f"{verb} to {describe(f)}"
    if not isinstance(f, (str, os.PathLike)):
        keys = keys_of_object(f)
        opened: Callable[[], Sink] = functools.partial(FileObject, f)
    elif is_url(where := location(f)):
        store, key = open_object(where)
        keys = (("url", store.url, key),)
        opened = functools.partial(ObjectSink, store, key)
    else:
        if describe(f).startswith("file:"):
            make_directories(os.path.dirname(where))  # a directory store does the same
        keys = keys_of_path(where)
        opened = functools.partial(open_sink, where)
    turn = turns.take(keys, name)
    try:
        return OrderedSink(opened(), turn, options.max_order_wait_s)
    except BaseException:
        turn.end()
        raise
