"""What is committed, by whom, and for how long (docs/guarantees.md, section 3)."""
