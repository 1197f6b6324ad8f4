"""What a training loop holds: `Checkpointer` and what it needs of the live objects."""
