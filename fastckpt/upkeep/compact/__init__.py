"""Writes one checkpoint in full: from then on it needs no pack of another save."""
