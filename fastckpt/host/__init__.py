"""This machine, its interpreter and its torch: threads, memory, files. Everything that the rooms above ask of them."""
