"""Copies checkpoints of a repository into another store: only packs that the other side lacks travel, and a commit record comes last."""
