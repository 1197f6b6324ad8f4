from hypothesis import settings

# No deadline: a loaded machine is no failure. print_blob: a failing example can be run again from the log alone.
settings.register_profile("fastckpt", deadline=None, print_blob=True, derandomize=False)
settings.load_profile("fastckpt")
