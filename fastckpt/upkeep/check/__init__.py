"""Everything that can be known about a container or a repository without loading it."""
