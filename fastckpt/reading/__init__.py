"""Stored bytes → chunks → storages → objects; every byte is verified on the way."""
