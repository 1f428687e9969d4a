"""What Linux, macOS and Windows do differently: all of it is here, and nowhere else in the package.

Everything is looked for where it is used, by its name, so that a system that lacks one call loses
that call only. ``docs/platforms.md`` says what each system can do.
"""
