"""What a person does with containers and repositories: check, repair, export, salvage, analyze."""
