"""This machine, its interpreter and its torch: threads, memory, files, and what is asked of them below every other room."""
