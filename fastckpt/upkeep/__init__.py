"""Work of a person on containers and repositories: check, repair, export, salvage, analyze."""
