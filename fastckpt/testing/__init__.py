"""What this project's tests use and other people's tests may: the store contract, faulty stores, a fault proxy, a metadata server."""
