"""Prefixes in pieces, kept beyond the process: room for the prefix store, which is to come."""
