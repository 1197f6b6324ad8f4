"""Checks of a container or a repository: everything that can be found out without loading it."""
