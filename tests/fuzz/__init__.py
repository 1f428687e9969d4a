"""Damaged states through the public API, in processes of their own.

``python -m tests.fuzz --cases 20000`` (see ``__main__``) reports cases, refused, accepted, deaths
and wrong ones; ``--soak N`` goes on with new seeds.
"""
