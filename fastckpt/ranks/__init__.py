"""What the ranks of a job decide alike without a word to each other."""
