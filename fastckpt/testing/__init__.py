"""Test tools of this project that other projects may use, too: the store contract, faulty stores, a fault proxy, a null server,
a metadata server."""
