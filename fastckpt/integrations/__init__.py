"""Plug-ins: fastckpt as a part of other people's interfaces. Each is imported only by the programs that use it."""
