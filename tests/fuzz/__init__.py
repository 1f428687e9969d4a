"""Damaged states and stores through the public API, and killed processes, each in a process.

``python -m tests.fuzz --cases 20000`` (see ``__main__``) reports cases, refused, accepted, deaths
and wrong ones; with ``--of objects`` it does so for objects of prefix stores. ``--soak N`` goes on
with new seeds. ``python -m tests.fuzz.kills`` kills processes that use a store.
"""
